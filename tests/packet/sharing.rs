//! While a canary gets its share: both sides are asked, and what each does is counted.

use std::collections::BTreeSet;

use patchswitch_common::Slot;
use patchswitch_common::decide::{ACK, RST, SYN, by_share};
use patchswitch_common::maps::mapped;
use patchswitch_common::parse::Flow;
use patchswitch_common::word::Word;

use crate::bench::{Bench, Family, PORT, REDIRECT, Seen, families, key};
use crate::frame;
use crate::steer::{connection, listener};

const FLOWS: u16 = 200;

fn sharing(share: u8) -> Word {
    Word::steady(Slot::A, 1).shared(share)
}

fn flow(family: Family, port: u16, protocol: u8) -> Flow {
    let wire = patchswitch::dataplane::to_wire;
    assert!(!family.client.is_ipv4() || wire(family.client).starts_with(&mapped([0; 4])[..12]));
    Flow {
        remote: wire(family.client),
        local: wire(family.service),
        remote_port: port.to_be(),
        local_port: PORT.to_be(),
        protocol,
    }
}

fn tcp(bench: &mut Bench, family: Family, port: u16, flags: u8) -> Seen {
    let segment = frame::tcp((family.client, port), (family.service, PORT), flags, &[]);
    let seen = bench.client(&segment).unwrap();
    assert_eq!(seen.action, REDIRECT);
    seen
}

fn went(seen: &Seen) -> Slot {
    match seen.counted[..] {
        ["to_a"] => Slot::A,
        ["to_b"] => Slot::B,
        _ => panic!("{seen:?}"),
    }
}

#[test]
fn new_flows_go_by_the_share_and_every_retry_the_same_way() {
    let mut bench = Bench::new("share").unwrap();
    for family in families() {
        let mut before = BTreeSet::new();
        for share in [1, 30, 70] {
            bench.word(sharing(share)).unwrap();
            let mut now = BTreeSet::new();
            for port in 2000..2000 + FLOWS {
                let wanted = by_share(sharing(share), &flow(family, port, frame::TCP));
                for flags in [SYN, SYN, ACK] {
                    let seen = tcp(&mut bench, family, port, flags);
                    assert_eq!(went(&seen), wanted, "{port} {flags}");
                    let asked = match (flags, wanted) {
                        (SYN, Slot::A) => vec!["asked_a"],
                        (SYN, Slot::B) => vec!["asked_b"],
                        _ => Vec::new(),
                    };
                    assert_eq!(seen.compared, asked);
                }
                let datagram = frame::udp((family.client, port), (family.service, PORT), b"?");
                let seen = bench.client(&datagram).unwrap();
                assert_eq!(went(&seen), by_share(sharing(share), &flow(family, port, frame::UDP)), "{port}");
                if wanted == Slot::B {
                    now.insert(port);
                }
            }
            assert!(now.is_superset(&before), "a larger share only adds");
            assert!(now.len() > before.len() || share == 1);
            before = now;
        }
    }
    bench.finish().unwrap();
}

#[test]
fn flows_stay_with_the_side_that_has_them_whatever_the_share() {
    let mut bench = Bench::new("shared").unwrap();
    let mut held = Vec::new();
    for family in families() {
        for (ns, port) in [(&bench.lab.a, 1000), (&bench.lab.b, 1001)] {
            let listening = listener(ns, family).unwrap();
            held.push((connection(ns, &listening, family, port).unwrap(), listening));
        }
        bench.remember(key((family.client, 3000), PORT, frame::UDP), family.service, Slot::A, 0).unwrap();
        bench.remember(key((family.client, 3001), PORT, frame::UDP), family.service, Slot::B, 0).unwrap();
        for share in [1, 99] {
            bench.word(sharing(share)).unwrap();
            for short in [true, false] {
                bench.short_way(short).unwrap();
                for flags in [ACK, SYN, RST, ACK | 1] {
                    assert_eq!(went(&tcp(&mut bench, family, 1000, flags)), Slot::A, "{share} {flags}");
                    assert_eq!(went(&tcp(&mut bench, family, 1001, flags)), Slot::B, "{share} {flags}");
                }
                for (port, side) in [(3000, Slot::A), (3001, Slot::B)] {
                    let datagram = frame::udp((family.client, port), (family.service, PORT), b"?");
                    assert_eq!(went(&bench.client(&datagram).unwrap()), side, "{share} {port}");
                }
            }
        }
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

#[test]
fn both_sides_answer_with_the_service_address_and_are_counted() {
    let mut bench = Bench::new("answers").unwrap();
    for family in families() {
        for (slot, names) in [(Slot::A, ["answered_a", "reset_a"]), (Slot::B, ["answered_b", "reset_b"])] {
            for short in [true, false] {
                bench.short_way(short).unwrap();
                bench.word(sharing(10)).unwrap();
                for (flags, compared) in [
                    (SYN | ACK, vec![names[0]]),
                    (RST, vec![names[1]]),
                    (RST | ACK, vec![names[1]]),
                    (ACK, Vec::new()),
                ] {
                    let answer = frame::tcp((family.service, PORT), (family.client, 2000), flags, &[]);
                    let seen = bench.partition(slot, &answer).unwrap();
                    assert_eq!(seen.counted, ["out"], "{slot:?} {flags}");
                    assert_eq!(seen.compared, compared, "{slot:?} {flags}");
                }
                let answer = frame::udp((family.service, PORT), (family.client, 4000), b"!");
                let seen = bench.partition(slot, &answer).unwrap();
                assert_eq!(seen.counted, ["learned", "out"]);
                let known = bench.remembered(key((family.client, 4000), PORT, frame::UDP)).unwrap();
                assert_eq!(
                    known.map(|record| record.slot),
                    Some(slot.index()),
                    "each side's flows are remembered"
                );
                bench.word(Word::steady(slot, 1)).unwrap();
                let answer = frame::tcp((family.service, PORT), (family.client, 2000), SYN | ACK, &[]);
                assert_eq!(
                    bench.partition(slot, &answer).unwrap().compared,
                    Vec::<&str>::new(),
                    "nothing to compare"
                );
                bench.forget().unwrap();
            }
        }
    }
    bench.finish().unwrap();
}
