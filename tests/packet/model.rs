//! The programs against models in plain Rust, packet by packet.
//!
//! The parsers and the rules are the same functions on both sides, but here they are composed anew, run on a slice
//! instead of a socket buffer, compiled for another processor, and ask a table instead of the kernel. Packets are
//! generated around what matters (ports that somebody has, options, fragments, errors), then cut and damaged. What
//! clients send is here; what the host and what partitions send is below.

mod inward;
mod known;
mod outward;
mod packets;
#[cfg(test)]
mod replies;
#[cfg(test)]
mod runs;
mod sent;

use std::collections::BTreeMap;

use patchswitch_common::Slot;
use patchswitch_common::verdict::{Hook, Verdict};
use patchswitch_common::word::Word;
use proptest::strategy::{Strategy as _, ValueTree as _};

use crate::bench::{Bench, DROP, NEXT, REDIRECT, Seen, families};
use crate::frame::ETHERNET;
use crate::seed::runner;
use crate::steer::{DRAINING, STEADY};
pub(crate) use known::{Known, connect, learn};
use known::{choose, to};
pub(crate) use packets::{Made, bytes, made};

/// How many packets of clients; of one seed always the same ones.
const PACKETS: usize = 10_000;
/// A client's port of a connection of slot A, of one of slot B, and of flows that were answered.
pub(crate) const OF_A: u16 = 1000;
pub(crate) const OF_B: u16 = 2000;
const LEARNED: u16 = 3000;

/// What must be seen.
#[derive(Debug, PartialEq)]
pub(crate) struct Expected {
    pub(crate) action: i32,
    /// The counters in their order, and those that compare the sides.
    pub(crate) counted: Vec<&'static str>,
    pub(crate) compared: Vec<&'static str>,
    mark: u32,
    frame: Vec<u8>,
}

impl Expected {
    /// A packet that stays as it is, with one verdict.
    fn plain(verdict: Verdict, action: i32, mark: u32, frame: &[u8]) -> Self {
        let (counted, compared) = (vec![verdict.name()], Vec::new());
        Self { action, counted, compared, mark, frame: frame.to_vec() }
    }

    /// A packet that goes to nobody here.
    fn turned_away(verdict: Verdict, mark: u32, frame: &[u8]) -> Self {
        Self::plain(verdict, if verdict.drops() { DROP } else { NEXT }, mark, frame)
    }

    /// The same, with more counters.
    fn with(mut self, counted: Vec<&'static str>, compared: Vec<&'static str>) -> Self {
        self.counted.extend(counted);
        self.counted.sort_unstable();
        self.compared = compared;
        self
    }
}

impl From<Seen> for Expected {
    fn from(seen: Seen) -> Self {
        let Seen { action, frame, mark, counted, compared } = seen;
        Self { action, counted, compared, mark, frame }
    }
}

/// Which exits and events the packets came to.
#[derive(Debug, Default)]
struct Tally(BTreeMap<&'static str, u32>);

impl Tally {
    fn add(&mut self, expected: &Expected) {
        for name in expected.counted.iter().chain(&expected.compared) {
            *self.0.entry(name).or_default() += 1;
        }
    }

    /// The packets are worth something only if they come to all exits.
    fn check(&self, names: &[&str]) -> anyhow::Result<()> {
        for name in names {
            anyhow::ensure!(self.0.get(name).is_some_and(|n| *n >= 1), "{name}: {self:?}");
        }
        Ok(())
    }
}

pub(crate) fn expect(word: Word, frame: &[u8], v6: bool, known: &mut Known) -> Expected {
    match choose(word, frame, v6, known) {
        Err(verdict) => Expected::turned_away(verdict, 0, frame),
        Ok(chosen) => Expected::plain(to(&chosen), REDIRECT, 0, frame).with(chosen.counted, chosen.compared),
    }
}

/// From 6.18 on the kernel does not take packets without a whole network header for a test.
const fn is_too_short(frame: &[u8], v6: bool) -> bool {
    frame.len() < ETHERNET + if v6 { 40 } else { 20 }
}

#[test]
fn the_programs_do_what_the_model_says() {
    let mut bench = Bench::new("model").unwrap();
    let (_held, mut known) = connect(&bench).unwrap();
    let mut runner = runner().unwrap();
    let strategy = made();
    let mut tally = Tally::default();
    for number in 0..PACKETS {
        if number % 100 == 0 {
            // A slow machine needs longer for all packets than a flow or a fragment is remembered.
            learn(&mut bench).unwrap();
            bench.renew_fragments().unwrap();
        }
        let made = strategy.new_tree(&mut runner).unwrap().current();
        let word = match number % 5 {
            0 => STEADY,
            1 => STEADY.shared(50),
            // A rollback.
            2 => DRAINING.taken_over_by(Slot::A),
            3 => STEADY.moved_to(Slot::B),
            _ => DRAINING,
        };
        bench.word(word).unwrap();
        bench.short_way(number % 3 != 0).unwrap();
        let family = families()[usize::from(made.v6)];
        let frame = bytes(&made, family, bench.uplink.mac);
        let expected = expect(word, &frame, made.v6, &mut known[usize::from(made.v6)]);
        let seen = match bench.run(Hook::Uplink, bench.uplink, 0, &frame) {
            Err(_) if is_too_short(&frame, made.v6) => continue,
            other => Expected::from(other.unwrap()),
        };
        assert_eq!(seen, expected, "{number}: {made:?}");
        tally.add(&expected);
    }
    tally
        .check(&[
            "to_a",
            "to_b",
            "kept_by_retiring",
            "malformed",
            "for_host",
            "martian",
            "source_route",
            "to_both",
        ])
        .unwrap();
    println!("{tally:?}");
    bench.finish().unwrap();
}
