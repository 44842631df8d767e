//! PID 1 of a partition whose root has no init of its own.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::args::BootOptions;
use super::paths::Paths;
use super::supervisor::{Ending, Supervisor, Task, itself, program};
use super::{apply, policy, report, say, start};
use crate::control::Message;

/// The time within which restarts are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// How long to wait before a failed service is started again.
const PAUSE: Duration = Duration::from_secs(1);
/// How long everybody else may take to end when the service has.
const GRACE: Duration = Duration::from_secs(2);
/// How long the agent is looked for: at the start in the background, at the end in the way.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(1));

/// Why the partition ends, and with which status.
struct End {
    reason: String,
    code: u8,
}

impl End {
    fn new(reason: impl Into<String>, code: u8) -> Self {
        Self { reason: reason.into(), code }
    }
}

/// Boots, serves, ends. Returns the exit status.
pub(super) fn boot(options: &BootOptions) -> u8 {
    if std::process::id() != 1 {
        say("this has to be PID 1 of a partition; see `patchswitch-init help`");
        return 2;
    }
    let paths = Paths::below(options.root.as_deref());
    let mut supervisor = match Supervisor::new() {
        Ok(supervisor) => supervisor,
        Err(error) => {
            say(&format!("failed to catch signals: {error}"));
            return 71;
        }
    };
    let end = live(options, &paths, &mut supervisor)
        .unwrap_or_else(|error| End::new(format!("the init failed: {error}"), 71));
    say(&end.reason);
    // Who asked knows; and an agent that waits for the end does not listen.
    if !supervisor.is_stopping() {
        let message = Message::Stopping { reason: end.reason, code: end.code.into() };
        report::tell(&paths, &message, PATIENCE.1);
    }
    if let Err(error) = supervisor.end_everybody(GRACE) {
        say(&format!("failed to end the other processes: {error}"));
    }
    end.code
}

fn live(options: &BootOptions, paths: &Paths, supervisor: &mut Supervisor) -> io::Result<End> {
    if let Err(error) = policy::restore(paths) {
        say(&format!("failed to restore policy-rc.d: {error}"));
    }
    if let Err(failed) = start::run(paths, &options.masks, supervisor)? {
        return Ok(if supervisor.is_stopping() {
            asked()
        } else {
            End::new(failed.to_string(), failed.code())
        });
    }
    if apply::is_wanted(paths) {
        // A process of its own, as under systemd, so that its orphans can be told from ours.
        let mut command = itself()?;
        command.arg("apply");
        if let Some(root) = paths.root() {
            command.arg("--root").arg(root);
        }
        match supervisor.run(Task::new(command))? {
            ending if ending.is_success() => {}
            Ending::Stopped => return Ok(asked()),
            ending => return Ok(End::new(format!("applying the patches {ending}"), ending.code())),
        }
    }
    if options.service.is_empty() {
        // The starting scripts have started everything.
        report::tell_later(paths, Message::ServiceStarted {}, PATIENCE.0);
        while supervisor.pause(Duration::from_secs(3600))? {}
        return Ok(asked());
    }
    serve(options, paths, supervisor)
}

fn asked() -> End {
    End::new("asked to stop", 0)
}

/// Keeps the service running, within limits.
fn serve(options: &BootOptions, paths: &Paths, supervisor: &mut Supervisor) -> io::Result<End> {
    let mut restarts = Restarts::new(options.restarts);
    loop {
        let mut command = program(Path::new(&options.service[0]));
        command.args(&options.service[1..]);
        let tell = || report::tell_later(paths, Message::ServiceStarted {}, PATIENCE.0);
        let task = Task::new(command).service(options.stop_signal, options.stop_limit).when_started(tell);
        let ending = match supervisor.run(task) {
            Ok(ending) => ending,
            Err(error) => {
                return Ok(End::new(
                    format!("failed to start the service {}: {error}", options.service[0]),
                    127,
                ));
            }
        };
        match ending {
            Ending::Stopped => return Ok(asked()),
            Ending::Exited(0) => return Ok(End::new("the service ended by itself", 0)),
            failed if restarts.allow(Instant::now()) => {
                say(&format!("the service {failed}; it is started again"));
                if !supervisor.pause(PAUSE)? {
                    return Ok(asked());
                }
            }
            failed => return Ok(End::new(format!("the service {failed}"), failed.code())),
        }
    }
}

/// How often a service may fail.
struct Restarts {
    allowed: usize,
    recent: VecDeque<Instant>,
}

impl Restarts {
    fn new(allowed: u32) -> Self {
        Self { allowed: allowed as usize, recent: VecDeque::new() }
    }

    /// Whether it may be started again, at this time.
    fn allow(&mut self, now: Instant) -> bool {
        while self.recent.front().is_some_and(|at| now.duration_since(*at) > WINDOW) {
            self.recent.pop_front();
        }
        let allowed = self.recent.len() < self.allowed;
        if allowed {
            self.recent.push_back(now);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_may_fail_so_often_within_a_minute_and_again_later() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut restarts = Restarts::new(2);
        assert!(restarts.allow(at(0)) && restarts.allow(at(1)));
        assert!(!restarts.allow(at(2)) && !restarts.allow(at(59)));
        assert!(restarts.allow(at(61)), "the first is more than a minute ago");
        assert!(!restarts.allow(at(61)));
        assert!(!Restarts::new(0).allow(start));
    }
}
