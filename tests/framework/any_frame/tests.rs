//! What the fuzz targets ask of any bytes, asked of frames that are generated around what matters: a target that fails on
//! what it should pass is found without libFuzzer.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;

use patchswitch_common::verdict::Verdict;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::frame::{self, ETHERNET, Ip, Place, ethernet, icmp, tcp, udp};

const FRAMES: u32 = 100_000;

/// Whoever may be a source or a destination, and whoever may not.
const V4: [&str; 8] = [
    "192.0.2.1",
    "192.0.2.80",
    "10.0.0.2",
    "127.0.0.1",
    "0.0.0.0",
    "224.0.0.22",
    "169.254.169.254",
    "255.255.255.255",
];
const V6: [&str; 9] = [
    "2001:db8::1",
    "2001:db8::80",
    "fd00::2",
    "::1",
    "::",
    "ff02::16",
    "fe80::1",
    "::ffff:192.0.2.1",
    "::ffff:10.0.0.2",
];

fn ends() -> impl Strategy<Value = (IpAddr, IpAddr)> {
    let of = |all: &'static [&'static str]| {
        let one = select(all).prop_map(|text| text.parse::<IpAddr>().unwrap());
        (one.clone(), one)
    };
    prop_oneof![of(&V4), of(&V6)]
}

/// A packet without options. Of most bytes of its payload anything will do; its first ones say what it is.
fn plain() -> impl Strategy<Value = Ip> {
    let port = select(&[0_u16, 53, 67, 68, 80, 123, 546, 547, 40_000][..]);
    let kind = prop_oneof![0..20_u8, 127..144_u8, any::<u8>()];
    let number = prop_oneof![
        4 => Just(frame::TCP), 2 => Just(frame::UDP), 2 => Just(frame::ICMP), 3 => Just(frame::ICMPV6),
        1 => Just(frame::IGMP), 1 => any::<u8>(),
    ];
    let rest = prop::collection::vec(any::<u8>(), 0..40);
    (ends(), number, (port.clone(), port), kind, any::<u8>(), rest).prop_map(
        |((from, to), number, ports, kind, flags, rest)| match number {
            frame::TCP => tcp((from, ports.0), (to, ports.1), flags, &rest),
            frame::UDP => udp((from, ports.0), (to, ports.1), &rest),
            frame::ICMP | frame::ICMPV6 if from.is_ipv4() == (number == frame::ICMP) => {
                icmp(from, to, kind, [0, flags, 0, 1], &rest)
            }
            number => Ip::new(from, to, number, [&[kind][..], &rest].concat()),
        },
    )
}

/// A packet as it may be sent: with options or extension headers, in pieces, or an error about one.
fn packet() -> impl Strategy<Value = Ip> {
    let place = prop::option::weighted(
        0.3,
        (select(&[0_u16, 0, 1, 185][..]), any::<bool>(), 0..3_u32).prop_map(|(offset, more, id)| Place {
            offset,
            more,
            id,
        }),
    );
    let option = select(&[0_u8, 1, 1, 3, 4, 7, 131, 137, 148][..]);
    let options = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(option, 4..=4)];
    let header = select(&[0_u8, 43, 51, 60][..]);
    let extensions = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(header, 1..8)];
    let error = prop::option::weighted(0.3, select(&[1_u8, 2, 3, 4, 11, 12][..]));
    (plain(), place, options, extensions, error).prop_map(|(plain, place, options, extensions, error)| {
        let v4 = plain.from.is_ipv4();
        let whole = Ip {
            place,
            options: if v4 { options } else { Vec::new() },
            extensions: if v4 { Vec::new() } else { extensions },
            ..plain
        };
        match error {
            Some(kind) => icmp(whole.to, whole.from, kind, [0, 0, 5, 0], &whole.bytes()),
            None => whole,
        }
    })
}

/// The frame of a packet, damaged, cut or padded; of ARP, or of anything.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let damage =
        prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec((0..90_usize, any::<u8>()), 1..4)];
    let length = prop_oneof![4 => Just(None), 1 => (0..200_usize).prop_map(Some)];
    // The link addresses are word and answers of a kernel.
    let links = prop::array::uniform12(any::<u8>());
    let of_ip = (packet(), links, damage, length).prop_map(|(packet, links, damage, length)| {
        let mut frame = packet.frame([0; 6]);
        frame[..12].copy_from_slice(&links);
        for (at, change) in damage {
            if let Some(byte) = frame.get_mut(ETHERNET + at) {
                *byte ^= change;
            }
        }
        frame.resize(length.unwrap_or(frame.len()), 0x88);
        frame
    });
    let of_arp = prop::collection::vec(0..2_u8, 0..40).prop_map(|bytes| ethernet([0; 6], 0x0806, &bytes));
    prop_oneof![8 => of_ip, 1 => of_arp, 1 => prop::collection::vec(any::<u8>(), 0..120)]
}

#[test]
fn what_the_fuzzers_ask_holds_of_frames_that_are_generated() {
    let config = Config { cases: FRAMES, failure_persistence: None, ..Config::default() };
    let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let seen = Mutex::new(BTreeMap::<String, u32>::new());
    let count = |what: String| *seen.lock().unwrap().entry(what).or_default() += 1;
    let holds = TestRunner::new_with_rng(config, random).run(&any_frame(), |frame| {
        super::parse::check(&frame);
        let [of_client, of_partition] = super::refuse::check(&frame);
        of_client.into_iter().for_each(|verdict| count(format!("in {verdict:?}")));
        of_partition.into_iter().for_each(|verdict| count(format!("out {verdict:?}")));
        if let Some((phase, owner)) = super::decide::check(&frame) {
            count(format!("{phase:?} {:?} {}", owner.slot, owner.both));
        }
        Ok(())
    });
    holds.unwrap();
    let seen = seen.into_inner().unwrap();
    println!("{seen:?}");
    // The frames are worth something only if all that can be said is said of some.
    let refusals = [
        ("in", &["Martian", "ForHost", "SourceRoute", "Redirect", "NestedError", "SplitDiscovery"][..]),
        ("out", &["Martian", "ForgedControl", "HostControl"]),
    ];
    let owners =
        ["Steady", "Sharing", "Draining"].map(|phase| ["A", "B"].map(|slot| format!("{phase} {slot} false")));
    let both = ["Sharing", "Draining"].map(|phase| ["A", "B"].map(|slot| format!("{phase} {slot} true")));
    let refusals =
        refusals.into_iter().flat_map(|(way, all)| all.iter().map(move |one| format!("{way} {one}")));
    for wanted in refusals.chain(owners.into_iter().flatten()).chain(both.into_iter().flatten()) {
        assert!(seen.get(&wanted).is_some_and(|count| *count >= 10), "{wanted}: {seen:?}");
    }
}

/// The address of a host of IPv4 in a packet of IPv6: no partition may send it, and nobody to it.
#[test]
fn what_the_fuzzers_ask_holds_of_addresses_of_ipv4_in_ipv6() {
    let [fine, mapped]: [IpAddr; 2] = ["2001:db8::1", "::ffff:192.0.2.1"].map(|text| text.parse().unwrap());
    for (from, to) in [(mapped, fine), (fine, mapped), (mapped, mapped)] {
        let datagram = udp((from, 547), (to, 546), b"lease");
        let [_, of_partition] = super::refuse::check(&datagram.frame([0; 6]));
        assert_eq!(of_partition, Some(Verdict::Martian), "{from} to {to}");
    }
}
