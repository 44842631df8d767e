//! `reload`: the programs of another version.

use clap::Args;
use patchswitch::attachment::{Attachment, Record};
use patchswitch::exit::ExitCode;
use patchswitch::names::Name;
use serde_json::json;

use super::print;

/// Arguments of `reload`.
#[derive(Debug, Args)]
#[command(after_help = "\
For after an update of patchswitch. What is attached goes on with the programs it was attached with until then.
Each program is exchanged at once: a packet meets the old one or the new one. Flows and counters stay.")]
pub(crate) struct Reload {
    /// Name of an attachment or service; default: all.
    name: Option<Name>,
    /// Replace programs by equal ones as well.
    #[arg(long)]
    force: bool,
}

impl Reload {
    pub(crate) fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        let names = match &self.name {
            Some(name) => vec![name.clone()],
            None => Record::all()?.into_iter().map(|record| record.name).collect(),
        };
        let mut done = Vec::new();
        for name in names {
            let changed = Attachment::open(&name)?.reload(self.force)?;
            if !json {
                let what = if changed { "has the programs of this version now" } else { "has them already" };
                print::text(&format!("{name} {what}"));
            }
            done.push(json!({"name": name, "changed": changed}));
        }
        if json {
            print::json(&json!({"schema": "patchswitch.reload/1", "attachments": done}))?;
        } else if done.is_empty() {
            print::text("nothing is attached");
        }
        Ok(ExitCode::Done)
    }
}
