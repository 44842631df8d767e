//! What would be done: who serves, which standby is taken, which patches are applied (patent step 701).

use serde::Serialize;
use serde_json::json;

use super::clone::clones;
use crate::attachment::{SwitchOptions, View};
use crate::config::{Service, Strategy};
use crate::exit::ExitCode;
use crate::host::linux::filesystem::signatures;
use crate::host::linux::tap::Tap;
use crate::manager::{Machine, MachineDisk, Manager, ManagerError};
use crate::names::{self, Name};
use crate::partition::resources::find_standby;
use crate::partition::spec::{Disk, Policy};
use crate::patch::table;
use crate::storage::cow;
use crate::storage::disk::Backing;
use crate::storage::snapshot::CloneOf;
use crate::store::{Patch, Role};

/// What the caller wants.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Patches by number or name; empty: all that are approved and were not applied yet.
    pub patches: Vec<String>,
    /// Make the clone the disk at the end.
    pub commit: bool,
    /// Go on although writes outside `may_lose` are left behind.
    pub discard_writes: bool,
    /// Switch without the notice: replies that the old partition sends with its own address stay as they are, and
    /// clients of unconnected UDP sockets do not hear them. Only to show what the rewrite is good for.
    pub without_notice: bool,
}

/// A job that can be run.
#[derive(Debug)]
pub struct Plan {
    pub(super) active: Machine,
    pub(super) standby: Machine,
    pub(super) patches: Vec<Patch>,
    strategy: Strategy,
}

/// A plan, for people and programs.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// The partition that serves.
    pub active: Name,
    /// The standby that is taken.
    pub standby: Name,
    /// How the service goes over: the name of its strategy.
    pub strategy: &'static str,
    /// For how long new flows may wait for that, in seconds, if they do.
    pub hold_s: Option<f64>,
    /// The patches, in the order in which they are applied.
    pub patches: Vec<String>,
    /// What the clone's store has, in bytes, and what it needs.
    pub store_bytes: u64,
    /// As above.
    pub store_needed_bytes: u64,
}

/// Finds out what would be done. Changes nothing.
///
/// # Errors
/// [`ManagerError::NoStandby`], [`ManagerError::Refused`] if there is nothing to apply or the last job was not
/// committed.
pub fn plan(manager: &Manager, service: &Name, options: &Options) -> Result<Plan, ManagerError> {
    let settings = manager.service(service)?;
    let active = manager.active(&settings)?;
    if let Some(old) = manager.other(service)? {
        return Err(ManagerError::refused(format!(
            "service {service} still has {} of the last job; `patchswitch commit {service}` or \
             `patchswitch rollback {service}` decides which one stays",
            old.name()
        )));
    }
    check_disks(&settings, &active)?;
    check_kernel(&settings, &active)?;
    let patches = patches(manager, service, options)?;
    let standby = standby(manager, &active)?;
    check_stores(&active, &standby)?;
    // What would be refused in the end. A service that is not attached is attached first.
    if let Ok(view) = View::open(service) {
        let letter = settings.strategy == Strategy::Letter;
        view.check_switch(SwitchOptions { letter, ..SwitchOptions::default() })?;
    }
    Ok(Plan { active, standby, patches, strategy: settings.strategy })
}

/// A disk with one writer goes over only while that is quiesced, and what is quiesced has something to give over.
fn check_disks(service: &Service, active: &Machine) -> Result<(), ManagerError> {
    let names = |(disk, _): (&Disk, _)| disk.name.to_string();
    let (itself, at_all) = (active.moving_itself().map(names).next(), active.moving().map(names).next());
    let message = match (&service.strategy, itself, at_all) {
        (Strategy::Quiesce(_), _, Some(_)) => return Ok(()),
        (_, Some(first), _) => format!(
            "disk {first} of {} has one writer at a time (:move), and service {} is taken over while both sides run; set \
             strategy = \"quiesce\", with its commands",
            active.name(),
            service.name
        ),
        (Strategy::Quiesce(_), ..) => format!(
            "service {} is quiesced (strategy = \"quiesce\"), and no disk of {} moves (--disk NAME:SIZE:MOUNT:move, or :log or \
             :mirror)",
            service.name,
            active.name()
        ),
        _ => return Ok(()),
    };
    Err(ManagerError::Refused { message, code: ExitCode::Config })
}

/// What the old partition keeps of a disk that goes over must not run full: it is the way back. A whole copy needs the room of a
/// whole disk, and nobody must have come to use a device since.
fn check_stores(active: &Machine, standby: &Machine) -> Result<(), ManagerError> {
    let device = |(_, disk): (&Disk, &MachineDisk)| names::dm_disk(active.name(), &disk.name);
    let moving: Vec<String> = active.moving_itself().map(device).collect();
    let copied: Vec<String> = active.copied().map(device).collect();
    let refuse = |of: &CloneOf, why: &str| {
        let (standby, disk) = (standby.name(), &of.active);
        let message =
            format!("the store of partition {standby} for {disk} {why}; define a standby without --store");
        Err(ManagerError::Refused { message, code: ExitCode::Config })
    };
    for clone in clones(active, standby)? {
        if clone.watched && moving.contains(&clone.active) {
            return refuse(&clone, "can fill up, which that of a disk that moves must not");
        }
        let is_copied = copied.contains(&clone.active);
        if is_copied && clone.cow.sectors()? < clone.sectors {
            return refuse(&clone, "is smaller than the disk, of which it is to be a whole copy");
        }
        if (is_copied || !clone.watched) && clone.cow.missing()? > 0 {
            return refuse(&clone, "has holes, for which the host had no room (`fallocate` fills them)");
        }
        if let Backing::Device(path) = &clone.cow
            && let [found, ..] = signatures(path)?.as_slice()
        {
            return refuse(&clone, &format!("has {found} on it (`wipefs --all` if nobody wants that)"));
        }
    }
    Ok(())
}

/// The kernel has what strategy and policies of disks need. Otherwise it would be found only in the middle of a job.
fn check_kernel(service: &Service, active: &Machine) -> Result<(), ManagerError> {
    if service.strategy.hold().is_some() && !Tap::are_there() {
        let message = format!(
            "with strategy = \"{}\" new flows of service {} wait in the queue of a TAP device, which this kernel does not have \
             (`modprobe tun`)",
            service.strategy.name(),
            service.name
        );
        return Err(ManagerError::Refused { message, code: ExitCode::Unavailable });
    }
    for (disk, _) in active.copied() {
        let (target, module) = match disk.policy {
            Policy::Log => ("log-writes", "dm_log_writes"),
            _ => ("mirror", "dm_mirror"),
        };
        if Manager::dm()?.target_version(target)?.is_none() {
            let message = format!(
                "disk {} of {} is to be copied by device-mapper's target {target}, which this kernel does not have (`modprobe \
                 {module}`)",
                disk.name,
                active.name()
            );
            return Err(ManagerError::Refused { message, code: ExitCode::Unavailable });
        }
    }
    Ok(())
}

fn patches(manager: &Manager, service: &Name, options: &Options) -> Result<Vec<Patch>, ManagerError> {
    let chosen = table::select(&manager.store, service, &options.patches)?;
    if chosen.is_empty() {
        return Err(ManagerError::Refused {
            message: "no patch is approved and not yet applied; `patchswitch patch list` shows all, \
                      `patchswitch patch approve ID` approves one"
                .to_owned(),
            code: ExitCode::Nothing,
        });
    }
    // Also found when it is copied into the clone; here nothing has been done yet.
    for patch in &chosen {
        table::verify(manager.state(), patch)?;
    }
    Ok(chosen)
}

fn standby(manager: &Manager, active: &Machine) -> Result<Machine, ManagerError> {
    let rows = manager.store.partitions()?;
    let free = rows.into_iter().filter(|row| row.role == Role::Standby && row.service.is_none());
    let mut free = free.map(|row| manager.machine(&row.name)).collect::<Result<Vec<_>, _>>()?;
    // One with a root of its own is somebody's, whether a service has it or not.
    free.retain(|machine| machine.definition.is_store);
    let resources: Vec<_> = free.iter().map(|machine| (machine.name(), machine.spec().resources())).collect();
    let candidates: Vec<_> = resources.iter().map(|(name, resources)| (*name, resources)).collect();
    let chosen = find_standby((active.name(), &active.spec().resources()), &candidates)?.clone();
    manager.machine(&chosen)
}

impl Plan {
    /// The plan in words and numbers.
    pub fn summary(&self) -> Summary {
        let needed = |disk: &crate::manager::MachineDisk| cow::cow_sectors(disk.sectors) * 512;
        Summary {
            active: self.active.name().clone(),
            standby: self.standby.name().clone(),
            strategy: self.strategy.name(),
            hold_s: self.strategy.hold().map(|hold| hold.as_secs_f64()),
            patches: self.patches.iter().map(|patch| patch.file.to_string()).collect(),
            store_bytes: self.standby.disks.iter().map(|disk| disk.sectors * 512).sum(),
            store_needed_bytes: self.active.disks.iter().map(needed).sum(),
        }
    }

    /// What the journal keeps of it.
    pub fn intent(&self) -> serde_json::Value {
        json!(self.summary())
    }
}
