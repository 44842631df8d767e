//! Fragments: who gets them, and what becomes of everybody else when they are many.

use std::time::Duration;

use patchswitch_common::verdict::Hook;
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use crate::bench::{Bench, REDIRECT, families};
use crate::frame::{Ip, Place, udp};
use crate::steer::{ACK, DRAINING, STEADY, check, connection, listener, segment};

/// More first fragments than the programs remember (`FRAGMENTS`: 16,384).
const FLOOD: u32 = 20_000;

#[test]
fn later_fragments_follow_the_first() {
    let mut bench = Bench::new("fragment").unwrap();
    for family in families() {
        let listening = listener(&bench.lab.a, family).unwrap();
        let _ends = connection(&bench.lab.a, &listening, family, 1000).unwrap();
        let kept = &["to_a", "kept_by_retiring"][..];
        let of = |port, id, offset| {
            let place = Place { offset, more: offset == 0, id };
            Ip { place: Some(place), ..segment(family, port, ACK) }
        };
        bench.word(DRAINING).unwrap();
        let unknown = &["to_both", "fragment_unknown"][..];
        check(&bench.client(&of(1000, 1, 100)).unwrap(), REDIRECT, unknown, "before the first one");
        check(&bench.client(&of(1000, 1, 0)).unwrap(), REDIRECT, kept, "the first one");
        check(&bench.client(&of(1000, 1, 100)).unwrap(), REDIRECT, kept, "after it");
        // What to make of bytes that come twice is the partition's to decide (RFC 5722, RFC 3128).
        check(&bench.client(&of(1000, 1, 2)).unwrap(), REDIRECT, kept, "one that lies over its end");
        check(&bench.client(&of(1000, 1, 1)).unwrap(), REDIRECT, kept, "one that lies over its header");
        check(&bench.client(&of(1000, 1, 100)).unwrap(), REDIRECT, kept, "the same one again");
        // Half a minute after the first one nobody would join them any more, and another datagram may have the number.
        bench.age_fragments(Duration::from_secs(29)).unwrap();
        check(&bench.client(&of(1000, 1, 100)).unwrap(), REDIRECT, kept, "29 seconds after it");
        bench.age_fragments(Duration::from_secs(2)).unwrap();
        check(&bench.client(&of(1000, 1, 100)).unwrap(), REDIRECT, unknown, "31 seconds after it");
        check(&bench.client(&of(1001, 1, 0)).unwrap(), REDIRECT, &["to_b"], "the number used again");
        check(&bench.client(&of(1001, 1, 100)).unwrap(), REDIRECT, &["to_b"], "by another datagram");
        check(&bench.client(&of(1000, 2, 100)).unwrap(), REDIRECT, unknown, "of another packet");
        check(&bench.client(&of(1001, 3, 0)).unwrap(), REDIRECT, &["to_b"], "the first of the active one's");
        // What began in peace ends where it began.
        bench.word(STEADY).unwrap();
        check(&bench.client(&of(1001, 4, 0)).unwrap(), REDIRECT, &["to_a"], "the first one, in peace");
        bench.word(DRAINING).unwrap();
        check(&bench.client(&of(1001, 4, 100)).unwrap(), REDIRECT, kept, "the rest of it, after the switch");
    }
    bench.finish().unwrap();
}

#[test]
fn a_flood_of_fragments_costs_nobody_else_anything() {
    // What a processor has just put into the map is not crowded out before it has put in more: all of it is on one.
    let mut one = CpuSet::new();
    one.set(sched_getcpu());
    sched_setaffinity(None, &one).unwrap();
    let mut bench = Bench::new("fragflood").unwrap();
    bench.word(DRAINING).unwrap();
    for family in families() {
        let listening = listener(&bench.lab.a, family).unwrap();
        let _ends = connection(&bench.lab.a, &listening, family, 1000).unwrap();
        let kept = &["to_a", "kept_by_retiring"][..];
        let of = |id, offset| {
            let place = Place { offset, more: offset == 0, id };
            Ip { place: Some(place), ..segment(family, 1000, ACK) }
        };
        for id in 1..FLOOD {
            let frame = of(id, 0).frame(bench.uplink.mac);
            bench.repeat(Hook::Uplink, bench.uplink, 1, &frame).unwrap();
        }
        // However long that took, nothing is too old.
        bench.renew_fragments().unwrap();
        let unknown = &["to_both", "fragment_unknown"][..];
        check(&bench.client(&of(1, 100)).unwrap(), REDIRECT, unknown, "the rest of what was crowded out");
        check(&bench.client(&of(FLOOD, 0)).unwrap(), REDIRECT, kept, "another first one");
        check(&bench.client(&of(FLOOD, 100)).unwrap(), REDIRECT, kept, "the rest of it");
        check(&bench.client(&segment(family, 1000, ACK)).unwrap(), REDIRECT, kept, "what is no fragment");
        check(&bench.client(&segment(family, 1001, ACK)).unwrap(), REDIRECT, &["to_b"], "of the serving one");
    }
    bench.finish().unwrap();
}

/// What a card or the kernel has joined is longer than any link.
#[test]
fn what_is_longer_than_the_links_is_not_dropped_for_it() {
    let mut bench = Bench::new("joined").unwrap();
    for (word, verdict) in [(STEADY, "to_a"), (DRAINING, "to_b")] {
        bench.word(word).unwrap();
        for family in families() {
            let _listening = listener(&bench.lab.a, family).unwrap();
            let datagram = udp((family.client, 1000), (family.service, 9), &[7; 3000]);
            check(&bench.client(&datagram).unwrap(), REDIRECT, &[verdict], "a datagram of 3000 bytes");
            let mut long = segment(family, 1000, ACK);
            long.payload.resize(3000, 7);
            check(&bench.client(&long).unwrap(), REDIRECT, &[verdict], "a segment of 3000 bytes");
        }
    }
    bench.finish().unwrap();
}
