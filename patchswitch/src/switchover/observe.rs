//! Observe, and give back: the service is watched through its own address (patent step 2205).

use std::time::Duration;

use patchswitch_common::Slot;
use serde_json::json;

use super::context::{Failure, Phase, SwitchError, at};
use super::drain::Ask;
use super::quiesce::{self, Handing};
use super::serves::Serves;
use super::take_over::{TakenOver, loss_of_new_side};
use super::turn::{Turn, turn};
use super::verify::inside;
use super::{Context, Loss, drain, stores, undo};
use crate::attachment::SwitchOptions;
use crate::config::LossyGiveBack;
use crate::exit::ExitCode;
use crate::manager::{Machine, chain};
use crate::verify::{Reach, Target, Watched, plain_socket, round, watch};

/// The new partition serves well.
#[derive(Debug)]
pub(super) struct Observed(pub(super) TakenOver);

impl TakenOver {
    /// Watches the service for a while.
    ///
    /// # Errors
    /// The state before, to be given back, and why.
    pub(super) async fn observe(self, job: &mut Context<'_>) -> Result<Observed, (Self, Failure)> {
        let settings = job.service.observe.clone();
        let result = job
            .step(Phase::Observe, json!({"observe": settings}), async |job| {
                let run = inside(job.manager, &self.clone.standby);
                let reach = Reach { open: &plain_socket, run: &run };
                let target = Target { addresses: &job.service.addresses, probes: &job.service.probes };
                let timeout = job.service.gate.timeout;
                let stop = || job.go_on(Phase::Observe).is_err();
                let watched = watch(&settings, || round(target, reach, timeout), &stop);
                job.go_on(Phase::Observe)?;
                match watched {
                    Watched::Fine => Ok(((), json!({}))),
                    Watched::Failing { first, after, reason } => {
                        let reason = format!(
                            "{reason} (first failure {:.1} s after the switch, given up {:.1} s later)",
                            first.as_secs_f64(),
                            (after - first).as_secs_f64()
                        );
                        Err(Failure { phase: Phase::Observe, reason, code: ExitCode::GivenBack })
                    }
                    Watched::Stopped => {
                        let reason = "interrupted".to_owned();
                        Err(Failure { phase: Phase::Observe, reason, code: ExitCode::Interrupted })
                    }
                }
            })
            .await;
        match result {
            Ok(()) => Ok(Observed(self)),
            Err(failure) => Err((self, failure)),
        }
    }

    /// The switch in reverse: new flows go to the old partition again, the clone keeps its own until they end, and is
    /// discarded. At most once per job, and never if it silently loses writes.
    pub(super) async fn give_back(self, job: &mut Context<'_>, failure: Failure) -> SwitchError {
        let new = self.clone.standby.name().clone();
        let old = self.clone.active.name().clone();
        let standby = self.clone.standby.clone();
        match self.reverse(job).await {
            Ok(lossy) => {
                job.report.outcome = "given_back".to_owned();
                let code = if lossy && failure.code == ExitCode::GivenBack {
                    ExitCode::WritesLost
                } else {
                    failure.code
                };
                let now = format!("{old} serves again; {new} was discarded");
                undo::error(failure, now, old, code)
            }
            Err(second) => {
                job.report.outcome = "give_back_failed".to_owned();
                let serving = undo::serving(job).unwrap_or(new);
                // Once the old side serves again, all that is left is to take the clone away.
                job.unfinished |= serving == old;
                if !job.unfinished && serving == *standby.name() {
                    // Whoever has watched its stores goes.
                    stores::leave(job, &standby);
                }
                let next = if job.unfinished { "; `patchswitch up` goes on with it" } else { "" };
                let lost = Serves::of(job, &standby).lost().filter(|_| serving == *standby.name());
                let serves = match lost {
                    Some(lost) => format!("nobody serves ({lost}); `patchswitch up` puts that right"),
                    None => format!("{serving} serves"),
                };
                let now = format!("{serves}; putting back failed: {}{next}", second.reason);
                undo::error(failure, now, serving, second.code)
            }
        }
    }

    /// Whether writes outside what was declared were lost.
    ///
    /// Clients are waiting: where the loss is agreed to, it is counted when they have been given back already.
    async fn reverse(self, job: &mut Context<'_>) -> Result<bool, Failure> {
        let person = |failure: Failure| Failure { code: ExitCode::GiveBackFailed, ..failure };
        let agreed = job.service.lossy_give_back == LossyGiveBack::Allow || job.options.discard_writes;
        if !agreed {
            let lost = self.count_loss(job).map_err(person)?;
            if lost != Some(0) {
                let what = match lost {
                    Some(files) => format!("the new partition has written {files} files outside may_lose"),
                    // Not known is not nothing.
                    None => "what the new partition has written is not known".to_owned(),
                };
                let reason = format!(
                    "{what}; `patchswitch rollback {} --discard-writes` gives that up",
                    job.service.name
                );
                return Err(Failure { phase: Phase::GiveBack, reason, code: ExitCode::GiveBackFailed });
            }
        }
        let slot = self.clone.slot;
        job.step(Phase::GiveBack, json!({"to": self.clone.active.name()}), async |job| {
            let flip_us = self.back(job, slot.other()).await.map_err(person)?;
            (job.say)(&format!("give_back: {} serves again", self.clone.active.name()));
            let lost = if agreed { self.count_loss(job).map_err(person)? } else { Some(0) };
            drain_new_side(job, &self.clone.standby).await.map_err(person)?;
            undo::discard(job).await.map_err(at(Phase::GiveBack)).map_err(person)?;
            Ok((lost != Some(0), json!({"flip_us": flip_us, "lost_files": lost})))
        })
        .await
    }

    /// The switch back itself; how long it took, in microseconds, if nobody had to wait.
    async fn back(&self, job: &mut Context<'_>, slot: Slot) -> Result<Option<f64>, Failure> {
        let (phase, patched) = (Phase::GiveBack, Some(job.job));
        let (to, from) = (&self.clone.active, &self.clone.standby);
        if let Some(how) = quiesce::commands(&job.service).cloned() {
            let handing = Handing { phase, from, to, slot, patched };
            let handed = quiesce::hand_over(job, &how, handing, None).await;
            // Who has the disk is to serve, and perhaps does not.
            job.unfinished = handed.as_ref().is_err_and(|failure| failure.code == ExitCode::GiveBackFailed);
            let (.., waited) = handed?;
            job.report.waited_back = Some(waited);
            return Ok(None);
        }
        // A service that fails is given back also where that cuts flows that found no room to be remembered.
        let options = SwitchOptions { despite_losses: true, ..SwitchOptions::default() };
        let switched = turn(job, Turn { phase, to, slot, from, patched, options }).await;
        // What went over went half-way back.
        job.unfinished |= switched.as_ref().is_err_and(|failure| failure.code == ExitCode::GiveBackFailed);
        let switched = switched?;
        job.report.give_back = Some(switched);
        Ok(Some((switched.flip_us * 10.0).round() / 10.0))
    }

    /// How many files outside `may_lose` the new side has written, of which the report keeps the first; nothing if its file system
    /// has given up and does not tell.
    fn count_loss(&self, job: &mut Context<'_>) -> Result<Option<u64>, Failure> {
        // What cannot be read any more is lost whoever serves.
        let loss = if job.is_lost() { Ok(Loss::default()) } else { loss_of_new_side(job, self) };
        let loss = match loss {
            Err(error) if job.is_full() => {
                tracing::warn!("what the new partition has written is not known: {}", chain(&error));
                return Ok(None);
            }
            loss => loss.map_err(at(Phase::GiveBack))?,
        };
        let files = loss.files;
        job.report.lost_by_give_back = Some(loss);
        Ok(Some(files))
    }
}

/// How long a side that fails may take to accept the connections that wait for it, before it is asked to finish.
const ACCEPT: Duration = Duration::from_secs(2);

/// What the discarded side still answers may end, for as long as the service's own drain may take.
async fn drain_new_side(job: &mut Context<'_>, new: &Machine) -> Result<(), Failure> {
    let options = drain::until_reset(job, new);
    // It fails: the sooner its connections end, the better.
    let ask = Ask { after: Duration::ZERO, accept: Some(ACCEPT) };
    // Whoever called the job off has asked for this: it is gone through with.
    let end = drain::to_the_end(job);
    job.report.drain = Some(drain::wait_for(job, new, ask, options, &end).await?);
    Ok(())
}
