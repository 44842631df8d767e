//! Jobs as they are now, running or over: what `status` and `report` show. Changes nothing and waits for nobody.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::Report;
use crate::manager::{Manager, ManagerError};
use crate::names::{Name, RUN_ROOT};
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
