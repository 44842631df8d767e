//! Waiting until the flows of a partition have ended.

use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::word::Phase;
use serde::Serialize;

use super::{AttachError, Attachment, Flows, announce};
use crate::host::linux::sockets;

/// The kernel is asked this often while a partition drains, and more often at first: new flows may be waiting for it.
const POLL: Duration = Duration::from_millis(250);
const FIRST_POLL: Duration = Duration::from_millis(5);

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
    /// `progress` is told the number of flows each time it changes. Nobody retires: nothing to do. Neighbours are watched
    /// meanwhile ([`Attachment::watch_neighbours`]).
    ///
    /// # Errors
    /// [`AttachError`]; the drain itself goes on in the kernel whatever happens here.
    pub async fn drain(
        &mut self,
        options: &DrainOptions,
        progress: impl FnMut(usize),
    ) -> Result<DrainReport, AttachError> {
        let _watching = self.watch_neighbours(announce::EVERY);
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
        let (mut at_start, mut last, mut warned) = (None, usize::MAX, false);
        loop {
            self.report_events();
            warned = warned || self.tell_of_lost(word.active());
            // All of a group: there is one word for them.
            let flows = self.flows_of_all(retiring)?;
            let left = flows.iter().map(Flows::count).fold(0, usize::saturating_add);
            let first = *at_start.get_or_insert(left);
            if left != last {
                progress(left);
                last = left;
            }
            if flows.iter().all(Flows::is_empty) {
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
            tokio::time::sleep(start.elapsed().clamp(FIRST_POLL, POLL)).await;
        }
    }

    async fn overdue(
        &mut self,
        retiring: Slot,
        what: OnDeadline,
        flows: &[Flows],
    ) -> Result<(usize, bool), AttachError> {
        match what {
            OnDeadline::Keep => Ok((0, false)),
            OnDeadline::Abort => self.switch(retiring).await.map(|_| (0, false)),
            OnDeadline::Reset => {
                let mut cut = 0;
                for (member, flows) in std::iter::once(&*self).chain(&self.others).zip(flows) {
                    cut += sockets::reset(&member.netns(retiring)?, &flows.sockets)? + flows.learned;
                }
                // Whatever has no socket follows the active partition from then on.
                self.settle()?;
                Ok((cut, true))
            }
        }
    }

    fn flows_of_all(&self, slot: Slot) -> Result<Vec<Flows>, AttachError> {
        std::iter::once(self).chain(&self.others).map(|member| member.flows(slot)).collect()
    }
}
