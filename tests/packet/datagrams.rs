//! Datagrams whose flows are told by more than addresses and ports: QUIC by its connection ids, and ports that have no
//! flows at all.

use patchswitch_common::Slot;
use patchswitch_common::maps::{CID, Settings};
use patchswitch_common::word::Word;

use crate::bench::{Bench, DROP, Family, NEXT, PORT, REDIRECT, families, key};
use crate::frame::{self, Ip, udp};
use crate::steer::DRAINING;

/// As they begin: the first eight bytes are of the server's process.
const OF_A: &[u8] = b"server-A-1234567";
const OF_B: &[u8] = b"server-B-1234567";

fn quic(settings: Settings) -> Settings {
    let mut cid_mask = [0; CID];
    cid_mask[..8].fill(0xff);
    Settings { quic_port: PORT.to_be(), cid_offset: 0, cid_len: 8, cid_mask, ..settings }
}

/// What makes a connection: with the ids of both ends.
fn long(destination: &[u8], source: &[u8]) -> Vec<u8> {
    let lengths = [destination.len(), source.len()].map(|length| u8::try_from(length).unwrap_or(u8::MAX));
    [&[0xe0, 0, 0, 0, 1, lengths[0]], destination, &[lengths[1]], source, b"handshake, and more of it"]
        .concat()
}

fn short(destination: &[u8]) -> Vec<u8> {
    [&[0x40], destination, b"data of some length."].concat()
}

fn to_service(family: Family, port: u16, payload: &[u8]) -> Ip {
    udp((family.client, port), (family.service, PORT), payload)
}

fn from_service(from: std::net::IpAddr, family: Family, port: u16, payload: &[u8]) -> Ip {
    udp((from, PORT), (family.client, port), payload)
}

#[test]
fn a_client_of_quic_that_moves_stays_where_its_connection_is() {
    let mut bench = Bench::new("quic").unwrap();
    bench.declare(quic).unwrap();
    for family in families() {
        bench.word(Word::steady(Slot::A, 1).with_learning(true)).unwrap();
        let made =
            bench.partition(Slot::A, &from_service(family.service, family, 1000, &long(b"client", OF_A)));
        assert_eq!(made.unwrap().counted, ["learned", "out"]);
        bench.word(DRAINING).unwrap();
        for short_way in [true, false] {
            bench.short_way(short_way).unwrap();
            let port = 2000 + u16::from(short_way);
            for (payload, verdict, what) in [
                (short(OF_B), "to_b", "an id of the other side"),
                (long(OF_A, b"client"), "to_b", "a new connection, whose id is the client's choice"),
                (short(OF_A)[..10].to_vec(), "to_b", "an id that is cut off"),
                (Vec::new(), "to_b", "nothing"),
            ] {
                let seen = bench.client(&to_service(family, port, &payload)).unwrap();
                assert_eq!((seen.action, &seen.counted[..]), (REDIRECT, &[verdict][..]), "{what}");
            }
            let seen = bench.client(&to_service(family, port, &short(OF_A))).unwrap();
            assert_eq!(seen.counted, ["kept_by_retiring", "moved", "to_a"], "another port");
            // From then on the flow is known, and so are the answers that are to be rewritten.
            let seen = bench.client(&to_service(family, port, &short(OF_B))).unwrap();
            assert_eq!(seen.counted, ["kept_by_retiring", "to_a"], "its flow");
        }
        bench.word(DRAINING.with_notice(true)).unwrap();
        let seen = bench.partition(Slot::A, &from_service(family.own_a, family, 2000, &short(b"client")));
        let rewritten = if family.client.is_ipv4() { "rewritten_v4" } else { "rewritten_v6" };
        assert_eq!(seen.unwrap().counted, ["learned", "out", rewritten]);
        bench.forget().unwrap();
        bench.word(DRAINING).unwrap();
        let seen = bench.client(&to_service(family, 3000, &short(OF_A))).unwrap();
        assert_eq!(seen.counted, ["to_b"], "forgotten");
    }
    bench.finish().unwrap();
}

/// Where in an id those of a layout are who made it, and by which bits.
struct Layout {
    offset: u8,
    mask: &'static [u8],
}

/// A whole byte, several, as many as there may be, at the start, inside and at the very end, and parts of bytes.
const LAYOUTS: [Layout; 6] = [
    Layout { offset: 0, mask: &[0xff] },
    Layout { offset: 3, mask: &[0xff; 5] },
    Layout { offset: 4, mask: &[0xff; 16] },
    Layout { offset: 1, mask: &[0x80] },
    Layout { offset: 2, mask: &[0x0f, 0xf0, 0x01] },
    Layout { offset: 19, mask: &[0x3c] },
];
/// As long as an id may be (RFC 9000 17.2).
const ID: [u8; 20] = *b"as long as it may be";

impl Layout {
    fn declare(&self, settings: Settings) -> Settings {
        let mut cid_mask = [0; CID];
        cid_mask[..self.mask.len()].copy_from_slice(self.mask);
        let cid_len = self.mask.len().try_into().unwrap_or(u8::MAX);
        Settings { quic_port: PORT.to_be(), cid_offset: self.offset, cid_len, cid_mask, ..settings }
    }

    /// The id with one bit changed, for each of its bits, and whether that bit counts.
    fn changed(&self) -> impl Iterator<Item = (Vec<u8>, bool)> {
        (0..ID.len() * 8).map(|bit| {
            let (byte, bit) = (bit / 8, 1_u8 << (bit % 8));
            let mut id = ID.to_vec();
            id[byte] ^= bit;
            let at = byte.checked_sub(usize::from(self.offset));
            let counts = at.and_then(|at| self.mask.get(at)).is_some_and(|mask| mask & bit != 0);
            (id, counts)
        })
    }
}

#[test]
fn every_bit_of_an_id_counts_as_it_is_declared() {
    let mut bench = Bench::new("quicbits").unwrap();
    for (number, layout) in LAYOUTS.iter().enumerate() {
        bench.declare(|settings| layout.declare(settings)).unwrap();
        for family in families() {
            let made = from_service(family.service, family, 1000, &long(b"client", &ID));
            let (mut kept, mut other) = (0, 0);
            for (at, (id, counts)) in [(ID.to_vec(), false)].into_iter().chain(layout.changed()).enumerate() {
                bench.word(Word::steady(Slot::A, 1).with_learning(true)).unwrap();
                assert_eq!(bench.partition(Slot::A, &made).unwrap().counted, ["learned", "out"]);
                bench.word(DRAINING).unwrap();
                bench.short_way(at % 2 == 0).unwrap();
                let seen = bench.client(&to_service(family, 2000, &short(&id))).unwrap();
                let wanted = if counts { &["to_b"][..] } else { &["kept_by_retiring", "moved", "to_a"] };
                assert_eq!(seen.counted, wanted, "layout {number}: {id:02x?} of {ID:02x?}");
                *(if counts { &mut other } else { &mut kept }) += 1;
                bench.forget().unwrap();
            }
            let bits: u32 = layout.mask.iter().map(|mask| mask.count_ones()).sum();
            assert_eq!((other, kept), (bits, 161 - bits), "layout {number}");
            // An id that ends before the part that counts is none of the declared form.
            let short_id = &ID[..usize::from(layout.offset) + layout.mask.len() - 1];
            bench.word(Word::steady(Slot::A, 1).with_learning(true)).unwrap();
            let made = from_service(family.service, family, 1000, &long(b"client", short_id));
            assert_eq!(bench.partition(Slot::A, &made).unwrap().counted, ["learned", "out"]);
            bench.word(DRAINING).unwrap();
            let seen = bench.client(&to_service(family, 2000, &short(&ID))).unwrap();
            assert_eq!(seen.counted, ["to_b"], "layout {number}: shorter than declared");
            bench.forget().unwrap();
        }
    }
    bench.finish().unwrap();
}

#[test]
fn what_is_not_declared_is_not_looked_into() {
    let mut bench = Bench::new("noquic").unwrap();
    for family in families() {
        bench.word(Word::steady(Slot::A, 1).with_learning(true)).unwrap();
        bench
            .partition(Slot::A, &from_service(family.service, family, 1000, &long(b"client", OF_A)))
            .unwrap();
        bench.word(DRAINING).unwrap();
        let seen = bench.client(&to_service(family, 2000, &short(OF_A))).unwrap();
        assert_eq!(seen.counted, ["to_b"]);
        let seen = bench.client(&to_service(family, 1000, &short(OF_B))).unwrap();
        assert_eq!(seen.counted, ["kept_by_retiring", "to_a"], "a flow as any other");
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

#[test]
fn a_stateless_port_has_no_flows() {
    let mut bench = Bench::new("stateless").unwrap();
    for family in families() {
        let flow = key((family.client, 1000), PORT, frame::UDP);
        bench
            .declare(|settings| Settings { stateless: [0, 0, 0, PORT.to_be(), 0, 0, 0, 0], ..settings })
            .unwrap();
        bench.word(Word::steady(Slot::A, 1).with_learning(true)).unwrap();
        let seen = bench.partition(Slot::A, &from_service(family.service, family, 1000, b"answer")).unwrap();
        assert_eq!(
            (seen.counted, bench.remembered(flow).unwrap()),
            (vec!["out"], None),
            "nothing is remembered"
        );
        bench.remember(flow, family.service, Slot::A, 0).unwrap();
        bench.word(DRAINING.with_notice(true)).unwrap();
        for short_way in [true, false] {
            bench.short_way(short_way).unwrap();
            let seen = bench.client(&to_service(family, 1000, b"question")).unwrap();
            assert_eq!(seen.counted, ["to_b"], "also one that was a flow before");
        }
        bench.short_way(true).unwrap();
        bench.forget().unwrap();
        // What was under way at the switch is answered with the service's address all the same.
        let answer = from_service(family.own_a, family, 4000, b"answer");
        let seen = bench.partition(Slot::A, &answer).unwrap();
        let rewritten = if family.client.is_ipv4() { "rewritten_v4" } else { "rewritten_v6" };
        assert_eq!((seen.action, &seen.counted[..]), (REDIRECT, &["out", rewritten][..]));
        let expected = from_service(family.service, family, 4000, b"answer").frame(bench.links[0].mac);
        assert_eq!(seen.frame, expected, "with the service's address and right sums");
        assert_eq!(bench.remembered(key((family.client, 4000), PORT, frame::UDP)).unwrap(), None);
        let other = udp((family.own_a, PORT + 1), (family.client, 4000), b"own business");
        assert_eq!(bench.partition(Slot::A, &other).unwrap().action, NEXT, "another port's");
        let forged = from_service(family.own_b, family, 4000, b"answer");
        assert_eq!(bench.partition(Slot::A, &forged).unwrap().action, DROP);
    }
    bench.finish().unwrap();
}
