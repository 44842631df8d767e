//! The verbs: a job from its lock to its report. The command line and other programs call these.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::report::ROLLBACK;
use super::rollback::{Kept, kept};
use super::stop::stop_job;
use super::{Context, Options, Plan, Report, SwitchError, cold, commit, plan, rollback, run};
use crate::attachment::{ANNOUNCE_EVERY, Attachment};
use crate::exit::ExitCode;
use crate::manager::{Manager, ManagerError, chain, is_down};
use crate::names::{Name, RUN_ROOT};
use crate::store::{Job, JobLock, NewJob, boot_id};

/// How long a stopped job's process may take to let go of the service after the job has ended.
const TIDY: Duration = Duration::from_secs(10);

/// Who watches a job.
#[derive(Clone, Copy)]
pub struct Watcher<'a> {
    /// Whether the job is wanted no more: it is undone in order then.
    pub stop: &'a (dyn Fn() -> bool + Sync),
    /// Gets one line for each thing that happens.
    pub say: &'a dyn Fn(&str),
}

impl std::fmt::Debug for Watcher<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watcher")
    }
}

/// How a job ended.
#[derive(Debug)]
pub struct Ended {
    /// What it did.
    pub report: Report,
    /// The end of the command.
    pub code: ExitCode,
    /// What failed, what is true now, who serves.
    pub error: Option<SwitchError>,
}

/// Patches a service: the whole story.
///
/// # Errors
/// [`ManagerError`] if the job could not begin; then nothing was changed. How a job ended that did begin is in
/// [`Ended`].
pub async fn apply(
    manager: &mut Manager,
    service: &Name,
    options: &Options,
    watcher: Watcher<'_>,
) -> Result<Ended, ManagerError> {
    let lock = lock(service)?;
    let planned: Plan = plan(manager, service, options)?;
    let mut job = begin(manager, service, "apply", &planned.intent(), options, watcher)?;
    let result = run(&mut job, planned).await;
    if result.is_ok() {
        job.report.outcome = if options.commit { "committed" } else { "switched" }.to_owned();
    }
    end(job, result, lock)
}

/// Gives a service back to its old partition and discards the patched one. A job of the service that another process
/// applies now is stopped first, which undoes it in order.
///
/// # Errors
/// As [`apply`].
pub async fn roll_back(
    manager: &mut Manager,
    service: &Name,
    options: &Options,
    watcher: Watcher<'_>,
) -> Result<Ended, ManagerError> {
    let stopped = stop_job(manager, service, watcher)?;
    let lock = match &stopped {
        // Its process still tidies up.
        Some(_) => JobLock::acquire_within(Path::new(RUN_ROOT), service, TIDY)?,
        None => lock(service)?,
    };
    if let Some(undone) = stopped.filter(Job::was_interrupted)
        && manager.other(service)?.is_none()
    {
        let mut job = begin(manager, service, ROLLBACK, &json!({"stopped": undone.id}), options, watcher)?;
        job.report.outcome = format!("job {} was stopped and undone", undone.id);
        return end(job, Ok(ExitCode::Done), lock);
    }
    if is_down(service)?
        && let Some(ended) = cold::roll_back(manager, service, options.discard_writes, &lock).await?
    {
        return Ok(ended);
    }
    let last = last_switch(manager, service)?;
    let patched = manager.store.last_apply(service)?;
    let mut job = begin(manager, service, ROLLBACK, &json!({}), options, watcher)?;
    let result = rollback(&mut job, last.as_ref().and_then(|last| last.at_switch.as_ref()), patched).await;
    end(job, result, lock)
}

/// Makes the patched partition's clone the disk; the old partition is free then.
///
/// # Errors
/// As [`apply`].
pub async fn make_permanent(
    manager: &mut Manager,
    service: &Name,
    options: &Options,
    watcher: Watcher<'_>,
) -> Result<Ended, ManagerError> {
    let lock = lock(service)?;
    let last = last_switch(manager, service)?;
    let mut job = begin(manager, service, "commit", &json!({}), options, watcher)?;
    let result = commit(&mut job, last.as_ref().and_then(|last| last.lost_by_switch.as_ref())).await;
    let serving = super::undo::serving(&job).unwrap_or_else(|| job.service.partition.clone());
    let result = result.map_err(|failure| {
        let code = failure.code;
        let next =
            if job.unfinished { "; the merge is not done: `patchswitch up` goes on with it" } else { "" };
        super::undo::error(failure, format!("{serving} serves{next}"), serving, code)
    });
    if result.is_ok() {
        job.report.outcome = "committed".to_owned();
    }
    end(job, result, lock)
}

fn lock(service: &Name) -> Result<JobLock, ManagerError> {
    Ok(JobLock::acquire(Path::new(RUN_ROOT), service)?)
}

fn begin<'a>(
    manager: &'a mut Manager,
    service: &Name,
    kind: &'static str,
    plan: &Value,
    options: &Options,
    watcher: Watcher<'a>,
) -> Result<Context<'a>, ManagerError> {
    let settings = manager.service(service)?;
    let attachment = Attachment::open(service)?;
    let boot = boot_id().map_err(ManagerError::io("read", "/proc/sys/kernel/random/boot_id"))?;
    let job = manager.store.begin_job(&NewJob { service, kind, plan, boot_id: &boot })?;
    Ok(Context {
        report: Report::new(job, kind, service),
        manager,
        service: settings,
        watching: attachment.watch_neighbours(ANNOUNCE_EVERY),
        attachment,
        job,
        options: options.clone(),
        watched: Vec::new(),
        unfinished: false,
        stop: watcher.stop,
        say: watcher.say,
    })
}

fn end(
    mut job: Context<'_>,
    result: Result<ExitCode, SwitchError>,
    _lock: JobLock,
) -> Result<Ended, ManagerError> {
    let (code, error) = match result {
        Ok(code) => (code, None),
        Err(error) => (error.code, Some(error)),
    };
    job.report.exit_code = code.number();
    job.report.error = error.as_ref().map(ToString::to_string);
    let saved = job.report.save(job.manager.state());
    let message = job.report.error.clone().unwrap_or_else(|| job.report.outcome.clone());
    if !job.unfinished {
        let _ = job.manager.store.end_job(job.job, code, &message)?;
    }
    match (saved, &error) {
        (Err(lost), None) => return Err(lost),
        // What the job came to is worth more than its figures.
        (Err(lost), Some(_)) => tracing::warn!("{}", chain(&lost)),
        (Ok(()), _) => {}
    }
    Ok(Ended { report: job.report, code, error })
}

/// What the last job that switched has kept for a rollback or a commit.
fn last_switch(manager: &Manager, service: &Name) -> Result<Option<Kept>, ManagerError> {
    match manager.store.last_apply(service)? {
        None => Ok(None),
        Some(job) => kept(manager.state(), job),
    }
}
