//! Whatever a reply is, nothing of it changes but its source and what sums that up.

use std::net::IpAddr;

use patchswitch::dataplane::to_wire;
use patchswitch_common::Slot;
use patchswitch_common::parse::Fragment;
use patchswitch_common::verdict::Hook;
use patchswitch_tests::sums::with_source;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;

use super::known::{echo, network};
use crate::bench::{Bench, Family, families, key};
use crate::frame::{self, Ip, Place, icmp, seal};
use crate::seed::runner;
use crate::steer::DRAINING;

/// How many replies that are rewritten.
const REPLIES: usize = 4000;
/// Where a first fragment ends: behind the ports that an error quotes.
const FIRST: usize = 64;
/// A protocol that has neither ports nor a sum of the addresses.
const GRE: u8 = 47;

/// A reply, before anything is done to it.
#[derive(Clone, Debug)]
struct Reply {
    v6: bool,
    /// Which protocol, and a number of it.
    kind: u8,
    flags: u8,
    ports: (u16, u16),
    /// As many options or extension headers.
    options: usize,
    payload: Vec<u8>,
    /// What pads its frame.
    padding: usize,
    /// Whether it is cut into two fragments.
    split: bool,
    /// By what its sum is wrong.
    wrong: u16,
}

fn replies() -> impl Strategy<Value = Reply> {
    let what = (any::<bool>(), 0..9_u8, any::<u8>(), (1..=u16::MAX, 1..=u16::MAX));
    let options = prop_oneof![2 => Just(0_usize), 1 => 1..10_usize];
    let padding = prop_oneof![3 => Just(0_usize), 1 => 1..40_usize];
    let wrong = prop_oneof![5 => Just(0_u16), 1 => any::<u16>()];
    let rest = (options, padding, prop::bool::weighted(0.2), wrong);
    (what, rest, prop::collection::vec(any::<u8>(), 0..300)).prop_map(
        |((v6, kind, flags, ports), (options, padding, split, wrong), payload)| Reply {
            v6,
            kind,
            flags,
            ports,
            options,
            payload,
            padding,
            split,
            wrong,
        },
    )
}

impl Reply {
    fn family(&self) -> Family {
        families()[usize::from(self.v6)]
    }

    /// The packet as it is sent from an address, with a sum from scratch, and where that is if it covers the addresses.
    fn sent(&self, from: IpAddr) -> (Ip, Option<usize>) {
        let (family, payload) = (self.family(), &self.payload[..]);
        let (own, client) = ((from, self.ports.0), (family.client, self.ports.1));
        let [high, low] = self.ports.1.to_be_bytes();
        let message = |kind, rest, payload: &[u8]| icmp(from, family.client, kind, rest, payload);
        let (packet, at) = match self.kind {
            0 | 1 => (frame::udp(own, client, payload), Some(6)),
            2 => (frame::tcp(own, client, self.flags, payload), Some(16)),
            3 => (frame::sctp(own, client, payload), None),
            // Both have their sum where UDP has its own.
            4 | 5 => (frame::udp(own, client, &[&[0; 8], payload].concat()), Some(6)),
            6 => (message(if self.v6 { 129 } else { 0 }, [high, low, 0, 1], payload), Some(2)),
            7 => {
                let asked = frame::udp(client, (family.service, self.ports.0), payload).bytes();
                (message(if self.v6 { 1 } else { 3 }, [0, 0, 0, self.flags], &asked), Some(2))
            }
            _ => (Ip::new(from, family.client, GRE, [&[0; 4], payload].concat()), None),
        };
        let (options, extensions) = if self.v6 {
            (Vec::new(), vec![60; self.options.min(3)])
        } else {
            (vec![1; self.options * 4], Vec::new())
        };
        let mut packet = Ip { protocol: self.number(packet.protocol), options, extensions, ..packet };
        // Sums of ICMP for IPv4 are about no addresses.
        let at = at.filter(|_| packet.protocol != frame::ICMP);
        if let Some(at) = at {
            seal(&mut packet, at);
            if self.is_without() {
                packet.payload[at..at + 2].fill(0);
            }
        }
        (packet, at)
    }

    fn number(&self, number: u8) -> u8 {
        match self.kind {
            4 => frame::DCCP,
            5 => frame::UDP_LITE,
            _ => number,
        }
    }

    /// Whether it is a datagram without a sum.
    fn is_without(&self) -> bool {
        self.kind == 1
    }

    /// The flow that it belongs to: the ports of client and service, and the protocol.
    fn flow(&self) -> (u16, u16, u8) {
        let v4 = !self.v6;
        match self.kind {
            2 => (self.ports.1, self.ports.0, frame::TCP),
            3 => (self.ports.1, self.ports.0, frame::SCTP),
            6 => (self.ports.1, 0, echo(v4)),
            8 => (0, 0, GRE),
            _ => (self.ports.1, self.ports.0, self.number(frame::UDP)),
        }
    }

    /// Its frames, from an address.
    fn frames(&self, from: IpAddr, mac: [u8; 6]) -> Vec<Vec<u8>> {
        let (whole, _) = self.sent(from);
        let split = self.split && whole.payload.len() > FIRST;
        let parts = if split { halves(&whole) } else { vec![whole] };
        let padded = |part: &Ip| [part.frame(mac), vec![0xa5; self.padding]].concat();
        parts.iter().map(padded).collect()
    }
}

/// Both fragments of a packet.
fn halves(whole: &Ip) -> Vec<Ip> {
    let (first, later) = whole.payload.split_at(FIRST);
    let part = |payload: &[u8], offset, more| {
        let place = Some(Place { offset, more, id: 7 });
        Ip { place, payload: payload.to_vec(), ..whole.clone() }
    };
    vec![part(first, 0, true), part(later, 8, false)]
}

/// What comes out of the program for a frame of the first partition, which must have rewritten it.
fn rewritten(bench: &mut Bench, reply: &Reply, frame: &[u8]) -> anyhow::Result<Vec<u8>> {
    let seen = bench.run(Hook::FromPartition, bench.links[0], 0, frame)?;
    let counter = if reply.v6 { "rewritten_v6" } else { "rewritten_v4" };
    anyhow::ensure!(seen.counted.contains(&counter), "{seen:?}");
    Ok(seen.frame)
}

#[test]
fn a_rewrite_changes_the_source_and_its_sums_and_nothing_else() {
    let mut bench = Bench::new("inverse").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    let mac = bench.links[0].mac;
    let mut runner = runner().unwrap();
    let (strategy, mut kinds) = (replies(), [[0_u32; 9]; 2]);
    for number in 0..REPLIES {
        let reply = strategy.new_tree(&mut runner).unwrap().current();
        let family = reply.family();
        let (client, service, protocol) = reply.flow();
        bench.remember(key((family.client, client), service, protocol), family.service, Slot::A, 0).unwrap();
        let sent = reply.frames(family.own_a, mac);
        for (mut frame, wanted) in sent.into_iter().zip(reply.frames(family.service, mac)) {
            let header = network(&frame, reply.v6).unwrap_or_else(|| panic!("{number}: {reply:?}"));
            let sum = reply.sent(family.own_a).1.filter(|_| header.fragment != Fragment::Later);
            if reply.wrong == 0 || sum.is_none() {
                let seen = rewritten(&mut bench, &reply, &frame).unwrap();
                assert_eq!(seen, wanted, "{number}: {reply:?}");
                // With the old source again it is what was sent.
                let back = with_source(&seen, &header, &to_wire(family.own_a));
                assert_eq!(back, frame, "{number}: {reply:?}");
            } else if let Some(at) = sum {
                // What was wrong on the way stays wrong, by as much.
                let at = header.payload as usize + at;
                let sum = u16::from_be_bytes([frame[at], frame[at + 1]]).wrapping_add(reply.wrong);
                frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
                let seen = rewritten(&mut bench, &reply, &frame).unwrap();
                assert_eq!(
                    seen,
                    with_source(&frame, &header, &to_wire(family.service)),
                    "{number}: {reply:?}"
                );
            }
        }
        kinds[usize::from(reply.v6)][usize::from(reply.kind)] += 1;
        bench.forget().unwrap();
    }
    assert!(kinds.as_flattened().iter().all(|count| *count >= 100), "{kinds:?}");
    bench.finish().unwrap();
}
