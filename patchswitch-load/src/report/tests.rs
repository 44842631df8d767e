//! See the parent module.

use super::*;
use crate::record::{Answer, ErrorKind};

const START: u64 = 5_000_000_000;

/// A moment, in milliseconds since the start.
fn at(ms: u64) -> u64 {
    START + ms * 1_000_000
}

fn window(from: u64, to: u64) -> Window {
    Window { from_ns: at(from), to_ns: at(to) }
}

fn series(class: Class, family: Family, answers: &[(u64, u32)]) -> Series {
    let mut series = Series::new(class, family);
    for (done_ms, latency_ms) in answers {
        series.push(Answer { done_us: done_ms * 1000, latency_us: latency_ms * 1000, instance: 0 });
    }
    series
}

fn failure(due_ms: u64, class: Class) -> Failure {
    Failure {
        number: due_ms,
        class,
        family: Family::V4,
        due_ns: at(due_ms),
        failed_ns: at(due_ms + 50),
        wall_ms: 0,
        opened_ns: None,
        local: None,
        instance: None,
        error: ErrorKind::Refused,
    }
}

fn run(answers: Vec<Series>, failures: Vec<Failure>) -> Run {
    Run {
        started_ns: START,
        ended_ns: at(1000),
        started_wall_ms: 0,
        rate: 10.0,
        udp_rate: 0.0,
        marks: Vec::new(),
        instances: vec!["blue".into()],
        answers,
        failures,
        downloads: Vec::new(),
        idle_uses: Vec::new(),
        lag: Lag::default(),
        sockets: Sockets::default(),
        standstills: Vec::new(),
    }
}

fn gap_of(done_ms: &[u64], from: u64, to: u64) -> (u64, f64) {
    let answers: Vec<_> = done_ms.iter().map(|done| (*done, 0)).collect();
    let run = run(vec![series(Class::New, Family::V4, &answers)], Vec::new());
    let gap = run.longest_gap(window(from, to)).unwrap();
    ((gap.from_ns - START) / 1_000_000, gap.ms)
}

#[test]
fn a_gap_is_counted_in_full_in_every_window_that_it_touches() {
    let done = [100, 200, 500, 600, 700, 800, 900];
    assert_eq!(gap_of(&done, 0, 1000), (200, 300.0));
    assert_eq!(gap_of(&done, 210, 220), (200, 300.0), "in the middle of it");
    assert_eq!(gap_of(&done, 150, 201), (200, 300.0), "its first millisecond");
    assert_eq!(gap_of(&done, 499, 600), (200, 300.0), "its last millisecond");
    assert_eq!(gap_of(&done, 500, 700).1, 100.0, "not touched: an answer at the very beginning");
    assert_eq!(gap_of(&done, 100, 200), (100, 100.0), "not touched: an answer at the very end");
}

#[test]
fn before_the_first_answer_and_after_the_last_are_gaps_up_to_the_ends_of_the_run() {
    assert_eq!(gap_of(&[400, 500], 0, 450), (0, 400.0));
    assert_eq!(gap_of(&[400, 500], 450, 2000), (500, 500.0));
    assert_eq!(gap_of(&[], 300, 400), (0, 1000.0), "no answer at all");
    assert_eq!(gap_of(&[990, 1400], 980, 1000), (0, 990.0), "an answer after the end of the schedule");
    let run = run(vec![series(Class::New, Family::V4, &[])], Vec::new());
    assert_eq!(run.longest_gap(window(1000, 2000)), None, "the run was over");
}

#[test]
fn a_gap_says_for_how_much_of_it_the_machine_stood_still() {
    let gap = |standstills: &[(u64, u64)]| {
        let run =
            run(vec![series(Class::New, Family::V4, &[(100, 0), (300, 0), (450, 0), (1000, 0)])], Vec::new());
        let standstills = standstills.iter().map(|(from, to)| window(*from, *to)).collect();
        let run = Run { standstills, ..run };
        let gap = run.longest_gap(window(0, 460)).unwrap();
        (gap.ms, gap.stood_still_ms, run.stood_still_ms(window(0, 460)))
    };
    assert_eq!(gap(&[]), (550.0, 0.0, 0.0));
    assert_eq!(gap(&[(400, 500), (700, 800), (990, 1200)]), (550.0, 160.0, 60.0), "only what lies inside");
}

#[test]
fn the_longest_running_gap_is_not_always_the_longest() {
    let answers = vec![
        series(Class::New, Family::V4, &[(0, 0), (300, 0), (450, 0), (1000, 0)]),
        series(Class::Udp, Family::V4, &[(0, 0), (400, 0), (1000, 0)]),
    ];
    let longest = |standstills: Vec<Window>| {
        let run = Run { standstills, ..run(answers.clone(), Vec::new()) };
        let gap = run.longest_running_gap(window(0, 1000)).unwrap();
        (gap.class, gap.ms, gap.running_ms())
    };
    assert_eq!(longest(Vec::new()), (Class::Udp, 600.0, 600.0));
    assert_eq!(longest(vec![window(310, 320), window(410, 710)]), (Class::Udp, 400.0, 310.0 + 80.0));
}

#[test]
fn the_longest_gap_is_that_of_the_worst_steady_class() {
    let steady: Vec<_> = (0..=100).map(|n| (n * 10, 0)).collect();
    let answers = vec![
        series(Class::New, Family::V4, &steady),
        series(Class::Udp, Family::V6, &[(100, 0), (650, 0), (1000, 0)]),
        series(Class::Download, Family::V4, &[(1000, 900)]),
    ];
    let gap = run(answers, Vec::new()).longest_gap(window(0, 1000)).unwrap();
    assert_eq!((gap.class, gap.family, gap.ms), (Class::Udp, Family::V6, 550.0));
}

#[test]
fn a_request_belongs_to_the_phase_in_which_it_was_due() {
    let answers = series(Class::New, Family::V4, &[(90, 10), (110, 15), (250, 160), (300, 10)]);
    let run = run(vec![answers], vec![failure(99, Class::New), failure(100, Class::New)]);
    let before = run.stats(window(0, 100));
    assert_eq!((before.requests, before.failed), (4, 1));
    assert_eq!(before.series[0].max_ms, Some(160.0));
    assert_eq!(before.answered_by["blue"], 1, "who answered counts when the answer came");
    assert_eq!(before.first_failure_ns, None, "it was not known yet");
    let after = run.stats(window(100, 1000));
    assert_eq!((after.requests, after.failed), (2, 1));
    assert_eq!(after.first_failure_ns, Some(at(149)));
    assert_eq!(run.stats(run.whole()).requests, 6);
}

#[test]
fn percentiles_are_of_the_answered_ones() {
    let answers: Vec<_> = (1..=200).map(|n| (500, n)).collect();
    let run = run(vec![series(Class::New, Family::V4, &answers)], vec![failure(400, Class::New)]);
    let stats = &run.stats(run.whole()).series[0];
    assert_eq!((stats.p50_ms, stats.p99_ms, stats.max_ms), (Some(100.0), Some(198.0), Some(200.0)));
    let none = &run.stats(window(900, 1000)).series[0];
    assert_eq!((none.requests, none.p50_ms, none.max_ms), (0, None, None));
}

#[test]
fn phases_follow_the_marks_even_if_they_were_given_late() {
    let mut run = run(Vec::new(), Vec::new());
    let mark = |name: &str, ms| Mark { name: name.into(), at_ns: at(ms) };
    run.marks = vec![mark("clone", 200), mark("drain", 700), mark("flip", 600), mark("after", 1500)];
    let phases = run.phases();
    let expected = [("start", 0, 200), ("clone", 200, 600), ("flip", 600, 700), ("drain", 700, 1000)];
    assert_eq!(phases, expected.map(|(name, from, to)| (name.to_owned(), window(from, to))));
    run.marks = vec![mark("all", 0)];
    assert_eq!(run.phases(), [("all".to_owned(), window(0, 1000))], "no empty phase");
}

#[test]
fn the_report_names_the_gap_near_each_mark() {
    let mut run = run(vec![series(Class::New, Family::V4, &[(100, 0), (400, 0), (1000, 0)])], Vec::new());
    run.ended_ns = at(9000);
    run.marks =
        vec![Mark { name: "flip".into(), at_ns: at(1500) }, Mark { name: "end".into(), at_ns: at(9990) }];
    let report = run.report();
    assert_eq!(report.summary.near_marks[0].longest_gap.unwrap().ms, 8000.0);
    assert_eq!(
        report.summary.near_marks[1].longest_gap,
        Some(report.summary.near_marks[0].longest_gap.unwrap())
    );
    assert_eq!(report.summary.phases.len(), 2);
}

#[test]
fn a_damaged_report_is_refused() {
    let run = run(vec![series(Class::New, Family::V4, &[(1, 0), (2, 0)])], Vec::new());
    let text = serde_json::to_string(&run.report()).unwrap();
    assert!(Report::parse(&text).is_ok());
    let damaged = text.replace("\"latency_us\":[0,0]", "\"latency_us\":[0]");
    assert!(matches!(Report::parse(&damaged), Err(ReportError::Damaged { class: Class::New, .. })));
    assert!(matches!(Report::parse("{}"), Err(ReportError::Parse(_))));
}
