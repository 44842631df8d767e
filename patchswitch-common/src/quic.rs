//! Connection ids of QUIC (RFC 9000): a client may go on from another address, and only its connection id tells who has
//! the connection.
//!
//! A server chooses the ids by which it is addressed. Those who run more than one of it put into them whose they are; where
//! that is and which bits of it count is declared for a service. It is seen in what a server sends while a connection is
//! made (its own id is the source there), and in every later packet of the client (it is the destination there).

use crate::maps::{CID, FlowKey, OF_CID, Settings};
use crate::parse::{Flow, Octets, protocol};

/// Length of a UDP header.
const UDP_HEADER: u32 = 8;
/// The bit of the first byte that tells a long header (RFC 9000 17.2).
const LONG: u8 = 0x80;
/// Where a long header has the length of the destination's id, behind type and version.
const DESTINATION: u32 = 5;
/// The longest id of version 1 (RFC 9000 17.2).
const LONGEST: u32 = 20;

/// Whether a flow is one of QUIC whose ids are known.
#[inline(always)]
pub fn is_quic(settings: &Settings, flow: &Flow) -> bool {
    settings.quic_port != 0 && flow.protocol == protocol::UDP && flow.local_port == settings.quic_port
}

/// Whether each datagram of a flow stands for itself.
#[inline(always)]
pub fn is_stateless(settings: &Settings, flow: &Flow) -> bool {
    let [a, b, c, d, e, f, g, h] = settings.stateless;
    let port = flow.local_port;
    flow.protocol == protocol::UDP
        && port != 0
        && (port == a
            || port == b
            || port == c
            || port == d
            || port == e
            || port == f
            || port == g
            || port == h)
}

/// Whose a client's datagram is, as its connection id tells: the key of a learned flow. Only a packet with a short header
/// has an id that the server chose; `at` is where the UDP header is.
#[inline(always)]
pub fn of_client<O: Octets + ?Sized>(octets: &O, at: u32, settings: &Settings) -> Option<FlowKey> {
    let [first] = octets.at(at + UDP_HEADER)?;
    if first & LONG != 0 {
        return None;
    }
    key(octets, at + UDP_HEADER + 1, settings)
}

/// The same of a server's datagram that makes a connection.
#[inline(always)]
pub fn of_server<O: Octets + ?Sized>(octets: &O, at: u32, settings: &Settings) -> Option<FlowKey> {
    let quic = at + UDP_HEADER;
    let [first] = octets.at(quic)?;
    let [length] = octets.at(quic + DESTINATION)?;
    // A version that says nothing (RFC 9000 17.2.1) is followed by others, and by no id of the server's choice.
    let version: [u8; 4] = octets.at(quic + 1)?;
    if first & LONG == 0 || u32::from(length) > LONGEST || version == [0; 4] {
        return None;
    }
    let source = quic + DESTINATION + 1 + (u32::from(length) & 0x1f);
    let [own] = octets.at(source)?;
    if own < settings.cid_offset.saturating_add(settings.cid_len) {
        return None;
    }
    key(octets, source + 1, settings)
}

/// The part of an id that counts, as a key. Read are as many bytes as a part may have: behind an id there are more than
/// these in any packet (RFC 9001 5.4.2).
#[inline(always)]
fn key<O: Octets + ?Sized>(octets: &O, id: u32, settings: &Settings) -> Option<FlowKey> {
    let bytes: [u8; CID] = octets.at(id + u32::from(settings.cid_offset))?;
    let part = (u128::from_ne_bytes(bytes) & u128::from_ne_bytes(settings.cid_mask)).to_ne_bytes();
    Some(FlowKey {
        remote: part,
        remote_port: 0,
        local_port: settings.quic_port,
        protocol: OF_CID,
        pad: [0; 3],
    })
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    const AT: u32 = 34;
    /// At least as much is behind an id.
    const REST: &[u8] = &[0x5a; 20];

    fn settings(offset: u8, len: u8, mask: u8) -> Settings {
        let port = 443_u16.to_be();
        let mut cid_mask = [0; CID];
        cid_mask[..usize::from(len)].fill(mask);
        Settings { quic_port: port, cid_offset: offset, cid_len: len, cid_mask, ..Settings::default() }
    }

    fn datagram(quic: &[u8]) -> Vec<u8> {
        [&[0; AT as usize + UDP_HEADER as usize], quic].concat()
    }

    fn long(destination: &[u8], source: &[u8]) -> Vec<u8> {
        let lengths = [destination.len(), source.len()].map(|length| u8::try_from(length).unwrap());
        datagram(&[&[0xc3, 0, 0, 0, 1, lengths[0]], destination, &[lengths[1]], source, REST].concat())
    }

    fn short(destination: &[u8]) -> Vec<u8> {
        datagram(&[&[0x43], destination, REST].concat())
    }

    #[test]
    fn a_client_is_known_by_the_part_that_the_server_gave_it() {
        for (offset, len, mask) in [(0, 8, 0xff), (2, 3, 0xff), (0, 16, 0xff), (1, 1, 0x80)] {
            let settings = settings(offset, len, mask);
            let id: Vec<u8> = (0x71..0x71 + 18).collect();
            for destination in [&[][..], b"8 bytes.", &[7; 20]] {
                let made = of_server(&long(destination, &id)[..], AT, &settings).unwrap();
                assert_eq!(of_client(&short(&id)[..], AT, &settings), Some(made), "{offset} {len} {mask}");
                assert_eq!((made.protocol, made.local_port), (OF_CID, settings.quic_port));
            }
            let mut other = id.clone();
            other[usize::from(offset)] ^= mask;
            assert_ne!(
                of_client(&short(&other)[..], AT, &settings),
                of_client(&short(&id)[..], AT, &settings)
            );
        }
    }

    #[test]
    fn bits_that_do_not_count_are_none_of_the_key() {
        let settings = settings(0, 2, 0xf0);
        let key = |id: &[u8]| of_client(&short(id)[..], AT, &settings);
        assert_eq!(key(b"\x12\x34\x56"), key(b"\x1f\x3f\xff"));
        assert_ne!(key(b"\x12\x34"), key(b"\x22\x34"));
    }

    #[test]
    fn what_is_cut_off_or_has_another_form_tells_nothing() {
        let settings = settings(2, 4, 0xff);
        let (whole, id) = (long(b"client", b"server"), short(b"server"));
        assert!(of_server(&whole[..], AT, &settings).is_some());
        // Sixteen bytes from the third of an id on.
        for length in 0..whole.len() - REST.len() + 12 {
            assert_eq!(of_server(&whole[..length], AT, &settings), None, "{length}");
        }
        for length in 0..id.len() - REST.len() + 12 {
            assert_eq!(of_client(&id[..length], AT, &settings), None, "{length}");
        }
        assert_eq!(of_server(&long(b"client", b"short")[..], AT, &settings), None, "not as long as declared");
        assert_eq!(of_server(&long(&[0; 21], b"server")[..], AT, &settings), None, "longer than there are");
        assert_eq!(of_server(&id[..], AT, &settings), None);
        assert_eq!(of_client(&whole[..], AT, &settings), None);
        let mut negotiation = whole;
        negotiation[AT as usize + 9..AT as usize + 13].fill(0);
        assert_eq!(of_server(&negotiation[..], AT, &settings), None);
    }

    #[test]
    fn only_declared_ports_are_of_quic_or_stateless() {
        let flow = |protocol, port: u16| Flow {
            remote: [1; 16],
            local: [2; 16],
            remote_port: 9,
            local_port: port.to_be(),
            protocol,
        };
        let mut settings = settings(0, 8, 0xff);
        settings.stateless[7] = 53_u16.to_be();
        assert!(is_quic(&settings, &flow(17, 443)) && is_stateless(&settings, &flow(17, 53)));
        for other in [flow(6, 443), flow(17, 444), flow(17, 0), flow(6, 53)] {
            assert!(!is_quic(&settings, &other) && !is_stateless(&settings, &other), "{other:?}");
        }
        assert!(!is_quic(&Settings::default(), &flow(17, 0)));
    }
}
