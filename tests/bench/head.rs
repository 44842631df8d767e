//! The machine that measures.

use std::fs;

use patchswitch_tests::programs;
use serde::Serialize;

use crate::What;

/// What has to be known to read a figure.
#[derive(Debug, Serialize)]
pub(crate) struct Head {
    machine: String,
    cores: usize,
    kernel: String,
    hypervisor: bool,
    /// Of the processor's weaknesses, those that cost time or are open.
    mitigations: Vec<String>,
    governor: String,
    peers: Vec<String>,
    /// Of what that is which is written or sent to.
    ground: &'static str,
    /// The order in which what is compared is measured.
    order: &'static str,
    pub(crate) quick: bool,
    pub(crate) blocks: usize,
}

impl Head {
    pub(crate) fn read(what: What, quick: bool, blocks: usize) -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = info.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
        };
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
        Self {
            machine: field("model name").unwrap_or_else(|| "unknown".to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: format!("{} {}", read("/proc/sys/kernel/osrelease"), read("/proc/sys/kernel/version")),
            hypervisor: field("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            mitigations: mitigations(),
            governor: if governor.is_empty() { "none to be seen".to_owned() } else { governor },
            peers: versions(what),
            ground: match what {
                What::Net => "veth, not a network card",
                What::Disk => "images on loop devices, all on one disk",
            },
            order: match what {
                What::Net => " of the order ABBA",
                What::Disk => ", in turn",
            },
            quick,
            blocks,
        }
    }

    pub(crate) fn text(&self) -> String {
        let guest = if self.hypervisor { ", a virtual machine" } else { "" };
        format!(
            "machine:     {}, {} cores{guest}, governor: {}\nkernel:      Linux {}\nmitigations: {}\npeers:       {}\n\
             ground:      {}\nblocks:      {}{}{}\n",
            self.machine,
            self.cores,
            self.governor,
            self.kernel,
            self.mitigations.join("; "),
            self.peers.join("; "),
            self.ground,
            self.blocks,
            self.order,
            if self.quick { " (quick: fewer and shorter than a full run has)" } else { "" }
        )
    }
}

fn mitigations() -> Vec<String> {
    let directory = fs::read_dir("/sys/devices/system/cpu/vulnerabilities");
    let mut found: Vec<String> = directory
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let text = fs::read_to_string(entry.path()).ok()?;
            let text = text.trim();
            (text != "Not affected").then(|| format!("{}: {text}", entry.file_name().to_string_lossy()))
        })
        .collect();
    found.sort();
    found
}

/// What the peers' programs say of themselves, each its first line.
fn versions(what: What) -> Vec<String> {
    let ask = |argv: &[&str]| {
        let output = programs::output(argv, None).ok()?;
        let text = output.stdout + &output.stderr;
        text.lines().find(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned())
    };
    let argvs: &[&[&str]] = match what {
        What::Net => &[&["ip", "-V"], &["nft", "--version"], &["haproxy", "-v"], &["keepalived", "-v"]],
        What::Disk => {
            &[&["lvm", "version"], &["btrfs", "--version"], &["dd", "--version"], &["crun", "--version"]]
        }
    };
    argvs
        .iter()
        .map(|argv| {
            let name = argv.first().copied().unwrap_or_default();
            ask(argv).unwrap_or_else(|| format!("{name}: not installed"))
        })
        .collect()
}
