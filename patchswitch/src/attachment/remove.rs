//! Removal: the reverse of building, from the record alone, whatever of it was made.

use std::path::Path;

use patchswitch_common::Slot;

use super::record::{Inside, Record, SlotRecord, identity};
use super::settings::Settings;
use super::{AttachError, Lock, Spec, wiring};
use crate::config::Datagrams;
use crate::dataplane::{Dataplane, Hook, Point};
use crate::host::linux::netlink::Netlink;
use crate::host::linux::netns::{Netns, NetnsRef};
use crate::names::{self, Name};

/// Takes everything of a record away, clients first. Goes on after errors and reports them all.
pub(super) async fn remove(record: &Record, host: &Netlink, shared: &Lock) -> Result<(), AttachError> {
    let mut errors: Vec<AttachError> = Vec::new();
    for hook in record.hooks.iter().rev() {
        errors.extend(Dataplane::detach(&record.name, hook).err().map(AttachError::Dataplane));
    }
    errors.extend(host.delete_link(&names::hold_link(&record.name)).await.err().map(AttachError::from));
    errors.extend(wiring::remove_host_side(host, record).await);
    for (slot, entry) in [Slot::A, Slot::B].into_iter().zip(&record.slots) {
        if let Some(entry) = entry {
            errors.extend(wiring::disown(host, record, entry).await);
            errors.extend(wiring::remove_slot(host, record, slot, entry).await);
        }
    }
    match Settings::load(record.host, shared) {
        Ok(mut settings) => errors.extend(settings.release(&record.name, host).await),
        Err(error) => errors.push(error.into()),
    }
    errors.extend(Dataplane::remove(&record.name).err().map(AttachError::Dataplane));
    removal(&record.name, &errors)?;
    // An empty directory goes with the last attachment.
    let _ = std::fs::remove_dir(Path::new(names::RUN_ROOT).join("netns"));
    Ok(record.delete()?)
}

/// Everything that failed, as one error.
pub(super) fn removal(name: &Name, errors: &[AttachError]) -> Result<(), AttachError> {
    if errors.is_empty() {
        return Ok(());
    }
    Err(AttachError::Removal { name: name.clone(), causes: errors.iter().map(text).collect() })
}

/// An error with its cause, in one line.
pub(super) fn text(error: &AttachError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// The record that an attachment must have had, as far as what is pinned tells.
pub(super) async fn remains(name: &Name, host: &Netlink) -> Result<Record, AttachError> {
    let own = Netns::own()?;
    let (addresses, indices) = Dataplane::remains(name);
    let links = host.links().await?.into_iter().filter(|link| indices.contains(&link.index));
    let spec = Spec {
        name: name.clone(),
        addresses,
        uplinks: links.map(|link| link.name).collect(),
        udp_idle: super::UDP_IDLE,
        datagrams: Datagrams::default(),
        hook: None,
        of_service: false,
        own_uplinks: false,
        with: None,
    };
    let mut record = Record::new(&spec, identity(&own)?);
    for slot in [Slot::A, Slot::B] {
        record.slots[slot as usize] = Some(SlotRecord {
            netns: NetnsRef::Path(names::held_netns(name, slot as u8)),
            held: names::held_netns(name, slot as u8),
            link: names::host_link(name, slot as u8),
            inner_link: names::host_link(name, 0),
            inside: Inside::Guest { table: wiring::guest_table(name) },
        });
    }
    for uplink in &record.uplinks {
        record.hooks.push(Hook { point: Point::Uplink, link: uplink.clone(), kind: record.hook_kind });
    }
    Ok(record)
}
