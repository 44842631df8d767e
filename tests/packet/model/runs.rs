//! The packets of partitions and of the host, through the programs and the models.

use std::net::{IpAddr, SocketAddr};

use patchswitch::dataplane::probe_mark;
use patchswitch_common::Slot;
use patchswitch_common::verdict::{AGAIN_MARK, Hook};
use patchswitch_common::word::Word;
use proptest::strategy::{Strategy as _, ValueTree as _};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with};

use super::known::{self, echo};
use super::outward::Partitions;
use super::sent::{ENDS, HOST, Link, OWN, PROBES, STATELESS, Sent, sent};
use super::{Expected, LEARNED, Tally, inward, is_too_short};
use crate::bench::{Bench, Family, PORT, families, key, service};
use crate::frame;
use crate::seed::runner;

/// How many packets of each program; always the same ones.
const MANY: usize = 20_000;
/// After so many packets another side serves, other flows are known, and all of it is fresh again.
const BLOCK: usize = 50;

fn word(phase: usize, active: Slot) -> Word {
    let steady = Word::steady(active, 1);
    let draining = Word::steady(active.other(), 1).taken_over_by(active);
    match phase {
        0 => steady,
        1 => steady.with_learning(true),
        2 => steady.with_notice(true),
        3 => steady.shared(50),
        4 => draining,
        5 => draining.with_notice(true).with_learning(true),
        6 => Word::steady(active.other(), 1).with_notice(true).moved_to(active),
        _ => draining.with_notice(true),
    }
}

fn mark(number: u8) -> u32 {
    match number {
        0..10 => AGAIN_MARK,
        10..15 => probe_mark(Slot::A),
        15..20 => probe_mark(Slot::B),
        20..30 => 0x77,
        _ => 0,
    }
}

/// The slot on whose link a packet is met, if it is anybody's.
fn on(number: u8) -> Option<Slot> {
    (number != 0).then(|| Slot::from_bit(number & 1))
}

const fn active(number: usize) -> Slot {
    Slot::from_bit((number / BLOCK) as u8 & 1)
}

/// Sources and destinations of what a partition sends, as often as they matter.
fn ends(family: Family, slot: Slot) -> [[IpAddr; ENDS]; 2] {
    let Family { client, service, host, stranger, .. } = family;
    let (own, other) = match slot {
        Slot::A => (family.own_a, family.own_b),
        Slot::B => (family.own_b, family.own_a),
    };
    let texts = if client.is_ipv4() {
        ["127.0.0.1", "0.0.0.0", "169.254.7.7", "169.254.169.254", "224.0.0.22", "10.77.0.99", "10.77.0.255"]
    } else {
        ["::1", "::", "fe80::7", "fd00:ec2::254", "ff02::16", "fd77::99", "fe80::9"]
    };
    let [loopback, zero, of_link, metadata, group, another, beside] =
        texts.map(|text| text.parse().unwrap_or(host));
    let mut ends = [[service; ENDS], [client; ENDS]];
    ends[0][..7].copy_from_slice(&[other, host, stranger, client, zero, of_link, loopback]);
    ends[0][OWN..OWN + 8].fill(own);
    ends[1][..8].copy_from_slice(&[loopback, metadata, group, another, own, service, other, stranger]);
    ends[1][HOST..HOST + 5].copy_from_slice(&[host, host, host, another, beside]);
    ends
}

/// The flows that are known in a block, of both families: three, for a fourth there is room.
fn flows(block: usize, active: Slot) -> Vec<(Family, u16, u8, Slot)> {
    let protocols = |family: Family| {
        let echo = (family, 0, echo(family.client.is_ipv4()));
        let others = [frame::UDP, frame::SCTP, frame::DCCP, frame::UDP_LITE];
        others.map(|protocol| (family, PORT, protocol)).into_iter().chain([echo])
    };
    let all: Vec<_> = families().into_iter().flat_map(protocols).collect();
    let known = [(0, active.other()), (5, active.other()), (8, active)];
    known
        .iter()
        .map(|(step, slot)| {
            let (family, port, protocol) = all[(block + step) % all.len()];
            (family, port, protocol, *slot)
        })
        .collect()
}

/// Makes these flows the known ones.
fn know(bench: &mut Bench, flows: &[(Family, u16, u8, Slot)]) -> anyhow::Result<()> {
    bench.forget()?;
    for (family, port, protocol, slot) in flows {
        bench.remember(key((family.client, LEARNED), *port, *protocol), family.service, *slot, 0)?;
    }
    bench.renew_fragments()
}

/// A probe of a partition that is never answered: the link address that it is sent to is nobody's.
fn probe(bench: &Bench, family: Family, slot: Slot) -> anyhow::Result<socket2::Socket> {
    let (host, link) = (&bench.lab.host, ["lca", "lcb"][slot as usize]);
    let to = family.service;
    let (kind, width) = if to.is_ipv4() { (AddressFamily::INET, 32) } else { (AddressFamily::INET6, 128) };
    host.sysctl("net/ipv4/tcp_syn_retries", "100")?;
    host.ip(&format!("neigh replace {to} lladdr 02:00:00:00:00:77 dev {link} nud permanent"))?;
    if slot == Slot::B {
        // The host's own route leads to the first partition.
        host.ip(&format!("route add {to}/{width} dev {link} metric 9999"))?;
    }
    host.enter(|| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket2::Socket::from(socket_with(kind, SocketType::STREAM, flags, Some(ipproto::TCP))?);
        socket.bind_device(Some(link.as_bytes()))?;
        bind(&socket, &SocketAddr::new(family.host, PROBES[slot as usize]))?;
        let done = connect(&socket, &service(family));
        anyhow::ensure!(done == Err(rustix::io::Errno::INPROGRESS), "{done:?}");
        Ok(socket)
    })
}

/// Sends a packet through a program. Nothing if the kernel does not take it for a test.
fn run(bench: &mut Bench, hook: Hook, sent: &Sent, frame: &[u8]) -> anyhow::Result<Option<Expected>> {
    let link = on(sent.on).map_or(bench.uplink, |slot| bench.links[slot as usize]);
    match bench.run(hook, link, mark(sent.mark), frame) {
        Err(_) if matches!(sent.link, Link::Ip | Link::Forged) && is_too_short(frame, sent.made.v6) => {
            Ok(None)
        }
        other => Ok(Some(other?.into())),
    }
}

#[test]
fn what_partitions_send_goes_as_the_model_says() {
    let mut bench = Bench::new("outmodel").unwrap();
    let (_held, _) = known::connect(&bench).unwrap();
    let mut probes = Vec::new();
    for (family, slot) in families().into_iter().flat_map(|family| [(family, Slot::A), (family, Slot::B)]) {
        probes.push(probe(&bench, family, slot).unwrap());
    }
    bench
        .declare(|mut settings| {
            settings.stateless[3] = STATELESS.to_be();
            settings
        })
        .unwrap();
    let (mut model, mut tally) = (Partitions::new(), Tally::default());
    let (strategy, mut runner) = (sent(), runner().unwrap());
    for number in 0..MANY {
        let active = active(number);
        if number % BLOCK == 0 {
            let flows = flows(number / BLOCK, active);
            know(&mut bench, &flows).unwrap();
            model.know(&flows);
        }
        let sent = strategy.new_tree(&mut runner).unwrap().current();
        let family = families()[usize::from(sent.made.v6)];
        let ends = ends(family, on(sent.on).unwrap_or(Slot::A));
        let (client, server) = sent.made.ports;
        let frame = sent.frame(family, &ends, (server, client), (family.client, family.service));
        let word = word(sent.phase, active);
        bench.word(word).unwrap();
        model.short = number % 3 != 0;
        bench.short_way(model.short).unwrap();
        let expected = model.expect(word, on(sent.on), mark(sent.mark), &frame);
        let Some(seen) = run(&mut bench, Hook::FromPartition, &sent, &frame).unwrap() else { continue };
        assert_eq!(seen, expected, "{number}: {word:?} {sent:?}");
        tally.add(&expected);
    }
    println!("{tally:?}");
    tally.check(&OUTWARD).unwrap();
    bench.finish().unwrap();
}

/// All exits and events of what a partition sends, but for a rewrite that the kernel refuses.
const OUTWARD: [&str; 22] = [
    "not_ours",
    "malformed",
    "probe",
    "out",
    "out_by_stack",
    "quarantined",
    "spoofed",
    "again",
    "spoofed_mac",
    "forged_control",
    "lateral",
    "tuple_in_use",
    "host_control",
    "learned",
    "learn_full",
    "rewritten_v4",
    "rewritten_v6",
    "fragment_id_shared",
    "answered_a",
    "answered_b",
    "reset_a",
    "reset_b",
];

#[test]
fn what_the_host_sends_goes_as_the_model_says() {
    let mut bench = Bench::new("inmodel").unwrap();
    let (_held, mut known) = known::connect(&bench).unwrap();
    let mut tally = Tally::default();
    let (strategy, mut runner) = (sent(), runner().unwrap());
    for number in 0..MANY {
        if number % BLOCK == 0 {
            known::learn(&mut bench).unwrap();
            bench.renew_fragments().unwrap();
        }
        let sent = strategy.new_tree(&mut runner).unwrap().current();
        let family = families()[usize::from(sent.made.v6)];
        let asked = (family.service, family.client);
        let frame = sent.frame(family, &inward::ends(family), sent.made.ports, asked);
        let word = word(sent.phase, active(number));
        bench.word(word).unwrap();
        bench.short_way(number % 3 != 0).unwrap();
        let expected = inward::expect(word, on(sent.on), mark(sent.mark), &frame, &mut known);
        let Some(seen) = run(&mut bench, Hook::ToPartition, &sent, &frame).unwrap() else { continue };
        assert_eq!(seen, expected, "{number}: {word:?} {sent:?}");
        tally.add(&expected);
    }
    println!("{tally:?}");
    tally.check(&INWARD).unwrap();
    bench.finish().unwrap();
}

/// All exits and events of what goes to a partition, but for an empty slot and flows that move.
const INWARD: [&str; 19] = [
    "not_ours",
    "malformed",
    "for_host",
    "to_a",
    "to_b",
    "to_both",
    "probe",
    "quarantined",
    "again",
    "martian",
    "source_route",
    "redirect",
    "nested_error",
    "split_discovery",
    "fragment_unknown",
    "kept_by_retiring",
    "nothing_in_retiring",
    "asked_a",
    "asked_b",
];
