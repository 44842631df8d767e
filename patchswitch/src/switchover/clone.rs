//! Clone, scan, inject: from a running partition to a patched-to-be one that has not run yet.

use std::time::SystemTime;

use patchswitch_common::Slot;
use serde_json::json;

use super::context::{at, with};
use super::quiesce::commands;
use super::{Context, Failure, Phase, Plan, copies, stores};
use crate::config::Service;
use crate::exit::ExitCode;
use crate::host::linux::programs::{Program, ProgramError};
use crate::init::SYSTEMD_UNIT;
use crate::manager::{Machine, MachineDisk, Manager, ManagerError};
use crate::names;
use crate::partition::program;
use crate::patch::inject::{self, Payload};
use crate::patch::scan;
use crate::patch::wire::{OnError, PatchTableInput};
use crate::storage::copies::Together;
use crate::storage::copy::CopyOf;
use crate::storage::cow::cow_sectors;
use crate::storage::meter::Mark;
use crate::storage::snapshot::{self, CloneOf, Cut};
use crate::store::Patch;

/// What all states of a clone have in common.
#[derive(Debug)]
pub(super) struct Clone {
    pub(super) active: Machine,
    pub(super) standby: Machine,
    pub(super) patches: Vec<Patch>,
    pub(super) slot: Slot,
    /// What had been written to the old side's disks at the cut.
    pub(super) marks: Vec<Mark>,
    /// A moment just before the cut.
    pub(super) before: SystemTime,
}

/// The clone exists and has not been looked at.
#[derive(Debug)]
pub(super) struct Cloned(Clone);

/// The clone is what it should be.
#[derive(Debug)]
pub(super) struct Scanned(Clone);

/// The clone has everything to patch itself.
#[derive(Debug)]
pub(super) struct Injected {
    pub(super) clone: Clone,
    pub(super) table: PatchTableInput,
}

impl Plan {
    /// Copies all disks in one instant. From here on the standby belongs to the service.
    pub(super) async fn clone_disks(self, job: &mut Context<'_>) -> Result<Cloned, Failure> {
        job.report.from = Some(self.active.name().clone());
        job.report.to = Some(self.standby.name().clone());
        let intent = self.intent();
        job.step(Phase::Clone, intent, async |job| {
            let Self { active, standby, patches, .. } = self;
            let clones = clones(&active, &standby).map_err(at(Phase::Clone))?;
            let (clones, copies) = whole_copies(&job.service, &active, clones);
            let service = job.service.name.clone();
            let standby = job.manager.lend(&service, &active, &standby, &clones, &copies);
            let standby = standby.map_err(at(Phase::Clone))?;
            stores::size(job, &clones).await?;
            let cut = cut(job, (&active, &standby), &clones)?;
            job.watch(clones);
            let (clone_ms, freeze_ms) = (cut.clone_ms, cut.cut.freeze.as_secs_f64() * 1e3);
            job.report.clone_ms = Some(clone_ms);
            job.report.freeze_ms = Some(freeze_ms);
            let slot = job.attachment.plane().word().active().other();
            let Cut { marks, before, .. } = cut.cut;
            let clone = Clone { active, standby, patches, slot, marks, before };
            let outcome = json!({"freeze_ms": round(freeze_ms), "clone_ms": round(clone_ms)});
            Ok((Cloned(clone), outcome))
        })
        .await
    }
}

/// Which disks are not cloned but copied, of a service that is not quiesced: there they are copied when the clone has been checked.
fn whole_copies(service: &Service, active: &Machine, clones: Vec<CloneOf>) -> (Vec<CloneOf>, Vec<CopyOf>) {
    if commands(service).is_some() {
        return (clones, Vec::new());
    }
    let copied: Vec<_> = active.copied().map(|(_, disk)| names::dm_disk(active.name(), &disk.name)).collect();
    let (copies, clones): (Vec<_>, _) = clones.into_iter().partition(|of| copied.contains(&of.active));
    let copy = |of: CloneOf| CopyOf {
        active: of.active,
        copy: of.clone,
        origin: of.origin,
        target: of.cow,
        sectors: of.sectors,
    };
    (clones, copies.into_iter().map(copy).collect())
}

/// The cut that was made, and how long the clone took without the time for which copies were made.
struct Made {
    cut: Cut,
    clone_ms: f64,
}

/// Makes the copies, and cuts them together with the clones.
fn cut(
    job: &mut Context<'_>,
    (active, standby): (&Machine, &Machine),
    clones: &[CloneOf],
) -> Result<Made, Failure> {
    let failed = at::<ManagerError>;
    let dm = Manager::dm().map_err(failed(Phase::Clone))?;
    let mounts = job.manager.to_be_frozen(active).map_err(failed(Phase::Clone))?;
    if !mounts.is_empty() && Program::Btrfstune.find().is_none() {
        let missing = ProgramError::Missing { program: Program::Btrfstune };
        return Err(failed(Phase::Clone)(missing.into()));
    }
    let copies = copies::begin(job, Phase::Clone, (&dm, &mounts), (active, standby))?;
    let start = std::time::Instant::now();
    job.manager.write_out(active).map_err(failed(Phase::Clone))?;
    let cut = match copies {
        None => snapshot::clone_mounted(&dm, clones, &mounts).map_err(at(Phase::Clone))?,
        Some(copies) => {
            let Together { cut, accounts, wanted, .. } =
                copies.cut(clones, &mounts).map_err(at(Phase::Clone))?;
            job.manager.finish_copies(&wanted).map_err(failed(Phase::Clone))?;
            job.report.copies = accounts;
            cut
        }
    };
    Ok(Made { cut, clone_ms: start.elapsed().as_secs_f64() * 1e3 })
}

/// Whatever needs most into the largest store: the assignment that `covers` has promised to work.
pub(super) fn clones(active: &Machine, standby: &Machine) -> Result<Vec<CloneOf>, ManagerError> {
    let mut stores: Vec<_> = standby.disks.iter().collect();
    stores.sort_by_key(|disk| std::cmp::Reverse(disk.sectors));
    let mut disks: Vec<_> = active.disks.iter().collect();
    // A whole copy needs as much as its disk, a clone that can never fill up a little more.
    let copied: Vec<_> = active.copied().map(|(_, disk)| &disk.name).collect();
    let needs = |disk: &MachineDisk| match copied.contains(&&disk.name) {
        true => disk.sectors,
        false => cow_sectors(disk.sectors),
    };
    disks.sort_by_key(|disk| std::cmp::Reverse(needs(disk)));
    if stores.len() < disks.len() {
        return Err(ManagerError::refused(format!("partition {} has too few disks", standby.name())));
    }
    let clone = |(disk, store): (&&MachineDisk, &&MachineDisk)| CloneOf {
        active: names::dm_disk(active.name(), &disk.name),
        clone: names::dm_disk(standby.name(), &disk.name),
        origin: disk.backing.clone(),
        cow: store.backing.clone(),
        sectors: disk.sectors,
        watched: store.sectors < cow_sectors(disk.sectors),
    };
    Ok(disks.iter().zip(&stores).map(clone).collect())
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

impl Cloned {
    /// Looks at the clone, read-only, before anything is put into it: what is scanned is what boots.
    pub(super) async fn scan(self, job: &mut Context<'_>) -> Result<Scanned, Failure> {
        let settings = job.manager.config.scan.clone();
        let intent = json!({"root": Manager::root(self.0.standby.name())});
        job.step(Phase::Scan, intent, async |job| {
            let found = job
                .manager
                .with_root(&self.0.standby, true, |_, root| Ok(scan::scan(root, &settings)))
                .map_err(at(Phase::Scan))?;
            job.report.scan = Some(json!(found));
            let warnings = found.judge(&settings).map_err(|error| {
                let code = error.exit_code();
                with(Phase::Scan, code)(error)
            })?;
            for warning in &warnings {
                (job.say)(&format!("scan: {warning}"));
            }
            Ok((Scanned(self.0), json!({"warnings": warnings.len()})))
        })
        .await
    }
}

impl Scanned {
    /// Puts patches, table, init and start script into the clone.
    pub(super) async fn inject(self, job: &mut Context<'_>) -> Result<Injected, Failure> {
        let limits = job.manager.config.job.clone();
        let intent = json!({"patches": self.0.patches.iter().map(|p| p.sha256.clone()).collect::<Vec<_>>()});
        job.step(Phase::Inject, intent, async |job| {
            let clone = self.0;
            let identity = clone.standby.spec().identity;
            let table = inject::table_of(job.job, &clone.patches, &limits, OnError::Stop, identity)
                .map_err(at(Phase::Inject))?;
            let init = program::find().map_err(with(Phase::Inject, ExitCode::Unavailable))?;
            let state_dir = job.manager.state().to_owned();
            let payload = Payload {
                init: &init,
                scripts: &[],
                unit: Some(SYSTEMD_UNIT),
                table: &table,
                patches: &clone.patches,
                state_dir: &state_dir,
            };
            job.manager
                .with_open_root(&clone.standby, |root| Ok(inject::inject(root, &payload)?))
                .map_err(at(Phase::Inject))?;
            let count = clone.patches.len();
            Ok((Injected { clone, table }, json!({"patches": count})))
        })
        .await
    }
}
