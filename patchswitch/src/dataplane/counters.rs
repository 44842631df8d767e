//! What the programs counted.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::path::Path;

use aya::maps::{Map, MapData, PerCpuArray};
use patchswitch_common::verdict::{EVENTS, Event, HOOKS, Hook, VERDICTS, Verdict, counter};
use serde::Serialize;

use super::{DataplaneError, maps};

/// Counters since the programs were loaded; those that are 0 are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Per hook and verdict: each packet exactly once.
    pub packets: BTreeMap<&'static str, BTreeMap<&'static str, u64>>,
    /// What happened on the way.
    pub events: BTreeMap<&'static str, u64>,
}

impl Counters {
    /// Packets that left a hook with a verdict.
    pub fn packets(&self, hook: Hook, verdict: Verdict) -> u64 {
        let hook = self.packets.get(hook.name());
        hook.and_then(|verdicts| verdicts.get(verdict.name())).copied().unwrap_or_default()
    }

    /// How often something happened.
    pub fn events(&self, event: Event) -> u64 {
        self.events.get(event.name()).copied().unwrap_or_default()
    }
}

pub(super) fn read(directory: &Path) -> Result<Counters, DataplaneError> {
    let map = Map::PerCpuArray(maps::open(directory, maps::COUNTERS)?);
    sum(&map.try_into().map_err(maps::failed("open", maps::COUNTERS))?)
}

/// How often one thing happened. All counters take tens of calls, which is too much beside a switch.
pub(super) fn event(directory: &Path, event: Event) -> Result<u64, DataplaneError> {
    let map = Map::PerCpuArray(maps::open(directory, maps::COUNTERS)?);
    let array: PerCpuArray<MapData, u64> = map.try_into().map_err(maps::failed("open", maps::COUNTERS))?;
    let values = array.get(&event.counter(), 0).map_err(maps::failed("read", maps::COUNTERS))?;
    Ok(values.iter().sum())
}

pub(super) fn sum<T: Borrow<MapData>>(array: &PerCpuArray<T, u64>) -> Result<Counters, DataplaneError> {
    let failed = || maps::failed("read", maps::COUNTERS);
    let sum = |index| Ok::<u64, DataplaneError>(array.get(&index, 0).map_err(failed())?.iter().sum());
    let mut counters = Counters::default();
    for hook in HOOKS {
        for verdict in VERDICTS {
            let count = sum(counter(hook, verdict))?;
            if count != 0 {
                counters.packets.entry(hook.name()).or_default().insert(verdict.name(), count);
            }
        }
    }
    for event in EVENTS {
        let count = sum(event.counter())?;
        if count != 0 {
            counters.events.insert(event.name(), count);
        }
    }
    Ok(counters)
}
