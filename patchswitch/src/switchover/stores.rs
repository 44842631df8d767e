//! Stores that could fill up, in a job: what is measured before the clone, and said when the job does not watch them any more.

use std::time::Duration;

use super::context::at;
use super::{Context, Failure, Phase};
use crate::manager::{Machine, Manager, ManagerError};
use crate::storage::snapshot::CloneOf;

/// So long is watched how fast a disk is written.
const MEASURED: Duration = Duration::from_secs(2);

/// Gives stores that could fill up the size that the pace of writers asks for.
pub(super) async fn size(job: &Context<'_>, clones: &[CloneOf]) -> Result<(), Failure> {
    let failed = at::<ManagerError>;
    let counted = Manager::count_writes(clones).map_err(failed(Phase::Clone))?;
    if counted.is_empty() {
        return Ok(());
    }
    tokio::time::sleep(MEASURED).await;
    for sized in job.manager.size_stores(&counted).map_err(failed(Phase::Clone))? {
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let mib = sized.bytes as f64 / f64::from(1 << 20);
        let lasts = match sized.lasts.as_secs() {
            0 => "not even a second".to_owned(),
            seconds if seconds > 24 * 3600 => "more than a day".to_owned(),
            seconds => format!("{} min {} s", seconds / 60, seconds % 60),
        };
        (job.say)(&format!(
            "clone: {} is written at {:.2} MiB/s; a store of {mib:.0} MiB takes that for {lasts} at least",
            sized.active,
            sized.pace.bytes / f64::from(1 << 20)
        ));
    }
    Ok(())
}

/// The clone serves, and the job that has watched its stores is about to end.
pub(super) fn leave(job: &Context<'_>, machine: &Machine) {
    match job.manager.leave_unwatched(machine) {
        Ok(left) => {
            for clone in left {
                (job.say)(&job.manager.can_fill_up_unwatched(&job.service.name, &clone));
            }
        }
        Err(error) => tracing::warn!("stores of clones: {}", crate::manager::chain(&error)),
    }
}
