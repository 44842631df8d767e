//! What is no part of a flow's key changes nothing: the same packet with more around it has the same owner.

use std::collections::BTreeMap;

use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;
use patchswitch_tests::netlab::{CLIENT_LINK, UPLINK};
use proptest::strategy::{Strategy as _, ValueTree as _};

use crate::bench::{Bench, families};
use crate::model::{Made, OF_A, OF_B, bytes, learn, made};
use crate::paged::{self, RST, counted, padded};
use crate::seed::runner;
use crate::steer::{DRAINING, STEADY, SYN, connection, listener};
use crate::wire::{tagged, wire};

/// How many packets in a test run, and how many by a wire.
const PACKETS: usize = 2000;
const BY_WIRE: usize = 300;
/// As many as are read (ADR 5).
const EXTENSIONS: usize = 6;
/// Numbers of extension headers: a packet whose payload says that it is one has one more than it was made with.
const CHAINED: [u8; 9] = [0, 43, 44, 50, 51, 60, 135, 139, 140];

/// The packet with more in its network header, or in that of the packet that it quotes; where there is room.
fn with_more(made: &Made) -> Vec<Made> {
    let mut all = Vec::new();
    // The header of a fragment is one of them.
    let there = made.extensions.len() + usize::from(made.place.is_some());
    if made.v6 && !CHAINED.contains(&made.protocol) && there < EXTENSIONS {
        for at in 0..=made.extensions.len() {
            let mut more = made.clone();
            more.extensions.insert(at, 60);
            all.push(more);
        }
    }
    for words in 1..=10 {
        if !made.v6 && made.options.len() + words * 4 <= 40 {
            // In front: what is behind an end of the list is none.
            let mut more = made.clone();
            more.options = [vec![1; words * 4], made.options.clone()].concat();
            all.push(more);
        }
    }
    all
}

/// Connections of both sides, which are there as long as what this returns.
fn connections(bench: &Bench) -> anyhow::Result<Vec<impl Sized + use<>>> {
    let mut held = Vec::new();
    for family in families() {
        for (ns, port) in [(&bench.lab.a, OF_A), (&bench.lab.b, OF_B)] {
            let listening = listener(ns, family)?;
            held.push((connection(ns, &listening, family, port)?, listening));
        }
    }
    Ok(held)
}

#[test]
fn options_and_extension_headers_change_no_owner() {
    let mut bench = Bench::new("more").unwrap();
    let _held = connections(&bench).unwrap();
    let (mut runner, strategy) = (runner().unwrap(), made());
    let (mut seen, mut variants) = (BTreeMap::<&str, u32>::new(), 0);
    for number in 0..PACKETS {
        if number % 100 == 0 {
            learn(&mut bench).unwrap();
            bench.renew_fragments().unwrap();
        }
        let mut made = strategy.new_tree(&mut runner).unwrap().current();
        made.arrives = 100;
        made.damage.clear();
        let word = [STEADY, STEADY.shared(50), DRAINING, STEADY.moved_to(Slot::B)][number % 4];
        bench.word(word).unwrap();
        bench.short_way(number % 3 != 0).unwrap();
        let family = families()[usize::from(made.v6)];
        let plain =
            bench.run(Hook::Uplink, bench.uplink, 0, &bytes(&made, family, bench.uplink.mac)).unwrap();
        // What cannot be read has no owner; with more in front of it something else may come first.
        if plain.counted.contains(&"malformed") {
            continue;
        }
        for more in with_more(&made) {
            let frame = bytes(&more, family, bench.uplink.mac);
            let with = bench.run(Hook::Uplink, bench.uplink, 0, &frame).unwrap();
            assert_eq!(
                (with.action, &with.counted, &with.compared),
                (plain.action, &plain.counted, &plain.compared),
                "{number}: {made:?}\n{more:?}"
            );
            variants += 1;
        }
        for verdict in plain.counted {
            *seen.entry(verdict).or_default() += 1;
        }
    }
    for verdict in ["to_a", "to_b", "kept_by_retiring", "for_host", "martian", "source_route", "to_both"] {
        assert!(seen.get(verdict).is_some_and(|n| *n >= 3), "{verdict}: {seen:?}");
    }
    println!("{variants} variants of packets: {seen:?}");
    bench.finish().unwrap();
}

/// A tag without a number, and bytes in pages, both at once as well; one with a number is another network's.
#[test]
fn tags_and_pages_change_no_owner() {
    let mut bench = paged::bench("tagpage").unwrap();
    bench.attach(Hook::Uplink, UPLINK).unwrap();
    let _held = connections(&bench).unwrap();
    let (mut sender, _) = wire(&bench.lab.client, CLIENT_LINK).unwrap();
    let (mut runner, strategy) = (runner().unwrap(), made());
    let mut seen = BTreeMap::<&str, u32>::new();
    for number in 0..BY_WIRE {
        if number % 50 == 0 {
            learn(&mut bench).unwrap();
            bench.renew_fragments().unwrap();
        }
        let mut made = strategy.new_tree(&mut runner).unwrap().current();
        let word = [STEADY, STEADY.shared(50), DRAINING, STEADY.moved_to(Slot::B)][number % 4];
        // Whole, as it would be shorter than it says otherwise; a reset could be one, and what begins a connection on the
        // side that retires later would change who owns what comes after it.
        let never = if word == DRAINING { RST } else { RST | SYN };
        (made.arrives, made.flags) = (100, made.flags & !never);
        made.damage.clear();
        bench.word(word).unwrap();
        bench.short_way(number % 3 != 0).unwrap();
        let frame = bytes(&made, families()[usize::from(made.v6)], bench.uplink.mac);
        let plain = bench.run(Hook::Uplink, bench.uplink, 0, &frame).unwrap();
        let mut expected = [plain.counted, plain.compared].concat();
        expected.sort_unstable();
        let priority = u16::try_from(number % 8).unwrap();
        for (what, variant) in [
            ("a priority", tagged(&frame, priority, 0)),
            ("pages", padded(&frame)),
            ("a priority and pages", tagged(&padded(&frame), priority, 0)),
        ] {
            let by_wire = counted(&mut bench, &mut sender, &variant, expected.len()).unwrap();
            assert_eq!(by_wire, expected, "{number}, {what}: {made:?}");
        }
        let other = counted(&mut bench, &mut sender, &tagged(&frame, priority, 7), 1).unwrap();
        assert_eq!(other, ["not_ours"], "{number}: {made:?}");
        for verdict in expected {
            *seen.entry(verdict).or_default() += 1;
        }
    }
    for verdict in ["to_a", "to_b", "kept_by_retiring", "source_route", "to_both"] {
        assert!(seen.get(verdict).is_some_and(|n| *n >= 3), "{verdict}: {seen:?}");
    }
    println!("tagged and in pages: {seen:?}");
}
