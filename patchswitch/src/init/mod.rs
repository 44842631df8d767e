//! `patchswitch-init`: the only program of ours that runs inside a partition.
//!
//! ```text
//!   PID 1:   starting scripts, in order ─► apply (first boot of a job only) ─► service, supervised ─► end
//!                       │ one fails              │ a patch fails                   │ asked to, or it failed too often
//!                       └────────────────────────┴─────────────────────────────────┴─► say why, stop everybody, exit
//!
//!   apply:   table ─► verify every file ─► for each patch: "started" durable ─► run ─► outcome durable ─► report
//! ```
//!
//! It is the patent's script execution program (1101) and patch execution script (1107) in one static binary, so that
//! it works in a root without a shell. Where systemd is PID 1, a unit runs `apply` alone; an administrator's starting
//! script may call it as well and so choose its place. It trusts the host and nothing else is asked of it: whatever it
//! reports, the host judges by its own table and its own probes.

use std::io::Write;

mod apply;
mod args;
mod console;
mod identity;
mod log;
mod paths;
mod pid1;
mod policy;
mod report;
mod results;
mod start;
mod supervisor;

pub use args::{ArgsError, Mode};
pub use console::{LOG_MAX, older as older_console};

/// The unit that runs the patches where systemd is PID 1. It is enabled by a link in
/// `/etc/systemd/system/multi-user.target.wants/`.
///
/// It is over before any service begins: a package that restarts its service would otherwise wait for a unit that
/// waits for this one. The time limits are in the table, and the host has its own.
pub const SYSTEMD_UNIT: &str = "[Unit]
Description=Apply the patches of patchswitch
DefaultDependencies=no
RequiresMountsFor=/var/lib/patchswitch /usr
After=local-fs.target systemd-tmpfiles-setup.service
Before=sysinit.target
Conflicts=shutdown.target
ConditionPathExists=/var/lib/patchswitch/table.json

[Service]
Type=oneshot
RemainAfterExit=yes
TimeoutStartSec=infinity
ExecStart=/usr/lib/patchswitch/init apply

[Install]
WantedBy=multi-user.target
";

/// What the program is called in its messages.
const PROGRAM: &str = "patchswitch-init";

/// Runs the program with these arguments (without its own name) and returns its exit status.
pub fn main(arguments: impl Iterator<Item = String>) -> u8 {
    match args::parse(arguments) {
        Ok(Mode::Help) => {
            say(args::HELP);
            0
        }
        Ok(Mode::Boot(options)) => pid1::boot(&options),
        Ok(Mode::Apply { root }) => apply::main(&paths::Paths::below(root.as_deref())),
        Ok(Mode::Unmask { root, names }) => start::unmask(&paths::Paths::below(root.as_deref()), &names),
        Ok(Mode::Console(options)) => console::main(&options),
        Err(error) => {
            say(&format!("{error}\n{}", args::HELP));
            2
        }
    }
}

/// A line for the console log. That nobody reads it is no reason to stop.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{PROGRAM}: {text}");
}
