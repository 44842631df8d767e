//! A time with or without switches, and what kernels had to repair in it.

use std::time::{Duration, Instant};

use anyhow::Result;
use patchswitch_load::clock::now_ns;
use patchswitch_tests::observe::Counters;

use crate::peers::{Peer, Side};

/// From the beginning of a window to its switch.
const LEAD: Duration = Duration::from_millis(100);

/// A time with or without a switch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) from_ns: u64,
    pub(crate) to_ns: u64,
    pub(crate) trouble: Repaired,
}

impl Window {
    /// How long it was.
    pub(crate) fn seconds(&self) -> f64 {
        (self.to_ns - self.from_ns) as f64 / 1e9
    }
}

/// What kernels had to do because of something that went wrong.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Repaired {
    /// Connections of the client that were reset, and retransmission timers that fired.
    pub(crate) broken: i64,
    /// Segments sent again.
    pub(crate) again: i64,
    /// Of these, those that had arrived: the receiver said so (DSACK).
    pub(crate) needless: i64,
    /// Of these, probes for the last segment of a flight whose acknowledgement is late (TLP, RFC 8985 7): the timer is two
    /// round trips, which here is less than a processor is away with something else.
    pub(crate) probes: i64,
    /// Resets that the service's namespaces sent.
    pub(crate) resets: i64,
}

impl Repaired {
    fn of(peer: &dyn Peer) -> Result<Self> {
        let mut sum = Self::default();
        for ns in [&peer.lab().client, peer.ns(Side::A), peer.ns(Side::B)] {
            let counters = Counters::of(ns)?;
            let trouble = counters.trouble()?;
            sum.broken += trouble.time_outs;
            sum.again += trouble.retransmitted;
            sum.needless += counters.get("TcpExt.TCPDSACKRecv")?;
            sum.probes += counters.get("TcpExt.TCPLossProbes")?;
            if ns.name() == peer.lab().client.name() {
                sum.broken += trouble.established_reset;
            } else {
                sum.resets += trouble.resets_sent;
            }
        }
        Ok(sum)
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            broken: self.broken - earlier.broken,
            again: self.again - earlier.again,
            needless: self.needless - earlier.needless,
            probes: self.probes - earlier.probes,
            resets: self.resets - earlier.resets,
        }
    }
}

/// A window, with a switch in it if a side is named. It ends when the switch is over for as long as a quiet one lasts.
pub(crate) fn window(peer: &mut dyn Peer, length: Duration, to: Option<Side>) -> Result<Window> {
    let before = Repaired::of(peer)?;
    let (begun, from_ns) = (Instant::now(), now_ns());
    let mut end = begun + length;
    if let Some(to) = to {
        std::thread::sleep(LEAD);
        peer.switch(to)?;
        end = end.max(Instant::now() + length - LEAD);
        end += Duration::from_secs_f64(peer.settles_s());
    }
    std::thread::sleep(end.saturating_duration_since(Instant::now()));
    Ok(Window { from_ns, to_ns: now_ns(), trouble: Repaired::of(peer)?.since(before) })
}

/// Many switches, there and back, with a time between them; how many.
pub(crate) fn many(peer: &mut dyn Peer, count: u32, pace: Duration) -> Result<(Window, u32)> {
    let before = Repaired::of(peer)?;
    let from_ns = now_ns();
    for number in 0..count {
        peer.switch(if number % 2 == 0 { Side::B } else { Side::A })?;
        std::thread::sleep(pace);
    }
    Ok((Window { from_ns, to_ns: now_ns(), trouble: Repaired::of(peer)?.since(before) }, count))
}
