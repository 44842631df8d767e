//! The gate before the switch: everything healthy, several times in a row, within a deadline.

use std::time::{Duration, Instant};

use super::{CannotTell, Reach, Target, round};
use crate::config::Gate;
use crate::exit::ExitCode;

/// How often a wait looks whether it should end.
const STEP: Duration = Duration::from_millis(20);

/// The gate was passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Rounds that were made, good and bad.
    pub rounds: u32,
    /// How long it took.
    pub after: Duration,
}

/// The gate was not passed.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// It was not healthy often enough in a row.
    #[error(
        "not healthy {need} times in a row within {deadline:?} (at most {best} of {rounds} rounds): {last}"
    )]
    Unhealthy {
        /// How many were needed.
        need: u32,
        /// The most there were.
        best: u32,
        /// All rounds.
        rounds: u32,
        /// The time there was.
        deadline: Duration,
        /// The last failure.
        last: String,
    },
    /// The last word was that nothing could be found out.
    #[error("failed to find out within {deadline:?} whether it is healthy")]
    CannotTell {
        /// The time there was.
        deadline: Duration,
        /// Why the last probe found nothing out.
        #[source]
        source: CannotTell,
    },
    /// The caller wanted no more.
    #[error("interrupted while waiting for it to be healthy")]
    Stopped,
}

impl GateError {
    /// [`ExitCode::GateFailed`]: without an answer nothing is switched either.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Unhealthy { .. } | Self::CannotTell { .. } => ExitCode::GateFailed,
            Self::Stopped => ExitCode::Interrupted,
        }
    }
}

/// Waits until every probe has passed `need` times in a row.
///
/// `stop` is asked some fifty times a second and between rounds.
///
/// # Errors
/// [`GateError`].
pub fn gate(
    target: Target<'_>,
    spec: &Gate,
    reach: Reach<'_>,
    stop: &dyn Fn() -> bool,
) -> Result<Passed, GateError> {
    let start = Instant::now();
    let end = start + spec.deadline;
    let (mut rounds, mut row, mut best) = (0, 0, 0);
    let mut last = Err("no round was made".to_owned());
    loop {
        let begun = Instant::now();
        let left = end.saturating_duration_since(begun);
        if left.is_zero() {
            break;
        }
        if stop() {
            return Err(GateError::Stopped);
        }
        let mut round = round(target, reach, spec.timeout.min(left));
        rounds += 1;
        row = if round.passed() { row + 1 } else { 0 };
        best = best.max(row);
        if row >= spec.need {
            return Ok(Passed { rounds, after: start.elapsed() });
        }
        // A round that the deadline cut short only says that time was over; the reason is what was said before.
        if rounds == 1 || left >= spec.timeout {
            if !round.failures.is_empty() {
                last = Err(round.failures.join("; "));
            } else if let Some(unknown) = round.unknown.pop() {
                last = Ok(unknown);
            }
        }
        if !pause(begun + spec.every, end, stop) {
            return Err(GateError::Stopped);
        }
    }
    let deadline = spec.deadline;
    Err(match last {
        Ok(source) => GateError::CannotTell { deadline, source },
        Err(last) => GateError::Unhealthy { need: spec.need, best, rounds, deadline, last },
    })
}

/// Waits until the time has come, or the end; false if the caller wants no more.
pub(super) fn pause(until: Instant, end: Instant, stop: &dyn Fn() -> bool) -> bool {
    loop {
        let left = until.min(end).saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        if stop() {
            return false;
        }
        std::thread::sleep(left.min(STEP));
    }
}
