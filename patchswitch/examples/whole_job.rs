//! A whole job with the crate alone: patch a service, and make the patched partition permanent.
//!
//! ```sh
//! cargo run --example whole_job -- /etc/patchswitch/patchswitch.toml web
//! ```
//!
//! Before it there has to be what `patchswitch partition define`, `service add` and `patch add --approve` make: an
//! active partition that serves, a standby that covers it, an approved patch. It needs root, and `patchswitch-init`
//! beside the program or in `/usr/lib/patchswitch`.
//!
//! Ctrl-C undoes the job in order: before the switch the clone is discarded, after it the service is given back.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is a program, and not the library")]

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use patchswitch::manager::Manager;
use patchswitch::names::Name;
use patchswitch::switchover::{self, Ended, Options, Watcher};

/// Set when the job is not wanted any more.
static STOP: AtomicBool = AtomicBool::new(false);

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let (Some(config), Some(service), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: whole_job CONFIGURATION SERVICE");
    };
    let service: Name = service.parse()?;
    let mut manager = Manager::open(Path::new(&config))?;

    tokio::spawn(async {
        if tokio::signal::ctrl_c().await.is_ok() {
            STOP.store(true, Ordering::Relaxed);
        }
    });
    let watcher = Watcher { stop: &|| STOP.load(Ordering::Relaxed), say: &|text| println!("{text}") };

    // Every approved patch that was not applied yet; the commit comes later, as a decision of its own.
    let options = Options::default();
    let plan = switchover::plan(&manager, &service, &options)?.summary();
    println!(
        "{} will be cloned into {} and patched with {}",
        plan.active,
        plan.standby,
        plan.patches.join(", ")
    );

    // An error here means that the job did not begin. How a job ended that did begin is in what is returned.
    let patched = switchover::apply(&mut manager, &service, &options, watcher).await?;
    if !went_well(&patched) {
        return Ok(patched.code.into());
    }
    let flip = patched.report.flip_us.context("a job that went well has switched")?;
    println!("new flows moved with one store, in {flip:.1} µs; the last old flow has ended");

    // Until here `switchover::roll_back` would give the service back to the old partition.
    let committed = switchover::make_permanent(&mut manager, &service, &options, watcher).await?;
    if went_well(&committed) {
        println!(
            "{} serves, and is the disk: {:?} bytes were merged",
            plan.standby, committed.report.cow_bytes
        );
    }
    Ok(committed.code.into())
}

/// Prints what failed and what is true now, if something did.
fn went_well(ended: &Ended) -> bool {
    if let Some(error) = &ended.error {
        eprintln!("{error}\nexit code {}: {}", ended.code.number(), ended.code);
    }
    ended.error.is_none()
}
