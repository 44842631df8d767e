//! `apply --detach`: the job in a process of its own, which goes on when the terminal is gone.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::Context;
use patchswitch::exit::ExitCode;
use patchswitch::host::linux::programs::{Program, Run};
use patchswitch::manager::{Manager, ManagerError};
use patchswitch::names::{Name, RUN_ROOT};
use patchswitch::store::{Job, JobLock, LockError, STATE_DIR_VARIABLE};
use patchswitch::switchover::log_file;
use serde_json::json;

use super::print;

/// Variables of ours that mean something to the process in the background as well.
const VARIABLES: [&str; 2] = [STATE_DIR_VARIABLE, "PATCHSWITCH_BPF_OBJECT"];
const POLL: Duration = Duration::from_millis(20);

/// Starts ourselves with these arguments and returns as soon as that process has begun a job, or has ended without one.
pub(super) fn start(
    manager: &Manager,
    service: &Name,
    arguments: &[OsString],
    json: bool,
) -> anyhow::Result<ExitCode> {
    if let Some(holder) = JobLock::holder(Path::new(RUN_ROOT), service).map_err(ManagerError::from)? {
        let busy = LockError::Busy { service: service.clone(), holder: Some(holder) };
        return Err(ManagerError::Lock(busy).into());
    }
    let before = last_job(manager, service)?.map(|job| job.id);
    let log = log_file(manager.state(), service);
    let folder = log.parent().unwrap_or(manager.state());
    fs::create_dir_all(folder).with_context(|| format!("failed to make {}", folder.display()))?;
    let file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&log);
    let file = file.with_context(|| format!("failed to write {}", log.display()))?;
    let own = std::env::current_exe().context("failed to find the running program")?;
    let mut run = Run::new(Program::Patchswitch).located(own).args(arguments).output_to(file);
    for name in VARIABLES {
        if let Some(value) = std::env::var_os(name) {
            run = run.env(name, value);
        }
    }
    let mut child = run.spawn()?;
    loop {
        // In this order: a process that has ended begins no job any more.
        let ended = child.try_wait().context("failed to wait for the process in the background")?;
        let job = last_job(manager, service)?.filter(|job| Some(job.id) != before && job.pid == child.id());
        match (job, ended) {
            (Some(job), _) => return started(manager, &job, &child, &log, json),
            (None, Some(status)) => {
                let text = fs::read_to_string(&log).unwrap_or_default();
                let _ = fs::remove_file(&log);
                print::progress(text.trim_end());
                let code =
                    status.code().and_then(|code| u8::try_from(code).ok()).and_then(ExitCode::from_number);
                return Ok(code.unwrap_or(ExitCode::Failed));
            }
            (None, None) => std::thread::sleep(POLL),
        }
    }
}

fn last_job(manager: &Manager, service: &Name) -> anyhow::Result<Option<Job>> {
    Ok(manager.store.jobs(Some(service), 1)?.pop())
}

fn started(manager: &Manager, job: &Job, child: &Child, log: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let kept = log_file(manager.state(), &job.id);
    fs::rename(log, &kept).with_context(|| format!("failed to write {}", kept.display()))?;
    let pid = child.id();
    if json {
        print::json(&json!({"schema": "patchswitch.started/1", "job": job.id, "pid": pid, "log": kept}))?;
    } else {
        print::text(&format!(
            "job {0} goes on in the background, process {pid}\n  watch  patchswitch report {0}, patchswitch status, \
             or tail -f {1}\n  stop   patchswitch rollback {2}, or kill {pid}: both undo it in order",
            job.id,
            kept.display(),
            job.service
        ));
    }
    Ok(ExitCode::Done)
}
