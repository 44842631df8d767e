//! `cargo xtask test`: every tier, each where it can run, and one line that counts them all.

mod machine;
mod nextest;
mod soak;

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
    /// A power cut and a kill in each phase of jobs of each strategy, two to four hours; a second call goes on where one ended
    Soak,
}

impl Tier {
    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Packet => "packet",
            Self::Netns => "netns",
            Self::Vm => "vm",
            Self::All => "all",
            Self::Soak => "soak",
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
                // Programs, not tests.
                "demo" | "bench" => continue,
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
///
/// Where there are two processors, two test machines run side by side, with 1.5 GiB of memory each.
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
    /// In the test machine; of the tiers' tests only some if there is a filter.
    Machine(Series, Vec<Tier>, Option<String>),
    Soak(Series),
    NotRun(Tier, String),
}

/// The series of the tier soak, unless another one is asked for.
const SOAK: &str = "6.12";

/// A line of `tests/KERNELS`.
#[derive(Debug, PartialEq, Eq)]
struct Selection {
    series: Series,
    tiers: Vec<Tier>,
    /// A filter of nextest.
    only: Option<String>,
}

/// Runs `cargo xtask test`.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    let steps = plan(options)?;
    let machine = steps.iter().any(|step| matches!(step, Step::Machine(..) | Step::Soak(_)));
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
            Step::Soak(series) => (format!("soak on Linux {series}"), soak::run(&series, &options.rest)),
            Step::Machine(series, tiers, only) => (
                format!("{} on Linux {series}", names(&tiers)),
                in_machine(&series, &tiers, only, &options.rest),
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
    if tier == Tier::Soak {
        let series = options.in_vm.clone().map_or_else(|| SOAK.parse(), Ok)?;
        return Ok(vec![Step::Soak(series)]);
    }
    if let Some(series) = &options.in_vm {
        if matches!(tier, Tier::Unit | Tier::All) {
            bail!("--in-vm goes with one of the tiers packet, netns and vm");
        }
        return Ok(vec![Step::Machine(series.clone(), vec![tier], None)]);
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
    for Selection { series, tiers, only } in kernels(&text)? {
        // One machine for all that a line names: with a filter the tiers cannot be told apart.
        if tier == Tier::All || tier == Tier::Vm && tiers.contains(&tier) {
            let tiers = if only.is_some() {
                tiers
            } else {
                tiers.into_iter().filter(|t| tier == Tier::All || *t == tier).collect()
            };
            steps.push(Step::Machine(series, tiers, only));
        }
    }
    Ok(steps)
}

/// The last commit that is more than documents, in short: results are of it.
fn commit() -> Result<String> {
    let git = crate::command::Tool::new("git").dir(paths::root());
    let git = git.args(["log", "-1", "--format=%h", "--abbrev=8", "--", ".", ":(exclude)docs"]);
    Ok(git.read()?.trim().to_owned())
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

/// Runs tiers in the test machine. What a line's filter leaves out is not wanted there, and so it is not "skipped".
fn in_machine(series: &Series, tiers: &[Tier], only: Option<String>, rest: &[String]) -> Result<Count> {
    let chosen = only.is_some();
    let filter = only.map(|only| ["-E".to_owned(), only]);
    let rest: Vec<String> = filter.into_iter().flatten().chain(rest.iter().cloned()).collect();
    let mut count = machine::run(series, &targets(tiers)?, &rest, &mut |_| ())?;
    if chosen && count.run == count.passed {
        count.skipped = 0;
    }
    Ok(count)
}

/// Reads `tests/KERNELS`: a series and its tiers per line, and after a colon a filter if not all of their tests are
/// to run. An indented line continues the one before.
fn kernels(text: &str) -> Result<Vec<Selection>> {
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines().map(|line| line.split('#').next().unwrap_or_default()) {
        match lines.last_mut() {
            Some(last) if line.starts_with(' ') => {
                last.push(' ');
                last.push_str(line.trim());
            }
            _ if line.trim().is_empty() => {}
            _ => lines.push(line.trim().to_owned()),
        }
    }
    lines.iter().map(|line| selection(line)).collect()
}

fn selection(line: &str) -> Result<Selection> {
    let (head, only) = line.split_once(':').map_or((line, None), |(head, only)| (head, Some(only.trim())));
    let mut words = head.split_whitespace();
    let series = words.next().context("a line without a series")?.parse()?;
    let tiers: Result<Vec<Tier>> = words
        .map(|word| match Tier::from_str(word, false) {
            Ok(tier @ (Tier::Packet | Tier::Netns | Tier::Vm)) => Ok(tier),
            _ => bail!("no tier {word:?} can run in the test machine"),
        })
        .collect();
    if only == Some("") {
        bail!("there is no filter behind the colon");
    }
    Ok(Selection { series, tiers: tiers?, only: only.map(str::to_owned) })
}

fn native(tiers: &[Tier], rest: &[String]) -> Result<Count> {
    let mut selection = vec!["--workspace".to_owned()];
    if tiers.contains(&Tier::Unit) {
        selection.extend(["--lib", "--bins"].map(str::to_owned));
    }
    for target in targets(tiers)? {
        selection.extend(["--test".to_owned(), target]);
    }
    nextest::run("default", &selection, &[], rest, &mut |_| ())
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
        let list = kernels("# comment\n6.12 vm netns # TCX\n\n6.1 vm: test(=a::b) +\n  test(=c::d) # more\n")
            .unwrap();
        let line = |series: &str, tiers: &[Tier], only: Option<&str>| Selection {
            series: series.parse().unwrap(),
            tiers: tiers.to_vec(),
            only: only.map(str::to_owned),
        };
        let wanted = [
            line("6.12", &[Tier::Vm, Tier::Netns], None),
            line("6.1", &[Tier::Vm], Some("test(=a::b) + test(=c::d)")),
        ];
        assert_eq!(list, wanted);
        for bad in ["six vm", "6.1 unit", "6.1 all", "6.1 nonsense", "6.1 vm:", ": all()"] {
            assert!(kernels(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_repositorys_list_of_kernels_is_good() {
        let text = fs::read_to_string(paths::root().join("tests/KERNELS")).unwrap();
        assert!(kernels(&text).unwrap().iter().all(|line| line.tiers.contains(&Tier::Vm)));
    }

    /// A filter says nothing about a test that is not there any more.
    #[test]
    fn every_test_that_the_list_of_kernels_names_is_there() {
        let text = fs::read_to_string(paths::root().join("tests/KERNELS")).unwrap();
        let filters: Vec<String> = kernels(&text).unwrap().into_iter().filter_map(|line| line.only).collect();
        let names = filters.iter().flat_map(|filter| filter.split("test(=").skip(1));
        for name in names.map(|rest| rest.split(')').next().unwrap()) {
            let (module, test) = name.rsplit_once("::").unwrap();
            let file = format!("{}.rs", module.replace("::", "/"));
            let is_there = ["packet", "netns", "vm"].iter().any(|tier| {
                let source = fs::read_to_string(paths::root().join("tests").join(tier).join(&file));
                source.is_ok_and(|source| source.contains(&format!("fn {test}()")))
            });
            assert!(is_there, "tests/KERNELS names {name}, which is no test");
        }
    }
}
