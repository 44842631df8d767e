//! `cargo xtask test soak`: every phase of a job of every strategy, ended by a power cut and by a kill, each a test of its own.
//!
//! All of them take more than an hour, so each result is kept at once, in a table of the repository (`docs/soak-SERIES.md`), with the
//! commit that it is of. A second call goes on where the first one ended: what has passed at this commit is not run again.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::machine;
use super::nextest::{Count, without_color};
use crate::cache::say;
use crate::command::Tool;
use crate::vm::kernel::Series;
use crate::{build, paths};

/// Where the tests are, and what is below it: power or kill, strategy, command, phase.
const MODULE: &str = "job::soak::";
const ENDS: [&str; 2] = ["power", "kill"];
const HEAD: &str = "| strategy | command | phase | power | kill |\n|---|---|---|---|---|\n";
const FAILED: &str = "**failed**";
const NOT_RUN: &str = "not run";

/// How a point ended, after how many seconds, and at which commit.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    passed: bool,
    seconds: u64,
    commit: String,
}

/// What is known of the points, by their names below [`MODULE`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Results(BTreeMap<String, Outcome>);

/// Runs what has not passed yet at this commit on a kernel of this series.
pub(super) fn run(series: &Series, rest: &[String]) -> Result<Count> {
    let commit = super::commit()?;
    let file = paths::root().join(format!("docs/soak-{series}.md"));
    let mut results = Results::load(&file)?;
    let all = points()?;
    results.0.retain(|name, _| all.contains(name));
    let left = all.iter().filter(|name| !results.has_passed(name, &commit)).count();
    say(&format!(
        "soak: {left} of {} points are left at {commit}; results go to {}",
        all.len(),
        file.display()
    ));
    let mut count = Count::default();
    if left > 0 {
        let only = ["--run-ignored", "only", "-E", &results.filter(&commit)].map(str::to_owned);
        let rest: Vec<String> = only.into_iter().chain(rest.iter().cloned()).collect();
        let mut heard = |line: &str| {
            // The next one may be cut off.
            if results.hear(line, &commit)
                && let Err(error) = fs::write(&file, results.table(&all, series))
            {
                say(&format!("failed to write {}: {error}", file.display()));
            }
        };
        count = machine::run(series, &["vm".to_owned()], &rest, &mut heard)?;
    }
    // What has passed before is not skipped, and what is not of this tier is not wanted.
    count.skipped = 0;
    count.run += (all.len() - left) as u64;
    count.passed += (all.len() - left) as u64;
    Ok(count)
}

/// The names of all points, by the test binary's own list.
fn points() -> Result<Vec<String>> {
    let (_, binary) = build::tests(&["vm".to_owned()])?.into_iter().next().context("no test binary")?;
    let list = Tool::new(binary).args(["--list", "--ignored", "--format", "terse"]).read()?;
    let names = list.lines().filter_map(|line| line.strip_suffix(": test")?.strip_prefix(MODULE));
    Ok(names.map(str::to_owned).collect())
}

impl Results {
    fn load(file: &Path) -> Result<Self> {
        match fs::read_to_string(file) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| file.display().to_string()),
        }
    }

    /// Reads the table. What is no result of a point is left out, and so is run.
    fn parse(text: &str) -> Self {
        let mut results = Self::default();
        for line in text.lines() {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [strategy, command, phase, ends @ ..] = cells.as_slice() else { continue };
            for (end, cell) in ENDS.iter().zip(ends) {
                if let Some(outcome) = Outcome::parse(cell) {
                    let _ = results.0.insert(format!("{end}::{strategy}::{command}::{phase}"), outcome);
                }
            }
        }
        results
    }

    fn has_passed(&self, name: &str, commit: &str) -> bool {
        self.0.get(name).is_some_and(|outcome| outcome.passed && outcome.commit == commit)
    }

    /// All points but those that have passed at a commit, as nextest's filter.
    fn filter(&self, commit: &str) -> String {
        let passed = self.0.keys().filter(|name| self.has_passed(name, commit));
        let passed: Vec<String> = passed.map(|name| format!(" - test(={MODULE}{name})")).collect();
        format!("test(/^{MODULE}(power|kill)::/){}", passed.concat())
    }

    /// Takes a result from a line of nextest's; whether there was a new one: what fails is told once more at the end.
    fn hear(&mut self, line: &str, commit: &str) -> bool {
        let Some((name, passed, seconds)) = result(&without_color(line)) else { return false };
        let outcome = Outcome { passed, seconds, commit: commit.to_owned() };
        self.0.insert(name, outcome.clone()) != Some(outcome)
    }

    fn table(&self, all: &[String], series: &Series) -> String {
        let mut rows: Vec<&str> = Vec::new();
        for name in all {
            let row = name.split_once("::").map_or(name.as_str(), |(_, row)| row);
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        let passed = self.0.values().filter(|outcome| outcome.passed).count();
        let (failed, points) = (self.0.len() - passed, all.len());
        let mut text = format!(
            "# The tier soak on Linux {series}\n\nA job is ended in each of its phases, by a power cut and by `kill -9`. `cargo xtask \
             test soak` makes this table: {points} points, of which {passed} passed, {failed} failed and {} have not been run. In seconds, \
             on an emulated processor, with the commit of each result.\n\n{HEAD}",
            points - self.0.len()
        );
        for row in rows {
            let cells = ENDS.map(|end| {
                let name = format!("{end}::{row}");
                match self.0.get(&name) {
                    Some(outcome) => outcome.to_string(),
                    None if all.contains(&name) => NOT_RUN.to_owned(),
                    None => "–".to_owned(),
                }
            });
            let _ = writeln!(text, "| {} | {} |", row.replace("::", " | "), cells.join(" | "));
        }
        text
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.seconds, self.commit)?;
        if self.passed { Ok(()) } else { write!(f, " {FAILED}") }
    }
}

impl Outcome {
    fn parse(cell: &str) -> Option<Self> {
        let (seconds, rest) = cell.split_once(" (")?;
        let (commit, rest) = rest.split_once(')')?;
        Some(Self {
            passed: rest.trim() != FAILED,
            seconds: seconds.parse().ok()?,
            commit: commit.to_owned(),
        })
    }
}

/// Reads a line such as `PASS [  61.467s] ( 1/45) patchswitch-tests::vm job::soak::power::takeover::apply::boot`.
fn result(line: &str) -> Option<(String, bool, u64)> {
    let (word, rest) = line.trim().split_once(" [")?;
    let passed = match word.trim() {
        "PASS" => true,
        "FAIL" | "TIMEOUT" | "ABORT" | "SIGABRT" | "SIGKILL" => false,
        _ => return None,
    };
    let (seconds, rest) = rest.split_once("s]")?;
    let seconds = seconds.trim().trim_start_matches('>').split('.').next()?.parse().ok()?;
    let name = rest.split_whitespace().last()?.strip_prefix(MODULE)?;
    Some((name.to_owned(), passed, seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSES: &str =
        "        PASS [  61.467s] ( 1/45) patchswitch-tests::vm job::soak::power::takeover::apply::boot";
    const FAILS: &str =
        "        FAIL [   9.000s] ( 2/45) patchswitch-tests::vm job::soak::kill::takeover::apply::boot";

    #[test]
    fn results_are_taken_from_nextests_lines() {
        let mut results = Results::default();
        assert!(results.hear(PASSES, "0123abcd") && results.hear(FAILS, "0123abcd"));
        assert!(!results.hear(FAILS, "0123abcd"), "a failure is told twice");
        assert!(
            !results.hear("        PASS [   1.000s] (3/45) patchswitch-tests::vm job::good::go", "0123abcd")
        );
        assert!(
            !results.hear("       START [         ] (4/45) patchswitch-tests::vm job::soak::kill::a", "0")
        );
        let name = "power::takeover::apply::boot";
        assert!(results.has_passed(name, "0123abcd") && !results.has_passed(name, "ffffffff"));
        let all = "test(/^job::soak::(power|kill)::/)";
        assert_eq!(results.filter("0123abcd"), format!("{all} - test(=job::soak::{name})"));
        assert_eq!(results.filter("ffffffff"), all);
    }

    #[test]
    fn the_table_says_what_passed_failed_and_was_not_run_and_is_read_back() {
        let mut results = Results::default();
        assert!(results.hear(PASSES, "0123abcd") && results.hear(FAILS, "4567abcd"));
        let all = [
            "kill::takeover::apply::boot",
            "kill::takeover::apply::scan",
            "power::takeover::apply::boot",
            "power::takeover::apply::scan",
        ]
        .map(str::to_owned);
        let table = results.table(&all, &"6.12".parse().unwrap());
        assert!(table.contains("4 points, of which 1 passed, 1 failed and 2 have not been run"), "{table}");
        let row = "| takeover | apply | boot | 61 (0123abcd) | 9 (4567abcd) **failed** |";
        assert!(table.contains(row), "{table}");
        assert!(table.contains("| takeover | apply | scan | not run | not run |"), "{table}");
        assert_eq!(Results::parse(&table), results);
    }
}
