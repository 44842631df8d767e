//! `patchswitch patch …`: the patch table.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use patchswitch::exit::ExitCode;
use patchswitch::manager::Manager;
use patchswitch::patch::table::{self, Added, Wish};
use patchswitch::store::{Change, Decision, Patch, Types, Who};
use serde_json::json;

use super::print;

/// Subcommands of `patch`.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Add patch files: Debian packages, or scripts and programs. Their digests are pinned.
    Add(Add),
    /// List the patch table.
    List,
    /// Show one patch and all that ever became of it.
    Show(One),
    /// Let patches be applied by the next job.
    Approve(Many),
    /// Keep patches from being applied, for now.
    Hold(Many),
    /// Decide against patches.
    Reject(Many),
}

/// Arguments of `patch add`.
#[derive(Debug, Args)]
pub(crate) struct Add {
    /// The files.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// What kind of correction: security, bugfix, enhancement, or several of them.
    #[arg(long = "type", value_name = "TYPES")]
    types: Types,
    /// When the correction was issued (RFC 3339); default: now.
    #[arg(long)]
    date: Option<Timestamp>,
    /// Approve them at once.
    #[arg(long)]
    approve: bool,
}

/// A patch.
#[derive(Debug, Args)]
pub(crate) struct One {
    /// Its number, its digest, or its file name.
    patch: String,
}

/// Some patches.
#[derive(Debug, Args)]
pub(crate) struct Many {
    /// Their numbers, digests, or file names.
    #[arg(required = true)]
    patches: Vec<String>,
}

/// The person at the terminal, as far as the kernel knows.
fn me() -> Who {
    let name = std::env::var("SUDO_USER").unwrap_or_else(|_| "root".to_owned());
    Who { name, how: "command line".to_owned() }
}

impl Verb {
    pub(crate) fn run(&self, manager: &mut Manager, json: bool) -> anyhow::Result<ExitCode> {
        match self {
            Self::Add(add) => add.run(manager, json),
            Self::List => list(&manager.store.patches()?, json),
            Self::Show(one) => show(manager, one, json),
            Self::Approve(many) => many.decide(manager, Decision::Approved, json),
            Self::Hold(many) => many.decide(manager, Decision::Held, json),
            Self::Reject(many) => many.decide(manager, Decision::Rejected, json),
        }
    }
}

impl Add {
    fn run(&self, manager: &mut Manager, json: bool) -> anyhow::Result<ExitCode> {
        let state = manager.state().to_owned();
        let wish = Wish { types: self.types, issued_at: self.date, approve: self.approve, who: &me() };
        let added = table::add(&mut manager.store, &state, &self.files, &wish)?;
        if json {
            let patches: Vec<_> = added.iter().map(|added| &added.patch).collect();
            print::json(&json!({"schema": "patchswitch.patches/1", "patches": patches}))?;
        } else {
            for Added { patch, change } in &added {
                let known = if *change == Change::AlreadySo { " (known already)" } else { "" };
                print::text(&format!("patch {}: {} {}{known}", patch.id, patch.file, patch.decision));
            }
        }
        Ok(ExitCode::Done)
    }
}

impl Many {
    fn decide(&self, manager: &mut Manager, decision: Decision, json: bool) -> anyhow::Result<ExitCode> {
        let found: Vec<Patch> =
            self.patches.iter().map(|text| manager.store.find_patch(text)).collect::<Result<_, _>>()?;
        for patch in &found {
            let _ = manager.store.decide(patch.id, decision, &me())?;
        }
        let now: Vec<Patch> = found
            .iter()
            .map(|patch| manager.store.find_patch(&patch.id.to_string()))
            .collect::<Result<_, _>>()?;
        list(&now, json)
    }
}

fn list(patches: &[Patch], json: bool) -> anyhow::Result<ExitCode> {
    if json {
        print::json(&json!({"schema": "patchswitch.patches/1", "patches": patches}))?;
        return Ok(ExitCode::Done);
    }
    if patches.is_empty() {
        print::text("there is no patch; `patchswitch patch add FILE --type security` adds one");
        return Ok(ExitCode::Done);
    }
    print::text(&format!("{:>4}  {:<44} {:<22} {:<10} {:<10} RESULT", "ID", "FILE", "TYPES", "ISSUED", "DECISION"));
    for patch in patches {
        let result = match &patch.last_result {
            None => "-".to_owned(),
            Some(result) if result.success => "applied".to_owned(),
            Some(result) => format!("failed in job {}", result.job),
        };
        let issued = patch.issued_at.strftime("%Y-%m-%d").to_string();
        print::text(&format!(
            "{:>4}  {:<44} {:<22} {issued:<10} {:<10} {result}",
            patch.id.to_string(),
            patch.file.to_string(),
            patch.types.to_string(),
            patch.decision.to_string(),
        ));
    }
    Ok(ExitCode::Done)
}

fn show(manager: &Manager, one: &One, json: bool) -> anyhow::Result<ExitCode> {
    let patch = manager.store.find_patch(&one.patch)?;
    let results = manager.store.results(patch.id)?;
    if json {
        print::json(&json!({"schema": "patchswitch.patch/1", "patch": patch, "results": results}))?;
        return Ok(ExitCode::Done);
    }
    print::text(&format!(
        "patch {}: {}\n  types     {}\n  sha256    {}\n  size      {} bytes\n  source    {}\n  decision  {} by {}",
        patch.id, patch.file, patch.types, patch.sha256, patch.size, patch.source, patch.decision, patch.decided_by.name
    ));
    for result in results {
        let end = match (result.success, result.exit_code, result.signal) {
            (true, ..) => "applied".to_owned(),
            (false, Some(code), _) => format!("exit status {code}"),
            (false, None, Some(signal)) => format!("signal {signal}"),
            (false, None, None) => "not run".to_owned(),
        };
        print::text(&format!(
            "  job {} on {}: {end} in {:.1} s\n    {}",
            result.job,
            result.partition,
            result.duration_ms as f64 / 1e3,
            result.log_tail.trim_end().replace('\n', "\n    ")
        ));
    }
    Ok(ExitCode::Done)
}
