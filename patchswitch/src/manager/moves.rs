//! Disks with one writer: they are not cloned for the partition that takes over, but go over to it.
//!
//! ```text
//!             A, which serves              B, which is to                          in the store
//!  cloned     ps-A-data: origin of D       ps-B-data: snapshot of D, in store S    A: D   B: clone of D in S
//!  checked    ps-A-data: D                 (the copy was thrown away)              A: D   B: S
//!  moved      ps-A-data: snapshot of D     ps-B-data: origin of D                  B: D   A: clone of D in S
//!             as it was when A ended
//! ```
//!
//! From "checked" to "moved" nobody has the disk open, so that nothing has to stand still. Who serves and who has the disk is one
//! row: whatever is in the kernel is brought to that by [`Manager::tidy_moves`], after a kill at any point.
//!
//! Back there are two ways: the disk goes back as it is ([`Manager::move_disks`] with the roles exchanged), or A goes on with its
//! snapshot ([`Manager::give_up`]), which becomes the disk when B is discarded.

use std::path::Path;
use std::time::Duration;

use super::machine::{CLOSE, mount_point, plain};
use super::{Machine, MachineDisk, Manager, ManagerError};
use crate::host::linux::block::DeviceNumber;
use crate::names::{self, Name};
use crate::partition::lifecycle;
use crate::partition::spec::{self, Policy};
use crate::storage::copies::{Account, Copies};
use crate::storage::disk::{self, Backing};
use crate::storage::snapshot::{self, CloneOf, WhenBusy};
use crate::store;

/// How long a disk may take to be closed by who has just been stopped.
const LET_GO: Duration = Duration::from_secs(5);

impl Machine {
    /// The disks that go to whoever takes over from a service that is quiesced, themselves or as copies.
    pub(crate) fn moving(&self) -> impl Iterator<Item = (&spec::Disk, &MachineDisk)> {
        self.spec().disks.iter().zip(&self.disks).filter(|(disk, _)| disk.policy.goes_over())
    }

    /// Those of them that go over themselves.
    pub(crate) fn moving_itself(&self) -> impl Iterator<Item = (&spec::Disk, &MachineDisk)> {
        self.moving().filter(|(disk, _)| disk.policy == Policy::Move)
    }
}

impl Manager {
    /// Throws away the copies on which a standby was checked; whoever used them has been stopped. The standby as it is then.
    pub(crate) fn drop_copies(&mut self, standby: &Machine) -> Result<Machine, ManagerError> {
        self.take_disks(standby)?;
        let dm = Self::dm()?;
        let copies: Vec<CloneOf> = standby.moving().filter_map(|(_, disk)| disk.clone.clone()).collect();
        let _ = snapshot::discard(&dm, &copies, CLOSE, WhenBusy::Refuse)?;
        let stored = |disk: &MachineDisk| copies.iter().find(|copy| Some(*copy) == disk.clone.as_ref());
        let row = self.rewritten(standby, |disk| match stored(disk) {
            Some(copy) => (copy.cow.clone(), None),
            None => (disk.backing.clone(), disk.clone.clone()),
        })?;
        let _ = self.store.put_machines(&[row])?;
        self.machine(standby.name())
    }

    /// Takes the moving disks away from a partition, which may run. Their devices stay, if somebody has them open or not.
    pub(crate) fn take_disks(&self, machine: &Machine) -> Result<(), ManagerError> {
        let (mounts, inside) = (Self::mounts()?, lifecycle::mounts_of(machine.name())?);
        for (disk, _) in machine.moving() {
            let at = mount_point(machine, &disk.mount);
            if let (Some(inside), Some(device)) = (&inside, device(machine, &disk.name)?) {
                // As long as it is mounted for the agent as well, that mount tells its number, which need not be the device's.
                let number = mounts.run(|outside| match outside.mount_at(&at)? {
                    Some(_) => outside.number_at(&at),
                    None => Ok(device.to_stat()),
                })??;
                let _ = inside.run(|inside| inside.prune(number, Path::new(&disk.mount)))??;
            }
            let _ = mounts.run(|inside| inside.unmount(&at))??;
        }
        Ok(())
    }

    /// Gives a running partition its moving disks, as the store has them. It has them already: nothing to do.
    pub(crate) fn give_disks(&self, machine: &Machine) -> Result<(), ManagerError> {
        let Some(partition) = lifecycle::mounts_of(machine.name())? else {
            return Err(ManagerError::refused(format!("partition {} does not run", machine.name())));
        };
        let (dm, mounts) = (Self::dm()?, Self::mounts()?);
        for (spec, disk) in machine.moving() {
            let plain = plain(machine.name(), disk);
            // One that is there is the partition's, whatever has become of a clone of it.
            let is_there = disk.clone.is_none() && dm.info(&plain.name)?.is_some_and(|info| info.live);
            let device = match is_there {
                true => disk::activate(&dm, &plain)?.path,
                false => self.open_disk(&dm, machine, disk)?,
            };
            let at = mount_point(machine, &spec.mount);
            let tree =
                mounts.run(|inside| inside.mount(&device, &at, false).and_then(|_| inside.tree(&at)))??;
            let _ = partition.run(|inside| inside.graft(tree, Path::new(&spec.mount)))??;
        }
        Ok(())
    }

    /// Moves the disks from one partition to the other, which serves from then on as far as the store knows. Both must have
    /// been [taken](Self::take_disks) away. Disks that are copied go over as `copies`, which end here; without, what is behind those
    /// of the two is exchanged, which is the way back. On an error `from` has them.
    pub(crate) fn move_disks(
        &mut self,
        service: &Name,
        from: &Machine,
        to: &Machine,
        copies: Option<Copies<'_>>,
    ) -> Result<Moved, ManagerError> {
        let back: Vec<CloneOf> = to.moving_itself().filter_map(|(_, disk)| disk.clone.clone()).collect();
        let kept = if back.is_empty() { kept_by(from, to) } else { Vec::new() };
        let mut accounts = Vec::new();
        let (mut old, mut new) = match copies {
            Some(copies) => {
                let together = copies.cut_closed(LET_GO)?;
                self.finish_copies(&together.wanted)?;
                accounts = together.accounts;
                (Vec::new(), Vec::new())
            }
            None => exchanged(from, to)?,
        };
        close(from, from.moving().filter(|(disk, _)| back.is_empty() || disk.policy.copies()))?;
        if back.is_empty() {
            snapshot::clone_closed(&Self::dm()?, &kept)?;
            for clone in &kept {
                new.push((clone.active.clone(), clone.origin.clone(), None));
                old.push((clone.clone.clone(), clone.origin.clone(), Some(clone.clone())));
            }
        } else {
            snapshot::unclone_closed(&Self::dm()?, &back, LET_GO)?;
            for clone in &back {
                new.push((clone.clone.clone(), clone.origin.clone(), None));
                old.push((clone.active.clone(), clone.cow.clone(), None));
            }
        }
        let rows = [self.with_disks(from, &old)?, self.with_disks(to, &new)?];
        let generation = self.next_generation(service)?;
        if let Err(error) = self.store.record_move(service, to.name(), generation, &rows) {
            snapshot::unclone_closed(&Self::dm()?, &kept, LET_GO)?;
            return Err(error.into());
        }
        for clone in &back {
            // What it had kept is of a disk that goes on without it.
            if let Err(error) = snapshot::free_cow(&clone.cow) {
                // Whoever discards the clone does it.
                tracing::warn!("{}", super::chain(&error));
            }
        }
        Ok(Moved { from: self.machine(from.name())?, to: self.machine(to.name())?, accounts })
    }

    /// The one that had the disks keeps them as it had them, and serves from then on as far as the store knows; what the other
    /// one wrote goes when that is discarded. Both have been [taken](Self::take_disks) away.
    pub(crate) fn give_up(&mut self, service: &Name, to: &Machine) -> Result<Machine, ManagerError> {
        let generation = self.next_generation(service)?;
        let _ = self.store.record_switch(service, to.name(), generation)?;
        self.machine(to.name())
    }

    /// The kernel follows the store: devices of a move that was not written down go. For a job that was killed.
    pub(crate) fn tidy_moves(&self, serving: &Machine, other: &Machine) -> Result<(), ManagerError> {
        let is_plain = |machine: &Machine| machine.moving().all(|(_, disk)| disk.clone.is_none());
        if !is_plain(serving) || !is_plain(other) {
            return Ok(());
        }
        self.take_disks(other)?;
        Ok(snapshot::unclone_closed(&Self::dm()?, &kept_by(serving, other), LET_GO)?)
    }

    /// A partition's row, with other things behind some of its disks, by the names of their devices.
    fn with_disks(&self, machine: &Machine, changed: &[Behind]) -> Result<Row, ManagerError> {
        self.rewritten(machine, |disk| {
            let name = names::dm_disk(machine.name(), &disk.name);
            match changed.iter().find(|(device, ..)| *device == name) {
                Some((_, backing, clone)) => (backing.clone(), clone.clone()),
                None => (disk.backing.clone(), disk.clone.clone()),
            }
        })
    }

    pub(super) fn rewritten(
        &self,
        machine: &Machine,
        behind: impl Fn(&MachineDisk) -> (Backing, Option<CloneOf>),
    ) -> Result<Row, ManagerError> {
        let row = |disk: &MachineDisk| {
            let (backing, clone) = behind(disk);
            store::Disk {
                partition: machine.name().clone(),
                name: disk.name.clone(),
                sectors: disk.sectors,
                backing: serde_json::json!(backing),
                cow: clone.map(|clone| serde_json::json!(clone)),
            }
        };
        Ok((self.row(machine.name())?, machine.disks.iter().map(row).collect()))
    }
}

/// What is behind the copied disks of the two when they have been exchanged; nobody has them open.
fn exchanged(from: &Machine, to: &Machine) -> Result<(Vec<Behind>, Vec<Behind>), ManagerError> {
    close(to, to.copied())?;
    let behind = |machine: &Machine, disk: &MachineDisk, other: &MachineDisk| {
        (names::dm_disk(machine.name(), &disk.name), other.backing.clone(), None)
    };
    let pairs = from
        .copied()
        .zip(to.copied())
        .map(|((_, here), (_, there))| (behind(from, here, there), behind(to, there, here)));
    Ok(pairs.unzip())
}

/// Takes the devices of some of a partition's disks out of the kernel.
fn close<'a>(
    machine: &Machine,
    disks: impl Iterator<Item = (&'a spec::Disk, &'a MachineDisk)>,
) -> Result<(), ManagerError> {
    let dm = Manager::dm()?;
    for (_, disk) in disks {
        let _ = disk::deactivate(&dm, &plain(machine.name(), disk), LET_GO)?;
    }
    Ok(())
}

/// Who had the disks, and who has them.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) from: Machine,
    pub(crate) to: Machine,
    /// How those were made that are copies.
    pub(crate) accounts: Vec<Account>,
}

/// What is behind a device.
type Behind = (String, Backing, Option<CloneOf>);
/// A partition as the store has it.
pub(super) type Row = (store::Partition, Vec<store::Disk>);

/// What the partition that gives its disks away keeps of them, in the stores that the other one has for that.
fn kept_by(from: &Machine, to: &Machine) -> Vec<CloneOf> {
    let one = |((_, disk), (_, store)): ((&spec::Disk, &MachineDisk), (&spec::Disk, &MachineDisk))| CloneOf {
        active: names::dm_disk(to.name(), &disk.name),
        clone: names::dm_disk(from.name(), &disk.name),
        origin: disk.backing.clone(),
        cow: store.backing.clone(),
        sectors: disk.sectors,
        watched: false,
    };
    from.moving_itself().zip(to.moving_itself()).map(one).collect()
}

/// A disk's device, if it is there.
fn device(machine: &Machine, disk: &Name) -> Result<Option<DeviceNumber>, ManagerError> {
    Ok(Manager::dm()?.info(&names::dm_disk(machine.name(), disk))?.map(|info| info.device))
}
