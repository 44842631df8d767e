//! The programs against a model in plain Rust, packet by packet.
//!
//! The parsers and the rules are the same functions on both sides, but here they are composed anew, run on a slice
//! instead of a socket buffer, compiled for another processor, and ask a table instead of the kernel. Packets are
//! generated around what matters (ports that somebody has, options, fragments, errors), then cut and damaged.

use std::collections::BTreeMap;
use std::net::IpAddr;

use patchswitch::dataplane::to_wire;
use patchswitch_common::Slot;
use patchswitch_common::decide::{ACK, Kernel, SYN, Socket, owner};
use patchswitch_common::maps::{Address, unmapped};
use patchswitch_common::parse::{
    Flow, Fragment, Kind, LINK_HEADER, Network, Packet, Transport, inbound, ipv4, ipv6,
};
use patchswitch_common::refuse;
use patchswitch_common::verdict::{Event, Hook, Verdict};
use patchswitch_common::word::{Phase, Word};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;

use crate::bench::{Bench, DROP, Family, NEXT, PORT, REDIRECT, families, key};
use crate::frame::{self, ETHERNET, Ip, Place, icmp};
use crate::seed::runner;
use crate::steer::{DRAINING, connection, listener};

/// How many packets; of one seed always the same ones.
const PACKETS: usize = 10_000;
/// How many replies that are rewritten.
const REPLIES: usize = 2000;
/// A client's port of a connection of slot A, of one of slot B, and of flows that A answered.
pub(crate) const OF_A: u16 = 1000;
pub(crate) const OF_B: u16 = 2000;
const LEARNED: u16 = 3000;

/// What the kernel knows, as a table.
pub(crate) struct Known {
    v4: bool,
    /// The addresses of the family: client and service.
    client: Address,
    service: Address,
    /// Where first fragments went: by source, identification and protocol.
    fragments: BTreeMap<(Address, Address, u32, u8), Slot>,
    /// Whether A retires, and was asked in vain, with the packet at hand.
    drains: bool,
    nothing: bool,
}

impl Known {
    /// A family's, before anything was seen.
    pub(crate) fn of(family: Family) -> Self {
        let [client, service] = [family.client, family.service].map(to_wire);
        let v4 = family.client.is_ipv4();
        Self { v4, client, service, fragments: BTreeMap::new(), drains: false, nothing: false }
    }
}

impl Kernel for Known {
    fn tcp(&mut self, slot: Slot, flow: &Flow, _cookie: bool) -> Socket {
        let own = if slot == Slot::A { OF_A } else { OF_B };
        let to_listener = (flow.local, flow.local_port) == (self.service, PORT.to_be());
        if to_listener && (flow.remote, flow.remote_port) == (self.client, own.to_be()) {
            Socket::Connection
        } else if to_listener {
            Socket::Listener { cookie: false }
        } else {
            // Of two that share none retires.
            self.nothing |= self.drains && slot == Slot::A;
            Socket::None
        }
    }

    fn udp_connected(&mut self, _: Slot, _: &Flow) -> bool {
        false
    }

    fn learned(&mut self, flow: &Flow) -> Option<Slot> {
        let port = if flow.protocol == frame::UDP { PORT } else { 0 };
        let known = (flow.remote, flow.local) == (self.client, self.service)
            && flow.remote_port == LEARNED.to_be()
            && flow.local_port == port.to_be()
            && [frame::UDP, echo(self.v4)].contains(&flow.protocol);
        known.then_some(Slot::A)
    }

    fn fragment(&mut self, source: &Address, id: u32, protocol: u8) -> Option<Slot> {
        let number = if self.v4 { protocol } else { 0 };
        self.fragments.get(&(*source, self.service, id, number)).copied()
    }
}

/// The protocol of pings.
fn echo(v4: bool) -> u8 {
    if v4 { frame::ICMP } else { frame::ICMPV6 }
}

/// What must be seen: the action, the counters in their order, and those that compare the sides.
pub(crate) type Expected = (i32, Vec<&'static str>, Vec<&'static str>);

pub(crate) fn expect(word: Word, bytes: &[u8], v6: bool, known: &mut Known) -> Expected {
    let refuse =
        |verdict: Verdict| (if verdict.drops() { DROP } else { NEXT }, vec![verdict.name()], Vec::new());
    let at = ETHERNET + if v6 { 24 } else { 16 };
    let destination = bytes.get(at..at + if v6 { 16 } else { 4 });
    let Some(destination) = destination else { return refuse(Verdict::Malformed) };
    let wanted = if v6 { known.service.to_vec() } else { unmapped(&known.service).to_vec() };
    if destination != wanted {
        return refuse(Verdict::NotOurs);
    }
    let mut network = Network::EMPTY;
    let read =
        if v6 { ipv6(bytes, LINK_HEADER, &mut network) } else { ipv4(bytes, LINK_HEADER, &mut network) };
    if read.is_err() {
        return refuse(Verdict::Malformed);
    }
    if let Some(verdict) = refuse::inbound(bytes, &network) {
        return refuse(verdict);
    }
    let mut packet = Packet::EMPTY;
    let simple = word.phase() == Phase::Steady && network.fragment == Fragment::Whole;
    if !simple && inbound(bytes, &network, &mut packet).is_err() {
        return refuse(Verdict::Malformed);
    }
    (known.drains, known.nothing) = (word.phase() == Phase::Draining, false);
    let found = owner(word, &packet, known);
    let mut counted = vec![match (found.both, found.slot) {
        (true, _) => Verdict::ToBoth.name(),
        (false, Slot::A) => Verdict::ToA.name(),
        (false, Slot::B) => Verdict::ToB.name(),
    }];
    if word.phase() == Phase::Draining && found.slot != word.active() {
        counted.push("kept_by_retiring");
    }
    let asks = packet.kind == Kind::Direct
        && packet.transport == Transport::Tcp
        && packet.flags & (SYN | ACK) == SYN;
    let asked = (word.phase() != Phase::Steady && asks).then(|| Event::asked(found.slot).name());
    if known.nothing {
        counted.push("nothing_in_retiring");
    }
    match network.fragment {
        Fragment::First => {
            // Of IPv6 a datagram is known by its identification alone (RFC 8200 4.5).
            let number = if v6 { 0 } else { network.protocol };
            let key = (network.source, network.destination, network.fragment_id, number);
            known.fragments.insert(key, found.slot);
        }
        Fragment::Later if found.both => counted.push("fragment_unknown"),
        _ => {}
    }
    counted.sort_unstable();
    (REDIRECT, counted, asked.into_iter().collect())
}

/// A packet, before it is damaged.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) v6: bool,
    /// Which source: the client mostly, a stranger, one of the link, none.
    source: u8,
    pub(crate) protocol: u8,
    ports: (u16, u16),
    pub(crate) flags: u8,
    pub(crate) place: Option<Place>,
    pub(crate) options: Vec<u8>,
    pub(crate) extensions: Vec<u8>,
    /// Wrapped into an error of this type, as sent by the service.
    error: Option<u8>,
    payload: Vec<u8>,
    /// Bytes that are changed: where behind the link header, and by what.
    pub(crate) damage: Vec<(u16, u8)>,
    /// How much of it arrives, in percent.
    pub(crate) arrives: u8,
}

pub(crate) fn made() -> impl Strategy<Value = Made> {
    let port = prop_oneof![Just(OF_A), Just(OF_B), Just(LEARNED), Just(0), any::<u16>()];
    let place = prop_oneof![
        6 => Just(None),
        1 => (0..3_u32, any::<bool>()).prop_map(|(id, more)| Some(Place { offset: 0, more, id })),
        2 => (0..3_u32, 1..9_u16, any::<bool>()).prop_map(|(id, offset, more)| Some(Place { offset, more, id })),
    ];
    let options = prop_oneof![
        6 => Just(Vec::new()),
        1 => prop::collection::vec(prop_oneof![Just(1_u8), Just(131), Just(137), Just(7), 0..9_u8], 4..=4),
        1 => prop::collection::vec(any::<u8>(), 40..=40),
    ];
    let extensions = prop::collection::vec(prop_oneof![Just(0_u8), Just(43), Just(51), Just(60)], 0..8);
    let damage =
        prop_oneof![4 => Just(Vec::new()), 1 => prop::collection::vec((0..90_u16, any::<u8>()), 1..4)];
    let arrives = prop_oneof![4 => Just(100_u8), 1 => 0..100_u8];
    let number = prop_oneof![
        4 => Just(frame::TCP), 2 => Just(frame::UDP), 2 => Just(frame::ICMP), 2 => Just(frame::ICMPV6), 1 => any::<u8>(),
    ];
    let head = (any::<bool>(), 0..12_u8, number, (port, prop_oneof![4 => Just(PORT), 1 => any::<u16>()]));
    let error = prop::option::weighted(0.2, prop_oneof![Just(3_u8), Just(11), Just(1), Just(2)]);
    let rest = (any::<u8>(), place, options, extensions, error);
    (head, rest, prop::collection::vec(any::<u8>(), 0..40), damage, arrives).prop_map(
        |(
            (v6, source, protocol, ports),
            (flags, place, options, extensions, error),
            payload,
            damage,
            arrives,
        )| Made {
            v6,
            source,
            protocol,
            ports,
            flags,
            place,
            options,
            extensions,
            error,
            payload,
            damage,
            arrives,
        },
    )
}

fn body(made: &Made, family: Family, from: IpAddr, to: IpAddr, ports: (u16, u16)) -> Ip {
    let v4 = family.client.is_ipv4();
    let plain = match made.protocol {
        frame::TCP => frame::tcp((from, ports.0), (to, ports.1), made.flags, &made.payload),
        frame::UDP => frame::udp((from, ports.0), (to, ports.1), &made.payload),
        frame::ICMP | frame::ICMPV6 => {
            let [high, low] = made.ports.0.to_be_bytes();
            let kind = match made.flags {
                0..100 => {
                    if v4 {
                        8
                    } else {
                        128
                    }
                }
                kind => kind,
            };
            icmp(from, to, kind, [high, low, 0, 1], &made.payload)
        }
        number => Ip::new(from, to, number, made.payload.clone()),
    };
    let options = if v4 { made.options.clone() } else { Vec::new() };
    let extensions = if v4 { Vec::new() } else { made.extensions.clone() };
    Ip { place: made.place, options, extensions, ..plain }
}

/// The bytes that come in.
pub(crate) fn bytes(made: &Made, family: Family, mac: [u8; 6]) -> Vec<u8> {
    let of_link: IpAddr = if made.v6 { [0xfe80, 0, 0, 0, 0, 0, 0, 9].into() } else { [127, 0, 0, 1].into() };
    let source = match made.source {
        0 => family.stranger,
        1 => of_link,
        _ => family.client,
    };
    let packet = match made.error {
        None => body(made, family, source, family.service, made.ports),
        Some(kind) => {
            let ports = (made.ports.1, made.ports.0);
            let inner = body(made, family, family.service, family.client, ports).bytes();
            icmp(family.stranger, family.service, kind, [0; 4], &inner)
        }
    };
    let mut frame = packet.frame(mac);
    for (at, change) in &made.damage {
        if let Some(byte) = frame.get_mut(ETHERNET + usize::from(*at)) {
            *byte ^= change;
        }
    }
    frame.truncate(ETHERNET + 1 + (frame.len() - ETHERNET - 1) * usize::from(made.arrives) / 100);
    frame
}

/// Makes the flows of slot A known, or fresh.
pub(crate) fn learn(bench: &mut Bench) -> anyhow::Result<()> {
    for family in families() {
        for (port, protocol) in [(PORT, frame::UDP), (0, echo(family.client.is_ipv4()))] {
            bench.remember(key((family.client, LEARNED), port, protocol), family.service, Slot::A, 0)?;
        }
    }
    Ok(())
}

#[test]
fn the_programs_do_what_the_model_says() {
    let mut bench = Bench::new("model").unwrap();
    let families = families();
    let mut held = Vec::new();
    let mut known = Vec::new();
    for family in families {
        for (ns, port) in [(&bench.lab.a, OF_A), (&bench.lab.b, OF_B)] {
            let listening = listener(ns, family).unwrap();
            held.push((connection(ns, &listening, family, port).unwrap(), listening));
        }
        known.push(Known::of(family));
    }
    let mut runner = runner().unwrap();
    let strategy = made();
    let mut seen_verdicts = BTreeMap::<&str, u32>::new();
    for number in 0..PACKETS {
        if number % 100 == 0 {
            // A slow machine needs longer for all packets than a flow or a fragment is remembered.
            learn(&mut bench).unwrap();
            bench.renew_fragments().unwrap();
        }
        let made = strategy.new_tree(&mut runner).unwrap().current();
        let word = match number % 4 {
            0 => Word::steady(Slot::A, 1),
            1 => Word::steady(Slot::A, 1).shared(50),
            _ => DRAINING,
        };
        bench.word(word).unwrap();
        bench.short_way(number % 3 != 0).unwrap();
        let family = families[usize::from(made.v6)];
        let frame = bytes(&made, family, bench.uplink.mac);
        let header = if made.v6 { 40 } else { 20 };
        let expected = expect(word, &frame, made.v6, &mut known[usize::from(made.v6)]);
        let seen = match bench.run(Hook::Uplink, bench.uplink, 0, &frame) {
            // From 6.18 on the kernel does not take packets without a whole network header for a test.
            Err(_) if frame.len() < ETHERNET + header => continue,
            other => other.unwrap(),
        };
        assert_eq!(
            (seen.action, &seen.counted, &seen.compared),
            (expected.0, &expected.1, &expected.2),
            "{number}: {made:?}\n{frame:02x?}"
        );
        assert_eq!(seen.frame, frame, "{number}: the packet was changed");
        for name in expected.1.first().into_iter().chain(&expected.2) {
            *seen_verdicts.entry(name).or_default() += 1;
        }
    }
    // The packets are worth something only if they come to all exits.
    for verdict in
        ["to_a", "to_b", "kept_by_retiring", "malformed", "for_host", "martian", "source_route", "to_both"]
    {
        assert!(seen_verdicts.get(verdict).is_some_and(|n| *n >= 5), "{verdict}: {seen_verdicts:?}");
    }
    println!("{seen_verdicts:?}");
    bench.finish().unwrap();
}

/// A reply as a partition sends it from its own address, and where in its payload a sum is that is about the addresses.
fn reply(
    family: Family,
    (kind, flags): (u8, u8),
    ports: (u16, u16),
    payload: &[u8],
) -> (Ip, Option<usize>, u8) {
    let v4 = family.client.is_ipv4();
    let (own, client) = ((family.own_a, ports.0), (family.client, ports.1));
    let [high, low] = ports.1.to_be_bytes();
    let icmp = |kind, rest, payload: &[u8]| icmp(family.own_a, family.client, kind, rest, payload);
    match kind {
        0 => (frame::udp(own, client, payload), Some(6), frame::UDP),
        1 => (frame::tcp(own, client, flags, payload), Some(16), frame::TCP),
        2 => (frame::sctp(own, client, payload), None, frame::SCTP),
        3 => (icmp(if v4 { 0 } else { 129 }, [high, low, 0, 1], payload), Some(2), echo(v4)),
        _ => {
            let asked = frame::udp(client, (family.service, ports.0), payload).bytes();
            (icmp(if v4 { 3 } else { 1 }, [0, 0, 0, flags], &asked), Some(2), frame::UDP)
        }
    }
}

/// The frame with another source, and all sums made anew from its bytes.
fn with_source(bytes: &[u8], packet: &Ip, from: IpAddr, sum_at: Option<usize>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let payload_at = bytes.len() - packet.payload.len();
    let mut now = Ip { from, payload: bytes[payload_at..].to_vec(), ..packet.clone() };
    if let Some(at) = sum_at {
        frame::seal(&mut now, at);
    }
    bytes[payload_at..].copy_from_slice(&now.payload);
    match from {
        IpAddr::V6(from) => bytes[ETHERNET + 8..ETHERNET + 24].copy_from_slice(&from.octets()),
        IpAddr::V4(from) => {
            bytes[ETHERNET + 12..ETHERNET + 16].copy_from_slice(&from.octets());
            bytes[ETHERNET + 10..ETHERNET + 12].fill(0);
            let sum = frame::finish(frame::sum(&bytes[ETHERNET..payload_at])).to_be_bytes();
            bytes[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum);
        }
    }
    bytes
}

/// Whatever a reply is, nothing of it changes but its source and what sums that up.
#[test]
fn a_rewrite_and_its_inverse_change_nothing() {
    let mut bench = Bench::new("inverse").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    let mac = bench.links[0].mac;
    let options = prop_oneof![2 => Just(0_usize), 1 => 1..10_usize];
    let strategy = (
        any::<bool>(),
        (0..5_u8, any::<u8>()),
        (1..=u16::MAX, 1..=u16::MAX),
        options,
        prop::collection::vec(any::<u8>(), 0..300),
    );
    let mut runner = runner().unwrap();
    for number in 0..REPLIES {
        let (v6, kind, ports, options, payload) = strategy.new_tree(&mut runner).unwrap().current();
        let family = families()[usize::from(v6)];
        let (mut packet, sum_at, protocol) = reply(family, kind, ports, &payload);
        if v6 {
            packet.extensions = vec![60; options.min(3)];
        } else {
            packet.options = vec![1; options * 4];
        }
        // An echo has no port but its identifier.
        let port = if kind.0 == 3 { 0 } else { ports.0 };
        bench.remember(key((family.client, ports.1), port, protocol), family.service, Slot::A, 0).unwrap();
        let frame = packet.frame(mac);
        let seen = bench.run(Hook::FromPartition, bench.links[0], 0, &frame).unwrap();
        let rewritten = if v6 { "rewritten_v6" } else { "rewritten_v4" };
        assert!(seen.counted.contains(&rewritten), "{number}: {packet:?} {seen:?}");
        let forth = with_source(&frame, &packet, family.service, sum_at);
        assert_eq!(seen.frame, forth, "{number}: {packet:?}");
        let back = with_source(&seen.frame, &packet, family.own_a, sum_at);
        assert_eq!(back, frame, "{number}: {packet:?}");
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}
