//! The first process of the test machine: makes a small Debian of the disks it finds, then starts the agent, which
//! runs the host's commands. One static file in the initial RAM disk; the Debian image has no init of its own.

mod agent;
mod boot;

use std::process::ExitCode;

fn main() -> ExitCode {
    let result = match std::env::args().nth(1).as_deref() {
        Some("agent") => agent::serve(),
        // Outside the machine this would remount the caller's root.
        _ if std::process::id() != 1 => {
            Err(anyhow::anyhow!("this is the init of patchswitch's test machine"))
        }
        _ => boot::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Says something on the console, which the host shows when the machine ends too early.
#[expect(clippy::print_stderr, reason = "the console is the only place before the agent is up")]
fn complain(text: &str) {
    eprintln!("guest-init: {text}");
}

/// Starts a program of the image.
#[expect(clippy::disallowed_methods, reason = "the one place of the guest that starts programs")]
fn program(name: &str) -> std::process::Command {
    let mut command = std::process::Command::new(name);
    command.env_clear().envs(ENVIRONMENT).current_dir("/");
    command
}

/// What every program of the guest gets. There is no udev, and libdevmapper would wait for it.
const ENVIRONMENT: [(&str, &str); 5] = [
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("LC_ALL", "C.UTF-8"),
    ("TERM", "dumb"),
    ("DM_DISABLE_UDEV", "1"),
];
