//! Arguments, calls, printing: nothing else. One file for each group of subcommands.

mod alone;
mod background;
mod beside;
mod canary;
mod doctor;
mod hold;
mod host;
mod job;
mod partition;
mod patch;
mod print;
mod reload;
mod report;
mod service;
mod size;
mod status;
mod watch;
mod write_log;

use std::io::IsTerminal as _;

use clap::{Parser, Subcommand};
use patchswitch::attachment::AttachError;
use patchswitch::exit::ExitCode;
use patchswitch::host::linux::priority::Priority;
use patchswitch::manager::{Manager, ManagerError};
use patchswitch::patch::table::TableError;
use patchswitch::store::StoreError;

/// Patches a running service without anybody noticing: clone, patch, take over, drain, commit.
#[derive(Debug, Parser)]
#[command(name = "patchswitch", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Arguments {
    /// Print JSON on standard output, for programs.
    #[arg(long, global = true)]
    json: bool,
    /// The configuration file; drop-ins are in config.d beside it.
    #[arg(long, global = true, value_name = "FILE", default_value = patchswitch::config::DEFAULT_FILE)]
    config: std::path::PathBuf,
    /// Say more: -v what is done, -vv everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Say what this host has and lacks for the work, and what that costs.
    Doctor(doctor::Doctor),
    /// Put a service address in front of one or two network namespaces.
    Attach(alone::Attach),
    /// Give new flows to the other partition; flows that exist stay with the old one.
    Switch(alone::Switch),
    /// Wait until the old partition has no flow left, and end the switch.
    Drain(alone::Drain),
    /// List the flows of both partitions.
    Flows(alone::Named),
    /// Put the BPF programs of this version in the place of those that are attached, without a packet lost.
    Reload(reload::Reload),
    /// Take a service address away again, and everything that came with it.
    Detach(alone::Detach),
    /// Show who serves, and what was counted.
    Status(status::Status),
    /// Tell of foreign claims of the service addresses, answer them, and say what the programs log.
    Watch(watch::Watch),
    /// The host's resources: who has what, and what is free.
    #[command(subcommand)]
    Host(host::Verb),
    /// Logical computers: define, start, stop, look into.
    #[command(subcommand)]
    Partition(partition::Verb),
    /// Service addresses that are served by partitions.
    #[command(subcommand)]
    Service(service::Verb),
    /// The patch table.
    #[command(subcommand)]
    Patch(patch::Verb),
    /// Say what `apply` would do, and change nothing.
    Plan(job::Apply),
    /// Patch a service: clone, patch, check, take over, drain.
    Apply(job::Start),
    /// Give a service back to its old partition; a job under way is stopped and undone first.
    Rollback(job::Decide),
    /// Make the patched partition permanent, and free the old one.
    Commit(job::Decide),
    /// Show what a job did, or does.
    Report(report::ReportOf),
    /// Put everything right after a kill or a boot.
    Up,
    /// Take everything out of the kernel; what is stored stays.
    Down,
    /// Show what a log of writes (dm-log-writes) has recorded of a disk, and when.
    WriteLog(write_log::WriteLog),
}

/// Reads the arguments, runs the verb and turns its end into an exit code.
pub(crate) fn run() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    log(arguments.verbose);
    // The command itself runs on this thread. The other one hears signals while this one is busy, and passes netlink's
    // messages on: clients go before that, always.
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().on_thread_start(|| std::mem::forget(Priority::give_way()));
    let result = match builder.build() {
        Ok(runtime) => runtime.block_on(execute(&arguments)),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(code) => code.into(),
        Err(error) => {
            let code = code_of(&error);
            print::error(&error, code, arguments.json);
            code.into()
        }
    }
}

async fn execute(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let json = arguments.json;
    match &arguments.verb {
        Verb::Doctor(verb) => verb.run(&arguments.config, json),
        Verb::Attach(verb) => verb.run(json).await,
        Verb::Switch(verb) => verb.run(json).await,
        Verb::Drain(verb) => verb.run(json).await,
        Verb::Flows(verb) => verb.flows(json),
        Verb::Reload(verb) => verb.run(json),
        Verb::Detach(verb) => verb.run(json).await,
        Verb::Status(verb) => verb.run(&arguments.config, json).await,
        Verb::Watch(verb) => verb.run(json).await,
        Verb::WriteLog(verb) => verb.run(json),
        _ => execute_managed(arguments, &mut Manager::open(&arguments.config)?).await,
    }
}

async fn execute_managed(arguments: &Arguments, manager: &mut Manager) -> anyhow::Result<ExitCode> {
    let json = arguments.json;
    match &arguments.verb {
        Verb::Host(verb) => verb.run(manager, json),
        Verb::Partition(verb) => verb.run(manager, json),
        Verb::Service(verb) => verb.run(manager, json).await,
        Verb::Patch(verb) => verb.run(manager, json),
        Verb::Plan(verb) => verb.plan(manager, json),
        Verb::Apply(verb) => verb.run(manager, &arguments.config, arguments.verbose, json).await,
        Verb::Rollback(verb) => verb.rollback(manager, json).await,
        Verb::Commit(verb) => verb.commit(manager, json).await,
        Verb::Report(verb) => verb.run(manager, json),
        Verb::Up => job::up(manager, json).await,
        Verb::Down => job::down(manager, json).await,
        // Needs no manager, and never comes here.
        _ => Ok(ExitCode::Internal),
    }
}

fn log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "patchswitch=info",
        _ => "patchswitch=debug",
    };
    // As every other line for people: no module's name, and colours for a terminal only.
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(colours);
    lines.with_env_filter(level).with_target(false).without_time().init();
}

/// The exit code of an error: that of the first cause that has one.
fn code_of(error: &anyhow::Error) -> ExitCode {
    let code = |cause: &(dyn std::error::Error + 'static)| {
        cause
            .downcast_ref()
            .map(ManagerError::exit_code)
            .or_else(|| cause.downcast_ref().map(AttachError::exit_code))
            .or_else(|| cause.downcast_ref().map(TableError::exit_code))
            .or_else(|| cause.downcast_ref().map(StoreError::exit_code))
            .or_else(|| match cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
                Some(std::io::ErrorKind::PermissionDenied) => Some(ExitCode::Permission),
                _ => None,
            })
    };
    error.chain().find_map(code).unwrap_or(ExitCode::Failed)
}
