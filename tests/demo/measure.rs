//! From what was recorded to the figures of a job.

use std::collections::BTreeMap;

use patchswitch_load::derive::Job;
use patchswitch_load::record::Class;
use patchswitch_load::report::{NEAR_NS, Run, Window};
use patchswitch_tests::observe::Captured;
use serde_json::Value;

use crate::report::{JobReport, Negative, Quiet};
use crate::watch::Samples;

/// A transition counts when this many requests after it agree: neighbours may overtake each other.
const AGREE: usize = 6;

/// What was recorded of a job while it ran.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// Its name, which begins the names of its phases in the client's report.
    pub(crate) name: String,
    pub(crate) window: Window,
    /// When the operator began to roll it back: what was started from then on is the old side again.
    pub(crate) rollback_ns: Option<u64>,
    pub(crate) exit_code: i32,
    pub(crate) error: Option<String>,
    /// The reports of its commands, in their order.
    pub(crate) reports: Vec<Value>,
    pub(crate) version_before: String,
    pub(crate) version_patched: Option<String>,
    pub(crate) version_after: String,
    /// Whether the files of the service are what they were before.
    pub(crate) files_as_before: bool,
    /// Datagrams rewritten in IPv4 and in IPv6.
    pub(crate) rewritten: [u64; 2],
}

/// What was recorded all the time.
#[derive(Debug)]
pub(crate) struct Evidence {
    pub(crate) run: Run,
    /// None if some of them were missed.
    pub(crate) resets: Option<Captured>,
    pub(crate) retransmissions: Samples,
    pub(crate) quiet: Window,
}

/// When a partition was started, from the name that it gives itself (`start-` and seconds since boot).
fn started_ns(instance: &str) -> Option<u64> {
    let (seconds, hundredths) = instance.strip_prefix("start-")?.split_once('.')?;
    let hundredths: u64 = hundredths.parse().ok().filter(|_| hundredths.len() == 2)?;
    Some(seconds.parse::<u64>().ok()? * 1_000_000_000 + hundredths * 10_000_000)
}

/// When new flows went to another side than before, and to which: true is the patched one. Told by who answered
/// requests on connections of their own, in the order in which they were due.
fn moves(run: &Run, window: Window, patched: &[String]) -> Vec<(u64, bool)> {
    let is_patched = |instance: &str| patched.iter().any(|name| name == instance);
    let mut seen: Vec<(u64, bool)> = Vec::new();
    for series in run.answers.iter().filter(|series| series.class == Class::New) {
        let side = |answer: patchswitch_load::record::Answer| {
            let instance = run.instances.get(usize::from(answer.instance))?;
            Some((run.started_ns + answer.due_us() * 1000, is_patched(instance)))
        };
        seen.extend(series.iter().filter_map(side));
    }
    let failed = run.failures.iter().filter(|failure| failure.class == Class::New);
    seen.extend(failed.filter_map(|f| Some((f.due_ns, is_patched(f.instance.as_deref()?)))));
    seen.retain(|(due, _)| window.contains(*due));
    seen.sort_unstable();
    let mut side = false;
    let mut found = Vec::new();
    for (index, (due, now)) in seen.iter().enumerate() {
        let after = &seen[index..(index + AGREE).min(seen.len())];
        if *now != side && after.iter().all(|(_, other)| other == now) {
            side = *now;
            found.push((*due, side));
        }
    }
    found
}

impl Evidence {
    /// The quiet time, and how long the machine stood still where no job flipped anything.
    pub(crate) fn quiet(&self, records: &[Record]) -> Quiet {
        let stats = self.run.stats(self.quiet);
        let running = self.run.longest_running_gap(self.quiet);
        let near: Vec<Window> = records.iter().flat_map(|record| self.near_flips(record)).collect();
        let standstills = self.run.standstills.iter();
        let elsewhere = standstills.filter(|still| near.iter().all(|flip| flip.overlap(still).is_none()));
        let elsewhere = elsewhere.map(|still| seconds(*still) * 1000.0);
        Quiet {
            seconds: seconds(self.quiet),
            requests: stats.requests,
            failed: stats.failed,
            resets_seen: self.resets_in(self.quiet),
            retrans: self.retransmissions.per_second(self.quiet).unwrap_or(f64::INFINITY),
            longest_gap_ms: stats.longest_gap.map_or(f64::INFINITY, |gap| gap.ms),
            running_gap_ms: running.map_or(f64::INFINITY, |gap| gap.running_ms()),
            stood_still_ms: self.run.stood_still_ms(self.quiet),
            longest_standstill_ms: elsewhere.max_by(f64::total_cmp).unwrap_or(0.0),
        }
    }

    /// The longest time for which the machine stood still near one of some flips, and when that began from the flip on, in
    /// milliseconds.
    fn longest_standstill(&self, flips: &[u64]) -> Option<(f64, f64)> {
        let ms = |ns: u64| std::time::Duration::from_nanos(ns).as_secs_f64() * 1e3;
        let near = self.run.standstills.iter().flat_map(|still| {
            let touched = flips.iter().filter(|at| Window::around(**at, NEAR_NS).overlap(still).is_some());
            touched.map(|at| {
                let from =
                    if still.from_ns >= *at { ms(still.from_ns - at) } else { -ms(at - still.from_ns) };
                (ms(still.to_ns - still.from_ns), from)
            })
        });
        near.max_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// The times near the flips of a job.
    fn near_flips(&self, record: &Record) -> Vec<Window> {
        let moves = moves(&self.run, record.window, &self.patched(record));
        moves.iter().map(|(at, _)| Window::around(*at, NEAR_NS)).collect()
    }

    /// None if the capture has holes: what was not seen in whole is not known to be good.
    fn resets_in(&self, window: Window) -> Option<u64> {
        self.resets.as_ref().map(|seen| seen.count(window.from_ns, window.to_ns) as u64)
    }

    /// What failed, in words, and how often.
    fn failures(&self, window: Window, prefix: &str) -> BTreeMap<String, u64> {
        let phases = self.run.phases();
        let mut found = BTreeMap::new();
        for failure in self.run.failures_due(window) {
            let phase = phases.iter().find(|(_, phase)| phase.contains(failure.due_ns));
            let phase = phase.map_or("?", |(name, _)| name.strip_prefix(prefix).unwrap_or(name));
            let what = format!("{phase}: {} {} {}", failure.class, failure.family, failure.error);
            *found.entry(what).or_default() += 1;
        }
        found
    }

    /// What clients of flows in flight got by UDP with the notice, in all jobs that switched, and without it.
    pub(crate) fn negative(&self, with: &[Record], without: &Record) -> Option<Negative> {
        let all = with.iter().filter_map(|record| self.in_flight(record));
        let (sent, answered) = all.reduce(|a, b| (a.0 + b.0, a.1 + b.1))?;
        let without = self.in_flight(without)?;
        Some(Negative {
            sent_with_notice: sent,
            answered_with_notice: answered,
            sent_without_notice: without.0,
            answered_without_notice: without.1,
        })
    }

    /// Datagrams that were sent to the old side after the flip and before the way back, and how many of them were
    /// answered; none if nothing was switched. On a busy machine a request is sent later than it was due: it is
    /// counted only where that makes no difference.
    fn in_flight(&self, record: &Record) -> Option<(u64, u64)> {
        let patched = self.patched(record);
        let moves = moves(&self.run, record.window, &patched);
        let (flip, _) = *moves.first()?;
        let served = self.surely_served(&patched, record.window)?;
        // Until the switch is over the old side may still answer with the service's address by itself: its own becomes its
        // source only after the flip.
        let over = self.phase(record, "take_over").map_or(served.from_ns, |phase| phase.to_ns);
        let window = Window { from_ns: served.from_ns.max(over), ..served };
        let is_old = |instance: &str| patched.iter().all(|name| name != instance);
        let by_old = |answer: &patchswitch_load::record::Answer| {
            let instance = self.run.instances.get(usize::from(answer.instance));
            let (due, done) = (answer.due_us(), answer.done_us);
            [due, done].iter().all(|us| window.contains(self.run.started_ns + us * 1000))
                && instance.is_some_and(|name| is_old(name))
        };
        let udp = self.run.answers.iter().filter(|series| series.class == Class::Udp);
        let answered = udp.map(|series| series.iter().filter(by_old).count() as u64).sum();
        // A flow that is older than the flip is the old side's.
        let lost = self.run.failures_due(window).filter(|failure| {
            failure.class == Class::Udp && failure.opened_ns.is_some_and(|opened| opened < flip)
        });
        Some((lost.count() as u64 + answered, answered))
    }

    /// When a job was in a phase.
    fn phase(&self, record: &Record, phase: &str) -> Option<Window> {
        let name = format!("{}/{phase}", record.name);
        self.run.phases().into_iter().find(|(found, _)| **found == name).map(|(_, window)| window)
    }

    /// The time in which new flows surely went to these: from when the first of them had been answered, to when the last
    /// of them, which was opened no earlier, was due.
    fn surely_served(&self, names: &[String], window: Window) -> Option<Window> {
        let by_them = |answer: &patchswitch_load::record::Answer| {
            let instance = self.run.instances.get(usize::from(answer.instance));
            instance.is_some_and(|name| names.contains(name))
        };
        let series = self.run.answers.iter().filter(|series| series.class == Class::New);
        let answers = series.flat_map(|series| series.iter().filter(by_them));
        let at = |us| self.run.started_ns + us * 1000;
        let times = answers.map(|answer| Window { from_ns: at(answer.done_us), to_ns: at(answer.due_us()) });
        let times = times.filter(|time| window.contains(time.to_ns));
        let whole =
            |a: Window, b: Window| Window { from_ns: a.from_ns.min(b.from_ns), to_ns: a.to_ns.max(b.to_ns) };
        times.reduce(whole).filter(|time| time.from_ns < time.to_ns)
    }

    /// The names of the patched side of a job.
    fn patched(&self, record: &Record) -> Vec<String> {
        let patching = record.window.from_ns..record.rollback_ns.unwrap_or(record.window.to_ns);
        let started = |name: &&String| started_ns(name).is_some_and(|at| patching.contains(&at));
        self.run.instances.iter().filter(started).cloned().collect()
    }

    /// The figures of a job.
    pub(crate) fn job(&self, record: &Record, quiet: &Quiet) -> JobReport {
        let patched = self.patched(record);
        let moves = moves(&self.run, record.window, &patched);
        let flips: Vec<u64> = moves.iter().map(|(at, _)| *at).collect();
        let ends = flips.iter().skip(1).copied().chain([record.window.to_ns]);
        let windows = moves.iter().zip(ends).filter(|((_, patched), _)| *patched);
        let job = Job {
            window: record.window,
            quiet: self.quiet,
            patched: windows.map(|((from_ns, _), to_ns)| Window { from_ns: *from_ns, to_ns }).collect(),
            patched_instances: patched,
            flips: flips.clone(),
        };
        let traffic = self.run.traffic(&job);
        let longest = self.longest_standstill(&flips);
        let prefix = format!("{}/", record.name);
        let gaps = traffic
            .gaps_ms
            .iter()
            .filter_map(|(name, gap)| Some((name.strip_prefix(&prefix)?.to_owned(), *gap)));
        let near = flips.iter().map(|at| self.retransmissions.per_second(Window::around(*at, NEAR_NS)));
        let retrans_flip = near.map(|rate| rate.unwrap_or(f64::INFINITY)).max_by(f64::total_cmp);
        JobReport {
            name: record.name.clone(),
            rate: traffic.rate,
            requests: traffic.requests,
            failed: traffic.failed,
            failed_by_patch: traffic.failed_by_patch,
            given_back_after_s: traffic.given_back_after_s,
            resets_seen: self.resets_in(record.window),
            retrans_flip,
            retrans_quiet: quiet.retrans,
            udp_sent: traffic.udp_sent,
            udp_answered: traffic.udp_answered,
            gaps_ms: gaps.collect(),
            longest_gap_ms: traffic.longest_gap_ms,
            gap_stood_still_ms: traffic.gap_stood_still_ms,
            running_gap_ms: traffic.running_gap_ms,
            running_gap_quiet_ms: quiet.running_gap_ms,
            stood_still_ms: self.run.stood_still_ms(record.window),
            longest_standstill_ms: longest.map_or(0.0, |(ms, _)| ms),
            longest_standstill_at_ms: longest.map(|(_, at)| at),
            download_ok: traffic.download_ok,
            idle_connection_ok: traffic.idle_connection_ok,
            failures: self.failures(record.window, &prefix),
            flips_seen: flips.len(),
            ..record.figures()
        }
    }
}

impl Record {
    /// What patchswitch reported, and what was asked of the partitions.
    fn figures(&self) -> JobReport {
        // A later command's figure only where an earlier one has none: the flip is the first switch's.
        let first =
            |path: &[&str]| self.reports.iter().find_map(|report| at(report, path).filter(|v| !v.is_null()));
        let number = |path: &[&str]| first(path).and_then(Value::as_f64);
        let count = |path: &[&str]| first(path).and_then(Value::as_u64);
        let outcomes = self.reports.iter().filter_map(|report| report.get("outcome")?.as_str());
        JobReport {
            outcome: outcomes.collect::<Vec<_>>().join(", then "),
            exit_code: self.exit_code,
            error: self.error.clone(),
            phases: phases(&self.reports),
            flip_us: number(&["flip_us"]),
            rewritten_v4: self.rewritten[0],
            rewritten_v6: self.rewritten[1],
            old_flows_at_flip: count(&["old_flows_at_flip"]),
            drained_s: number(&["drain", "seconds"]),
            version_before: self.version_before.clone(),
            version_patched: self.version_patched.clone(),
            version_after: self.version_after.clone(),
            files_as_before: self.files_as_before,
            freeze_ms: number(&["freeze_ms"]),
            clone_ms: number(&["clone_ms"]),
            cow_bytes: count(&["cow_bytes"]),
            lost_sectors_switch: count(&["lost_by_switch", "sectors"]).unwrap_or(0),
            lost_sectors_back: count(&["lost_by_give_back", "sectors"]).unwrap_or(0),
            ..JobReport::default()
        }
    }
}

fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, key| value.get(key))
}

/// The times of all phases, by name; one that came twice has the sum.
fn phases(reports: &[Value]) -> BTreeMap<String, f64> {
    let mut all = BTreeMap::new();
    for phase in reports.iter().filter_map(|report| report.get("phases")?.as_array()).flatten() {
        if let (Some(name), Some(seconds)) = (phase[0].as_str(), phase[1].as_f64()) {
            *all.entry(name.to_owned()).or_default() += seconds;
        }
    }
    all
}

/// The length of a window in seconds.
pub(crate) fn seconds(window: Window) -> f64 {
    std::time::Duration::from_nanos(window.to_ns.saturating_sub(window.from_ns)).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use patchswitch_load::record::{Answer, ErrorKind, Failure, Family, Series};
    use patchswitch_load::report::{Lag, Mark, Sockets};
    use patchswitch_tests::observe::Packet;
    use serde_json::json;

    use super::*;

    const S: u64 = 1_000_000_000;

    /// Twenty seconds, a request on a new connection every 10 ms in each family; the patched side serves between.
    fn run(patched_from_s: u64, patched_to_s: u64) -> Run {
        let series = |family| {
            let mut series = Series::new(Class::New, family);
            for due_us in (0..2000).map(|n| n * 10_000) {
                let patched = (patched_from_s * 1_000_000..patched_to_s * 1_000_000).contains(&due_us);
                series.push(Answer { done_us: due_us + 3000, latency_us: 3000, instance: u8::from(patched) });
            }
            series
        };
        let mark = |name: &str, at: u64| Mark { name: name.into(), at_ns: 100 * S + at * S };
        Run {
            started_ns: 100 * S,
            ended_ns: 120 * S,
            started_wall_ms: 0,
            rate: 200.0,
            udp_rate: 0.0,
            marks: vec![mark("quiet", 0), mark("job/clone", 5), mark("job/drain", 10), mark("between", 18)],
            instances: vec!["start-50.25".into(), "start-106.00".into()],
            answers: Family::ALL.map(series).into(),
            failures: Vec::new(),
            downloads: Vec::new(),
            idle_uses: Vec::new(),
            lag: Lag::default(),
            sockets: Sockets::default(),
            standstills: Vec::new(),
        }
    }

    fn evidence(run: Run) -> Evidence {
        let packet = |at: u64| Packet { at_ns: 100 * S + at * S, text: String::new(), from: None, to: None };
        let quiet = Window { from_ns: 101 * S, to_ns: 105 * S };
        Evidence {
            run,
            resets: Some(Captured { packets: [2, 11, 12].map(packet).into(), received: 3 }),
            retransmissions: Samples::of(&[(90, 0), (110, 0), (112, 4), (130, 4)]),
            quiet,
        }
    }

    fn record(reports: Vec<Value>) -> Record {
        Record {
            name: "job".into(),
            window: Window { from_ns: 105 * S, to_ns: 118 * S },
            rollback_ns: None,
            exit_code: 0,
            error: None,
            reports,
            version_before: "9".into(),
            version_patched: None,
            version_after: "11".into(),
            files_as_before: true,
            rewritten: [5, 6],
        }
    }

    #[test]
    fn an_instance_tells_when_it_was_started() {
        assert_eq!(started_ns("start-123.45"), Some(123_450_000_000));
        for other in ["start-123", "start-1.5", "nginx/1.22.1", ""] {
            assert_eq!(started_ns(other), None, "{other}");
        }
    }

    #[test]
    fn the_flip_and_the_way_back_are_seen_in_the_answers() {
        let patched = ["start-106.00".to_owned()];
        let window = Window { from_ns: 105 * S, to_ns: 118 * S };
        assert_eq!(moves(&run(10, 14), window, &patched), [(110 * S, true), (114 * S, false)]);
        assert_eq!(moves(&run(10, 20), window, &patched), [(110 * S, true)]);
        assert_eq!(moves(&run(0, 0), window, &patched), []);
        let mut failing = run(0, 0);
        failing.answers.iter_mut().for_each(|series| *series = Series::new(Class::New, series.family));
        failing.failures = (0..20)
            .map(|n| Failure {
                number: n,
                class: Class::New,
                family: Family::V4,
                due_ns: 110 * S + n,
                failed_ns: 110 * S + n,
                wall_ms: 0,
                opened_ns: None,
                local: None,
                instance: Some(patched[0].clone()),
                error: ErrorKind::BadStatus(503),
            })
            .collect();
        assert_eq!(
            moves(&failing, window, &patched),
            [(110 * S, true)],
            "answers that are failures count as well"
        );
    }

    #[test]
    fn an_old_side_that_was_started_again_is_the_old_side() {
        let mut run = run(10, 14);
        // It serves from 114 s on, and has a new name then.
        run.instances.push("start-113.00".into());
        let again = |series: &Series| {
            let name = |answer: Answer| if answer.due_us() >= 14_000_000 { 2 } else { answer.instance };
            let mut renamed = Series::new(series.class, series.family);
            series.iter().for_each(|answer| renamed.push(Answer { instance: name(answer), ..answer }));
            renamed
        };
        run.answers = run.answers.iter().map(again).collect();
        let evidence = evidence(run);
        let rolled_back = Record { rollback_ns: Some(112 * S), ..record(Vec::new()) };
        assert_eq!(evidence.job(&rolled_back, &evidence.quiet(&[])).flips_seen, 2);
        assert_eq!(evidence.job(&record(Vec::new()), &evidence.quiet(&[])).flips_seen, 1, "nobody came back");
    }

    #[test]
    fn flows_in_flight_are_those_of_the_old_side_after_the_flip() {
        let mut run = run(10, 14);
        let mark = |name: &str, at_ns| Mark { name: name.into(), at_ns };
        run.marks.extend([mark("job/take_over", 109 * S), mark("job/observe", 110 * S + S / 5)]);
        run.marks.retain(|mark| mark.name != "job/drain");
        let mut echoes = Series::new(Class::Udp, Family::V4);
        // Of the old side after the flip at 110 s, of the new one, of the old one before. The one of 9 s that took two
        // seconds may have been sent before the flip, that of 13.999 s after the way back; the one of 10.1 s was answered
        // before the switch was over.
        let (in_time, late) = (1000, 2_000_000);
        for (due_us, took_us, instance) in [
            (9_000_000, in_time, 0),
            (10_100_000, in_time, 0),
            (10_500_000, in_time, 0),
            (10_600_000, in_time, 1),
            (9_000_000, late, 0),
            (11_000_000, in_time, 0),
            (13_999_000, in_time, 0),
        ] {
            echoes.push(Answer { done_us: due_us + u64::from(took_us), latency_us: took_us, instance });
        }
        run.answers.push(echoes);
        let failure = |due_ns, opened_ns| Failure {
            number: 1,
            class: Class::Udp,
            family: Family::V4,
            due_ns,
            failed_ns: due_ns,
            wall_ms: 0,
            opened_ns: Some(opened_ns),
            local: None,
            instance: None,
            error: ErrorKind::TimeOut,
        };
        // Of a flow in flight, and of one that was opened after the flip.
        run.failures = vec![failure(111 * S, 109 * S), failure(112 * S, 111 * S)];
        let evidence = evidence(run);
        assert_eq!(evidence.in_flight(&record(Vec::new())), Some((3, 2)));
        assert_eq!(evidence.negative(&[], &record(Vec::new())), None, "there is nothing to compare with");
    }

    #[test]
    fn one_request_that_overtook_another_is_no_flip() {
        let mut run = run(10, 20);
        let mut odd = Series::new(Class::New, Family::V6);
        for (index, answer) in run.answers[1].iter().enumerate() {
            odd.push(Answer { instance: if index == 1001 { 0 } else { answer.instance }, ..answer });
        }
        run.answers[1] = odd;
        let window = Window { from_ns: 105 * S, to_ns: 118 * S };
        assert_eq!(moves(&run, window, &["start-106.00".to_owned()]), [(110 * S + 10_000_000, true)]);
    }

    #[test]
    fn standstills_near_a_flip_are_told_from_those_elsewhere() {
        let halt =
            |at_ms: u64, ms: u64| Window { from_ns: at_ms * 1_000_000, to_ns: (at_ms + ms) * 1_000_000 };
        // Near the flip at 110 s, and elsewhere.
        let standstills = vec![halt(102_000, 12), halt(109_500, 31), halt(110_200, 20), halt(113_000, 14)];
        let evidence = evidence(Run { standstills, ..run(10, 20) });
        let quiet = evidence.quiet(&[record(Vec::new())]);
        let job = evidence.job(&record(Vec::new()), &quiet);
        assert_eq!((quiet.longest_standstill_ms.round(), job.longest_standstill_ms.round()), (14.0, 31.0));
        assert_eq!(job.longest_standstill_at_ms.map(f64::round), Some(-500.0));
        assert_eq!(evidence.quiet(&[]).longest_standstill_ms.round(), 31.0, "of what nobody flipped");
        assert!(quiet.running_gap_ms <= quiet.longest_gap_ms);
    }

    #[test]
    fn the_figures_of_a_job_come_from_all_its_sources() {
        let report = json!({
            "outcome": "done", "flip_us": 12.5, "old_flows_at_flip": 18, "drain": {"seconds": 4.5},
            "freeze_ms": 70.0, "clone_ms": 300.0, "cow_bytes": 9000, "lost_by_switch": {"sectors": 40},
            "lost_by_give_back": null, "phases": [["clone", 0.5], ["drain", 4.5]],
        });
        let back = json!({
            "outcome": "rolled_back", "flip_us": 99.0, "lost_by_give_back": {"sectors": 7}, "phases": [["drain", 1.0]],
        });
        let evidence = evidence(run(10, 14));
        let quiet = evidence.quiet(&[]);
        assert_eq!((quiet.requests, quiet.resets_seen, quiet.longest_gap_ms), (800, Some(1), 10.0));
        let job = evidence.job(&record(vec![report, back]), &quiet);
        assert_eq!(
            (job.outcome.as_str(), job.flips_seen, job.resets_seen),
            ("done, then rolled_back", 2, Some(2))
        );
        assert_eq!((job.flip_us, job.lost_sectors_switch, job.lost_sectors_back), (Some(12.5), 40, 7));
        assert_eq!(job.phases, BTreeMap::from([("clone".to_owned(), 0.5), ("drain".to_owned(), 5.5)]));
        assert_eq!(job.gaps_ms.keys().collect::<Vec<_>>(), ["clone", "drain"]);
        assert_eq!((job.requests, job.failed, job.longest_gap_ms), (2600, 0, Some(10.0)));
        assert!(job.retrans_flip.is_some_and(|rate| rate > 0.0), "four were sent again after the first flip");
        assert_eq!((job.rewritten_v4, job.rewritten_v6, job.drained_s), (5, 6, Some(4.5)));
    }
}
