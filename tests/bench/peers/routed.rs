//! Plain veth and a route: the floor of the data path.

use anyhow::Result;
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{SERVICE, SwitchLab, UPLINK};

use super::{Peer, Side, inner, route_to_both};

#[derive(Debug)]
pub(crate) struct Routed {
    lab: SwitchLab,
}

impl Routed {
    pub(crate) fn new(label: &str) -> Result<Self> {
        let lab = SwitchLab::new(label)?;
        route_to_both(&lab)?;
        let service = SERVICE[0];
        for (ns, gateway) in [(&lab.a, "10.78.1.1"), (&lab.b, "10.78.2.1")] {
            ns.ip(&format!("addr add {service}/32 dev lo"))?;
            // What answers on a wildcard socket answers with the service's address.
            ns.ip(&format!("route replace default via {gateway} dev eth0 src {service}"))?;
        }
        // At once: an answer that is delayed would count as the first packet's time.
        lab.host.sysctl(&format!("net/ipv4/neigh/{UPLINK}/proxy_delay"), "0")?;
        lab.host.ip(&format!("neigh add proxy {service} dev {UPLINK}"))?;
        let mut routed = Self { lab };
        routed.switch(Side::A)?;
        Ok(routed)
    }
}

impl Peer for Routed {
    fn lab(&self) -> &SwitchLab {
        &self.lab
    }

    fn switch(&mut self, to: Side) -> Result<u64> {
        let begun = now_ns();
        self.lab.host.ip(&format!("route replace {}/32 via {}", SERVICE[0], inner(to)))?;
        Ok(begun)
    }
}
