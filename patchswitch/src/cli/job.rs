//! The daily verbs: `plan`, `apply`, `rollback`, `commit`, `report`, `up`, `down`.

use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use patchswitch::exit::ExitCode;
use patchswitch::manager::Manager;
use patchswitch::names::Name;
use patchswitch::store::JobId;
use patchswitch::switchover::{self, Ended, Options, Report, Watcher};
use serde_json::json;

use super::print;

/// Arguments of `plan` and `apply`.
#[derive(Debug, Args)]
pub(crate) struct Apply {
    /// Name of the service.
    service: Name,
    /// A patch, by number, digest or file name; may be given several times. Default: all that are approved and were
    /// not applied yet.
    #[arg(long = "patch", value_name = "PATCH")]
    patches: Vec<String>,
    /// Commit at the end: the clone becomes the disk. Without it the old partition is kept for a rollback.
    #[arg(long)]
    commit: bool,
    /// Go on although the old partition wrote files that the service does not declare in may_lose.
    #[arg(long)]
    discard_writes: bool,
    /// Leave the source of the old partition's replies as it is. Breaks UDP flows that are in flight: only to show
    /// what the rewrite is good for.
    #[arg(long)]
    without_notice: bool,
}

/// Arguments of `rollback` and `commit`.
#[derive(Debug, Args)]
pub(crate) struct Decide {
    /// Name of the service.
    service: Name,
    /// Go on although writes outside may_lose are lost.
    #[arg(long)]
    discard_writes: bool,
}

/// Arguments of `report`.
#[derive(Debug, Args)]
pub(crate) struct ReportOf {
    /// Number of the job; default: the last one.
    job: Option<JobId>,
}

/// Set by the first Ctrl-C or TERM.
static STOP: AtomicBool = AtomicBool::new(false);

fn watch_signals(json: bool) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                result = tokio::signal::ctrl_c() => if result.is_err() { return },
                _ = terminate.recv() => {}
            }
            if !STOP.swap(true, Ordering::Relaxed) && !json {
                print::progress("interrupted: undoing in order; this takes a moment");
            }
        }
    });
    Ok(())
}

fn watcher(json: bool) -> Watcher<'static> {
    let say: &'static dyn Fn(&str) = if json { &|_: &str| {} } else { &|text: &str| print::progress(text) };
    Watcher { stop: &|| STOP.load(Ordering::Relaxed), say }
}

impl Apply {
    fn options(&self) -> Options {
        Options {
            patches: self.patches.clone(),
            commit: self.commit,
            discard_writes: self.discard_writes,
            without_notice: self.without_notice,
        }
    }

    /// `plan`: what `apply` would do.
    pub(crate) fn plan(&self, manager: &Manager, json: bool) -> anyhow::Result<ExitCode> {
        let summary = switchover::plan(manager, &self.service, &self.options())?.summary();
        if json {
            print::json(&json!({"schema": "patchswitch.plan/1", "plan": summary}))?;
        } else {
            print::text(&format!(
                "{} would be cloned into {} and patched there with:\n  {}\nthen {1} would take over; flows that exist \
                 stay with {0} until they end\nnothing was changed; next: patchswitch apply {}",
                summary.active,
                summary.standby,
                summary.patches.join("\n  "),
                self.service
            ));
        }
        Ok(ExitCode::Done)
    }

    /// `apply`.
    pub(crate) async fn run(&self, manager: &mut Manager, json: bool) -> anyhow::Result<ExitCode> {
        watch_signals(json)?;
        let ended = switchover::apply(manager, &self.service, &self.options(), watcher(json)).await?;
        finish(ended, json)
    }
}

impl Decide {
    fn options(&self) -> Options {
        Options { discard_writes: self.discard_writes, ..Options::default() }
    }

    /// `rollback`.
    pub(crate) async fn rollback(&self, manager: &mut Manager, json: bool) -> anyhow::Result<ExitCode> {
        watch_signals(json)?;
        let ended = switchover::roll_back(manager, &self.service, &self.options(), watcher(json)).await?;
        finish(ended, json)
    }

    /// `commit`.
    pub(crate) async fn commit(&self, manager: &mut Manager, json: bool) -> anyhow::Result<ExitCode> {
        let ended =
            switchover::make_permanent(manager, &self.service, &self.options(), watcher(json)).await?;
        finish(ended, json)
    }
}

fn finish(ended: Ended, json: bool) -> anyhow::Result<ExitCode> {
    let report = &ended.report;
    if json {
        print::json(report)?;
    } else if ended.error.is_none() {
        print::text(&story(report));
    }
    if let Some(error) = &ended.error {
        print::progress(&format!("patchswitch: {error}"));
    }
    Ok(ended.code)
}

fn story(report: &Report) -> String {
    let mut text = format!("job {} ({}): {}", report.job, report.kind, report.outcome);
    if let Some(switch) = &report.switch {
        text += &format!("\n  new flows moved with one store ({:.1} µs)", switch.flip_us);
    }
    if let Some(freeze) = report.freeze_ms {
        text += &format!("\n  writers waited {freeze:.0} ms for the clone");
    }
    if let Some(drain) = &report.drain {
        text +=
            &format!("\n  {} old flows ended by themselves in {:.1} s", drain.flows_at_start, drain.seconds);
    }
    for (loss, what) in [(&report.lost_by_switch, "the switch"), (&report.lost_by_give_back, "the rollback")]
    {
        if let Some(loss) = loss {
            let (sectors, files) = (loss.sectors, loss.files);
            text += &format!("\n  lost by {what}: {sectors} sectors, {files} files outside may_lose");
        }
    }
    if report.kind == "apply" && report.outcome == "switched" {
        text += &format!("\n  next: patchswitch commit {0}, or patchswitch rollback {0}", report.service);
    }
    text
}

impl ReportOf {
    pub(crate) fn run(&self, manager: &Manager, json: bool) -> anyhow::Result<ExitCode> {
        let jobs = manager.store.jobs(None, 1000)?;
        let job = match self.job {
            Some(id) => jobs.into_iter().find(|job| job.id == id),
            None => jobs.into_iter().next_back(),
        };
        let job = job.ok_or_else(|| anyhow::anyhow!("there is no such job"))?;
        let path = Report::path(manager.state(), job.id);
        let report: serde_json::Value = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)?,
            Err(_) => serde_json::Value::Null,
        };
        let steps = manager.store.steps(job.id)?;
        if json {
            print::json(
                &json!({"schema": "patchswitch.job/1", "job": job, "report": report, "steps": steps}),
            )?;
            return Ok(ExitCode::Done);
        }
        let end = job.message.as_deref().unwrap_or("not over");
        print::text(&format!("job {} ({} {}): {end}", job.id, job.kind, job.service));
        for step in steps {
            let seconds = step
                .ended_at
                .map_or(0.0, |end| (end - step.began_at).total(jiff::Unit::Second).unwrap_or(0.0));
            print::text(&format!("  {:<10} {:<9} {seconds:>8.2} s", step.phase, step.state.to_string()));
        }
        Ok(ExitCode::Done)
    }
}

/// `up`: puts everything right after a kill or a boot.
pub(crate) async fn up(manager: &mut Manager, json: bool) -> anyhow::Result<ExitCode> {
    let done = manager.up().await?;
    if json {
        print::json(&json!({"schema": "patchswitch.up/1", "up": done}))?;
    } else {
        for action in &done.actions {
            print::text(action);
        }
        if done.actions.is_empty() && done.failures.is_empty() {
            print::text("everything is as it should be; nothing to do");
        }
        for failure in &done.failures {
            print::progress(&format!("patchswitch: {failure}"));
        }
    }
    Ok(if done.failures.is_empty() { ExitCode::Done } else { ExitCode::Failed })
}

/// `down`: takes everything out of the kernel again; what is stored stays.
pub(crate) async fn down(manager: &mut Manager, json: bool) -> anyhow::Result<ExitCode> {
    let stopped = manager.down().await?;
    if json {
        print::json(&json!({"schema": "patchswitch.down/1", "stopped": stopped}))?;
    } else if stopped.is_empty() {
        print::text("nothing was running; nothing to do");
    } else {
        let names: Vec<_> = stopped.iter().map(Name::as_str).collect();
        print::text(&format!("stopped: {}; `patchswitch up` brings them back", names.join(", ")));
    }
    Ok(ExitCode::Done)
}
