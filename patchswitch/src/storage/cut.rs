//! The instant in which disks get the tables that wait for it, all of them, whichever engine each has.

use std::time::{Duration, SystemTime};

use super::StorageError;
use super::copy::can_be_frozen;
use super::disk::other_table;
use super::meter::Mark;
use super::table::Table;
use crate::host::linux::cutter::{Cutter, Mounts};
use crate::host::linux::dm::{Dm, DmError};

/// A disk whose next table is loaded, and waits.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    /// The disk that is in use.
    pub(super) active: String,
    /// Its size.
    pub(super) sectors: u64,
    /// What it becomes.
    pub(super) table: Table,
    /// A device that comes alive in the same instant.
    pub(super) wake: Option<String>,
}

/// The instant.
#[derive(Clone, Debug)]
pub(super) struct Moment {
    /// How long writers to the first disk waited.
    pub(super) freeze: Duration,
    /// A moment just before.
    pub(super) before: SystemTime,
    /// What had been written to each disk, in their order.
    pub(super) marks: Vec<Mark>,
}

/// Exchanges the tables of all disks in one instant.
pub(super) fn cut(dm: &Dm, turns: &[Turn], mounts: &Mounts) -> Result<Moment, StorageError> {
    let active: Vec<&str> = turns.iter().map(|turn| turn.active.as_str()).collect();
    let wake: Vec<&str> = turns.iter().filter_map(|turn| turn.wake.as_deref()).collect();
    for name in &active {
        // It may have been mounted since that was looked at first.
        can_be_frozen(dm, name, mounts)?;
    }
    let cutter = Cutter::fork(dm, &active, &wake, mounts)?;
    let before = SystemTime::now();
    let window = cutter.cut()?;
    for turn in turns {
        let lines = dm.table(&turn.active)?;
        // Nobody should have changed it. But a clone whose origin keeps nothing for it would be silently wrong.
        if Table::recognise(&lines, turn.sectors) != Some(turn.table) {
            return Err(other_table(&turn.active, &lines, "the table that waited for the cut"));
        }
    }
    let marks = active.iter().zip(window.written).map(|(&name, written)| {
        let info = dm.info(name)?.ok_or_else(|| DmError::NoDevice(name.to_owned()))?;
        Mark::at(info.device, written)
    });
    Ok(Moment { freeze: window.length, before, marks: marks.collect::<Result<_, _>>()? })
}
