//! Arguments, calls, printing: nothing else. One file for each group of subcommands.

mod alone;
mod print;

use clap::{Parser, Subcommand};
use patchswitch::attachment::AttachError;
use patchswitch::exit::ExitCode;

/// Patches a running service without anybody noticing: clone, patch, take over, drain, commit.
#[derive(Debug, Parser)]
#[command(name = "patchswitch", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Arguments {
    /// Print JSON on standard output, for programs.
    #[arg(long, global = true)]
    json: bool,
    /// Say more: -v what is done, -vv everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Put a service address in front of one or two network namespaces.
    Attach(alone::Attach),
    /// Give new flows to the other partition; flows that exist stay with the old one.
    Switch(alone::Switch),
    /// Wait until the old partition has no flow left, and end the switch.
    Drain(alone::Drain),
    /// List the flows of both partitions.
    Flows(alone::Named),
    /// Take a service address away again, and everything that came with it.
    Detach(alone::Detach),
    /// Show who serves, and what was counted.
    Status(alone::Status),
}

/// Reads the arguments, runs the verb and turns its end into an exit code.
pub(crate) fn run() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    log(arguments.verbose);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = match runtime {
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
        Verb::Attach(verb) => verb.run(json).await,
        Verb::Switch(verb) => verb.run(json).await,
        Verb::Drain(verb) => verb.run(json).await,
        Verb::Flows(verb) => verb.flows(json),
        Verb::Detach(verb) => verb.run(json).await,
        Verb::Status(verb) => verb.run(json),
    }
}

fn log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "patchswitch=info",
        _ => "patchswitch=debug",
    };
    tracing_subscriber::fmt().with_env_filter(level).with_writer(std::io::stderr).without_time().init();
}

/// The exit code of an error: that of the first cause that has one.
fn code_of(error: &anyhow::Error) -> ExitCode {
    let code = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref().map(AttachError::exit_code).or_else(|| {
            cause.downcast_ref::<std::io::Error>().and_then(|error| match error.kind() {
                std::io::ErrorKind::PermissionDenied => Some(ExitCode::Permission),
                _ => None,
            })
        })
    };
    error.chain().find_map(code).unwrap_or(ExitCode::Failed)
}
