//! A service address gets its partition and its data path, and loses them.

use std::net::IpAddr;
use std::path::Path;

use patchswitch_common::Slot;

use super::{Machine, Manager, ManagerError};
use crate::attachment::{AttachError, Attachment, Inside, Partition, RecordError, Spec};
use crate::config::Service;
use crate::host::linux::netns::NetnsRef;
use crate::names::{Name, RUN_ROOT};
use crate::store::{JobLock, Role};

/// The only link inside a partition of ours.
const INNER_LINK: &str = "eth0";

impl Manager {
    /// Adds a service: its partition is started if it does not run, and gets the addresses. Added already: its
    /// settings are renewed, and whatever of it is missing is made.
    ///
    /// # Errors
    /// [`ManagerError`]; a service that was not there before is not there afterwards.
    pub async fn add_service(&mut self, name: &Name) -> Result<(), ManagerError> {
        let found = self.config.services.iter().find(|service| &service.name == name).cloned();
        let service = found.ok_or_else(|| {
            ManagerError::refused(format!("the configuration has no [[service]] with name = \"{name}\""))
        })?;
        let known = self.store.service(name)?.is_some();
        let machine = self.machine(&service.partition)?;
        let ran = self.is_running(&machine)?;
        let _ = self.store.put_service(&service)?;
        let Err(cause) = self.serve(&service).await else { return Ok(()) };
        if !known {
            let _ = self.store.remove_service(name)?;
            if !ran && let Err(second) = self.stop(&machine) {
                tracing::warn!(partition = %machine.name(), "failed to clean up: {}", super::chain(&second));
            }
        }
        Err(cause)
    }

    /// Makes the primary partition of a service run and serve.
    pub(super) async fn serve(&mut self, service: &Service) -> Result<(), ManagerError> {
        let machine = self.active(service)?;
        self.ensure_running(&machine)?;
        match Attachment::open(&service.name) {
            Ok(_) => Ok(()),
            // Begun by a command that was killed: it is made anew.
            Err(AttachError::Record(RecordError::Unknown(_)) | AttachError::Incomplete(_)) => {
                let spec = Spec {
                    name: service.name.clone(),
                    addresses: service.addresses.clone(),
                    uplinks: service.uplinks.iter().map(|uplink| uplink.as_str().to_owned()).collect(),
                    udp_idle: service.udp_idle,
                    hook: None,
                };
                Attachment::create(&spec, &attachable(&machine), None).await?;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Starts a partition unless it runs.
    pub(crate) fn ensure_running(&mut self, machine: &Machine) -> Result<(), ManagerError> {
        if self.is_running(machine)? {
            return Ok(());
        }
        let mut running = self.start(machine, false)?;
        Self::wait_started(&mut running, machine, self.config.job.boot)
    }

    /// The partition that serves a service as far as the store knows.
    ///
    /// # Errors
    /// [`ManagerError::Unknown`].
    pub fn active(&self, service: &Service) -> Result<Machine, ManagerError> {
        let primary = self.store.primary(&service.name)?;
        self.machine(&primary.map_or_else(|| service.partition.clone(), |primary| primary.partition))
    }

    /// The partition of a service that does not serve: a standby in the making, or the old one.
    ///
    /// # Errors
    /// [`ManagerError::Store`].
    pub fn other(&self, service: &Name) -> Result<Option<Machine>, ManagerError> {
        let rows = self.store.partitions()?;
        let found =
            rows.into_iter().find(|row| row.service.as_ref() == Some(service) && row.role != Role::Active);
        found.map(|row| self.machine(&row.name)).transpose()
    }

    /// Removes a service; its partitions are stopped and stay defined. Not there: nothing to do.
    ///
    /// # Errors
    /// [`ManagerError::Lock`] while a job runs; [`ManagerError::Refused`] while it has two partitions: commit or roll back first.
    pub async fn remove_service(&mut self, name: &Name) -> Result<bool, ManagerError> {
        let Some(service) = self.store.service(name)? else { return Ok(false) };
        let lock = JobLock::acquire(Path::new(RUN_ROOT), name)?;
        if self.other(name)?.is_some() {
            return Err(ManagerError::refused(format!(
                "service {name} still has its old partition; `patchswitch commit {name}` or \
                 `patchswitch rollback {name}` decides which one stays"
            )));
        }
        detach(name).await?;
        let machine = self.active(&service)?;
        self.stop(&machine)?;
        let _ = self.store.remove_service(name)?;
        drop(lock);
        Self::remove_empty_directories();
        Ok(true)
    }
}

/// Detaches a service. Not attached: nothing to do.
pub(super) async fn detach(name: &Name) -> Result<(), ManagerError> {
    match Attachment::detach(name).await {
        Err(AttachError::Record(RecordError::Unknown(_))) => Ok(()),
        other => Ok(other?),
    }
}

/// A partition as the data path wants it.
pub(crate) fn attachable(machine: &Machine) -> Partition {
    Partition {
        netns: NetnsRef::Named(machine.netns()),
        inner_link: INNER_LINK.to_owned(),
        inside: Inside::Owned { own: own(machine).to_vec() },
    }
}

fn own(machine: &Machine) -> &[IpAddr] {
    &machine.definition.own
}

/// The slot in which a partition is, if it is in one.
pub(crate) fn slot_of(attachment: &Attachment, machine: &Machine) -> Option<Slot> {
    let netns = NetnsRef::Named(machine.netns());
    let at =
        attachment.record().slots.iter().position(|slot| slot.as_ref().is_some_and(|s| s.netns == netns));
    at.map(|index| Slot::from_bit(u8::from(index == 1)))
}
