//! XDP beside TC: the same packets through both programs.
//!
//! Every packet that any test here sends to an uplink goes through both ([`compare`]); what only XDP has is below.

use anyhow::ensure;
use patchswitch_common::Slot;
use patchswitch_common::word::Word;

use crate::bench::{Bench, DROP, PORT, REDIRECT, Seen, families};
use crate::frame::{self, Ip, Place, icmp, tcp, udp};
use crate::steer::{DRAINING, SYN};

/// `XDP_DROP`, `XDP_PASS` and `XDP_REDIRECT`.
pub(crate) const XDP_DROP: i32 = 1;
pub(crate) const XDP_PASS: i32 = 2;
pub(crate) const XDP_REDIRECT: i32 = 4;

/// Longer frames do not fit into a page.
pub(crate) const LONGEST: usize = 3400;

/// The longest frame that a partition's link takes.
const LINK: usize = 1514;

/// `struct xdp_md` of `linux/bpf.h`: a frame that came on a device.
pub(crate) fn context(index: u32, length: usize) -> anyhow::Result<[u8; 24]> {
    let mut context = [0; 24];
    context[4..8].copy_from_slice(&u32::try_from(length)?.to_ne_bytes());
    context[12..16].copy_from_slice(&index.to_ne_bytes());
    Ok(context)
}

/// Whether XDP did what TC did with the same frame. What it passes on, TC decides: it must be as it came, and counted as
/// TC counts it, but for what happens on the way to a copy.
pub(crate) fn compare(frame: &[u8], by_xdp: &Seen, by_tc: &Seen) -> anyhow::Result<()> {
    let both = by_tc.counted.contains(&"to_both");
    let left = both || by_tc.counted.contains(&"held");
    let too_long = frame.len() > LINK && by_tc.action == REDIRECT && !left;
    let (action, mut expected) = match by_tc.action {
        REDIRECT if !left && !too_long => (XDP_REDIRECT, frame.to_vec()),
        DROP => (XDP_DROP, frame.to_vec()),
        _ => (XDP_PASS, frame.to_vec()),
    };
    if action == XDP_REDIRECT {
        expected[..6].copy_from_slice(&frame::SENDER);
    }
    let mut counted = if both { vec!["to_both"] } else { by_tc.counted.clone() };
    if too_long {
        counted.retain(|name| !["to_a", "to_b"].contains(name));
        counted.push("too_long");
        counted.sort_unstable();
    }
    ensure!(
        by_xdp.action == action
            && by_xdp.counted == counted
            && by_xdp.compared == by_tc.compared
            && by_xdp.frame == expected,
        "XDP is another's opinion: {by_xdp:?}, TC: {by_tc:?}"
    );
    Ok(())
}

#[test]
fn what_is_not_for_this_uplink_is_passed_on() {
    let mut bench = Bench::new("xdpelse").unwrap();
    bench.word(Word::steady(Slot::A, 1)).unwrap();
    for family in families() {
        let ours = tcp((family.client, 1000), (family.service, PORT), SYN, b"");
        let uplink = bench.uplink;
        let other = bench.links[0];
        for (what, on, mac, action, verdict) in [
            ("to the uplink", uplink, uplink.mac, XDP_REDIRECT, "to_a"),
            ("to another link's address", uplink, other.mac, XDP_PASS, "not_ours"),
            ("to everybody", uplink, [0xff; 6], XDP_PASS, "not_ours"),
            ("to a group", uplink, [1, 0, 0x5e, 0, 0, 1], XDP_PASS, "not_ours"),
            ("on a link that is no uplink", other, other.mac, XDP_PASS, "not_ours"),
        ] {
            let seen = bench.run_xdp(on, &ours.frame(mac)).unwrap();
            assert_eq!((seen.action, seen.counted.as_slice()), (action, &[verdict][..]), "{what}");
        }
        // Down to the last byte that a link brings.
        for length in 14..ours.frame(uplink.mac).len() {
            let seen = bench.run_xdp(uplink, &ours.frame(uplink.mac)[..length]).unwrap();
            assert_eq!((seen.action, seen.counted.as_slice()), (XDP_PASS, &["malformed"][..]), "{length}");
        }
    }
    bench.finish().unwrap();
}

#[test]
fn what_goes_to_both_is_left_to_who_can_copy() {
    let mut bench = Bench::new("xdpboth").unwrap();
    bench.word(DRAINING).unwrap();
    let uplink = bench.uplink;
    for family in families() {
        let client = (family.client, 1000);
        let later = Place { offset: 8, more: false, id: 77 };
        let fragment = Ip { place: Some(later), ..udp(client, (family.service, PORT), &[7; 64]) };
        let quoted = Ip { place: Some(later), ..udp((family.service, PORT), client, &[7; 64]) };
        let kind = if family.client.is_ipv4() { 3 } else { 1 };
        let error = icmp(family.stranger, family.service, kind, [0; 4], &quoted.bytes());
        for (what, packet) in
            [("a fragment before its first", fragment.clone()), ("an error about one", error)]
        {
            let frame = packet.frame(uplink.mac);
            let seen = bench.run_xdp(uplink, &frame).unwrap();
            assert_eq!((seen.action, seen.counted.as_slice()), (XDP_PASS, &["to_both"][..]), "{what}");
            assert_eq!(seen.frame, frame, "{what}");
        }
        // The first one is taken, and is remembered for those that follow.
        let first = Place { offset: 0, more: true, id: 77 };
        let first = Ip { place: Some(first), ..udp(client, (family.service, PORT), &[7; 64]) };
        for packet in [first, fragment] {
            let seen = bench.run_xdp(uplink, &packet.frame(uplink.mac)).unwrap();
            assert_eq!((seen.action, seen.counted.as_slice()), (XDP_REDIRECT, &["to_b"][..]));
        }
    }
    bench.finish().unwrap();
}
