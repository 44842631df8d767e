//! The pinned maps, one function for each thing that is done to one.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use patchswitch_common::Slot;
use patchswitch_common::maps::{Address, FlowKey, FlowRecord, Quick, Settings, SlotEntry, UplinkEntry};
use patchswitch_common::parse::protocol;
use patchswitch_common::word::Word;

use super::{DataplaneError, UdpEnds};
use crate::host::linux::clock::boot_ns;

pub(super) const WORD: &str = "WORD";
pub(super) const COUNTERS: &str = "COUNTERS";
const SLOTS: &str = "SLOTS";
const SETTINGS: &str = "SETTINGS";
const ADDRESSES: &str = "ADDRESSES";
const QUICK: &str = "QUICK";
const UPLINKS: &str = "UPLINKS";
const LEARNED: &str = "LEARNED";
const FRAGMENTS: &str = "FRAGMENTS";
/// The ring of `aya-log`. It has no pin: the programs hold it, and a reader finds it by one of them.
pub(super) const LOG: &str = "AYA_LOGS";
/// Maps with an entry for each flow.
pub(super) const OF_FLOWS: [&str; 2] = [LEARNED, FRAGMENTS];
pub(super) const ALL: [&str; 9] =
    [WORD, COUNTERS, SLOTS, SETTINGS, ADDRESSES, QUICK, UPLINKS, LEARNED, FRAGMENTS];

pub(super) fn path(directory: &Path, map: &str) -> PathBuf {
    directory.join("maps").join(map)
}

pub(super) fn failed(action: &'static str, map: &'static str) -> impl FnOnce(MapError) -> DataplaneError {
    move |error| DataplaneError::Map { action, map, source: Box::new(error) }
}

pub(super) fn pin_all(ebpf: &Ebpf, directory: &Path) -> Result<(), DataplaneError> {
    for name in ALL {
        let map = ebpf.map(name).ok_or_else(|| DataplaneError::Missing(format!("map {name}")))?;
        let pinned = map.pin(path(directory, name));
        pinned.map_err(|error| DataplaneError::Program {
            action: "pin the maps of",
            program: name.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(())
}

pub(super) fn open(directory: &Path, name: &'static str) -> Result<MapData, DataplaneError> {
    MapData::from_pin(path(directory, name)).map_err(failed("open", name))
}

fn array<V: aya::Pod>(directory: &Path, name: &'static str) -> Result<Array<MapData, V>, DataplaneError> {
    Array::try_from(Map::Array(open(directory, name)?)).map_err(failed("open", name))
}

fn hash<K: aya::Pod, V: aya::Pod>(
    directory: &Path,
    name: &'static str,
) -> Result<HashMap<MapData, K, V>, DataplaneError> {
    HashMap::try_from(Map::HashMap(open(directory, name)?)).map_err(failed("open", name))
}

/// Whether the maps of two directories have entries of the same form, so that programs of one can use those of the
/// other. As many, too, but for those of flows: what is not there cannot be counted.
pub(super) fn compare(one: &Path, other: &Path) -> Result<(), DataplaneError> {
    let form = |directory: &Path, name| -> Result<_, DataplaneError> {
        let info = open(directory, name)?.info().map_err(failed("look at", name))?;
        let entries = (!OF_FLOWS.contains(&name)).then(|| info.max_entries());
        Ok((info.map_type().ok(), info.key_size(), info.value_size(), entries))
    };
    for name in ALL {
        if form(one, name)? != form(other, name)? {
            return Err(DataplaneError::OtherMaps(name));
        }
    }
    Ok(())
}

pub(super) fn write_settings(directory: &Path, settings: &Settings) -> Result<(), DataplaneError> {
    array::<Settings>(directory, SETTINGS)?.set(0, settings, 0).map_err(failed("write", SETTINGS))
}

pub(super) fn read_settings(directory: &Path) -> Result<Settings, DataplaneError> {
    array(directory, SETTINGS)?.get(&0, 0).map_err(failed("read", SETTINGS))
}

/// Writes a word that nobody maps.
pub(super) fn write_word(directory: &Path, word: Word) -> Result<(), DataplaneError> {
    array::<u64>(directory, WORD)?.set(0, word.0, 0).map_err(failed("write", WORD))
}

pub(super) fn write_slot(directory: &Path, slot: Slot, entry: &SlotEntry) -> Result<(), DataplaneError> {
    array::<SlotEntry>(directory, SLOTS)?.set(slot.index(), entry, 0).map_err(failed("write", SLOTS))
}

pub(super) fn read_slot(directory: &Path, slot: Slot) -> Result<SlotEntry, DataplaneError> {
    array(directory, SLOTS)?.get(&slot.index(), 0).map_err(failed("read", SLOTS))
}

/// Writes the service addresses, which do not change any more.
pub(super) fn write_addresses(directory: &Path, addresses: &[Address]) -> Result<(), DataplaneError> {
    let mut all = hash::<Address, u32>(directory, ADDRESSES)?;
    for address in addresses {
        all.insert(address, 1, 0).map_err(failed("write", ADDRESSES))?;
    }
    array::<Quick>(directory, QUICK)?.set(0, Quick::of(addresses), 0).map_err(failed("write", QUICK))
}

pub(super) fn addresses(directory: &Path) -> Result<Vec<Address>, DataplaneError> {
    Ok(hash::<Address, u32>(directory, ADDRESSES)?.keys().flatten().collect())
}

pub(super) fn uplinks(directory: &Path) -> Result<Vec<(u32, UplinkEntry)>, DataplaneError> {
    Ok(hash::<u32, UplinkEntry>(directory, UPLINKS)?.iter().flatten().collect())
}

pub(super) fn add_uplink(directory: &Path, ifindex: u32, mac: [u8; 6]) -> Result<(), DataplaneError> {
    let entry = UplinkEntry { mac, pad: [0; 2] };
    hash::<u32, UplinkEntry>(directory, UPLINKS)?.insert(ifindex, entry, 0).map_err(failed("write", UPLINKS))
}

/// Counts the fresh flows of a slot that are not left out, and removes the stale ones of both.
pub(super) fn count_learned(
    directory: &Path,
    slot: Slot,
    leave_out: &HashSet<UdpEnds>,
) -> Result<usize, DataplaneError> {
    let settings = read_settings(directory)?;
    let mut flows = hash::<FlowKey, FlowRecord>(directory, LEARNED)?;
    let now = boot_ns();
    let (mut fresh, mut stale) = (0, Vec::new());
    for entry in flows.iter() {
        match entry {
            Ok((key, record)) if now.saturating_sub(record.seen_ns) > settings.learned_idle_ns => {
                stale.push(key);
            }
            Ok((key, record)) if record.slot == slot.index() && !leave_out.contains(&udp_ends(&key)) => {
                fresh += 1;
            }
            // The other slot's, left out, or removed while it was read.
            _ => {}
        }
    }
    remove(&mut flows, &stale)?;
    Ok(fresh)
}

/// What `leave_out` of [`count_learned`] knows a flow by; nothing that is not UDP is in it.
fn udp_ends(key: &FlowKey) -> UdpEnds {
    let udp = key.protocol == protocol::UDP;
    let [remote, local] = [key.remote_port, key.local_port].map(u16::from_be);
    (if udp { key.remote } else { [0; 16] }, remote, local)
}

pub(super) fn clear_learned(directory: &Path) -> Result<(), DataplaneError> {
    let mut flows = hash::<FlowKey, FlowRecord>(directory, LEARNED)?;
    let keys: Vec<FlowKey> = flows.keys().flatten().collect();
    remove(&mut flows, &keys)
}

fn remove(flows: &mut HashMap<MapData, FlowKey, FlowRecord>, keys: &[FlowKey]) -> Result<(), DataplaneError> {
    for key in keys {
        match flows.remove(key) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            other => other.map_err(failed("write", LEARNED))?,
        }
    }
    Ok(())
}
