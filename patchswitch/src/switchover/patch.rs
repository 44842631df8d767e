//! Boot, patch, restart: the standby applies the patches to itself.

use std::time::{Duration, Instant};

use serde_json::json;

use super::clone::{Clone, Injected};
use super::context::{at, with};
use super::take_over::learn;
use super::{Context, Failure, Phase};
use crate::exit::ExitCode;
use crate::manager::{Manager, Running, attachable};
use crate::partition::lifecycle;
use crate::patch::wire::{PatchResults, PatchTableInput, PatchVerdict};

/// The clone runs in quarantine: it reaches nothing but the agent's probes.
#[derive(Debug)]
pub(super) struct Booted {
    clone: Clone,
    table: PatchTableInput,
    running: Running,
}

/// All patches were applied.
#[derive(Debug)]
pub(super) struct Patched(Clone);

/// The partition runs with its patches in effect.
#[derive(Debug)]
pub(super) struct Restarted(pub(super) Clone);

impl Injected {
    /// Starts the clone. Its link is there from the beginning, and in quarantine.
    pub(super) async fn boot(self, job: &mut Context<'_>) -> Result<Booted, Failure> {
        let intent = json!({"partition": self.clone.standby.name(), "netns": self.clone.standby.netns()});
        job.step(Phase::Boot, intent, async |job| {
            let running = job.manager.start(&self.clone.standby, true).map_err(at(Phase::Boot))?;
            let partition = attachable(&self.clone.standby);
            job.attachment.join(self.clone.slot, &partition).await.map_err(at(Phase::Boot))?;
            // What the old side answers from now on without a socket of its own is its flow; it takes a while to see
            // them all, so this begins early.
            learn(job, Phase::Boot)?;
            Ok((Booted { clone: self.clone, table: self.table, running }, json!({})))
        })
        .await
    }
}

impl Booted {
    /// Waits for the results. The file in the clone counts if the channel stays silent.
    pub(super) async fn patch(mut self, job: &mut Context<'_>) -> Result<Patched, Failure> {
        let limit = job.manager.config.job.boot + total(&self.table);
        let intent = json!({"table": self.table, "limit_s": limit.as_secs()});
        job.step(Phase::Patch, intent, async |job| {
            let results = self.wait(job, Instant::now() + limit)?;
            keep(job, &self.clone, &self.table, &results)?;
            match results.verdict(&self.table) {
                PatchVerdict::Applied => {}
                PatchVerdict::Failed(ids) => return Err(failed(describe(&results, &ids))),
                PatchVerdict::Unfinished => {
                    return Err(failed("the partition ended before it was done".to_owned()));
                }
                PatchVerdict::Foreign(why) => {
                    return Err(failed(format!("the results are not of this job: {why}")));
                }
            }
            let applied = results.outcomes.len();
            Ok((Patched(self.clone), json!({"applied": applied})))
        })
        .await
    }

    /// Meanwhile somebody may want the job to end, or the clone's store may fill up.
    fn wait(&mut self, job: &Context<'_>, end: Instant) -> Result<PatchResults, Failure> {
        let started = &mut self.running.started;
        let go_on = || job.go_on(Phase::Patch).is_ok();
        let results =
            lifecycle::wait_results_while(started, &self.table, end, &go_on).map_err(at(Phase::Patch))?;
        match results {
            Ok(results) => Ok(results),
            Err(reason) => {
                job.go_on(Phase::Patch)?;
                self.read_results().ok_or_else(|| failed(reason))
            }
        }
    }

    fn read_results(&self) -> Option<PatchResults> {
        let mounts = Manager::mounts().ok()?;
        lifecycle::read_results(&mounts, &Manager::root(self.clone.standby.name())).ok().flatten()
    }
}

fn failed(reason: String) -> Failure {
    Failure { phase: Phase::Patch, reason, code: ExitCode::PatchFailed }
}

fn total(table: &PatchTableInput) -> Duration {
    Duration::from_secs(table.patches.iter().map(|patch| patch.time_limit_s).sum())
}

/// Stores what the partition said, durably (patent step 1205).
fn keep(
    job: &mut Context<'_>,
    clone: &Clone,
    table: &PatchTableInput,
    results: &PatchResults,
) -> Result<(), Failure> {
    let merged = job.manager.store.merge_results(job.job, clone.standby.name(), table, results);
    let _ = merged.map_err(at(Phase::Patch))?;
    job.report.patches = results.outcomes.iter().map(|outcome| json!(outcome)).collect();
    Ok(())
}

fn describe(results: &PatchResults, ids: &[String]) -> String {
    let one = |id: &String| {
        let Some(outcome) = results.outcome(id) else { return format!("patch {id} was not run") };
        let end = match (outcome.exit_code, outcome.signal, &outcome.failure) {
            (_, _, Some(failure)) => failure.to_string(),
            (Some(code), _, _) => format!("exit status {code}"),
            (_, Some(signal), _) => format!("signal {signal}"),
            _ => "not run".to_owned(),
        };
        let tail = outcome.log_tail.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        if tail.is_empty() { format!("patch {id}: {end}") } else { format!("patch {id}: {end}: {tail}") }
    };
    ids.iter().map(one).collect::<Vec<_>>().join("; ")
}

impl Patched {
    /// Restarts the partition, so that the patches take effect.
    pub(super) async fn restart(self, job: &mut Context<'_>) -> Result<Restarted, Failure> {
        let limit = job.manager.config.job.restart;
        job.step(Phase::Restart, json!({"limit_s": limit.as_secs()}), async |job| {
            let gate = |error| with(Phase::Restart, ExitCode::GateFailed)(error);
            let mut running = job.manager.restart(&self.0.standby, true).map_err(gate)?;
            Manager::wait_started(&mut running, &self.0.standby, limit).map_err(gate)?;
            Ok((Restarted(self.0), json!({})))
        })
        .await
    }
}
