//! Disks of which whoever takes over gets whole copies, on the disks that its standby had for stores.
//!
//! ```text
//!             A, which serves                B, which is to                     in the store
//!  followed   ps-A-data: log or mirror       -                                  A: D   B: S, to be a copy
//!  cut        ps-A-data: D                   ps-B-data: S, what D was then      A: D   B: S
//!  committed  -                              ps-B-data: S                       B: S   A: D, a store
//! ```
//!
//! Nothing connects the two from the cut on: to discard B is to have S as a store again, and to commit is to have D as one. A
//! service that is quiesced has its disk at B from the cut on; back it goes as it is, and A and B exchange D and S.

use std::path::{Path, PathBuf};

use super::machine::{CLOSE, plain};
use super::{Machine, MachineDisk, Manager, ManagerError};
use crate::host::linux::filesystem::{forget, signatures};
use crate::names::{self, Name};
use crate::partition::define as content;
use crate::partition::spec::{self, Policy};
use crate::storage::StorageError;
use crate::storage::copies::{Engine, Wanted};
use crate::storage::copy::{self, CopyOf};
use crate::storage::disk::{self, Backing, Room};
use crate::storage::extend::has_room;
use crate::storage::snapshot::free_cow;

/// What a log needs for itself beside what is written, in sectors: its beginning, and room for marks.
const OF_ITS_OWN: u64 = 4 << 11;

impl Machine {
    /// The disks that are, or are to be, whole copies.
    pub(crate) fn copied(&self) -> impl Iterator<Item = (&spec::Disk, &MachineDisk)> {
        self.spec().disks.iter().zip(&self.disks).filter(|(disk, _)| disk.policy.copies())
    }
}

impl Manager {
    /// What is to be copied from one partition to the other, whose disks are the stores for that.
    pub(crate) fn wanted_copies(&self, from: &Machine, to: &Machine) -> Vec<Wanted> {
        let one = |((spec, disk), (_, target)): ((&spec::Disk, &MachineDisk), (_, &MachineDisk))| {
            let by = match spec.policy {
                Policy::Log => Engine::Log(self.logs(to.name(), &disk.name).map(Backing::Image)),
                _ => Engine::Mirror,
            };
            Wanted { of: copy_of(from, disk, to, target), by }
        };
        from.copied().zip(to.copied()).filter(|(_, (_, target))| target.clone.is_none()).map(one).collect()
    }

    /// Where writes to a disk are recorded while it is copied.
    fn logs(&self, to: &Name, disk: &Name) -> [PathBuf; 2] {
        [1, 2].map(|n| self.state().join("disks").join(format!("{to}-{disk}.log{n}")))
    }

    /// Makes the logs that copies need, as large as their disks and whatever each write takes. They take their room as they are
    /// written.
    pub(crate) fn make_logs(&self, wanted: &[Wanted]) -> Result<(), ManagerError> {
        self.remove_logs(wanted)?;
        for Wanted { of, by } in wanted {
            let Engine::Log(logs) = by else { continue };
            for log in logs {
                let _ = disk::create_image(
                    log.path(),
                    of.sectors.saturating_add(of.sectors / 4).saturating_add(OF_ITS_OWN),
                    Room::Sparse,
                )?;
            }
        }
        Ok(())
    }

    /// Removes them again. Not there: nothing to do.
    fn remove_logs(&self, wanted: &[Wanted]) -> Result<(), ManagerError> {
        for log in wanted.iter().flat_map(|wanted| match &wanted.by {
            Engine::Log(logs) => logs.as_slice(),
            Engine::Mirror => &[],
        }) {
            let _ = log.detach()?;
            disk::remove_image(log.path())?;
        }
        Ok(())
    }

    /// What comes after the cut: copies of file systems that the kernel would take for their originals get identities of their own,
    /// nobody having mounted them yet, and the logs go.
    pub(crate) fn finish_copies(&self, wanted: &[Wanted]) -> Result<(), ManagerError> {
        let dm = Self::dm()?;
        for Wanted { of, .. } in wanted {
            let _ = content::tell_apart(&dm.node(&of.copy)?, &dm.node(&of.active)?)?;
        }
        self.remove_logs(wanted)
    }

    /// Takes away whatever there is of the copies that a partition has, or was to get; its disks can be stores again. It must have
    /// been stopped. Right also after a crash.
    pub(super) fn abandon_copies(&self, machine: &Machine) -> Result<(), ManagerError> {
        let Some(service) = &machine.row.service else { return Ok(()) };
        let active = self.active(&self.service(service)?)?;
        let wanted = self.wanted_copies(&active, machine);
        if wanted.is_empty() {
            return Ok(());
        }
        let dm = Self::dm()?;
        for Wanted { of, .. } in &wanted {
            copy::cut_off(&dm, of, CLOSE)?;
            forget_content(&of.target)?;
        }
        self.remove_logs(&wanted)
    }

    /// Whether the host has room for what is written to disks while they are copied.
    pub(crate) fn has_room_for_logs(&self) -> bool {
        has_room(self.state(), 0).unwrap_or(true)
    }

    /// Makes stores of the disks of an old partition that others have copies of: what they had is given up with the commit.
    pub(crate) fn free_copied(old: &Machine) -> Result<(), ManagerError> {
        let dm = Self::dm()?;
        for (_, disk) in old.copied().filter(|(_, disk)| disk.clone.is_none()) {
            copy::give_up(&dm, &plain(old.name(), disk), CLOSE)?;
            forget_content(&disk.backing)?;
            make_store(&disk.backing)?;
        }
        Ok(())
    }
}

/// A device that had a disk, or a copy of one, has nothing on it that anybody could take for his.
fn forget_content(backing: &Backing) -> Result<(), ManagerError> {
    match backing {
        Backing::Device(path) if !signatures(path)?.is_empty() => Ok(forget(path)?),
        Backing::Device(_) | Backing::Image(_) => Ok(()),
    }
}

/// Makes a store of what was a disk, or a store: whatever it had is gone, and an image has all of its room. Where the host has
/// none that is told; a copy is refused then when it is planned, and a clone is watched.
pub(super) fn make_store(backing: &Backing) -> Result<(), ManagerError> {
    free_cow(backing)?;
    let Backing::Image(path) = backing else { return Ok(()) };
    match allocate(path, backing) {
        Ok(true) => {}
        Ok(false) => tracing::warn!("the host has no room for all of the store {backing}"),
        Err(error) => {
            tracing::warn!("the store {backing} does not have all of its room: {}", super::chain(&error));
        }
    }
    Ok(())
}

/// Whether an image has all of its room now. The host keeps some for itself: others lie there as well, and grow.
fn allocate(path: &Path, backing: &Backing) -> Result<bool, StorageError> {
    let missing = backing.missing()?;
    if missing > 0 && !has_room(path, missing)? {
        return Ok(false);
    }
    disk::create_image(path, backing.sectors()?, Room::Allocated).map(|_| true)
}

fn copy_of(from: &Machine, disk: &MachineDisk, to: &Machine, target: &MachineDisk) -> CopyOf {
    CopyOf {
        active: names::dm_disk(from.name(), &disk.name),
        copy: names::dm_disk(to.name(), &disk.name),
        origin: disk.backing.clone(),
        target: target.backing.clone(),
        sectors: disk.sectors,
    }
}
