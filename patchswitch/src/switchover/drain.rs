//! Drain and retire: the old partition ends when its last flow has ended (patent step 2206).

use serde_json::json;

use super::commit;
use super::context::{Failure, Phase, at};
use super::observe::Observed;
use super::take_over::TakenOver;
use super::verify::inside;
use super::{Context, undo};
use crate::attachment::DrainOptions;
use crate::config::OnDeadline;
use crate::exit::ExitCode;

/// The old partition has no flow left.
#[derive(Debug)]
pub(super) struct Drained(TakenOver);

/// The old partition is stopped; its disks are there.
#[derive(Debug)]
pub(super) struct Retired(());

/// Why a drain did not end.
#[derive(Debug)]
pub(super) enum Undrained {
    /// The service is to be given back.
    GiveBack(TakenOver, Failure),
    /// The flows that are left keep the old partition; the new one serves all the same.
    Kept(Failure),
}

/// A drain command has this long.
const COMMAND: std::time::Duration = std::time::Duration::from_secs(30);

impl Observed {
    /// Waits until the old partition has no accepted flow left.
    ///
    /// # Errors
    /// [`Undrained`].
    pub(super) async fn drain(self, job: &mut Context<'_>) -> Result<Drained, Undrained> {
        let settings = job.service.drain.clone();
        let result = job
            .step(Phase::Drain, json!({"drain": settings}), async |job| {
                let old = &self.0.clone.active;
                if let Some(command) = &settings.command {
                    // Only when nobody waits for being accepted: closing a listener resets those.
                    wait_for_empty_queue(job, &self.0).await?;
                    if let Err(error) = inside(job.manager, old)(command, COMMAND) {
                        tracing::warn!("the drain command failed: {}", crate::manager::chain(&error));
                    }
                }
                let on_deadline = match settings.on_deadline {
                    OnDeadline::Keep => crate::attachment::OnDeadline::Keep,
                    OnDeadline::Abort => crate::attachment::OnDeadline::Abort,
                    OnDeadline::Reset => crate::attachment::OnDeadline::Reset,
                };
                // An abort is a give-back, which does more than the switch alone.
                let wait = match on_deadline {
                    crate::attachment::OnDeadline::Abort => crate::attachment::OnDeadline::Keep,
                    other => other,
                };
                let options = DrainOptions { deadline: Some(settings.deadline), on_deadline: wait };
                let stop = job.stop;
                let report = job.attachment.drain_until(&options, stop, |_| {}).await.map_err(at(Phase::Drain))?;
                let seconds = report.seconds;
                let (settled, left) = (report.settled, report.left);
                job.report.drain = Some(report);
                if (job.stop)() && !settled {
                    let reason = "interrupted".to_owned();
                    return Err(Failure { phase: Phase::Drain, reason, code: ExitCode::Interrupted });
                }
                if !settled && settings.on_deadline == OnDeadline::Abort {
                    let reason = format!("{left} flows were left at the deadline");
                    return Err(Failure { phase: Phase::Drain, reason, code: ExitCode::GivenBack });
                }
                if !settled {
                    let reason = format!("{left} flows are left after {seconds:.0} s and stay with the old partition");
                    return Err(Failure { phase: Phase::Drain, reason, code: ExitCode::Done });
                }
                Ok(((), json!({"drained_s": (seconds * 10.0).round() / 10.0})))
            })
            .await;
        match result {
            Ok(()) => Ok(Drained(self.0)),
            Err(failure) if failure.code == ExitCode::Done => Err(Undrained::Kept(failure)),
            Err(failure) => Err(Undrained::GiveBack(self.0, failure)),
        }
    }
}

/// A connection that nobody has accepted yet is reset when its listener closes.
async fn wait_for_empty_queue(job: &Context<'_>, taken: &TakenOver) -> Result<(), Failure> {
    let old = taken.clone.slot.other();
    for _ in 0..100 {
        if job.attachment.flows(old).map_err(at(Phase::Drain))?.queued == 0 {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    Ok(())
}

impl Drained {
    /// Stops the old partition. Its disks stay as they were at the cut, for a rollback.
    pub(super) async fn retire(self, job: &mut Context<'_>) -> Result<Retired, Failure> {
        let old = self.0.clone.active;
        job.step(Phase::Retire, json!({"partition": old.name()}), async |job| {
            job.attachment.leave(self.0.clone.slot.other()).await.map_err(at(Phase::Retire))?;
            // Its last writes belong to the count.
            let loss = undo::meter(job, &old, &self.0.clone.marks, self.0.clone.before).map_err(at(Phase::Retire))?;
            job.report.lost_by_switch = Some(loss);
            job.manager.stop(&old).map_err(at(Phase::Retire))?;
            undo::unmask(job, &self.0.clone.standby);
            Ok((Retired(()), json!({})))
        })
        .await
    }
}

impl Retired {
    /// Makes the clone the disk.
    pub(super) fn commit(self, job: &mut Context<'_>) -> Result<(), Failure> {
        commit::merge(job)
    }
}
