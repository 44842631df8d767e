//! A standby is lent to a service, becomes a clone, and is given back or becomes the partition that serves.

use super::machine::CLOSE;
use super::{Definition, Machine, MachineDisk, Manager, ManagerError};
use crate::names::Name;
use crate::partition::spec::PartitionSpec;
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
        let definition = Definition { spec, reserve: Some(reserve), ..standby.definition.clone() };
        let row = store::Partition {
            definition: serde_json::json!(definition),
            generation: active.row.generation + 1,
            role: Role::Standby,
            service: Some(service.clone()),
            ..standby.row.clone()
        };
        let disks = active.disks.iter().filter_map(|disk| {
            let name = crate::names::dm_disk(active.name(), &disk.name);
            let clone = clones.iter().find(|clone| clone.active == name)?;
            Some(store::Disk {
                partition: standby.name().clone(),
                name: disk.name.clone(),
                sectors: clone.sectors,
                backing: serde_json::json!(clone.origin),
                cow: Some(serde_json::json!(clone)),
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
        let clones = machine.clones();
        if clones.is_empty() {
            return Err(ManagerError::refused(format!(
                "partition {} is no clone: its disks are not discarded",
                machine.name()
            )));
        }
        self.stop(machine)?;
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
            machines.push(self.freed(&old, &stores)?);
        }
        let _ = self.store.put_machines(&machines)?;
        Ok(())
    }

    fn free(&mut self, machine: &Machine, stores: &[Backing]) -> Result<(), ManagerError> {
        let freed = self.freed(machine, stores)?;
        let _ = self.store.put_machines(&[freed])?;
        Ok(())
    }

    /// A partition without disks of its own gets stores and is an unassigned standby.
    fn freed(
        &self,
        machine: &Machine,
        stores: &[Backing],
    ) -> Result<(store::Partition, Vec<store::Disk>), ManagerError> {
        let spec = machine.definition.reserve.clone().unwrap_or_else(|| machine.spec().clone());
        let disk = |(disk, backing): (&crate::partition::spec::Disk, &Backing)| -> Result<_, ManagerError> {
            Ok(store::Disk {
                partition: machine.name().clone(),
                name: disk.name.clone(),
                sectors: backing.sectors()?,
                backing: serde_json::json!(backing),
                cow: None,
            })
        };
        let disks = spec.disks.iter().zip(stores).map(disk).collect::<Result<_, _>>()?;
        let definition = Definition { spec, reserve: None, is_store: true, ..machine.definition.clone() };
        let row = store::Partition {
            definition: serde_json::json!(definition),
            role: Role::Standby,
            state: State::Defined,
            service: None,
            ..self.row(machine.name())?
        };
        Ok((row, disks))
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
