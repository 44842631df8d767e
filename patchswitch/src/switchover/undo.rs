//! What is done when a job does not go on: before the switch everything of the standby is taken away.

use std::time::SystemTime;

use patchswitch_common::Slot;
use patchswitch_common::word::Phase as WordPhase;

use super::context::{Failure, SwitchError};
use super::quiesce::commands;
use super::report::AtSwitch;
use super::{Context, Loss, stores};
use crate::config::Service;
use crate::exit::ExitCode;
use crate::manager::{Machine, Manager, ManagerError, chain, slot_of};
use crate::names::Name;
use crate::storage::meter::{self, Limits, Mark, MayLose, changed_since};

/// Takes everything of the standby away, whatever of it is there: processes, network, mounts, the clone, the lease.
///
/// One function for undo, give-back, rollback and recovery.
pub(crate) async fn discard(job: &mut Context<'_>) -> Result<(), ManagerError> {
    let Some(standby) = job.manager.other(&job.service.name)? else { return Ok(()) };
    let word = job.attachment.plane().word();
    if word.phase() == WordPhase::Steady && (word.learns() || word.notice()) {
        job.attachment.settle()?;
    }
    if let Some(slot) = slot_of(&job.attachment, &standby) {
        job.attachment.leave(slot).await?;
    }
    job.manager.discard(&standby)
}

/// Stops a partition that was started to serve and does not; its disks stay.
pub(super) async fn put_down(
    job: &mut Context<'_>,
    machine: &Machine,
    slot: Slot,
) -> Result<(), ManagerError> {
    let word = job.attachment.plane().word();
    if word.phase() == WordPhase::Steady && (word.learns() || word.notice()) {
        job.attachment.settle()?;
    }
    job.attachment.leave(slot).await?;
    job.manager.stop(machine)
}

/// After a failure before the switch: undone, and told.
pub(super) async fn after(job: &mut Context<'_>, failure: Failure) -> SwitchError {
    let holds = !job.service.strategy.is_shared();
    if holds && failure.code == ExitCode::GiveBackFailed {
        // Whoever has what went over is to serve, and perhaps nobody does.
        job.unfinished = true;
        job.report.outcome = "failed".to_owned();
        let serving = serving(job).unwrap_or_else(|| job.service.partition.clone());
        let now = "perhaps nobody serves; `patchswitch up` goes on with it".to_owned();
        let code = failure.code;
        return error(failure, now, serving, code);
    }
    let patched = job.report.to.clone();
    if patched.is_some() && serving(job) == patched {
        // The store was made before something that belongs to it failed.
        return serving_anyway(job, failure);
    }
    // New flows waited for what it was to give away.
    let again = holds && job.report.at_switch.is_some();
    let how = if again { "again" } else { "it was not touched" };
    let undone = discard(job).await;
    let serving = serving(job).unwrap_or_else(|| job.service.partition.clone());
    job.report.outcome = "failed".to_owned();
    match undone {
        Ok(()) => {
            let code = failure.code;
            error(failure, format!("{serving} serves, {how}; the clone was discarded"), serving, code)
        }
        Err(second) => {
            job.unfinished = true;
            let now = format!(
                "{serving} serves, {how}; the clone could not be discarded: {}; `patchswitch up` tries \
                 again",
                chain(&second)
            );
            let code = failure.code;
            error(failure, now, serving, code)
        }
    }
}

/// After a failure that leaves the new partition serving.
pub(super) fn serving_anyway(job: &mut Context<'_>, failure: Failure) -> SwitchError {
    let serving = serving(job).unwrap_or_else(|| job.service.partition.clone());
    job.report.outcome = "switched".to_owned();
    let service = &job.service.name;
    if !job.unfinished {
        // Whoever has watched its stores goes.
        match job.manager.active(&job.service) {
            Ok(machine) => stores::leave(job, &machine),
            Err(error) => tracing::warn!("stores of clones: {}", chain(&error)),
        }
    }
    let now = if job.unfinished {
        format!("{serving} serves; the merge is not done: `patchswitch up` goes on with it")
    } else {
        format!(
            "{serving} serves; the old partition is still there: `patchswitch status {service}`, then `patchswitch \
             commit {service}` or `patchswitch rollback {service}`"
        )
    };
    let code = if failure.code == ExitCode::Done { ExitCode::Failed } else { failure.code };
    error(failure, now, serving, code)
}

pub(super) fn error(failure: Failure, now: String, serving: Name, code: ExitCode) -> SwitchError {
    SwitchError { phase: failure.phase, reason: failure.reason, now, serving, code }
}

/// Who serves: what the phase word says, not what was meant to be.
pub(super) fn serving(job: &Context<'_>) -> Option<Name> {
    let active = job.attachment.plane().word().active();
    let netns = job.attachment.record().slots[active as usize].as_ref()?.netns.to_string();
    let rows = job.manager.store.partitions().ok()?;
    rows.into_iter().map(|row| row.name).find(|name| crate::names::netns(name) == netns)
}

/// Counts what a partition has written to its disks since a moment.
pub(super) fn meter(
    job: &Context<'_>,
    machine: &Machine,
    marks: &[Mark],
    since: SystemTime,
) -> Result<Loss, ManagerError> {
    written(&job.service, machine, marks, since)
}

/// As [`meter()`], from a moment that was written down. Marks are of one boot and of devices that stay; after that the
/// sectors are not known, the files still are.
pub(super) fn written_since(
    service: &Service,
    machine: &Machine,
    then: &AtSwitch,
) -> Result<Loss, ManagerError> {
    written(service, machine, &then.marks, then.at).or_else(|_| {
        let files = written(service, machine, &[], then.at)?;
        Ok(Loss { sectors: None, ..files })
    })
}

/// As [`meter()`], outside of a job as well.
fn written(
    service: &Service,
    machine: &Machine,
    marks: &[Mark],
    since: SystemTime,
) -> Result<Loss, ManagerError> {
    let mut sectors = 0;
    for mark in marks {
        sectors += meter::since(mark)?.sectors;
    }
    let patterns = service.may_lose.iter().map(String::as_str);
    let may_lose = MayLose::parse(patterns).map_err(|error| ManagerError::refused(error.to_string()))?;
    let mounts = Manager::mounts()?;
    let mut loss = Loss { sectors: Some(sectors), ..Loss::default() };
    for (at, root) in Manager::mount_points(machine, commands(service).is_some()) {
        loss.add(&mounts.run(|_| changed_since(&root, &at, since, &may_lose, Limits::default()))??);
    }
    Ok(loss)
}

/// Starts what must not run twice, now that the other partition has stopped. A failure is told, not fatal.
pub(super) fn unmask(job: &Context<'_>, machine: &Machine) {
    if let Err(error) = job.manager.unmask(machine) {
        tracing::warn!(partition = %machine.name(), "failed to start what was masked: {}", chain(&error));
    }
}
