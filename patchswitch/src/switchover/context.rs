//! What all phases of a job share: the journal, the report, and how a failure is told.

use std::fmt;
use std::time::Instant;

use serde::Serialize;
use serde_json::Value;

use super::Options;
use super::report::{ROLLBACK, Report};
use crate::attachment::{Attachment, Watching};
use crate::config::Service;
use crate::exit::ExitCode;
use crate::manager::{Manager, ManagerError, chain};
use crate::names::Name;
use crate::storage::cow::Watch;
use crate::storage::extend;
use crate::storage::snapshot::CloneOf;
use crate::store::{JobId, StepState};

/// A phase of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Find the standby (patent step 701).
    Plan,
    /// Copy the disks (703, 704).
    Clone,
    /// Look for what should not be there (702).
    Scan,
    /// Put patches, table and start script into the clone (705, 706).
    Inject,
    /// Start the standby in quarantine (707).
    Boot,
    /// The standby applies the patches (1201 to 1207).
    Patch,
    /// Restart it, so that they take effect (708).
    Restart,
    /// Check it (709).
    Verify,
    /// Remember flows that have no socket of their own.
    Arm,
    /// End the check of a single writer: the copy of its disk is thrown away, so that its steps 1301 to 1304 can follow.
    Quiesce,
    /// Give it the new flows (710, 2201 to 2204).
    TakeOver,
    /// Watch the service (2205).
    Observe,
    /// Wait until the old partition has no flow left (2206).
    Drain,
    /// Stop the old partition.
    Retire,
    /// Make the clone the disk.
    Commit,
    /// The switch in reverse.
    GiveBack,
}

impl Phase {
    /// Its name in the journal, in reports and on the screen.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Clone => "clone",
            Self::Scan => "scan",
            Self::Inject => "inject",
            Self::Boot => "boot",
            Self::Patch => "patch",
            Self::Restart => "restart",
            Self::Verify => "verify",
            Self::Arm => "arm",
            Self::Quiesce => "quiesce",
            Self::TakeOver => "take_over",
            Self::Observe => "observe",
            Self::Drain => "drain",
            Self::Retire => "retire",
            Self::Commit => "commit",
            Self::GiveBack => "give_back",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a phase did not end well.
#[derive(Debug)]
pub struct Failure {
    /// Which phase.
    pub phase: Phase,
    /// Why, with all causes.
    pub reason: String,
    /// The end of the command that follows from it, if the undo goes well.
    pub code: ExitCode,
}

/// The end of a job that did not go as planned.
#[derive(Debug, thiserror::Error)]
#[error("{phase} failed: {reason}\n  now: {now}")]
pub struct SwitchError {
    /// Which phase failed.
    pub phase: Phase,
    /// Why.
    pub reason: String,
    /// What is true now: who serves, and what was undone.
    pub now: String,
    /// Who serves.
    pub serving: Name,
    /// The end of the command.
    pub code: ExitCode,
}

/// A job under way.
pub struct Context<'a> {
    /// Partitions, services, the store.
    pub manager: &'a mut Manager,
    /// The service.
    pub service: Service,
    /// Its data path.
    pub attachment: Attachment,
    /// The job's number.
    pub job: JobId,
    /// Neighbours are watched as long as this is here. From the beginning: to open sockets and to have their filters
    /// compiled is work that is better done at any other time than at the switch.
    pub watching: Watching,
    /// What was asked for.
    pub options: Options,
    /// What was done, with its figures.
    pub report: Report,
    /// Clones that the service would lose.
    pub watched: Vec<Watched>,
    /// Whether it ends with something left to do that nobody but `up` can do: it stays open then.
    pub unfinished: bool,
    /// Whether somebody wants the job to end.
    pub stop: &'a (dyn Fn() -> bool + Sync),
    /// Says what is going on, for people.
    pub say: &'a dyn Fn(&str),
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("job", &self.job)
            .field("service", &self.service.name)
            .finish_non_exhaustive()
    }
}

/// A clone whose store can fill up, or that can be lost with a disk.
#[derive(Clone, Debug)]
pub struct Watched {
    of: CloneOf,
    extend: bool,
}

impl Context<'_> {
    /// From now on these clones are watched.
    pub(super) fn watch(&mut self, clones: Vec<CloneOf>) {
        let extend = self.manager.config.job.extend_stores;
        self.watched = clones.into_iter().map(|of| Watched { of, extend }).collect();
    }

    /// Whether the job goes on: nobody wants it to end, no clone is about to run out of room, and none is lost. Phases that take long
    /// ask this again and again. A rollback does not turn back to the clone that it is to take away.
    ///
    /// # Errors
    /// [`Failure`] with the code for a job that turns back in this phase.
    pub(super) fn go_on(&self, phase: Phase) -> Result<(), Failure> {
        if (self.stop)() {
            return Err(Failure { phase, reason: "interrupted".to_owned(), code: ExitCode::Interrupted });
        }
        let code = match phase {
            Phase::Plan | Phase::Clone | Phase::Scan | Phase::Inject | Phase::Boot | Phase::Patch => {
                ExitCode::PatchFailed
            }
            Phase::Restart | Phase::Verify | Phase::Arm | Phase::Quiesce | Phase::TakeOver => {
                ExitCode::GateFailed
            }
            _ => ExitCode::GivenBack,
        };
        if self.report.kind == ROLLBACK {
            return Ok(());
        }
        for clone in &self.watched {
            let name = &clone.of.clone;
            let larger = "define a standby with a larger --store, or without the option";
            let reason = match Self::room(clone).map_err(at(phase))? {
                Watch::Ample | Watch::Below { .. } => continue,
                Watch::TurnBack { percent } => format!("the store of {name} is {percent} % full; {larger}"),
                Watch::Full => format!("the store of {name} is full, and takes no more writes; {larger}"),
                Watch::Lost => format!(
                    "the clone {name} is lost: its store was full, or a disk below it failed, of which the kernel's log \
                     tells (dmesg)"
                ),
            };
            return Err(Failure { phase, reason, code });
        }
        Ok(())
    }

    /// Whether a clone can neither be read nor written any more.
    pub(super) fn is_lost(&self) -> bool {
        self.watched.iter().any(|clone| matches!(Self::room(clone), Ok(Watch::Lost)))
    }

    /// Whether a clone takes no more writes. What it has can be read, but its file system may have given up.
    pub(super) fn is_full(&self) -> bool {
        self.watched.iter().any(|clone| matches!(Self::room(clone), Ok(Watch::Full)))
    }

    /// Whether all clones have room.
    pub(super) fn have_room(&self) -> bool {
        self.watched.iter().all(Self::has_room)
    }

    /// Whether a clone has room; what cannot be told is no reason to turn back.
    pub(super) fn has_room(clone: &Watched) -> bool {
        !matches!(Self::room(clone), Ok(Watch::TurnBack { .. } | Watch::Full | Watch::Lost))
    }

    fn room(clone: &Watched) -> Result<Watch, ManagerError> {
        Ok(extend::keep_room(&Manager::dm()?, &clone.of, clone.extend)?)
    }

    /// One step: intent in the journal, the act, the outcome in the journal; with its time in the report.
    ///
    /// # Errors
    /// [`Failure`] of the act, of the journal, or because somebody wants the job to end.
    pub(super) async fn step<T>(
        &mut self,
        phase: Phase,
        intent: Value,
        act: impl AsyncFnOnce(&mut Self) -> Result<(T, Value), Failure>,
    ) -> Result<T, Failure> {
        if !matches!(phase, Phase::GiveBack | Phase::Retire | Phase::Commit) {
            self.go_on(phase)?;
        }
        self.step_to_the_end(phase, intent, act).await
    }

    /// As [`Self::step`], for one that there is no way back from: nobody is asked whether it is wanted.
    ///
    /// # Errors
    /// [`Failure`] of the act, or of the journal.
    pub(super) async fn step_to_the_end<T>(
        &mut self,
        phase: Phase,
        intent: Value,
        act: impl AsyncFnOnce(&mut Self) -> Result<(T, Value), Failure>,
    ) -> Result<T, Failure> {
        (self.say)(&format!("{phase} …"));
        let step = self.manager.store.intend(self.job, phase.name(), &intent).map_err(at(phase))?;
        let start = Instant::now();
        let result = act(self).await;
        let seconds = start.elapsed().as_secs_f64();
        self.report.phase(phase, seconds);
        let (state, outcome) = match &result {
            Ok((_, outcome)) => (StepState::Done, outcome.clone()),
            Err(failure) => (StepState::Failed, serde_json::json!({"reason": failure.reason})),
        };
        let noted = self.manager.store.conclude(step, state, &outcome).map_err(at(phase));
        match (result, noted) {
            (Ok((value, _)), Ok(_)) => {
                (self.say)(&format!("{phase} done in {seconds:.2} s{}", details(&outcome)));
                Ok(value)
            }
            (Ok(_), Err(failure)) | (Err(failure), _) => Err(failure),
        }
    }
}

/// An outcome, in words.
fn details(outcome: &Value) -> String {
    let Some(fields) = outcome.as_object().filter(|fields| !fields.is_empty()) else { return String::new() };
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let fields: Vec<_> = fields.iter().map(|(key, value)| format!("{key} {}", word(value))).collect();
    format!(": {}", fields.join(", "))
}

/// Turns an error into a failure of a phase, with the error's own exit code.
pub(super) fn at<E: Into<ManagerError>>(phase: Phase) -> impl FnOnce(E) -> Failure {
    move |error| {
        let error = error.into();
        Failure { phase, code: error.exit_code(), reason: chain(&error) }
    }
}

/// Turns an error into a failure of a phase, with this exit code.
pub(super) fn with<E: std::error::Error>(phase: Phase, code: ExitCode) -> impl FnOnce(E) -> Failure {
    move |error| Failure { phase, code, reason: chain(&error) }
}
