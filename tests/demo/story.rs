//! The story on the screen: what happens, with the seconds since the beginning.
#![expect(clippy::print_stdout, reason = "the demo tells what happens")]

use std::collections::BTreeMap;
use std::time::Instant;

use crate::jobs::PHASES;
use crate::report::{Check, JobReport, Negative, Quiet, RunReport, seen};

/// Tells.
#[derive(Debug)]
pub(crate) struct Story {
    start: Instant,
}

impl Story {
    pub(crate) fn begin() -> Self {
        Self { start: Instant::now() }
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// A line of the story.
    pub(crate) fn say(&self, text: &str) {
        println!("{:6.1} s  {text}", self.seconds());
    }

    /// A line that belongs to the one before.
    pub(crate) fn detail(&self, text: &str) {
        println!("{:6.1} s      {text}", self.seconds());
    }

    /// A new chapter.
    pub(crate) fn chapter(&self, text: &str) {
        println!();
        self.say(text);
    }
}

/// The end of the story: every job's figures, and what must hold.
pub(crate) fn conclusion(report: &RunReport) {
    let knee = report
        .knee
        .map_or_else(String::new, |knee| format!(", the service begins to lag at {knee:.0} requests/s"));
    println!("\nLinux {}, processors: {}{knee}", report.kernel, report.processors);
    let Quiet { seconds, requests, failed, resets_seen, retrans, longest_gap_ms, stood_still_ms, .. } =
        report.quiet;
    println!(
        "quiet time: {requests} requests in {seconds:.0} s, {failed} failed, longest time without an answer \
         {longest_gap_ms:.0} ms, {} resets, {retrans:.1} segments/s sent again; \
         the machine itself stood still for {stood_still_ms:.0} ms",
        seen(resets_seen),
    );
    for job in &report.jobs {
        println!("\n{}: {}, exit code {}", job.name, job.outcome, job.exit_code);
        print_job(job);
        print_checks(report.checks.iter().filter(|check| check.job.as_deref() == Some(&job.name)));
    }
    println!("\nthe run as a whole");
    if let Some(Negative { sent_without_notice, answered_without_notice, .. }) = report.negative {
        println!(
            "  without the notice, {answered_without_notice} of {sent_without_notice} datagrams were answered"
        );
    }
    for left in &report.leftovers {
        println!("  left behind: {left}");
    }
    print_checks(report.checks.iter().filter(|check| check.job.is_none()));
    let broken = report.checks.iter().filter(|check| !check.holds).count();
    println!(
        "\n{} of {} conditions hold; {:.0} s",
        report.checks.len() - broken,
        report.checks.len(),
        report.seconds
    );
}

fn print_job(job: &JobReport) {
    println!(
        "  {} requests at {:.0}/s, {} failed, {} broken by the patch itself",
        job.requests, job.rate, job.failed, job.failed_by_patch
    );
    for (what, count) in &job.failures {
        println!("  failed in {what}: {count}");
    }
    println!("  the machine itself stood still for {:.0} ms of all that time", job.stood_still_ms);
    println!("  phase        seconds   longest time without an answer");
    for (name, seconds, gap) in rows(&job.phases, &job.gaps_ms) {
        let seconds = seconds.map_or_else(|| "      -".into(), |seconds| format!("{seconds:7.2}"));
        let gap = gap.map_or_else(|| "-".into(), |gap| format!("{gap:.0} ms{}", explain(&name, gap, job)));
        println!("  {name:<12} {seconds}   {gap}");
    }
    let text = |value: Option<f64>, unit: &str| {
        value.map_or_else(|| "-".into(), |value| format!("{value:.1} {unit}"))
    };
    println!(
        "  flip {}, writers waited {} for the clone, which took {}; the clone differs by {:.1} MB",
        text(job.flip_us, "µs"),
        text(job.freeze_ms, "ms"),
        text(job.clone_ms, "ms"),
        megabytes(job.cow_bytes.unwrap_or(0)),
    );
    println!(
        "  sectors of 512 bytes left behind by the switch: {}; by the way back: {}",
        job.lost_sectors_switch, job.lost_sectors_back
    );
    if let Some(flows) = job.old_flows_at_flip {
        println!("  {flows} flows stayed with the old partition; drained in {}", text(job.drained_s, "s"));
    }
    if let Some(error) = &job.error {
        println!("  it said: {}", error.trim().replace('\n', "\n           "));
    }
}

/// Why a phase has gaps that a quiet time has not.
fn explain(phase: &str, gap: f64, job: &JobReport) -> String {
    if gap <= job.gap_limit_ms() {
        return String::new();
    }
    let reason = match phase {
        "clone" => "writers wait while the disks are frozen".to_owned(),
        "scan" => "the scan shares the one processor".to_owned(),
        "patch" => "dpkg shares the one processor".to_owned(),
        "plan" | "inject" | "boot" | "restart" | "verify" => "the clone shares the one processor".to_owned(),
        "commit" => "the merge shares the disk".to_owned(),
        _ => return String::new(),
    };
    format!(" ({reason})")
}

/// Phases with their times and gaps: those of a job in its order, then others by name.
fn rows(
    phases: &BTreeMap<String, f64>,
    gaps: &BTreeMap<String, f64>,
) -> Vec<(String, Option<f64>, Option<f64>)> {
    let mut names: Vec<&String> = phases.keys().chain(gaps.keys()).collect();
    names.sort_by_key(|name| (PHASES.iter().position(|known| known == name).unwrap_or(PHASES.len()), *name));
    names.dedup();
    names.into_iter().map(|name| (name.clone(), phases.get(name).copied(), gaps.get(name).copied())).collect()
}

fn print_checks<'a>(checks: impl Iterator<Item = &'a Check>) {
    for check in checks {
        println!("  {} {}", if check.holds { "ok  " } else { "FAIL" }, check.text);
    }
}

#[expect(clippy::cast_precision_loss, reason = "a disk has fewer than 2^53 bytes")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_come_in_the_order_of_a_job() {
        let map = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), 1.0)).collect();
        let found = rows(&map(&["drain", "clone", "arm"]), &map(&["clone", "after", "plan"]));
        let names: Vec<_> = found.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["plan", "clone", "arm", "drain", "after"]);
        assert_eq!((found[0].1, found[0].2), (None, Some(1.0)));
        assert_eq!((found[1].1, found[1].2), (Some(1.0), Some(1.0)));
    }

    #[test]
    fn only_gaps_out_of_the_noise_are_explained() {
        let job = JobReport { running_gap_quiet_ms: 30.0, ..JobReport::default() };
        assert_eq!(explain("clone", 49.0, &job), "");
        assert!(explain("clone", 51.0, &job).contains("frozen"));
        assert_eq!(explain("drain", 400.0, &job), "");
    }
}
