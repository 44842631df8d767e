//! The demo: the whole job on real parts, under load, with everything that can go wrong, measured from outside.
//!
//! ```text
//!  main ─► ground (network, disk) ─► the product's partitions and service ─► traffic (knee, load)
//!            │                                   jobs ◄── story, marks ──┘
//!            └─► watch (resets, retransmissions), standstill ─► measure ─► report: what must hold
//! ```
//!
//! It runs as root on a machine with device-mapper: the disposable one of `cargo xtask demo`, or any other. What it
//! shows is measured by the client, by the kernel's counters and by tcpdump; what only patchswitch can know comes
//! from its reports.

mod content;
mod course;
mod ground;
mod jobs;
mod measure;
mod product;
mod report;
mod story;
mod traffic;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// The demo of patchswitch.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Adds to a Debian root with nginx what the demo's partition has besides.
    Prepare {
        /// The archive of the root.
        #[arg(long)]
        root: PathBuf,
        /// Where the result goes.
        #[arg(long)]
        out: PathBuf,
    },
    /// Runs jobs under load and reports what became of them.
    Run(RunArgs),
}

/// Where and what.
#[derive(Debug, Args)]
struct RunArgs {
    /// Run a switch without the notice at the end.
    #[arg(long)]
    negative: bool,
    /// The jobs, in this order.
    #[arg(long, value_delimiter = ',', default_value = "2,5,3,4,1")]
    jobs: Vec<u8>,
    /// Directory with the prepared root.tar and the packages of the patch.
    #[arg(long)]
    artifacts: PathBuf,
    /// An existing directory for everything that is written; without it the test machine's own disk is overwritten.
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Where the report goes.
    #[arg(long)]
    out: PathBuf,
    /// Requests a second, instead of what the service bears; fewer than 200 are not enough for a proof.
    #[arg(long)]
    rate: Option<f64>,
    /// Compare all files of the clone with the package database in these jobs; takes long on a slow machine.
    #[arg(long, value_delimiter = ',')]
    scan: Vec<u8>,
    /// Do not measure how much the service bears, and keep the quiet time short.
    #[arg(long)]
    quick: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    match Cli::parse().verb {
        Verb::Prepare { root, out } => {
            let echo = patchswitch_tests::programs::built("patchswitch-load")?;
            content::prepare(&root, &echo, &out)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Run(args) => {
            if let Some(directory) = args.out.parent() {
                std::fs::create_dir_all(directory)?;
            }
            let report = course::run(&args)?;
            std::fs::write(&args.out, serde_json::to_vec_pretty(&report)?)?;
            story::conclusion(&report);
            let holds = report.checks.iter().all(|check| check.holds);
            Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}
