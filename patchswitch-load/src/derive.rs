//! What a job did to the traffic: the figures of the demo's report that only the client can know.
//!
//! The harness says when the job began and ended, when new flows were moved, and how to recognise the patched
//! side; the rest follows from the run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::record::{Class, Failure};
use crate::report::{NEAR_NS, Run, Window};

/// The longest gap that is accepted in a phase without a flip, in milliseconds.
pub const PHASE_GAP_LIMIT_MS: f64 = 500.0;

/// What the harness knows of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// From its start until its outcome was clear and its traffic had settled.
    pub window: Window,
    /// A time in which nothing happened, to compare with.
    pub quiet: Window,
    /// When new flows were moved: the flip, and a give-back or rollback if there was one.
    pub flips: Vec<u64>,
    /// The times in which new flows went to the patched side: from a flip to the give-back or to the end.
    pub patched: Vec<Window>,
    /// The markers by which the patched side's answers are recognised.
    pub patched_instances: Vec<String>,
}

/// What the job did to the traffic. The names are those of the demo's report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// HTTP requests a second, as scheduled.
    pub rate: f64,
    /// Datagrams a second, as scheduled.
    pub udp_rate: f64,
    /// Requests of every class that were due in the job's window, datagrams included.
    pub requests: u64,
    /// Of these, failed, those that the patch itself broke not counted.
    pub failed: u64,
    /// Failed on the patched side: the patch's doing, not the switch's.
    pub failed_by_patch: u64,
    /// Datagrams sent.
    pub udp_sent: u64,
    /// Datagrams answered from the address that was asked.
    pub udp_answered: u64,
    /// The longest time without a completed answer of any steady class and family, for each phase.
    pub gaps_ms: BTreeMap<String, f64>,
    /// The same within one second of a flip; none if nothing was flipped.
    pub longest_gap_ms: Option<f64>,
    /// For how much of that gap nothing else could run either.
    pub gap_stood_still_ms: Option<f64>,
    /// The longest time near a flip in which nobody was answered although the machine ran: what is judged, since a host
    /// that gives a machine no processor is nobody's doing inside.
    pub running_gap_ms: Option<f64>,
    /// The same in the quiet window.
    pub running_gap_quiet_ms: Option<f64>,
    /// Whether every download of the job was complete and right, with at least one across the first flip in each
    /// family; none if there was neither a download nor a flip.
    pub download_ok: Option<bool>,
    /// Whether every idle connection that was used was answered, with at least one opened before the first flip
    /// and used after it in each family; none if there was neither a use nor a flip.
    pub idle_connection_ok: Option<bool>,
    /// From the first failure of the patched side to the next flip, in seconds: how quickly it was given back.
    pub given_back_after_s: Option<f64>,
}

impl Job {
    /// Whether a failure is the patched side's: it answered, now or earlier on the same connection; or nobody
    /// answered, and the connection was opened while new flows went there.
    ///
    /// A request that never got as far as opening a connection is never blamed on the patch, nor one whose flow is
    /// older than the flip.
    pub fn is_by_patch(&self, failure: &Failure) -> bool {
        match (&failure.instance, failure.opened_ns) {
            (Some(instance), _) => self.patched_instances.contains(instance),
            (None, Some(opened)) => self.patched.iter().any(|window| window.contains(opened)),
            (None, None) => false,
        }
    }
}

impl Run {
    /// What a job did to the traffic.
    pub fn traffic(&self, job: &Job) -> Traffic {
        let stats = self.stats(job.window);
        let by_patch =
            self.failures_due(job.window).filter(|failure| job.is_by_patch(failure)).count() as u64;
        let udp = || stats.series.iter().filter(|series| series.class == Class::Udp);
        let udp_sent = udp().map(|series| series.requests).sum();
        let near = || job.flips.iter().map(|at| Window::around(*at, NEAR_NS));
        let longest = near().filter_map(|flip| self.longest_gap(flip)).max_by(|a, b| a.ms.total_cmp(&b.ms));
        let running = near().filter_map(|flip| self.longest_running_gap(flip)).map(|gap| gap.running_ms());
        Traffic {
            rate: self.rate,
            udp_rate: self.udp_rate,
            requests: stats.requests,
            failed: stats.failed - by_patch,
            failed_by_patch: by_patch,
            udp_sent,
            udp_answered: udp_sent - udp().map(|series| series.failed).sum::<u64>(),
            gaps_ms: self.phase_gaps(job.window),
            longest_gap_ms: longest.map(|gap| gap.ms),
            gap_stood_still_ms: longest.map(|gap| gap.stood_still_ms),
            running_gap_ms: running.max_by(f64::total_cmp),
            running_gap_quiet_ms: self.longest_running_gap(job.quiet).map(|gap| gap.running_ms()),
            download_ok: self.download_ok(job),
            idle_connection_ok: self.idle_connection_ok(job),
            given_back_after_s: self.given_back_after_s(job),
        }
    }

    fn phase_gaps(&self, window: Window) -> BTreeMap<String, f64> {
        let mut gaps = BTreeMap::new();
        for (name, phase) in self.phases() {
            if let Some(gap) = phase.overlap(&window).and_then(|part| self.longest_gap(part)) {
                let longest = gaps.entry(name).or_insert(gap.ms);
                *longest = gap.ms.max(*longest);
            }
        }
        gaps
    }

    fn download_ok(&self, job: &Job) -> Option<bool> {
        let ours = || self.downloads.iter().filter(|d| job.window.contains(d.started_ns));
        let spans = |flip: u64| ours().filter(move |d| d.started_ns < flip && flip < d.ended_ns);
        let flip = job.flips.iter().min();
        if ours().next().is_none() && flip.is_none() {
            return None;
        }
        let families = |flip: &u64| self.covers_families(spans(*flip).map(|d| d.family));
        Some(ours().all(|d| d.ok) && flip.is_none_or(families))
    }

    fn idle_connection_ok(&self, job: &Job) -> Option<bool> {
        let ours = || self.idle_uses.iter().filter(|u| job.window.contains(u.used_ns));
        let spans = |flip: u64| ours().filter(move |u| u.opened_ns < flip && flip < u.used_ns);
        let flip = job.flips.iter().min();
        if ours().next().is_none() && flip.is_none() {
            return None;
        }
        let families = |flip: &u64| self.covers_families(spans(*flip).map(|u| u.family));
        Some(ours().all(|u| u.ok) && flip.is_none_or(families))
    }

    /// Whether each family that the run uses at all is among the given ones.
    fn covers_families(&self, found: impl Iterator<Item = crate::record::Family>) -> bool {
        let found: Vec<_> = found.collect();
        self.answers.iter().all(|series| found.contains(&series.family))
    }

    fn given_back_after_s(&self, job: &Job) -> Option<f64> {
        let failures = self.failures.iter().filter(|failure| job.is_by_patch(failure));
        let known = failures.map(|failure| failure.failed_ns).filter(|at| job.window.contains(*at));
        let first = known.min()?;
        let back = job.flips.iter().copied().filter(|at| *at > first).min()?;
        Some(std::time::Duration::from_nanos(back - first).as_secs_f64())
    }
}

/// The longest gap that cannot be told from a quiet time's longest, both in milliseconds.
pub fn gap_limit_ms(quiet: f64) -> f64 {
    (1.5 * quiet).max(quiet + 20.0)
}

impl Traffic {
    /// The longest gap that is accepted around a flip: what cannot be told from the quiet window's.
    pub fn gap_limit_ms(&self) -> Option<f64> {
        self.running_gap_quiet_ms.map(gap_limit_ms)
    }

    /// What must hold of every job and does not, one sentence each.
    pub fn violations(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut check = |holds: bool, text: String| {
            if !holds {
                found.push(text);
            }
        };
        check(self.requests > 0, "no request was made".into());
        check(self.failed == 0, format!("{} of {} requests failed", self.failed, self.requests));
        let (sent, answered) = (self.udp_sent, self.udp_answered);
        check(sent == answered, format!("{answered} of {sent} datagrams were answered"));
        for (phase, gap) in &self.gaps_ms {
            let limit = PHASE_GAP_LIMIT_MS;
            check(*gap <= limit, format!("{gap:.0} ms without an answer in {phase}, more than {limit:.0}"));
        }
        if let Some(gap) = self.running_gap_ms {
            match self.gap_limit_ms() {
                Some(limit) => {
                    check(
                        gap <= limit,
                        format!("{gap:.1} ms without an answer at the flip, more than {limit:.1}"),
                    );
                }
                None => check(false, "there is no quiet window to compare the flip with".into()),
            }
        }
        check(self.download_ok != Some(false), "a download across the flip is missing or wrong".into());
        check(
            self.idle_connection_ok != Some(false),
            "an idle connection across the flip is missing or was not answered".into(),
        );
        found
    }
}

#[cfg(test)]
mod tests;
