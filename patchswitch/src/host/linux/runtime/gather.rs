//! The output of a command, as far as it comes before the command ends.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::process::Child;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;

use super::super::pidfd::Process;
use super::super::poll;

/// How much of each output of a command is kept.
const OUTPUT_MAX: usize = 1 << 20;

/// Collects both outputs until the child has ended (`true`) or the deadline has passed.
///
/// A pipe may stay open for ever in the hands of what the command left behind, so it is the end of the child that
/// counts, not the end of the pipe.
pub(super) fn gather(child: &mut Child, deadline: Instant) -> io::Result<(String, String, bool)> {
    let process = Process::open(child.id())?.ok_or(io::ErrorKind::NotFound)?;
    let mut out = Collected::new(child.stdout.take().map(OwnedFd::from))?;
    let mut err = Collected::new(child.stderr.take().map(OwnedFd::from))?;
    let ended = loop {
        let mut polled = vec![PollFd::new(&process, PollFlags::IN)];
        polled.extend([&out, &err].into_iter().filter_map(Collected::poll));
        let ready = poll::poll(&mut polled, deadline)?;
        let ended = !polled[0].revents().is_empty();
        out.read()?;
        err.read()?;
        if ended || ready == 0 {
            break ended;
        }
    };
    Ok((out.text(), err.text(), ended))
}

struct Collected {
    pipe: Option<File>,
    bytes: Vec<u8>,
}

impl Collected {
    fn new(pipe: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(pipe) = &pipe {
            rustix::fs::fcntl_setfl(pipe, OFlags::NONBLOCK)?;
        }
        Ok(Self { pipe: pipe.map(File::from), bytes: Vec::new() })
    }

    fn poll(&self) -> Option<PollFd<'_>> {
        self.pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN))
    }

    /// Takes what is there. Beyond the limit it is read and dropped, so that the command does not block.
    fn read(&mut self) -> io::Result<()> {
        let mut piece = [0; 16 << 10];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut piece) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    let room = OUTPUT_MAX - self.bytes.len();
                    self.bytes.extend_from_slice(&piece[..count.min(room)]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn text(self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Program, Run};
    use super::*;

    #[test]
    fn output_ends_with_the_command_although_a_child_of_it_keeps_the_pipe() {
        let script = "echo out; echo err >&2; sleep 60 & echo $! >&2; exit 3";
        let mut child = Run::new(Program::Shell).args(["-c", script]).spawn().unwrap();
        let start = Instant::now();
        let (out, err, ended) = gather(&mut child, start + Duration::from_secs(30)).unwrap();
        assert!(ended && start.elapsed() < Duration::from_secs(20));
        assert_eq!(out, "out\n");
        let mut lines = err.lines();
        assert_eq!(lines.next(), Some("err"));
        let sleeper: u32 = lines.next().unwrap().parse().unwrap();
        Process::open(sleeper).unwrap().unwrap().kill().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(3));
    }

    #[test]
    fn gathering_stops_at_the_deadline() {
        let mut child = Run::new(Program::Shell).args(["-c", "echo early; exec sleep 60"]).spawn().unwrap();
        let (out, _, ended) = gather(&mut child, Instant::now() + Duration::from_millis(300)).unwrap();
        assert!(!ended);
        assert_eq!(out, "early\n");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
