//! A process held by a descriptor, so that its number cannot come to mean another one.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::poll;

/// A process, alive or ended, that nobody can be confused with.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    fd: OwnedFd,
}

/// Which process a number meant at the time of writing: the number and the start time together are unique until
/// the next boot. This is what survives in a file while no agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// The number, in the agent's process namespace.
    pub pid: u32,
    /// When the process began, in clock ticks since the boot (`proc_pid_stat(5)`, field 22).
    pub start: u64,
}

impl Process {
    /// Takes hold of the process that has this number now; `None` if there is none.
    ///
    /// # Errors
    /// What `pidfd_open` says, other than `ESRCH`.
    pub fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match rustix::process::pidfd_open(number, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(Self { pid, fd })),
            Err(Errno::SRCH) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes hold of a process that was written down earlier; `None` if it has ended, even if its number lives on.
    ///
    /// # Errors
    /// As [`Process::open`] and [`Process::id`].
    pub fn reopen(id: ProcessId) -> io::Result<Option<Self>> {
        let Some(process) = Self::open(id.pid)? else { return Ok(None) };
        Ok((process.id()? == Some(id)).then_some(process))
    }

    /// The process's number, in the agent's process namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What to write down to find the process again; `None` if it has ended and was reaped.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn id(&self) -> io::Result<Option<ProcessId>> {
        let stat = match fs::read_to_string(format!("/proc/{}/stat", self.pid)) {
            Ok(stat) => stat,
            Err(error) if gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let id = parse_start(&stat).map(|start| ProcessId { pid: self.pid, start });
        id.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "malformed /proc/PID/stat"))
    }

    /// Asks the process to end in order (`SIGTERM`). Ended already: nothing to do.
    ///
    /// # Errors
    /// What `pidfd_send_signal` says, other than `ESRCH`.
    pub fn terminate(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.fd, Signal::TERM) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether the process has ended; it may not have been reaped yet.
    ///
    /// # Errors
    /// What `poll` says.
    pub fn has_ended(&self) -> io::Result<bool> {
        self.wait(Instant::now())
    }

    /// Waits for the end of the process; `false` if it is still alive at the deadline.
    ///
    /// # Errors
    /// What `poll` says.
    pub fn wait(&self, deadline: Instant) -> io::Result<bool> {
        Ok(poll::readable([self.fd.as_fd()], deadline)?[0])
    }

    /// Kills the process. That it has ended already is fine.
    ///
    /// # Errors
    /// What `pidfd_send_signal` says, other than `ESRCH`.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.fd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `/proc` answers `ESRCH` where a process ends between `open` and `read`.
pub(crate) fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// Field 22 of `/proc/PID/stat`. Field 2 is the program's name in parentheses and may itself have spaces and
/// parentheses, so fields are counted from the last one.
fn parse_start(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::host::linux::programs::{Program, Run};

    #[test]
    fn the_start_time_is_found_behind_a_hostile_program_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(parse_start(&format!("7 (nginx) {tail}")), Some(4711));
        assert_eq!(parse_start(&format!("7 (a) S 1 (b) {tail}")), Some(4711));
        assert_eq!(parse_start("7 (nginx"), None);
    }

    #[test]
    fn a_process_is_waited_for_killed_and_not_confused_with_another() {
        let mut child = Run::new(Program::Shell).args(["-c", "exec sleep 60"]).spawn().unwrap();
        let process = Process::open(child.id()).unwrap().unwrap();
        let id = process.id().unwrap().unwrap();
        assert!(Process::reopen(id).unwrap().is_some());
        assert!(Process::reopen(ProcessId { start: id.start + 1, ..id }).unwrap().is_none());
        assert!(!process.wait(Instant::now() + Duration::from_millis(20)).unwrap());
        process.kill().unwrap();
        assert!(process.wait(Instant::now() + Duration::from_secs(5)).unwrap());
        child.wait().unwrap();
        process.kill().unwrap();
        assert!(Process::reopen(id).unwrap().is_none());
    }
}
