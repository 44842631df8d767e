//! Programs that are loaded and not told anything yet: they stop nothing (packet case I-17).

use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;

use crate::bench::{Bench, Family, Link, NEXT, PORT, families};
use crate::frame::{self, Ip, Place, ethernet, icmp, sctp, tcp, udp};
use crate::model::{bytes, made};
use crate::steer::{ACK, SYN};

/// `XDP_PASS`.
const XDP_PASS: i32 = 2;
/// How many generated packets; always the same ones.
const PACKETS: usize = 1500;

/// Sends a frame that came on a link through all programs. Each must leave it to who comes next.
fn all_leave(bench: &mut Bench, on: Link, frame: &[u8], verdicts: &[&str], what: &str) {
    let xdp = bench.run_xdp(on, frame).unwrap();
    assert_eq!((xdp.action, xdp.frame.as_slice()), (XDP_PASS, frame), "XDP: {what}");
    for hook in [Hook::Uplink, Hook::ToPartition, Hook::FromPartition] {
        let seen = bench.run_filter(hook, on, 0, frame).unwrap();
        assert_eq!((seen.action, seen.mark), (NEXT, 0), "{hook:?}: {what}");
        assert_eq!(seen.frame, frame, "{hook:?}: {what}");
        assert!(matches!(seen.counted[..], [one] if verdicts.contains(&one)), "{hook:?}: {what} {seen:?}");
    }
}

/// A packet of each kind between two ends, also such as nobody may send.
fn kinds(family: Family, from: std::net::IpAddr, to: std::net::IpAddr) -> Vec<Ip> {
    let v4 = family.client.is_ipv4();
    let (one, other) = ((from, 1000), (to, PORT));
    let datagram = udp(one, other, &[7; 64]);
    let part = |offset| Ip { place: Some(Place { offset, more: offset == 0, id: 7 }), ..datagram.clone() };
    let (ask, error, control) = if v4 { (8, 3, 5) } else { (128, 1, 137) };
    let quoted = udp(other, one, b"x").bytes();
    vec![
        tcp(one, other, SYN, b""),
        tcp(one, other, ACK, b"data"),
        datagram.clone(),
        sctp(one, other, b"chunk"),
        icmp(from, to, ask, [0, 7, 0, 1], b"ping"),
        icmp(from, to, error, [0; 4], &quoted),
        icmp(from, to, control, [0; 4], &quoted),
        part(0),
        part(2),
        Ip::new(from, to, 47, vec![0; 16]),
    ]
}

fn ends(family: Family) -> [(std::net::IpAddr, std::net::IpAddr); 5] {
    let Family { client, service, own_a, host, stranger, .. } = family;
    [(client, service), (stranger, service), (service, client), (own_a, client), (service, host)]
}

#[test]
fn programs_that_know_nothing_yet_stop_nothing() {
    let mut bench = Bench::unfurnished("untold").unwrap();
    let links = [bench.uplink, bench.links[0], bench.links[1]];
    let left = &["not_ours"][..];
    for on in links {
        for family in families() {
            for (from, to) in ends(family) {
                for packet in kinds(family, from, to) {
                    all_leave(&mut bench, on, &packet.frame(on.mac), left, &format!("{packet:?}"));
                }
            }
        }
        for (what, kind) in [("ARP", 0x0806), ("LLDP", 0x88cc), ("a tag", 0x8100), ("another tag", 0x88a8)] {
            all_leave(&mut bench, on, &ethernet(on.mac, kind, &[0; 46]), left, what);
        }
    }
    // And whatever else there is, whole and damaged.
    let (mut runner, strategy) = (TestRunner::deterministic(), made());
    let left = &["not_ours", "malformed"][..];
    for number in 0..PACKETS {
        let made = strategy.new_tree(&mut runner).unwrap().current();
        let (on, family) = (links[number % 3], families()[usize::from(made.v6)]);
        let frame = bytes(&made, family, on.mac);
        // The kernel takes no packet without a whole network header for a test.
        if frame.len() >= frame::ETHERNET + if made.v6 { 40 } else { 20 } {
            all_leave(&mut bench, on, &frame, left, &format!("{number}: {made:?}"));
        }
    }
    bench.finish().unwrap();
}

/// Told of everything but where the partitions are.
#[test]
fn a_service_without_partitions_is_left_to_the_host() {
    let mut bench = Bench::new("nobody").unwrap();
    bench.empty(Slot::A).unwrap();
    bench.empty(Slot::B).unwrap();
    let (uplink, links) = (bench.uplink, bench.links);
    for family in families() {
        for (from, to) in ends(family) {
            let ordinary = kinds(family, from, to).into_iter().enumerate().filter(|(kind, _)| *kind < 6);
            for (_, packet) in ordinary {
                let verdict = if to == family.service { "unsteered" } else { "not_ours" };
                let what = format!("{packet:?}");
                all_leave(&mut bench, uplink, &packet.frame(uplink.mac), &[verdict, "not_ours"], &what);
                for on in links {
                    all_leave(&mut bench, on, &packet.frame(on.mac), &[verdict, "not_ours"], &what);
                }
            }
        }
    }
    bench.finish().unwrap();
}
