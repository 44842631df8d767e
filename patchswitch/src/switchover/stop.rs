//! Stopping a job that another process works on, in order.

use std::time::{Duration, Instant};

use super::Watcher;
use super::look::{Progress, progress};
use crate::exit::ExitCode;
use crate::host::linux::pidfd::Process;
use crate::manager::{Manager, ManagerError};
use crate::names::Name;
use crate::store::Job;

/// How often is looked whether the job has ended, and whether the wait is still wanted.
const POLL: Duration = Duration::from_millis(200);

/// Asks the process that applies a job to a service to end (`SIGTERM`), waits until the job is over, and returns it as
/// it ended. Before the switch the job is undone, after it the service is given back; a job that retires the old
/// partition or commits already goes on to its end. Nothing is under way, or something other than `apply`: `None`.
///
/// How long it takes depends on the flows that the patched partition has: the service's drain deadline at most.
///
/// # Errors
/// [`ManagerError::Refused`] with [`ExitCode::Interrupted`] if the watcher wants no more; the job is undone all the
/// same. [`ManagerError::Store`], [`ManagerError::Io`].
pub(super) fn stop_job(
    manager: &Manager,
    service: &Name,
    watcher: Watcher<'_>,
) -> Result<Option<Job>, ManagerError> {
    let Some(job) = manager.store.open_job(service)?.filter(|job| job.kind == "apply") else {
        return Ok(None);
    };
    let failed = |source| ManagerError::io("stop", format!("process {}", job.pid))(source);
    let Some(process) = Process::open(job.pid).map_err(failed)? else { return Ok(None) };
    // Asked only now: the process that is held is the one that has the lock, its number cannot mean another one.
    if job.pid == std::process::id() || progress(&job)? != Progress::Running {
        return Ok(None);
    }
    (watcher.say)(&format!(
        "job {} (process {}) is under way; it is stopped and undone first",
        job.id, job.pid
    ));
    process.terminate().map_err(failed)?;
    loop {
        let ended = process.wait(Instant::now() + POLL).map_err(failed)?;
        let now = manager.store.job(job.id)?.unwrap_or_else(|| job.clone());
        if ended || now.ended_at.is_some() {
            return Ok(Some(now));
        }
        if (watcher.stop)() {
            let message = format!(
                "no longer waited for: job {} is still being undone; `patchswitch status` tells",
                job.id
            );
            return Err(ManagerError::Refused { message, code: ExitCode::Interrupted });
        }
    }
}
