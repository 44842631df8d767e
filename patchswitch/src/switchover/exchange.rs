//! Device and address: what only one partition can have goes over, while new flows wait (the patent's steps 1301 to 1304 and
//! 1501 to 1506).
//!
//! ```text
//!  HOLD ─► flows of the old side end ─► exchange ─► probes, through the new side's own link ─► RELEASE
//!    └ new flows wait       └ not in time │               └ fail                                  └ in their order
//!                                         └ back again ◄──┘
//!                             released to the old side, which has all that it had
//! ```
//!
//! Back it is the same with the roles exchanged; flows of a side that is given back from are reset when their time is over.

use std::time::{Duration, Instant};

use patchswitch_common::Slot;

use super::Context;
use super::context::{Failure, Phase, at};
use super::quiesce::{self, MARGIN, Waited, ms};
use super::turn::Turn;
use crate::attachment::{AttachError, DrainOptions, Exchange, Hold, OnDeadline, SwitchOptions, Switched};
use crate::config::{self, Left, Service, Strategy};
use crate::exit::ExitCode;

/// The probes may take so long, or as long as one of them may: who serves had passed them before, and clients wait.
const CHECK: Duration = Duration::from_secs(1);

/// What goes over by the strategy of a service, if it is one of these.
pub(super) fn of(service: &Service) -> Option<(Exchange, &config::Exchange)> {
    match &service.strategy {
        Strategy::Device(how) => Some((Exchange::Device, how)),
        Strategy::Address(how) => Some((Exchange::Address, how)),
        Strategy::Takeover | Strategy::Quiesce(_) | Strategy::Letter => None,
    }
}

/// Gives a service to the partition of a turn.
///
/// # Errors
/// [`Failure`]; the one that had the service has it again, unless the failure's code is [`ExitCode::GiveBackFailed`].
pub(super) async fn hand_over(
    job: &mut Context<'_>,
    turn: &Turn<'_>,
    (what, how): (Exchange, config::Exchange),
) -> Result<Switched, Failure> {
    let Turn { phase, slot, .. } = *turn;
    quiesce::settle(job).await.map_err(at(phase))?;
    let options = SwitchOptions { despite_losses: true, ..turn.options };
    if job.attachment.record().gone(slot.other()).is_some() {
        // It has nothing any more that it could give, and no flows that somebody could wait for.
        return job.attachment.switch_with(slot, options).await.map_err(at(phase));
    }
    job.attachment.can_exchange(what).map_err(at(phase))?;
    let hold = job.attachment.hold(slot, how.hold + MARGIN, options).await.map_err(at(phase))?;
    let switched = hold.switched();
    let mut deed = Deed { turn, what, how, hold: &hold, waited: Waited::default(), exchanged: false };
    let done = deed.run(job).await;
    let Deed { mut waited, exchanged, .. } = deed;
    match done {
        Ok(()) => {
            waited.flows = job.attachment.release(hold).await.map_err(at(phase))?;
            let kept =
                if phase == Phase::GiveBack { &mut job.report.waited_back } else { &mut job.report.waited };
            *kept = Some(waited);
            Ok(switched)
        }
        Err(failure) => {
            let back = put_back(job, (what, slot.other(), exchanged), hold).await;
            match back.map_err(at(phase)) {
                Ok(()) => Err(failure),
                Err(second) => {
                    let reason = format!("{}; putting back failed: {}", failure.reason, second.reason);
                    Err(Failure { reason, code: ExitCode::GiveBackFailed, ..failure })
                }
            }
        }
    }
}

/// What went over goes back, and what waits as well, whichever of the two can be done.
async fn put_back(
    job: &mut Context<'_>,
    (what, old, exchanged): (Exchange, Slot, bool),
    hold: Hold,
) -> Result<(), AttachError> {
    if exchanged && hold.left().is_zero() {
        // Clients have the new side by now: what they use is not taken away under them.
        job.attachment.release(hold).await?;
        return Err(AttachError::Refused("its time was over, and the new side has got the flows".to_owned()));
    }
    let back = if exchanged { job.attachment.exchange(what, old).await } else { Ok(()) };
    let called_off = job.attachment.call_off(hold).await;
    if back.is_err() {
        // Once more, by what the record says.
        let _ = job.attachment.reassert().await?;
    }
    back.and(called_off.map(drop))
}

/// What is done while flows wait.
struct Deed<'a> {
    turn: &'a Turn<'a>,
    what: Exchange,
    how: config::Exchange,
    hold: &'a Hold,
    waited: Waited,
    /// Whether there is something to take back.
    exchanged: bool,
}

impl Deed<'_> {
    async fn run(&mut self, job: &mut Context<'_>) -> Result<(), Failure> {
        let Turn { phase, to, slot, .. } = *self.turn;
        let begun = Instant::now();
        self.finish(job).await?;
        let finished = Instant::now();
        self.exchanged = true;
        job.attachment.exchange(self.what, slot).await.map_err(at(phase))?;
        let moved = Instant::now();
        let end = moved + CHECK.max(job.service.gate.timeout);
        let left = || self.left().min(end.saturating_duration_since(Instant::now()));
        quiesce::check(job, (phase, to, slot), &left)?;
        self.waited.finish_ms = ms(finished - begun);
        self.waited.move_ms = ms(moved - finished);
        self.waited.check_ms = ms(moved.elapsed());
        Ok(())
    }

    /// The flows of the side that gives it away end: those of one that is given back from are not waited for longer than that.
    async fn finish(&mut self, job: &mut Context<'_>) -> Result<(), Failure> {
        let Turn { phase, from, .. } = *self.turn;
        let gives_back = phase == Phase::GiveBack;
        let on_deadline = match self.how.on_deadline {
            Left::Abort if !gives_back => OnDeadline::Keep,
            Left::Abort | Left::Reset => OnDeadline::Reset,
        };
        let options = DrainOptions { deadline: Some(self.how.hold / 2), on_deadline };
        let (stop, watched) = (job.stop, job.watched.clone());
        let ends = || !gives_back && (stop() || watched.iter().any(|clone| !Context::has_room(clone)));
        let drained = job.attachment.drain_until(&options, &ends, |_| {}).await.map_err(at(phase))?;
        self.waited.reset = drained.reset;
        if drained.settled {
            return Ok(());
        }
        job.go_on(phase)?;
        let reason = format!(
            "{} flows of {} have not ended in {:?}; on_deadline = \"reset\" in [service.exchange] cuts them",
            drained.left,
            from.name(),
            self.how.hold / 2
        );
        Err(Failure { phase, reason, code: ExitCode::GateFailed })
    }

    fn left(&self) -> Duration {
        self.hold.left().saturating_sub(MARGIN)
    }
}
