//! Drain and retire: the old partition ends when its last flow has ended (patent step 2206).

use std::time::{Duration, Instant};

use serde_json::json;

use super::commit;
use super::context::{Failure, Phase, at};
use super::observe::Observed;
use super::serves::Serves;
use super::take_over::TakenOver;
use super::verify::inside;
use super::{Context, stores, undo};
use crate::attachment::{DrainOptions, DrainReport};
use crate::config::OnDeadline;
use crate::exit::ExitCode;
use crate::manager::Machine;

/// The old partition has no flow left.
#[derive(Debug)]
pub(super) struct Drained(TakenOver);

/// The old partition is stopped; its disks are there.
#[derive(Debug)]
pub(super) struct Retired(Machine);

/// Why a drain did not end.
#[derive(Debug)]
pub(super) enum Undrained {
    /// The service is to be given back.
    GiveBack(Box<TakenOver>, Failure),
    /// The flows that are left keep the old partition; the new one serves all the same.
    Kept(Failure),
}

/// When the drain command is run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    /// Flows have this long to end by themselves.
    pub(super) after: Duration,
    /// Connections that nobody has accepted yet have so long to be accepted, after which the command is run all the
    /// same; nothing: as long as the drain may take, and the command is not run if they are still there.
    pub(super) accept: Option<Duration>,
}

/// How often is looked whether all connections have been accepted.
const POLL: Duration = Duration::from_millis(50);
/// A drain command has this long.
const COMMAND: Duration = Duration::from_secs(30);

impl Observed {
    /// Waits until the old partition has no accepted flow left.
    ///
    /// # Errors
    /// [`Undrained`].
    pub(super) async fn drain(self, job: &mut Context<'_>) -> Result<Drained, Undrained> {
        let settings = job.service.drain.clone();
        let result = job
            .step(Phase::Drain, json!({"drain": settings}), async |job| {
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
                // Ends early if somebody wants it, if a clone is about to run out of room, or if nobody serves any more.
                let (stop, watched) = (job.stop, job.watched.clone());
                let serves = Serves::of(job, &self.0.clone.standby);
                let end = || {
                    stop() || watched.iter().any(|clone| !Context::has_room(clone)) || serves.lost().is_some()
                };
                let old = &self.0.clone.active;
                let ask = Ask { after: settings.command_after, accept: None };
                let report = wait_for(job, old, ask, options, &end).await?;
                let seconds = report.seconds;
                let (settled, left) = (report.settled, report.left);
                job.report.drain = Some(report);
                // Also if the old side has no flow any more: it is the only one that could serve.
                if let Some(reason) = serves.lost() {
                    return Err(Failure { phase: Phase::Drain, reason, code: ExitCode::GivenBack });
                }
                if !settled {
                    job.go_on(Phase::Drain)?;
                }
                if !settled && settings.on_deadline == OnDeadline::Abort {
                    let reason = format!("{left} flows were left at the deadline");
                    return Err(Failure { phase: Phase::Drain, reason, code: ExitCode::GivenBack });
                }
                if !settled {
                    let reason =
                        format!("{left} flows are left after {seconds:.0} s and stay with the old partition");
                    return Err(Failure { phase: Phase::Drain, reason, code: ExitCode::Done });
                }
                Ok(((), json!({"drained_s": (seconds * 10.0).round() / 10.0})))
            })
            .await;
        match result {
            Ok(()) => Ok(Drained(self.0)),
            Err(failure) if failure.code == ExitCode::Done => Err(Undrained::Kept(failure)),
            Err(failure) => Err(Undrained::GiveBack(Box::new(self.0), failure)),
        }
    }
}

/// Flows of a side that is to be taken away may end, for as long as the service's own drain may take; one that is lost ends
/// no flow any more.
pub(super) fn until_reset(job: &Context<'_>, machine: &Machine) -> DrainOptions {
    let is_lost = Serves::of(job, machine).lost().is_some();
    let deadline = if is_lost { Duration::ZERO } else { job.service.last_flows() };
    DrainOptions { deadline: Some(deadline), on_deadline: crate::attachment::OnDeadline::Reset }
}

/// Nobody ends such a drain early. What those flows still write has room, as long as there is any.
pub(super) fn to_the_end(job: &Context<'_>) -> impl Fn() -> bool + Sync + use<> {
    let watched = job.watched.clone();
    move || {
        for clone in &watched {
            let _ = Context::has_room(clone);
        }
        false
    }
}

/// Waits for the flows of a partition that gets no new ones, and runs the service's drain command in it if some are
/// left then. Ends early when `stop` says so.
///
/// # Errors
/// [`Failure`] of the drain; that the command fails is told, and the drain goes on.
pub(super) async fn wait_for(
    job: &mut Context<'_>,
    machine: &Machine,
    ask: Ask,
    options: DrainOptions,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<DrainReport, Failure> {
    let begin = Instant::now();
    let command = job.service.drain.command.clone();
    let deadline = options.deadline.unwrap_or(Duration::MAX);
    let mut at_start = None;
    if let Some(command) = command {
        let first = DrainOptions {
            deadline: Some(ask.after.min(deadline)),
            on_deadline: crate::attachment::OnDeadline::Keep,
        };
        let report = job.attachment.drain_until(&first, stop, |_| {}).await.map_err(at(Phase::Drain))?;
        if report.settled || stop() {
            return Ok(report);
        }
        at_start = Some(report.flows_at_start);
        let patience = ask.accept.unwrap_or(deadline.saturating_sub(begin.elapsed()));
        let accepted = all_accepted(job, patience, stop).await?;
        if (accepted || ask.accept.is_some()) && !stop() {
            ask_to_finish(job, machine, &command);
        } else if !accepted {
            tracing::warn!("the drain command was not run: connections wait for being accepted");
        }
    }
    let rest = DrainOptions { deadline: Some(deadline.saturating_sub(begin.elapsed())), ..options };
    let report = job.attachment.drain_until(&rest, stop, |_| {}).await.map_err(at(Phase::Drain))?;
    let flows_at_start = at_start.unwrap_or(report.flows_at_start);
    Ok(DrainReport { flows_at_start, seconds: begin.elapsed().as_secs_f64(), ..report })
}

/// Whether no connection waits in the queue of a listener any more: closing the listener would reset it.
async fn all_accepted(
    job: &Context<'_>,
    patience: Duration,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<bool, Failure> {
    let retiring = job.attachment.plane().word().active().other();
    let begin = Instant::now();
    loop {
        if job.attachment.flows(retiring).map_err(at(Phase::Drain))?.queued == 0 {
            return Ok(true);
        }
        if stop() || begin.elapsed() >= patience {
            return Ok(false);
        }
        tokio::time::sleep(POLL).await;
    }
}

fn ask_to_finish(job: &Context<'_>, machine: &Machine, command: &str) {
    if let Err(error) = inside(job.manager, machine)(command, COMMAND) {
        tracing::warn!("the drain command failed: {}", crate::manager::chain(&error));
    }
}

impl Drained {
    /// Stops the old partition. Its disks stay as they were at the cut, for a rollback.
    pub(super) async fn retire(self, job: &mut Context<'_>) -> Result<Retired, Failure> {
        let old = self.0.clone.active;
        job.step(Phase::Retire, json!({"partition": old.name()}), async |job| {
            job.attachment.leave(self.0.clone.slot.other()).await.map_err(at(Phase::Retire))?;
            // Its last writes belong to the count.
            let loss = undo::meter(job, &old, &self.0.clone.marks, self.0.clone.before)
                .map_err(at(Phase::Retire))?;
            job.report.lost_by_switch = Some(loss);
            job.manager.stop(&old).map_err(at(Phase::Retire))?;
            undo::unmask(job, &self.0.clone.standby);
            Ok((Retired(self.0.clone.standby), json!({})))
        })
        .await
    }
}

impl Retired {
    /// Leaves the decision to somebody, for as long as that takes: nobody watches the clone meanwhile.
    pub(super) fn stay(self, job: &Context<'_>) {
        stores::leave(job, &self.0);
    }

    /// Makes the clone the disk.
    pub(super) fn commit(self, job: &mut Context<'_>) -> Result<(), Failure> {
        // The old side may have written until its last flow ended.
        commit::agreed(job, job.report.lost_by_switch.as_ref())?;
        commit::merge(job)
    }
}
