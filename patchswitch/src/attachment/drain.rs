//! Waiting until the flows of a partition have ended.

use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::word::Phase;
use serde::Serialize;

use super::{AttachError, Attachment, Flows};
use crate::host::linux::sockets;

/// The kernel is asked this often while a partition drains.
const POLL: Duration = Duration::from_millis(250);

/// What happens to flows that are still there at the deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDeadline {
    /// They stay with the retiring partition; the drain goes on without anybody waiting for it.
    Keep,
    /// The switch is reversed.
    Abort,
    /// They are reset, both ends.
    Reset,
}

/// How to wait.
#[derive(Clone, Copy, Debug)]
pub struct DrainOptions {
    /// The longest time to wait; nothing: for ever.
    pub deadline: Option<Duration>,
    /// What then.
    pub on_deadline: OnDeadline,
}

/// How a drain ended.
#[derive(Clone, Debug, Serialize)]
pub struct DrainReport {
    /// Flows when it began, of every kind: see [`Flows::count`].
    pub flows_at_start: usize,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Flows that were still there at the deadline.
    pub left: usize,
    /// Flows that were cut: connections were reset, learned flows forgotten.
    pub reset: usize,
    /// Whether nobody retires any more.
    pub settled: bool,
}

impl Attachment {
    /// Waits until the retiring partition has no flow left, and ends the switch then.
    ///
    /// `progress` is told the number of flows each time it changes. Nobody retires: nothing to do.
    ///
    /// # Errors
    /// [`AttachError`]; the drain itself goes on in the kernel whatever happens here.
    pub async fn drain(
        &mut self,
        options: &DrainOptions,
        progress: impl FnMut(usize),
    ) -> Result<DrainReport, AttachError> {
        self.drain_until(options, &|| false, progress).await
    }

    /// As [`Attachment::drain`], and ends early, with the drain going on in the kernel, when `stop` says so.
    ///
    /// # Errors
    /// As [`Attachment::drain`].
    pub async fn drain_until(
        &mut self,
        options: &DrainOptions,
        stop: &(dyn Fn() -> bool + Sync),
        mut progress: impl FnMut(usize),
    ) -> Result<DrainReport, AttachError> {
        let start = Instant::now();
        let report = |flows: usize, left, reset, settled| DrainReport {
            flows_at_start: flows,
            seconds: start.elapsed().as_secs_f64(),
            left,
            reset,
            settled,
        };
        let word = self.plane().word();
        match word.phase() {
            Phase::Steady => return Ok(report(0, 0, 0, true)),
            Phase::Draining => {}
            Phase::Sharing => {
                return Err(AttachError::Refused(format!(
                    "both sides of {} serve, and neither retires; `patchswitch switch` decides for one of them",
                    self.record().name
                )));
            }
        }
        let retiring = word.active().other();
        let (mut at_start, mut last) = (None, usize::MAX);
        loop {
            self.report_events();
            let flows = self.flows(retiring)?;
            let left = flows.count();
            let first = *at_start.get_or_insert(left);
            if left != last {
                progress(left);
                last = left;
            }
            if flows.is_empty() {
                self.settle()?;
                return Ok(report(first, 0, 0, true));
            }
            if stop() {
                return Ok(report(first, left, 0, false));
            }
            if options.deadline.is_some_and(|deadline| start.elapsed() >= deadline) {
                let (reset, settled) = self.overdue(retiring, options.on_deadline, &flows).await?;
                return Ok(report(first, left, reset, settled));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn overdue(
        &mut self,
        retiring: Slot,
        what: OnDeadline,
        flows: &Flows,
    ) -> Result<(usize, bool), AttachError> {
        match what {
            OnDeadline::Keep => Ok((0, false)),
            OnDeadline::Abort => self.switch(retiring).await.map(|_| (0, false)),
            OnDeadline::Reset => {
                let reset = sockets::reset(&self.netns(retiring)?, &flows.sockets)?;
                // Whatever has no socket follows the active partition from then on.
                self.settle()?;
                Ok((reset + flows.learned, true))
            }
        }
    }
}
