//! Rollback: the same switch, roles exchanged; the patched partition is discarded.

use std::path::Path;

use patchswitch_common::Slot;
use patchswitch_common::word::Phase as WordPhase;
use serde_json::json;

use super::context::{Failure, Phase, SwitchError, at};
use super::drain::Ask;
use super::quiesce::{self, Handing, commands};
use super::report::{AtSwitch, Report};
use super::serves::Serves;
use super::take_over::{arm, learn};
use super::turn::{Turn, turn};
use super::verify::inside;
use super::{Context, Loss, drain, undo};
use crate::attachment::SwitchOptions;
use crate::config::Quiesce;
use crate::exit::ExitCode;
use crate::host::linux::priority::Priority;
use crate::manager::{Machine, Manager, ManagerError, attachable, chain, slot_of};
use crate::store::JobId;
use crate::verify::{Reach, Target, gate};

/// Gives the service back to the old partition and discards the patched one.
///
/// # Errors
/// [`SwitchError`]; before the switch nothing has changed for clients.
pub async fn rollback(
    job: &mut Context<'_>,
    last: Option<&AtSwitch>,
    patched: Option<JobId>,
) -> Result<ExitCode, SwitchError> {
    // As in a switch the other way.
    let _way = Priority::give_way();
    let result = reverse(job, last, patched).await;
    let serving = undo::serving(job).unwrap_or_else(|| job.service.partition.clone());
    match result {
        Ok(lossy) => {
            job.report.outcome = "rolled_back".to_owned();
            Ok(if lossy { ExitCode::WritesLost } else { job.report.exit_code() })
        }
        Err(failure) => {
            job.report.outcome = "failed".to_owned();
            let code = failure.code;
            let now = match (job.unfinished, job.service.strategy.is_shared()) {
                (true, false) if code == ExitCode::GiveBackFailed => {
                    "perhaps nobody serves; `patchswitch up` goes on with it".to_owned()
                }
                (true, _) => format!("{serving} serves again; `patchswitch up` takes the patched one away"),
                (false, _) => format!("{serving} serves"),
            };
            Err(undo::error(failure, now, serving, code))
        }
    }
}

async fn reverse(
    job: &mut Context<'_>,
    last: Option<&AtSwitch>,
    patched: Option<JobId>,
) -> Result<bool, Failure> {
    let refuse = |reason: String, code| Err(Failure { phase: Phase::GiveBack, reason, code });
    let Some(old) = job.manager.other(&job.service.name).map_err(at(Phase::GiveBack))? else {
        return refuse(
            "there is no old partition: it was committed, or there was no job".to_owned(),
            ExitCode::Nothing,
        );
    };
    let new = job.manager.active(&job.service).map_err(at(Phase::GiveBack))?;
    if old.is_clone() {
        // Given back already, and not to the end: the other one is the clone, which only has to go.
        (job.report.from, job.report.to) = (Some(old.name().clone()), Some(new.name().clone()));
        job.watch(old.clones());
        finish(job, &old, &new).await?;
        return Ok(false);
    }
    (job.report.from, job.report.to) = (Some(new.name().clone()), Some(old.name().clone()));
    job.watch(new.clones());
    let lossy = agreed(job, &new, last)?;
    // Whoever rolls back has a reason to: flows for which there was no room are cut, which is said.
    let options = SwitchOptions { despite_losses: true, ..SwitchOptions::default() };
    let is_lost = Serves::of(job, &new).lost().is_some();
    let serving = still_serving(job, &old, is_lost)?;
    // One that still had flows goes on with them if nothing comes of this.
    let was_started = serving.is_none();
    let slot = match serving {
        // Who is lost, or is stopped for the switch, answers nothing that would have to be remembered, and somebody waits.
        Some(slot) if is_lost || !job.service.strategy.is_shared() => slot,
        Some(slot) => {
            remembered(job).await?;
            slot
        }
        None => back(job, &old).await?,
    };
    if let Some(how) = commands(&job.service).cloned() {
        if let Err(failure) = hand_back(job, &how, (&new, &old), slot, patched).await {
            job.unfinished =
                job.attachment.plane().word().active() == slot || failure.code == ExitCode::GiveBackFailed;
            if !job.unfinished && was_started {
                put_down(job, &old, slot).await;
            }
            return Err(failure);
        }
        return finish(job, &new, &old).await.map(|()| lossy);
    }
    let turned = job.step(Phase::GiveBack, json!({"to": old.name()}), async |job| {
        let back = Turn { phase: Phase::GiveBack, to: &old, slot, from: &new, patched, options };
        let switched = turn(job, back).await?;
        job.report.flip_us = Some(switched.flip_us);
        job.report.switch = Some(switched);
        Ok(((), json!({"flip_us": (switched.flip_us * 10.0).round() / 10.0})))
    });
    if let Err(failure) = turned.await {
        // Switched, but not with all that belongs to it: from there on there is no other way, and `up` goes it.
        // The same if what was to go over is neither here nor there.
        job.unfinished =
            job.attachment.plane().word().active() == slot || failure.code == ExitCode::GiveBackFailed;
        if !job.unfinished && was_started {
            put_down(job, &old, slot).await;
        }
        let code = if job.unfinished { ExitCode::GiveBackFailed } else { failure.code };
        return Err(Failure { code, ..failure });
    }
    finish(job, &new, &old).await?;
    Ok(lossy)
}

/// A service with a single writer goes back with its disks, as they are.
async fn hand_back(
    job: &mut Context<'_>,
    how: &Quiesce,
    (new, old): (&Machine, &Machine),
    slot: Slot,
    patched: Option<JobId>,
) -> Result<(), Failure> {
    job.step(Phase::GiveBack, json!({"to": old.name()}), async |job| {
        // It was started, and is checked, with what it had kept of them.
        quiesce::end_check(job, old, how)?;
        let handing = Handing { phase: Phase::GiveBack, from: new, to: old, slot, patched };
        let (.., waited) = quiesce::hand_over(job, how, handing, None).await?;
        job.report.waited_back = Some(waited);
        Ok(((), json!({"held_ms": waited.flows.held_ms.round(), "waited": waited.flows.frames})))
    })
    .await
}

/// The slot of the old partition, if it still has flows, or at least runs and the new one is lost, and so has served all the
/// time. One that died meanwhile has none; it is started and checked like one that was stopped.
fn still_serving(job: &mut Context<'_>, old: &Machine, is_lost: bool) -> Result<Option<Slot>, Failure> {
    if job.attachment.plane().word().phase() != WordPhase::Draining && !is_lost {
        return Ok(None);
    }
    let slot = slot_of(&job.attachment, old);
    if slot.is_some() && job.manager.is_running(old).map_err(at(Phase::GiveBack))? {
        return Ok(slot);
    }
    job.attachment.settle().map_err(at(Phase::GiveBack))?;
    Ok(None)
}

/// What the new side answers was remembered since the switch; if nobody got to that, it is now, for one idle time.
async fn remembered(job: &mut Context<'_>) -> Result<(), Failure> {
    if job.attachment.plane().word().learns() {
        return Ok(());
    }
    learn(job, Phase::Arm)?;
    arm(job).await
}

/// Drains the patched partition and takes it away. From the switch on there is no other way.
async fn finish(job: &mut Context<'_>, new: &Machine, old: &Machine) -> Result<(), Failure> {
    job.unfinished = true;
    job.step_to_the_end(Phase::Drain, json!({}), async |job| {
        let options = drain::until_reset(job, new);
        let ask = Ask { after: job.service.drain.command_after, accept: None };
        let end = drain::to_the_end(job);
        let report = drain::wait_for(job, new, ask, options, &end).await?;
        job.report.drain = Some(report);
        undo::discard(job).await.map_err(at(Phase::Drain))?;
        undo::unmask(job, old);
        Ok(((), json!({})))
    })
    .await
    // The service has been given back, so none of the codes that say that it was not touched.
    .map_err(|failure| Failure { code: ExitCode::GiveBackFailed, ..failure })?;
    job.unfinished = false;
    Ok(())
}

/// What the new side wrote since the switch is lost; outside what was declared it needs a word.
fn agreed(job: &mut Context<'_>, new: &Machine, last: Option<&AtSwitch>) -> Result<bool, Failure> {
    let refuse = |reason: String| Failure { phase: Phase::GiveBack, reason, code: ExitCode::WritesLost };
    let Some(last) = last else {
        // Not known is not nothing.
        return if job.options.discard_writes {
            Ok(true)
        } else {
            let reason = "the report of the switch is gone, so what the new partition has written since is not known; \
                          --discard-writes rolls back all the same";
            Err(refuse(reason.to_owned()))
        };
    };
    let loss = match undo::written_since(&job.service, new, last) {
        Ok(loss) => loss,
        // A clone that has run out of room cannot be read any more, and is given up on purpose.
        Err(error) if job.options.discard_writes => {
            tracing::warn!("what is lost cannot be counted: {}", chain(&error));
            return Ok(true);
        }
        Err(error) => return Err(at(Phase::GiveBack)(error)),
    };
    let Loss { files, first, .. } = loss.clone();
    job.report.lost_by_give_back = Some(loss);
    if files > 0 && !job.options.discard_writes {
        let first =
            first.iter().take(5).map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        let reason = format!(
            "the new partition has written {files} files since the switch that may_lose does not declare ({first}); \
             --discard-writes rolls back all the same"
        );
        return Err(refuse(reason));
    }
    Ok(files > 0)
}

/// Makes the old partition run and checks it: it was stopped since. If it does not come up it is stopped again.
async fn back(job: &mut Context<'_>, old: &Machine) -> Result<Slot, Failure> {
    let slot = job.attachment.plane().word().active().other();
    match come_up(job, old, slot).await {
        Ok(()) => Ok(slot),
        Err(failure) => {
            put_down(job, old, slot).await;
            Err(failure)
        }
    }
}

async fn put_down(job: &mut Context<'_>, old: &Machine, slot: Slot) {
    if let Err(second) = undo::put_down(job, old, slot).await {
        tracing::warn!(partition = %old.name(), "failed to stop it again: {}", chain(&second));
    }
}

async fn come_up(job: &mut Context<'_>, old: &Machine, slot: Slot) -> Result<(), Failure> {
    let limit = job.manager.config.job.boot;
    job.step(Phase::Boot, json!({"partition": old.name()}), async |job| {
        if slot_of(&job.attachment, old).is_some() {
            // Left over from a rollback that did not get further.
            undo::put_down(job, old, slot).await.map_err(at(Phase::Boot))?;
        }
        let mut running = job.manager.start(old, true).map_err(at(Phase::Boot))?;
        job.attachment.join(slot, &attachable(old)).await.map_err(at(Phase::Boot))?;
        learn(job, Phase::Boot)?;
        Manager::wait_started(&mut running, old, limit).map_err(at(Phase::Boot))?;
        Ok(((), json!({})))
    })
    .await?;
    job.step(Phase::Verify, json!({}), async |job| {
        Manager::full_speed(old).map_err(at(Phase::Verify))?;
        let prober = job.attachment.prober(slot).map_err(at(Phase::Verify))?;
        let open = |address| prober.socket(address);
        let run = inside(job.manager, old);
        let target = Target { addresses: &job.service.addresses, probes: &job.service.probes };
        let passed = gate(target, &job.service.gate, Reach { open: &open, run: &run }, &job.stop);
        let passed = passed.map_err(|error| super::context::with(Phase::Verify, error.exit_code())(error))?;
        Ok(((), json!({"rounds": passed.rounds})))
    })
    .await?;
    arm(job).await
}

/// The part of a report that later jobs need.
#[derive(Debug, serde::Deserialize)]
pub(super) struct Kept {
    /// What a rollback counts from.
    pub(super) at_switch: Option<AtSwitch>,
    /// What a commit makes final.
    pub(super) lost_by_switch: Option<Loss>,
}

/// What the report of the last switch kept for a rollback and for a commit.
///
/// # Errors
/// [`ManagerError::Io`] if the report is there and cannot be read.
pub(super) fn kept(state: &Path, job: crate::store::JobId) -> Result<Option<Kept>, ManagerError> {
    let path = Report::path(state, job);
    match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ManagerError::io("read", path)(error)),
        Ok(text) => {
            serde_json::from_slice(&text).map_err(|error| ManagerError::io("read", path)(error.into()))
        }
    }
}
