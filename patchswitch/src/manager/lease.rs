//! A standby is lent to a service, becomes a clone, and is given back or becomes the partition that serves.

use super::machine::CLOSE;
use super::{Definition, Machine, Manager, ManagerError};
use crate::names::Name;
use crate::partition::spec::PartitionSpec;
use crate::storage::cow;
use crate::storage::disk::{Backing, Disk};
use crate::storage::snapshot::{self, CloneOf, WhenBusy};
use crate::store::{self, Role, State};

impl Manager {
    /// Makes a standby the clone of an active partition, in the store: written before any device exists, so that
    /// recovery finds what there may be.
    pub(crate) fn lend(
        &mut self,
        service: &Name,
        active: &Machine,
        standby: &Machine,
        clones: &[CloneOf],
    ) -> Result<Machine, ManagerError> {
        let reserve = standby.spec().clone();
        let spec = PartitionSpec {
            cpu_percent: reserve.cpu_percent,
            memory: reserve.memory,
            pids: reserve.pids.max(active.spec().pids),
            ..active.spec().renamed(standby.name().clone())
        };
        let definition = Definition { spec, own: standby.definition.own.clone(), reserve: Some(reserve) };
        let row = store::Partition {
            definition: serde_json::json!(definition),
            generation: active.row.generation + 1,
            ..standby.row.clone()
        };
        let _ = self.store.put_partition(&row)?;
        for disk in &standby.disks {
            let _ = self.store.remove_disk(standby.name(), &disk.name)?;
        }
        for (disk, clone) in active.disks.iter().filter_map(|disk| {
            let name = crate::names::dm_disk(active.name(), &disk.name);
            clones.iter().find(|clone| clone.active == name).map(|clone| (disk, clone))
        }) {
            let row = store::Disk {
                partition: standby.name().clone(),
                name: disk.name.clone(),
                sectors: clone.sectors,
                backing: serde_json::json!(clone.origin),
                cow: Some(serde_json::json!(clone)),
            };
            let _ = self.store.put_disk(&row)?;
        }
        let _ = self.store.assign_standby(standby.name(), Some(service))?;
        self.machine(standby.name())
    }

    /// Stops a clone, discards it, and frees the standby that it was made of. Whatever of it is there.
    ///
    /// # Errors
    /// [`ManagerError`]; calling again goes on.
    pub fn discard(&mut self, machine: &Machine) -> Result<(), ManagerError> {
        self.stop(machine)?;
        let clones = machine.clones();
        let dm = Self::dm()?;
        snapshot::discard(&dm, &clones, CLOSE, WhenBusy::CutOff)?;
        let stores: Vec<Backing> = clones.into_iter().map(|clone| clone.cow).collect();
        self.free(machine, &stores)
    }

    /// Commits in the store: the new partition has the old one's disks, the old one has the stores and is free.
    pub(crate) fn exchange(
        &mut self,
        service: &Name,
        new: &Machine,
        disks: &[Disk],
    ) -> Result<(), ManagerError> {
        let stores: Vec<Backing> = new.clones().into_iter().map(|clone| clone.cow).collect();
        let old = self.other(service)?;
        let definition = Definition { reserve: None, ..new.definition.clone() };
        let row = store::Partition { definition: serde_json::json!(definition), ..self.row(new.name())? };
        let _ = self.store.put_partition(&row)?;
        if let Some(old) = old {
            self.free(&old, &stores)?;
        }
        for disk in &new.disks {
            let merged = disks.iter().find(|d| d.name == crate::names::dm_disk(new.name(), &disk.name));
            let backing = merged.map_or_else(|| disk.backing.clone(), |merged| merged.backing.clone());
            let row = store::Disk {
                partition: new.name().clone(),
                name: disk.name.clone(),
                sectors: disk.sectors,
                backing: serde_json::json!(backing),
                cow: None,
            };
            let _ = self.store.put_disk(&row)?;
        }
        Ok(())
    }

    /// A partition without disks of its own gets stores and is an unassigned standby.
    fn free(&mut self, machine: &Machine, stores: &[Backing]) -> Result<(), ManagerError> {
        let spec = machine.definition.reserve.clone().unwrap_or_else(|| machine.spec().clone());
        for disk in &machine.disks {
            let _ = self.store.remove_disk(machine.name(), &disk.name)?;
        }
        for (disk, backing) in spec.disks.iter().zip(stores) {
            let row = store::Disk {
                partition: machine.name().clone(),
                name: disk.name.clone(),
                sectors: cow::cow_sectors(disk.size.div_ceil(512)),
                backing: serde_json::json!(backing),
                cow: None,
            };
            let _ = self.store.put_disk(&row)?;
        }
        let definition = Definition { spec, own: machine.definition.own.clone(), reserve: None };
        let row = store::Partition {
            definition: serde_json::json!(definition),
            role: Role::Standby,
            state: State::Defined,
            service: None,
            ..self.row(machine.name())?
        };
        let _ = self.store.put_partition(&row)?;
        Ok(())
    }

    /// The old partition of a commit whose merge was done, but not written down.
    pub(crate) fn forget_old(&mut self, service: &Name) -> Result<(), ManagerError> {
        match self.other(service)? {
            None => Ok(()),
            Some(old) => {
                let stores: Vec<Backing> = old.disks.iter().map(|disk| disk.backing.clone()).collect();
                self.free(&old, &stores)
            }
        }
    }

    fn row(&self, name: &Name) -> Result<store::Partition, ManagerError> {
        let row = self.store.partition(name)?;
        row.ok_or_else(|| ManagerError::Unknown { kind: "partition", name: name.clone() })
    }

    /// The generation that the next switch of a service has in the store.
    pub(crate) fn next_generation(&self, service: &Name) -> Result<u64, ManagerError> {
        Ok(self.store.primary(service)?.map_or(1, |primary| primary.generation + 1))
    }
}
