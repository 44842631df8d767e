//! Which flows a partition still has, and waiting until they have ended.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::word::Phase;
use serde::Serialize;

use super::{AttachError, Attachment};
use crate::host::linux::sockets::{self, TcpSocket};

/// The kernel is asked this often while a partition drains.
const POLL: Duration = Duration::from_millis(250);

/// The flows of one partition.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Flows {
    /// Connections that the service accepted, or is about to: the drain waits for these.
    pub accepted: Vec<Flow>,
    /// Connections that the partition itself opened: listed, not waited for.
    pub outgoing: Vec<Flow>,
    /// Connections that wait in a listener's queue for being accepted. Closing the listener would reset them.
    pub queued: u32,
    /// Learned flows that are not idle for too long: UDP and ICMP.
    pub learned: usize,
    #[serde(skip)]
    sockets: Vec<TcpSocket>,
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Flow {
    /// The partition's end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// State as the kernel names it, in lower case.
    pub state: &'static str,
}

impl Flows {
    /// Whether nothing is left that the drain waits for.
    pub fn is_empty(&self) -> bool {
        self.accepted.is_empty() && self.queued == 0 && self.learned == 0
    }
}

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
    /// Accepted flows when it began.
    pub flows_at_start: usize,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Flows that were still there at the deadline.
    pub left: usize,
    /// Flows that were reset.
    pub reset: usize,
    /// Whether nobody retires any more.
    pub settled: bool,
}

fn state_name(state: u8) -> &'static str {
    match state {
        1 => "established",
        2 => "syn-sent",
        3 | 12 => "syn-recv",
        4 => "fin-wait-1",
        5 => "fin-wait-2",
        8 => "close-wait",
        9 => "last-ack",
        11 => "closing",
        _ => "unknown",
    }
}

impl Attachment {
    /// The flows of the partition in a slot that use a service address.
    ///
    /// # Errors
    /// [`AttachError::Sockets`].
    pub fn flows(&self, slot: Slot) -> Result<Flows, AttachError> {
        let sockets = sockets::tcp_sockets(&self.netns(slot)?)?;
        let mut ports = self.record().service_ports.clone();
        ports.extend(listeners(&sockets));
        let mut flows = Flows { learned: self.plane().learned(slot)?, ..Flows::default() };
        for socket in sockets {
            let ours = |s: &TcpSocket| self.record().addresses.contains(&s.local.ip());
            if socket.is_listener() {
                let wide = socket.local.ip().is_unspecified() || ours(&socket);
                flows.queued += if wide { socket.receive_queue } else { 0 };
            } else if ours(&socket) {
                let flow =
                    Flow { local: socket.local, remote: socket.remote, state: state_name(socket.state) };
                if ports.contains(&socket.local.port()) {
                    flows.accepted.push(flow);
                    flows.sockets.push(socket);
                } else {
                    flows.outgoing.push(flow);
                }
            }
        }
        Ok(flows)
    }

    pub(super) fn listening_ports(&self, slot: Slot) -> Result<Vec<u16>, AttachError> {
        if self.record().slots[slot as usize].is_none() {
            return Ok(Vec::new());
        }
        Ok(listeners(&sockets::tcp_sockets(&self.netns(slot)?)?))
    }

    /// Waits until the retiring partition has no accepted flow left, and ends the switch then.
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
        if word.phase() == Phase::Steady {
            return Ok(report(0, 0, 0, true));
        }
        let retiring = word.active().other();
        let (mut at_start, mut last) = (None, usize::MAX);
        loop {
            let flows = self.flows(retiring)?;
            let left = flows.accepted.len();
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
                self.settle()?;
                Ok((reset, true))
            }
        }
    }
}

fn listeners(sockets: &[TcpSocket]) -> Vec<u16> {
    let mut ports: Vec<u16> = sockets.iter().filter(|s| s.is_listener()).map(|s| s.local.port()).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}
