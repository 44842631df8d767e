//! `cargo xtask`: the one door to building, checking, testing and showing patchswitch. CI uses it as well.
#![allow(clippy::print_stdout, reason = "a program for the terminal")]

mod cache;
mod command;
mod debian;
mod paths;
mod vm;

use std::process::ExitCode;

use clap::Parser;

/// Builds, checks, tests and shows patchswitch.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    Vm(vm::Options),
    /// Prepares what the demo patches: prints the root of the partition and the packages of the patch
    Artifacts,
}

fn main() -> ExitCode {
    let outcome = match Task::parse() {
        Task::Vm(options) => vm::main(options),
        Task::Artifacts => artifacts().map(|()| ExitCode::SUCCESS),
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
