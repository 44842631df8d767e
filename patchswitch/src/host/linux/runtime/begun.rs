//! Commands in a partition: begun at once, or begun before they are wanted.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use super::super::mountns::Inside;
use super::super::poll;
use super::gather::gather;
use super::scratch::Scratch;
use super::{Executed, LIMIT, Runtime, RuntimeError, error, read_log};

/// Says that it is there, and does what its argument says when it is told to. If nobody is left who could tell it, it ends.
const WAITS: &str = r#"echo && read -r go && eval "$1""#;

/// A command under way. Dropped before its end, it is killed with everything that it started.
#[derive(Debug)]
pub(super) struct Begun {
    runtime: Runtime,
    name: String,
    command: String,
    scratch: Scratch,
    child: Child,
    has_ended: bool,
}

impl Begun {
    pub(super) fn new(
        runtime: &Runtime,
        name: &str,
        command: &[&str],
        input: Option<File>,
    ) -> Result<Self, RuntimeError> {
        let scratch = Scratch::new(&runtime.root, name)?;
        // The bundle's own setting of new privileges is for the init alone.
        let run = runtime.run("exec", Some(&scratch.log)).args(["--no-new-privs", "--cgroup"]);
        let run = run.arg(scratch.cgroup.name()).arg(name).args(command.iter().copied());
        let run = match input {
            Some(input) => run.stdin(input),
            None => run,
        };
        let child = run.spawn()?;
        let (runtime, name, command) = (runtime.clone(), name.to_owned(), command.join(" "));
        Ok(Self { runtime, name, command, scratch, child, has_ended: false })
    }

    pub(super) fn wait_out(mut self, limit: Duration) -> Result<Executed, RuntimeError> {
        let place = Path::new(&self.name).to_owned();
        let gathered = gather(&mut self.child, Instant::now() + limit);
        if !gathered.as_ref().is_ok_and(|(_, _, ended)| *ended) {
            self.has_ended = true;
            self.scratch.kill(&mut self.child)?;
        }
        let (stdout, stderr, ended) = gathered.map_err(error("read the output of a command in", &place))?;
        if !ended {
            let (name, command) = (self.name.clone(), self.command.clone());
            return Err(RuntimeError::TimeOut { name, command, limit });
        }
        let status = self.child.wait().map_err(error("wait for a command in", &place))?;
        self.has_ended = true;
        let own = read_log(&self.scratch.log);
        let code = status.code().unwrap_or(255);
        // With a status of its own the runtime says why in its log; a command's failure leaves the log empty.
        if code != 0 && !own.is_empty() {
            return Err(self.runtime.failed("run a command in", &self.name, &own));
        }
        Ok(Executed { code, stdout, stderr })
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if !self.has_ended
            && let Err(error) = self.scratch.kill(&mut self.child)
        {
            tracing::warn!(partition = self.name, "{error}");
        }
    }
}

/// A shell command in a partition that does nothing until it is told to: what it takes to get into the partition is over by
/// then. Dropped, it ends without having done anything; so it does if whoever has it is killed.
#[derive(Debug)]
pub struct Ready {
    begun: Begun,
    word: File,
}

impl Runtime {
    /// Begins a shell command that waits for the word.
    ///
    /// # Errors
    /// [`RuntimeError`], e.g. because the partition has no shell, or does not run.
    pub fn prepare(&self, _inside: &Inside, name: &str, command: &str) -> Result<Ready, RuntimeError> {
        let failed = || error("make a pipe for a command in", Path::new(name));
        let (theirs, word) = pipe_with(PipeFlags::CLOEXEC).map_err(failed())?;
        let waits = ["/bin/sh", "-c", WAITS, "sh", command];
        let mut begun = Begun::new(self, name, &waits, Some(File::from(theirs)))?;
        command.clone_into(&mut begun.command);
        let is_there = match &mut begun.child.stdout {
            Some(output) => says_something(output, Instant::now() + LIMIT),
            None => Ok(Sign::Missing),
        };
        match is_there.map_err(error("wait for a command in", Path::new(name)))? {
            Sign::Given => Ok(Ready { begun, word: File::from(word) }),
            Sign::Ended => {
                let Executed { code, stderr, .. } = begun.wait_out(LIMIT)?;
                Err(self.failed("get a shell in", name, &format!("it ended with {code}; {stderr}")))
            }
            Sign::Missing => {
                let text = format!("none was there within {LIMIT:?}");
                Err(self.failed("get a shell in", name, &text))
            }
        }
    }
}

impl Ready {
    /// Has it do what it is for.
    ///
    /// # Errors
    /// As [`Runtime::exec`].
    pub fn run(mut self, limit: Duration) -> Result<Executed, RuntimeError> {
        let told = self.word.write_all(b"go\n");
        told.map_err(error("tell a command in", Path::new(&self.begun.name)))?;
        // That is all that it has as its input.
        drop(self.word);
        self.begun.wait_out(limit)
    }
}

/// What is heard of a shell that is to say that it is there.
enum Sign {
    Given,
    /// Nothing, and nothing will be.
    Ended,
    /// Nothing yet.
    Missing,
}

/// Waits for one byte.
fn says_something(output: &mut ChildStdout, deadline: Instant) -> io::Result<Sign> {
    let ready = poll::poll(&mut [PollFd::new(&*output, PollFlags::IN)], deadline)?;
    match ready {
        0 => Ok(Sign::Missing),
        _ if output.read(&mut [0])? > 0 => Ok(Sign::Given),
        _ => Ok(Sign::Ended),
    }
}
