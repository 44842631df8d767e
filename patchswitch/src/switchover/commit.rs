//! Commit: the clone becomes the disk, while it serves.

use std::time::Duration;

use serde_json::json;

use super::context::{Failure, Phase, at};
use super::serves::Serves;
use super::{Context, Loss, recount};
use crate::exit::ExitCode;
use crate::manager::{Machine, Manager, ManagerError, chain, slot_of};
use crate::names::Name;
use crate::storage::merge::{self, Patience};
use crate::storage::snapshot::{self, WhenBusy};
use crate::storage::{StorageError, Unfinished};

/// A merge writes at the speed of the disk; this is for one that hangs.
const MERGE: Duration = Duration::from_secs(3600);
/// How long a device of a partition that has been stopped may take to be closed.
const CLOSE: Duration = Duration::from_secs(20);

/// Commits the last switch of a service; a job of its own.
///
/// # Errors
/// [`Failure`], before anything is changed if the old partition still has flows or lost writes are not agreed to; what it
/// wrote last is known only when it is stopped.
pub async fn commit(job: &mut Context<'_>, lost: Option<&Loss>) -> Result<ExitCode, Failure> {
    let refuse = |reason: String, code| Err(Failure { phase: Phase::Commit, reason, code });
    let Some(old) = job.manager.other(&job.service.name).map_err(at(Phase::Commit))? else {
        return refuse("there is nothing to commit".to_owned(), ExitCode::Nothing);
    };
    agreed(job, lost)?;
    retire(job, &old).await?;
    // It may have written until just now.
    let lost = recount::counted(job.manager, &job.service.name).map_err(at(Phase::Commit))?;
    agreed(job, lost.as_ref()).map_err(|failure| Failure {
        reason: format!("{}; it is stopped, nothing was merged", failure.reason),
        ..failure
    })?;
    merge(job)?;
    Ok(ExitCode::Done)
}

/// What the old side wrote after the clone is gone with the merge; outside what was declared it needs a word.
pub(super) fn agreed(job: &Context<'_>, lost: Option<&Loss>) -> Result<(), Failure> {
    if job.options.discard_writes || lost.is_some_and(|loss| loss.files == 0) {
        return Ok(());
    }
    let what = lost.map_or_else(
        // Not known is not nothing.
        || "the report of the switch is gone, so what the old partition wrote after the clone is not known".to_owned(),
        |Loss { files, first, .. }| {
            let first = first.first().map(|path| path.display().to_string()).unwrap_or_default();
            format!("the old partition wrote {files} files after the clone that may_lose does not declare ({first} …)")
        },
    );
    let reason = format!("{what}; --discard-writes commits all the same");
    Err(Failure { phase: Phase::Commit, reason, code: ExitCode::WritesLost })
}

/// An old partition that still runs, because its job was interrupted or its flows were kept, retires now if it is
/// drained.
async fn retire(job: &mut Context<'_>, old: &Machine) -> Result<(), Failure> {
    if slot_of(&job.attachment, old).is_none() && !job.manager.is_running(old).map_err(at(Phase::Retire))? {
        return Ok(());
    }
    let new = job.manager.active(&job.service).map_err(at(Phase::Retire))?;
    let service = Some(&job.service);
    let retired = job.manager.retire_drained(&mut job.attachment, &new, old, service).await;
    if retired.map_err(at(Phase::Retire))? {
        return Ok(());
    }
    let service = &job.service.name;
    let reason = format!("{} still has flows; `patchswitch drain {service}` waits for their end", old.name());
    Err(Failure { phase: Phase::Retire, reason, code: ExitCode::Failed })
}

/// Merges, and exchanges what is behind the two partitions' disks.
pub(super) fn merge(job: &mut Context<'_>) -> Result<(), Failure> {
    let service = job.service.name.clone();
    let new = job.manager.active(&job.service).map_err(at(Phase::Commit))?;
    // The old one's disk is the only other way to serve.
    if let Some(lost) = Serves::of(job, &new).lost() {
        let reason = format!(
            "{lost}: nothing was merged; `patchswitch up` puts that right, `patchswitch rollback {service}` gives back"
        );
        return Err(Failure { phase: Phase::Commit, reason, code: ExitCode::Failed });
    }
    let start = std::time::Instant::now();
    if let Err(error) = prepare(job.manager, &new) {
        let reason = format!(
            "{}: nothing was merged; `patchswitch rollback {service} --discard-writes` gives back",
            chain(&error)
        );
        return Err(Failure { phase: Phase::Commit, reason, code: ExitCode::Failed });
    }
    let intent = json!({"clones": new.clones()});
    let step = job.manager.store.intend(job.job, Phase::Commit.name(), &intent).map_err(at(Phase::Commit))?;
    // From here on there is only one way, and if it is not gone to the end now, `up` goes it.
    job.unfinished = true;
    (job.say)("commit …");
    let bytes = merge_disks(job.manager, &service).map_err(at(Phase::Commit))?;
    let seconds = start.elapsed().as_secs_f64();
    job.report.phase(Phase::Commit, seconds);
    job.report.cow_bytes = Some(bytes);
    let outcome = json!({"cow_bytes": bytes});
    let _ = job
        .manager
        .store
        .conclude(step, crate::store::StepState::Done, &outcome)
        .map_err(at(Phase::Commit))?;
    job.unfinished = false;
    (job.say)(&format!("commit done in {seconds:.2} s: cow_bytes {bytes}"));
    Ok(())
}

/// Nobody watches the stores of the clones from now on, and each of the clones is whole.
fn prepare(manager: &Manager, new: &Machine) -> Result<(), ManagerError> {
    // Those for which there is no room are watched by nobody for a moment.
    let _ = manager.leave_unwatched(new)?;
    Ok(merge::prepare(&Manager::dm()?, &new.clones(), patience(Duration::ZERO))?)
}

/// The merge itself, wherever it was interrupted; also what recovery does. Returns how much was merged, in bytes.
pub(crate) fn merge_disks(manager: &mut Manager, service: &Name) -> Result<u64, ManagerError> {
    let settings = manager.service(service)?;
    let new = manager.active(&settings)?;
    let clones = new.clones();
    if clones.is_empty() {
        // Written down already: the store does that in one piece.
        return Ok(0);
    }
    let dm = Manager::dm()?;
    let mut total = std::collections::BTreeMap::new();
    let committed = merge::resume_merge(&dm, &clones, patience(MERGE), &mut |progress| {
        let most = total.entry(progress.clone.to_owned()).or_insert(0);
        *most = (*most).max(progress.total * 512);
    })?;
    if let Some(old) = manager.other(service)? {
        // Only now there is certainly no way back: what it has kept of disks that it gave away, or was copied from.
        let _ = snapshot::discard(&dm, &old.clones(), CLOSE, WhenBusy::CutOff)?;
        Manager::free_copied(&old)?;
    }
    manager.exchange(service, &new, &committed.disks)?;
    Ok(total.values().sum())
}

/// Makes the disks usable whose merge was interrupted, by a boot for instance: it goes on while they are used.
pub(crate) fn begin_merge(manager: &Manager, service: &Name) -> Result<(), ManagerError> {
    let clones = manager.active(&manager.service(service)?)?.clones();
    let merged = merge::resume_merge(&Manager::dm()?, &clones, patience(Duration::ZERO), &mut |_| ());
    match merged {
        Err(Unfinished(errors))
            if errors.iter().all(|error| matches!(error, StorageError::MergeGoesOn { .. })) =>
        {
            Ok(())
        }
        other => other.map(drop).map_err(ManagerError::from),
    }
}

fn patience(merge: Duration) -> Patience {
    Patience { close: CLOSE, busy: WhenBusy::CutOff, merge }
}
