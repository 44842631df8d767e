//! The disposable test machine: a stock Debian kernel under QEMU, with commands from the host.
//!
//! ```text
//!  cargo xtask vm, test, demo ─► boot ─► kernel, image (cached)
//!                                 └────► agent ◄─ UNIX socket ─ in-vm (nextest's target runner)
//! ```

pub(crate) mod agent;
pub(crate) mod boot;
mod cpio;
pub(crate) mod image;
pub(crate) mod kernel;
pub(crate) mod payload;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use patchswitch_guest::Request;

use self::boot::{Config, Vm};
use self::kernel::Series;
use crate::cache::{Cache, say};
use crate::setup::{self, Need};

/// Boots a disposable test machine and runs a command in it.
///
/// The machine is a Debian bookworm with a stock cloud kernel under plain emulation (PATCHSWITCH_KVM=1 uses KVM), one
/// processor, no network but what you make in it. Its root is writable and forgotten at the end. There is no udev and
/// no systemd; cgroup v2, bpffs, device-mapper, crun, runc, dmsetup, nft, tcpdump, ip, jq and socat are there.
/// Empty disks are /dev/vdb, /dev/vdc, /dev/vdd.
///
/// Everything that is downloaded or built stays in ~/.cache/patchswitch; the second time starts in seconds.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Series of the kernel, such as 6.12 or 6.1
    #[arg(long, default_value = "6.12", value_name = "SERIES")]
    kernel: Series,
    /// Directory that the machine gets, read-only, as /payload
    #[arg(long, value_name = "DIR")]
    payload: Option<PathBuf>,
    /// Copy a directory into the machine before the command runs
    #[arg(long, value_name = "DIR:GUEST_DIR", value_parser = pair)]
    push: Vec<(String, String)>,
    /// Copy a directory out of the machine after the command, whatever its exit code is
    #[arg(long, value_name = "GUEST_DIR:DIR", value_parser = pair)]
    pull: Vec<(String, String)>,
    /// Sizes of the empty disks in MiB (sparse)
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_value = "4096,4096,4096")]
    disks: Vec<u64>,
    /// Memory of the machine in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1536)]
    memory: u32,
    /// Seconds after which the command is killed (exit code 124)
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    limit: u64,
    /// Pass standard input on to the command
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Print the kernel's log at the end
    #[arg(long)]
    console: bool,
    /// Run the command in the machine that another `xtask vm` serves at this socket, instead of booting one
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["kernel", "payload", "push", "pull", "disks", "memory", "console"])]
    at: Option<PathBuf>,
    /// The command; without one, a shell that reads from standard input
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs `cargo xtask vm`; the exit code is the command's.
pub(crate) fn main(options: Options) -> Result<ExitCode> {
    let input = options.stdin || options.command.is_empty();
    let request = Request {
        argv: if options.command.is_empty() { vec!["/bin/bash".to_owned()] } else { options.command },
        limit_ms: options.limit.saturating_mul(1000),
        ..Request::default()
    };
    if let Some(socket) = options.at {
        return execute(&socket, &request, input);
    }
    let config = Config {
        memory_mib: options.memory,
        disks_mib: options.disks,
        payload: options.payload,
        ..Config::new(options.kernel)
    };
    setup::ensure(&[Need::Build, Need::Machine])?;
    let vm = Vm::boot(&Cache::open()?, &config)?;
    say(&format!(
        "Linux {} is up; more commands: xtask vm --at {} -- COMMAND",
        vm.release(),
        vm.socket().display()
    ));
    for (from, to) in &options.push {
        vm.push(Path::new(from), to)?;
    }
    let outcome = execute(&vm.socket(), &request, input);
    if options.console || outcome.is_err() {
        say(&format!("the kernel's log:\n{}", vm.console()));
    }
    let code = outcome?;
    for (from, to) in &options.pull {
        vm.pull(from, Path::new(to))?;
    }
    vm.power_off()?;
    Ok(code)
}

fn pair(text: &str) -> Result<(String, String)> {
    let (from, to) = text.split_once(':').context("expected two directories with a colon between them")?;
    Ok((from.to_owned(), to.to_owned()))
}

/// Runs a command with this terminal as its output.
fn execute(socket: &Path, request: &Request, input: bool) -> Result<ExitCode> {
    let end = if input {
        if std::io::stdin().is_terminal() {
            say("a plain shell without prompt or job control; Ctrl-D ends it");
        }
        agent::run_with_input(socket, request, std::io::stdin(), agent::to_terminal)
    } else {
        agent::run(socket, request, agent::to_terminal)
    };
    std::io::stdout().flush()?;
    let end = end.context("the command has no exit code")?;
    if end.exit_code() != 0 {
        say(&format!("{}: {end:?}", request.argv.join(" ")));
    }
    Ok(ExitCode::from(u8::try_from(end.exit_code()).unwrap_or(u8::MAX)))
}
