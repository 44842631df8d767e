//! What is refused by its headers alone: whatever the bytes are, the short way and the long one agree.

#![no_main]

use libfuzzer_sys::fuzz_target;
use patchswitch_common::parse::{Fragment, protocol};
use patchswitch_common::refuse::{arp, inbound, is_link_local, is_martian, is_plain, outbound};
use patchswitch_common::verdict::Verdict;
use patchswitch_fuzz::{Watched, is_v6, network};

fuzz_target!(|frame: &[u8]| {
    // Any frame may be taken for ARP.
    let refused = arp(frame, |_| true);
    assert!(matches!(refused, None | Some(Verdict::ForgedControl | Verdict::Malformed)));
    if refused.is_none() {
        assert_ne!(frame[28..32], frame[38..42]);
        // Of a partition without addresses only what has no sender passes.
        assert!(arp(frame, |_| false).is_some() || frame[28..32] == [0; 4]);
    }

    let Some(v6) = is_v6(frame) else { return };
    let Ok(read) = network(frame, v6) else { return };
    // What pads the frame behind the packet says nothing.
    let watched = Watched::new(frame);
    let verdict = inbound(&watched, &read);
    if is_plain(&read) {
        assert_eq!(verdict, None);
    }
    let icmp = matches!(read.protocol, protocol::ICMP | protocol::ICMPV6);
    match verdict {
        None => assert!(!is_martian(&read.source, v6) && !(v6 && is_link_local(&read.source))),
        Some(Verdict::Martian | Verdict::ForHost) => {}
        Some(Verdict::SourceRoute) => assert!(!v6 && read.payload > 34),
        Some(Verdict::Redirect | Verdict::NestedError) => {
            assert!(icmp && read.fragment != Fragment::Later);
        }
        Some(Verdict::SplitDiscovery) => assert!(v6 && read.fragment == Fragment::First),
        Some(other) => panic!("{other:?} is none of those"),
    }
    let of_partition = outbound(&watched, &read, |_| true);
    assert!(watched.furthest() <= read.end as usize);
    assert!(matches!(of_partition, None | Some(Verdict::ForgedControl | Verdict::HostControl)));
    // Who has no service claims none.
    let without = outbound(frame, &read, |_| false);
    assert!(without.is_none() || without == of_partition);
    for verdict in [verdict, of_partition].into_iter().flatten() {
        // The way through a number, which the programs take.
        assert_eq!(Verdict::of_refusal(verdict as i32), Some(verdict));
        assert!(verdict.drops() || verdict == Verdict::ForHost);
    }
});
