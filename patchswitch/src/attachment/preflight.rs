//! What can be known before anything is changed.

use std::net::IpAddr;

use super::record::{Inside, Record, RecordError, identity};
use super::{AttachError, Partition, Spec, wiring};
use crate::config::undeliverable;
use crate::host::linux::netlink::{Link, Netlink, NetlinkError};
use crate::host::linux::netns::Netns;
use crate::host::linux::sysctl;
use crate::names::{self, Name};

fn refuse<T>(text: String) -> Result<T, AttachError> {
    Err(AttachError::Refused(text))
}

/// Only root can do any of this.
pub(super) fn root() -> Result<(), AttachError> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(AttachError::NotRoot) }
}

/// Checks what is to be attached. Returns the host's links.
pub(super) async fn check(
    spec: &Spec,
    own: &Netns,
    host: &Netlink,
    partitions: &[&Partition],
) -> Result<Vec<Link>, AttachError> {
    if names::pin_dir(&spec.name).exists() || Record::load(&spec.name).is_ok() {
        return Err(RecordError::Exists(spec.name.clone()).into());
    }
    check_spec(spec, own, host, partitions).await
}

/// As [`check`], whoever has the name now.
pub(super) async fn check_spec(
    spec: &Spec,
    own: &Netns,
    host: &Netlink,
    partitions: &[&Partition],
) -> Result<Vec<Link>, AttachError> {
    if spec.addresses.is_empty() || spec.uplinks.is_empty() {
        return refuse("a service needs at least one address and one uplink".to_owned());
    }
    if let Err(error) = spec.datagrams.check() {
        return refuse(error.to_string());
    }
    let mut others = Record::all()?;
    others.retain(|other| other.name != spec.name);
    if let Some(other) =
        others.iter().find(|o| wiring::guest_table(&o.name) == wiring::guest_table(&spec.name))
    {
        return refuse(format!(
            "{} and {} would share a routing table; choose another name",
            spec.name, other.name
        ));
    }
    let mut taken = Taken { held: host.addresses().await?, others, here: identity(own)?, seen: Vec::new() };
    for address in &spec.addresses {
        taken.claim(*address, "service")?;
    }
    if spec.own_uplinks && !matches!(spec.uplinks.as_slice(), [first, second] if first != second) {
        return refuse(format!(
            "each partition is to have an uplink of its own, which makes two; given are {}",
            spec.uplinks.len()
        ));
    }
    let links = host.links().await?;
    for uplink in &spec.uplinks {
        let Some(link) = links.iter().find(|link| &link.name == uplink) else {
            return Err(NetlinkError::NoLink(uplink.clone()).into());
        };
        if link.loopback {
            return refuse(format!("no client is on {uplink}"));
        }
        if !link.ethernet {
            return refuse(format!("{uplink} has no Ethernet frames, which are what the programs read"));
        }
    }
    namespaces(own, partitions)?;
    routes(host, &spec.addresses).await?;
    families(&spec.addresses, &spec.uplinks, partitions)?;
    for partition in partitions {
        taken.own(partition)?;
    }
    Ok(links)
}

/// Checks a partition that joins an attachment.
pub(super) async fn check_join(
    record: &Record,
    own: &Netns,
    host: &Netlink,
    partition: &Partition,
) -> Result<(), AttachError> {
    let there = record.slots.iter().flatten().map(|slot| Partition {
        netns: super::NetnsRef::Path(slot.held.clone()),
        inner_link: slot.inner_link.clone(),
        inside: slot.inside.clone(),
    });
    let there: Vec<Partition> = there.collect();
    namespaces(own, &there.iter().chain([partition]).collect::<Vec<_>>())?;
    families(&record.addresses, &record.uplinks, &[partition])?;
    let (held, others) = (host.addresses().await?, Record::all()?);
    Taken { held, others, here: identity(own)?, seen: Vec::new() }.own(partition)
}

/// No two of them are the same, and none is the host's.
fn namespaces(own: &Netns, partitions: &[&Partition]) -> Result<(), AttachError> {
    let mut seen: Vec<Netns> = Vec::new();
    for partition in partitions {
        let netns = Netns::open(&partition.netns)?;
        let same = |other: &Netns| netns.is_same(other).unwrap_or(false);
        if same(own) {
            return refuse(format!("{} is the host's own network namespace", partition.netns));
        }
        if seen.iter().any(same) {
            return refuse("both partitions are the same network namespace".to_owned());
        }
        seen.push(netns);
    }
    Ok(())
}

/// A route for exactly one of the addresses would be replaced, and lost with the attachment.
async fn routes(host: &Netlink, addresses: &[IpAddr]) -> Result<(), AttachError> {
    for address in addresses {
        if host.has_foreign_host_route(*address).await? {
            let option = if address.is_ipv4() { "-4" } else { "-6" };
            return refuse(format!(
                "the host has a route of its own for {address}, which the attachment would take the place of; \
                 next: ip {option} route del {address}"
            ));
        }
    }
    Ok(())
}

/// IPv6 addresses need IPv6 wherever they will be.
fn families(addresses: &[IpAddr], uplinks: &[String], partitions: &[&Partition]) -> Result<(), AttachError> {
    let Some(address) = addresses.iter().find(|address| address.is_ipv6()) else { return Ok(()) };
    // Links that are made get what `default` says.
    for link in uplinks.iter().map(String::as_str).chain(["default"]) {
        if !has_ipv6(link) {
            return refuse(format!(
                "IPv6 is switched off on the host (net.ipv6.conf.{link}.disable_ipv6), and {address} needs it"
            ));
        }
    }
    for partition in partitions {
        if !Netns::open(&partition.netns)?.run(|| has_ipv6("default"))? {
            return refuse(format!(
                "IPv6 is switched off in {} (net.ipv6.conf.default.disable_ipv6), and {address} needs it",
                partition.netns
            ));
        }
    }
    Ok(())
}

fn has_ipv6(link: &str) -> bool {
    sysctl::read(&format!("ipv6/conf/{link}/disable_ipv6")).is_ok_and(|value| value == "0")
}

/// Addresses that somebody has already.
struct Taken {
    /// By the host.
    held: Vec<IpAddr>,
    /// By attachments.
    others: Vec<Record>,
    /// Device and inode of the host's network namespace.
    here: (u64, u64),
    /// By what is being attached.
    seen: Vec<IpAddr>,
}

impl Taken {
    fn own(&mut self, partition: &Partition) -> Result<(), AttachError> {
        let Inside::Owned { own } = &partition.inside else { return Ok(()) };
        for v4 in [true, false] {
            if own.iter().filter(|address| address.is_ipv4() == v4).count() > 1 {
                return refuse("a partition has at most one own address of each family".to_owned());
            }
        }
        own.iter().try_for_each(|address| self.claim(*address, "own"))
    }

    fn claim(&mut self, address: IpAddr, kind: &str) -> Result<(), AttachError> {
        if let Some(why) = undeliverable(&address) {
            return refuse(format!("{address} cannot be an address of a service or of a partition: {why}"));
        }
        if self.held.contains(&address) {
            return refuse(format!(
                "{kind} address {address} belongs to this host itself; take it off its link first"
            ));
        }
        if let Some(name) = self.holder(address) {
            return refuse(format!("{kind} address {address} is attached already, as {name}"));
        }
        if self.seen.contains(&address) {
            return refuse(format!("{address} is given twice"));
        }
        self.seen.push(address);
        Ok(())
    }

    fn holder(&self, address: IpAddr) -> Option<&Name> {
        let has = |record: &&Record| {
            let own = record.slots.iter().flatten().any(|slot| match &slot.inside {
                Inside::Owned { own } => own.contains(&address),
                Inside::Guest { .. } => false,
            });
            record.host == self.here && (own || record.addresses.contains(&address))
        };
        self.others.iter().find(has).map(|record| &record.name)
    }
}
