//! One call of nextest, and what it counted.

use std::fmt;
use std::io::{BufRead, BufReader, IsTerminal};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::build::{self, cargo};
use crate::paths::TARGET;

/// How many tests ran, passed and were left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) run: u64,
    pub(crate) passed: u64,
    /// Of those that passed: only when they were tried again.
    pub(crate) flaky: u64,
    pub(crate) skipped: u64,
}

impl Count {
    pub(crate) fn add(&mut self, other: &Self) {
        self.run += other.run;
        self.passed += other.passed;
        self.flaky += other.flaky;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { run, passed, flaky, skipped } = self;
        write!(f, "{run} tests run: {passed} passed")?;
        if *flaky > 0 {
            write!(f, " ({flaky} flaky)")?;
        }
        write!(f, ", ")?;
        match run - passed {
            0 => write!(f, "{skipped} skipped"),
            failed => write!(f, "{failed} failed, {skipped} skipped"),
        }
    }
}

/// Runs the selected tests and counts them; `heard` gets each line of nextest's. `Err` only if nothing can be said about them.
pub(crate) fn run(
    profile: &str,
    selection: &[String],
    environment: &[(&str, String)],
    rest: &[String],
    heard: &mut dyn FnMut(&str),
) -> Result<Count> {
    let color = if std::io::stderr().is_terminal() { "always" } else { "never" };
    let mut tool =
        cargo()?.args(["nextest", "run", "--target", TARGET, "--profile", profile, "--color", color]);
    tool = tool.env("PATCHSWITCH_BIN_DIR", build::programs_dir()).args(selection).args(rest);
    for (name, value) in environment {
        tool = tool.env(name, value);
    }
    let mut child = tool.stderr(Stdio::piped()).spawn()?;
    let output = child.stderr.take().context("no output")?;
    let mut count = None;
    for line in BufReader::new(output).lines() {
        let line = line?;
        show(&line);
        heard(&line);
        count = parse_summary(&without_color(&line)).or(count);
    }
    let status = child.wait()?;
    let count = count.with_context(|| format!("nextest ended without a summary ({status})"))?;
    // Were a failure not in the summary's numbers, it must be seen all the same.
    if count.run == count.passed && !status.success() {
        bail!("nextest failed ({status}) although {count}");
    }
    Ok(count)
}

#[expect(clippy::print_stderr, reason = "passes on what nextest prints")]
fn show(line: &str) {
    eprintln!("{line}");
}

/// Reads a line such as `Summary [   0.012s] 3 tests run: 3 passed (1 slow), 0 skipped`, or `2/3 tests run: …` if the
/// run was cut short.
fn parse_summary(line: &str) -> Option<Count> {
    let text = line.trim().strip_prefix("Summary [")?.split_once(']')?.1;
    let (head, parts) = text.split_once(" run:")?;
    let started = head.split_whitespace().next()?;
    let (ran, all) = started.split_once('/').unwrap_or((started, started));
    let number = |word: &str| {
        let mut items = parts.split(',').map(str::split_whitespace);
        items.find_map(|mut item| {
            let value = item.next()?;
            (item.next()? == word).then(|| value.parse::<u64>().ok())?
        })
    };
    let ran: u64 = ran.parse().ok()?;
    // Tests that were cut off count as skipped: they must not be forgotten.
    let cut = all.parse::<u64>().ok()?.checked_sub(ran)?;
    Some(Count {
        run: ran,
        passed: number("passed").unwrap_or(0),
        flaky: flaky(parts).unwrap_or(0),
        skipped: number("skipped").unwrap_or(0) + cut,
    })
}

/// Reads the number of `(1 slow, 2 flaky)`.
fn flaky(parts: &str) -> Option<u64> {
    let (inside, _) = parts.split_once('(')?.1.split_once(')')?;
    inside.split(", ").find_map(|item| item.strip_suffix(" flaky")?.trim().parse().ok())
}

pub(super) fn without_color(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut inside = false;
    for c in line.chars() {
        match c {
            '\u{1b}' => inside = true,
            'm' if inside => inside = false,
            _ if inside => {}
            c => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_counted() {
        let count = |line: &str| parse_summary(&without_color(line)).map(|c| (c.run, c.passed, c.skipped));
        assert_eq!(count("     Summary [   0.012s] 3 tests run: 3 passed, 0 skipped"), Some((3, 3, 0)));
        assert_eq!(count("     Summary [   9.1s] 1 test run: 1 passed (1 slow), 7 skipped"), Some((1, 1, 7)));
        let mixed = "\u{1b}[31;1m     Summary\u{1b}[0m [ 1.0s] \u{1b}[1m5\u{1b}[0m tests run: 3 passed (1 flaky), 1 failed, \
                     1 timed out, 2 skipped";
        assert_eq!(count(mixed), Some((5, 3, 2)));
        let flaky = |line: &str| parse_summary(&without_color(line)).map(|c| c.flaky);
        assert_eq!(flaky(mixed), Some(1));
        assert_eq!(flaky("Summary [ 1.0s] 9 tests run: 9 passed (3 slow, 2 flaky), 0 skipped"), Some(2));
        assert_eq!(count("Summary [ 1.0s] 2/5 tests run: 1 passed, 1 failed, 0 skipped"), Some((2, 1, 3)));
        assert_eq!(count("PASS [ 1.0s] summary"), None);
    }

    #[test]
    fn failures_show_in_the_total() {
        let count = Count { run: 5, passed: 3, flaky: 0, skipped: 1 };
        assert_eq!(count.to_string(), "5 tests run: 3 passed, 2 failed, 1 skipped");
        let flaky = Count { run: 5, passed: 5, flaky: 2, skipped: 0 };
        assert_eq!(flaky.to_string(), "5 tests run: 5 passed (2 flaky), 0 skipped");
    }
}
