//! Arm and take over: the only moment that a packet can notice, and none does.

use std::time::{Duration, Instant};

use serde_json::json;

use super::clone::Clone;
use super::context::at;
use super::report::AtSwitch;
use super::turn::{Turn, turn};
use super::undo::meter;
use super::verify::Verified;
use super::{Context, Failure, Loss, Phase};
use crate::attachment::SwitchOptions;
use crate::exit::ExitCode;
use crate::manager::{Manager, chain};
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
        let clone = self.0;
        arm(job).await?;
        job.step(Phase::TakeOver, json!({"to": clone.standby.name()}), async |job| {
            count_loss(job, &clone)?;
            let marks = marks(&clone).map_err(at(Phase::TakeOver))?;
            let flows = job.attachment.flows(clone.slot.other()).map_err(at(Phase::TakeOver))?;
            job.report.old_flows_at_flip = Some(flows.accepted.len());
            let now = std::time::SystemTime::now();
            job.report.at_switch = Some(AtSwitch { marks: marks.clone(), at: now });
            job.report.at_cut = Some(AtSwitch { marks: clone.marks.clone(), at: clone.before });
            job.report.save(job.manager.state()).map_err(at(Phase::TakeOver))?;
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
                "flip_us": (switched.flip_us * 10.0).round() / 10.0, "old_flows": flows.accepted.len(),
            });
            Ok((TakenOver { clone, marks, at: now }, outcome))
        })
        .await
    }
}

/// What the new side answers from the first moment on, so that a switch back keeps its flows and need not wait for them.
///
/// The switch is made: that they cannot be remembered is told, and no reason to do anything about it.
fn remember(job: &mut Context<'_>) {
    if let Err(error) = job.attachment.learn() {
        tracing::warn!("a switch back would cut flows that have no socket: {}", chain(&error));
    }
}

/// Flows without a socket of their own are remembered for at least one idle time before the switch.
///
/// A clone that is about to run out of room ends the job, unless that is what takes the clone away: then the time that
/// is left is too short to wait.
pub(super) async fn arm(job: &mut Context<'_>) -> Result<(), Failure> {
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

fn marks(clone: &Clone) -> Result<Vec<Mark>, crate::manager::ManagerError> {
    let dm = Manager::dm()?;
    let mark = |of: &crate::storage::snapshot::CloneOf| -> Result<Mark, crate::manager::ManagerError> {
        let device = crate::host::linux::block::DeviceNumber::of_path(&dm.node(&of.clone)?);
        Ok(Mark::now(device.map_err(crate::storage::StorageError::from)?)?)
    };
    clone.standby.clones().iter().map(mark).collect()
}

/// Used by the report of a give-back.
pub(super) fn loss_of_new_side(
    job: &mut Context<'_>,
    taken: &TakenOver,
) -> Result<Loss, crate::manager::ManagerError> {
    meter(job, &taken.clone.standby, &taken.marks, taken.at)
}
