//! Links, addresses, routes and kernel settings of an attachment, and their removal.
//!
//! ```text
//!   partition (its namespace)                       host
//!  ┌──────────────────────────────┐
//!  │ inner link: SERVICE/32, /128 │◄── veth ──► psXXXXXXXXa ─ route SERVICE ─ proxy entry for SERVICE ─ uplink
//!  │ default via 169.254.1.1 and  │             (no address; its MAC is the gateway's)
//!  │ fe80::1, static neighbours   │
//!  └──────────────────────────────┘
//! ```
//!
//! Both partitions have the same inner MAC and gateway, so a clone is identical inside. The gateway's addresses exist
//! nowhere: the static neighbour entries are enough.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sha2::{Digest, Sha256};

use super::AttachError;
use super::record::{Inside, Record, SlotRecord};
use crate::host::linux::netlink::{Link, Netlink};
use crate::host::linux::netns::Netns;
use crate::host::linux::sysctl::{self, SysctlError};
use crate::names::Name;

const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
/// Priority of the rule that sends a guest's service packets to our table: before the main table (32766).
const RULE_PRIORITY: u32 = 1117;
/// The main routing table.
const MAIN: u32 = 254;

/// Locally administered addresses, the same for both slots of an attachment.
fn mac(name: &Name, last: u8) -> [u8; 6] {
    let digest = Sha256::digest(name.as_str().as_bytes());
    [0x02, digest[0], digest[1], digest[2], digest[3], last]
}

/// The MAC of the links inside.
pub(super) fn inner_mac(name: &Name) -> [u8; 6] {
    mac(name, 2)
}

/// The MAC of the host-side links, which is the gateway's.
fn host_mac(name: &Name) -> [u8; 6] {
    mac(name, 1)
}

/// Makes the veth pair of a slot and sets up both of its ends; the host-side end stays down.
pub(super) async fn make_slot(
    host: &Netlink,
    record: &Record,
    slot: &SlotRecord,
    netns: &Netns,
    mtu: u32,
) -> Result<Link, AttachError> {
    // A name that the inner end has only on its way into the namespace.
    let passage = format!("{}i", slot.link);
    host.add_veth(&slot.link, &passage).await?;
    let (outer, inner) = (host.link(&slot.link).await?, host.link(&passage).await?);
    let alias = format!("patchswitch {}", record.name);
    host.dress(&outer, host_mac(&record.name), mtu, &alias).await?;
    host.dress(&inner, inner_mac(&record.name), mtu, &alias).await?;
    quiet(&slot.link)?;
    host.move_link(inner.index, netns, &slot.inner_link).await?;
    inside(record, slot, netns).await?;
    Ok(outer)
}

/// A host-side link has no address, asks for none and listens to no router.
fn quiet(link: &str) -> Result<(), SysctlError> {
    sysctl::write(&format!("ipv4/conf/{link}/rp_filter"), "0")?;
    sysctl::write(&format!("ipv4/conf/{link}/forwarding"), "1")?;
    if has_ipv6() {
        sysctl::write(&format!("ipv6/conf/{link}/addr_gen_mode"), "1")?;
        sysctl::write(&format!("ipv6/conf/{link}/accept_ra"), "0")?;
    }
    Ok(())
}

fn has_ipv6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

async fn inside(record: &Record, slot: &SlotRecord, netns: &Netns) -> Result<(), AttachError> {
    let nl = Netlink::open(netns)?;
    let link = nl.link(&slot.inner_link).await?;
    let settings = || -> Result<(), SysctlError> {
        if has_ipv6() {
            sysctl::write(&format!("ipv6/conf/{}/accept_ra", slot.inner_link), "0")?;
            sysctl::write(&format!("ipv6/conf/{}/accept_dad", slot.inner_link), "0")?;
        }
        Ok(())
    };
    netns.run(settings).map_err(AttachError::Netns)??;
    if matches!(slot.inside, Inside::Owned { .. })
        && let Ok(loopback) = nl.link("lo").await
    {
        nl.set_up(&loopback, true).await?;
    }
    nl.set_up(&link, true).await?;
    for address in &record.addresses {
        nl.add_address(&link, *address, true).await?;
    }
    if let Inside::Owned { own } = &slot.inside {
        for address in own {
            // Not a source for anything before the partition retires.
            nl.add_address(&link, *address, false).await?;
        }
    }
    for gateway in gateways(&record.addresses) {
        nl.add_neighbour(&link, gateway, host_mac(&record.name)).await?;
    }
    routes(&nl, record, slot, &link, &record.addresses).await?;
    if let Inside::Guest { table } = slot.inside {
        for address in &record.addresses {
            nl.add_rule(*address, table, RULE_PRIORITY).await?;
        }
    }
    Ok(())
}

/// One gateway for each family that the service has.
fn gateways(addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> + use<> {
    let (v4, v6) = (addresses.iter().any(IpAddr::is_ipv4), addresses.iter().any(IpAddr::is_ipv6));
    [v4.then_some(GATEWAY_V4), v6.then_some(GATEWAY_V6)].into_iter().flatten()
}

/// Sets the default routes of a partition; `sources` has the address that unbound sockets get, per family.
async fn routes(
    nl: &Netlink,
    record: &Record,
    slot: &SlotRecord,
    link: &Link,
    sources: &[IpAddr],
) -> Result<(), AttachError> {
    for gateway in gateways(&record.addresses) {
        let source = sources.iter().find(|a| a.is_ipv4() == gateway.is_ipv4()).copied();
        let (table, source) = match slot.inside {
            Inside::Guest { table } => (table, None),
            Inside::Owned { .. } => (MAIN, source),
        };
        nl.default_route(table, gateway, link, source).await?;
    }
    Ok(())
}

/// Says which address new, unbound sockets of a partition get: the service's while it serves, its own when it retires.
///
/// IPv4 ignores "deprecated" on an address, so the route's source decides; IPv6 obeys the preferred lifetime.
/// A guest's routes are its owner's business: nothing to do there.
pub(super) async fn prefer_source(
    record: &Record,
    slot: &SlotRecord,
    netns: &Netns,
    serving: bool,
) -> Result<(), AttachError> {
    let Inside::Owned { own } = &slot.inside else { return Ok(()) };
    let nl = Netlink::open(netns)?;
    let link = nl.link(&slot.inner_link).await?;
    for address in &record.addresses {
        nl.add_address(&link, *address, serving || !own.iter().any(|o| o.is_ipv4() == address.is_ipv4()))
            .await?;
    }
    for address in own {
        nl.add_address(&link, *address, !serving).await?;
    }
    // Without an own address in a family the service address stays the source.
    let mut sources = if serving { Vec::new() } else { own.clone() };
    sources.extend(&record.addresses);
    routes(&nl, record, slot, &link, &sources).await
}

/// Makes the host know where the service and the own addresses are.
pub(super) async fn host_side(host: &Netlink, record: &Record, slot: &SlotRecord) -> Result<(), AttachError> {
    let link = host.link(&slot.link).await?;
    host.set_up(&link, true).await?;
    let own: &[IpAddr] = match &slot.inside {
        Inside::Owned { own } => own,
        Inside::Guest { .. } => &[],
    };
    for address in record.addresses.iter().chain(own) {
        host.add_neighbour(&link, *address, inner_mac(&record.name)).await?;
    }
    Ok(())
}

/// Routes a partition's own addresses to it and answers for them on the uplinks.
pub(super) async fn own_addresses(
    host: &Netlink,
    record: &Record,
    slot: &SlotRecord,
) -> Result<(), AttachError> {
    let Inside::Owned { own } = &slot.inside else { return Ok(()) };
    let link = host.link(&slot.link).await?;
    for address in own {
        host.route_host(*address, &link).await?;
        for uplink in &record.uplinks {
            host.add_proxy(&host.link(uplink).await?, *address).await?;
        }
    }
    Ok(())
}

/// Routes the service to a slot on the path that works without any program.
pub(super) async fn slow_path(host: &Netlink, record: &Record, slot: &SlotRecord) -> Result<(), AttachError> {
    let link = host.link(&slot.link).await?;
    for address in &record.addresses {
        host.route_host(*address, &link).await?;
    }
    Ok(())
}

/// Makes the host answer ARP and NDP for the service on every uplink.
pub(super) async fn answer(host: &Netlink, record: &Record) -> Result<(), AttachError> {
    for uplink in &record.uplinks {
        let link = host.link(uplink).await?;
        for address in &record.addresses {
            host.add_proxy(&link, *address).await?;
        }
    }
    Ok(())
}

/// The settings that forwarding and answering need, in the order in which they must be written: the kernel's switch-on
/// of IPv6 forwarding removes a default route learned from router advertisements unless `accept_ra` is 2 by then, and
/// resets what the devices have.
pub(super) fn settings(record: &Record, links: &[Link]) -> Vec<(String, &'static str)> {
    let mut wanted = Vec::new();
    let v6 = record.addresses.iter().any(IpAddr::is_ipv6);
    if v6 {
        for link in links {
            let key = format!("ipv6/conf/{}/accept_ra", link.name);
            if sysctl::read(&key).is_ok_and(|value| value == "1") {
                wanted.push((key, "2"));
            }
        }
        wanted.push(("ipv6/conf/all/forwarding".to_owned(), "1"));
    }
    for uplink in &record.uplinks {
        wanted.push((format!("ipv4/conf/{uplink}/forwarding"), "1"));
        wanted.push((format!("ipv4/neigh/{uplink}/proxy_delay"), "0"));
        if v6 {
            wanted.push((format!("ipv6/conf/{uplink}/proxy_ndp"), "1"));
            wanted.push((format!("ipv6/neigh/{uplink}/proxy_delay"), "0"));
        }
    }
    wanted
}

/// Removes a slot's links, rules and routes. Whatever is gone already is no error, and no error stops the rest.
pub(super) async fn remove_slot(host: &Netlink, record: &Record, slot: &SlotRecord) -> Vec<AttachError> {
    let mut errors = Vec::new();
    if let Inside::Guest { table } = slot.inside {
        errors.extend(remove_rules(record, slot, table).await.err());
    }
    // With a veth go its other end, its addresses, routes, neighbours and programs.
    errors.extend(host.delete_link(&slot.link).await.err().map(AttachError::Netlink));
    errors.extend(Netns::release(&slot.held).err().map(AttachError::Netns));
    errors
}

async fn remove_rules(record: &Record, slot: &SlotRecord, table: u32) -> Result<(), AttachError> {
    let held = crate::host::linux::netns::NetnsRef::Path(slot.held.clone());
    // The namespace was not held yet, or is gone with all that was in it.
    let Ok(netns) = Netns::open(&held) else { return Ok(()) };
    let nl = Netlink::open(&netns)?;
    for address in &record.addresses {
        nl.delete_rules(*address, table, RULE_PRIORITY).await?;
    }
    Ok(())
}

/// Removes what is on the host's side of all slots.
pub(super) async fn remove_host_side(host: &Netlink, record: &Record) -> Vec<AttachError> {
    let mut errors = Vec::new();
    let own = record.slots.iter().flatten().flat_map(|slot| match &slot.inside {
        Inside::Owned { own } => own.clone(),
        Inside::Guest { .. } => Vec::new(),
    });
    let addresses: Vec<IpAddr> = record.addresses.iter().copied().chain(own).collect();
    for uplink in &record.uplinks {
        // The uplink itself may be gone, and its entries with it.
        let Ok(link) = host.link(uplink).await else { continue };
        for address in &addresses {
            errors.extend(host.delete_proxy(&link, *address).await.err().map(AttachError::Netlink));
        }
    }
    for address in &addresses {
        errors.extend(host.unroute_host(*address).await.err().map(AttachError::Netlink));
    }
    errors
}
