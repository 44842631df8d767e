//! Rows 5 and 6: from the switch to the first connection of the new side, there and back, with connections opened at a
//! steady rate meanwhile. What part of that is patchswitch's own is measured in [`late`].

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{Ns, SERVICE};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, getsockname, socket_with};

use crate::late;
use crate::peers::{self, PRODUCT, Peer, Product, Side};
use crate::plan::{Scale, Selection};
use crate::probe::TCP_PROBE;
use crate::report::{Figure, Found, Target};

/// Between two connections.
const GAP: Duration = Duration::from_micros(500);
/// An acceptance that is later than this belongs to a SYN that was sent again.
const AGAIN_NS: u64 = 100_000_000;
/// How long connections are opened before a switch.
const LEAD: Duration = Duration::from_millis(50);
const FENCE_MS: f64 = 15.0;

/// When connections were accepted, by the client's port.
type Log = Arc<Mutex<Vec<(u16, u64)>>>;

/// Accepts, and writes down when.
pub(crate) struct Acceptor {
    log: Log,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    fn start(peer: &dyn Peer, side: Side) -> Result<Self> {
        let listener = peer.ns(side).enter(|| Ok(TcpListener::bind(("0.0.0.0", TCP_PROBE))?))?;
        listener.set_nonblocking(true)?;
        let (log, ending) = (Log::default(), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (log, ending) = (Arc::clone(&log), Arc::clone(&ending));
            move || {
                while !ending.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((_, from)) => {
                            let at = now_ns();
                            drop(log.lock().map(|mut log| log.push((from.port(), at))));
                        }
                        Err(_) => std::thread::sleep(Duration::from_micros(50)),
                    }
                }
            }
        });
        Ok(Self { log, ending, thread: Some(thread) })
    }

    /// Those since the last time it was asked.
    pub(crate) fn accepted(&self) -> Vec<(u16, u64)> {
        self.log.lock().map(|mut log| std::mem::take(&mut *log)).unwrap_or_default()
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Begins connections at a steady rate until it is told to end: when, by port.
fn begin_connections(ending: &AtomicBool, gap: Duration) -> Result<BTreeMap<u64, u16>> {
    let target = SocketAddr::new(SERVICE[0].parse()?, TCP_PROBE);
    let (mut begun, mut open): (BTreeMap<u64, u16>, Vec<OwnedFd>) = (BTreeMap::new(), Vec::new());
    while !ending.load(Ordering::Relaxed) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        let at = now_ns();
        // Under way: that is what it says.
        let _ = connect(&socket, &target);
        let local: SocketAddr = getsockname(&socket)?.try_into()?;
        begun.insert(at, local.port());
        open.push(socket);
        if open.len() > 10_000 {
            open.remove(0);
        }
        if !gap.is_zero() {
            std::thread::sleep(gap);
        }
    }
    Ok(begun)
}

/// From the switch to the first connection that the new side accepted, in microseconds: when connections were begun, and
/// accepted by the new side, in nanoseconds.
fn judge(stored: u64, begun: &BTreeMap<u64, u16>, accepted: &[(u16, u64)]) -> Option<f64> {
    let sent = |port: u16, before: u64| {
        let mut earlier = begun.range(..=before).rev();
        earlier.find(|(_, other)| **other == port).map(|(at, _)| *at)
    };
    // The moment of the SYN that was let in, of each connection.
    let moments = accepted.iter().map(|(port, at)| match sent(*port, *at) {
        Some(sent) if at - sent < AGAIN_NS => sent,
        // A proxy's connection has another port, and a SYN that was sent again another moment.
        _ => *at,
    });
    let first = moments.filter(|at| *at >= stored).min()?;
    Some((first - stored) as f64 / 1e3)
}

/// Does something while a client opens connections: with this time between two, so long before it and after it.
pub(crate) fn under<T>(
    client: &Ns,
    [gap, lead, settle]: [Duration; 3],
    deed: impl FnOnce() -> Result<T>,
) -> Result<(T, BTreeMap<u64, u16>)> {
    let ending = AtomicBool::new(false);
    let (done, begun) = std::thread::scope(|scope| {
        let beginning = scope.spawn(|| client.enter(|| begin_connections(&ending, gap)));
        std::thread::sleep(lead);
        let done = deed();
        std::thread::sleep(settle);
        ending.store(true, Ordering::Relaxed);
        (done, beginning.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    Ok((done?, begun?))
}

fn flip(peer: &mut dyn Peer, acceptors: &[Acceptor; 2], to: Side) -> Result<f64> {
    let settle = Duration::from_secs_f64(peer.settles_s()) + LEAD;
    let client = peer.lab().client.clone();
    let (stored, begun) = under(&client, [GAP, LEAD, settle], || peer.flip(to))?;
    acceptors[to.other() as usize].accepted();
    let accepted = acceptors[to as usize].accepted();
    judge(stored, &begun, &accepted).context("the new side accepted nothing")
}

/// Measures both rows.
pub(crate) fn measure(scale: Scale, selection: &Selection, found: &mut Found) -> Result<()> {
    let mut product = Product::new("flip")?;
    let acceptors = [Acceptor::start(&product, Side::A)?, Acceptor::start(&product, Side::B)?];
    let [there, back] = flips(&mut product, &acceptors, scale)?;
    add(5, PRODUCT, &there, found);
    add(6, PRODUCT, &back, found);
    late::measure(&product, &acceptors, scale, found)?;
    drop(acceptors);
    fence(&product, scale, found)?;
    drop(product);
    for (key, _) in peers::ALL.into_iter().filter(|(key, _)| *key != peers::FLOOR && selection.peer(key)) {
        if let Some(reason) = peers::hindrance(key) {
            found.not_run("switch to first connection", key, reason);
            continue;
        }
        let mut peer = peers::make(key)?;
        let acceptors = [Acceptor::start(peer.as_ref(), Side::A)?, Acceptor::start(peer.as_ref(), Side::B)?];
        let [there, back] = flips(peer.as_mut(), &acceptors, scale)?;
        add(5, key, &there, found);
        add(6, key, &back, found);
    }
    Ok(())
}

fn flips(peer: &mut dyn Peer, acceptors: &[Acceptor; 2], scale: Scale) -> Result<[Vec<f64>; 2]> {
    let count = scale.flips(peer.settles_s() > 0.0) / 2;
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for _ in 0..count {
        there.push(flip(peer, acceptors, Side::B)?);
        back.push(flip(peer, acceptors, Side::A)?);
    }
    Ok([there, back])
}

fn add(row: u8, key: &str, flips: &[f64], found: &mut Found) {
    let metric = if row == 5 { "switch to first connection" } else { "rollback to first connection" };
    let note = format!("a connection is begun every {} µs and what that takes", GAP.as_micros());
    found.add(Figure::values(row, metric, key, "µs", flips).note(note));
}

/// How long the product's own part takes.
fn fence(product: &Product, scale: Scale, found: &mut Found) -> Result<()> {
    let (mut stores, mut fences, mut commands, mut calls) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..scale.flips(false) / 2 {
        for to in [Side::B, Side::A] {
            let begun = now_ns();
            let switched = product.take_over(to)?;
            calls.push((now_ns() - begun) as f64 / 1e6);
            stores.push(switched.flip_us);
            let fence_us = switched.flip_us + switched.fence_us;
            fences.push(fence_us / 1e3);
            commands.push((switched.prepare_us + fence_us) / 1e3);
        }
    }
    found.add(Figure::values(5, "the store itself", PRODUCT, "µs", &stores));
    found.add(Figure::values(5, "the whole switch, as it is called", PRODUCT, "ms", &calls));
    for (metric, values) in [("store to fence", &fences), ("command to fence", &commands)] {
        found.add(Figure::values(5, metric, PRODUCT, "ms", values).must(Target::AtMost(FENCE_MS)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn begun() -> BTreeMap<u64, u16> {
        (1..=5).map(|number| (number * MS, 1000 + number as u16)).collect()
    }

    #[test]
    fn a_switch_that_is_at_once_costs_no_more_than_the_gap() {
        let accepted = [(1003, 3 * MS + 40_000), (1004, 4 * MS + 40_000)];
        assert_eq!(judge(2 * MS + MS / 2, &begun(), &accepted), Some(500.0));
    }

    #[test]
    fn what_goes_to_the_old_side_after_the_switch_is_seen() {
        let accepted = [(1004, 4 * MS + 40_000), (1005, 5 * MS + 40_000)];
        assert_eq!(judge(2 * MS + MS / 2, &begun(), &accepted), Some(1500.0));
    }

    #[test]
    fn a_syn_that_was_sent_again_counts_from_when_it_was_let_in() {
        let accepted = [(1003, 1003 * MS)];
        assert_eq!(judge(2 * MS + MS / 2, &begun(), &accepted), Some(1_000_500.0));
        assert_eq!(judge(2 * MS, &begun(), &[]), None);
        assert!(judge(2 * MS, &begun(), &[(9, 3 * MS)]).is_some(), "a proxy's port");
    }
}
