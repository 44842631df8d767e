//! A service address gets its partition and its data path, and loses them.

use std::net::IpAddr;
use std::path::Path;

use patchswitch_common::Slot;

use super::{Machine, Manager, ManagerError, chain};
use crate::attachment::{
    ANNOUNCE_AGAIN, AttachError, Attachment, Gone, Inside, Partition, Record, RecordError, Spec,
};
use crate::config::{Service, Strategy};
use crate::dataplane::DataplaneError;
use crate::host::linux::netns::NetnsRef;
use crate::names::{Name, RUN_ROOT};
use crate::store::{JobLock, Role};

/// The only link inside a partition of ours.
const INNER_LINK: &str = "eth0";

impl Manager {
    /// Adds a service: its partition is started if it does not run, and gets the addresses. Added already: its
    /// settings are renewed, and whatever of it is missing is made; for other addresses or uplinks it is attached anew,
    /// which connections outlive only by luck. Returns what was done to a service that was there.
    ///
    /// # Errors
    /// [`ManagerError::Lock`] while a job runs; [`ManagerError::Refused`] if addresses or uplinks are to change while
    /// there is an old partition, or cannot. A service that was not there before is not there afterwards, one that was
    /// is served as before.
    pub async fn add_service(&mut self, name: &Name) -> Result<Vec<String>, ManagerError> {
        let found = self.config.services.iter().find(|service| &service.name == name).cloned();
        let service = found.ok_or_else(|| {
            ManagerError::refused(format!("the configuration has no [[service]] with name = \"{name}\""))
        })?;
        let _lock = JobLock::acquire(Path::new(RUN_ROOT), name)?;
        let done = match self.store.service(name)? {
            Some(old) => self.change_service(&old, &service).await,
            None => self.begin_service(&service).await.map(|()| Vec::new()),
        };
        self.announce_again().await;
        done
    }

    async fn begin_service(&mut self, service: &Service) -> Result<(), ManagerError> {
        let machine = self.machine(&service.partition)?;
        let ran = self.is_running(&machine)?;
        let _ = self.store.put_service(service)?;
        let Err(cause) = self.serve(service).await else { return Ok(()) };
        let _ = self.store.remove_service(&service.name)?;
        if !ran && let Err(second) = self.stop(&machine) {
            tracing::warn!(partition = %machine.name(), "failed to clean up: {}", chain(&second));
        }
        Err(cause)
    }

    /// Clients feel it if a service is attached anew, so that is done only if nothing speaks against it, and the old
    /// settings are brought back if it fails all the same.
    async fn change_service(&mut self, old: &Service, new: &Service) -> Result<Vec<String>, ManagerError> {
        let name = &new.name;
        let kind = |service: &Service| matches!(service.strategy, Strategy::Quiesce(_));
        if kind(old) != kind(new)
            && let Some(other) = self.other(name)?
        {
            return Err(ManagerError::refused(format!(
                "service {name} still has {}, so its strategy stays as it is; nothing was changed; `patchswitch commit \
                 {name}` or `patchswitch rollback {name}` first",
                other.name()
            )));
        }
        let spec = spec(new);
        let attached_otherwise = match Record::load(name) {
            Err(RecordError::Unknown(_)) => false,
            record => !record.map_err(AttachError::from)?.is_of(&spec),
        };
        if !attached_otherwise {
            let _ = self.store.put_service(new)?;
            let served = self.serve(new).await;
            if served.is_err() {
                let _ = self.store.put_service(old)?;
            }
            return served;
        }
        if let Some(other) = self.other(name)? {
            return Err(ManagerError::refused(format!(
                "service {name} still has {}, so its addresses and uplinks stay as they are; nothing was changed; \
                 `patchswitch commit {name}` or `patchswitch rollback {name}` first",
                other.name()
            )));
        }
        Attachment::check(&spec, &attachable(&self.active(old)?)).await?;
        let _ = self.store.put_service(new)?;
        let cause = match self.serve(new).await {
            Err(cause) => cause,
            done => return done,
        };
        let _ = self.store.put_service(old)?;
        let now = match self.serve(old).await {
            Ok(_) => "it is served as before".to_owned(),
            Err(second) => format!("it is not served ({}): `patchswitch up` tries again", chain(&second)),
        };
        let message = format!("failed to change service {name}: {}; {now}", chain(&cause));
        Err(ManagerError::Refused { message, code: cause.exit_code() })
    }

    /// Makes the partition of a service that serves run and serve, and returns what had to be mended of what was there.
    pub(crate) async fn serve(&mut self, service: &Service) -> Result<Vec<String>, ManagerError> {
        let attachment = usable(&service.name)?;
        if attachment.as_ref().is_some_and(|attachment| !attachment.record().of_service) {
            return Err(ManagerError::refused(format!(
                "{0} was attached by hand under the name of the service; nothing was changed there; `patchswitch detach \
                 {0}` makes room",
                service.name
            )));
        }
        let machine = match &attachment {
            Some(attachment) => self.follow(service, attachment)?,
            None => None,
        };
        let machine = match machine {
            Some(machine) => machine,
            None => self.active(service)?,
        };
        self.ensure_running(&machine)?;
        let mut mended = Vec::new();
        if let Some(mut attachment) = attachment {
            mended.extend(renewed(&mut attachment, &machine).await?);
            let Some(reason) = self.outdated(&attachment, service, &machine).await? else {
                mended.extend(attachment.reassert().await?);
                // Last: if it is, all else is well, and whoever goes back to other settings need not take it back.
                if attachment.set_datagrams(service.udp_idle, &service.datagrams)? {
                    mended.push("how its datagrams are told apart was changed".to_owned());
                }
                return Ok(mended);
            };
            mended.push(format!("it was attached anew: {reason}"));
        }
        detach(&service.name).await?;
        Attachment::create(&spec(service), &attachable(&machine), None).await?;
        self.announced.push(service.name.clone());
        Ok(mended)
    }

    /// Announces the addresses of services that were attached a second time, for all of them at once.
    pub(super) async fn announce_again(&mut self) {
        let names = std::mem::take(&mut self.announced);
        if names.is_empty() {
            return;
        }
        tokio::time::sleep(ANNOUNCE_AGAIN).await;
        for name in names {
            // Whoever took it away meanwhile has nothing to announce.
            if let Ok(attachment) = Attachment::open(&name) {
                attachment.announce().await;
            }
        }
    }

    /// Why an attachment is of no use for a service, if it is not.
    async fn outdated(
        &self,
        attachment: &Attachment,
        service: &Service,
        machine: &Machine,
    ) -> Result<Option<&'static str>, ManagerError> {
        if !attachment.record().ready {
            return Ok(Some("its partition could not get a new link"));
        }
        if slot_of(attachment, machine) != Some(attachment.plane().word().active()) {
            return Ok(Some("another partition has its disk"));
        }
        if !attachment.record().is_of(&spec(service)) && self.other(&service.name)?.is_none() {
            return Ok(Some("its addresses or uplinks have changed"));
        }
        if attachment.has_other_uplinks().await? {
            return Ok(Some("one of its uplinks is another device now"));
        }
        Ok(None)
    }

    /// Makes the store follow the phase word, and returns who serves by it.
    pub(super) fn follow(
        &mut self,
        service: &Service,
        attachment: &Attachment,
    ) -> Result<Option<Machine>, ManagerError> {
        let Some(serving) = self.machine_in(attachment, attachment.plane().word().active())? else {
            return Ok(None);
        };
        if matches!(service.strategy, Strategy::Quiesce(_)) {
            // Who has the disk serves, and that is in the store alone.
            return self.active(service).map(Some);
        }
        if self.store.primary(&service.name)?.is_none_or(|primary| primary.partition != *serving.name()) {
            let generation = self.next_generation(&service.name)?;
            let _ = self.store.record_switch(&service.name, serving.name(), generation)?;
        }
        Ok(Some(serving))
    }

    fn machine_in(&self, attachment: &Attachment, slot: Slot) -> Result<Option<Machine>, ManagerError> {
        let Some(entry) = &attachment.record().slots[slot as usize] else { return Ok(None) };
        let netns = entry.netns.to_string();
        let row = self.store.partitions()?.into_iter().find(|row| crate::names::netns(&row.name) == netns);
        row.map(|row| self.machine(&row.name)).transpose()
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
        let lock = JobLock::acquire(Path::new(RUN_ROOT), name)?;
        // Read when nobody can change it any more.
        let Some(service) = self.store.service(name)? else {
            let removed = Self::remove_remains(name).await;
            drop(lock);
            Self::remove_empty_directories();
            return removed;
        };
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

    /// Detaches what a service has left that the store does not know any more; whether there was something.
    async fn remove_remains(name: &Name) -> Result<bool, ManagerError> {
        if !Record::load(name).is_ok_and(|record| record.of_service) {
            return Ok(false);
        }
        detach(name).await.map(|()| true)
    }
}

/// Gives the partition that serves a new link if its own is gone, with its namespace or without; what was done. If that
/// was begun and cannot be, the attachment is not ready any more.
async fn renewed(attachment: &mut Attachment, machine: &Machine) -> Result<Option<String>, ManagerError> {
    let active = attachment.plane().word().active();
    let what = match attachment.record().gone(active) {
        Some(gone) => gone,
        None if attachment.is_current(active)? => return Ok(None),
        None => Gone::Namespace,
    };
    match attachment.renew(active, &attachable(machine)).await {
        Ok(()) => Ok(Some(format!("{} got a new {}", machine.name(), what.name()))),
        Err(error) => {
            tracing::warn!(partition = %machine.name(), "failed to give it a new {}: {}", what.name(), chain(&error));
            Ok(None)
        }
    }
}

/// What the data path is to be for a service.
fn spec(service: &Service) -> Spec {
    Spec {
        name: service.name.clone(),
        addresses: service.addresses.clone(),
        uplinks: service.uplinks.iter().map(|uplink| uplink.as_str().to_owned()).collect(),
        udp_idle: service.udp_idle,
        datagrams: service.datagrams.clone(),
        hook: None,
        of_service: true,
        own_uplinks: matches!(service.strategy, Strategy::Address(_)),
        with: None,
    }
}

/// The attachment of a service, if it is one that packets can pass: one that is not there, that was begun by a command
/// that was killed, or whose programs somebody removed, is none and is made anew by [`Manager::serve`].
pub(super) fn usable(name: &Name) -> Result<Option<Attachment>, ManagerError> {
    match Attachment::open(name) {
        Ok(attachment) => Ok(Some(attachment)),
        Err(
            AttachError::Record(RecordError::Unknown(_))
            | AttachError::Incomplete(_)
            | AttachError::Dataplane(DataplaneError::NotAttached(_)),
        ) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether nothing of a service is in the kernel that packets could pass.
pub(crate) fn is_down(name: &Name) -> Result<bool, ManagerError> {
    Ok(usable(name)?.is_none())
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
