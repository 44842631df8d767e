//! `cargo xtask`: the one door to building, checking, testing and showing patchswitch. CI uses it as well.
#![expect(clippy::print_stdout, reason = "a program for the terminal")]

mod bench;
mod build;
mod cache;
mod check;
mod command;
mod debian;
mod demo;
mod ebpf;
mod paths;
mod setup;
mod test;
mod vm;

use std::process::ExitCode;

use clap::Parser;

/// Builds, checks, tests and shows patchswitch.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    Setup(setup::Options),
    Ebpf(ebpf::Options),
    /// Formats, lints, documentation, dependencies, BPF object: runs all checks and names those that failed
    Check,
    Test(test::Options),
    Vm(vm::Options),
    Demo(demo::Options),
    Bench(bench::Options),
    /// Runs a test binary in the test machine; nextest calls it
    #[command(hide = true)]
    InVm {
        /// The binary and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Prepares what the demo patches: prints the root of the partition and the packages of the patch
    Artifacts,
}

fn main() -> ExitCode {
    let done = |()| ExitCode::SUCCESS;
    let outcome = match Task::parse() {
        Task::Setup(options) => setup::main(&options).map(done),
        Task::Ebpf(options) => ebpf::main(&options).map(done),
        Task::Check => check::main().map(done),
        Task::Vm(options) => vm::main(options),
        Task::Demo(options) => demo::main(&options),
        Task::Bench(options) => bench::main(&options),
        Task::Test(options) => test::main(&options),
        Task::InVm { arguments } => test::in_vm(&arguments),
        Task::Artifacts => artifacts().map(done),
    };
    outcome.unwrap_or_else(|error| {
        cache::say(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

fn artifacts() -> anyhow::Result<()> {
    let cache = cache::Cache::open()?;
    println!("{}", vm::image::partition_root(&cache)?.display());
    let patch = vm::image::patch(&cache)?;
    cache::say(&format!("the patch: {} -> {}", patch.from, patch.to));
    for file in patch.files {
        println!("{}", file.display());
    }
    Ok(())
}
