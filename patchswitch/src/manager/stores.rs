//! Stores that could fill up: how large they are at first, and when nobody watches them any more.

use std::time::Duration;

use super::{Machine, Manager, ManagerError};
use crate::names::Name;
use crate::storage::StorageError;
use crate::storage::cow::cow_sectors;
use crate::storage::extend::{extend_for, extend_to_the_end};
use crate::storage::pace::{Count, Pace};
use crate::storage::snapshot::CloneOf;
use crate::storage::table::CHUNK;

/// How a disk is written, and what that means for the store of its clone.
#[derive(Clone, Debug)]
pub(crate) struct StoreSize {
    /// The disk.
    pub(crate) active: String,
    /// How fast it is written.
    pub(crate) pace: Pace,
    /// Size of the store, in bytes.
    pub(crate) bytes: u64,
    /// How long it takes that, at least.
    pub(crate) lasts: Duration,
}

impl Manager {
    /// What has been written to the disks of clones that are to be made, as far as their stores could fill up.
    pub(crate) fn count_writes(clones: &[CloneOf]) -> Result<Vec<(&CloneOf, Count)>, ManagerError> {
        let dm = Self::dm()?;
        let mut counts = Vec::new();
        for clone in clones.iter().filter(|clone| clone.watched) {
            if let Some(info) = dm.info(&clone.active)? {
                counts.push((clone, Count::now(info.device)?));
            }
        }
        Ok(counts)
    }

    /// Makes stores so large that what was written since goes on for as long as the configuration says, where that can be.
    pub(crate) fn size_stores(&self, counted: &[(&CloneOf, Count)]) -> Result<Vec<StoreSize>, ManagerError> {
        let job = &self.config.job;
        let dm = Self::dm()?;
        let mut all = Vec::new();
        for (clone, before) in counted {
            let Some(info) = dm.info(&clone.active)? else { continue };
            let pace = before.until(&Count::now(info.device)?);
            let chunks = pace.chunks_in(job.store_lasts);
            if job.extend_stores && chunks > 0 {
                // What has no room for more has what it has; a job watches it.
                if let Err(error) = extend_for(clone, chunks) {
                    tracing::warn!(clone = %clone.clone, "the store could not be extended: {}", super::chain(&error));
                }
            }
            let sectors = clone.cow.sectors()?;
            all.push(StoreSize {
                active: clone.active.clone(),
                pace,
                bytes: sectors * 512,
                lasts: lasts(sectors, pace),
            });
        }
        Ok(all)
    }

    /// Nobody watches the clones of a partition from now on: their stores become as large as they can ever need, where the host has
    /// the room. Those that can still fill up.
    pub(crate) fn leave_unwatched(&self, machine: &Machine) -> Result<Vec<CloneOf>, ManagerError> {
        let mut left = Vec::new();
        for clone in machine.clones().into_iter().filter(|clone| clone.watched) {
            if self.config.job.extend_stores
                && let Err(error) = extend_to_the_end(&clone)
            {
                tracing::warn!(clone = %clone.clone, "the store could not be extended: {}", super::chain(&error));
            }
            if can_fill_up(&clone)? {
                left.push(clone);
            }
        }
        Ok(left)
    }

    /// What is to be said of a clone that [`Manager::leave_unwatched`] has left.
    pub(crate) fn can_fill_up_unwatched(&self, service: &Name, clone: &CloneOf) -> String {
        format!(
            "the store of {} can fill up, and nobody watches it from now on: `patchswitch status` says how full it is; \
             `patchswitch commit {service}` or `patchswitch rollback {service}` frees it{}",
            clone.clone,
            if self.config.job.extend_stores { ", and the host has no room to extend it" } else { "" },
        )
    }
}

/// By the device, which may be smaller than its image still.
fn can_fill_up(clone: &CloneOf) -> Result<bool, StorageError> {
    let device = clone.cow.attach()?.device().sectors()?;
    Ok(device < cow_sectors(clone.sectors))
}

/// How long a store of so many sectors takes a pace: for ever, if it is slow enough.
#[expect(clippy::cast_precision_loss, reason = "a time for people")]
fn lasts(sectors: u64, pace: Pace) -> Duration {
    let chunks = (sectors / CHUNK).saturating_sub(cow_sectors(0) / CHUNK);
    Duration::try_from_secs_f64(chunks as f64 / pace.chunks).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_lasts_for_as_long_as_it_takes_the_pace() {
        let pace = |chunks| Pace { bytes: 0.0, chunks };
        assert_eq!(lasts(102 * CHUNK, pace(10.0)), Duration::from_secs(10));
        assert_eq!(lasts(102 * CHUNK, pace(0.0)), Duration::MAX);
        assert_eq!(lasts(0, pace(1.0)), Duration::ZERO);
    }
}
