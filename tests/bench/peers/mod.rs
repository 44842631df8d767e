//! Who is compared: each in a laboratory of its own, all with the same client, uplink and two service namespaces.
//!
//! ```text
//!  client ──veth── host ──veth── a        the service address is in a, in b, or on the host,
//!                       └─veth── b        as the peer has it
//! ```

mod bridge;
mod haproxy;
mod ipvs;
mod keepalived;
mod nft;
pub(crate) mod product;
mod routed;

use anyhow::Result;
use patchswitch_tests::netlab::{Ns, SwitchLab};

pub(crate) use product::Product;

/// One of the two service namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// What its servers call themselves.
    pub(crate) fn tag(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }
}

/// Something that moves a service address from one namespace to another.
pub(crate) trait Peer {
    /// Its laboratory.
    fn lab(&self) -> &SwitchLab;

    /// What has to be done some time before a switch.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// Gives the service to a side, and returns the moment at which that was begun, on the boot clock.
    fn switch(&mut self, to: Side) -> Result<u64>;

    /// The same with the moment of the deed itself, where it can be told from what prepares it.
    fn flip(&mut self, to: Side) -> Result<u64> {
        self.switch(to)
    }

    /// How long a switch may take until everything is quiet again, in seconds.
    fn settles_s(&self) -> f64 {
        0.0
    }

    /// Whether it carries datagrams.
    fn has_udp(&self) -> bool {
        true
    }

    /// A namespace of the service.
    fn ns(&self, side: Side) -> &Ns {
        match side {
            Side::A => &self.lab().a,
            Side::B => &self.lab().b,
        }
    }
}

/// The keys of all peers.
pub(crate) const FLOOR: &str = "floor";
pub(crate) const BRIDGE: &str = "bridge";
pub(crate) const KEEPALIVED: &str = "keepalived";
pub(crate) const NFT: &str = "nft-dnat";
pub(crate) const HAPROXY: &str = "haproxy";
pub(crate) const LETTER: &str = "letter";
pub(crate) const IPVS: &str = "ipvs";
pub(crate) const PRODUCT: &str = "patchswitch";
/// patchswitch compared with itself.
pub(crate) const AGAIN: &str = "a/a";

/// All peers that a switch is compared with, with what they are.
pub(crate) const ALL: [(&str, &str); 7] = [
    (FLOOR, "plain veth and a route; cannot switch"),
    (BRIDGE, "a bridge; the address is removed, added and announced"),
    (KEEPALIVED, "VRRP on that bridge; the master is stopped"),
    (NFT, "nft DNAT with conntrack; the rule is replaced"),
    (HAPROXY, "a proxy of TCP; reloaded with its listeners handed over"),
    (LETTER, "patchswitch's own switch to the letter of the patent: nothing is steered to the old side"),
    (IPVS, "IPVS, the old server with weight 0"),
];

/// Makes a peer by its key.
pub(crate) fn make(key: &str) -> Result<Box<dyn Peer>> {
    Ok(match key {
        FLOOR => Box::new(routed::Routed::new(FLOOR)?),
        LETTER => Box::new(Product::to_the_letter(LETTER)?),
        BRIDGE => Box::new(bridge::Bridge::new()?),
        KEEPALIVED => Box::new(keepalived::Keepalived::new()?),
        NFT => Box::new(nft::Nft::new()?),
        IPVS => Box::new(ipvs::Ipvs::new()?),
        HAPROXY => Box::new(haproxy::Haproxy::new()?),
        PRODUCT => Box::new(Product::new("product")?),
        AGAIN => Box::new(Product::new("again")?),
        other => anyhow::bail!("no peer is called {other}"),
    })
}

/// Why a peer cannot be had on this machine.
pub(crate) fn hindrance(key: &str) -> Option<String> {
    let program = |name: &str| {
        let missing = patchswitch_tests::programs::find(name).is_none();
        missing.then(|| format!("{name} is not installed"))
    };
    match key {
        IPVS => ipvs::hindrance().or_else(|| program("nft")),
        KEEPALIVED => program("keepalived"),
        HAPROXY => program("haproxy"),
        NFT => program("nft"),
        _ => None,
    }
}

/// What a routed host needs: links to both namespaces, forwarding, and its own addresses on those links.
fn route_to_both(lab: &SwitchLab) -> Result<()> {
    for (ns, link, number) in [(&lab.a, "lca", 1), (&lab.b, "lcb", 2)] {
        lab.lab.veth((ns, "eth0"), (&lab.host, link))?;
        lab.host.ip(&format!("addr add 10.78.{number}.1/24 dev {link}"))?;
        ns.ip_batch(&format!(
            "addr add 10.78.{number}.2/24 dev eth0\nroute add default via 10.78.{number}.1 dev eth0\n"
        ))?;
    }
    lab.host.sysctl("net/ipv4/conf/all/forwarding", "1")
}

/// The address of a namespace on its link.
fn inner(side: Side) -> &'static str {
    match side {
        Side::A => "10.78.1.2",
        Side::B => "10.78.2.2",
    }
}
