//! Quiesce: a service with one writer goes over with its disk, while new flows wait (the patent's steps 1301 to 1304 and 1501
//! to 1505, without a request that is refused).
//!
//! ```text
//!  verified ─► the copy is      ─► HOLD ─► finish, stop ─► disk ─► start, check ─► RELEASE ─► observe …
//!              thrown away, the     │        old          moves       new            │
//!              commands get ready   └ new flows wait                                 └ in their order
//!                 any of them fails: start, at the old one again, and release to it
//! ```
//!
//! Back it is the same with the roles exchanged, and nothing that was written is lost: the disk goes back as it is. Only before the
//! release, when no client has written yet, the old side goes on with the disk as it was when it ended.

use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::word::Phase as WordPhase;
use serde::Serialize;

use super::Context;
use super::context::{Failure, Phase, at};
use super::verify::inside;
use crate::attachment::{AttachError, Attachment, DrainOptions, Hold, OnDeadline, Pumped, SwitchOptions};
use crate::config::{Quiesce, Service, Strategy};
use crate::exit::ExitCode;
use crate::host::linux::runtime::Ready;
use crate::manager::{Machine, Manager, ManagerError, Moved, chain, slot_of};
use crate::partition::lifecycle::longest_stop;
use crate::storage::copies::Copies;
use crate::store::JobId;
use crate::verify::{CannotTell, CommandEnd, Reach, Target, round};

/// How much longer flows may wait than the deed may take: what comes after it is done by then.
pub(super) const MARGIN: Duration = Duration::from_secs(2);
/// Here even longer: whoever is killed or lets a disk go at the end of its time has five seconds for that.
const LONGER: Duration = Duration::from_secs(MARGIN.as_secs() + 5);
/// How long a connection may take to end whose server has ended.
const MOMENT: Duration = Duration::from_secs(1);
/// What is put back may take at least so long, whatever is left of the time.
const PUT_BACK: Duration = Duration::from_secs(30);

/// How long new flows waited, and for what. Times are in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Waited {
    /// Until what clients did had ended.
    pub finish_ms: f64,
    /// Until the server had ended.
    pub stop_ms: f64,
    /// Until the disk, the device or the address was at the other partition.
    pub move_ms: f64,
    /// Until the server was there again.
    pub start_ms: f64,
    /// Until its probes had passed.
    pub check_ms: f64,
    /// Flows that were reset because they had not ended in their time.
    pub reset: usize,
    /// What waited.
    pub flows: Pumped,
}

/// From whom to whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handing<'a> {
    /// The phase in which it happens.
    pub(super) phase: Phase,
    pub(super) from: &'a Machine,
    pub(super) to: &'a Machine,
    /// The slot of the one that gets it.
    pub(super) slot: Slot,
    /// The job that patched the clone of the two.
    pub(super) patched: Option<JobId>,
}

/// The strategy's commands, if it is this one.
pub(super) fn commands(service: &Service) -> Option<&Quiesce> {
    match &service.strategy {
        Strategy::Quiesce(quiesce) => Some(quiesce),
        Strategy::Takeover | Strategy::Device(_) | Strategy::Address(_) | Strategy::Letter => None,
    }
}

/// Ends the server of a partition that was only checked, and takes the copy away on which that was done.
pub(super) fn end_check(job: &mut Context<'_>, standby: &Machine, how: &Quiesce) -> Result<(), Failure> {
    run(job, standby, &how.stop, how.hold).map_err(|why| failed(Phase::Quiesce, standby, "stop", why))?;
    job.manager.take_disks(standby).map_err(at(Phase::Quiesce))
}

/// Has new flows wait, hands the service over with its disks, and lets them go. The two as they are then.
///
/// # Errors
/// [`Failure`]; the one that had the service has it again, unless the failure's code is [`ExitCode::GiveBackFailed`].
pub(super) async fn hand_over(
    job: &mut Context<'_>,
    how: &Quiesce,
    handing: Handing<'_>,
    mut copies: Option<Copies<'_>>,
) -> Result<(Machine, Machine, Waited), Failure> {
    let Handing { phase, to, slot, patched, .. } = handing;
    settle(job).await.map_err(at(phase))?;
    // Before anybody waits.
    let commands = Commands::prepare(job, how, &handing)?;
    if let Some(copies) = &mut copies {
        super::copies::catch_up(job, phase, copies)?;
    }
    let options = SwitchOptions { despite_losses: true, ..SwitchOptions::default() };
    let mut hold = job.attachment.hold(slot, how.hold + LONGER, options).await.map_err(at(phase))?;
    let mut deed = Deed { handing, how, hold: &mut hold, late: None, waited: Waited::default(), moved: None };
    match deed.run(job, commands, copies) {
        Ok((old, new)) => {
            let mut waited = deed.waited;
            // The switch is made, whatever becomes of this.
            let released = job.attachment.release(hold).await.map_err(at(phase));
            if let Some(patched) = patched {
                super::turn::applied(job.manager, patched, to.is_clone())
                    .map_err(|error| at(phase)(ManagerError::from(error)))?;
            }
            waited.flows = released?;
            Ok((old, new, waited))
        }
        Err(failure) => {
            let moved = deed.moved.take();
            let undone = put_back(job, how, handing, (moved, &mut hold));
            let called_off = job.attachment.call_off(hold).await.map_err(at(phase));
            match undone.and(called_off) {
                Ok(_) => Err(failure),
                Err(second) => {
                    let reason = format!("{}; putting back failed: {}", failure.reason, second.reason);
                    Err(Failure { reason, code: ExitCode::GiveBackFailed, ..failure })
                }
            }
        }
    }
}

/// An earlier switch is over when this one begins: what its old side still has to send, it sends within a moment, since its server
/// has ended.
pub(super) async fn settle(job: &mut Context<'_>) -> Result<(), AttachError> {
    if job.attachment.plane().word().phase() == WordPhase::Draining {
        let options = DrainOptions { deadline: Some(MOMENT), on_deadline: OnDeadline::Keep };
        let _ = job.attachment.drain(&options, |_| {}).await?;
    }
    job.attachment.settle()
}

/// The strategy's commands, in their partitions, waiting for the word: a program takes a while to get there.
struct Commands {
    /// None if nothing runs that could be ended. Of one that is given back it does not matter if it cannot be.
    ending: Option<Result<Ending, Failure>>,
    start: Ready,
}

struct Ending {
    finish: Option<Ready>,
    stop: Ready,
}

impl Commands {
    fn prepare(job: &Context<'_>, how: &Quiesce, handing: &Handing<'_>) -> Result<Self, Failure> {
        let Handing { phase, from, to, .. } = *handing;
        let prepare = |what: &str, machine: &Machine, command: &str| {
            let why = |error: &dyn std::error::Error| Failure {
                reason: format!("{what} cannot be run in {}: {}", machine.name(), chain(error)),
                phase,
                // Nobody has waited yet, and nothing was ended.
                code: if phase == Phase::GiveBack { ExitCode::GivenBack } else { ExitCode::GateFailed },
            };
            let mounts = Manager::mounts().map_err(|error| why(&error))?;
            let runtime = job.manager.runtime();
            let ready = mounts.run(|inside| runtime.prepare(inside, machine.name().as_str(), command));
            ready.map_err(|error| why(&error))?.map_err(|error| why(&error))
        };
        let start = prepare("start", to, &how.start)?;
        if !job.manager.is_running(from).map_err(at(phase))? {
            return Ok(Self { ending: None, start });
        }
        let finish = || how.finish.as_ref().map(|command| prepare("finish", from, command)).transpose();
        let ending =
            finish().and_then(|finish| Ok(Ending { finish, stop: prepare("stop", from, &how.stop)? }));
        match ending {
            Err(failure) if phase != Phase::GiveBack => Err(failure),
            ending => Ok(Self { ending: Some(ending), start }),
        }
    }
}

/// Flows may wait for so long from now on, and for as much longer as ever.
fn wait_longer(job: &Context<'_>, hold: &mut Hold, limit: Duration) {
    if let Err(error) = job.attachment.hold_longer(hold, limit + LONGER) {
        tracing::warn!("new flows may not wait for longer: {}", chain(&error));
    }
}

/// What is done while flows wait.
struct Deed<'a> {
    handing: Handing<'a>,
    how: &'a Quiesce,
    hold: &'a mut Hold,
    /// Until when what is given back may take, whether flows still wait or not.
    late: Option<Instant>,
    waited: Waited,
    /// The two, once the disks have gone over.
    moved: Option<(Machine, Machine)>,
}

impl Deed<'_> {
    /// In its order; nobody else has the disk at any moment.
    fn run(
        &mut self,
        job: &mut Context<'_>,
        commands: Commands,
        copies: Option<Copies<'_>>,
    ) -> Result<(Machine, Machine), Failure> {
        let Handing { phase, from, to, .. } = self.handing;
        let Commands { ending, start } = commands;
        let (begun, mut finished) = (Instant::now(), None);
        let ended = match ending {
            Some(ending) => ending.and_then(|ending| self.end(job, ending, &mut finished)),
            // One that has died has nothing to end, and gives its disk away all the same.
            None => Ok(()),
        };
        match ended {
            // What is given back is to be discarded, and gives its disk away whether it can still end or not.
            Err(failure) if phase == Phase::GiveBack => {
                tracing::warn!("{}; the partition is stopped", failure.reason);
                // It may have used up all of the time, and may take its own to be stopped.
                wait_longer(
                    job,
                    self.hold,
                    longest_stop(from.spec(), job.manager.config.job.stop) + self.how.hold,
                );
                job.manager.stop(from).map_err(at(phase))?;
                self.late = Some(Instant::now() + self.how.hold);
            }
            // It has died meanwhile: as one that had died before.
            Err(failure) if !job.manager.is_running(from).map_err(at(phase))? => {
                tracing::warn!("{}; the partition has ended", failure.reason);
            }
            ended => ended?,
        }
        let stopped = Instant::now();
        self.in_time("the disks are taken")?;
        job.manager.take_disks(from).map_err(at(phase))?;
        let service = job.service.name.clone();
        let Moved { from: old, to: new, accounts } =
            job.manager.move_disks(&service, from, to, copies).map_err(at(phase))?;
        job.report.copies.extend(accounts);
        self.moved = Some((old.clone(), new.clone()));
        job.manager.give_disks(&new).map_err(at(phase))?;
        let moved = Instant::now();
        self.command(job, &new, "start", start)?;
        let started = Instant::now();
        check(job, (phase, &new, self.handing.slot), &|| self.left())?;
        let finished = finished.unwrap_or(begun);
        self.waited.finish_ms = ms(finished - begun);
        self.waited.stop_ms = ms(stopped - finished);
        self.waited.move_ms = ms(moved - stopped);
        self.waited.start_ms = ms(started - moved);
        self.waited.check_ms = ms(started.elapsed());
        Ok((old, new))
    }

    /// What clients do, and the server; when the former had ended.
    fn end(
        &self,
        job: &Context<'_>,
        Ending { finish, stop }: Ending,
        finished: &mut Option<Instant>,
    ) -> Result<(), Failure> {
        let from = self.handing.from;
        if let Some(finish) = finish {
            self.command(job, from, "finish", finish)?;
            *finished = Some(Instant::now());
        }
        self.command(job, from, "stop", stop)
    }

    fn command(&self, job: &Context<'_>, at: &Machine, what: &str, command: Ready) -> Result<(), Failure> {
        let phase = self.handing.phase;
        go_on(job, phase)?;
        self.in_time(&format!("{what} in {}", at.name()))?;
        let done = command.run(self.left()).map(|done| CommandEnd::Exited(done.code, done.stderr));
        let why = not_done(done.map_err(|error| CannotTell::Inside(Box::new(error))));
        why.map_or(Ok(()), |why| Err(failed(phase, at, what, why)))
    }

    /// Nothing is begun that would have to be ended at once.
    fn in_time(&self, before: &str) -> Result<(), Failure> {
        if !self.left().is_zero() {
            return Ok(());
        }
        let reason = format!("the time for which new flows wait was over before {before}");
        Err(Failure { phase: self.handing.phase, reason, code: ExitCode::GivenBack })
    }

    fn left(&self) -> Duration {
        let late = self.late.map(|late| late.saturating_duration_since(Instant::now()));
        self.hold.left().saturating_sub(LONGER).max(late.unwrap_or_default())
    }
}

/// Whoever had the service gets it again: with its disk as it was when it ended, if it had given that away for the first time.
fn put_back(
    job: &mut Context<'_>,
    how: &Quiesce,
    Handing { phase, from, .. }: Handing<'_>,
    (moved, hold): (Option<(Machine, Machine)>, &mut Hold),
) -> Result<(), Failure> {
    let service = job.service.name.clone();
    let from = match moved {
        None => from.clone(),
        Some((old, new)) => {
            // It may not have begun at all; and one that does not end must not go on with the disk.
            if let Err(why) = end(job, (how, &new), hold) {
                tracing::warn!("{}; the partition is stopped", failed(phase, &new, "stop", why).reason);
                wait_longer(job, hold, longest_stop(new.spec(), job.manager.config.job.stop));
                job.manager.stop(&new).map_err(at(phase))?;
            }
            job.manager.take_disks(&new).map_err(at(phase))?;
            // When the time is over clients may have written to the new side: what they wrote is not given up.
            let keeps = phase != Phase::GiveBack && !hold.left().is_zero();
            let again = match keeps {
                true => job.manager.give_up(&service, &old),
                false => job.manager.move_disks(&service, &new, &old, None).map(|moved| moved.to),
            };
            again.map_err(at(phase))?
        }
    };
    job.manager.give_disks(&from).map_err(at(phase))?;
    begin_again(job, how, (phase, &from), hold)
}

/// The server of whoever has the service again. One that was told to end, and has not in its time, may be at it still: it begins when
/// it has ended, or with its partition. Each step has a time of its own, for which clients wait as well.
fn begin_again(
    job: &mut Context<'_>,
    how: &Quiesce,
    (phase, from): (Phase, &Machine),
    hold: &mut Hold,
) -> Result<(), Failure> {
    let begin = |job: &Context<'_>, hold: &mut Hold| {
        let limit = PUT_BACK.max(how.hold);
        wait_longer(job, hold, limit);
        run(job, from, &how.start, limit).map_err(|why| failed(phase, from, "start", why))
    };
    let Err(failure) = begin(job, hold) else { return Ok(()) };
    tracing::warn!("{}; it is ended first", failure.reason);
    if let Err(why) = end(job, (how, from), hold) {
        tracing::warn!("{}; the partition is started anew", failed(phase, from, "stop", why).reason);
        let limit = job.manager.config.job.restart;
        wait_longer(job, hold, longest_stop(from.spec(), job.manager.config.job.stop) + limit);
        let mut running = job.manager.restart(from, false).map_err(at(phase))?;
        Manager::wait_started(&mut running, from, limit).map_err(at(phase))?;
        job.manager.give_disks(from).map_err(at(phase))?;
    }
    begin(job, hold)
}

/// Ends the server of who was to have the service, or has it again; clients wait for as long as that may take.
fn end(job: &Context<'_>, (how, machine): (&Quiesce, &Machine), hold: &mut Hold) -> Result<(), String> {
    wait_longer(job, hold, PUT_BACK);
    run(job, machine, &how.stop, PUT_BACK)
}

/// What is given back is given back, also if nobody wants the job any more.
fn go_on(job: &Context<'_>, phase: Phase) -> Result<(), Failure> {
    match phase {
        Phase::GiveBack => Ok(()),
        phase => job.go_on(phase),
    }
}

/// The probes of who gets the service pass once, through its own link, in the time that is left.
pub(super) fn check(
    job: &Context<'_>,
    (phase, new, slot): (Phase, &Machine, Slot),
    left: &dyn Fn() -> Duration,
) -> Result<(), Failure> {
    let prober = job.attachment.prober(slot).map_err(at(phase))?;
    let open = |address| prober.socket(address);
    let run = inside(job.manager, new);
    let target = Target { addresses: &job.service.addresses, probes: &job.service.probes };
    loop {
        let timeout = job.service.gate.timeout.min(left());
        let round = round(target, Reach { open: &open, run: &run }, timeout);
        if round.passed() {
            return Ok(());
        }
        if left() <= job.service.gate.every {
            return Err(failed(phase, new, "check", round.failures.join("; ")));
        }
        go_on(job, phase)?;
        std::thread::sleep(job.service.gate.every);
    }
}

/// After a kill or a boot: the service has its disks at the partition that the store says, and serves there.
///
/// What waits is waited for: flows that were held go to whoever serves when their time is over.
pub(crate) async fn reunite(
    manager: &mut Manager,
    settings: &Service,
    attachment: &mut Attachment,
) -> Result<(), ManagerError> {
    let Some(how) = commands(settings) else {
        // Whoever was killed while flows waited for something else had given them to the new side already.
        return match settings.strategy.hold() {
            Some(_) => Ok(attachment.await_hold().await?),
            None => Ok(()),
        };
    };
    let serving = manager.active(settings)?;
    if let Some(other) = manager.other(&settings.name)? {
        manager.tidy_moves(&serving, &other)?;
    }
    if manager.is_running(&serving)? {
        manager.give_disks(&serving)?;
        let ended = inside(manager, &serving)(&how.start, PUT_BACK.max(how.hold));
        if let Some(why) = not_done(ended) {
            let name = serving.name();
            return Err(ManagerError::refused(format!("the start command failed in {name}: {why}")));
        }
    }
    if let Some(slot) = slot_of(attachment, &serving)
        && attachment.plane().word().active() != slot
    {
        let options = SwitchOptions { despite_losses: true, ..SwitchOptions::default() };
        let _ = attachment.switch_with(slot, options).await?;
    }
    Ok(attachment.await_hold().await?)
}

fn run(job: &Context<'_>, machine: &Machine, command: &str, limit: Duration) -> Result<(), String> {
    match not_done(inside(job.manager, machine)(command, limit)) {
        Some(why) => Err(why),
        None => Ok(()),
    }
}

fn not_done(ended: Result<CommandEnd, CannotTell>) -> Option<String> {
    match ended {
        Ok(CommandEnd::Exited(0, _)) => None,
        Ok(CommandEnd::Exited(code, said)) => {
            let said = said.trim();
            Some(if said.is_empty() {
                format!("exit status {code}")
            } else {
                format!("exit status {code}: {said}")
            })
        }
        Ok(CommandEnd::Killed(signal)) => Some(format!("signal {signal}")),
        Ok(CommandEnd::TimedOut) => Some("it did not end in its time".to_owned()),
        Err(CannotTell::Inside(error)) => Some(chain(error.as_ref())),
        Err(error) => Some(chain(&error)),
    }
}

fn failed(phase: Phase, machine: &Machine, what: &str, why: String) -> Failure {
    let reason = format!("{what} failed in {}: {why}", machine.name());
    // Nobody waited for the check.
    let code = if phase == Phase::Quiesce { ExitCode::GateFailed } else { ExitCode::GivenBack };
    Failure { phase, reason, code }
}

pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
