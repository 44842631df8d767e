//! `patchswitch host …`.

use clap::Subcommand;
use patchswitch::exit::ExitCode;
use patchswitch::manager::{Amounts, HostTable, Manager};
use patchswitch::names::Name;
use serde_json::json;

use super::{print, size};

/// Subcommands of `host`.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show what the host has, which partition has what of it, and what is free (the resource table).
    Show,
}

impl Verb {
    pub(crate) fn run(&self, manager: &Manager, json: bool) -> anyhow::Result<ExitCode> {
        match self {
            Self::Show => {
                let table = manager.host_table()?;
                if json {
                    print::json(&json!({"schema": "patchswitch.host/1", "host": table}))?;
                } else {
                    print::text(&lines(&table));
                }
                Ok(ExitCode::Done)
            }
        }
    }
}

fn row(name: &str, role: &str, service: &str, amounts: &Amounts, network: &str) -> String {
    format!(
        "{name:<16} {role:<9} {service:<12} {:>5}% {:>9} {:>9}  {network}\n",
        amounts.cpu_percent,
        bytes(amounts.memory),
        bytes(amounts.disk)
    )
}

fn bytes(amount: i64) -> String {
    let sign = if amount < 0 { "-" } else { "" };
    format!("{sign}{}", size::format(amount.unsigned_abs()))
}

fn lines(table: &HostTable) -> String {
    let mut text = format!(
        "{:<16} {:<9} {:<12} {:>6} {:>9} {:>9}  NETWORK\n",
        "NAME", "ROLE", "SERVICE", "CPU", "MEMORY", "DISKS"
    );
    for share in &table.shares {
        let service = share.service.as_ref().map_or("-", Name::as_str);
        let network = share.network.as_deref().unwrap_or("-");
        text += &row(share.partition.as_str(), &share.role.to_string(), service, &share.amounts, network);
    }
    let devices = table.devices.iter().map(|device| {
        let state = if device.up { "" } else { " (down)" };
        format!("{}{state}", device.name)
    });
    text += &row("(host)", "-", "-", &table.host, &devices.collect::<Vec<_>>().join(", "));
    text += &row("(free)", "-", "-", &table.free, "");
    if table.free.memory < 0 || table.free.disk < 0 {
        text += "more memory or disk is promised than there is: a partition may fail when it asks for its share\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_too_many_is_told() {
        let has = |memory, disk| Amounts { cpu_percent: 200, memory, disk };
        let mut table = HostTable {
            host: has(4 << 30, 8 << 30),
            shares: Vec::new(),
            free: has(1 << 30, 1 << 30),
            devices: Vec::new(),
        };
        assert!(!lines(&table).contains("promised"));
        table.free.disk = -(512 << 20);
        let text = lines(&table);
        assert!(text.contains("promised") && text.contains("-512M"), "{text}");
    }
}
