//! IPVS with translation, one virtual service for every port (a firewall mark). The old server gets weight 0: what it
//! has stays with it, nothing new comes.

use std::path::Path;

use anyhow::Result;
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{SERVICE, SwitchLab, UPLINK};
use patchswitch_tests::programs;

use super::{Peer, Side, inner, route_to_both};

/// The mark of what goes to the service.
const MARK: &str = "1";

#[derive(Debug)]
pub(crate) struct Ipvs {
    lab: SwitchLab,
}

impl Ipvs {
    pub(crate) fn new() -> Result<Self> {
        let lab = SwitchLab::new("ipvs")?;
        route_to_both(&lab)?;
        lab.host.ip(&format!("addr add {}/32 dev {UPLINK}", SERVICE[0]))?;
        let marking = format!(
            "table ip ps {{ chain pre {{ type filter hook prerouting priority mangle; ip daddr {} mark set {MARK}; }}; }}\n",
            SERVICE[0]
        );
        lab.host.enter(|| programs::run_with_input(&["nft", "-f", "-"], Some(&marking)))?;
        let ipvs = Self { lab };
        ipvs.admin(&["-A", "-f", MARK, "-s", "wrr"])?;
        for (side, weight) in [(Side::A, "1"), (Side::B, "0")] {
            ipvs.admin(&["-a", "-f", MARK, "-r", inner(side), "-m", "-w", weight])?;
        }
        Ok(ipvs)
    }

    fn admin(&self, arguments: &[&str]) -> Result<()> {
        self.lab.host.run(&[&["ipvsadm"], arguments].concat()).map(drop)
    }
}

/// Why there is none on this machine: the module or its program.
pub(super) fn hindrance() -> Option<String> {
    let lacks = |what: &str| Some(format!("{what}; `cargo xtask bench net --kernel 6.12` has it"));
    if programs::find("ipvsadm").is_none() {
        return lacks("ipvsadm is not installed");
    }
    let there =
        Path::new("/proc/net/ip_vs").exists() || programs::run(&["modprobe", "-q", "ip_vs_wrr"]).is_ok();
    if there { None } else { lacks("this kernel has no IPVS") }
}

impl Peer for Ipvs {
    fn lab(&self) -> &SwitchLab {
        &self.lab
    }

    fn switch(&mut self, to: Side) -> Result<u64> {
        let begun = now_ns();
        // First the new one: there is a moment with both, and none without any.
        for (side, weight) in [(to, "1"), (to.other(), "0")] {
            self.admin(&["-e", "-f", MARK, "-r", inner(side), "-m", "-w", weight])?;
        }
        Ok(begun)
    }
}
