//! The measurements of the data path, `cargo xtask bench net`, and of clones, `cargo xtask bench disk` (see [`disk`]).
//!
//! ```text
//!  peers (a laboratory each) ─► programs (12, 22) ─► packets (8, 9), rr (10), memory (18) ─► handover (1 to 7), loads (1, 2)
//!                                     all of them ─► stats ─► report, plot
//! ```
//!
//! Nothing is judged by its time alone: what is compared was measured in turn in one run; on the network in the order ABBA,
//! where patchswitch is measured with itself (A/A) as well. Runs as root in network namespaces of its own.

mod disk;
mod flip;
mod flows;
mod handover;
mod head;
mod kernel;
mod late;
mod loads;
mod packets;
mod peers;
mod plan;
mod plot;
mod probe;
mod programs;
mod rates;
mod report;
mod rr;
mod seen;
mod stats;
mod window;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use patchswitch_tests::leftovers::{List, Snapshot};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::head::Head;
use crate::peers::Product;
use crate::plan::{ROWS, Scale, Selection};
use crate::report::{Found, say};

/// More files than one process of a measurement has open at once.
const FILES: u64 = 18_000;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// The data path and the switch.
    Net,
    /// Clones.
    Disk,
}

/// Measures patchswitch and its peers.
#[derive(Debug, Parser)]
struct Cli {
    /// What is measured
    #[arg(value_enum, default_value = "net")]
    what: What,
    /// Fewer and shorter blocks: under five minutes
    #[arg(long)]
    quick: bool,
    /// Only these rows and peers
    #[arg(long, value_name = "ROW|PEER", num_args = 1..)]
    only: Vec<String>,
    /// Say which there are, and measure nothing
    #[arg(long)]
    list: bool,
    /// Where the results go
    #[arg(long, value_name = "DIRECTORY")]
    out: Option<PathBuf>,
    /// Hold so many connections from an address; a measurement starts itself so
    #[arg(long, hide = true, num_args = 2, value_names = ["ADDRESS", "COUNT"])]
    hold: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    if cli.list {
        list(cli.what);
        return Ok(ExitCode::SUCCESS);
    }
    if let [from, count] = &cli.hold[..] {
        flows::hold(from, count)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (rows, keys): (&[(u8, &str)], Vec<&str>) = match cli.what {
        What::Net => (&ROWS, peers::ALL.iter().map(|(key, _)| *key).collect()),
        What::Disk => (&disk::ROWS, disk::keys().collect()),
    };
    let selection = Selection::parse(&cli.only, rows, &keys)?;
    let scale = Scale { quick: cli.quick };
    raise_limit()?;
    let begun = Instant::now();
    let name = cli.what.name();
    let out = cli.out.unwrap_or_else(|| Path::new("target/bench").join(name));
    std::fs::create_dir_all(&out).with_context(|| format!("failed to make {}", out.display()))?;
    let disks = disk::Scale { quick: cli.quick };
    let blocks = if cli.what == What::Net { scale.blocks() } else { disks.rounds() };
    let head = Head::read(cli.what, cli.quick, blocks);
    say(&head.text());
    // A program that is asked for its version may make directories.
    let before = Snapshot::take()?;
    let mut found = Found::default();
    let measured = match cli.what {
        What::Net => measure(scale, &selection, &mut found),
        What::Disk => disk::measure(disks, &selection, &mut found),
    };
    // What was measured until something failed is kept all the same.
    write((&out, cli.what), &head, &found)?;
    say(&found.table());
    say(&format!("{}; the whole took {:.0} s", out.display(), begun.elapsed().as_secs_f64()));
    measured?;
    clean(&before)
}

impl What {
    const fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Disk => "disk",
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::Net => {
                "patchswitch in relation to its peers (veth; higher is better for rates, lower for gaps and latencies)"
            }
            Self::Disk => {
                "clones in relation to those of others (lower is better for times, higher for bytes a second)"
            }
        }
    }
}

/// A process may have as many files open as it needs. Only who may change the limit itself (`CAP_SYS_RESOURCE`) can go
/// beyond it.
fn raise_limit() -> Result<()> {
    let known = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let files = Some(known.max(FILES));
    setrlimit(Resource::Nofile, Rlimit { current: files, maximum: files }).with_context(|| {
        format!(
            "a process may have {known} files open here and {FILES} are needed: ulimit -n {FILES}, as root"
        )
    })
}

fn list(what: What) {
    let rows: &[(u8, &str)] = if what == What::Net { &ROWS } else { &disk::ROWS };
    for (number, what) in rows {
        say(&format!("{number:>2}  {what}"));
    }
    if what == What::Disk {
        disk::keys().for_each(say);
        return;
    }
    for (key, what) in peers::ALL {
        say(&format!("{key:<12} {what}"));
    }
}

fn measure(scale: Scale, selection: &Selection, found: &mut Found) -> Result<()> {
    if selection.rows(&[12, 22]) {
        say("\nthe programs by themselves (rows 12, 22)");
        programs::measure(&mut Product::new("programs")?, scale, found)?;
    }
    if selection.rows(&[8, 9, 10, 11, 18]) {
        say("\nthe data path at rest and while draining (rows 8 to 11, 18)");
        rates::measure(scale, selection, found)?;
    }
    if selection.rows(&[5, 6]) {
        say("\nthe moment of the switch (rows 5, 6)");
        flip::measure(scale, selection, found)?;
    }
    if selection.rows(&[1, 2, 3, 4, 7]) {
        say("\na switch under load (rows 1 to 4, 7)");
        handover::measure(scale, selection, found)?;
    }
    if selection.rows(&[1, 2]) {
        say("\na switch under loads up to what the slowest peer carries (rows 1, 2)");
        loads::measure(scale, selection, found)?;
    }
    Ok(())
}

fn write((directory, what): (&Path, What), head: &Head, found: &Found) -> Result<()> {
    let name = what.name();
    let file = |name: &str, text: String| {
        let path = directory.join(name);
        std::fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))
    };
    file(&format!("{name}.json"), serde_json::to_string_pretty(&found.rows())?)?;
    let raw = serde_json::json!({ "head": head, "figures": found.figures, "not_run": found.not_run });
    file("raw.json", serde_json::to_string_pretty(&raw)?)?;
    file(&format!("{name}.svg"), plot::svg(what.title(), &found.figures))?;
    file(&format!("{name}.txt"), head.text() + &found.table())
}

/// Nothing of the laboratories may be left.
fn clean(before: &Snapshot) -> Result<ExitCode> {
    let mut left = Snapshot::left_since(before, Duration::from_secs(10))?;
    // What is gone was another's: the laboratories only bring something.
    // The first namespace with a name brings the directory of all names.
    left.retain(|one| one.list != List::NetnsId && one.after.is_some() && one.name != "/run/netns");
    for one in &left {
        say(&format!("LEFT BEHIND {one}"));
    }
    Ok(if left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
