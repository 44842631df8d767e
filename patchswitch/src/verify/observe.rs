//! The watch after the switch: some failures are noise, several among the last few are a reason to give back.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::Round;
use super::gate::pause;
use crate::config::Observe;

/// The last few rounds. It asks for a give-back at `fail` failures among `of`.
#[derive(Clone, Debug)]
pub struct Window {
    rounds: VecDeque<bool>,
    fail: usize,
    of: usize,
}

impl Window {
    /// An empty window; `fail` is at least 1 and at most `of`, or it never or always asks.
    pub fn new(fail: u32, of: u32) -> Self {
        let size = |number| usize::try_from(number).unwrap_or(usize::MAX);
        Self { rounds: VecDeque::new(), fail: size(fail), of: size(of) }
    }

    /// Adds a round; whether the service should be given back.
    pub fn push(&mut self, passed: bool) -> bool {
        self.rounds.push_back(passed);
        while self.rounds.len() > self.of {
            self.rounds.pop_front();
        }
        self.rounds.iter().filter(|passed| !**passed).count() >= self.fail
    }
}

/// How the watch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// The time is over and the service is healthy.
    Fine,
    /// Too many failures.
    Failing {
        /// From the beginning of the watch to its first failure.
        first: Duration,
        /// From the beginning to now.
        after: Duration,
        /// What the last round complained of.
        reason: String,
    },
    /// The caller wanted no more.
    Stopped,
}

/// Watches the service. `check` makes one round, whatever belongs to it: probes, counters of the data path. A round
/// that found nothing out does not count: it is no reason to switch, in either direction.
pub fn watch(spec: &Observe, mut check: impl FnMut() -> Round, stop: &dyn Fn() -> bool) -> Watched {
    let start = Instant::now();
    let end = start + spec.length;
    let mut window = Window::new(spec.fail, spec.of);
    let mut first = None;
    loop {
        let begun = Instant::now();
        if begun >= end {
            return Watched::Fine;
        }
        if stop() {
            return Watched::Stopped;
        }
        let round = check();
        let failed = !round.failures.is_empty();
        if failed {
            first.get_or_insert(start.elapsed());
        }
        if (failed || round.passed()) && window.push(!failed) {
            return Watched::Failing {
                first: first.unwrap_or_default(),
                after: start.elapsed(),
                reason: round.failures.join("; "),
            };
        }
        if !pause(begun + spec.every, end, stop) {
            return Watched::Stopped;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::CannotTell;
    use super::*;

    #[test]
    fn the_window_asks_at_the_right_failure_and_forgets_old_ones() {
        let mut window = Window::new(2, 3);
        let asked: Vec<bool> = [false, true, true, false, true, true, false, true, false]
            .map(|passed| window.push(passed))
            .into();
        assert_eq!(asked, [false, false, false, false, false, false, false, false, true]);
    }

    fn spec(length_ms: u64) -> Observe {
        let length = Duration::from_millis(length_ms);
        Observe { length, every: Duration::from_millis(5), fail: 2, of: 4 }
    }

    fn failing() -> Round {
        Round { failures: vec!["no answer".to_owned()], unknown: Vec::new() }
    }

    #[test]
    fn failures_end_the_watch_and_health_lasts_to_its_end() {
        match watch(&spec(10_000), failing, &|| false) {
            Watched::Failing { first, after, reason } => {
                assert!(first <= after && after < Duration::from_secs(2));
                assert_eq!(reason, "no answer");
            }
            other => panic!("{other:?}"),
        }
        let start = Instant::now();
        assert_eq!(watch(&spec(60), Round::default, &|| false), Watched::Fine);
        assert!(start.elapsed() >= Duration::from_millis(60));
    }

    #[test]
    fn a_round_without_an_answer_is_neither_good_nor_bad() {
        let unknown = || Round { failures: Vec::new(), unknown: vec![CannotTell::NoCommand(127)] };
        assert_eq!(watch(&spec(60), unknown, &|| false), Watched::Fine);
        // Two failures with silence between them are two failures.
        let mut rounds = [failing(), unknown(), unknown(), unknown(), unknown(), failing()].into_iter();
        let watched = watch(&spec(10_000), || rounds.next().unwrap_or_default(), &|| false);
        assert!(matches!(watched, Watched::Failing { .. }));
    }

    #[test]
    fn the_caller_can_end_the_watch() {
        let start = Instant::now();
        let spec = Observe { every: Duration::from_secs(60), ..spec(60_000) };
        let stopped = watch(&spec, Round::default, &|| start.elapsed() > Duration::from_millis(50));
        assert_eq!(stopped, Watched::Stopped);
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
