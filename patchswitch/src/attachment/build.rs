//! Building: in the order in which no connection ever has one direction on each path.

use std::time::Duration;

use patchswitch_common::Slot;
use patchswitch_common::maps::{CID, STATELESS, Settings as MapSettings, SlotEntry};

use super::record::{Inside, Record, SlotRecord};
use super::settings::Settings;
use super::{AttachError, Partition, Spec, wiring, xdp};
use crate::config::{Datagrams, Quic};
use crate::dataplane::{self, Dataplane, End, Hook, HookKind, Point};
use crate::host::linux::netlink::{Link, Netlink};
use crate::host::linux::netns::{Netns, NetnsRef};
use crate::names::{self, Name};

/// Replies before clients.
pub(super) async fn build(
    record: &mut Record,
    spec: &Spec,
    host: &Netlink,
    settings: &mut Settings<'_>,
    (links, partitions): (&[Link], &[&Partition]),
) -> Result<Dataplane, AttachError> {
    dataplane::ensure_bpffs()?;
    let settings_of_maps = map_settings(&spec.name, spec.udp_idle, &spec.datagrams);
    let plane =
        Dataplane::create(&spec.name, &spec.addresses, &settings_of_maps, (spec.with.as_ref(), record.xdp))?;
    // Who joins a group is given its serving partition first, whichever slot that has there.
    let active = plane.word().active();
    for uplink in &record.uplinks {
        let link = host.link(uplink).await?;
        plane.add_uplink(link.index, link.mac)?;
    }
    let (smallest, largest) = mtus(host, &record.uplinks).await?;
    if smallest < largest {
        tracing::warn!("the uplinks have MTUs from {smallest} to {largest}; partitions get {smallest}");
    }
    for wanted in wiring::settings(record, links) {
        settings.set(&record.name, &wanted)?;
    }
    for (slot, partition) in [active, active.other()].into_iter().zip(partitions) {
        join(record, &plane, host, slot, partition).await?;
    }
    self_test(record, &plane)?;
    let serving = record.slots[active as usize].clone();
    if let Some(entry) = &serving {
        wiring::slow_path(host, record, entry).await?;
    }
    for uplink in record.uplinks.clone() {
        if record.hook_kind == HookKind::Clsact {
            settings.clsact(&record.name, host, &uplink).await?;
        }
        attach(record, &plane, Point::Uplink, uplink.clone())?;
        if record.xdp {
            attach(record, &plane, Point::Xdp, uplink)?;
        }
    }
    wiring::answer(host, record, active).await?;
    record.ready = true;
    record.save()?;
    Ok(plane)
}

/// What the programs have to know of an attachment.
pub(super) fn map_settings(name: &Name, udp_idle: Duration, datagrams: &Datagrams) -> MapSettings {
    let mut stateless = [0; STATELESS];
    for (place, port) in stateless.iter_mut().zip(&datagrams.stateless) {
        *place = port.to_be();
    }
    let settings = MapSettings {
        learned_idle_ns: u64::try_from(udp_idle.as_nanos()).unwrap_or(u64::MAX),
        probe_mark: dataplane::PROBE_MARK,
        inner_mac: wiring::inner_mac(name),
        stateless,
        ..MapSettings::default()
    };
    let Some(Quic { port, cid_offset, cid_len, mask }) = datagrams.quic else { return settings };
    let mut cid_mask = [0; CID];
    let part = usize::from(cid_len).min(CID);
    cid_mask[..part].copy_from_slice(&mask[..part]);
    MapSettings { quic_port: port.to_be(), cid_offset, cid_len, cid_mask, ..settings }
}

/// The largest packet that passes every uplink.
pub(super) async fn mtu(host: &Netlink, uplinks: &[String]) -> Result<u32, AttachError> {
    Ok(mtus(host, uplinks).await?.0)
}

/// The smallest and the largest MTU.
async fn mtus(host: &Netlink, uplinks: &[String]) -> Result<(u32, u32), AttachError> {
    let (mut smallest, mut largest) = (u32::from(u16::MAX), 0);
    for uplink in uplinks {
        let mtu = host.link(uplink).await?.mtu;
        (smallest, largest) = (smallest.min(mtu), largest.max(mtu));
    }
    Ok((smallest, largest))
}

/// Puts a partition into an empty slot.
pub(super) async fn join(
    record: &mut Record,
    plane: &Dataplane,
    host: &Netlink,
    slot: Slot,
    partition: &Partition,
) -> Result<(), AttachError> {
    let mtu = mtu(host, &record.uplinks).await?;
    let netns = Netns::open(&partition.netns)?;
    let entry = SlotRecord {
        netns: partition.netns.clone(),
        held: names::held_netns(&record.name, slot as u8),
        link: free_link(record, slot),
        inner_link: partition.inner_link.clone(),
        inside: partition.inside.clone(),
    };
    record.slots[slot as usize] = Some(entry.clone());
    record.save()?;
    netns.hold(&entry.held)?;
    // Before the veth: making one would give the namespace an id of the kernel's choice.
    let nsid = host.nsid(&netns, wiring::nsid(&record.name, slot)).await?;
    let link = wiring::make_slot(host, record, slot, &entry, &netns, mtu).await?;
    xdp::receive(record, &netns, &entry.inner_link)?;
    let own = |v4: bool| match &entry.inside {
        Inside::Owned { own } => own.iter().copied().find(|a| a.is_ipv4() == v4).map(dataplane::to_wire),
        Inside::Guest { .. } => None,
    };
    let value = SlotEntry {
        ifindex: link.index,
        nsid,
        own4: own(true).unwrap_or_default(),
        own6: own(false).unwrap_or_default(),
        ..SlotEntry::default()
    };
    plane.set_slot(slot, &value)?;
    attach(record, plane, Point::FromPartition, entry.link.clone())?;
    attach(record, plane, Point::ToPartition, entry.link.clone())?;
    wiring::host_side(host, record, slot, &entry).await?;
    wiring::own_addresses(host, record, slot, &entry).await
}

/// A name for a slot's link on the host. After an exchange of devices the other slot may have the one that is usual.
fn free_link(record: &Record, slot: Slot) -> String {
    let taken = record.slots[slot.other() as usize].as_ref().map(|other| other.link.as_str());
    let usual = names::host_link(&record.name, slot as u8);
    if taken == Some(usual.as_str()) { names::host_link(&record.name, slot.other() as u8) } else { usual }
}

fn attach(record: &mut Record, plane: &Dataplane, point: Point, link: String) -> Result<(), AttachError> {
    let kind = if point == Point::Xdp { HookKind::Xdp } else { record.hook_kind };
    let hook = Hook { point, link, kind };
    record.hooks.push(hook.clone());
    record.save()?;
    Ok(plane.attach(&hook)?)
}

/// Asks a twin of the programs who would get a packet, as soon as there are two to choose from.
pub(super) fn self_test(record: &Record, plane: &Dataplane) -> Result<(), AttachError> {
    with_ends(record, |ends| match ends {
        [] => Ok(()),
        ends => Ok(plane.self_test(ends)?),
    })?;
    xdp::self_test(record, plane)
}

/// Opens the namespaces of both partitions for the self-test; with one partition there is nothing to ask.
pub(super) fn with_ends<T>(
    record: &Record,
    ask: impl FnOnce(&[End<'_>]) -> Result<T, AttachError>,
) -> Result<T, AttachError> {
    with_all_ends(record, |all| ask(with_a_choice(record, all)))
}

/// Those ends among which there is something to choose.
pub(super) fn with_a_choice<'a>(record: &Record, all: &'a [End<'a>]) -> &'a [End<'a>] {
    if record.slots.iter().all(Option::is_some) { all } else { &[] }
}

/// Opens the namespaces of the partitions that are there.
pub(super) fn with_all_ends<T>(
    record: &Record,
    ask: impl FnOnce(&[End<'_>]) -> Result<T, AttachError>,
) -> Result<T, AttachError> {
    let mut namespaces = Vec::new();
    for (slot, entry) in [Slot::A, Slot::B].into_iter().zip(&record.slots) {
        if let Some(entry) = entry {
            namespaces.push((slot, Netns::open(&NetnsRef::Path(entry.held.clone()))?));
        }
    }
    let ends: Vec<End<'_>> = namespaces
        .iter()
        .flat_map(|(slot, netns)| {
            record.addresses.iter().map(|address| End { slot: *slot, netns, address: *address })
        })
        .collect();
    ask(&ends)
}
