//! Packets for a partition that is not ready yet: which of them wait, and until when.

use std::time::Duration;

use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;

use crate::bench::{Bench, Link, NEXT, REDIRECT, families, link};
use crate::frame::SENDER;
use crate::steer::{ACK, DRAINING, SYN, check, connection, listener, segment};

const LONG: Duration = Duration::from_secs(600);

/// A link for a queue. Nothing comes into it: a test run sends nothing.
fn queue(bench: &Bench) -> anyhow::Result<Link> {
    bench.lab.host.ip("link add queue type veth peer name queueend")?;
    link(&bench.lab.host, "queue")
}

#[test]
fn what_the_new_side_would_get_waits_and_nothing_else() {
    let mut bench = Bench::new("hold").unwrap();
    let queue = queue(&bench).unwrap();
    bench.word(DRAINING).unwrap();
    bench.hold(Slot::B, queue.index, LONG).unwrap();
    let mut held = Vec::new();
    for family in families() {
        let listening = listener(&bench.lab.a, family).unwrap();
        held.push((connection(&bench.lab.a, &listening, family, 1000).unwrap(), listening));
        for short_way in [true, false] {
            bench.short_way(short_way).unwrap();
            let seen = bench.client(&segment(family, 1000, ACK)).unwrap();
            check(&seen, REDIRECT, &["to_a", "kept_by_retiring"], "a connection of the old side");
            let syn = segment(family, 1001, SYN);
            let seen = bench.client(&syn).unwrap();
            check(&seen, REDIRECT, &["held"], "a new one");
            assert_eq!(seen.frame, syn.frame(bench.uplink.mac));
            // Of the host, whichever link its route names.
            for link in bench.links {
                let frame = syn.frame(SENDER);
                let seen = bench.run(Hook::ToPartition, link, 0, &frame).unwrap();
                check(&seen, REDIRECT, &["held"], "of the host");
                assert_eq!((seen.frame, seen.mark), (frame, 0));
            }
            // What comes out of the queue does not go into it.
            let seen = bench.run_filter(Hook::Uplink, queue, 0, &syn.frame(queue.mac)).unwrap();
            check(&seen, REDIRECT, &["to_b"], "out of the queue");
        }
    }
    bench.finish().unwrap();
}

#[test]
fn nothing_waits_longer_than_was_said() {
    let mut bench = Bench::new("holdend").unwrap();
    let queue = queue(&bench).unwrap();
    bench.word(DRAINING).unwrap();
    let _listening = families().map(|family| listener(&bench.lab.a, family).unwrap());
    for family in families() {
        let syn = segment(family, 1001, SYN);
        bench.hold(Slot::B, queue.index, LONG).unwrap();
        check(&bench.client(&syn).unwrap(), REDIRECT, &["held"], "in time");
        bench.hold(Slot::B, queue.index, Duration::ZERO).unwrap();
        check(&bench.client(&syn).unwrap(), REDIRECT, &["to_b"], "after it");
        bench.hold(Slot::B, 0, LONG).unwrap();
        check(&bench.client(&syn).unwrap(), REDIRECT, &["to_b"], "without a queue");
        let seen = bench.run(Hook::ToPartition, bench.links[1], 0, &syn.frame(SENDER)).unwrap();
        check(&seen, NEXT, &["to_b"], "of the host");
        // For the other side nothing waits.
        bench.hold(Slot::A, queue.index, LONG).unwrap();
        check(&bench.client(&syn).unwrap(), REDIRECT, &["to_b"], "held for the other side");
        bench.hold(Slot::A, 0, LONG).unwrap();
    }
    bench.finish().unwrap();
}
