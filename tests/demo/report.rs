//! The report of the demo, and what must hold.

use std::collections::BTreeMap;

use patchswitch_load::derive;
use serde::{Deserialize, Serialize};

/// One kernel's run of the demo.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RunReport {
    /// The kernel's release.
    pub(crate) kernel: String,
    /// Processors of the machine.
    pub(crate) processors: usize,
    /// Requests a second at which the service begins to lag; none if it was not measured.
    pub(crate) knee: Option<f64>,
    /// The time in which nothing happened.
    pub(crate) quiet: Quiet,
    /// The jobs, in the order in which they were run.
    pub(crate) jobs: Vec<JobReport>,
    /// What a client gets without the notice.
    pub(crate) negative: Option<Negative>,
    /// What was there after the demo and not before it.
    pub(crate) leftovers: Vec<String>,
    /// What must hold, and whether it does.
    pub(crate) checks: Vec<Check>,
    /// From the beginning to the end, in seconds.
    pub(crate) seconds: f64,
}

/// A time of load in which nothing happened: what jobs are compared with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Quiet {
    pub(crate) seconds: f64,
    pub(crate) requests: u64,
    pub(crate) failed: u64,
    /// None if the capture has holes.
    pub(crate) resets_seen: Option<u64>,
    pub(crate) retrans: f64,
    pub(crate) longest_gap_ms: f64,
    /// The longest time in which nobody was answered although the machine ran.
    pub(crate) running_gap_ms: f64,
    /// How long the machine stood still in all.
    pub(crate) stood_still_ms: f64,
    /// The longest time for which it did so, of the whole run but the times near a flip.
    pub(crate) longest_standstill_ms: f64,
}

/// The same datagram clients with the notice on, and off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Negative {
    pub(crate) sent_with_notice: u64,
    pub(crate) answered_with_notice: u64,
    pub(crate) sent_without_notice: u64,
    pub(crate) answered_without_notice: u64,
}

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Check {
    /// Of which job; none: of the whole run.
    pub(crate) job: Option<String>,
    /// What must hold, with the figures.
    pub(crate) text: String,
    pub(crate) holds: bool,
}

/// What the issue asks of a job. Times are in seconds unless a name says otherwise; sectors have 512 bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct JobReport {
    pub(crate) name: String,
    pub(crate) outcome: String,
    pub(crate) exit_code: i32,
    pub(crate) phases: BTreeMap<String, f64>,
    pub(crate) flip_us: Option<f64>,
    pub(crate) rate: f64,
    pub(crate) requests: u64,
    pub(crate) failed: u64,
    pub(crate) failed_by_patch: u64,
    /// From the first failure of the patched side until new flows went to the old side again.
    pub(crate) given_back_after_s: Option<f64>,
    /// None if the capture has holes, which proves nothing.
    pub(crate) resets_seen: Option<u64>,
    /// Segments sent again within a second of a flip, a second; the most of all flips.
    pub(crate) retrans_flip: Option<f64>,
    pub(crate) retrans_quiet: f64,
    pub(crate) udp_sent: u64,
    pub(crate) udp_answered: u64,
    pub(crate) rewritten_v4: u64,
    pub(crate) rewritten_v6: u64,
    pub(crate) gaps_ms: BTreeMap<String, f64>,
    pub(crate) longest_gap_ms: Option<f64>,
    /// For how much of that gap the machine itself stood still.
    pub(crate) gap_stood_still_ms: Option<f64>,
    /// The longest time near a flip in which nobody was answered although the machine ran.
    pub(crate) running_gap_ms: Option<f64>,
    pub(crate) running_gap_quiet_ms: f64,
    /// How long the machine stood still in all, while the job ran.
    pub(crate) stood_still_ms: f64,
    /// And the longest of these times near a flip: a switch must not be what it stands still for.
    pub(crate) longest_standstill_ms: f64,
    /// When it began, from the flip on.
    pub(crate) longest_standstill_at_ms: Option<f64>,
    pub(crate) download_ok: Option<bool>,
    pub(crate) idle_connection_ok: Option<bool>,
    pub(crate) old_flows_at_flip: Option<u64>,
    pub(crate) drained_s: Option<f64>,
    pub(crate) version_before: String,
    pub(crate) version_after: String,
    /// Whether the service's files that patches touch are, where it is served now, what they were before.
    pub(crate) files_as_before: bool,
    /// The version inside the patched partition while it served, where it did.
    pub(crate) version_patched: Option<String>,
    pub(crate) freeze_ms: Option<f64>,
    pub(crate) clone_ms: Option<f64>,
    pub(crate) cow_bytes: Option<u64>,
    pub(crate) lost_sectors_switch: u64,
    pub(crate) lost_sectors_back: u64,
    /// What failed, by phase, kind of request and reason, with its number; the patch's own doing included.
    pub(crate) failures: BTreeMap<String, u64>,
    /// How often new flows went to another partition than before, as the client saw it.
    pub(crate) flips_seen: usize,
    /// What the command said when it did not end with 0.
    pub(crate) error: Option<String>,
}

/// What a job is expected to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) exit_code: i32,
    /// How often new flows move.
    pub(crate) flips: usize,
    /// Whether the version inside is another one afterwards.
    pub(crate) changes_version: bool,
    /// Whether the patch breaks requests.
    pub(crate) breaks_requests: bool,
}

/// From the first failure of a broken patch to the give-back, in seconds.
const GIVE_BACK_LIMIT_S: f64 = 3.0;
/// Requests a second that a proof needs at least.
pub(crate) const LEAST_RATE: f64 = 200.0;
/// The longest time without an answer that is accepted away from a flip, in milliseconds.
const PHASE_GAP_LIMIT_MS: f64 = 500.0;

impl JobReport {
    /// The longest gap that cannot be told from the quiet time's.
    pub(crate) fn gap_limit_ms(&self) -> f64 {
        derive::gap_limit_ms(self.running_gap_quiet_ms)
    }

    /// What must hold of this job.
    pub(crate) fn checks(&self, expected: Expected, quiet: &Quiet) -> Vec<Check> {
        let mut checks = Checks { job: Some(self.name.clone()), all: Vec::new() };
        self.check_end(expected, &mut checks);
        self.check_requests(expected, &mut checks);
        checks.add(
            self.resets_seen.zip(quiet.resets_seen).is_some_and(|(job, quiet)| job <= quiet),
            format!(
                "{} resets on the uplink, {} in the quiet time",
                seen(self.resets_seen),
                seen(quiet.resets_seen)
            ),
        );
        if expected.flips > 0 {
            self.check_flip(quiet, &mut checks);
        }
        let limit = PHASE_GAP_LIMIT_MS;
        let longest = self.gaps_ms.iter().max_by(|a, b| a.1.total_cmp(b.1));
        let (phase, gap) = longest.map_or(("no phase", f64::INFINITY), |(phase, gap)| (phase.as_str(), *gap));
        let text = format!(
            "longest time without an answer in any phase: {gap:.0} ms, in {phase}; limit {limit:.0} ms"
        );
        checks.add(gap <= limit, text);
        checks.all
    }

    fn check_end(&self, expected: Expected, checks: &mut Checks) {
        let (code, wanted) = (self.exit_code, expected.exit_code);
        checks.add(code == wanted, format!("exit code {code}, expected {wanted}"));
        let (seen, wanted) = (self.flips_seen, expected.flips);
        checks.add(seen == wanted, format!("new flows moved {seen} times, expected {wanted}"));
        let (before, after) = (&self.version_before, &self.version_after);
        match expected.changes_version {
            true => checks.add(before != after, format!("nginx {before} before, {after} after: patched")),
            false => checks.add(before == after, format!("nginx {before} before, {after} after: as it was")),
        }
        if !expected.changes_version {
            checks.add(self.files_as_before, "the service's files are what they were".to_owned());
        }
    }

    fn check_requests(&self, expected: Expected, checks: &mut Checks) {
        let rate = self.rate;
        checks.add(rate >= LEAST_RATE, format!("load of {rate:.0} requests/s, at least {LEAST_RATE:.0}"));
        let (made, failed) = (self.requests, self.failed);
        checks.add(made > 0 && failed == 0, format!("{failed} of {made} requests failed"));
        let broken = self.failed_by_patch;
        match expected.breaks_requests {
            true => {
                let after = self.given_back_after_s.unwrap_or(f64::INFINITY);
                checks.add(broken > 0, format!("the patch broke {broken} requests, as it was made to"));
                checks.add(
                    after <= GIVE_BACK_LIMIT_S,
                    format!("given back {after:.2} s after the first failure; limit {GIVE_BACK_LIMIT_S} s"),
                );
            }
            false => checks.add(broken == 0, format!("the patch broke {broken} requests")),
        }
        let (sent, answered) = (self.udp_sent, self.udp_answered);
        checks.add(sent > 0 && sent == answered, format!("{answered} of {sent} datagrams answered"));
    }

    fn check_flip(&self, quiet: &Quiet, checks: &mut Checks) {
        let (rate, quiet_rate) = (self.retrans_flip.unwrap_or(f64::INFINITY), self.retrans_quiet);
        checks.add(
            rate <= quiet_rate,
            format!("{rate:.1} segments a second sent again at the flip, {quiet_rate:.1} in the quiet time"),
        );
        let (gap, limit) = (self.running_gap_ms.unwrap_or(f64::INFINITY), self.gap_limit_ms());
        let (quiet_gap, whole) = (self.running_gap_quiet_ms, self.longest_gap_ms.unwrap_or(f64::INFINITY));
        checks.add(
            gap <= limit,
            format!(
                "longest time without an answer at the flip while the machine ran: {gap:.0} ms; quiet {quiet_gap:.0} \
                 ms, limit {limit:.0} ms (with its own standstills {whole:.0} ms)"
            ),
        );
        let (still, elsewhere) = (self.longest_standstill_ms, quiet.longest_standstill_ms);
        let limit = derive::gap_limit_ms(elsewhere);
        let when =
            self.longest_standstill_at_ms.map(|at| format!(", {at:+.0} ms from it")).unwrap_or_default();
        checks.add(
            still <= limit,
            format!(
                "longest time for which the machine stood still at the flip: {still:.0} ms{when}; elsewhere \
                 {elsewhere:.0} ms, limit {limit:.0} ms"
            ),
        );
        let (v4, v6) = (self.rewritten_v4, self.rewritten_v6);
        checks.add(v4 > 0 && v6 > 0, format!("{v4} datagrams rewritten in IPv4, {v6} in IPv6"));
        checks.add(self.download_ok == Some(true), "downloads across the flip are whole".to_owned());
        checks.add(
            self.idle_connection_ok == Some(true),
            "idle connections are usable after the flip".to_owned(),
        );
    }
}

impl RunReport {
    /// What must hold of the run as a whole.
    pub(crate) fn own_checks(&self) -> Vec<Check> {
        let mut checks = Checks { job: None, all: Vec::new() };
        let Quiet { seconds, requests, failed, .. } = self.quiet;
        checks.add(
            requests > 0 && failed == 0,
            format!("quiet time: {failed} of {requests} requests failed in {seconds:.0} s"),
        );
        if let Some(Negative { sent_with_notice: sent, answered_with_notice: answered, .. }) = self.negative {
            checks.add(
                sent > 0 && sent == answered,
                format!("with the notice {answered} of {sent} datagrams were answered"),
            );
        }
        if let Some(Negative { sent_without_notice: sent, answered_without_notice: answered, .. }) =
            self.negative
        {
            checks.add(
                sent > 0 && answered == 0,
                format!("without the notice {answered} of {sent} datagrams were answered"),
            );
        }
        let left = self.leftovers.len();
        checks.add(left == 0, format!("{left} things left behind"));
        checks.all
    }
}

/// A count, in words.
pub(crate) fn seen(count: Option<u64>) -> String {
    count.map_or_else(|| "an unknown number of".to_owned(), |count| count.to_string())
}

struct Checks {
    job: Option<String>,
    all: Vec<Check>,
}

impl Checks {
    fn add(&mut self, holds: bool, text: String) {
        self.all.push(Check { job: self.job.clone(), text, holds });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Expected = Expected { exit_code: 0, flips: 1, changes_version: true, breaks_requests: false };

    fn good() -> JobReport {
        JobReport {
            name: "job".into(),
            rate: 200.0,
            requests: 1000,
            resets_seen: Some(0),
            udp_sent: 100,
            udp_answered: 100,
            retrans_flip: Some(0.0),
            gaps_ms: BTreeMap::from([("clone".into(), 80.0), ("patch".into(), 240.0)]),
            longest_gap_ms: Some(75.0),
            gap_stood_still_ms: Some(30.0),
            running_gap_ms: Some(45.0),
            running_gap_quiet_ms: 30.0,
            longest_standstill_ms: 30.0,
            rewritten_v4: 3,
            rewritten_v6: 4,
            download_ok: Some(true),
            idle_connection_ok: Some(true),
            version_before: "1".into(),
            version_after: "2".into(),
            files_as_before: true,
            flips_seen: 1,
            ..JobReport::default()
        }
    }

    fn broken(job: &JobReport, expected: Expected) -> Vec<String> {
        let quiet = Quiet { resets_seen: Some(0), longest_standstill_ms: 20.0, ..Quiet::default() };
        let checks = job.checks(expected, &quiet);
        checks.into_iter().filter(|check| !check.holds).map(|check| check.text).collect()
    }

    #[test]
    fn a_good_job_passes_and_the_limit_follows_the_quiet_time() {
        assert_eq!(broken(&good(), GOOD), Vec::<String>::new());
        assert!((good().gap_limit_ms() - 50.0).abs() < 1e-9);
        assert!((JobReport { running_gap_quiet_ms: 100.0, ..good() }.gap_limit_ms() - 150.0).abs() < 1e-9);
    }

    #[test]
    fn each_condition_is_noticed_when_it_is_broken() {
        type Break = fn(&mut JobReport);
        let cases: [(&str, Break); 18] = [
            ("exit code", |job| job.exit_code = 1),
            ("moved", |job| job.flips_seen = 0),
            ("nginx", |job| job.version_after = "1".into()),
            ("load of", |job| job.rate = 199.0),
            ("requests failed", |job| job.failed = 1),
            ("requests failed", |job| job.requests = 0),
            ("the patch broke", |job| job.failed_by_patch = 1),
            ("datagrams answered", |job| job.udp_answered = 99),
            ("resets", |job| job.resets_seen = Some(1)),
            ("an unknown number of resets", |job| job.resets_seen = None),
            ("sent again", |job| job.retrans_flip = Some(0.5)),
            ("sent again", |job| job.retrans_flip = None),
            ("while the machine ran", |job| job.running_gap_ms = Some(50.1)),
            ("stood still at the flip", |job| job.longest_standstill_ms = 40.1),
            ("rewritten", |job| job.rewritten_v6 = 0),
            ("downloads", |job| job.download_ok = Some(false)),
            ("idle", |job| job.idle_connection_ok = None),
            ("in any phase", |job| job.gaps_ms = BTreeMap::from([("merge".into(), 500.1)])),
        ];
        for (words, spoil) in cases {
            let mut job = good();
            spoil(&mut job);
            let found = broken(&job, GOOD);
            assert!(found.len() == 1 && found[0].contains(words), "{words}: {found:?}");
        }
    }

    #[test]
    fn a_job_without_a_flip_needs_no_flip() {
        let job = JobReport {
            exit_code: 20,
            flips_seen: 0,
            version_after: "1".into(),
            retrans_flip: None,
            running_gap_ms: None,
            rewritten_v4: 0,
            download_ok: None,
            idle_connection_ok: None,
            ..good()
        };
        let expected = Expected { exit_code: 20, flips: 0, changes_version: false, ..GOOD };
        assert_eq!(broken(&job, expected), Vec::<String>::new());
        assert_eq!(broken(&JobReport { files_as_before: false, ..job }, expected).len(), 1);
    }

    #[test]
    fn a_patch_that_breaks_requests_must_do_so_and_be_given_back_in_time() {
        let expected = Expected { exit_code: 22, flips: 2, changes_version: false, breaks_requests: true };
        let job = JobReport {
            exit_code: 22,
            flips_seen: 2,
            version_after: "1".into(),
            failed_by_patch: 7,
            given_back_after_s: Some(2.9),
            ..good()
        };
        assert_eq!(broken(&job, expected), Vec::<String>::new());
        assert_eq!(broken(&JobReport { given_back_after_s: Some(3.1), ..job.clone() }, expected).len(), 1);
        assert_eq!(
            broken(&JobReport { failed_by_patch: 0, given_back_after_s: None, ..job }, expected).len(),
            2
        );
    }

    #[test]
    fn the_run_as_a_whole_is_checked() {
        let run = |negative, leftovers: &[&str], failed| RunReport {
            kernel: String::new(),
            processors: 1,
            knee: None,
            quiet: Quiet { requests: 10, failed, ..Quiet::default() },
            jobs: Vec::new(),
            negative,
            leftovers: leftovers.iter().map(|text| (*text).to_owned()).collect(),
            checks: Vec::new(),
            seconds: 0.0,
        };
        let broken = |run: RunReport| run.own_checks().iter().filter(|check| !check.holds).count();
        let negative = |answered_with_notice, answered_without_notice| {
            let (sent_with_notice, sent_without_notice) = (9, 9);
            Some(Negative {
                sent_with_notice,
                answered_with_notice,
                sent_without_notice,
                answered_without_notice,
            })
        };
        assert_eq!(broken(run(negative(9, 0), &[], 0)), 0);
        assert_eq!(broken(run(None, &["link x"], 1)), 2);
        assert_eq!(broken(run(negative(8, 1), &[], 0)), 2);
    }
}
