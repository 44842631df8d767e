//! The command line of `patchswitch-init`. It is written by the agent, in the bundle and in units, not by people.

use std::path::PathBuf;
use std::time::Duration;

pub(super) const HELP: &str = "usage:
  patchswitch-init [--stop-limit S] [--mask NAME]... [--stop-signal N] [--restarts N] [-- PROGRAM ARGUMENT...]
      as PID 1: starting scripts, patches, service
  patchswitch-init apply
      apply the patches of /var/lib/patchswitch/table.json once
  patchswitch-init unmask NAME...
      run the starting scripts that were masked
  patchswitch-init console --file PATH [--detach]
      on the host: keep the end of standard input in a file";

/// A command line that is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// An argument that does not belong there.
    #[error("unexpected argument {0:?}")]
    Unexpected(String),
    /// An option without its value, or a mode without what it needs.
    #[error("{0} needs a value")]
    Missing(&'static str),
    /// A value that is not a number, or not one that makes sense.
    #[error("{option} cannot be {value:?}")]
    Value {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
    },
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Be PID 1.
    Boot(BootOptions),
    /// Apply the patches.
    Apply {
        /// Where the root is, if it is not `/`.
        root: Option<PathBuf>,
    },
    /// Run masked starting scripts.
    Unmask {
        /// Where the root is, if it is not `/`.
        root: Option<PathBuf>,
        /// Their names, without numbers.
        names: Vec<String>,
    },
    /// Keep a console log.
    Console(ConsoleOptions),
    /// Say what the program is for.
    Help,
}

/// How to be PID 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootOptions {
    /// Where the root is, if it is not `/`.
    pub root: Option<PathBuf>,
    /// Starting scripts that are not run.
    pub masks: Vec<String>,
    /// What asks the service to end.
    pub stop_signal: i32,
    /// How long it may take to.
    pub stop_limit: Duration,
    /// How often within a minute it is started again after a failure.
    pub restarts: u32,
    /// The service; empty if the starting scripts start everything.
    pub service: Vec<String>,
}

/// How to keep a console log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleOptions {
    /// The file.
    pub file: PathBuf,
    /// Whether to go on in the background, as a session of its own.
    pub detach: bool,
}

/// Parses the arguments, without the program's name.
pub(super) fn parse(arguments: impl Iterator<Item = String>) -> Result<Mode, ArgsError> {
    let mut rest = arguments.peekable();
    let mode = rest.next_if(|first| !first.starts_with('-'));
    match mode.as_deref() {
        None => boot(rest),
        Some("apply") => {
            let (root, names) = root_and_names(rest)?;
            names.into_iter().next().map_or(Ok(Mode::Apply { root }), |name| Err(ArgsError::Unexpected(name)))
        }
        Some("unmask") => match root_and_names(rest)? {
            (_, names) if names.is_empty() => Err(ArgsError::Missing("unmask")),
            (root, names) => Ok(Mode::Unmask { root, names }),
        },
        Some("console") => console(rest),
        Some("help") => Ok(Mode::Help),
        Some(other) => Err(ArgsError::Unexpected(other.to_owned())),
    }
}

fn boot(mut rest: impl Iterator<Item = String>) -> Result<Mode, ArgsError> {
    let mut options = BootOptions {
        root: None,
        masks: Vec::new(),
        stop_signal: 15,
        stop_limit: Duration::from_secs(20),
        restarts: 5,
        service: Vec::new(),
    };
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--help" | "-h" => return Ok(Mode::Help),
            "--root" => options.root = Some(value("--root", &mut rest)?.into()),
            "--mask" => options.masks.push(value("--mask", &mut rest)?),
            "--stop-signal" => {
                options.stop_signal = number("--stop-signal", &mut rest, 1, 64)? as i32;
            }
            "--stop-limit" => {
                options.stop_limit = Duration::from_secs(number("--stop-limit", &mut rest, 1, 3600)?.into());
            }
            "--restarts" => options.restarts = number("--restarts", &mut rest, 0, 1000)?,
            "--" => {
                options.service = rest.by_ref().collect();
                if options.service.is_empty() {
                    return Err(ArgsError::Missing("--"));
                }
            }
            _ => return Err(ArgsError::Unexpected(argument)),
        }
    }
    Ok(Mode::Boot(options))
}

fn console(mut rest: impl Iterator<Item = String>) -> Result<Mode, ArgsError> {
    let (mut file, mut detach) = (None, false);
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--file" => file = Some(value("--file", &mut rest)?.into()),
            "--detach" => detach = true,
            _ => return Err(ArgsError::Unexpected(argument)),
        }
    }
    let file = file.ok_or(ArgsError::Missing("--file"))?;
    Ok(Mode::Console(ConsoleOptions { file, detach }))
}

fn root_and_names(
    mut rest: impl Iterator<Item = String>,
) -> Result<(Option<PathBuf>, Vec<String>), ArgsError> {
    let (mut root, mut names) = (None, Vec::new());
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--root" => root = Some(value("--root", &mut rest)?.into()),
            _ if argument.starts_with('-') => return Err(ArgsError::Unexpected(argument)),
            _ => names.push(argument),
        }
    }
    Ok((root, names))
}

fn value(option: &'static str, rest: &mut impl Iterator<Item = String>) -> Result<String, ArgsError> {
    rest.next().ok_or(ArgsError::Missing(option))
}

fn number(
    option: &'static str,
    rest: &mut impl Iterator<Item = String>,
    least: u32,
    most: u32,
) -> Result<u32, ArgsError> {
    let value = value(option, rest)?;
    let parsed = value.parse().ok().filter(|number| (least..=most).contains(number));
    parsed.ok_or(ArgsError::Value { option, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Mode, ArgsError> {
        parse(text.split_whitespace().map(ToOwned::to_owned))
    }

    #[test]
    fn the_agent_s_command_lines_are_understood() {
        let Ok(Mode::Boot(options)) =
            parsed("--stop-limit 7 --mask cron --mask at --stop-signal 3 --restarts 0 -- nginx -g --mask")
        else {
            panic!("not understood")
        };
        assert_eq!(options.stop_limit, Duration::from_secs(7));
        assert_eq!(options.masks, ["cron", "at"]);
        assert_eq!((options.stop_signal, options.restarts), (3, 0));
        assert_eq!(options.service, ["nginx", "-g", "--mask"], "everything after -- is the service's");
        assert!(matches!(parsed(""), Ok(Mode::Boot(o)) if o.service.is_empty() && o.stop_signal == 15));
        assert_eq!(parsed("apply"), Ok(Mode::Apply { root: None }));
        assert_eq!(parsed("apply --root /x"), Ok(Mode::Apply { root: Some("/x".into()) }));
        assert_eq!(parsed("unmask cron"), Ok(Mode::Unmask { root: None, names: vec!["cron".into()] }));
        assert!(matches!(parsed("console --file /l --detach"), Ok(Mode::Console(o)) if o.detach));
        assert_eq!(parsed("help"), Ok(Mode::Help));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| parsed(text).unwrap_err().to_string();
        assert_eq!(error("reboot"), "unexpected argument \"reboot\"");
        assert_eq!(error("--what"), "unexpected argument \"--what\"");
        assert_eq!(error("apply now"), "unexpected argument \"now\"");
        assert_eq!(error("unmask"), "unmask needs a value");
        assert_eq!(error("unmask -x"), "unexpected argument \"-x\"");
        assert_eq!(error("console"), "--file needs a value");
        assert_eq!(error("--"), "-- needs a value");
        assert_eq!(error("--stop-signal"), "--stop-signal needs a value");
        assert_eq!(error("--stop-signal 65"), "--stop-signal cannot be \"65\"");
        assert_eq!(error("--stop-limit 0"), "--stop-limit cannot be \"0\"");
        assert_eq!(error("--restarts many"), "--restarts cannot be \"many\"");
    }
}
