//! Whether who took over is still there, where nobody probes the service: what can be told without probes.

use patchswitch_common::Slot;

use super::Context;
use crate::attachment::Record;
use crate::manager::{Machine, slot_of};
use crate::names::Name;
use crate::partition::lifecycle::{self, State};

/// The partition that serves.
#[derive(Debug)]
pub(super) struct Serves {
    record: Record,
    slot: Option<Slot>,
    name: Name,
}

impl Serves {
    pub(super) fn of(job: &Context<'_>, machine: &Machine) -> Self {
        Self {
            record: job.attachment.record().clone(),
            slot: slot_of(&job.attachment, machine),
            name: machine.name().clone(),
        }
    }

    /// What is lost of it, in words; nothing if it is there, or if that cannot be told.
    pub(super) fn lost(&self) -> Option<String> {
        if let Some(gone) = self.slot.and_then(|slot| self.record.gone(slot)) {
            return Some(format!("the {} of {}, which serves, is gone", gone.name(), self.name));
        }
        let has_ended =
            lifecycle::state(&self.name).is_ok_and(|state| !matches!(state, State::Running { .. }));
        has_ended.then(|| format!("{}, which serves, has ended", self.name))
    }
}
