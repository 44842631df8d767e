//! Verify: probes of the standby through its own link (patent step 709).

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;

use super::clone::Clone;
use super::context::{at, with};
use super::patch::Restarted;
use super::{Context, Failure, Phase};
use crate::manager::{Machine, Manager};
use crate::names::Name;
use crate::verify::{CannotTell, CommandEnd, Reach, Target, gate};

/// The clone is healthy.
#[derive(Debug)]
pub(super) struct Verified(pub(super) Clone);

impl Restarted {
    /// Probes the standby until it was healthy several times in a row.
    pub(super) async fn verify(self, job: &mut Context<'_>) -> Result<Verified, Failure> {
        let intent = json!({"probes": job.service.probes, "gate": job.service.gate});
        job.step(Phase::Verify, intent, async |job| {
            // What is checked is what will serve. Until now it got what the one that serves left of the processor.
            Manager::full_speed(&self.0.standby).map_err(at(Phase::Verify))?;
            let prober = job.attachment.prober(self.0.slot).map_err(at(Phase::Verify))?;
            let open = |address: SocketAddr| prober.socket(address);
            let run = inside(job.manager, &self.0.standby);
            let target = Target { addresses: &job.service.addresses, probes: &job.service.probes };
            let reach = Reach { open: &open, run: &run };
            let stop = || job.go_on(Phase::Verify).is_err();
            let passed = gate(target, &job.service.gate, reach, &stop);
            // If it was stopped, why comes before that.
            if passed.is_err() {
                job.go_on(Phase::Verify)?;
            }
            let passed = passed.map_err(|error| {
                let code = error.exit_code();
                with(Phase::Verify, code)(error)
            })?;
            Ok((Verified(self.0), json!({"rounds": passed.rounds})))
        })
        .await
    }
}

/// Runs a shell command inside a partition.
pub(super) fn inside(
    manager: &Manager,
    machine: &Machine,
) -> impl Fn(&str, Duration) -> Result<CommandEnd, CannotTell> + Sync + use<> {
    let (runtime, name): (_, Name) = (manager.runtime().clone(), machine.name().clone());
    move |command, limit| {
        let cannot = |error: Box<dyn std::error::Error + Send + Sync>| CannotTell::Inside(error);
        let mounts = Manager::mounts().map_err(|error| cannot(Box::new(error)))?;
        let arguments = ["/bin/sh", "-c", command];
        let done = mounts.run(|inside| runtime.exec(inside, name.as_str(), &arguments, limit));
        let done = done.map_err(|error| cannot(Box::new(error)))?.map_err(|error| cannot(Box::new(error)))?;
        Ok(CommandEnd::Exited(done.code, done.stderr))
    }
}
