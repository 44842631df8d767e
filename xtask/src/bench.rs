//! `cargo xtask bench`: measurements that print ratios, each of things measured in turn in one run.

use std::process::{ExitCode, Stdio};

use anyhow::{Result, bail};

use crate::build;
use crate::cache::say;
use crate::paths;
use crate::setup::{self, Need};

/// The program.
const BENCH: &str = "patchswitch-bench";

/// Measures patchswitch in relation to its peers.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Net(Net),
}

/// The data path and the switch, against a plain route, a bridge, keepalived, nft and HAProxy, in network namespaces.
///
/// Runs on this host, as root. Results are in target/bench/net: net.json (ratios with their intervals), raw.json (every
/// block, targets, what was not run and why), net.svg and net.txt. Nothing else should run meanwhile.
#[derive(Debug, clap::Args)]
struct Net {
    /// Fewer and shorter blocks: under five minutes
    #[arg(long)]
    quick: bool,
    /// Only these rows and peers
    #[arg(long, value_name = "ROW|PEER", num_args = 1..)]
    only: Vec<String>,
    /// Say which rows and peers there are, and measure nothing
    #[arg(long)]
    list: bool,
}

impl Net {
    fn arguments(&self) -> Vec<String> {
        let mut words = Vec::new();
        words.extend(self.quick.then(|| "--quick".to_owned()));
        words.extend(self.list.then(|| "--list".to_owned()));
        if !self.only.is_empty() {
            words.push("--only".to_owned());
            words.extend(self.only.iter().cloned());
        }
        words
    }
}

/// Runs `cargo xtask bench`.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let What::Net(net) = &options.what;
    if !net.list {
        if !rustix::process::geteuid().is_root() {
            bail!("the measurements need root");
        }
        setup::ensure(&[Need::Build, Need::Test, Need::Bench])?;
    }
    let program = build::release(BENCH)?;
    let out = paths::target().join("bench/net");
    let tool = crate::command::Tool::new(program).args(net.arguments()).arg("--out").arg(&out);
    let status = tool.stdout(Stdio::inherit()).spawn()?.wait()?;
    if !net.list {
        say(&format!("{}", out.display()));
    }
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_passed_on() {
        let only = ["8", "bridge"].map(str::to_owned).to_vec();
        let net = Net { quick: true, only, list: false };
        assert_eq!(net.arguments(), ["--quick", "--only", "8", "bridge"]);
        assert!(Net { quick: false, only: Vec::new(), list: false }.arguments().is_empty());
    }
}
