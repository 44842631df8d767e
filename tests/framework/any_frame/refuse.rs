//! What is refused by its headers alone: whatever the bytes are, the short way and the long one agree.

use super::{Watched, is_v6, network};
use patchswitch_common::maps::Address;
use patchswitch_common::parse::{Fragment, Network, protocol};
use patchswitch_common::refuse::{arp, inbound, is_link_local, is_martian, is_plain, outbound};
use patchswitch_common::verdict::Verdict;

/// Checks it of a frame; what was said of it as a client's packet and as a partition's.
pub fn check(frame: &[u8]) -> [Option<Verdict>; 2] {
    arp_of(frame);
    let Some(v6) = is_v6(frame) else { return [None; 2] };
    let Ok(read) = network(frame, v6) else { return [None; 2] };
    let verdicts = [of_client(frame, &read), of_partition(frame, &read)];
    for verdict in verdicts.into_iter().flatten() {
        // The way through a number, which the programs take.
        assert_eq!(Verdict::of_refusal(verdict as i32), Some(verdict));
        assert!(verdict.drops() || verdict == Verdict::ForHost);
    }
    verdicts
}

fn arp_of(frame: &[u8]) {
    // Any frame may be taken for ARP.
    let refused = arp(frame, |_| true);
    assert!(matches!(refused, None | Some(Verdict::ForgedControl | Verdict::Malformed)));
    if refused.is_none() {
        assert_ne!(frame[28..32], frame[38..42]);
        // Of a partition without addresses only what has no sender passes.
        assert!(arp(frame, |_| false).is_some() || frame[28..32] == [0; 4]);
    }
}

fn of_client(frame: &[u8], read: &Network) -> Option<Verdict> {
    let v6 = read.v6;
    // What pads the frame behind the packet says nothing.
    let watched = Watched::new(frame);
    let verdict = inbound(&watched, read);
    if is_plain(read) {
        assert_eq!(verdict, None);
    }
    let icmp = matches!(read.protocol, protocol::ICMP | protocol::ICMPV6);
    match verdict {
        None => assert!(!(is_martian(&read.source, v6) || v6 && is_link_local(&read.source))),
        Some(Verdict::SourceRoute) => assert!(!v6 && read.payload > 34),
        Some(Verdict::Redirect | Verdict::NestedError) => {
            assert!(icmp && read.fragment != Fragment::Later);
        }
        Some(Verdict::SplitDiscovery) => assert!(v6 && read.fragment == Fragment::First),
        Some(other) => assert!(matches!(other, Verdict::Martian | Verdict::ForHost), "{other:?}"),
    }
    assert!(watched.furthest() <= read.end as usize);
    verdict
}

/// Whether an IPv6 address is one of IPv4, as no packet has them.
fn is_mapped(address: &Address) -> bool {
    address[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]
}

fn of_partition(frame: &[u8], read: &Network) -> Option<Verdict> {
    let watched = Watched::new(frame);
    let verdict = outbound(&watched, read, |_| true);
    assert!(watched.furthest() <= read.end as usize);
    // Such a packet is refused whatever else it is, and no other one for that.
    let is_mapped = read.v6 && (is_mapped(&read.source) || is_mapped(&read.destination));
    assert_eq!(verdict == Some(Verdict::Martian), is_mapped);
    assert!(matches!(verdict, None | Some(Verdict::Martian | Verdict::ForgedControl | Verdict::HostControl)));
    // Who has no service claims none.
    let without = outbound(frame, read, |_| false);
    assert!(without.is_none() || without == verdict);
    verdict
}
