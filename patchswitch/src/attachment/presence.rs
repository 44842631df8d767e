//! Partitions that are not there any more: their namespace or their link was taken away while they were attached.
//!
//! A namespace is held as long as it is attached, whatever becomes of its name and processes; who undoes that, or removes
//! the link inside, has cut its flows. Nobody can be switched to it, and nobody has to wait for it.

use patchswitch_common::Slot;
use serde::Serialize;

use super::{AttachError, Attachment, Record, SlotRecord, here};
use crate::host::linux::netns::{Netns, NetnsError, NetnsRef, link_index};

/// What is gone of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Gone {
    /// Its network namespace, and with it everything.
    Namespace,
    /// The veth pair between it and the host.
    Link,
}

impl Gone {
    /// For people: "its … is gone".
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespace => "network namespace",
            Self::Link => "link",
        }
    }
}

impl Record {
    /// What is gone of the partition in a slot. `None`: nothing, as far as can be seen from here; or nobody is there.
    pub fn gone(&self, slot: Slot) -> Option<Gone> {
        let entry = self.slots[slot as usize].as_ref()?;
        if is_gone(entry) {
            return Some(Gone::Namespace);
        }
        let is_here = here(self).is_ok();
        (is_here && link_index(&entry.link).is_none()).then_some(Gone::Link)
    }

    /// The uplinks that are gone, or were made anew since: nothing of ours is there any more, and nothing that comes to
    /// them is taken. `known` are the indices of those that have the programs, of [`Dataplane::uplinks`]. None from a
    /// namespace that is not the attachment's, in which they cannot be seen.
    ///
    /// [`Dataplane::uplinks`]: crate::dataplane::Dataplane::uplinks
    pub fn lost_uplinks(&self, known: &[u32]) -> Vec<&str> {
        if here(self).is_err() {
            return Vec::new();
        }
        let has_ours = |name: &str| link_index(name).is_some_and(|index| known.contains(&index));
        self.uplinks.iter().map(String::as_str).filter(|name| !has_ours(name)).collect()
    }

    /// What to type when the partition that serves is gone and the other one is there. Of a service its job decides.
    pub fn way_back(&self, active: Slot) -> Option<String> {
        let other = self.slots[active.other() as usize].as_ref()?;
        let is_needed = self.gone(active).is_some() && self.gone(active.other()).is_none();
        (is_needed && !self.of_service)
            .then(|| format!("patchswitch switch {} --to {}", self.name, other.netns))
    }
}

fn is_gone(entry: &SlotRecord) -> bool {
    match Netns::open(&NetnsRef::Path(entry.held.clone())) {
        // What is left of a bind mount is the file below it.
        Err(NetnsError::NotANamespace(_)) => true,
        Err(NetnsError::Open { source, .. }) => source.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

impl Attachment {
    /// Refuses to give flows to a partition that packets do not reach.
    pub(super) fn reachable(&self, slot: Slot) -> Result<(), AttachError> {
        let entry = self.slot(slot)?;
        let gone = self.record.gone(slot).or_else(|| {
            // One of that name which somebody made anew has no programs.
            let known = self.plane.slot(slot).ok()?.ifindex;
            (link_index(&entry.link) != Some(known)).then_some(Gone::Link)
        });
        let Some(gone) = gone else { return Ok(()) };
        Err(AttachError::Refused(format!(
            "the {} of {} is gone; nothing was switched; patchswitch detach {} takes away what is left",
            gone.name(),
            entry.netns,
            self.record.name
        )))
    }

    /// Warns of each member of the group whose partition that serves is gone: flows of the retiring one go on, new ones
    /// reach nobody. Whether there was one.
    pub(super) fn tell_of_lost(&self, active: Slot) -> bool {
        let members = std::iter::once(self).chain(&self.others);
        members.filter(|member| member.warn_of_lost(active)).count() > 0
    }

    fn warn_of_lost(&self, active: Slot) -> bool {
        let Some((gone, entry)) = self.record.gone(active).zip(self.record.slots[active as usize].as_ref())
        else {
            return false;
        };
        let next = self.record.way_back(active).map(|way| format!("; next: {way}")).unwrap_or_default();
        tracing::warn!(
            "the {} of {}, which serves, is gone: new flows reach nobody{next}",
            gone.name(),
            entry.netns
        );
        true
    }

    /// The namespace of the partition that is to retire; nothing if it is gone, and all its flows with it.
    pub(super) fn leaving(&self, slot: Slot) -> Result<Option<Netns>, AttachError> {
        if self.record.gone(slot) != Some(Gone::Namespace) {
            return self.netns(slot).map(Some);
        }
        tracing::warn!("the network namespace of {} is gone, and its flows with it", self.slot(slot)?.netns);
        Ok(None)
    }
}
