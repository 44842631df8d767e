//! The administrator's own check of a clone.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use super::{KEPT, Verdict};
use crate::host::linux::programs::{Program, ProgramError, Run};
use crate::patch::wire::printable;

/// The variable that tells the command where the root of the clone is.
const ROOT: &str = "PATCHSWITCH_ROOT";
/// The longest line that is kept, in characters.
const LINE_MAX: usize = 300;

/// Runs the command: 0 is clean, 1 is a finding, everything else is a failure, as with `clamscan(1)`. What it leaves
/// running is killed with it.
pub(super) fn check(command: &str, root: &Path, limit: Duration) -> Verdict {
    let run = Run::new(Program::Shell).args(["-c", command]).env(ROOT, root).limit(limit).whole_group();
    let output = match run.status() {
        Ok(output) => output,
        Err(ProgramError::TimeOut { limit, .. }) => {
            return Verdict::Failed(format!("the command did not end within {limit:?} and was killed"));
        }
        Err(error) => return Verdict::Failed(error.to_string()),
    };
    let lines = lines(&output.stdout).chain(lines(&output.stderr));
    match (output.status.code(), output.status.signal()) {
        (Some(0), _) => Verdict::Clean("the command ended with 0".to_owned()),
        (Some(1), _) => {
            let mut findings: Vec<String> = lines.collect();
            if findings.is_empty() {
                findings.push("the command ended with 1 and said nothing".to_owned());
            }
            let count = findings.len();
            findings.truncate(KEPT);
            Verdict::Found { findings, count }
        }
        (status, signal) => {
            let how = match (status, signal) {
                (Some(status), _) => format!("ended with {status}"),
                (None, Some(signal)) => format!("was ended by signal {signal}"),
                (None, None) => "ended in an unknown way".to_owned(),
            };
            let said = lines.last().map_or_else(String::new, |line| format!(": {line}"));
            Verdict::Failed(format!("the command {how}{said}"))
        }
    }
}

/// Lines that are not empty. A scanner prints names of files, and those come from the clone.
fn lines(text: &str) -> impl Iterator<Item = String> {
    let shown = |line: &str| printable(line).chars().take(LINE_MAX).collect::<String>();
    text.lines().map(str::trim_end).filter(|line| !line.is_empty()).map(shown)
}
