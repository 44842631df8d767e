//! A bridge. The service address is moved from one namespace to the other and announced.

use anyhow::{Context as _, Result};
use patchswitch::host::linux::frames;
use patchswitch::host::linux::netlink::Netlink;
use patchswitch::host::linux::netns::Netns;
use patchswitch::network::announce;
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{OWN_A, OWN_B, SERVICE, SwitchLab, UPLINK};

use super::{Peer, Side};

/// Both namespaces and the uplink on one bridge of the host; each namespace has its own address, none the service's.
pub(super) fn bridged(label: &str) -> Result<SwitchLab> {
    let lab = SwitchLab::new(label)?;
    lab.host.ip_batch("link add br0 type bridge\nlink set br0 up\n")?;
    for (ns, link, own) in [(&lab.a, "lca", OWN_A[0]), (&lab.b, "lcb", OWN_B[0])] {
        lab.lab.veth((ns, "eth0"), (&lab.host, link))?;
        ns.ip(&format!("addr add {own}/24 dev eth0"))?;
        lab.host.ip(&format!("link set {link} master br0"))?;
    }
    lab.host.ip(&format!("link set {UPLINK} master br0"))?;
    Ok(lab)
}

/// Where the clients are. What answers them on a wildcard socket answers with the service's address by a route that is
/// gone with it.
pub(super) const CLIENTS: &str = "10.77.0.0/25";

#[derive(Debug)]
pub(crate) struct Bridge {
    lab: SwitchLab,
}

impl Bridge {
    pub(crate) fn new() -> Result<Self> {
        let bridge = Self { lab: bridged("bridge")? };
        bridge.give(Side::A)?;
        Ok(bridge)
    }

    fn give(&self, to: Side) -> Result<()> {
        let ns = self.ns(to);
        let service = SERVICE[0];
        ns.ip_batch(&format!(
            "addr add {service}/24 dev eth0\nroute add {CLIENTS} dev eth0 src {service}\n"
        ))?;
        let frame = |mac| announce::frame(SERVICE[0].parse().ok()?, mac);
        ns.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let link = runtime.block_on(async { Netlink::open(&Netns::own()?)?.link("eth0").await })?;
            let frame = frame(link.mac).context("no frame")?;
            Ok(frames::send(&link, &[frame])?)
        })
    }
}

impl Peer for Bridge {
    fn lab(&self) -> &SwitchLab {
        &self.lab
    }

    fn switch(&mut self, to: Side) -> Result<u64> {
        let begun = now_ns();
        self.ns(to.other()).ip(&format!("addr del {}/24 dev eth0", SERVICE[0]))?;
        self.give(to)?;
        Ok(begun)
    }
}
