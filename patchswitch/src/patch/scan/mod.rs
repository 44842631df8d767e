//! The scan of a clone before anything is put into it (patent step 702): what is scanned is what boots.
//!
//! Two checks, on the clone's root mounted read-only: its files against the digests of its own package database
//! (`packages`), and a command of the administrator (`hook`), e.g. a virus scanner. No program of the clone is
//! ever run, and nothing is opened but regular files inside it. The database lies in the clone, so the first check
//! finds what is broken or was replaced carelessly, not an intruder who rewrote the database as well; that is what
//! the command is for.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::config::{Policy, Scan};
use crate::exit::ExitCode;
use crate::host::linux::root::Root;

mod database;
mod hook;
mod packages;

/// How many findings of one check are kept.
const KEPT: usize = 50;

/// What a check came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing is wrong, as far as this check sees. Says what was looked at.
    Clean(String),
    /// Something is wrong.
    Found {
        /// What, at most fifty.
        findings: Vec<String>,
        /// How many there are altogether.
        count: usize,
    },
    /// It was not made, and does not have to be: says why.
    NotRun(String),
    /// It could not be made, or not to its end.
    Failed(String),
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its name: `packages` or `command`.
    pub name: &'static str,
    /// What it came to.
    pub verdict: Verdict,
    /// How long it took.
    #[serde(with = "crate::config::duration")]
    pub took: Duration,
}

/// What all checks came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The checks.
    pub checks: Vec<Check>,
}

/// Why the job does not go on with this clone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// Something was found.
    #[error("the scan ({check}) of the clone found {count}: {}", first(.findings, *.count))]
    Found {
        /// The check.
        check: &'static str,
        /// What, at most fifty.
        findings: Vec<String>,
        /// How many there are altogether.
        count: usize,
    },
    /// A check could not be made.
    #[error(
        "the scan ({check}) of the clone could not be made: {reason}; \
         [scan] on_failure = \"warn\" would go on without it"
    )]
    Failed {
        /// The check.
        check: &'static str,
        /// Why not.
        reason: String,
    },
}

impl ScanError {
    /// Always [`ExitCode::BadData`].
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::BadData
    }
}

fn first(findings: &[String], count: usize) -> String {
    let shown = findings.iter().take(3).cloned().collect::<Vec<_>>().join("; ");
    if count > 3 { format!("{shown}; and {} more", count - 3) } else { shown }
}

/// Makes all checks that are wanted of a clone whose root is mounted, read-only, at `path`.
pub fn scan(path: &Path, wanted: &Scan) -> Report {
    let timed = |name, check: &dyn Fn() -> Verdict| {
        let start = Instant::now();
        let verdict = check();
        Check { name, verdict, took: start.elapsed() }
    };
    let packages = || match (wanted.packages, Root::open(path)) {
        (false, _) => Verdict::NotRun("it is switched off".to_owned()),
        (true, Ok(root)) => packages::check(&root, Instant::now() + wanted.limit),
        (true, Err(error)) => Verdict::Failed(error.to_string()),
    };
    let command = || match &wanted.command {
        None => Verdict::NotRun("there is no command".to_owned()),
        Some(command) => hook::check(command, path, wanted.limit),
    };
    Report { checks: vec![timed("packages", &packages), timed("command", &command)] }
}

impl Report {
    /// Judges the checks by the policy: what to warn of, if the job may go on.
    ///
    /// # Errors
    /// [`ScanError`] for the first check that ends the job.
    pub fn judge(&self, policy: &Scan) -> Result<Vec<String>, ScanError> {
        let mut warnings = Vec::new();
        for Check { name: check, verdict, .. } in &self.checks {
            let (error, policy) = match verdict {
                Verdict::Clean(_) | Verdict::NotRun(_) => continue,
                Verdict::Found { findings, count } => {
                    let (findings, count) = (findings.clone(), *count);
                    (ScanError::Found { check, findings, count }, policy.on_finding)
                }
                Verdict::Failed(reason) => {
                    (ScanError::Failed { check, reason: reason.clone() }, policy.on_failure)
                }
            };
            match policy {
                Policy::FailClosed => return Err(error),
                Policy::Warn => warnings.push(error.to_string()),
            }
        }
        Ok(warnings)
    }
}

#[cfg(test)]
mod tests;
