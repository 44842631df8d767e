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
    Disk(Disk),
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

/// Clones, against LVM's thick and thin snapshots, btrfs and a plain copy, in a disposable test machine.
///
/// As root. Results are in target/bench/disk: disk.json (ratios with their intervals), raw.json, disk.svg and disk.txt. Nothing
/// else should run meanwhile.
#[derive(Debug, clap::Args)]
struct Disk {
    /// Fewer blocks
    #[arg(long)]
    quick: bool,
    /// Only these rows and peers
    #[arg(long, value_name = "ROW|PEER", num_args = 1..)]
    only: Vec<String>,
    /// Say which rows and peers there are, and measure nothing
    #[arg(long)]
    list: bool,
    /// The machine's series of kernels
    #[arg(long, value_name = "SERIES", default_value = "6.12")]
    kernel: Series,
}

/// What is passed on to the program.
fn arguments(what: &str, quick: bool, list: bool, only: &[String]) -> Vec<String> {
    let mut words = vec![what.to_owned()];
    words.extend(quick.then(|| "--quick".to_owned()));
    words.extend(list.then(|| "--list".to_owned()));
    if !only.is_empty() {
        words.push("--only".to_owned());
        words.extend(only.iter().cloned());
    }
    words
}

impl Disk {
    fn arguments(&self) -> Vec<String> {
        arguments("disk", self.quick, self.list, &self.only)
    }

    fn run(&self) -> Result<ExitCode> {
        if self.list {
            let status = crate::command::Tool::new(build::release(BENCH)?).args(self.arguments());
            let status = status.stdout(Stdio::inherit()).spawn()?.wait()?;
            return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        if !rustix::process::geteuid().is_root() {
            bail!("the measurements need root");
        }
        setup::ensure(&[Need::Build, Need::Test, Need::Machine])?;
        build::programs()?;
        let program = build::release(BENCH)?;
        in_machine(&program, &self.kernel, &self.arguments(), (&paths::target().join("bench/disk"), true))
    }
}

impl Net {
    fn arguments(&self) -> Vec<String> {
        arguments("net", self.quick, self.list, &self.only)
    }
}

/// Runs `cargo xtask bench`.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    let net = match &options.what {
        What::Net(net) => net,
        What::Disk(disk) => return disk.run(),
    };
    if !net.list {
        if !rustix::process::geteuid().is_root() {
            bail!("the measurements need root");
        }
        let place = if net.kernel.is_some() { Need::Machine } else { Need::Bench };
        setup::ensure(&[Need::Build, Need::Test, place])?;
    }
    let program = build::release(BENCH)?;
    if let Some(series) = &net.kernel {
        let place = paths::target().join(format!("bench/net-{series}"));
        return in_machine(&program, series, &net.arguments(), (&place, false));
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
fn in_machine(
    program: &Path,
    series: &Series,
    arguments: &[String],
    (place, partitions): (&Path, bool),
) -> Result<ExitCode> {
    let cache = Cache::open()?;
    let payload = Payload::new(&cache)?;
    if partitions {
        payload.add_programs()?;
    }
    // Last: what lies beside the programs is not built as it is measured.
    payload.add(program)?;
    let config = Config { payload: Some(payload.dir().to_owned()), ..Config::new(series.clone()) };
    let vm = Vm::boot(&cache, &config)?;
    let program = [format!("/payload/{BENCH}")];
    let out = ["--out", OUT].map(str::to_owned);
    let request = Request {
        // What is measured comes first, and a list of rows would take what follows for one.
        argv: program.iter().chain(&arguments[..1]).chain(&out).chain(&arguments[1..]).cloned().collect(),
        limit_ms: u64::try_from(LIMIT.as_millis())?,
        ..Request::default()
    };
    let end = vm.stream(&request, &mut agent::to_terminal)?;
    let pulled = vm.pull(OUT, place);
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
        assert_eq!(net.arguments(), ["net", "--quick", "--only", "8", "bridge"]);
        let all = Net { quick: false, only: Vec::new(), list: false, kernel: None };
        assert_eq!(all.arguments(), ["net"]);
        assert_eq!(arguments("disk", false, true, &[]), ["disk", "--list"]);
    }
}
