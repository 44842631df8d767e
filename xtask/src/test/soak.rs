//! `cargo xtask test soak`: every phase of a job of every strategy, ended by a power cut and by a kill, each a test of its own. That takes
//! about an hour, so each result is kept at once, and a second call goes on where the first one ended.
//!
//! Results are of a commit and a kernel, in `target/soak`; the last ones are a table in the repository, `docs/soak.md`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::machine;
use super::nextest::{Count, without_color};
use crate::cache::say;
use crate::command::Tool;
use crate::vm::kernel::Series;
use crate::{build, paths};

/// Where the tests are, and what is below it: power or kill, strategy, command, phase.
const MODULE: &str = "job::soak::";
const ENDS: [&str; 2] = ["power", "kill"];

/// How a point ended, and after how many seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Outcome {
    passed: bool,
    seconds: f64,
}

/// What is known of the points.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Results(BTreeMap<String, Outcome>);

/// Runs what has not passed yet at this commit on a kernel of this series.
pub(super) fn run(series: &Series, rest: &[String]) -> Result<Count> {
    let commit = super::commit()?;
    let directory = paths::target().join("soak");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let file = directory.join(format!("{series}-{commit}.json"));
    let mut results = Results::load(&file)?;
    let all = points()?;
    let left = all.iter().filter(|name| !results.has_passed(name)).count();
    say(&format!(
        "soak: {left} of {} points are left at {commit}; results go to {}",
        all.len(),
        file.display()
    ));
    let mut count = Count::default();
    if left > 0 {
        let filter = ["--run-ignored".to_owned(), "only".to_owned(), "-E".to_owned(), results.filter()];
        let rest: Vec<String> = filter.into_iter().chain(rest.iter().cloned()).collect();
        let mut heard = |line: &str| {
            if results.hear(line) {
                // The next one may be cut off.
                results.save(&file);
            }
        };
        count = machine::run(series, &["vm".to_owned()], &rest, &mut heard)?;
    }
    let table = results.table(&all, series, &commit);
    fs::write(paths::root().join("docs/soak.md"), table).context("docs/soak.md")?;
    // What has passed before is not skipped, and what is not of this tier is not wanted.
    count.skipped = 0;
    count.run += all.len() as u64 - left as u64;
    count.passed += all.len() as u64 - left as u64;
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
        match fs::read(file) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| file.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| file.display().to_string()),
        }
    }

    fn save(&self, file: &PathBuf) {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        if let Err(error) = fs::write(file, text) {
            say(&format!("failed to write {}: {error}", file.display()));
        }
    }

    fn has_passed(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|outcome| outcome.passed)
    }

    /// All points but those that have passed, as nextest's filter.
    fn filter(&self) -> String {
        let passed = self.0.iter().filter(|(_, outcome)| outcome.passed);
        let passed: Vec<String> = passed.map(|(name, _)| format!(" - test(={MODULE}{name})")).collect();
        format!("test(/^{MODULE}(power|kill)::/){}", passed.concat())
    }

    /// Takes a result from a line of nextest's; whether there was one. A failed point comes a second time, in the list at the end.
    fn hear(&mut self, line: &str) -> bool {
        let Some((name, outcome)) = result(&without_color(line)) else { return false };
        self.0.insert(name, outcome) != Some(outcome)
    }

    fn table(&self, all: &[String], series: &Series, commit: &str) -> String {
        let mut rows: Vec<&str> = Vec::new();
        for name in all {
            let row = name.split_once("::").map_or(name.as_str(), |(_, row)| row);
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        let known = all.iter().filter(|name| self.0.contains_key(*name)).count();
        let passed = all.iter().filter(|name| self.has_passed(name)).count();
        let mut text = format!(
            "# The tier soak\n\nA job is ended in each of its phases, by a power cut and by `kill -9`: `cargo xtask test soak` makes this \
             table. {passed} of {} points passed, {} failed, {} have not been run; Linux {series}, commit {commit}. In seconds, on an \
             emulated processor.\n\n| strategy | command | phase | power | kill |\n|---|---|---|---|---|\n",
            all.len(),
            known - passed,
            all.len() - known
        );
        for row in rows {
            let cells = ENDS.map(|end| match self.0.get(&format!("{end}::{row}")) {
                Some(Outcome { passed: true, seconds }) => format!("{seconds:.0}"),
                Some(_) => "**failed**".to_owned(),
                None if all.contains(&format!("{end}::{row}")) => "not run".to_owned(),
                None => "–".to_owned(),
            });
            text += &format!("| {} | {} |\n", row.replace("::", " | "), cells.join(" | "));
        }
        text
    }
}

/// Reads a line such as `PASS [  61.467s] ( 1/45) patchswitch-tests::vm job::soak::power::takeover::apply::boot`.
fn result(line: &str) -> Option<(String, Outcome)> {
    let (word, rest) = line.trim().split_once(" [")?;
    let passed = match word.trim() {
        "PASS" => true,
        "FAIL" | "TIMEOUT" | "ABORT" | "SIGABRT" | "SIGKILL" => false,
        _ => return None,
    };
    let (seconds, rest) = rest.split_once("s]")?;
    let seconds = seconds.trim().trim_start_matches('>').parse().ok()?;
    let name = rest.split_whitespace().last()?.strip_prefix(MODULE)?;
    Some((name.to_owned(), Outcome { passed, seconds }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSED: &str =
        "        PASS [  61.467s] ( 1/45) patchswitch-tests::vm job::soak::power::takeover::apply::boot";
    const FAILED: &str =
        "        FAIL [   9.000s] ( 2/45) patchswitch-tests::vm job::soak::kill::takeover::apply::boot";

    #[test]
    fn results_are_taken_from_nextests_lines() {
        let mut results = Results::default();
        assert!(results.hear(PASSED) && results.hear(FAILED));
        assert!(!results.hear(FAILED), "a failure is told twice");
        assert!(!results.hear("        PASS [   1.000s] (3/45) patchswitch-tests::vm job::good::jobs_go"));
        assert!(
            !results.hear("       START [         ] (4/45) patchswitch-tests::vm job::soak::kill::a::b::c")
        );
        assert!(results.has_passed("power::takeover::apply::boot"));
        assert_eq!(
            results.filter(),
            "test(/^job::soak::(power|kill)::/) - test(=job::soak::power::takeover::apply::boot)"
        );
    }

    #[test]
    fn the_table_says_what_passed_failed_and_was_not_run() {
        let mut results = Results::default();
        assert!(results.hear(PASSED) && results.hear(FAILED));
        let all = [
            "kill::takeover::apply::boot",
            "kill::takeover::apply::scan",
            "power::takeover::apply::boot",
            "power::takeover::apply::scan",
        ]
        .map(str::to_owned);
        let table = results.table(&all, &"6.12".parse().unwrap(), "0123abc");
        assert!(table.contains("1 of 4 points passed, 1 failed, 2 have not been run"), "{table}");
        assert!(table.contains("| takeover | apply | boot | 61 | **failed** |"), "{table}");
        assert!(table.contains("| takeover | apply | scan | not run | not run |"), "{table}");
    }
}
