//! A rollback when nobody serves and the patched side cannot be started, after a boot for instance: the old side, whose disks
//! are as they were at the cut, is started instead.
//!
//! ```text
//!  the patched side ─► the old one starts, ─► who serves is written down ─► the patched side ─► up
//!  does not start      for a look             (with the disks that go over)     is discarded
//!                        └ it does not start either: nothing has changed
//! ```
//!
//! No flow is there that could be cut, and nothing that could be counted: what the patched side has written since the switch is
//! lost, but for disks that go over, which go back as they are.

use serde_json::json;

use super::context::{Failure, Phase};
use super::quiesce;
use super::report::{ROLLBACK, Report};
use super::undo;
use super::verbs::Ended;
use crate::config::Service;
use crate::exit::ExitCode;
use crate::manager::{Machine, Manager, ManagerError, chain};
use crate::names::Name;
use crate::store::{JobId, JobLock, NewJob, StepState, boot_id};

/// Rolls back; nothing if the service is there by now, or has no old side, and is rolled back as ever.
///
/// # Errors
/// Why the patched side does not start, if there is no way back, or none without a word.
pub(super) async fn roll_back(
    manager: &mut Manager,
    service: &Name,
    discard_writes: bool,
    _lock: &JobLock,
) -> Result<Option<Ended>, ManagerError> {
    let settings = manager.service(service)?;
    let Some(old) = manager.other(service)?.filter(|old| !old.is_clone()) else { return Ok(None) };
    if let Some(job) = manager.store.open_job(service)? {
        return Err(ManagerError::refused(format!(
            "job {} of service {service} is not over; `patchswitch up` goes on with it",
            job.id
        )));
    }
    let new = manager.active(&settings)?;
    let Err(why) = manager.ensure_running(&new) else {
        // Whatever else is in the way would be in the other one's as well.
        let _ = manager.serve(&settings).await?;
        return Ok(None);
    };
    if !discard_writes {
        let message = format!(
            "{} does not start ({}), so what it has written since the switch is not known; `patchswitch rollback {service} \
             --discard-writes` starts {} instead",
            new.name(),
            chain(&why),
            old.name()
        );
        return Err(ManagerError::Refused { message, code: ExitCode::WritesLost });
    }
    look_at(manager, (&new, &old), &why)?;
    let boot = boot_id().map_err(ManagerError::io("read", "/proc/sys/kernel/random/boot_id"))?;
    let plan = json!({"cold": chain(&why)});
    let job = manager.store.begin_job(&NewJob { service, kind: ROLLBACK, plan: &plan, boot_id: &boot })?;
    let mut report = Report::new(job, ROLLBACK, service);
    (report.from, report.to) = (Some(new.name().clone()), Some(old.name().clone()));
    let done = back(manager, &settings, job, (&new, &old)).await;
    end(manager, &settings, report, done).map(Some)
}

/// That the old side does start, before anything is given up for it.
fn look_at(
    manager: &mut Manager,
    (new, old): (&Machine, &Machine),
    why: &ManagerError,
) -> Result<(), ManagerError> {
    manager.stop(new)?;
    let started = manager.ensure_running(old);
    manager.stop(old)?;
    started.map_err(|error| {
        ManagerError::refused(format!(
            "neither {} starts ({}) nor {} ({}); nothing was changed",
            new.name(),
            chain(why),
            old.name(),
            chain(&error)
        ))
    })
}

/// From the record on the old side is the one that serves, whoever starts it.
async fn back(
    manager: &mut Manager,
    settings: &Service,
    job: JobId,
    (new, old): (&Machine, &Machine),
) -> Result<(), ManagerError> {
    let step = manager.store.intend(job, Phase::GiveBack.name(), &json!({"to": old.name()}))?;
    if quiesce::commands(settings).is_some() {
        let _ = manager.move_disks(&settings.name, new, old, None)?;
    } else {
        let generation = manager.next_generation(&settings.name)?;
        let _ = manager.store.record_switch(&settings.name, old.name(), generation)?;
    }
    if let Some(patched) = manager.store.last_apply(&settings.name)? {
        let _ = manager.store.unset_applied(patched)?;
    }
    let new = manager.machine(new.name())?;
    manager.discard(&new)?;
    let _ = manager.serve(settings).await?;
    let _ = manager.store.conclude(step, StepState::Done, &json!({}))?;
    Ok(())
}

fn end(
    manager: &mut Manager,
    settings: &Service,
    mut report: Report,
    done: Result<(), ManagerError>,
) -> Result<Ended, ManagerError> {
    // Of what was lost nothing is known.
    let (code, error) = match done {
        Ok(()) => {
            report.outcome = "rolled_back".to_owned();
            (ExitCode::WritesLost, None)
        }
        Err(error) => {
            report.outcome = "failed".to_owned();
            let failure =
                Failure { phase: Phase::GiveBack, reason: chain(&error), code: ExitCode::GiveBackFailed };
            let serving = manager.active(settings)?.name().clone();
            let now = format!("nobody serves, and {serving} is to; `patchswitch up` goes on with it");
            (ExitCode::GiveBackFailed, Some(undo::error(failure, now, serving, ExitCode::GiveBackFailed)))
        }
    };
    report.exit_code = code.number();
    report.error = error.as_ref().map(ToString::to_string);
    report.save(manager.state())?;
    if error.is_none() {
        let _ = manager.store.end_job(report.job, code, &report.outcome)?;
    }
    Ok(Ended { report, code, error })
}
