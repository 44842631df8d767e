//! Runs programs one at a time, reaps everybody, and obeys signals meanwhile.
//!
//! Both modes that use it adopt orphans (PID 1 by nature, `apply` by request), so `wait` takes whoever has ended. No
//! other code of the program may wait for children.

use std::fmt;
use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus};

use super::log::Log;
use crate::host::linux::poll;
use crate::host::linux::signals::{SignalPipe, Target, send};

/// Signals that ask the program itself to end. `SIGPWR` and `SIGRTMIN+3` are what other container engines send.
const STOP: [i32; 5] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGPWR, 37];
/// Signals that are passed on to the service, whose administrator knows what they mean.
const FORWARD: [i32; 4] = [libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2, libc::SIGWINCH];
/// How long a script or a patch may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(2);
/// How long a killed process may take to disappear; one that waits for a device may never.
const KILLED: Duration = Duration::from_secs(5);

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
    /// It was killed at the end of its time.
    TimeOut,
    /// It was ended because the whole program was asked to end.
    Stopped,
}

impl Ending {
    pub(super) fn is_success(self) -> bool {
        self == Self::Exited(0)
    }

    /// An exit status that says the same, as a shell has it.
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Exited(code) => u8::try_from(code).unwrap_or(1),
            Self::Signaled(signal) => u8::try_from(128 + signal).unwrap_or(255),
            Self::TimeOut => 124,
            Self::Stopped => 128 + 15,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "ended with status {code}"),
            Self::Signaled(signal) => write!(f, "was ended by signal {signal}"),
            Self::TimeOut => f.write_str("did not end in its time and was killed"),
            Self::Stopped => f.write_str("was stopped"),
        }
    }
}

/// A program to be run.
pub(super) struct Task<'a> {
    command: Command,
    limit: Option<Duration>,
    log: Option<&'a mut Log>,
    service: Option<(i32, Duration)>,
    started: Option<Box<dyn FnOnce() + 'a>>,
}

impl<'a> Task<'a> {
    /// A program without a time limit whose output goes to the console.
    pub(super) fn new(command: Command) -> Self {
        Self { command, limit: None, log: None, service: None, started: None }
    }

    /// After this time it is killed, with everything that it started.
    pub(super) fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Its output goes there.
    pub(super) fn log(mut self, log: &'a mut Log) -> Self {
        self.log = Some(log);
        self
    }

    /// It is the service: signals are passed on to it, this one asks it to end, and it has this time for it.
    pub(super) fn service(mut self, stop_signal: i32, stop_limit: Duration) -> Self {
        self.service = Some((stop_signal, stop_limit));
        self
    }

    /// Done as soon as it has been started.
    pub(super) fn when_started(mut self, work: impl FnOnce() + 'a) -> Self {
        self.started = Some(Box::new(work));
        self
    }
}

/// A program of the partition, by its path.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place inside a partition: its own programs, no host's"
)]
pub(super) fn program(path: &Path) -> Command {
    let mut command = Command::new(path);
    command.current_dir("/").stdin(Stdio::null());
    if std::env::var_os("PATH").is_none() {
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    }
    command
}

/// This program again, even if its file was replaced meanwhile.
pub(super) fn itself() -> io::Result<Command> {
    Ok(program(Path::new("/proc/self/exe")))
}

/// Runs programs one at a time.
pub(super) struct Supervisor {
    signals: SignalPipe,
    stopping: bool,
}

/// Where the current program is on its way out.
enum Phase {
    /// It runs, at most until then.
    Running(Option<Instant>),
    /// It was asked to end, and is killed then.
    Asked(Ending, Instant),
    /// It was killed, and is not waited for beyond then.
    Killed(Ending, Instant),
}

impl Supervisor {
    /// Catches the signals of this process. To be made once.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn new() -> io::Result<Self> {
        let signals: Vec<i32> = STOP.into_iter().chain(FORWARD).chain([libc::SIGCHLD]).collect();
        Ok(Self { signals: SignalPipe::install(&signals)?, stopping: false })
    }

    /// Whether the program was asked to end.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// If it cannot be started, or the kernel refuses to wait. [`Ending::Stopped`] if the program is asked to end, also
    /// if it was before.
    pub(super) fn run(&mut self, mut task: Task<'_>) -> io::Result<Ending> {
        if self.stopping {
            return Ok(Ending::Stopped);
        }
        let pipe = match task.log {
            Some(_) => Some(capture(&mut task.command)?),
            None => None,
        };
        let child = task.command.process_group(0).spawn()?;
        let pid = child.id();
        // The command holds copies of the pipe's other end.
        let Task { limit, mut log, service, started, .. } = task;
        started.into_iter().for_each(|work| work());
        let mut phase = Phase::Running(limit.map(|limit| Instant::now() + limit));
        loop {
            self.wait(phase.deadline(), pipe.as_ref())?;
            if let (Some(pipe), Some(log)) = (&pipe, log.as_deref_mut()) {
                drain(pipe, log)?;
            }
            let signals = self.signals.take()?;
            self.stopping |= signals.iter().any(|signal| STOP.contains(signal));
            if let Some(ending) = reap(pid)? {
                if let (Some(pipe), Some(log)) = (&pipe, log.as_deref_mut()) {
                    drain(pipe, log)?;
                }
                let Some(ended) = phase.ending() else { return Ok(ending) };
                if service.is_none() {
                    kill_rest()?;
                }
                return Ok(ended);
            }
            if service.is_some() {
                signals
                    .iter()
                    .filter(|s| FORWARD.contains(s))
                    .try_for_each(|s| send(Target::Process(pid), *s))?;
            }
            phase = self.advance(phase, pid, service)?;
            if let Phase::Killed(ending, until) = phase
                && Instant::now() >= until
            {
                return Ok(ending);
            }
        }
    }

    /// Waits for a while, reaping, unless the program is asked to end; whether it may go on.
    pub(super) fn pause(&mut self, length: Duration) -> io::Result<bool> {
        let until = Instant::now() + length;
        while !self.stopping && Instant::now() < until {
            self.wait(Some(until), None)?;
            self.stopping |= self.signals.take()?.iter().any(|signal| STOP.contains(signal));
            reap(0)?;
        }
        Ok(!self.stopping)
    }

    /// Asks everybody else in the partition to end, then kills them. For PID 1 only.
    pub(super) fn end_everybody(&mut self, grace: Duration) -> io::Result<()> {
        for (signal, wait) in [(libc::SIGTERM, grace), (libc::SIGKILL, KILLED)] {
            send(Target::Everyone, signal)?;
            let until = Instant::now() + wait;
            while has_children()? && Instant::now() < until {
                self.wait(Some(until.min(Instant::now() + Duration::from_millis(50))), None)?;
                self.signals.take()?;
                reap(0)?;
            }
        }
        Ok(())
    }

    fn advance(&self, phase: Phase, pid: u32, service: Option<(i32, Duration)>) -> io::Result<Phase> {
        let now = Instant::now();
        let (signal, grace) = service.unwrap_or((libc::SIGTERM, GRACE));
        Ok(match phase {
            Phase::Running(until) => {
                let ending = if self.stopping {
                    Ending::Stopped
                } else if until.is_some_and(|until| now >= until) {
                    Ending::TimeOut
                } else {
                    return Ok(phase);
                };
                // A service knows how to end its own processes; a script does not.
                let target = if service.is_some() { Target::Process(pid) } else { Target::Group(pid) };
                send(target, signal)?;
                Phase::Asked(ending, now + grace)
            }
            Phase::Asked(ending, until) if now >= until => {
                send(Target::Group(pid), libc::SIGKILL)?;
                kill_children()?;
                Phase::Killed(ending, now + KILLED)
            }
            // Orphans of those that were killed have become our children.
            Phase::Killed(..) => {
                kill_children()?;
                phase
            }
            Phase::Asked(..) => phase,
        })
    }

    fn wait(&self, deadline: Option<Instant>, pipe: Option<&PipeReader>) -> io::Result<()> {
        let deadline = deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
        let mut polled = vec![PollFd::new(&self.signals, PollFlags::IN)];
        polled.extend(pipe.map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        poll::poll(&mut polled, deadline)?;
        // A closed pipe is always ready; without a pause the loop would spin until the program itself ends.
        let closed = polled.get(1).is_some_and(|fd| fd.revents() == PollFlags::HUP);
        if closed && polled[0].revents().is_empty() {
            poll::readable([self.signals.as_fd()], deadline.min(Instant::now() + Duration::from_millis(20)))?;
        }
        Ok(())
    }
}

impl Phase {
    fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Running(until) => *until,
            Self::Asked(_, until) => Some(*until),
            // Look again soon: orphans keep arriving while their parents die.
            Self::Killed(_, until) => Some((*until).min(Instant::now() + Duration::from_millis(20))),
        }
    }

    fn ending(&self) -> Option<Ending> {
        match self {
            Self::Running(_) => None,
            Self::Asked(ending, _) | Self::Killed(ending, _) => Some(*ending),
        }
    }
}

/// Both outputs of the command go into one pipe.
fn capture(command: &mut Command) -> io::Result<PipeReader> {
    let (reader, writer) = io::pipe()?;
    rustix::fs::fcntl_setfl(&reader, OFlags::NONBLOCK)?;
    command.stdout(writer.try_clone()?).stderr(writer);
    Ok(reader)
}

/// Takes what is in the pipe. What a left-over child writes later is nobody's business.
fn drain(mut pipe: &PipeReader, log: &mut Log) -> io::Result<()> {
    let mut piece = [0; 16 << 10];
    loop {
        match pipe.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => log.push(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reaps everybody who has ended; how this one ended, if it is among them.
fn reap(pid: u32) -> io::Result<Option<Ending>> {
    let mut found = None;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((who, status))) => {
                if u32::try_from(who.as_raw_nonzero().get()) == Ok(pid) {
                    found = ending(status);
                }
            }
            Ok(None) | Err(Errno::CHILD) => return Ok(found),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn ending(status: WaitStatus) -> Option<Ending> {
    status.exit_status().map(Ending::Exited).or_else(|| status.terminating_signal().map(Ending::Signaled))
}

/// Kills every child: those that left their group or session, and orphans that have become ours. What they were about
/// to start becomes ours as well and is found the next time.
fn kill_children() -> io::Result<()> {
    children()?.into_iter().try_for_each(|pid| send(Target::Process(pid), libc::SIGKILL))
}

/// Kills until nobody is left. Whoever is killed leaves its own children to us, so once is not enough.
fn kill_rest() -> io::Result<()> {
    let until = Instant::now() + KILLED;
    while has_children()? && Instant::now() < until {
        kill_children()?;
        std::thread::sleep(Duration::from_millis(5));
        reap(0)?;
    }
    Ok(())
}

fn has_children() -> io::Result<bool> {
    children().map(|children| !children.is_empty())
}

fn children() -> io::Result<Vec<u32>> {
    let own = std::process::id();
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let mut stat = String::new();
        // It may end at any moment.
        let read =
            File::open(format!("/proc/{pid}/stat")).and_then(|mut file| file.read_to_string(&mut stat));
        if read.is_ok() && parse_parent(&stat) == Some(own) {
            children.push(pid);
        }
    }
    Ok(children)
}

/// Field 4 of `/proc/PID/stat`, counted from the end of the program's name.
fn parse_parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_found_behind_a_hostile_program_name() {
        assert_eq!(parse_parent("7 (sh) S 4711 7 7"), Some(4711));
        assert_eq!(parse_parent("7 (a) S 1 (b) S 4711 7"), Some(4711));
        assert_eq!(parse_parent("7 (sh"), None);
    }

    #[test]
    fn endings_have_the_status_that_a_shell_would_give_them() {
        let codes = [Ending::Exited(3), Ending::Signaled(9), Ending::TimeOut, Ending::Stopped];
        assert_eq!(codes.map(Ending::code), [3, 137, 124, 143]);
        assert!(Ending::Exited(0).is_success() && !Ending::Stopped.is_success());
    }
}
