//! `patchswitch doctor`.

use std::path::Path;

use clap::Args;
use patchswitch::doctor::{self, Diagnosis};
use patchswitch::exit::ExitCode;
use serde_json::json;

use super::print;

/// Arguments of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Changes nothing. Exit code 0: whole jobs are possible here; 69: something is missing or not known, as said.")]
pub(crate) struct Doctor;

impl Doctor {
    pub(crate) fn run(&self, config: &Path, json: bool) -> anyhow::Result<ExitCode> {
        let found = doctor::judge(&doctor::read(config));
        if json {
            print::json(&json!({"schema": "patchswitch.doctor/1", "doctor": found}))?;
        } else {
            print::text(&lines(&found));
        }
        Ok(found.exit_code())
    }
}

fn lines(found: &Diagnosis) -> String {
    let mut text = String::new();
    for item in &found.items {
        text += &format!("{:<8} {:<21}  {}\n", item.state.name(), item.name, item.found.replace('\n', "; "));
        for (what, more) in [("costs", &item.cost), ("type", &item.advice)] {
            if let Some(more) = more {
                text += &format!("{:>31} {more}\n", format!("{what}:"));
            }
        }
    }
    text += match (found.switch, found.whole_job) {
        (_, true) => "everything works here: whole jobs, and the switch alone",
        (true, false) => {
            "attach, switch, drain, flows, detach and status work here; whole jobs (partition, apply, commit) do not"
        }
        (false, false) => "nothing works here until what is missing is there, or is known to be there",
    };
    text
}
