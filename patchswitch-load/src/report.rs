//! The report of a run: what happened, and what follows from it for any window of time.
//!
//! Everything here is computed from the raw lists, by pure functions, so that a harness which learns the moment of
//! the flip only afterwards can ask about a window of its own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::record::{Class, ErrorKind, Failure, Family, Series};

/// A moment that the harness named. It begins a phase, which lasts until the next mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Its name; names may come back.
    pub name: String,
    /// When.
    pub at_ns: u64,
}

/// From a moment to another, the end not included; `CLOCK_BOOTTIME`, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// The beginning.
    pub from_ns: u64,
    /// The end.
    pub to_ns: u64,
}

impl Window {
    /// The time up to `reach_ns` before and after a moment.
    pub fn around(at_ns: u64, reach_ns: u64) -> Self {
        Self { from_ns: at_ns.saturating_sub(reach_ns), to_ns: at_ns.saturating_add(reach_ns) }
    }

    /// Whether a moment lies inside.
    pub fn contains(&self, at_ns: u64) -> bool {
        (self.from_ns..self.to_ns).contains(&at_ns)
    }

    /// What two windows have in common, if anything.
    pub fn overlap(&self, other: &Self) -> Option<Self> {
        let (from_ns, to_ns) = (self.from_ns.max(other.from_ns), self.to_ns.min(other.to_ns));
        (from_ns < to_ns).then_some(Self { from_ns, to_ns })
    }
}

/// A time without a completed answer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// The class that was left without an answer.
    pub class: Class,
    /// And its address family.
    pub family: Family,
    /// How long, in milliseconds.
    pub ms: f64,
    /// For how much of it nothing else could run either, in milliseconds: see [`Run::standstills`].
    pub stood_still_ms: f64,
    /// When it began.
    pub from_ns: u64,
}

impl Gap {
    /// For how much of it the machine ran and nobody was answered, in milliseconds.
    pub fn running_ms(&self) -> f64 {
        (self.ms - self.stood_still_ms).max(0.0)
    }
}

/// A download.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Download {
    /// Its number in the run.
    pub number: u64,
    /// Its address family.
    pub family: Family,
    /// When its connection was opened.
    pub started_ns: u64,
    /// When the last byte came, or when it failed.
    pub ended_ns: u64,
    /// Bytes of the body.
    pub bytes: u64,
    /// SHA-256 of the body, hexadecimal.
    pub sha256: String,
    /// Whether it was complete, with the expected digest.
    pub ok: bool,
    /// Who sent it.
    pub instance: Option<String>,
}

/// The use of an idle connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleUse {
    /// Its number in the run.
    pub number: u64,
    /// Its address family.
    pub family: Family,
    /// When its connection was opened.
    pub opened_ns: u64,
    /// When it was used, for the first time.
    pub used_ns: u64,
    /// Whether the request was answered.
    pub ok: bool,
    /// Who answered.
    pub instance: Option<String>,
}

/// How far the client itself was behind its schedule: answers are late by this much without the service's doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// The longest.
    pub longest_ms: f64,
    /// When that was.
    pub longest_at_ns: u64,
    /// Requests that were sent more than 10 ms late.
    pub over_10_ms: u64,
}

/// What happened to the client's sockets, apart from requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sockets {
    /// Keep-alive connections opened.
    pub keepalive_opened: u64,
    /// Of these, closed by the client because of their age.
    pub keepalive_renewed: u64,
    /// Closed because an answer said `Connection: close`.
    pub keepalive_told_to_close: u64,
    /// Closed by the server between two requests.
    pub keepalive_closed_by_server: u64,
    /// Datagrams that answered nothing: too late, twice, or somebody else's.
    pub udp_stray: u64,
}

/// The raw result of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// When the first request was due.
    pub started_ns: u64,
    /// When the last request had been issued.
    pub ended_ns: u64,
    /// The wall clock at the start, in milliseconds since 1970.
    pub started_wall_ms: u64,
    /// HTTP requests a second (keep-alive and new connections together, half of them each).
    pub rate: f64,
    /// Datagrams a second.
    pub udp_rate: f64,
    /// The moments that the harness named.
    pub marks: Vec<Mark>,
    /// Who answered: the index of an answer's instance.
    pub instances: Vec<String>,
    /// All answers.
    pub answers: Vec<Series>,
    /// All failures.
    pub failures: Vec<Failure>,
    /// All downloads.
    pub downloads: Vec<Download>,
    /// All uses of idle connections.
    pub idle_uses: Vec<IdleUse>,
    /// How punctual the client was.
    pub lag: Lag,
    /// What happened to its sockets.
    pub sockets: Sockets,
    /// When nothing could run on the machine, not even a thread with real-time priority: because the host of a virtual
    /// machine gave it no processor, or because the kernel was at something that it does not interrupt. In the order of
    /// time, apart from each other; given by a harness that watches it, else empty.
    #[serde(default)]
    pub standstills: Vec<Window>,
}

/// One class and family in one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeriesStats {
    /// The class.
    pub class: Class,
    /// The family.
    pub family: Family,
    /// Requests that were due in the window.
    pub requests: u64,
    /// Of these, failed.
    pub failed: u64,
    /// Median latency of the others, from the moment they were due.
    pub p50_ms: Option<f64>,
    /// 99th percentile.
    pub p99_ms: Option<f64>,
    /// The longest.
    pub max_ms: Option<f64>,
    /// The longest time without a completed answer that has a part in the window.
    pub longest_gap: Option<Gap>,
}

/// All classes in one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Requests that were due in the window, datagrams included.
    pub requests: u64,
    /// Of these, failed.
    pub failed: u64,
    /// Answers that were completed in the window, by who gave them.
    pub answered_by: BTreeMap<String, u64>,
    /// Each class and family.
    pub series: Vec<SeriesStats>,
    /// The longest gap of any steady class and family.
    pub longest_gap: Option<Gap>,
    /// When the first failure was known.
    pub first_failure_ns: Option<u64>,
}

/// A phase and what happened in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// The name of the mark that began it; `start` before the first.
    pub name: String,
    /// From that mark to the next one.
    pub window: Window,
    /// What happened.
    pub stats: Stats,
}

/// A mark and the longest gap near it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NearMark {
    /// The mark.
    pub mark: Mark,
    /// The longest gap that has a part within one second of it.
    pub longest_gap: Option<Gap>,
}

/// What a person reads first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The whole run.
    pub whole: Stats,
    /// Each phase.
    pub phases: Vec<Phase>,
    /// The surroundings of each mark.
    pub near_marks: Vec<NearMark>,
}

/// The file that `patchswitch-load run` writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What follows from the run.
    pub summary: Summary,
    /// The run itself.
    pub run: Run,
}

/// A file that is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Not the format.
    #[error("failed to parse the load report")]
    Parse(#[from] serde_json::Error),
    /// Lists of one series differ in length.
    #[error("the load report's list of {class} {family} is damaged")]
    Damaged {
        /// The class.
        class: Class,
        /// The family.
        family: Family,
    },
}

impl Report {
    /// Reads a report that [`Run::report`] made.
    ///
    /// # Errors
    /// [`ReportError`] if it is none.
    pub fn parse(text: &str) -> Result<Self, ReportError> {
        let report: Self = serde_json::from_str(text)?;
        match report.run.answers.iter().find(|series| !series.is_whole()) {
            Some(Series { class, family, .. }) => {
                Err(ReportError::Damaged { class: *class, family: *family })
            }
            None => Ok(report),
        }
    }
}

/// How far around a mark "near" reaches.
pub const NEAR_NS: u64 = 1_000_000_000;

impl Run {
    /// Adds the summary.
    pub fn report(self) -> Report {
        let phases = self.phases().into_iter();
        let phases = phases.map(|(name, window)| Phase { name, window, stats: self.stats(window) });
        let near = |mark: &Mark| NearMark {
            mark: mark.clone(),
            longest_gap: self.longest_gap(Window::around(mark.at_ns, NEAR_NS)),
        };
        let summary = Summary {
            whole: self.stats(self.whole()),
            phases: phases.collect(),
            near_marks: self.marks.iter().map(near).collect(),
        };
        Report { summary, run: self }
    }

    /// The whole run.
    pub fn whole(&self) -> Window {
        Window { from_ns: self.started_ns, to_ns: self.ended_ns }
    }

    /// The phases between the marks, in the order of time. Marks may have been given late, with a time of their own.
    pub fn phases(&self) -> Vec<(String, Window)> {
        let mut marks: Vec<_> = self.marks.iter().map(|mark| (mark.at_ns, mark.name.as_str())).collect();
        marks.sort_by_key(|(at, _)| *at);
        marks.insert(0, (0, "start"));
        let ends = marks.iter().skip(1).map(|(at, _)| *at).chain([u64::MAX]);
        let whole = self.whole();
        let phases = marks.iter().zip(ends).filter_map(|((from_ns, name), to_ns)| {
            let window = Window { from_ns: *from_ns, to_ns }.overlap(&whole)?;
            Some(((*name).to_owned(), window))
        });
        phases.collect()
    }

    /// When the first mark of a name was.
    pub fn mark(&self, name: &str) -> Option<u64> {
        self.marks.iter().find(|mark| mark.name == name).map(|mark| mark.at_ns)
    }

    /// What happened in a window.
    pub fn stats(&self, window: Window) -> Stats {
        let series: Vec<_> = self.answers.iter().map(|series| self.series_stats(series, window)).collect();
        let failures = || self.failures.iter().filter(|failure| window.contains(failure.failed_ns));
        Stats {
            requests: series.iter().map(|s| s.requests).sum(),
            failed: series.iter().map(|s| s.failed).sum(),
            answered_by: self.answered_by(window),
            longest_gap: longest(series.iter().filter_map(|s| s.longest_gap)),
            series,
            first_failure_ns: failures().map(|failure| failure.failed_ns).min(),
        }
    }

    /// The failures that were due in a window.
    pub fn failures_due(&self, window: Window) -> impl Iterator<Item = &Failure> {
        self.failures.iter().filter(move |failure| window.contains(failure.due_ns))
    }

    /// The longest time without a completed answer, over all steady classes and families, that has a part in the
    /// window. It is counted in full length, so that a window does not hide a gap by cutting it in two.
    pub fn longest_gap(&self, window: Window) -> Option<Gap> {
        longest(self.answers.iter().filter_map(|series| self.gap(series, window)))
    }

    /// The gap of a window in which the machine ran for longest, as [`Gap::running_ms`] tells: another one than the
    /// longest, perhaps.
    pub fn longest_running_gap(&self, window: Window) -> Option<Gap> {
        let all = self.answers.iter().flat_map(|series| self.gaps(series, window));
        all.max_by(|a, b| a.running_ms().total_cmp(&b.running_ms()))
    }

    fn gap(&self, series: &Series, window: Window) -> Option<Gap> {
        longest(self.gaps(series, window).into_iter())
    }

    /// All times without an answer of a class and family that have a part in the window.
    fn gaps(&self, series: &Series, window: Window) -> Vec<Gap> {
        let window = window.overlap(&self.whole()).filter(|_| series.class.is_steady());
        let Some(window) = window else { return Vec::new() };
        let end = self.to_us(self.ended_ns);
        let (from, to) = (self.to_us(window.from_ns), self.to_us(window.to_ns));
        let done = self.heard_us(series);
        // From the last answer at or before the window to the first one after it.
        let first = done.partition_point(|at| *at <= from).saturating_sub(1);
        let last = (done.partition_point(|at| *at < to) + 1).min(done.len());
        let before = if done.get(first).is_some_and(|at| *at <= from) { None } else { Some(0) };
        let after = if done.get(last.wrapping_sub(1)).is_some_and(|at| *at >= to) { None } else { Some(end) };
        let moments = || before.into_iter().chain(done[first..last].iter().copied()).chain(after);
        let pairs = moments().zip(moments().skip(1));
        let gap = |(from_us, to_us): (u64, u64)| Gap {
            class: series.class,
            family: series.family,
            ms: to_ms(to_us.saturating_sub(from_us)),
            stood_still_ms: to_ms(self.stood_still_us(from_us, to_us)),
            from_ns: self.started_ns + from_us * 1000,
        };
        pairs.map(gap).collect()
    }

    /// How long the machine stood still in a window.
    pub fn stood_still_ms(&self, window: Window) -> f64 {
        to_ms(self.stood_still_us(self.to_us(window.from_ns), self.to_us(window.to_ns)))
    }

    /// The same between two moments, all in microseconds since the start.
    fn stood_still_us(&self, from: u64, to: u64) -> u64 {
        // In their order, and none overlaps another: only those that touch the window are looked at.
        let first = self.standstills.partition_point(|still| self.to_us(still.to_ns) <= from);
        let touching = self.standstills[first..].iter().take_while(|still| self.to_us(still.from_ns) < to);
        let spans = touching.map(|w| (self.to_us(w.from_ns).max(from), self.to_us(w.to_ns).min(to)));
        spans.map(|(from, to)| to.saturating_sub(from)).sum()
    }

    /// When a class and family heard from the service, in microseconds since the start: a complete answer with another
    /// status than 200 is a failure, but it is no silence.
    fn heard_us(&self, series: &Series) -> Vec<u64> {
        let refusals = self.failures.iter().filter(|failure| {
            (failure.class, failure.family) == (series.class, series.family)
                && matches!(failure.error, ErrorKind::BadStatus(_))
        });
        let mut all = series.done_us().to_vec();
        all.extend(refusals.map(|failure| self.to_us(failure.failed_ns)));
        all.sort_unstable();
        all
    }

    fn series_stats(&self, series: &Series, window: Window) -> SeriesStats {
        let (from, to) = (self.to_us(window.from_ns), self.to_us(window.to_ns));
        let due = series.iter().filter(|answer| (from..to).contains(&answer.due_us()));
        let mut latencies: Vec<u32> = due.map(|answer| answer.latency_us).collect();
        latencies.sort_unstable();
        let failed = self.failures_due(window);
        let failed = failed.filter(|f| f.class == series.class && f.family == series.family).count() as u64;
        SeriesStats {
            class: series.class,
            family: series.family,
            requests: latencies.len() as u64 + failed,
            failed,
            p50_ms: percentile(&latencies, 50),
            p99_ms: percentile(&latencies, 99),
            max_ms: latencies.last().map(|us| to_ms(u64::from(*us))),
            longest_gap: self.gap(series, window),
        }
    }

    fn answered_by(&self, window: Window) -> BTreeMap<String, u64> {
        let (from, to) = (self.to_us(window.from_ns), self.to_us(window.to_ns));
        let mut counts = vec![0; self.instances.len()];
        for answer in self.answers.iter().flat_map(Series::iter) {
            if let Some(count) = counts.get_mut(usize::from(answer.instance))
                && (from..to).contains(&answer.done_us)
            {
                *count += 1;
            }
        }
        let counted = self.instances.iter().cloned().zip(counts);
        counted.filter(|(_, count)| *count > 0).collect()
    }

    fn to_us(&self, at_ns: u64) -> u64 {
        at_ns.saturating_sub(self.started_ns) / 1000
    }
}

fn longest(gaps: impl Iterator<Item = Gap>) -> Option<Gap> {
    gaps.max_by(|a, b| a.ms.total_cmp(&b.ms))
}

/// The smallest value that at least `percent` in a hundred do not exceed; of a sorted list.
fn percentile(sorted: &[u32], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).map(|us| to_ms(u64::from(*us)))
}

#[expect(clippy::cast_precision_loss, reason = "a time in microseconds stays far below 2^53")]
fn to_ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

#[cfg(test)]
mod tests;
