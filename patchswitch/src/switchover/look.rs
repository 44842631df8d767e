//! Jobs as they are now, running or over: what `status` and `report` show. Changes nothing and waits for nobody.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::Report;
use crate::host::linux::dm::DmError;
use crate::manager::{Manager, ManagerError};
use crate::names::{Name, RUN_ROOT};
use crate::storage::StorageError;
use crate::storage::cow::{self, Watch};
use crate::storage::snapshot::CloneOf;
use crate::store::{Job, JobId, JobLock, Step, Store, boot_id};

/// Whether a job is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// Its process works on it.
    Running,
    /// Its process is gone, or the host was booted since; `patchswitch up` ends it.
    Interrupted,
    /// It has ended.
    Over,
}

/// A job and everything that is written down of it.
#[derive(Clone, Debug, Serialize)]
pub struct JobView {
    /// The job.
    pub job: Job,
    /// Whether it is over.
    pub progress: Progress,
    /// Its steps so far.
    pub steps: Vec<Step>,
    /// Its [`Report`] as it was kept at its end.
    pub report: Option<Value>,
    /// What a job that was started in the background says.
    pub log: Option<PathBuf>,
}

/// One job, or the last one.
///
/// # Errors
/// [`ManagerError::Store`], [`ManagerError::Io`].
pub fn job(manager: &Manager, id: Option<JobId>) -> Result<Option<JobView>, ManagerError> {
    let found = match id {
        Some(id) => manager.store.job(id)?,
        None => manager.store.jobs(None, 1)?.pop(),
    };
    found.map(|job| view(&manager.store, manager.state(), job)).transpose()
}

/// The jobs that are not over, of one service or of all.
///
/// # Errors
/// As [`job`].
pub fn open_jobs(store: &Store, state: &Path, service: Option<&Name>) -> Result<Vec<JobView>, ManagerError> {
    let jobs = store.open_jobs()?.into_iter();
    let jobs = jobs.filter(|job| service.is_none_or(|service| *service == job.service));
    jobs.map(|job| view(store, state, job)).collect()
}

fn view(store: &Store, state: &Path, job: Job) -> Result<JobView, ManagerError> {
    let steps = store.steps(job.id)?;
    let path = Report::path(state, job.id);
    let report = match std::fs::read(&path) {
        Ok(text) => {
            serde_json::from_slice(&text).map_err(|error| ManagerError::io("read", path)(error.into()))?
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(ManagerError::io("read", path)(error)),
    };
    let log = Some(log_file(state, &job.id)).filter(|path| path.exists());
    Ok(JobView { progress: progress(&job)?, job, steps, report, log })
}

/// How full the store of a clone is that can fill up. After the end of its job nobody watches it; it is made so large then that it
/// cannot, if the host has the room. Otherwise whoever lets the clone serve for long looks here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Room {
    /// The service that has the clone.
    pub service: Name,
    /// The partition that the clone belongs to.
    pub partition: Name,
    /// The device-mapper name of the clone.
    pub clone: String,
    /// How full the store is, in percent, rounded down; nothing: it was full, and the clone is lost.
    pub percent: Option<u8>,
    /// Whether a job would turn back now.
    pub scarce: bool,
}

/// The clones that can run out of room and are in the kernel now, of one service or of all.
///
/// # Errors
/// [`ManagerError::Store`], [`ManagerError::Storage`].
pub fn rooms(store: &Store, service: Option<&Name>) -> Result<Vec<Room>, ManagerError> {
    let mut rooms = Vec::new();
    for row in store.partitions()? {
        let Some(of) = row.service.filter(|of| service.is_none_or(|service| service == of)) else { continue };
        for disk in store.disks(&row.name)? {
            let read = |error: serde_json::Error| ManagerError::io("read", "state.db")(error.into());
            let Some(clone) = disk.cow.map(serde_json::from_value::<CloneOf>).transpose().map_err(read)?
            else {
                continue;
            };
            let (percent, scarce) = match room(&clone)? {
                None | Some(Watch::Ample) => continue,
                Some(Watch::Below { percent }) => (Some(percent), false),
                Some(Watch::TurnBack { percent }) => (Some(percent), true),
                Some(Watch::Full | Watch::Lost) => (None, true),
            };
            let (service, partition) = (of.clone(), row.name.clone());
            rooms.push(Room { service, partition, clone: clone.clone, percent, scarce });
        }
    }
    Ok(rooms)
}

/// Nothing if the clone is not in the kernel, or is the disk already.
fn room(clone: &CloneOf) -> Result<Option<Watch>, ManagerError> {
    match cow::status(&Manager::dm()?, &clone.clone) {
        Ok(status) => Ok(Some(cow::watch(status, clone.sectors, cow::HIGH_WATER))),
        Err(StorageError::Dm(DmError::NoDevice(_)) | StorageError::OtherTable { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Where a job that was started in the background says what it does; of a service: until the job has a number.
pub fn log_file(state: &Path, of: &impl std::fmt::Display) -> PathBuf {
    state.join("logs").join(format!("{of}.log"))
}

/// Whether a job is over; who works on it is asked from the kernel.
pub(super) fn progress(job: &Job) -> Result<Progress, ManagerError> {
    if job.ended_at.is_some() {
        return Ok(Progress::Over);
    }
    let boot = boot_id().map_err(ManagerError::io("read", "/proc/sys/kernel/random/boot_id"))?;
    let holder = JobLock::holder(Path::new(RUN_ROOT), &job.service)?;
    let works = boot == job.boot_id && holder.is_some_and(|holder| holder.pid == job.pid);
    Ok(if works { Progress::Running } else { Progress::Interrupted })
}
