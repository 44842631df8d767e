//! A standby is lent to a service, becomes a clone, and is given back or becomes the partition that serves.

use std::time::Duration;

use super::copies::make_store;
use super::machine::CLOSE;
use super::moves::Row;
use super::{Definition, Machine, MachineDisk, Manager, ManagerError, Teardown};
use crate::names::Name;
use crate::partition::spec::PartitionSpec;
use crate::storage::copy::CopyOf;
use crate::storage::disk::{Backing, Disk};
use crate::storage::merge::{self, Patience};
use crate::storage::snapshot::{self, CloneOf, WhenBusy};
use crate::store::{self, Role, State};

/// A merge writes at the speed of the disk; this is for one that hangs.
const MERGE: Duration = Duration::from_secs(3600);

/// The stores that a clone has: those of its clones, those that wait for a disk to be moved or have a copy of one, and those in
/// which the other one keeps what it has moved here.
fn stores_of(machine: &Machine, kept: &[CloneOf]) -> Vec<Backing> {
    let store = |disk: &MachineDisk| match &disk.clone {
        Some(clone) => clone.cow.clone(),
        None => kept
            .iter()
            .find(|clone| clone.origin == disk.backing)
            .map_or_else(|| disk.backing.clone(), |clone| clone.cow.clone()),
    };
    machine.disks.iter().map(store).collect()
}

impl Manager {
    /// Makes a standby the clone of an active partition, in the store: written before any device exists, so that
    /// recovery finds what there may be.
    pub(crate) fn lend(
        &mut self,
        service: &Name,
        active: &Machine,
        standby: &Machine,
        clones: &[CloneOf],
        copies: &[CopyOf],
    ) -> Result<Machine, ManagerError> {
        let reserve = standby.spec().clone();
        let spec = PartitionSpec {
            cpu_percent: reserve.cpu_percent,
            memory: reserve.memory,
            pids: reserve.pids.max(active.spec().pids),
            ..active.spec().renamed(standby.name().clone())
        };
        let uses = |store: &Backing| {
            clones.iter().any(|clone| clone.cow == *store) || copies.iter().any(|copy| copy.target == *store)
        };
        let unused = standby.disks.iter().map(|disk| &disk.backing).filter(|store| !uses(store));
        // Beside those that it had beyond its own disks.
        let spare = standby.definition.spare.iter().chain(unused).cloned().collect();
        let definition = Definition { spec, reserve: Some(reserve), spare, ..standby.definition.clone() };
        let row = store::Partition {
            definition: serde_json::json!(definition),
            generation: active.row.generation + 1,
            role: Role::Standby,
            service: Some(service.clone()),
            ..standby.row.clone()
        };
        let disks = active.disks.iter().filter_map(|disk| {
            let name = crate::names::dm_disk(active.name(), &disk.name);
            let clone = clones.iter().find(|clone| clone.active == name);
            let copy = copies.iter().find(|copy| copy.active == name);
            let backing = clone.map(|clone| &clone.origin).or_else(|| copy.map(|copy| &copy.target))?;
            Some(store::Disk {
                partition: standby.name().clone(),
                name: disk.name.clone(),
                sectors: disk.sectors,
                backing: serde_json::json!(backing),
                cow: clone.map(|clone| serde_json::json!(clone)),
            })
        });
        let _ = self.store.put_machines(&[(row, disks.collect())])?;
        self.machine(standby.name())
    }

    /// Stops a clone, discards it, and frees the standby that it was made of. Whatever of it is there.
    ///
    /// # Errors
    /// [`ManagerError::Refused`] if it is no clone: its disks are all that there is. Others: calling again goes on.
    pub fn discard(&mut self, machine: &Machine) -> Result<(), ManagerError> {
        if !machine.is_clone() {
            return Err(ManagerError::refused(format!(
                "partition {} is no clone: its disks are not discarded",
                machine.name()
            )));
        }
        let mut teardown = Teardown::default();
        self.end(machine, &mut teardown)?;
        // Before its other disks: who does not let go of a copy is cut off from it, as from a clone.
        teardown.note(self.abandon_copies(machine));
        self.close(machine, teardown)?;
        let dm = Self::dm()?;
        // What the other one has kept of disks that it gave away, and goes on with.
        let kept = self.clones_over(machine)?;
        let _ = merge::resume_merge(
            &dm,
            &kept,
            Patience { close: CLOSE, busy: WhenBusy::CutOff, merge: MERGE },
            &mut |_| (),
        )?;
        snapshot::discard(&dm, &machine.clones(), CLOSE, WhenBusy::CutOff)?;
        let stores = stores_of(machine, &kept);
        for store in &stores {
            make_store(store)?;
        }
        let mut machines = vec![self.freed(machine, &stores)?];
        machines.extend(self.merged(&kept)?);
        let _ = self.store.put_machines(&machines)?;
        Ok(())
    }

    /// The partitions whose disks these clones have become.
    fn merged(&self, clones: &[CloneOf]) -> Result<Vec<Row>, ManagerError> {
        let mut rows = Vec::new();
        for row in self.store.partitions()? {
            let machine = self.machine(&row.name)?;
            if machine.clones().iter().any(|clone| clones.contains(clone)) {
                rows.push(self.rewritten(&machine, |disk| {
                    let clone = disk.clone.clone().filter(|clone| !clones.contains(clone));
                    (disk.backing.clone(), clone)
                })?);
            }
        }
        Ok(rows)
    }

    /// Commits in the store: the new partition has the old one's disks, the old one has the stores and is free.
    pub(crate) fn exchange(
        &mut self,
        service: &Name,
        new: &Machine,
        disks: &[Disk],
    ) -> Result<(), ManagerError> {
        let mut stores: Vec<Backing> = new.clones().into_iter().map(|clone| clone.cow).collect();
        let definition = Definition { reserve: None, is_store: false, ..new.definition.clone() };
        let row = store::Partition { definition: serde_json::json!(definition), ..self.row(new.name())? };
        let disk = |disk: &MachineDisk| {
            let merged = disks.iter().find(|d| d.name == crate::names::dm_disk(new.name(), &disk.name));
            let backing = merged.map_or_else(|| disk.backing.clone(), |merged| merged.backing.clone());
            store::Disk {
                partition: new.name().clone(),
                name: disk.name.clone(),
                sectors: disk.sectors,
                backing: serde_json::json!(backing),
                cow: None,
            }
        };
        let mut machines = vec![(row, new.disks.iter().map(disk).collect())];
        if let Some(old) = self.other(service)? {
            // Those in which it had kept disks that it gave away, and the disks that others have copies of.
            stores.extend(old.clones().into_iter().map(|clone| clone.cow));
            let copied = old.copied().filter(|(_, disk)| disk.clone.is_none());
            stores.extend(copied.map(|(_, disk)| disk.backing.clone()));
            machines.push(self.freed(&old, &stores)?);
        }
        let _ = self.store.put_machines(&machines)?;
        Ok(())
    }

    /// A partition without disks of its own gets stores and is an unassigned standby.
    fn freed(
        &self,
        machine: &Machine,
        stores: &[Backing],
    ) -> Result<(store::Partition, Vec<store::Disk>), ManagerError> {
        let spec = machine.definition.reserve.clone().unwrap_or_else(|| machine.spec().clone());
        let stores: Vec<&Backing> = stores.iter().chain(&machine.definition.spare).collect();
        let disk = |(disk, backing): (&crate::partition::spec::Disk, &Backing)| -> Result<_, ManagerError> {
            Ok(store::Disk {
                partition: machine.name().clone(),
                name: disk.name.clone(),
                sectors: backing.sectors()?,
                backing: serde_json::json!(backing),
                cow: None,
            })
        };
        let disks = spec.disks.iter().zip(stores.iter().copied()).map(disk).collect::<Result<_, _>>()?;
        // Of what has served it may have some still, which it had when it was a larger standby.
        let spare = stores.into_iter().skip(spec.disks.len()).cloned().collect();
        let definition =
            Definition { spec, reserve: None, is_store: true, spare, ..machine.definition.clone() };
        let row = store::Partition {
            definition: serde_json::json!(definition),
            role: Role::Standby,
            state: State::Defined,
            service: None,
            ..self.row(machine.name())?
        };
        Ok((row, disks))
    }

    pub(super) fn row(&self, name: &Name) -> Result<store::Partition, ManagerError> {
        let row = self.store.partition(name)?;
        row.ok_or_else(|| ManagerError::Unknown { kind: "partition", name: name.clone() })
    }

    /// The generation that the next switch of a service has in the store.
    pub(crate) fn next_generation(&self, service: &Name) -> Result<u64, ManagerError> {
        Ok(self.store.primary(service)?.map_or(1, |primary| primary.generation + 1))
    }
}
