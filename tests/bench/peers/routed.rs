//! Plain veth and a route: the floor of the data path, and with a route that is replaced the strategy `letter`.
//!
//! As the letter of the patent has it, the address belongs to the new side from the switch on, and what clients of the
//! old one still send goes there.

use anyhow::Result;
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{SERVICE, SwitchLab, UPLINK};

use super::{Peer, Side, inner, route_to_both};

#[derive(Debug)]
pub(crate) struct Routed {
    lab: SwitchLab,
    key: &'static str,
}

impl Routed {
    pub(crate) fn new(key: &'static str) -> Result<Self> {
        let lab = SwitchLab::new(key)?;
        route_to_both(&lab)?;
        let service = SERVICE[0];
        for ns in [&lab.a, &lab.b] {
            ns.ip(&format!("addr add {service}/32 dev lo"))?;
        }
        // At once: an answer that is delayed would count as the first packet's time.
        lab.host.sysctl(&format!("net/ipv4/neigh/{UPLINK}/proxy_delay"), "0")?;
        lab.host.ip(&format!("neigh add proxy {service} dev {UPLINK}"))?;
        let mut routed = Self { lab, key };
        routed.switch(Side::A)?;
        Ok(routed)
    }
}

impl Peer for Routed {
    fn key(&self) -> &'static str {
        self.key
    }

    fn lab(&self) -> &SwitchLab {
        &self.lab
    }

    fn switch(&mut self, to: Side) -> Result<u64> {
        let begun = now_ns();
        self.lab.host.ip(&format!("route replace {}/32 via {}", SERVICE[0], inner(to)))?;
        Ok(begun)
    }
}
