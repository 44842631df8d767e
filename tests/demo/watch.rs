//! What the kernel saw, apart from the client and from patchswitch: resets on the uplink, retransmissions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::anyhow;
use patchswitch_load::clock;
use patchswitch_load::report::Window;
use patchswitch_tests::netlab::{self, Ns};
use patchswitch_tests::observe::{Capture, Counters, RESETS};

const SAMPLE: Duration = Duration::from_millis(200);

/// Starts to capture the resets of both directions.
pub(crate) fn resets() -> anyhow::Result<Capture> {
    Capture::start(netlab::UPLINK, RESETS)
}

/// Counts the segments that a namespace sent again, all the time.
#[derive(Debug)]
pub(crate) struct Retransmissions {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Samples>>,
}

/// A counter at some moments, in the order of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Samples(Vec<(u64, i64)>);

impl Retransmissions {
    pub(crate) fn start(client: &Ns) -> Self {
        let (client, stop) = (client.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let sample = move || {
            let mut samples = Samples::default();
            while !stopped.load(Ordering::Relaxed) {
                let count = Counters::here()?.get("Tcp.RetransSegs")?;
                samples.0.push((clock::now_ns(), count));
                std::thread::sleep(SAMPLE);
            }
            Ok(samples)
        };
        Self { stop, thread: std::thread::spawn(move || client.enter(sample)) }
    }

    pub(crate) fn stop(self) -> anyhow::Result<Samples> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_panic| anyhow!("the counting of retransmissions panicked"))?
    }
}

impl Samples {
    /// How many a second in a window, as exactly as the samples allow; none if they do not cover it.
    #[expect(clippy::cast_precision_loss, reason = "counts and times of one run stay far below 2^53")]
    pub(crate) fn per_second(&self, window: Window) -> Option<f64> {
        let from = self.0.iter().rev().find(|(time, _)| *time <= window.from_ns)?;
        let to = self.0.iter().find(|(time, _)| *time >= window.to_ns)?;
        let seconds = (to.0 - from.0) as f64 / 1e9;
        (seconds > 0.0).then(|| (to.1 - from.1) as f64 / seconds)
    }
}

#[cfg(test)]
impl Samples {
    /// Of seconds and counts.
    pub(crate) fn of(samples: &[(u64, i64)]) -> Self {
        Self(samples.iter().map(|(seconds, count)| (seconds * 1_000_000_000, *count)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_window() {
        let samples = Samples(
            (0..100)
                .map(|n| (n * 100_000_000, 3 + i64::try_from(n).unwrap().saturating_sub(49).max(0)))
                .collect(),
        );
        let rate = |from: u64, to: u64| {
            samples.per_second(Window { from_ns: from * 1_000_000_000, to_ns: to * 1_000_000_000 })
        };
        assert_eq!(rate(0, 4), Some(0.0));
        assert!((rate(5, 9).unwrap() - 10.0).abs() < 1e-9);
        assert_eq!(Samples::default().per_second(Window { from_ns: 0, to_ns: 1 }), None);
        assert_eq!(rate(3, 3), None);
    }
}
