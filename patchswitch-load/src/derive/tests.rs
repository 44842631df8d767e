//! See the parent module.

use super::*;
use crate::record::{Answer, ErrorKind, Family, Series};
use crate::report::{Download, IdleUse, Lag, Mark, Sockets};

const FLIP: u64 = 10;
const BACK: u64 = 14;

fn s(seconds: u64) -> u64 {
    seconds * 1_000_000_000
}

fn failure(due: u64, class: Class, opened: Option<u64>, instance: Option<&str>) -> Failure {
    Failure {
        number: 0,
        class,
        family: Family::V4,
        due_ns: s(due),
        failed_ns: s(due) + 500_000_000,
        wall_ms: 0,
        opened_ns: opened.map(s),
        local: None,
        instance: instance.map(str::to_owned),
        error: ErrorKind::Closed,
    }
}

/// Twenty seconds; an answer every 10 ms in each class and family, except for a silence of the new ones from
/// 12.00 to 12.08.
fn run(failures: Vec<Failure>) -> Run {
    let series = [Class::Keepalive, Class::New, Class::Udp].into_iter().flat_map(|class| {
        Family::ALL.map(|family| {
            let mut series = Series::new(class, family);
            for done_us in (0..2000).map(|n| n * 10_000) {
                if class != Class::New || !(12_000_001..12_080_000).contains(&done_us) {
                    series.push(Answer { done_us, latency_us: 0, instance: 0 });
                }
            }
            series
        })
    });
    let mark = |name: &str, at| Mark { name: name.into(), at_ns: s(at) };
    Run {
        started_ns: 0,
        ended_ns: s(20),
        started_wall_ms: 0,
        rate: 400.0,
        udp_rate: 200.0,
        marks: vec![mark("quiet", 0), mark("clone", 5), mark("drain", FLIP), mark("back", BACK)],
        instances: vec!["old".into()],
        answers: series.collect(),
        failures,
        downloads: Vec::new(),
        idle_uses: Vec::new(),
        lag: Lag::default(),
        sockets: Sockets::default(),
        standstills: Vec::new(),
    }
}

fn job() -> Job {
    Job {
        window: Window { from_ns: s(5), to_ns: s(20) },
        quiet: Window { from_ns: s(1), to_ns: s(5) },
        flips: vec![s(FLIP), s(BACK)],
        patched: vec![Window { from_ns: s(FLIP), to_ns: s(BACK) }],
        patched_instances: vec!["new".into()],
    }
}

#[test]
fn what_the_patch_broke_is_told_by_who_answered_and_else_by_the_age_of_the_connection() {
    let by_patch = |opened, instance| job().is_by_patch(&failure(12, Class::New, opened, instance));
    assert!(by_patch(None, Some("new")), "the patched side answered");
    assert!(by_patch(Some(1), Some("new")));
    assert!(!by_patch(Some(12), Some("old")), "the old side answered, whatever the time");
    assert!(by_patch(Some(FLIP), None) && by_patch(Some(13), None), "opened while new flows went there");
    assert!(!by_patch(Some(9), None), "an old flow");
    assert!(!by_patch(Some(BACK), None), "given back");
    assert!(!by_patch(None, None), "never got that far");
}

#[test]
fn the_figures_of_a_job_follow_from_its_run() {
    let run = run(vec![
        failure(2, Class::New, Some(2), None),
        failure(11, Class::New, Some(11), None),
        failure(12, Class::New, Some(12), Some("new")),
        failure(13, Class::Keepalive, Some(9), None),
        failure(16, Class::Udp, Some(8), None),
    ]);
    let traffic = run.traffic(&job());
    assert_eq!((traffic.failed, traffic.failed_by_patch), (2, 2));
    // 15 s, 6 series, 100 a second, without the 7 or 8 answers that are missing in two series; 4 failures.
    assert_eq!(traffic.requests, 9000 - 14 + 4);
    assert_eq!((traffic.udp_sent, traffic.udp_answered), (3001, 3000));
    let gaps: Vec<_> = traffic.gaps_ms.iter().map(|(name, gap)| (name.as_str(), *gap)).collect();
    assert_eq!(gaps, [("back", 10.0), ("clone", 10.0), ("drain", 80.0)]);
    assert_eq!(traffic.longest_gap_ms, Some(10.0), "the silence is more than a second from both flips");
    assert_eq!((traffic.running_gap_ms, traffic.running_gap_quiet_ms), (Some(10.0), Some(10.0)));
    assert_eq!(traffic.given_back_after_s, Some(2.5), "from 11.5 to 14");
}

#[test]
fn a_silence_at_the_flip_is_a_violation_and_one_in_the_noise_is_not() {
    let mut job = job();
    job.flips = vec![s(12)];
    let traffic = Traffic { download_ok: None, idle_connection_ok: None, ..run(Vec::new()).traffic(&job) };
    assert_eq!((traffic.running_gap_ms, traffic.gap_limit_ms()), (Some(80.0), Some(30.0)));
    assert_eq!(traffic.violations(), ["80.0 ms without an answer at the flip, more than 30.0"]);
    let noisy = Traffic { running_gap_quiet_ms: Some(60.0), ..traffic.clone() };
    assert_eq!((noisy.gap_limit_ms(), noisy.violations()), (Some(90.0), vec![]));
    let unknown = Traffic { running_gap_quiet_ms: None, ..traffic };
    assert_eq!(unknown.violations().len(), 1);
}

#[test]
fn while_the_machine_stood_still_nobody_could_have_answered() {
    let job = Job { flips: vec![s(12)], ..job() };
    let halt = |ms: u64| Window { from_ns: s(12) + 5_000_000, to_ns: s(12) + (5 + ms) * 1_000_000 };
    let traffic = |ms| Run { standstills: vec![halt(ms)], ..run(Vec::new()) }.traffic(&job);
    let long = traffic(60);
    assert_eq!((long.longest_gap_ms, long.gap_stood_still_ms), (Some(80.0), Some(60.0)));
    assert_eq!((long.running_gap_ms, long.violations().len()), (Some(20.0), 2), "download and idle only");
    assert_eq!(traffic(40).violations()[0], "40.0 ms without an answer at the flip, more than 30.0");
}

#[test]
fn every_violation_is_named() {
    let traffic = Traffic {
        rate: 1.0,
        udp_rate: 1.0,
        requests: 0,
        failed: 1,
        failed_by_patch: 7,
        udp_sent: 2,
        udp_answered: 1,
        gaps_ms: BTreeMap::from([("clone".into(), 500.0), ("merge".into(), 500.1)]),
        longest_gap_ms: None,
        gap_stood_still_ms: None,
        running_gap_ms: None,
        running_gap_quiet_ms: None,
        download_ok: Some(false),
        idle_connection_ok: Some(false),
        given_back_after_s: None,
    };
    let found = traffic.violations();
    assert_eq!(found.len(), 6, "{found:?}");
    assert!(
        found.iter().any(|text| text.contains("merge")) && !found.iter().any(|text| text.contains("clone"))
    );
}

fn download(family: Family, started: u64, ended: u64, ok: bool) -> Download {
    let (sha256, instance) = (String::new(), None);
    Download { number: 0, family, started_ns: s(started), ended_ns: s(ended), bytes: 1, sha256, ok, instance }
}

#[test]
fn a_download_must_span_the_first_flip_in_each_family() {
    let ok = |downloads: &[Download], flips: &[u64]| {
        let mut run = run(Vec::new());
        run.downloads = downloads.to_vec();
        run.download_ok(&Job { flips: flips.to_vec(), ..job() })
    };
    let both = [download(Family::V4, 9, 11, true), download(Family::V6, 9, 11, true)];
    assert_eq!(ok(&both, &[s(FLIP)]), Some(true));
    assert_eq!(ok(&both[..1], &[s(FLIP)]), Some(false), "one family is missing");
    assert_eq!(ok(&both, &[s(11)]), Some(false), "ended before");
    let bad = download(Family::V4, 6, 7, false);
    assert_eq!(ok(&[both[0].clone(), both[1].clone(), bad.clone()], &[s(FLIP)]), Some(false));
    assert_eq!(ok(&[], &[s(FLIP)]), Some(false));
    assert_eq!(ok(&[], &[]), None, "nothing was asked for");
    assert_eq!((ok(&both[..1], &[]), ok(&[bad], &[])), (Some(true), Some(false)));
    let earlier = download(Family::V4, 1, 2, false);
    assert_eq!(ok(&[earlier], &[]), None, "another job's");
}

#[test]
fn an_idle_connection_must_be_older_than_the_flip_and_used_after_it() {
    let ok = |uses: &[(Family, u64, u64, bool)]| {
        let mut run = run(Vec::new());
        let used = |(family, opened, used, ok)| {
            let (number, instance) = (0, None);
            IdleUse { number, family, opened_ns: s(opened), used_ns: s(used), ok, instance }
        };
        run.idle_uses = uses.iter().copied().map(used).collect();
        run.idle_connection_ok(&job())
    };
    assert_eq!(ok(&[(Family::V4, 1, 12, true), (Family::V6, 1, 12, true)]), Some(true));
    assert_eq!(ok(&[(Family::V4, 1, 12, true), (Family::V6, 11, 12, true)]), Some(false));
    assert_eq!(ok(&[(Family::V4, 1, 12, true), (Family::V6, 1, 12, false)]), Some(false));
    assert_eq!(ok(&[(Family::V4, 1, 9, true), (Family::V6, 1, 9, true)]), Some(false));
    assert_eq!(ok(&[]), Some(false));
}
