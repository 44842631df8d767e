//! The switch with its record, used in both directions.
//!
//! ```text
//!  record (durable) ─► store of the word, and what goes over with it ─► patches follow who serves
//!                           └ refused, or put back: so is the record
//! ```
//!
//! The record comes first: the side that gets the flows writes to a disk of its own, and after a power cut the disk
//! that has acknowledged writes must be the one that boots. While the host is up only the phase word counts.

use patchswitch_common::Slot;

use super::context::{Failure, Phase, at};
use super::{Context, exchange};
use crate::attachment::{SwitchOptions, Switched};
use crate::config::Strategy;
use crate::manager::{Machine, Manager};
use crate::store::JobId;

/// Who gets the new flows, and from whom.
#[derive(Clone, Copy)]
pub(super) struct Turn<'a> {
    /// The phase in which it happens.
    pub(super) phase: Phase,
    /// The partition that gets them.
    pub(super) to: &'a Machine,
    /// Its slot.
    pub(super) slot: Slot,
    /// The partition that had them.
    pub(super) from: &'a Machine,
    /// The job that patched the clone of the two.
    pub(super) patched: Option<JobId>,
    /// What the switch does beside.
    pub(super) options: SwitchOptions,
}

/// Makes the switch.
///
/// # Errors
/// [`Failure`]. Whether it was made all the same is in the phase word; the record says the same.
pub(super) async fn turn(job: &mut Context<'_>, turn: Turn<'_>) -> Result<Switched, Failure> {
    let Turn { phase, to, slot, from, patched, options } = turn;
    let service = job.service.name.clone();
    let generation = job.manager.next_generation(&service).map_err(at(phase))?;
    let _ = job.manager.store.record_switch(&service, to.name(), generation).map_err(at(phase))?;
    let switched = match exchange::of(&job.service).map(|(what, how)| (what, how.clone())) {
        Some(exchanged) => exchange::hand_over(job, &turn, exchanged).await,
        None => {
            let letter = job.service.strategy == Strategy::Letter;
            let options = SwitchOptions { letter, ..options };
            job.attachment.switch_with(slot, options).await.map_err(at(phase))
        }
    };
    if job.attachment.plane().word().active() != slot {
        // Nothing was switched, so the record must not say so: undo goes by it.
        let back = job.manager.store.record_switch(&service, from.name(), generation + 1);
        let _ = back.map_err(at(phase))?;
        if to.is_clone() {
            let _ = job.manager.store.assign_standby(to.name(), Some(&service)).map_err(at(phase))?;
        }
    } else if let Some(patched) = patched {
        applied(job.manager, patched, to.is_clone()).map_err(at(phase))?;
    }
    switched
}

/// The patches that the service runs with are those of whoever serves.
pub(super) fn applied(
    manager: &mut Manager,
    patched: JobId,
    by_clone: bool,
) -> Result<(), crate::store::StoreError> {
    let _ = match by_clone {
        true => manager.store.set_applied(patched)?,
        false => manager.store.unset_applied(patched)?,
    };
    Ok(())
}
