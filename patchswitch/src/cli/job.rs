//! The daily verbs: `plan`, `apply`, `rollback`, `commit`, `up`, `down`.

use std::ffi::OsString;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use patchswitch::exit::ExitCode;
use patchswitch::manager::Manager;
use patchswitch::names::Name;
use patchswitch::switchover::{self, Ended, Options, Summary, Watcher};
use serde_json::json;

use super::{background, print, report};

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

/// Arguments of `apply`.
#[derive(Debug, Args)]
#[command(after_help = "\
Ctrl-C and SIGTERM undo the job in order: before the switch the clone is discarded, after it the service is given back.
With --detach the exit code is 0 as soon as the job has begun; `report` has the exit code of the job itself.")]
pub(crate) struct Start {
    #[command(flatten)]
    apply: Apply,
    /// Go on in the background, also when the terminal is gone; print the number of the job.
    #[arg(long)]
    detach: bool,
    /// Leave the terminal: this is the process in the background.
    #[arg(long, hide = true, conflicts_with = "detach")]
    supervised: bool,
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

/// Set by the first Ctrl-C or TERM.
static STOP: AtomicBool = AtomicBool::new(false);

/// Notes Ctrl-C and TERM from now on, for [`is_stopped`].
pub(super) fn watch_signals(json: bool) -> std::io::Result<()> {
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

/// Whether the user wants it undone.
pub(super) fn is_stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

fn watcher(json: bool) -> Watcher<'static> {
    let say: &'static dyn Fn(&str) = if json { &|_: &str| {} } else { &|text: &str| print::progress(text) };
    Watcher { stop: &is_stopped, say }
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
                "{} would be cloned into {} and patched there with:\n  {}\nthen {1} would take over; {}\nnothing was \
                 changed; next: patchswitch apply {}",
                summary.active,
                summary.standby,
                summary.patches.join("\n  "),
                course(&summary),
                self.service
            ));
        }
        Ok(ExitCode::Done)
    }

    /// The same, for the process in the background, whose directory is another.
    fn in_background(&self, config: &Path, verbose: u8) -> std::io::Result<Vec<OsString>> {
        let config = std::path::absolute(config)?;
        let mut arguments: Vec<OsString> = vec!["apply".into(), "--supervised".into()];
        arguments.extend(["--config".into(), config.into()]);
        for patch in &self.patches {
            arguments.push(format!("--patch={patch}").into());
        }
        let flags = [
            ("--commit", self.commit),
            ("--discard-writes", self.discard_writes),
            ("--without-notice", self.without_notice),
        ];
        arguments.extend(flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag.into()));
        arguments.extend((0..verbose).map(|_| "-v".into()));
        arguments.push(self.service.as_str().into());
        Ok(arguments)
    }
}

impl Start {
    /// `apply`.
    pub(crate) async fn run(
        &self,
        manager: &mut Manager,
        config: &Path,
        verbose: u8,
        json: bool,
    ) -> anyhow::Result<ExitCode> {
        let (service, options) = (&self.apply.service, self.apply.options());
        if self.detach {
            // What can be known now is said now.
            switchover::plan(manager, service, &options)?;
            return background::start(manager, service, &self.apply.in_background(config, verbose)?, json);
        }
        if self.supervised {
            rustix::process::setsid()?;
        }
        watch_signals(json)?;
        let ended = switchover::apply(manager, service, &options, watcher(json)).await?;
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
        print::text(&report::story(&serde_json::to_value(report)?));
    }
    if let Some(error) = &ended.error {
        print::progress(&format!("patchswitch: {error}"));
    }
    Ok(ended.code)
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

/// What becomes of flows, by the strategy.
fn course(summary: &Summary) -> String {
    let (old, hold) = (&summary.active, summary.hold_s.unwrap_or_default());
    let what = match summary.strategy {
        "quiesce" => format!("{old} ends and gives its disk away"),
        "device" => format!("the flows of {old} end and the two change their network devices"),
        "address" => format!("the flows of {old} end and the addresses go to the other uplink"),
        "letter" => {
            return format!("flows of {old} go there as well, and connections are reset (strategy letter)");
        }
        _ => return format!("flows that exist stay with {old} until they end"),
    };
    format!("new flows wait while {what}, {hold} s at most (strategy {})", summary.strategy)
}
