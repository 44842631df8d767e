//! Arm and take over: the only moment that a packet can notice, and none does.

use std::time::{Duration, Instant};

use serde_json::json;

use super::clone::Clone;
use super::context::at;
use super::quiesce::{self, Handing, commands};
use super::report::AtSwitch;
use super::turn::{Turn, turn};
use super::undo::meter;
use super::verify::Verified;
use super::{Context, Failure, Loss, Phase, copies};
use crate::attachment::SwitchOptions;
use crate::config::{Quiesce, Strategy};
use crate::exit::ExitCode;
use crate::host::linux::block::DeviceNumber;
use crate::manager::{Manager, ManagerError, chain};
use crate::names;
use crate::storage::StorageError;
use crate::storage::meter::Mark;

/// The new partition serves; the old one keeps its flows.
#[derive(Debug)]
pub(super) struct TakenOver {
    pub(super) clone: Clone,
    /// What had been written to the new side's disks at the switch.
    pub(super) marks: Vec<Mark>,
    pub(super) at: std::time::SystemTime,
}

impl Verified {
    /// Gives new flows to the new partition.
    pub(super) async fn take_over(self, job: &mut Context<'_>) -> Result<TakenOver, Failure> {
        if let Some(how) = commands(&job.service).cloned() {
            return hand_over(job, self.0, &how).await;
        }
        let clone = self.0;
        arm(job).await?;
        job.step(Phase::TakeOver, json!({"to": clone.standby.name()}), async |job| {
            let AtSwitch { marks, at: now } = write_down(job, &clone)?;
            let options = SwitchOptions { notice: !job.options.without_notice, ..SwitchOptions::default() };
            let (phase, patched) = (Phase::TakeOver, Some(job.job));
            let (to, from) = (&clone.standby, &clone.active);
            let switched = turn(job, Turn { phase, to, slot: clone.slot, from, patched, options }).await;
            if job.attachment.plane().word().active() == clone.slot {
                remember(job);
            }
            let switched = switched?;
            job.report.flip_us = Some(switched.flip_us);
            job.report.switch = Some(switched);
            let outcome = json!({
                "flip_us": (switched.flip_us * 10.0).round() / 10.0, "old_flows": job.report.old_flows_at_flip,
            });
            Ok((TakenOver { clone, marks, at: now }, outcome))
        })
        .await
    }
}

/// What a rollback and a commit have to know, counted and written down before the switch.
fn write_down(job: &mut Context<'_>, clone: &Clone) -> Result<AtSwitch, Failure> {
    count_loss(job, clone)?;
    let marks = marks(job, clone).map_err(at(Phase::TakeOver))?;
    let flows = job.attachment.flows(clone.slot.other()).map_err(at(Phase::TakeOver))?;
    job.report.old_flows_at_flip = Some(flows.accepted.len());
    let at_switch = AtSwitch { marks, at: std::time::SystemTime::now() };
    job.report.at_switch = Some(at_switch.clone());
    job.report.at_cut = Some(AtSwitch { marks: clone.marks.clone(), at: clone.before });
    job.report.save(job.manager.state()).map_err(at(Phase::TakeOver))?;
    Ok(at_switch)
}

/// The marks of the old side's disks but for those that go over: of these nothing is left behind.
fn staying(clone: &Clone) -> Result<Vec<Mark>, ManagerError> {
    let dm = Manager::dm()?;
    let number = |name: String| DeviceNumber::of_path(&dm.node(&name)?).map_err(StorageError::from);
    let names = clone.active.moving().map(|(_, disk)| names::dm_disk(clone.active.name(), &disk.name));
    let gone = names.map(number).collect::<Result<Vec<_>, _>>()?;
    Ok(clone.marks.iter().filter(|mark| !gone.iter().any(|device| mark.is_of(*device))).cloned().collect())
}

/// Gives a service with a single writer to the new partition, with its disks.
async fn hand_over(job: &mut Context<'_>, clone: Clone, how: &Quiesce) -> Result<TakenOver, Failure> {
    let standby = clone.standby.clone();
    let dm = Manager::dm().map_err(at(Phase::Quiesce))?;
    let active = clone.active.clone();
    let checked = job.step(Phase::Quiesce, json!({"partition": standby.name()}), async |job| {
        quiesce::end_check(job, &standby, how)?;
        let standby = job.manager.drop_copies(&standby).map_err(at(Phase::Quiesce))?;
        job.watch(standby.clones());
        let mounts = job.manager.to_be_frozen(&active).map_err(at(Phase::Quiesce))?;
        let copies = copies::begin(job, Phase::Quiesce, (&dm, &mounts), (&active, &standby))?;
        Ok(((standby, copies), json!({})))
    });
    let marks = staying(&clone).map_err(at(Phase::TakeOver))?;
    let (standby, copies) = checked.await?;
    let clone = Clone { standby, marks, ..clone };
    job.step(Phase::TakeOver, json!({"to": clone.standby.name()}), async |job| {
        let AtSwitch { marks, at } = write_down(job, &clone)?;
        let handing = Handing {
            phase: Phase::TakeOver,
            from: &clone.active,
            to: &clone.standby,
            slot: clone.slot,
            patched: Some(job.job),
        };
        let (active, standby, waited) = quiesce::hand_over(job, how, handing, copies).await?;
        remember(job);
        job.report.waited = Some(waited);
        let outcome = json!({"held_ms": waited.flows.held_ms.round(), "waited": waited.flows.frames});
        Ok((TakenOver { clone: Clone { active, standby, ..clone }, marks, at }, outcome))
    })
    .await
}

/// What the new side answers from the first moment on, so that a switch back keeps its flows and need not wait for them.
///
/// The switch is made: that they cannot be remembered is told, and no reason to do anything about it.
fn remember(job: &mut Context<'_>) {
    if job.service.strategy != Strategy::Takeover {
        // Where flows waited there is nobody else whose flows they could be. And to the letter, a client of the old side is answered
        // by the new one as well: what is remembered of it must stay the old one's, whose answers get the service's address by that.
        return;
    }
    if let Err(error) = job.attachment.learn() {
        tracing::warn!("a switch back would cut flows that have no socket: {}", chain(&error));
    }
}

/// Begins to remember flows without a socket of their own, unless they are to have ended at the switch: then to remember them
/// would be to wait for the end of those that somebody keeps alive.
pub(super) fn learn(job: &mut Context<'_>, phase: Phase) -> Result<(), Failure> {
    match job.service.strategy.is_shared() {
        true => job.attachment.learn().map_err(at(phase)),
        false => Ok(()),
    }
}

/// Flows without a socket of their own are remembered for at least one idle time before the switch, unless they are to have
/// ended by then.
///
/// A clone that is about to run out of room ends the job, unless that is what takes the clone away: then the time that
/// is left is too short to wait.
pub(super) async fn arm(job: &mut Context<'_>) -> Result<(), Failure> {
    if !job.service.strategy.is_shared() {
        return Ok(());
    }
    let idle = job.service.udp_idle;
    job.step(Phase::Arm, json!({"udp_idle_s": idle.as_secs_f64()}), async |job| {
        // Learning began when the partition booted; what is missing to the idle time is waited for.
        let learned_for: f64 =
            job.report.phases.iter().rev().take_while(|(phase, _)| *phase > Phase::Boot).map(|p| p.1).sum();
        let end = Instant::now() + idle.saturating_sub(Duration::from_secs_f64(learned_for));
        while Instant::now() < end {
            job.go_on(Phase::Arm)?;
            if !job.have_room() {
                tracing::warn!("flows without a socket may be cut: the clone that serves has no room left");
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let learned = job.attachment.plane().learned(job.attachment.plane().word().active());
        let learned = learned.map_err(|error| at(Phase::Arm)(crate::attachment::AttachError::from(error)))?;
        Ok(((), json!({"learned": learned})))
    })
    .await
}

/// What the old side wrote after the cut is lost by the switch. Outside what was declared it needs a word.
fn count_loss(job: &mut Context<'_>, clone: &Clone) -> Result<(), Failure> {
    let loss = meter(job, &clone.active, &clone.marks, clone.before).map_err(at(Phase::TakeOver))?;
    let undeclared = loss.files;
    let first = loss.first.clone();
    job.report.lost_by_switch = Some(loss);
    if undeclared > 0 && !job.options.discard_writes {
        return Err(refused(undeclared, &first));
    }
    Ok(())
}

fn refused(files: u64, first: &[std::path::PathBuf]) -> Failure {
    let first = first.iter().take(5).map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
    let reason = format!(
        "the old partition has written {files} files since the clone that the service does not declare in may_lose \
         ({first}); --discard-writes switches all the same"
    );
    Failure { phase: Phase::TakeOver, reason, code: ExitCode::WritesLost }
}

fn marks(job: &Context<'_>, clone: &Clone) -> Result<Vec<Mark>, ManagerError> {
    let dm = Manager::dm()?;
    let mark = |name: String| -> Result<Mark, ManagerError> {
        let device = DeviceNumber::of_path(&dm.node(&name)?);
        Ok(Mark::now(device.map_err(StorageError::from)?)?)
    };
    let standby = &clone.standby;
    let mut names: Vec<String> = standby.clones().into_iter().map(|of| of.clone).collect();
    if commands(&job.service).is_none() {
        names.extend(standby.copied().map(|(_, disk)| names::dm_disk(standby.name(), &disk.name)));
    }
    names.into_iter().map(mark).collect()
}

/// Used by the report of a give-back.
pub(super) fn loss_of_new_side(
    job: &mut Context<'_>,
    taken: &TakenOver,
) -> Result<Loss, crate::manager::ManagerError> {
    meter(job, &taken.clone.standby, &taken.marks, taken.at)
}
