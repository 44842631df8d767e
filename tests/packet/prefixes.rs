//! Every prefix of every kind of packet that the model makes, whoever serves: what the model says of it, no more and no less.
//!
//! The counters are read once for a packet, not for each of its prefixes: they are many.

use std::collections::BTreeMap;

use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;
use patchswitch_common::word::Word;
use proptest::strategy::{Strategy as _, ValueTree as _};

use crate::bench::{Bench, DROP, REDIRECT, families};
use crate::frame::{ETHERNET, SENDER};
use crate::model::{Expected, Known, Made, bytes, connect, expect, learn, made};
use crate::seed::runner;
use crate::steer::{DRAINING, STEADY};
use crate::xdp::{XDP_DROP, XDP_PASS, XDP_REDIRECT};

/// How many packets, each in every phase.
const PACKETS: usize = 400;

type Counts = BTreeMap<&'static str, u64>;

/// Adds what is counted of a frame by XDP and, where the kernel takes it for a test, by the filter; what XDP must do with it.
fn add(counts: &mut Counts, Expected { action, counted, compared, .. }: &Expected, by_filter: bool) -> i32 {
    let both = counted.contains(&"to_both");
    let by_xdp: Vec<&'static str> = if both { vec!["to_both"] } else { counted.clone() };
    let filter = counted.iter().chain(compared).filter(|_| by_filter);
    for name in by_xdp.iter().chain(compared).chain(filter) {
        *counts.entry(name).or_default() += 1;
    }
    match *action {
        REDIRECT if !both => XDP_REDIRECT,
        DROP => XDP_DROP,
        _ => XDP_PASS,
    }
}

/// Sends all prefixes of a frame through both programs and compares; how many they are.
fn try_prefixes(
    bench: &mut Bench,
    (word, known): (Word, &mut Known),
    made: &Made,
    frame: &[u8],
) -> anyhow::Result<usize> {
    let prefixes: Vec<&[u8]> = (ETHERNET + 1..=frame.len()).map(|length| &frame[..length]).collect();
    let shortest = ETHERNET + if made.v6 { 40 } else { 20 };
    let before = bench.counters()?;
    let by_xdp = bench.run_many(Hook::Xdp, bench.uplink, &prefixes)?;
    let by_filter = bench.run_many(Hook::Uplink, bench.uplink, &prefixes)?;
    let mut counts = Counts::new();
    for ((prefix, xdp), filter) in prefixes.iter().zip(by_xdp).zip(by_filter) {
        let expected = expect(word, prefix, made.v6, known);
        let action = add(&mut counts, &expected, filter.is_some());
        let what = || format!("{} bytes in {word:?}: {made:?}", prefix.len());
        let mut steered = prefix.to_vec();
        if action == XDP_REDIRECT {
            steered[..6].copy_from_slice(&SENDER);
        }
        anyhow::ensure!(xdp == Some((action, steered)), "XDP: {xdp:?}, {}", what());
        match filter {
            Some(seen) => anyhow::ensure!(seen == (expected.action, prefix.to_vec()), "{seen:?}, {}", what()),
            // From 6.18 on the kernel does not take packets without a whole network header for a test.
            None => anyhow::ensure!(prefix.len() < shortest, "not taken: {}", what()),
        }
    }
    let after = bench.counters()?;
    let moved = after.into_iter().map(|(name, count)| (name, count - before.get(name).unwrap_or(&0)));
    let moved: Counts = moved.filter(|(_, count)| *count > 0).collect();
    anyhow::ensure!(moved == counts, "counted {moved:?} and not {counts:?}, in {word:?}: {made:?}");
    Ok(prefixes.len())
}

#[test]
fn every_prefix_is_what_the_model_says_whoever_serves() {
    let mut bench = Bench::new("prefixes").unwrap();
    let families = families();
    let (_held, mut known) = connect(&bench).unwrap();
    let (mut runner, strategy) = (runner().unwrap(), made());
    let mut prefixes = 0;
    for number in 0..PACKETS {
        let mut made = strategy.new_tree(&mut runner).unwrap().current();
        made.arrives = 100;
        let at = usize::from(made.v6);
        let frame = bytes(&made, families[at], bench.uplink.mac);
        // A slow machine needs longer for all packets than a flow or a fragment is remembered.
        learn(&mut bench).unwrap();
        bench.renew_fragments().unwrap();
        bench.short_way(number % 2 == 0).unwrap();
        let [sharing, letter] = [STEADY.shared(50), STEADY.moved_to(Slot::B)];
        for word in [STEADY, STEADY.with_learning(true), sharing, DRAINING, letter] {
            bench.word(word).unwrap();
            prefixes += try_prefixes(&mut bench, (word, &mut known[at]), &made, &frame).unwrap();
        }
    }
    println!("{prefixes} prefixes");
    bench.finish().unwrap();
}
