//! `cargo xtask test`: every tier, each where it can run, and one line that counts them all.

mod machine;
mod nextest;

pub(crate) use machine::in_vm;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use self::nextest::Count;
use crate::build;
use crate::cache::say;
use crate::paths;
use crate::setup::{self, Need};
use crate::vm::kernel::Series;

/// A kind of tests, by what they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Tier {
    /// Nothing: any user, any kernel
    Unit,
    /// BPF programs by BPF_PROG_TEST_RUN; root
    Packet,
    /// Real sockets in network namespaces; root
    Netns,
    /// The whole thing on stock Debian kernels, in the test machine
    Vm,
    /// All of them
    All,
}

impl Tier {
    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Packet => "packet",
            Self::Netns => "netns",
            Self::Vm => "vm",
            Self::All => "all",
        }
    }

    /// The test targets of the package `patchswitch-tests` that belong to this tier: one directory each. What is
    /// neither of the others plays in network namespaces.
    fn targets(self) -> Result<Vec<String>> {
        if self == Self::Unit {
            return unit_targets();
        }
        let mut found = Vec::new();
        for entry in fs::read_dir(paths::root().join("tests"))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let tier = match name.as_str() {
                // A program, not a test.
                "demo" => continue,
                "packet" => Self::Packet,
                "vm" => Self::Vm,
                _ => Self::Netns,
            };
            if tier == self && entry.path().join("main.rs").is_file() {
                found.push(name);
            }
        }
        found.sort();
        Ok(found)
    }
}

/// The test targets of the other packages, which need no privilege.
fn unit_targets() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for package in fs::read_dir(paths::root())? {
        let tests = package?.path().join("tests");
        for entry in fs::read_dir(tests).into_iter().flatten() {
            let path = entry?.path();
            let is_target =
                path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
            found.extend(
                path.file_stem().filter(|_| is_target).map(|stem| stem.to_string_lossy().into_owned()),
            );
        }
    }
    found.sort();
    Ok(found)
}

/// Runs the tests: all of them, or one tier.
///
/// Needs a Debian machine with Rust and does the rest of the set-up itself. Tests that cannot run here are said "not
/// run"; where the variable CI is set, that is a failure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which tests
    #[arg(value_enum, default_value_t = Tier::All)]
    tier: Tier,
    /// Run this tier's tests (packet, netns or vm) in the test machine, on this series of kernels only
    #[arg(long, value_name = "SERIES")]
    in_vm: Option<Series>,
    /// Filters and options for nextest
    #[arg(last = true, value_name = "FILTER")]
    rest: Vec<String>,
}

/// What is run by one call of nextest.
enum Step {
    Native(Vec<Tier>),
    Machine(Series, Vec<Tier>),
    NotRun(Tier, String),
}

/// Runs `cargo xtask test`.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    let steps = plan(options)?;
    let machine = steps.iter().any(|step| matches!(step, Step::Machine(..)));
    setup::ensure(if machine {
        &[Need::Build, Need::Test, Need::Machine]
    } else {
        &[Need::Build, Need::Test]
    })?;
    build::programs()?;
    let mut total = Count::default();
    let (mut failed, mut not_run) = (Vec::new(), Vec::new());
    for step in steps {
        let (name, result) = match step {
            Step::NotRun(tier, reason) => {
                not_run.push(format!("{}: {reason}", tier.name()));
                continue;
            }
            Step::Native(tiers) => (names(&tiers), native(&tiers, &options.rest)),
            Step::Machine(series, tiers) => (
                format!("{} on Linux {series}", names(&tiers)),
                machine::run(&series, &targets(&tiers)?, &options.rest),
            ),
        };
        match result {
            Ok(count) => {
                total.add(&count);
                if count.run > count.passed {
                    failed.push(format!("{name}: {} of {} failed", count.run - count.passed, count.run));
                }
            }
            Err(error) => failed.push(format!("{name}: {error:#}")),
        }
    }
    Ok(conclude(&total, &failed, &not_run, start))
}

#[expect(
    clippy::print_stderr,
    reason = "the line that people and CI look for, after nextest's own of the same form"
)]
fn conclude(total: &Count, failed: &[String], not_run: &[String], start: Instant) -> ExitCode {
    for what in failed {
        say(&format!("FAILED {what}"));
    }
    for what in not_run {
        say(&format!("not run: {what}"));
    }
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("     Summary [{seconds:>8.3}s] {total}");
    let incomplete = !not_run.is_empty() || total.skipped > 0;
    let strict = std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false");
    if failed.is_empty() && total.run > 0 && !(strict && incomplete) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn plan(options: &Options) -> Result<Vec<Step>> {
    let tier = options.tier;
    if let Some(series) = &options.in_vm {
        if matches!(tier, Tier::Unit | Tier::All) {
            bail!("--in-vm goes with one of the tiers packet, netns and vm");
        }
        return Ok(vec![Step::Machine(series.clone(), vec![tier])]);
    }
    let wanted: Vec<Tier> = match tier {
        Tier::All => vec![Tier::Unit, Tier::Packet, Tier::Netns, Tier::Vm],
        one => vec![one],
    };
    let mut steps = Vec::new();
    let mut native = Vec::new();
    for tier in wanted.iter().copied().filter(|tier| *tier != Tier::Vm) {
        match hindrance(tier)? {
            Some(reason) => steps.push(Step::NotRun(tier, reason)),
            None => native.push(tier),
        }
    }
    if !native.is_empty() {
        steps.push(Step::Native(native));
    }
    let text = fs::read_to_string(paths::root().join("tests/KERNELS")).context("tests/KERNELS")?;
    for (series, tiers) in kernels(&text)? {
        let tiers: Vec<Tier> =
            tiers.into_iter().filter(|t| tier == Tier::All || *t == tier && tier == Tier::Vm).collect();
        if !tiers.is_empty() {
            steps.push(Step::Machine(series, tiers));
        }
    }
    Ok(steps)
}

/// Why a tier cannot run natively.
fn hindrance(tier: Tier) -> Result<Option<String>> {
    if tier == Tier::Unit {
        return Ok(None);
    }
    if tier.targets()?.is_empty() {
        return Ok(Some("there are no such tests".to_owned()));
    }
    let root = rustix::process::geteuid().is_root();
    Ok((!root).then(|| "needs root".to_owned()))
}

/// Reads `tests/KERNELS`: a series and its tiers per line.
fn kernels(text: &str) -> Result<Vec<(Series, Vec<Tier>)>> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let series = words.next().context("an empty line")?.parse()?;
        let tiers: Result<Vec<Tier>> = words
            .map(|word| match Tier::from_str(word, false) {
                Ok(tier @ (Tier::Packet | Tier::Netns | Tier::Vm)) => Ok(tier),
                _ => bail!("no tier {word:?} can run in the test machine"),
            })
            .collect();
        Ok((series, tiers?))
    };
    lines.filter(|line| !line.is_empty()).map(parse).collect()
}

fn native(tiers: &[Tier], rest: &[String]) -> Result<Count> {
    let mut selection = Vec::new();
    if tiers.contains(&Tier::Unit) {
        selection.extend(["--workspace", "--lib", "--bins"].map(str::to_owned));
    } else {
        selection.extend(["-p", "patchswitch-tests"].map(str::to_owned));
    }
    for target in targets(tiers)? {
        selection.extend(["--test".to_owned(), target]);
    }
    nextest::run("default", &selection, &[], rest)
}

fn targets(tiers: &[Tier]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for tier in tiers {
        all.extend(tier.targets()?);
    }
    Ok(all)
}

fn names(tiers: &[Tier]) -> String {
    tiers.iter().map(|tier| tier.name()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_kernels_is_read_and_checked() {
        let list = kernels("# comment\n6.12 vm netns # TCX\n\n6.1 vm\n").unwrap();
        assert_eq!(list.len(), 2);
        assert_eq!(list[0], ("6.12".parse().unwrap(), vec![Tier::Vm, Tier::Netns]));
        for bad in ["six vm", "6.1 unit", "6.1 all", "6.1 nonsense"] {
            assert!(kernels(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_repositorys_list_of_kernels_is_good() {
        let text = fs::read_to_string(paths::root().join("tests/KERNELS")).unwrap();
        assert!(kernels(&text).unwrap().iter().all(|(_, tiers)| tiers.contains(&Tier::Vm)));
    }
}
