//! Each refusal, and its neighbours that are none.

use std::vec;
use std::vec::Vec;

use super::*;
use crate::parse::{ipv4, ipv6};

/// What is said of the bytes of an IP packet.
fn judge(packet: &[u8], to_service: bool) -> Option<Verdict> {
    let frame = [&[0; 14], packet].concat();
    let frame = frame.as_slice();
    let mut network = Network::EMPTY;
    let read = if packet[0] >> 4 == 4 {
        ipv4(frame, LINK_HEADER, &mut network)
    } else {
        ipv6(frame, LINK_HEADER, &mut network)
    };
    assert_eq!(read, Ok(()), "{packet:02x?}");
    if to_service {
        let verdict = inbound(frame, &network);
        assert!(verdict.is_none() || !is_plain(&network), "{packet:02x?}");
        verdict
    } else {
        outbound(frame, &network, |address| *address == [0x20; 16])
    }
}

fn v4(source: [u8; 4], number: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header = 20 + options.len();
    let total = (header + payload.len()) as u16;
    let mut packet = vec![0x40 | (header / 4) as u8, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, number, 0, 0]);
    packet.extend(source);
    packet.extend([192, 0, 2, 80]);
    packet.extend(options);
    packet.extend(payload);
    packet
}

fn v6(source: [u8; 16], number: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([number, 64]);
    packet.extend(source);
    packet.extend([0x20; 16]);
    packet.extend(payload);
    packet
}

const CLIENT4: [u8; 4] = [198, 51, 100, 7];
const CLIENT6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
const FINE: Option<Verdict> = None;

fn text6(text: &str) -> [u8; 16] {
    text.parse::<std::net::Ipv6Addr>().unwrap().octets()
}

#[test]
fn nobody_has_these_addresses() {
    for (source, expected) in [
        ([0, 0, 0, 0], Some(Verdict::Martian)),
        ([127, 0, 0, 1], Some(Verdict::Martian)),
        ([224, 0, 0, 1], Some(Verdict::Martian)),
        ([240, 0, 0, 1], Some(Verdict::Martian)),
        ([255; 4], Some(Verdict::Martian)),
        ([1, 0, 0, 1], FINE),
        ([223, 255, 255, 254], FINE),
        ([126, 0, 0, 1], FINE),
        ([128, 0, 0, 1], FINE),
        (CLIENT4, FINE),
    ] {
        assert_eq!(judge(&v4(source, 17, &[], &[0; 8]), true), expected, "{source:?}");
    }
    for (source, expected) in [
        ("::", Some(Verdict::Martian)),
        ("::1", Some(Verdict::Martian)),
        ("::2", FINE),
        ("::ffff:198.51.100.7", Some(Verdict::Martian)),
        ("ff02::1", Some(Verdict::Martian)),
        ("fe80::1", Some(Verdict::ForHost)),
        ("febf::1", Some(Verdict::ForHost)),
        ("fec0::1", FINE),
        ("2001:db8::7", FINE),
        ("64:ff9b::198.51.100.7", FINE),
    ] {
        assert_eq!(judge(&v6(text6(source), 17, &[0; 8]), true), expected, "{source}");
    }
}

#[test]
fn a_source_route_is_found_among_other_options() {
    for (options, expected) in [
        (&[1, 1, 1, 1][..], FINE),
        (&[131, 3, 4, 0], Some(Verdict::SourceRoute)),
        (&[137, 3, 4, 0], Some(Verdict::SourceRoute)),
        (&[1, 137, 3, 4], Some(Verdict::SourceRoute)),
        (&[148, 4, 0, 0], FINE),
        (&[148, 4, 0, 0, 131, 3, 4, 0], Some(Verdict::SourceRoute)),
        // Behind the end of the list, or within another option.
        (&[0, 131, 3, 4], FINE),
        (&[7, 7, 4, 131, 131, 131, 131, 0], FINE),
        // Options that do not fit are the kernel's to refuse.
        (&[7, 0, 131, 3], FINE),
        (&[7, 1, 131, 3], FINE),
        (&[7, 200, 131, 3], FINE),
        (&[1, 1, 1, 7], FINE),
    ] {
        assert_eq!(judge(&v4(CLIENT4, 6, options, &[0; 20]), true), expected, "{options:?}");
    }
    let mut long = [1; 40];
    long[38] = 131;
    assert_eq!(judge(&v4(CLIENT4, 6, &long, &[0; 20]), true), Some(Verdict::SourceRoute));
}

#[test]
fn messages_of_the_link_are_the_hosts_and_redirects_nobodys() {
    let error = |kind: u8| !matches!(kind, 3 | 11 | 12);
    for kind in (0..=255_u8).filter(|kind| error(*kind)) {
        let expected = match kind {
            5 => Some(Verdict::Redirect),
            9 | 10 | 13 | 14 | 15 | 16 | 17 | 18 => Some(Verdict::ForHost),
            _ => FINE,
        };
        assert_eq!(judge(&v4(CLIENT4, 1, &[], &[kind, 0, 0, 0, 0, 0, 0, 0]), true), expected, "{kind}");
    }
    for kind in 128..=255_u8 {
        let expected = match kind {
            137 => Some(Verdict::Redirect),
            130..=136 | 143 => Some(Verdict::ForHost),
            _ => FINE,
        };
        let packet = v6(CLIENT6, 58, &[kind, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(judge(&packet, true), expected, "{kind}");
        // The first of several fragments: next header, where, which.
        let first = [&[58, 0, 0, 1, 0, 0, 0, 9], &[kind, 0, 0, 0, 0, 0, 0, 0][..]].concat();
        let expected = if matches!(kind, 133..=137) { Some(Verdict::SplitDiscovery) } else { expected };
        assert_eq!(judge(&v6(CLIENT6, 44, &first), true), expected, "{kind} in a fragment");
    }
    // A solicitation of who looks for duplicates has no source.
    let solicitation = v6([0; 16], 58, &[135, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(judge(&solicitation, true), Some(Verdict::ForHost));
}

#[test]
fn membership_in_groups_is_the_hosts_to_whichever_address() {
    for kind in [0x11, 0x12, 0x16, 0x17, 0x22] {
        for options in [&[][..], &[148, 4, 0, 0]] {
            let report = v4(CLIENT4, 2, options, &[kind, 0, 0, 0, 192, 0, 2, 80]);
            assert_eq!(judge(&report, true), Some(Verdict::ForHost), "{kind:#x}");
        }
    }
    assert_eq!(judge(&v4([127, 0, 0, 1], 2, &[], &[0x11; 8]), true), Some(Verdict::Martian));
    // A partition reports to groups; who asks, or reports to somebody, is a router.
    let (forged, group) = (Some(Verdict::ForgedControl), [224, 0, 0, 22]);
    for (kind, to, expected) in [
        (0x22, group, FINE),
        (0x17, [224, 0, 0, 2], FINE),
        (0x16, [239, 1, 2, 3], FINE),
        (0x11, [224, 0, 0, 1], forged),
        (0x11, CLIENT4, forged),
        (0x22, CLIENT4, forged),
    ] {
        let message = v4_to(to, v4(CLIENT4, 2, &[], &[kind, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!(judge(&message, false), expected, "{kind:#x} to {to:?}");
    }
}

fn v4_to(to: [u8; 4], mut packet: Vec<u8>) -> Vec<u8> {
    packet[16..20].copy_from_slice(&to);
    packet
}

#[test]
fn what_governs_the_host_is_not_a_partitions_to_reach() {
    const METADATA: [u8; 4] = [169, 254, 169, 254];
    let control = Some(Verdict::HostControl);
    let ports = |to: u16| [&[0x99, 0x99][..], &to.to_be_bytes(), &[0, 28], &[0; 14]].concat();
    for (to, number, port, expected) in [
        (METADATA, 6, 80, control),
        (METADATA, 17, 80, control),
        (METADATA, 1, 0, control),
        (METADATA, 47, 53, control),
        (METADATA, 6, 53, FINE),
        (METADATA, 17, 53, FINE),
        (METADATA, 17, 123, FINE),
        (METADATA, 6, 123, control),
        ([169, 254, 0, 0], 6, 80, control),
        ([169, 254, 255, 255], 6, 80, control),
        ([169, 253, 255, 255], 6, 80, FINE),
        ([169, 255, 0, 0], 6, 80, FINE),
        ([127, 0, 0, 1], 6, 80, control),
        ([127, 0, 0, 53], 17, 53, control),
        ([126, 255, 255, 255], 6, 80, FINE),
        ([128, 0, 0, 1], 6, 80, FINE),
    ] {
        let packet = v4_to(to, v4(CLIENT4, number, &[], &ports(port)));
        assert_eq!(judge(&packet, false), expected, "{number} to {to:?}:{port}");
        // Of a fragment nobody knows what it asks for.
        let mut fragment = packet;
        for place in [0x20, 0] {
            (fragment[6], fragment[7]) = (place, u8::from(place == 0));
            let expected = if is_governing(to) { control } else { FINE };
            assert_eq!(judge(&fragment, false), expected, "a fragment to {to:?}");
        }
    }
    // Where the service itself lives on such a link, so do its clients.
    let answer = v4_to([169, 254, 7, 7], v4([169, 254, 7, 1], 6, &[], &ports(4000)));
    assert_eq!(judge(&answer, false), FINE);
    let mut loopback = v6(CLIENT6, 6, &[0; 20]);
    loopback[24..40].copy_from_slice(&text6("::1"));
    assert_eq!(judge(&loopback, false), control);
    loopback[24..40].copy_from_slice(&text6("::2"));
    assert_eq!(judge(&loopback, false), FINE);
}

/// Sockets have addresses of IPv4 in IPv6, packets do not: a flow with one could not be told from one of IPv4.
#[test]
fn a_partition_sends_nothing_from_or_to_an_address_of_ipv4_in_ipv6() {
    let mapped = text6("::ffff:198.51.100.7");
    let own = text6("2001:db8::80");
    for (from, to, expected) in [
        (mapped, CLIENT6, Some(Verdict::Martian)),
        (own, mapped, Some(Verdict::Martian)),
        (mapped, mapped, Some(Verdict::Martian)),
        (own, CLIENT6, FINE),
        // Neighbours of that prefix, and where translators have addresses of IPv4.
        (own, text6("::fffe:198.51.100.7"), FINE),
        (own, text6("::1:ffff:198.51.100.7"), FINE),
        (own, text6("::198.51.100.7"), FINE),
        (own, text6("64:ff9b::198.51.100.7"), FINE),
    ] {
        for (number, payload) in [(6, [0; 24]), (17, [0; 24]), (58, [134; 24]), (59, [0; 24])] {
            let mut packet = v6(from, number, &payload);
            packet[24..40].copy_from_slice(&to);
            // A router's advertisement is refused for what it is only where its addresses are in order.
            let expected = expected.or((number == 58).then_some(Verdict::ForgedControl));
            assert_eq!(judge(&packet, false), expected, "{number} from {from:02x?} to {to:02x?}");
            // Of a later fragment as well.
            let fragment = [&[number, 0, 0, 8, 0, 0, 0, 9], &payload[..]].concat();
            let mut packet = v6(from, 44, &fragment);
            packet[24..40].copy_from_slice(&to);
            let expected = expected.filter(|verdict| *verdict == Verdict::Martian);
            assert_eq!(judge(&packet, false), expected, "a fragment from {from:02x?} to {to:02x?}");
        }
    }
}

fn is_governing(to: [u8; 4]) -> bool {
    to[0] == 127 || to[..2] == [169, 254]
}

#[test]
fn an_error_about_an_error_is_refused() {
    for kind in [3, 11, 12] {
        for (number, quoted, expected) in [
            (1, 3, Some(Verdict::NestedError)),
            (1, 11, Some(Verdict::NestedError)),
            (1, 12, Some(Verdict::NestedError)),
            (1, 0, FINE),
            (1, 8, FINE),
            (6, 3, FINE),
            (17, 3, FINE),
        ] {
            for options in [&[][..], &[1; 8]] {
                let inner = v4([192, 0, 2, 80], number, options, &[quoted, 0, 0, 0, 0, 0, 0, 0]);
                let error = v4(CLIENT4, 1, &[], &[&[kind, 0, 0, 0, 0, 0, 0, 0], &inner[..]].concat());
                assert_eq!(judge(&error, true), expected, "{kind} about {number}/{quoted}");
            }
        }
    }
    // A later fragment begins with data, which may look like anything.
    let mut inner = v4([192, 0, 2, 80], 1, &[], &[3, 0, 0, 0, 0, 0, 0, 0]);
    inner[7] = 1;
    let error = v4(CLIENT4, 1, &[], &[&[3, 4, 0, 0, 0, 0, 5, 0], &inner[..]].concat());
    assert_eq!(judge(&error, true), FINE);
    for kind in 1..=4 {
        for (number, quoted, expected) in [
            (58, 1, Some(Verdict::NestedError)),
            (58, 127, Some(Verdict::NestedError)),
            (58, 129, FINE),
            (6, 1, FINE),
        ] {
            let message = [quoted, 0, 0, 0, 0, 0, 0, 0];
            let about = |inner: Vec<u8>, expected, what: &str| {
                let error = v6(CLIENT6, 58, &[&[kind, 0, 0, 0, 0, 0, 0, 0], &inner[..]].concat());
                assert_eq!(judge(&error, true), expected, "{kind} about {number}/{quoted}{what}");
            };
            about(v6([0x20; 16], number, &message), expected, "");
            let chain = |length: usize| {
                let header = |next| [next, 0, 1, 4, 0, 0, 0, 0];
                let mut chain = vec![header(60); length - 1].concat();
                chain.extend([header(number), message].concat());
                v6([0x20; 16], 60, &chain)
            };
            about(chain(1), expected, " behind an extension header");
            about(chain(6), expected, " behind six");
            // Nobody looks behind the seventh; it is none of the errors that are known, and no flow's either.
            about(chain(7), FINE, " behind seven");
            for (offset, expected) in [(0, expected), (8, FINE)] {
                let fragment = [[number, 0, 0, offset | 1, 0, 0, 0, 9], message].concat();
                about(v6([0x20; 16], 44, &fragment), expected, " in a fragment");
            }
        }
    }
}

#[test]
fn what_pads_a_frame_says_nothing() {
    for (packet, to_service) in [
        (v4(CLIENT4, 1, &[], &[]), true),
        (v6(CLIENT6, 60, &[58, 0, 1, 4, 0, 0, 0, 0]), true),
        (v4(CLIENT4, 1, &[], &[]), false),
        (v6(CLIENT6, 60, &[58, 0, 1, 4, 0, 0, 0, 0]), false),
        (v4_to([224, 0, 0, 1], v4(CLIENT4, 2, &[], &[])), false),
        (v4(CLIENT4, 17, &[], &[0, 67, 0]), false),
        // An error whose quotation ends before it says what it is.
        (v4(CLIENT4, 1, &[], &[&[3, 0, 0, 0, 0, 0, 0, 0], &v4(CLIENT4, 1, &[], &[])[..]].concat()), true),
    ] {
        for kind in [3, 5, 9, 0x11, 68, 134, 136, 137] {
            let padded = [&packet[..], &[kind; 40]].concat();
            assert_eq!(judge(&padded, to_service), FINE, "{kind} behind {packet:02x?}");
        }
    }
    let asks = v4_to([169, 254, 169, 254], v4(CLIENT4, 17, &[], &[0, 9, 0]));
    assert_eq!(judge(&[&asks[..], &[53; 40]].concat(), false), Some(Verdict::HostControl));
}

#[test]
fn a_partition_is_no_router_and_no_server_of_addresses() {
    let forged = Some(Verdict::ForgedControl);
    for (kind, expected) in [(0, FINE), (3, FINE), (5, forged), (8, FINE), (9, forged), (10, FINE)] {
        assert_eq!(judge(&v4(CLIENT4, 1, &[], &[kind, 0, 0, 0, 0, 0, 0, 0]), false), expected, "{kind}");
    }
    let about = |target: [u8; 16], kind: u8| [&[kind, 0, 0, 0, 0, 0, 0, 0], &target[..]].concat();
    for (what, payload, expected) in [
        ("advertises a router", about([0; 16], 134), forged),
        ("redirects", about([0; 16], 137), forged),
        ("advertises the service", about([0x20; 16], 136), forged),
        ("advertises itself", about([0x21; 16], 136), FINE),
        ("asks for a neighbour", about([0x20; 16], 135), FINE),
        ("asks for a router", about([0; 16], 133), FINE),
        ("joins a group", about([0; 16], 143), FINE),
        ("asks who is in a group", about([0; 16], 130), forged),
    ] {
        assert_eq!(judge(&v6(CLIENT6, 58, &payload), false), expected, "{what}");
    }
    let ports = |from: u16, to: u16| [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 8, 0, 0]].concat();
    for (from, to, in_v4, in_v6) in
        [(67, 68, forged, FINE), (68, 67, FINE, FINE), (547, 546, FINE, forged), (546, 547, FINE, FINE)]
    {
        assert_eq!(judge(&v4(CLIENT4, 17, &[], &ports(from, to)), false), in_v4, "{from} to {to}");
        assert_eq!(judge(&v6(CLIENT6, 17, &ports(from, to)), false), in_v6, "{from} to {to}");
        assert_eq!(judge(&v4(CLIENT4, 6, &[], &[&ports(from, to)[..], &[0; 12]].concat()), false), FINE);
    }
}

#[test]
fn a_partition_asks_for_others_and_claims_nothing() {
    const OWN: [u8; 4] = [10, 0, 0, 2];
    const GATEWAY: [u8; 4] = [169, 254, 1, 1];
    let judged = |operation: u8, sender: [u8; 4], target: [u8; 4]| {
        let packet =
            [&[0, 1, 8, 0, 6, 4, 0, operation, 2, 0, 0, 0, 0, 1], &sender[..], &[0; 6], &target].concat();
        let frame = [&[0; 14], &packet[..]].concat();
        arp(frame.as_slice(), |address| *address == mapped(OWN))
    };
    for (what, verdict) in [
        ("asks", judged(1, OWN, GATEWAY)),
        ("answers", judged(2, OWN, GATEWAY)),
        ("looks for duplicates", judged(1, [0; 4], OWN)),
    ] {
        assert_eq!(verdict, FINE, "{what}");
    }
    for (what, verdict) in [
        ("claims its own", judged(1, OWN, OWN)),
        ("claims by an answer", judged(2, OWN, OWN)),
        ("claims another's", judged(1, [10, 0, 0, 3], [10, 0, 0, 3])),
        ("asks as another", judged(1, [10, 0, 0, 3], GATEWAY)),
        ("answers for another", judged(2, [10, 0, 0, 3], GATEWAY)),
    ] {
        assert_eq!(verdict, Some(Verdict::ForgedControl), "{what}");
    }
    assert_eq!(arp(&[0; 30][..], |_| true), Some(Verdict::Malformed));
}
