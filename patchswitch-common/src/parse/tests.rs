//! What holds for the parser whatever the bytes are.

use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

/// Reads a frame as the programs do: network header, then transport.
fn read(frame: &[u8], v6: bool, out: bool) -> Result<(Network, Packet), Malformed> {
    let (mut network, mut packet) = (Network::EMPTY, Packet::EMPTY);
    if v6 {
        ipv6(frame, LINK_HEADER, &mut network)?;
    } else {
        ipv4(frame, LINK_HEADER, &mut network)?;
    }
    if out {
        outbound(frame, &network, &mut packet)?;
    } else {
        inbound(frame, &network, &mut packet)?;
    }
    Ok((network, packet))
}

/// A frame that says how far it was read.
struct Watched<'a> {
    bytes: &'a [u8],
    furthest: std::cell::Cell<usize>,
}

impl Octets for Watched<'_> {
    fn length(&self) -> u32 {
        self.bytes.length()
    }

    fn at<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let found = self.bytes.at(offset);
        self.furthest.set(self.furthest.get().max(offset as usize + N));
        found
    }
}

/// An IPv4 packet with options and a payload.
fn v4_frame(options: usize, proto: u8, place: u16, source: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let header = 20 + options * 4;
    let mut frame = vec![0; LINK_HEADER as usize];
    frame.extend([0x40 | (header / 4) as u8, 0]);
    frame.extend(((header + payload.len()) as u16).to_be_bytes());
    frame.extend([0x12, 0x34]);
    frame.extend(place.to_be_bytes());
    frame.extend([64, proto, 0, 0]);
    frame.extend(source);
    frame.extend([192, 0, 2, 80]);
    frame.extend(vec![1; options * 4]);
    frame.extend(payload);
    frame
}

/// An IPv6 packet with extension headers and a payload.
fn v6_frame(extensions: &[(u8, u8)], proto: u8, source: Address, payload: &[u8]) -> Vec<u8> {
    let mut chain: Vec<u8> = extensions.iter().map(|(number, _)| *number).collect();
    chain.push(proto);
    let mut body = Vec::new();
    for (i, (number, units)) in extensions.iter().enumerate() {
        // The length counts units of eight bytes beyond the first; of an authentication header, of four beyond two.
        let length =
            if *number == 51 { (usize::from(*units) + 2) * 4 } else { (usize::from(*units) + 1) * 8 };
        let mut header = vec![0; length];
        (header[0], header[1]) = (chain[i + 1], *units);
        body.extend(header);
    }
    body.extend(payload);
    let mut frame = vec![0; LINK_HEADER as usize];
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((body.len() as u16).to_be_bytes());
    frame.extend([chain[0], 64]);
    frame.extend(source);
    frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80]);
    frame.extend(body);
    frame
}

fn is_skipped(number: u8) -> bool {
    matches!(number, 0 | 43 | 44 | 51 | 60)
}

/// Extension headers that do not fragment, with lengths that fit together in units of eight bytes.
fn extension() -> impl Strategy<Value = (u8, u8)> {
    prop_oneof![
        (prop_oneof![Just(0_u8), Just(43), Just(60)], 0..4_u8),
        // An authentication header of a length that keeps what follows where it is.
        (Just(51_u8), 0..6_u8),
    ]
}

/// Protocols whose flows are told apart by ports.
fn with_ports() -> impl Strategy<Value = u8> {
    prop_oneof![
        Just(protocol::TCP),
        Just(protocol::UDP),
        Just(protocol::DCCP),
        Just(protocol::SCTP),
        Just(protocol::UDP_LITE),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), v6: bool, out: bool) {
        // No panic, and nothing beyond the end is taken for something.
        let result = read(&bytes, v6, out);
        if let Ok((network, _)) = result {
            let header = if v6 { 40 } else { 20 };
            prop_assert!(network.payload >= LINK_HEADER + header);
        }
    }

    #[test]
    fn bytes_that_look_like_packets_are_read_or_refused(
        mut bytes in prop::collection::vec(any::<u8>(), 54..200),
        next in prop_oneof![Just(0_u8), Just(1), Just(6), Just(17), Just(43), Just(44), Just(51), Just(58), Just(60)],
        v6: bool,
        out: bool,
    ) {
        bytes[14] = if v6 { 0x60 } else { 0x45 + (bytes[14] & 3) };
        bytes[if v6 { 20 } else { 23 }] = next;
        if let Ok((network, packet)) = read(&bytes, v6, out) {
            prop_assert_eq!(network.v6, v6);
            prop_assert!(packet.transport == Transport::Other || matches!(packet.flow.protocol, 6 | 17));
            prop_assert!(packet.flags == 0 || packet.kind == Kind::Direct && packet.transport == Transport::Tcp);
            prop_assert_eq!(packet.kind == Kind::LaterFragment, network.fragment == Fragment::Later);
        }
    }

    #[test]
    fn a_prefix_says_nothing_else_than_the_whole(
        bytes in prop::collection::vec(any::<u8>(), 54..160),
        ports in prop::array::uniform4(1_u8..),
        flags: u8,
        error: bool,
        v6: bool,
    ) {
        let payload = [&ports[..], &[0; 8], &[0x50, flags], &bytes].concat();
        let kind = if v6 { 1 } else { 3 };
        let icmp = if v6 { protocol::ICMPV6 } else { protocol::ICMP };
        let frame = |proto, payload: &[u8]| if v6 {
            v6_frame(&[(60, 0)], proto, [9; 16], payload)
        } else {
            v4_frame(2, proto, 0, [9; 4], payload)
        };
        let whole = if error {
            let inner = frame(protocol::UDP, &payload)[LINK_HEADER as usize..].to_vec();
            frame(icmp, &[&[kind, 0, 0, 0, 0, 0, 0, 0], &inner[..]].concat())
        } else {
            frame(protocol::TCP, &payload)
        };
        let all = read(&whole, v6, false);
        for length in 0..=whole.len() {
            match read(&whole[..length], v6, false) {
                Err(Malformed) => {}
                prefix => prop_assert_eq!(prefix, all),
            }
        }
    }

    #[test]
    fn no_more_is_read_than_there_is(bytes in prop::collection::vec(any::<u8>(), 0..120), v6: bool) {
        let watched = Watched { bytes: &bytes, furthest: std::cell::Cell::new(0) };
        let (mut network, mut packet) = (Network::EMPTY, Packet::EMPTY);
        let read = if v6 {
            ipv6(&watched, LINK_HEADER, &mut network)
        } else {
            ipv4(&watched, LINK_HEADER, &mut network)
        };
        if read.and_then(|()| inbound(&watched, &network, &mut packet)).is_ok() {
            prop_assert!(watched.furthest.get() <= bytes.len());
        }
    }

    #[test]
    fn options_do_not_change_the_flow(
        options in 0..=10_usize,
        source in any::<[u8; 4]>(),
        ports in prop::array::uniform4(1_u8..),
        flags: u8,
        tcp: bool,
    ) {
        let proto = if tcp { protocol::TCP } else { protocol::UDP };
        let payload = [&ports[..], &[0; 8], &[0x50, flags], &[0; 6]].concat();
        let (_, plain) = read(&v4_frame(0, proto, 0, source, &payload), false, false).unwrap();
        let (network, with) = read(&v4_frame(options, proto, 0, source, &payload), false, false).unwrap();
        prop_assert_eq!(with, plain);
        prop_assert_eq!(with.flow.remote, mapped(source));
        prop_assert_eq!(network.payload, LINK_HEADER + 20 + options as u32 * 4);
    }

    #[test]
    fn extension_headers_do_not_change_the_flow(
        extensions in prop::collection::vec(extension(), 0..=EXTENSION_HEADERS as usize),
        source in any::<[u8; 16]>(),
        ports in prop::array::uniform4(1_u8..),
        flags: u8,
        tcp: bool,
    ) {
        let proto = if tcp { protocol::TCP } else { protocol::UDP };
        let payload = [&ports[..], &[0; 8], &[0x50, flags], &[0; 6]].concat();
        let (_, plain) = read(&v6_frame(&[], proto, source, &payload), true, false).unwrap();
        let (_, with) = read(&v6_frame(&extensions, proto, source, &payload), true, false).unwrap();
        prop_assert_eq!(with, plain);
    }

    #[test]
    fn one_extension_header_too_many_is_refused(
        extensions in prop::collection::vec(extension(), EXTENSION_HEADERS as usize + 1..12),
    ) {
        let frame = v6_frame(&extensions, protocol::TCP, [1; 16], &[0; 20]);
        prop_assert_eq!(read(&frame, true, false), Err(Malformed));
    }

    #[test]
    fn an_answer_belongs_to_the_flow_of_its_question(
        source in any::<[u8; 4]>(),
        ports in prop::array::uniform4(1_u8..),
        proto in with_ports(),
    ) {
        let payload = |ports: [u8; 4]| [&ports[..], &[0; 8], &[0x50, 0x10], &[0; 6]].concat();
        let question = v4_frame(0, proto, 0, source, &payload(ports));
        let mut answer = v4_frame(0, proto, 0, [192, 0, 2, 80], &payload([ports[2], ports[3], ports[0], ports[1]]));
        answer[30..34].copy_from_slice(&source);
        let (question, answer) = (read(&question, false, false).unwrap().1, read(&answer, false, true).unwrap().1);
        prop_assert_eq!(question.flow, answer.flow);
    }

    #[test]
    fn an_error_belongs_to_the_flow_of_what_it_quotes(
        remote in any::<[u8; 4]>(),
        router in any::<[u8; 4]>(),
        ports in prop::array::uniform4(1_u8..),
        kind in prop_oneof![Just(3_u8), Just(11), Just(12)],
        proto in with_ports(),
    ) {
        let swapped = [ports[2], ports[3], ports[0], ports[1]];
        let question = v4_frame(0, proto, 0, remote, &[&ports[..], &[0; 8], &[0x50, 0x10], &[0; 6]].concat());
        let mut answer = v4_frame(0, proto, 0, [192, 0, 2, 80], &[&swapped[..], &[0; 16]].concat());
        answer[30..34].copy_from_slice(&remote);
        // Header and eight bytes (RFC 792).
        let quoted = &answer[LINK_HEADER as usize..LINK_HEADER as usize + 28];
        let error = v4_frame(0, protocol::ICMP, 0, router, &[&[kind, 0, 0, 0, 0, 0, 0, 0], quoted].concat());
        let (question, error) = (read(&question, false, false).unwrap().1, read(&error, false, false).unwrap().1);
        prop_assert_eq!(error.kind, Kind::Error);
        prop_assert_eq!(question.flow, error.flow);
        prop_assert_eq!(question.flow.remote_port, u16::from_ne_bytes([ports[0], ports[1]]));
        prop_assert_eq!(question.transport, error.transport);
    }

    #[test]
    fn what_pads_a_frame_is_no_part_of_the_packet(
        payload in prop::collection::vec(any::<u8>(), 0..60),
        proto in prop_oneof![Just(protocol::ICMP), Just(protocol::ICMPV6), with_ports()],
        kind in prop_oneof![Just(3_u8), Just(1), Just(11), any::<u8>()],
        padding in prop::collection::vec(any::<u8>(), 1..60),
        v6: bool,
        out: bool,
    ) {
        let payload = [&[kind], &payload[..]].concat();
        let plain = if v6 {
            v6_frame(&[], proto, [1; 16], &payload)
        } else {
            v4_frame(0, proto, 0, [1; 4], &payload)
        };
        let padded = [&plain[..], &padding].concat();
        prop_assert_eq!(read(&padded, v6, out), read(&plain, v6, out));
    }

    #[test]
    fn an_error_that_quotes_less_than_a_header_tells_of_nothing(
        quoted in 0..20_usize,
        later: bool,
        padding in 0..60_usize,
    ) {
        let place = if later { 100 } else { 0 };
        let inner = v4_frame(0, protocol::UDP, place, [192, 0, 2, 80], &[9; 8]);
        let inner = &inner[LINK_HEADER as usize..LINK_HEADER as usize + 20];
        let message = [&[3, 4, 0, 0, 0, 0, 5, 0], &inner[..quoted]].concat();
        let error = [v4_frame(0, protocol::ICMP, 0, [1; 4], &message), inner[quoted..].to_vec(), vec![0; padding]];
        prop_assert_eq!(read(&error.concat(), false, false), Err(Malformed));
    }

    #[test]
    fn a_fragment_is_first_or_later_and_its_ports_are_read_only_once(place in any::<u16>(), ports in prop::array::uniform4(1_u8..)) {
        let payload = [&ports[..], &[0; 16]].concat();
        let (network, packet) = read(&v4_frame(0, protocol::UDP, place, [1; 4], &payload), false, false).unwrap();
        let expected = match (place & 0x1fff, place & 0x2000) {
            (0, 0) => Fragment::Whole,
            (0, _) => Fragment::First,
            _ => Fragment::Later,
        };
        prop_assert_eq!(network.fragment, expected);
        let later = expected == Fragment::Later;
        prop_assert_eq!(packet.kind == Kind::LaterFragment, later);
        prop_assert_eq!(packet.flow.remote_port != 0, !later && ports[..2] != [0, 0]);
        prop_assert_eq!(packet.fragment_id != 0, expected != Fragment::Whole);
    }
}

#[test]
fn what_is_skipped_is_what_the_standard_calls_an_extension_header() {
    // RFC 8200 section 4, without "no next header", which ends the chain, and ESP, which hides it.
    for number in 0..=255_u8 {
        let frame = v6_frame(&[], number, [1; 16], &[6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut network = Network::EMPTY;
        let read = ipv6(&frame[..], LINK_HEADER, &mut network);
        let skipped = read == Err(Malformed) || network.payload > LINK_HEADER + 40;
        assert_eq!(skipped, is_skipped(number), "{number}");
    }
}
