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

use patchswitch_common::Slot;
use sha2::{Digest, Sha256};

use super::record::{Inside, Record, SlotRecord};
use super::settings::Wanted;
use super::{AttachError, ports};
use crate::dataplane;
use crate::host::linux::netlink::{Link, MAIN_TABLE, Netlink, Selector};
use crate::host::linux::netns::Netns;
use crate::host::linux::sysctl::{self, SysctlError};
use crate::names::Name;

const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
/// Priority of our routing rules: before the main table (32766).
const RULE_PRIORITY: u32 = 1117;

/// A number in the range of one attachment, well away from those that people give by hand.
fn number(name: &Name) -> u32 {
    let digest = Sha256::digest(name.as_str().as_bytes());
    u32::from(u16::from_be_bytes([digest[0], digest[1]]) & 0x7fff)
}

/// The routing table of what a guest sends from the service addresses.
pub(super) fn guest_table(name: &Name) -> u32 {
    0x7073_0000 | number(name)
}

/// The routing table of the probes of a slot.
fn probe_table(name: &Name, slot: Slot) -> u32 {
    0x7074_0000 | number(name) << 1 | slot.index()
}

/// The id that a partition's network namespace gets, unless it has one. The kernel's own choice is the lowest free
/// number, so a high base keeps clear of it.
pub(super) fn nsid(name: &Name, slot: Slot) -> i32 {
    i32::try_from(0x5053_0000 | number(name) << 1 | slot.index()).unwrap_or(i32::MAX)
}

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
    slot: Slot,
    entry: &SlotRecord,
    netns: &Netns,
    mtu: u32,
) -> Result<Link, AttachError> {
    // A name that the inner end has only on its way into the namespace.
    let passage = format!("{}i", entry.link);
    host.add_veth(&entry.link, &passage).await?;
    let (outer, inner) = (host.link(&entry.link).await?, host.link(&passage).await?);
    let alias = format!("patchswitch {}", record.name);
    host.dress(&outer, host_mac(&record.name), mtu, &alias).await?;
    host.dress(&inner, inner_mac(&record.name), mtu, &alias).await?;
    quiet(&entry.link)?;
    host.move_link(inner.index, netns, &entry.inner_link).await?;
    inside(record, slot, entry, netns).await?;
    Ok(outer)
}

/// A host-side link has no address, asks for none and listens to no router.
fn quiet(link: &str) -> Result<(), SysctlError> {
    sysctl::write(&format!("ipv4/conf/{link}/rp_filter"), "0")?;
    // The host's check of the way back asks the probes' table for what answers a probe.
    sysctl::write(&format!("ipv4/conf/{link}/src_valid_mark"), "1")?;
    sysctl::write(&format!("ipv4/conf/{link}/forwarding"), "1")?;
    if has_ipv6() {
        sysctl::write(&format!("ipv6/conf/{link}/forwarding"), "1")?;
        sysctl::write(&format!("ipv6/conf/{link}/addr_gen_mode"), "1")?;
        sysctl::write(&format!("ipv6/conf/{link}/accept_ra"), "0")?;
    }
    Ok(())
}

fn has_ipv6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

/// Sets up the inside of a partition: all that its link has there.
pub(super) async fn inside(
    record: &Record,
    slot: Slot,
    entry: &SlotRecord,
    netns: &Netns,
) -> Result<(), AttachError> {
    let nl = Netlink::open(netns)?;
    let link = nl.link(&entry.inner_link).await?;
    let settings = || -> Result<(), SysctlError> {
        if has_ipv6() {
            sysctl::write(&format!("ipv6/conf/{}/accept_ra", entry.inner_link), "0")?;
            sysctl::write(&format!("ipv6/conf/{}/accept_dad", entry.inner_link), "0")?;
        }
        if matches!(entry.inside, Inside::Owned { .. }) {
            sysctl::write(ports::SETTING, ports::HALVES[slot as usize])?;
        }
        Ok(())
    };
    netns.run(settings).map_err(AttachError::Netns)??;
    if matches!(entry.inside, Inside::Owned { .. })
        && let Ok(loopback) = nl.link("lo").await
    {
        nl.set_up(&loopback, true).await?;
    }
    nl.set_up(&link, true).await?;
    for address in &record.addresses {
        nl.add_address(&link, *address, true).await?;
    }
    for address in own(entry) {
        // Not a source for anything before the partition retires.
        nl.add_address(&link, *address, false).await?;
    }
    for gateway in gateways(&record.addresses) {
        nl.add_neighbour(&link, gateway, host_mac(&record.name)).await?;
    }
    routes(&nl, record, entry, &link, &record.addresses).await?;
    if let Inside::Guest { table } = entry.inside {
        for address in &record.addresses {
            nl.add_rule(Selector::From(*address), table, RULE_PRIORITY).await?;
        }
    }
    Ok(())
}

/// The addresses that belong to one partition alone.
fn own(entry: &SlotRecord) -> &[IpAddr] {
    match &entry.inside {
        Inside::Owned { own } => own,
        Inside::Guest { .. } => &[],
    }
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
            Inside::Owned { .. } => (MAIN_TABLE, source),
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
    let own = own(slot);
    if own.is_empty() {
        return Ok(());
    }
    let nl = Netlink::open(netns)?;
    let link = nl.link(&slot.inner_link).await?;
    for (address, preferred) in preferences(record, own, serving) {
        if may_lack(record, address, serving) && nl.address_on(&link, address).await?.is_none() {
            continue;
        }
        nl.add_address(&link, address, preferred).await?;
    }
    routes(&nl, record, slot, &link, &sources(record, own, serving)).await
}

/// Whether all is as [`prefer_source`] makes it.
pub(super) async fn prefers_source(
    record: &Record,
    slot: &SlotRecord,
    netns: &Netns,
    serving: bool,
) -> Result<bool, AttachError> {
    let own = own(slot);
    if own.is_empty() {
        return Ok(true);
    }
    let nl = Netlink::open(netns)?;
    let link = nl.link(&slot.inner_link).await?;
    for (address, preferred) in preferences(record, own, serving) {
        let is_right = match nl.address_on(&link, address).await? {
            Some(is_preferred) => address.is_ipv4() || is_preferred == preferred,
            None => may_lack(record, address, serving),
        };
        if !is_right {
            return Ok(false);
        }
    }
    let sources = sources(record, own, serving);
    for gateway in gateways(&record.addresses) {
        let source = sources.iter().find(|a| a.is_ipv4() == gateway.is_ipv4());
        if let Some(source) = source
            && !nl.has_default_route(&link, *source).await?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a partition may have given an address up.
fn may_lack(record: &Record, address: IpAddr, serving: bool) -> bool {
    record.own_uplinks && !serving && record.addresses.contains(&address)
}

/// Each address of a partition, and whether new sockets may get it.
fn preferences(record: &Record, own: &[IpAddr], serving: bool) -> Vec<(IpAddr, bool)> {
    // Without an own address in a family the service address stays the source.
    let has_own = |address: &IpAddr| own.iter().any(|o| o.is_ipv4() == address.is_ipv4());
    let service = record.addresses.iter().map(|address| (*address, serving || !has_own(address)));
    service.chain(own.iter().map(|address| (*address, !serving))).collect()
}

/// The sources of a partition's default routes, the first of each family.
fn sources(record: &Record, own: &[IpAddr], serving: bool) -> Vec<IpAddr> {
    let mut sources = if serving { Vec::new() } else { own.to_vec() };
    sources.extend(&record.addresses);
    sources
}

/// Makes the host know where the service and the own addresses are, and how its probes get there.
pub(super) async fn host_side(
    host: &Netlink,
    record: &Record,
    slot: Slot,
    entry: &SlotRecord,
) -> Result<(), AttachError> {
    let link = host.link(&entry.link).await?;
    host.set_up(&link, true).await?;
    for address in record.addresses.iter().chain(own(entry)) {
        host.add_neighbour(&link, *address, inner_mac(&record.name)).await?;
    }
    let (table, mark) = (probe_table(&record.name, slot), dataplane::probe_mark(slot));
    for address in &record.addresses {
        host.route_host(table, *address, &link).await?;
        let selector = Selector::Mark { mark, v6: address.is_ipv6() };
        host.add_rule(selector, table, RULE_PRIORITY).await?;
    }
    Ok(())
}

/// Makes the host forget that a partition's own addresses are behind a link.
pub(super) async fn forget_own(host: &Netlink, entry: &SlotRecord, link: &Link) -> Result<(), AttachError> {
    for address in own(entry) {
        host.delete_neighbour(link, *address).await?;
    }
    Ok(())
}

/// Routes a partition's own addresses to it and answers for them on the uplinks.
pub(super) async fn own_addresses(
    host: &Netlink,
    record: &Record,
    slot: Slot,
    entry: &SlotRecord,
) -> Result<(), AttachError> {
    let link = host.link(&entry.link).await?;
    for address in own(entry) {
        host.route_host(MAIN_TABLE, *address, &link).await?;
        for uplink in record.uplinks_of(slot) {
            host.add_proxy(&host.link(uplink).await?, *address).await?;
        }
    }
    Ok(())
}

/// Routes the service to a slot on the path that works without any program.
pub(super) async fn slow_path(host: &Netlink, record: &Record, slot: &SlotRecord) -> Result<(), AttachError> {
    let link = host.link(&slot.link).await?;
    for address in &record.addresses {
        host.route_host(MAIN_TABLE, *address, &link).await?;
    }
    Ok(())
}

/// Whether the host's routes are as [`slow_path`] makes them.
pub(super) async fn is_slow_path(
    host: &Netlink,
    record: &Record,
    slot: &SlotRecord,
) -> Result<bool, AttachError> {
    let link = host.link(&slot.link).await?;
    for address in &record.addresses {
        if host.host_route(*address).await? != Some(link.index) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes the host answer ARP and NDP for the service on the uplinks of who serves, and on no other one. Goes on after errors: one
/// uplink must not keep another one from answering.
///
/// # Errors
/// The first. An uplink that is gone and need not answer is none.
pub(super) async fn answer(host: &Netlink, record: &Record, active: Slot) -> Result<(), AttachError> {
    let (answering, mut errors) = (record.uplinks_of(active), Vec::new());
    // Nobody must be told two things, so the other one is silent first.
    for uplink in record.uplinks.iter().filter(|uplink| !answering.contains(uplink)) {
        let Ok(link) = host.link(uplink).await else { continue };
        for address in &record.addresses {
            errors.extend(host.delete_proxy(&link, *address).await.err());
        }
    }
    for uplink in answering {
        match host.link(uplink).await {
            Ok(link) => {
                for address in &record.addresses {
                    errors.extend(host.add_proxy(&link, *address).await.err());
                }
            }
            Err(error) => errors.push(error),
        }
    }
    errors.into_iter().next().map_or(Ok(()), |error| Err(error.into()))
}

/// Takes the service's addresses from a partition: it is known by its own ones from then on.
pub(super) async fn give_up_addresses(
    record: &Record,
    entry: &SlotRecord,
    netns: &Netns,
) -> Result<(), AttachError> {
    let nl = Netlink::open(netns)?;
    let link = nl.link(&entry.inner_link).await?;
    for address in &record.addresses {
        nl.delete_address(&link, *address).await?;
    }
    let own: Vec<IpAddr> = own(entry).to_vec();
    if own.is_empty() { Ok(()) } else { routes(&nl, record, entry, &link, &own).await }
}

/// The settings that forwarding and answering need, in the order in which they must be written: the kernel's switch-on
/// of IPv6 forwarding removes a default route learned from router advertisements unless `accept_ra` is 2 by then, and
/// sets what every device has.
pub(super) fn settings(record: &Record, links: &[Link]) -> Vec<Wanted> {
    let want = |key: String, value| Wanted { key, value, only_to_keep: false };
    let mut wanted = Vec::new();
    let v6 = record.addresses.iter().any(IpAddr::is_ipv6);
    if v6 {
        let is = |key: &str, value: &str| sysctl::read(key).is_ok_and(|now| now == value);
        let forwards = "ipv6/conf/all/forwarding";
        for name in links.iter().map(|link| link.name.as_str()).chain(["default"]) {
            let forwarding = format!("ipv6/conf/{name}/forwarding");
            let accept = format!("ipv6/conf/{name}/accept_ra");
            // A router by its own will does not listen to others with a 1, and shall not begin to.
            if is(&forwarding, "0") && is(&accept, "1") {
                wanted.push(want(accept, "2"));
            }
            if is(&forwarding, "1") && is(forwards, "0") {
                wanted.push(Wanted { key: forwarding, value: "0", only_to_keep: true });
            }
        }
        wanted.push(want(forwards.to_owned(), "1"));
    }
    for uplink in &record.uplinks {
        wanted.push(want(format!("ipv4/conf/{uplink}/forwarding"), "1"));
        wanted.push(want(format!("ipv4/neigh/{uplink}/proxy_delay"), "0"));
        if v6 {
            wanted.push(want(format!("ipv6/conf/{uplink}/forwarding"), "1"));
            wanted.push(want(format!("ipv6/conf/{uplink}/proxy_ndp"), "1"));
            wanted.push(want(format!("ipv6/neigh/{uplink}/proxy_delay"), "0"));
        }
    }
    wanted
}

/// Removes a slot's links, rules and routes. Whatever is gone already is no error, and no error stops the rest.
pub(super) async fn remove_slot(
    host: &Netlink,
    record: &Record,
    slot: Slot,
    entry: &SlotRecord,
) -> Vec<AttachError> {
    let mut errors = Vec::new();
    if let Inside::Guest { table } = entry.inside {
        errors.extend(remove_rules(entry, table).await.err());
    }
    let rules = host.delete_rules(probe_table(&record.name, slot), RULE_PRIORITY).await;
    errors.extend(rules.err().map(AttachError::Netlink));
    // With a veth go its other end, its addresses, routes, neighbours and programs.
    errors.extend(host.delete_link(&entry.link).await.err().map(AttachError::Netlink));
    errors.extend(Netns::release(&entry.held).err().map(AttachError::Netns));
    errors
}

async fn remove_rules(entry: &SlotRecord, table: u32) -> Result<(), AttachError> {
    let held = crate::host::linux::netns::NetnsRef::Path(entry.held.clone());
    // Somebody who took away the mount that holds it may have left the namespace itself, under its name.
    let netns = Netns::open(&held).or_else(|_not_held| Netns::open(&entry.netns));
    // Or it is gone with all that was in it.
    let Ok(netns) = netns else { return Ok(()) };
    Ok(Netlink::open(&netns)?.delete_rules(table, RULE_PRIORITY).await?)
}

/// Ends what the host does for the own addresses of a partition.
pub(super) async fn disown(host: &Netlink, record: &Record, entry: &SlotRecord) -> Vec<AttachError> {
    forget(host, &record.uplinks, own(entry)).await
}

/// Ends what the host does for the service addresses.
pub(super) async fn remove_host_side(host: &Netlink, record: &Record) -> Vec<AttachError> {
    forget(host, &record.uplinks, &record.addresses).await
}

async fn forget(host: &Netlink, uplinks: &[String], addresses: &[IpAddr]) -> Vec<AttachError> {
    let mut errors = Vec::new();
    for uplink in uplinks {
        // The uplink itself may be gone, and its entries with it.
        let Ok(link) = host.link(uplink).await else { continue };
        for address in addresses {
            errors.extend(host.delete_proxy(&link, *address).await.err().map(AttachError::Netlink));
        }
    }
    for address in addresses {
        errors.extend(host.unroute_host(*address).await.err().map(AttachError::Netlink));
    }
    errors
}
