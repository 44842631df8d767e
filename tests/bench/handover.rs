//! Rows 1 to 4 and 7: what who uses the service notices of a switch, under an open-loop load and two probes.
//!
//! ```text
//!  quiet │ switch │ switch back │ quiet      one block: windows of one length, a switch early in the two in the middle
//! ```

use std::time::Duration;

use anyhow::Result;
use patchswitch_load::client::Settings;
use patchswitch_load::report::{self, Run};
use patchswitch_tests::netlab::SERVICE;
use patchswitch_tests::traffic::{Load, PORT, Server};

use crate::loads;
use crate::peers::{self, AGAIN, PRODUCT, Peer, Product, Side};
use crate::plan::{Scale, Selection};
use crate::probe::{Answers, Probes, TCP_RATE, UDP_RATE};
use crate::report::{Figure, Found, Target, say};
use crate::stats::{Block, quantile};
use crate::window::{Repaired, Window, many, window};

/// Requests a second, half of them on connections of their own.
const RATE: f64 = 500.0;
/// Between two of many switches.
const PACE: Duration = Duration::from_millis(20);
const GAP: [&str; 2] = ["longest gap, 10 kHz datagrams", "longest gap, 1 kHz on a TCP connection"];
const P999: &str = "P99.9 of requests";

/// What happened to a peer: windows of blocks in their order, and all that was heard.
struct Course {
    /// Four quiet windows each.
    control: Vec<[Window; 4]>,
    /// Quiet, there, back, quiet.
    blocks: Vec<[Window; 4]>,
    /// Many switches in close succession; how many.
    many: Option<(Window, u32)>,
    run: Run,
    heard: [Answers; 2],
}

/// Measures all of these rows.
pub(crate) fn measure(scale: Scale, selection: &Selection, found: &mut Found) -> Result<()> {
    let mut product = Product::new("handover")?;
    let course = Course::of(&mut product, scale, true)?;
    drop(product);
    let limits = control(&course, found);
    judge(PRODUCT, &course, &limits, found);
    for (key, _) in peers::ALL.into_iter().filter(|(key, _)| *key != peers::FLOOR && selection.peer(key)) {
        if let Some(reason) = peers::hindrance(key) {
            found.not_run("a switch under load", key, reason);
            continue;
        }
        let mut peer = peers::make(key)?;
        let course = Course::of(peer.as_mut(), scale, false)?;
        judge(key, &course, &limits, found);
    }
    Ok(())
}

impl Course {
    fn of(peer: &mut dyn Peer, scale: Scale, whole: bool) -> Result<Self> {
        let _servers = [Server::start(peer.ns(Side::A), "a")?, Server::start(peer.ns(Side::B), "b")?];
        let settings = Settings {
            rate: RATE,
            connections: 8,
            renew: Duration::from_secs(2),
            ..Settings::new(vec![SERVICE[0].parse()?], PORT)
        };
        let load = Load::start(&peer.lab().client, settings);
        let probes = Probes::start(peer)?;
        std::thread::sleep(Duration::from_millis(500));
        peer.prepare()?;
        std::thread::sleep(Duration::from_millis(500));
        let slow = peer.settles_s() > 0.0;
        let count = scale.switch_blocks(slow, whole);
        let (mut control, mut blocks) = (Vec::new(), Vec::new());
        for _ in 0..if whole { count } else { 0 } {
            let mut quiet = || window(peer, scale.window(), None);
            control.push([quiet()?, quiet()?, quiet()?, quiet()?]);
        }
        for _ in 0..count {
            let mut next = |to| window(peer, scale.window(), to);
            blocks.push([next(None)?, next(Some(Side::B))?, next(Some(Side::A))?, next(None)?]);
        }
        let many = if whole { Some(many(peer, scale.many_switches(), PACE)?) } else { None };
        // What is under way may fail yet.
        std::thread::sleep(Duration::from_millis(300));
        let heard = probes.stop();
        Ok(Self { control, blocks, many, run: load.stop()?, heard })
    }

    /// From the first switch on.
    fn switched(&self) -> report::Window {
        let from_ns = self.blocks.first().map_or(self.run.ended_ns, |block| block[1].from_ns);
        report::Window { from_ns, to_ns: self.run.ended_ns }
    }

    fn switches(&self) -> f64 {
        self.blocks.len() as f64 * 2.0 + self.many.map_or(0.0, |(_, count)| f64::from(count))
    }

    /// The windows with a switch.
    fn middle(&self) -> impl Iterator<Item = &Window> {
        self.blocks.iter().flat_map(|block| &block[1..3]).chain(self.many.iter().map(|(window, _)| window))
    }

    fn gaps(&self, probe: usize, blocks: &[[Window; 4]]) -> Vec<Block> {
        let gap = |w: &Window| self.heard[probe].longest_gap_us(w.from_ns, w.to_ns);
        blocks.iter().map(|[q1, s1, s2, q2]| Block { a: [gap(q1), gap(q2)], b: [gap(s1), gap(s2)] }).collect()
    }

    /// Latencies of the requests that were due in some windows, in milliseconds, sorted.
    fn latencies(&self, windows: &[&Window]) -> Vec<f64> {
        let answers = self.run.answers.iter().flat_map(|series| series.iter());
        let inside = answers.filter(|answer| {
            let due = self.run.started_ns + answer.due_us() * 1000;
            windows.iter().any(|window| (window.from_ns..window.to_ns).contains(&due))
        });
        let mut found: Vec<f64> = inside.map(|answer| f64::from(answer.latency_us) / 1e3).collect();
        found.sort_by(f64::total_cmp);
        found
    }

    fn tails(&self, blocks: &[[Window; 4]]) -> Vec<Block> {
        let tail = |windows: &[&Window]| quantile(&self.latencies(windows), 0.999);
        let block = |[q1, s1, s2, q2]: &[Window; 4]| {
            let (quiet, switched) = (tail(&[q1, q2]), tail(&[s1, s2]));
            Block { a: [quiet; 2], b: [switched; 2] }
        };
        blocks.iter().map(block).collect()
    }
}

/// What a quiet time is in relation to itself.
struct Limits {
    gaps: [Figure; 2],
    tail: Figure,
}

fn control(course: &Course, found: &mut Found) -> Limits {
    let gap = |probe: usize| {
        Figure::ratio(3, GAP[probe], AGAIN, "µs to quiet", &course.gaps(probe, &course.control))
    };
    let limits = Limits {
        gaps: [gap(0), gap(1)],
        tail: Figure::ratio(4, P999, AGAIN, "ms to quiet", &course.tails(&course.control)),
    };
    for figure in limits.gaps.iter().chain([&limits.tail]) {
        found.add(figure.clone());
    }
    let seconds = (course.run.ended_ns - course.run.started_ns) as f64 / 1e9;
    let [udp, tcp] = [0, 1].map(|probe| course.heard[probe].0.len() as f64 / seconds);
    say(&format!(
        "    the probes heard {udp:.0} answers of {UDP_RATE} and {tcp:.0} of {TCP_RATE} a second; the load was at most {:.1} ms late",
        course.run.lag.longest_ms
    ));
    limits
}

fn judge(key: &str, course: &Course, limits: &Limits, found: &mut Found) {
    failed(key, course, found);
    let switches = course.switches();
    let each = |count: i64| count as f64 / switches;
    let sum = |of: fn(&Repaired) -> i64| course.middle().map(|window| of(&window.trouble)).sum::<i64>();
    // What happens in quiet windows in as much time as there is for each switch in the others.
    let quiet = |of: fn(&Repaired) -> i64| {
        let windows = || course.blocks.iter().flat_map(|block| [&block[0], &block[3]]);
        let events = windows().map(|window| of(&window.trouble)).sum::<i64>() as f64;
        events / seconds(windows()) * seconds(course.middle()) / switches
    };
    let must = |figure: Figure, limit: f64| {
        if key == PRODUCT { figure.must(Target::AtMost(limit)) } else { figure }
    };
    let value = |row, metric, value| Figure::values(row, metric, key, "per switch", &[value]);
    found.add(must(value(2, "connections reset or timed out", each(sum(|t| t.broken))), quiet(|t| t.broken)));
    let in_blocks: i64 = course.blocks.iter().flat_map(|block| &block[1..3]).map(|w| w.trouble.again).sum();
    let note = format!(
        "{} in all, {} of them had arrived, {} were probes for a late acknowledgement; {in_blocks} at switches with time \
         between them",
        sum(|t| t.again),
        sum(|t| t.needless),
        sum(|t| t.probes)
    );
    found.add(must(value(2, "segments sent again", each(sum(|t| t.again))), quiet(|t| t.again)).note(note));
    for (probe, metric) in GAP.into_iter().enumerate() {
        if course.heard[probe].0.is_empty() {
            found.not_run(metric, key, "nothing was heard: it does not carry this");
            continue;
        }
        let blocks = course.gaps(probe, &course.blocks);
        let longest = |of: fn(&Block) -> [f64; 2]| blocks.iter().flat_map(of).fold(0.0, f64::max) / 1e3;
        let note = format!(
            "the longest of all: {:.1} ms; in quiet times {:.1} ms",
            longest(|b| b.b),
            longest(|b| b.a)
        );
        let figure = Figure::ratio(3, metric, key, "µs to quiet", &blocks);
        // Below the interval is as good as inside.
        let figure = must(figure, limits.gaps[probe].row.ratio_high).controlled_by(&limits.gaps[probe]);
        found.add(figure.note(note));
    }
    let figure = Figure::ratio(4, P999, key, "ms to quiet", &course.tails(&course.blocks));
    found.add(must(figure, 1.02).controlled_by(&limits.tail));
    if !course.heard[0].0.is_empty() {
        let wrong: usize = course.middle().map(|w| course.heard[0].misrouted(w.from_ns, w.to_ns)).sum();
        let wrong = each(i64::try_from(wrong).unwrap_or(i64::MAX));
        found.add(must(value(7, "datagrams of an old flow at the wrong side", wrong), 0.0));
    }
    found.add(must(value(7, "resets that the service sent", each(sum(|t| t.resets))), quiet(|t| t.resets)));
}

fn seconds<'a>(windows: impl Iterator<Item = &'a Window>) -> f64 {
    windows.map(Window::seconds).sum()
}

/// Row 1.
fn failed(key: &str, course: &Course, found: &mut Found) {
    let window = course.switched();
    let stats = course.run.stats(window);
    let (failed, requests) = (stats.failed as f64, stats.requests);
    let switches = course.switches();
    let bound = if stats.failed == 0 { loads::bound(requests) } else { String::new() };
    let figure = Figure::values(1, "requests failed", key, "per switch", &[failed / switches]);
    let figure = if key == PRODUCT { figure.must(Target::AtMost(0.0)) } else { figure };
    found.add(figure.note(format!("{failed} of {requests} requests in {switches} switches{bound}")));
}
