//! Destination translation by nft with conntrack. The rule is replaced; what conntrack knows keeps its translation.

use anyhow::Result;
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{SERVICE, SwitchLab, UPLINK};
use patchswitch_tests::programs;

use super::{Peer, Side, inner, route_to_both};

#[derive(Debug)]
pub(crate) struct Nft {
    lab: SwitchLab,
}

impl Nft {
    pub(crate) fn new() -> Result<Self> {
        let lab = SwitchLab::new("nft")?;
        route_to_both(&lab)?;
        lab.host.ip(&format!("addr add {}/32 dev {UPLINK}", SERVICE[0]))?;
        let nft = Self { lab };
        nft.load("table ip ps { chain pre { type nat hook prerouting priority dstnat; }; }\n")?;
        nft.load(&rule(Side::A))?;
        Ok(nft)
    }

    fn load(&self, text: &str) -> Result<String> {
        self.lab.host.enter(|| programs::run_with_input(&["nft", "-f", "-"], Some(text)))
    }
}

/// Old rule out and new rule in, as one transaction.
fn rule(to: Side) -> String {
    format!("flush chain ip ps pre\nadd rule ip ps pre ip daddr {} dnat to {}\n", SERVICE[0], inner(to))
}

impl Peer for Nft {
    fn lab(&self) -> &SwitchLab {
        &self.lab
    }

    fn switch(&mut self, to: Side) -> Result<u64> {
        let begun = now_ns();
        self.load(&rule(to))?;
        Ok(begun)
    }
}
