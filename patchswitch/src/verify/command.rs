//! Probe by a shell command.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use super::{CannotTell, Reach, Stop};
use crate::host::linux::programs::{Program, ProgramError, Run};

/// How a probe's command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandEnd {
    /// By itself, with this status; the end of what it wrote.
    Exited(i32, String),
    /// By a signal.
    Killed(i32),
    /// It was still running at the end of its time.
    TimedOut,
}

/// What a shell ends with when it cannot run (126) or does not find (127) the command.
const NO_COMMAND: [i32; 2] = [126, 127];

pub(super) fn run(command: &str, reach: Reach<'_>, timeout: Duration) -> Result<(), Stop> {
    match (reach.run)(command, timeout).map_err(Stop::CannotTell)? {
        CommandEnd::Exited(0, _) => Ok(()),
        CommandEnd::Exited(status, _) if NO_COMMAND.contains(&status) => {
            Err(Stop::CannotTell(CannotTell::NoCommand(status)))
        }
        CommandEnd::Exited(status, text) => {
            let last = text.trim_end().lines().next_back().unwrap_or_default();
            let said = if last.is_empty() { String::new() } else { format!(": {last}") };
            Err(Stop::Fail(format!("the command {command:?} ended with {status}{said}")))
        }
        CommandEnd::Killed(signal) => {
            Err(Stop::Fail(format!("the command {command:?} was ended by signal {signal}")))
        }
        CommandEnd::TimedOut => Err(Stop::Fail(format!("the command {command:?} did not end in time"))),
    }
}

/// Runs a probe's command on the host: for services whose partitions are not ours to enter.
///
/// # Errors
/// [`CannotTell::Program`] if there is no shell or it cannot be started.
pub fn run_on_host(command: &str, timeout: Duration) -> Result<CommandEnd, CannotTell> {
    let run = Run::new(Program::Shell).args(["-c", command]).limit(timeout).whole_group();
    match run.status() {
        Ok(output) => Ok(match (output.status.code(), output.status.signal()) {
            (Some(code), _) => CommandEnd::Exited(code, output.stdout + &output.stderr),
            (None, signal) => CommandEnd::Killed(signal.unwrap_or_default()),
        }),
        Err(ProgramError::TimeOut { .. }) => Ok(CommandEnd::TimedOut),
        Err(error) => Err(CannotTell::Program(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::HERE;
    use super::super::{Outcome, probe};
    use super::*;
    use crate::config::Probe;

    fn outcome(command: &str) -> Result<Outcome, CannotTell> {
        let timeout = Duration::from_millis(500);
        let address = "192.0.2.1".parse().unwrap();
        probe(&Probe::Command { command: command.to_owned() }, address, HERE, timeout)
    }

    #[test]
    fn the_status_decides_and_the_last_line_explains() {
        assert_eq!(outcome("true").unwrap(), Outcome::Pass);
        for (command, words) in [
            ("echo first; echo no database >&2; exit 3", "ended with 3: no database"),
            ("kill -9 $$", "signal 9"),
            ("sleep 30", "in time"),
        ] {
            match outcome(command).unwrap() {
                Outcome::Fail(reason) => assert!(reason.contains(words), "{reason}"),
                Outcome::Pass => panic!("{command} passed"),
            }
        }
    }

    #[test]
    fn a_command_that_is_not_there_says_nothing_about_health() {
        assert!(matches!(outcome("/nowhere/check"), Err(CannotTell::NoCommand(127))));
        assert!(matches!(outcome("/dev/null"), Err(CannotTell::NoCommand(126))));
    }
}
