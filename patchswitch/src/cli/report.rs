//! `patchswitch report`, and jobs as `status` shows them: of jobs under way as well as of those that are over.

use std::path::Path;

use clap::Args;
use patchswitch::config;
use patchswitch::exit::ExitCode;
use patchswitch::manager::Manager;
use patchswitch::names::Name;
use patchswitch::store::{self, JobId, Step, Store};
use patchswitch::switchover::{self, JobView, Progress, Room};
use serde_json::{Value, json};

use super::print;

/// Arguments of `report`.
#[derive(Debug, Args)]
pub(crate) struct ReportOf {
    /// Number of the job; default: the last one.
    job: Option<JobId>,
}

impl ReportOf {
    pub(crate) fn run(&self, manager: &Manager, json: bool) -> anyhow::Result<ExitCode> {
        let Some(view) = switchover::job(manager, self.job)? else {
            match self.job {
                Some(id) => anyhow::bail!("there is no job {id}; `patchswitch report` shows the last one"),
                None => anyhow::bail!("there was no job yet; `patchswitch apply` begins one"),
            }
        };
        if json {
            let JobView { job, progress, steps, report, log } = &view;
            print::json(&json!({
                "schema": "patchswitch.job/1", "job": job, "progress": progress, "report": report, "steps": steps,
                "log": log,
            }))?;
        } else {
            print::text(&lines(&view));
        }
        Ok(ExitCode::Done)
    }
}

fn lines(view: &JobView) -> String {
    let mut text = match &view.report {
        Some(report) => story(report) + "\n",
        None => head(view),
    };
    for step in &view.steps {
        text += &step_line(step);
    }
    if let Some(error) = view.report.as_ref().and_then(|report| report["error"].as_str()) {
        text += &format!("{error}\n");
    }
    if let Some(code) = view.job.exit_code {
        let meaning = ExitCode::from_number(code).map_or_else(String::new, |code| format!(" ({code})"));
        text += &format!("exit code {code}{meaning}\n");
    }
    if let Some(log) = &view.log {
        text += &format!("it said: {}\n", log.display());
    }
    text
}

/// What can be said of a job that has no report: it is under way, or was ended by `up`.
fn head(view: &JobView) -> String {
    let job = &view.job;
    let how = match view.progress {
        Progress::Running => format!("process {} works on it since {:.0}", job.pid, job.started_at),
        Progress::Interrupted => "its process is gone; `patchswitch up` puts things right".to_owned(),
        Progress::Over => job.message.clone().unwrap_or_else(|| "over".to_owned()),
    };
    format!("job {} ({} of {}): {how}\n", job.id, job.kind, job.service)
}

fn step_line(step: &Step) -> String {
    let seconds = step.ended_at.map_or_else(
        || "       … ".to_owned(),
        |end| format!("{:>8.2} s", (end - step.began_at).total(jiff::Unit::Second).unwrap_or(0.0)),
    );
    let details = step.outcome.as_ref().and_then(Value::as_object).map_or_else(String::new, |outcome| {
        let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        outcome.iter().map(|(key, value)| format!("  {key} {}", plain(value))).collect()
    });
    format!("  {:<10} {:<9} {seconds}{details}\n", step.phase, step.state.to_string())
}

/// A report, for people.
pub(crate) fn story(report: &Value) -> String {
    let word = |key: &str| report[key].as_str().unwrap_or("?");
    let number = |at: &str| report.pointer(at).and_then(Value::as_f64);
    let (service, outcome) = (word("service"), word("outcome"));
    let mut text = format!("job {} ({} of {service}): {outcome}", report["job"], word("kind"));
    if let Some(flip) = number("/switch/flip_us") {
        text += &format!("\n  new flows moved with one store ({flip:.1} µs)");
    }
    for (key, what) in [("waited", "the switch"), ("waited_back", "the switch back")] {
        let part =
            |name: &str| report.pointer(&format!("/{key}/{name}")).and_then(Value::as_f64).unwrap_or(0.0);
        if report[key].is_object() {
            text += &format!(
                "\n  new flows waited {:.0} ms for {what}: finish {:.0}, stop {:.0}, move {:.0}, start {:.0}, check {:.0}; {} packets, {} of \
                 them new connections ({} sent twice)",
                part("flows/held_ms"),
                part("finish_ms"),
                part("stop_ms"),
                part("move_ms"),
                part("start_ms"),
                part("check_ms"),
                part("flows/frames"),
                part("flows/connections"),
                part("flows/repeats"),
            );
        }
    }
    if let Some(freeze) = number("/freeze_ms") {
        text += &format!("\n  writers waited {freeze:.0} ms for the clone");
    }
    if let (Some(flows), Some(seconds)) = (number("/drain/flows_at_start"), number("/drain/seconds")) {
        let reset = number("/drain/reset").unwrap_or(0.0);
        text += &match reset > 0.0 {
            true => format!("\n  {flows} old flows, {reset} of which were cut after {seconds:.1} s"),
            false => format!("\n  {flows} old flows ended by themselves in {seconds:.1} s"),
        };
    }
    for (key, what) in [("lost_by_switch", "the switch"), ("lost_by_give_back", "the rollback")] {
        if let Some(loss) = report[key].as_object() {
            let sectors = match &loss["sectors"] {
                Value::Null => "sectors that are not known".to_owned(),
                known => format!("{known} sectors"),
            };
            text += &format!("\n  lost by {what}: {sectors}, {} files outside may_lose", loss["files"]);
        }
    }
    if word("kind") == "apply" && outcome == "switched" {
        text += &format!("\n  next: patchswitch commit {service}, or patchswitch rollback {service}");
    }
    text
}

/// The jobs that are not over. Where there is no store there are none; `status` of the switch alone makes none.
///
/// With them the clones that can run out of room.
pub(crate) fn open_jobs(config: &Path, service: Option<&Name>) -> anyhow::Result<(Vec<JobView>, Vec<Room>)> {
    let state = store::state_dir(&config::load(config)?.agent.state_dir);
    if !state.join("state.db").exists() {
        return Ok((Vec::new(), Vec::new()));
    }
    let store = Store::open(&state)?;
    let jobs = switchover::open_jobs(&store, &state, service)?;
    // Jobs matter more: what else cannot be known must not hide them.
    let rooms = switchover::rooms(&store, service).unwrap_or_else(|error| {
        tracing::warn!("how full the stores of clones are is not known: {error}");
        Vec::new()
    });
    Ok((jobs, rooms))
}

/// How full a clone's store is, for people.
pub(crate) fn room_lines(room: &Room) -> String {
    let Room { service, clone, .. } = room;
    match (room.percent, room.scarce) {
        (None, _) => format!(
            "the store of {clone} is full, and the clone is lost\n  next   patchswitch rollback {service} --discard-writes"
        ),
        (Some(percent), true) => format!(
            "the store of {clone} is {percent} % full: the clone is lost when it is full\n  next   patchswitch commit \
             {service}, or patchswitch rollback {service}"
        ),
        (Some(percent), false) => format!("the store of {clone} is {percent} % full"),
    }
}

/// A job that is not over, for people.
pub(crate) fn open_job_lines(view: &JobView) -> String {
    let job = &view.job;
    let phase = view.steps.last().map_or("beginning", |step| step.phase.as_str());
    match view.progress {
        Progress::Running => {
            let stop = match job.kind.as_str() {
                "apply" => format!("\n  stop   kill {}, which undoes it in order", job.pid),
                // The others are at their end soon, and there is no way back from them.
                _ => String::new(),
            };
            format!(
                "job {} ({} of {}): {phase}, process {} since {:.0}\n  watch  patchswitch report {}{stop}",
                job.id, job.kind, job.service, job.pid, job.started_at, job.id
            )
        }
        _ => format!(
            "job {} ({} of {}): {phase}, interrupted\n  next   patchswitch up",
            job.id, job.kind, job.service
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_fills_up_is_told_of_with_what_to_do() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        let room = |percent, scarce| {
            let (service, partition) = (name("web"), name("web-b"));
            room_lines(&Room { service, partition, clone: "ps-web-b-root".to_owned(), percent, scarce })
        };
        assert_eq!(room(Some(12), false), "the store of ps-web-b-root is 12 % full");
        let scarce = room(Some(81), true);
        assert!(scarce.contains("81 % full") && scarce.contains("patchswitch commit web"), "{scarce}");
        let lost = room(None, true);
        assert!(
            lost.contains("is lost") && lost.contains("patchswitch rollback web --discard-writes"),
            "{lost}"
        );
    }

    #[test]
    fn a_story_tells_the_figures_that_are_there_and_no_others() {
        let empty = json!({"job": 3, "kind": "apply", "service": "web", "outcome": "failed", "switch": null});
        assert_eq!(story(&empty), "job 3 (apply of web): failed");
        let full = json!({
            "job": 4, "kind": "apply", "service": "web", "outcome": "switched", "freeze_ms": 41.6,
            "switch": {"flip_us": 0.25}, "drain": {"flows_at_start": 7, "seconds": 2.0, "reset": 0},
            "lost_by_switch": {"sectors": 8, "files": 0}, "lost_by_give_back": {"sectors": null, "files": 1},
        });
        let text = story(&full);
        for part in [
            "0.2 µs",
            "42 ms",
            "7 old flows ended",
            "the switch: 8 sectors, 0 files",
            "the rollback: sectors that are not known, 1 files",
            "patchswitch rollback web",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
