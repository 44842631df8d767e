//! As many flows as a busy server of names has, and more than are remembered (packet case E-15).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use patchswitch_common::Slot;
use patchswitch_common::maps::Settings;
use patchswitch_common::verdict::Hook;

use crate::bench::{Bench, PORT, REDIRECT, families, key};
use crate::frame::{self, udp};
use crate::steer::{DRAINING, STEADY};

/// How many flows there are, of both families.
const FLOWS: u32 = 1_000_000;
/// How many of them are remembered.
const ROOM: u32 = 200_000;
/// How many were there before the burst.
const ASSURED: u32 = 2000;
/// How many are answered before the store of the word.
const BEFORE: u32 = 600_000;
/// Longer than the test can take.
const IDLE_NS: u64 = 86_400_000_000_000;
/// Ports that a client uses before the next one begins.
const PORTS: u32 = 60_000;

/// The client's end of a flow: every other one is of IPv6.
fn client(number: u32) -> (IpAddr, u16) {
    let (v6, number) = (number % 2 == 1, number / 2);
    let (host, port) = ((100 + number / PORTS) as u8, (1024 + number % PORTS) as u16);
    if v6 {
        (Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(host)).into(), port)
    } else {
        (Ipv4Addr::new(10, 77, 0, host).into(), port)
    }
}

/// The service's answer to a client, or the client's question.
fn datagram(number: u32, is_answer: bool, mac: [u8; 6]) -> Vec<u8> {
    let (client, service) = (client(number), (families()[(number % 2) as usize].service, PORT));
    let (from, to) = if is_answer { (service, client) } else { (client, service) };
    udp(from, to, b"name").frame(mac)
}

/// What counters say after many packets of a partition.
fn answered(bench: &mut Bench, slot: Slot, flows: std::ops::Range<u32>) -> anyhow::Result<[u64; 3]> {
    let link = bench.links[slot as usize];
    let answers = flows.map(|number| datagram(number, true, link.mac));
    let actions = bench.burst(Hook::FromPartition, link, answers)?;
    let counters = bench.counters()?;
    Ok([actions[&REDIRECT], counters["learned"], counters["learn_full"]])
}

/// How many of the clients of some flows, asking, come to the first partition, and how many to the second.
fn asked(bench: &mut Bench, flows: std::ops::Range<u32>) -> anyhow::Result<[u64; 2]> {
    let (before, uplink) = (bench.counters()?, bench.uplink);
    bench.burst(Hook::Uplink, uplink, flows.map(|number| datagram(number, false, uplink.mac)))?;
    let after = bench.counters()?;
    Ok(["to_a", "to_b"].map(|verdict| after[verdict] - before[verdict]))
}

#[test]
fn a_million_flows_crowd_out_none_that_is_remembered() {
    let mut bench = Bench::with_room("million", ROOM).unwrap();
    bench.declare(|settings| Settings { learned_idle_ns: IDLE_NS, ..settings }).unwrap();
    bench.word(STEADY.with_learning(true)).unwrap();
    let (all, room, before) = (u64::from(FLOWS), u64::from(ROOM), u64::from(BEFORE));
    let seen = answered(&mut bench, Slot::A, 0..ASSURED).unwrap();
    assert_eq!(seen, [u64::from(ASSURED), u64::from(ASSURED), 0]);
    // Every answer goes out, whether its flow is remembered or not, and each that is not is counted.
    let seen = answered(&mut bench, Slot::A, ASSURED..BEFORE).unwrap();
    assert_eq!(seen, [before - u64::from(ASSURED), room, before - room]);
    // The other one serves. What its clients are answered is learned for the way back, for which there is no room.
    bench.word(DRAINING.with_learning(true)).unwrap();
    let seen = answered(&mut bench, Slot::B, BEFORE..FLOWS).unwrap();
    assert_eq!(seen, [all - before, room, all - room]);
    // Who was remembered before is, and stays; who was not is a new client.
    for number in (0..ASSURED).chain((ASSURED..ROOM).step_by(101)) {
        let record = bench.remembered(key(client(number), PORT, frame::UDP)).unwrap();
        assert_eq!(record.map(|record| record.slot), Some(0), "flow {number}");
    }
    assert_eq!(asked(&mut bench, 0..ASSURED).unwrap(), [u64::from(ASSURED), 0]);
    assert_eq!(asked(&mut bench, ROOM - 1000..ROOM + 1000).unwrap(), [1000, 1000]);
    assert_eq!(asked(&mut bench, FLOWS - 1000..FLOWS).unwrap(), [0, 1000]);
    // A flow that is remembered is renewed in a full table as well.
    bench.word(STEADY.with_learning(true)).unwrap();
    let seen = answered(&mut bench, Slot::A, 0..ASSURED).unwrap();
    assert_eq!(seen, [u64::from(ASSURED), room + u64::from(ASSURED), all - room]);
    bench.finish().unwrap();
}
