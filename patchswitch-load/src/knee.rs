//! Where the service stops keeping up: short open-loop bursts at rising rates.
//!
//! A rate is sustained if nothing failed and the 95th percentile of the latency stayed near that of the first, low
//! rate. An open loop shows the knee sharply: beyond it the queue, and with it the latency, grows until the burst
//! ends.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::client::{self, LoadError, Settings};
use crate::record::Class;

/// The demo's rate is this part of the knee…
const PART: f64 = 0.3;
/// …but not less than this many requests a second.
const LEAST: f64 = 200.0;
/// A latency up to this is never a sign of a queue, in milliseconds.
const ALWAYS_FINE_MS: f64 = 30.0;
/// Nor is one up to this multiple of the first burst's.
const FACTOR: f64 = 5.0;
/// How quickly the rate rises.
const STEP: f64 = 1.6;

/// How to search.
#[derive(Clone, Debug, PartialEq)]
pub struct KneeSettings {
    /// The first rate.
    pub first: f64,
    /// The highest rate that is tried.
    pub highest: f64,
    /// The length of a burst.
    pub burst: Duration,
    /// How often the interval between the last sustained and the first unsustained rate is halved.
    pub halvings: u32,
}

impl Default for KneeSettings {
    fn default() -> Self {
        Self { first: 100.0, highest: 20_000.0, burst: Duration::from_millis(700), halvings: 2 }
    }
}

/// One burst.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Burst {
    /// Requests a second.
    pub rate: f64,
    /// Requests made.
    pub requests: u64,
    /// Of these, failed.
    pub failed: u64,
    /// Median latency.
    pub p50_ms: Option<f64>,
    /// 95th percentile of the latency.
    pub p95_ms: Option<f64>,
    /// Whether the service kept up.
    pub sustained: bool,
}

/// The knee and how it was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Knee {
    /// The highest rate that was sustained, in requests a second; none if not even the first was.
    pub rate: Option<f64>,
    /// All bursts in turn.
    pub bursts: Vec<Burst>,
}

impl Knee {
    /// The rate of the demo and of the tests under load.
    pub fn demo_rate(&self) -> f64 {
        self.rate.map_or(LEAST, |rate| (rate * PART).max(LEAST))
    }
}

/// Finds the knee of a service. Takes a few seconds, and loads it fully for some of them.
///
/// # Errors
/// [`LoadError`] if a burst could not be made.
pub fn measure(load: &Settings, search: &KneeSettings) -> Result<Knee, LoadError> {
    search_with(search, |rate, reference| {
        let settings = Settings {
            rate,
            udp_rate: 0.0,
            download: None,
            idle: false,
            duration: Some(search.burst),
            until_file: None,
            // Enough that the pool is not the knee.
            connections: load.connections.max(32),
            ..load.clone()
        };
        let (_, orders) = tokio::sync::mpsc::unbounded_channel();
        let run = client::run(settings, orders)?;
        let mut latencies: Vec<u32> = Vec::new();
        for series in run.answers.iter().filter(|s| matches!(s.class, Class::Keepalive | Class::New)) {
            latencies.extend(series.iter().map(|answer| answer.latency_us));
        }
        Ok(judge(rate, latencies, run.failures.len() as u64, reference))
    })
}

fn judge(rate: f64, mut latencies: Vec<u32>, failed: u64, reference: Option<f64>) -> Burst {
    latencies.sort_unstable();
    let requests = latencies.len() as u64 + failed;
    let at = |percent: usize| {
        let index = (latencies.len() * percent).div_ceil(100).checked_sub(1)?;
        latencies.get(index).map(|us| f64::from(*us) / 1000.0)
    };
    let (p50_ms, p95_ms) = (at(50), at(95));
    let limit = reference.map_or(ALWAYS_FINE_MS, |first| (first * FACTOR).max(ALWAYS_FINE_MS));
    let sustained = failed == 0 && p95_ms.is_some_and(|p95| p95 <= limit);
    Burst { rate, requests, failed, p50_ms, p95_ms, sustained }
}

fn search_with(
    search: &KneeSettings,
    mut burst: impl FnMut(f64, Option<f64>) -> Result<Burst, LoadError>,
) -> Result<Knee, LoadError> {
    let mut bursts = Vec::new();
    let (mut good, mut bad, mut reference) = (None, None, None);
    let mut rate = search.first;
    while bad.is_none() && rate <= search.highest {
        // One bad burst may be somebody else's doing: it is tried once more.
        let mut result = burst(rate, reference)?;
        if !result.sustained {
            bursts.push(result);
            result = burst(rate, reference)?;
        }
        reference = reference.or(result.p95_ms);
        bursts.push(result);
        match result.sustained {
            true => good = Some(rate),
            false => bad = Some(rate),
        }
        rate *= STEP;
    }
    for _ in 0..search.halvings {
        let (Some(low), Some(high)) = (good, bad) else { break };
        let middle = f64::midpoint(low, high);
        let result = burst(middle, reference)?;
        bursts.push(result);
        match result.sustained {
            true => good = Some(middle),
            false => bad = Some(middle),
        }
    }
    Ok(Knee { rate: good, bursts })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn knee_of(capacity: f64, hiccup: Option<usize>) -> Knee {
        let mut count = 0;
        let burst = |rate, _| {
            count += 1;
            let sustained = rate <= capacity && Some(count) != hiccup;
            Ok(Burst { rate, requests: 1, failed: 0, p50_ms: Some(1.0), p95_ms: Some(2.0), sustained })
        };
        search_with(&KneeSettings::default(), burst).unwrap()
    }

    #[test]
    fn the_knee_is_found_from_below_within_a_sixth() {
        for capacity in [100.0, 137.0, 500.0, 3333.0] {
            let rate = knee_of(capacity, None).rate.unwrap();
            assert!(rate <= capacity && rate >= capacity * 0.84, "{rate} of {capacity}");
        }
        assert_eq!(knee_of(50.0, None).rate, None);
    }

    #[test]
    fn one_hiccup_is_not_the_knee() {
        assert_eq!(knee_of(500.0, Some(2)).rate, knee_of(500.0, None).rate);
    }

    #[test]
    fn the_rate_of_the_demo_has_a_floor() {
        let knee = |rate| Knee { rate, bursts: Vec::new() };
        assert!((knee(Some(2000.0)).demo_rate() - 600.0).abs() < 1e-9);
        assert!((knee(Some(400.0)).demo_rate() - 200.0).abs() < 1e-9);
        assert!((knee(None).demo_rate() - 200.0).abs() < 1e-9);
    }

    #[test]
    fn a_queue_or_a_failure_is_not_sustained() {
        let fine = judge(10.0, (1..=100).map(|n| n * 100).collect(), 0, Some(4.0));
        assert_eq!((fine.p50_ms, fine.p95_ms, fine.sustained), (Some(5.0), Some(9.5), true));
        assert!(!judge(10.0, vec![100; 100], 1, None).sustained);
        assert!(!judge(10.0, vec![31_000; 100], 0, Some(1.0)).sustained);
        assert!(judge(10.0, vec![31_000; 100], 0, Some(10.0)).sustained);
        assert!(!judge(10.0, Vec::new(), 0, None).sustained);
    }
}
