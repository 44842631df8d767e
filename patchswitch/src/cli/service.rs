//! `patchswitch service …`.

use clap::{Args, Subcommand};
use patchswitch::exit::ExitCode;
use patchswitch::manager::Manager;
use patchswitch::names::Name;
use serde_json::{Value, json};

use super::print;

/// Subcommands of `service`.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Add a service of the configuration: its partition is started and gets the addresses.
    Add(One),
    /// List the services and who serves them.
    List,
    /// Take a service's addresses away and stop its partition.
    Remove(One),
}

/// A service, by name.
#[derive(Debug, Args)]
pub(crate) struct One {
    /// Name of the service.
    name: Name,
}

impl Verb {
    pub(crate) async fn run(&self, manager: &mut Manager, json: bool) -> anyhow::Result<ExitCode> {
        match self {
            Self::Add(one) => {
                let mut what = manager.add_service(&one.name).await?;
                let settings = manager.service(&one.name)?;
                what.push(format!("served by {}", manager.active(&settings)?.name()));
                done(json, &one.name, &what.join("; "))
            }
            Self::List => list(manager, json),
            Self::Remove(one) => {
                let removed = manager.remove_service(&one.name).await?;
                done(json, &one.name, if removed { "removed" } else { "not there, nothing to do" })
            }
        }
    }
}

fn done(json: bool, name: &Name, what: &str) -> anyhow::Result<ExitCode> {
    if json {
        print::json(&json!({"schema": "patchswitch.service/1", "service": name, "result": what}))?;
    } else {
        print::text(&format!("{name}: {what}"));
    }
    Ok(ExitCode::Done)
}

fn list(manager: &Manager, json: bool) -> anyhow::Result<ExitCode> {
    let mut entries = Vec::new();
    for settings in manager.store.services()? {
        let serving = manager.active(&settings)?;
        let other = manager.other(&settings.name)?;
        entries.push(json!({
            "name": settings.name,
            "addresses": settings.addresses,
            "uplinks": settings.uplinks,
            "active": serving.name(),
            "other": other.as_ref().map(|machine| json!({"name": machine.name(), "role": machine.row.role})),
        }));
    }
    if json {
        print::json(&json!({"schema": "patchswitch.services/1", "services": entries}))?;
    } else if entries.is_empty() {
        print::text("there is no service; `patchswitch service add NAME` adds one of the configuration");
    } else {
        for entry in &entries {
            let text = |key: &str| entry[key].as_str().unwrap_or("-").to_owned();
            let other = entry["other"]["name"].as_str().map_or_else(String::new, |name| {
                format!(", {name} is {}", entry["other"]["role"].as_str().unwrap_or("?"))
            });
            let addresses: Vec<&str> =
                entry["addresses"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            print::text(&format!(
                "{}: served by {}{other}; {}",
                text("name"),
                text("active"),
                addresses.join(", ")
            ));
        }
    }
    Ok(ExitCode::Done)
}
