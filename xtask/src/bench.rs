//! `cargo xtask bench`: measurements that print ratios, each of things measured in turn in one run.

use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};
use patchswitch_guest::{End, Request};

use crate::build;
use crate::cache::{Cache, say};
use crate::paths;
use crate::setup::{self, Need};
use crate::vm::agent;
use crate::vm::boot::{Config, Vm};
use crate::vm::kernel::Series;
use crate::vm::payload::Payload;

/// The program.
const BENCH: &str = "patchswitch-bench";
/// Where the results are in a test machine.
const OUT: &str = "/run/bench";
/// A measurement that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(6 * 3600);

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
    /// In a disposable test machine with this series of kernels, which has IPVS. Its processor is emulated: what is
    /// compared is what the programs cost in instructions. Results are in target/bench/net-SERIES
    #[arg(long, value_name = "SERIES", conflicts_with = "list")]
    kernel: Option<Series>,
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
        let place = if net.kernel.is_some() { Need::Machine } else { Need::Bench };
        setup::ensure(&[Need::Build, Need::Test, place])?;
    }
    let program = build::release(BENCH)?;
    if let Some(series) = &net.kernel {
        return in_machine(&program, series, net);
    }
    let out = paths::target().join("bench/net");
    let tool = crate::command::Tool::new(program).args(net.arguments()).arg("--out").arg(&out);
    let status = tool.stdout(Stdio::inherit()).spawn()?.wait()?;
    if !net.list {
        say(&format!("{}", out.display()));
    }
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Measures in a test machine.
fn in_machine(program: &Path, series: &Series, net: &Net) -> Result<ExitCode> {
    let cache = Cache::open()?;
    let payload = Payload::new(&cache)?;
    payload.add(program)?;
    let config = Config { payload: Some(payload.dir().to_owned()), ..Config::new(series.clone()) };
    let vm = Vm::boot(&cache, &config)?;
    let fixed = [format!("/payload/{BENCH}"), "--out".to_owned(), OUT.to_owned()];
    let request = Request {
        argv: fixed.into_iter().chain(net.arguments()).collect(),
        limit_ms: u64::try_from(LIMIT.as_millis())?,
        ..Request::default()
    };
    let end = vm.stream(&request, &mut agent::to_terminal)?;
    let place = paths::target().join(format!("bench/net-{series}"));
    let pulled = vm.pull(OUT, &place);
    if !matches!(end, End::Code(0 | 1)) {
        bail!("the measurement ended with {end:?}; the kernel's log:\n{}", vm.console());
    }
    pulled?;
    vm.power_off()?;
    say(&format!("{}", place.display()));
    Ok(if end == End::Code(0) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_passed_on() {
        let only = ["8", "bridge"].map(str::to_owned).to_vec();
        let net = Net { quick: true, only, list: false, kernel: None };
        assert_eq!(net.arguments(), ["--quick", "--only", "8", "bridge"]);
        assert!(Net { quick: false, only: Vec::new(), list: false, kernel: None }.arguments().is_empty());
    }
}
