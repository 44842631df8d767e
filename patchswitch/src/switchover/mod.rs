//! The story: a job from its plan to its commit.
//!
//! ```text
//!  plan ─► clone ─► scan ─► inject ─► boot ─► patch ─► restart ─► verify ─► arm ─► TAKE OVER ─► observe ─► drain ─► retire ─► commit
//!   │        └──────────┴────────┴───────┴───────┴────────┴─────────┴───────┤            │           │
//!   │                     undo: the clone is discarded; the service was never touched    └ give back ┘
//!   └ nothing to undo                                                                      the same switch, roles exchanged
//! ```
//!
//! A service with a single writer goes over with its disk, while new flows wait: there `quiesce` is what arm and TAKE OVER are.
//! Where the network device or the address goes over, new flows wait as well, and nothing has to be armed.
//!
//! Every step is written into the journal before it is done and after it. One struct per phase, each consumed by the
//! next: taking over a clone that was not verified does not compile. An error says which phase it was, why, how the
//! undo went, and who serves now.
//!
//! Before TAKE OVER undo is one function, `undo::discard`, which takes everything of the standby away whatever of it
//! is there; give-back, rollback and recovery end with the same one.

mod clone;
mod cold;
mod commit;
mod context;
mod copies;
mod drain;
mod exchange;
mod look;
mod observe;
mod patch;
mod plan;
mod quiesce;
mod recount;
mod report;
mod rollback;
mod serves;
mod stop;
mod stores;
mod take_over;
mod turn;
pub(crate) mod undo;
mod verbs;
mod verify;

pub use context::{Context, Failure, Phase, SwitchError};
pub use plan::Summary;
pub use plan::{Options, Plan, plan};
pub use report::{AtSwitch, Loss, Report};

use crate::exit::ExitCode;
use crate::host::linux::priority::Priority;
use drain::Undrained;

/// Runs a job. On an error everything before the switch is undone, and everything after it is given back, as far as
/// that loses no writes; the report says how it went either way.
///
/// # Errors
/// [`SwitchError`].
pub async fn run(job: &mut Context<'_>, plan: Plan) -> Result<ExitCode, SwitchError> {
    let verified = match prepare(job, plan).await {
        Ok(verified) => verified,
        Err(failure) => return Err(undo::after(job, failure).await),
    };
    // Around the switch nobody must wait for the agent; what it starts has the usual priority.
    let _way = Priority::give_way();
    let taken = match verified.take_over(job).await {
        Ok(taken) => taken,
        Err(failure) => return Err(undo::after(job, failure).await),
    };
    let observed = match taken.observe(job).await {
        Ok(observed) => observed,
        Err((taken, failure)) => return Err(taken.give_back(job, failure).await),
    };
    let drained = match observed.drain(job).await {
        Ok(drained) => drained,
        Err(Undrained::GiveBack(taken, failure)) => return Err(taken.give_back(job, failure).await),
        Err(Undrained::Kept(failure)) => return Err(undo::serving_anyway(job, failure)),
    };
    let retired = drained.retire(job).await.map_err(|failure| undo::serving_anyway(job, failure))?;
    if job.options.commit {
        retired.commit(job).map_err(|failure| undo::serving_anyway(job, failure))?;
    } else {
        retired.stay(job);
    }
    Ok(job.report.exit_code())
}

/// Everything before the switch: the service is not touched.
async fn prepare(job: &mut Context<'_>, plan: Plan) -> Result<verify::Verified, Failure> {
    let cloned = plan.clone_disks(job).await?;
    let scanned = cloned.scan(job).await?;
    let injected = scanned.inject(job).await?;
    let booted = injected.boot(job).await?;
    let patched = booted.patch(job).await?;
    let restarted = patched.restart(job).await?;
    restarted.verify(job).await
}

pub use commit::commit;
pub(crate) use commit::{begin_merge, merge_disks};
pub use look::{JobView, Progress, Room, job, log_file, open_jobs, rooms};
pub use quiesce::Waited;
pub(crate) use quiesce::reunite;
pub(crate) use recount::recount;
pub use rollback::rollback;
pub use verbs::{Ended, Watcher, apply, make_permanent, roll_back};
