//! What has something odd in it that is its owner's to judge: it gets it, and as it came.

use std::net::IpAddr;
use std::time::Duration;

use patchswitch_common::Slot;

use crate::bench::{Bench, Family, PORT, REDIRECT, families, key};
use crate::frame::{self, Ip, icmp, sctp, seal, udp};
use crate::steer::{DRAINING, STEADY, check};

/// Longer ago than a flow is remembered on the bench.
const LONG_AGO: Duration = Duration::from_secs(11);

/// Without a sum a datagram is right over IPv4 and wrong over IPv6 (RFC 8200 8.1): that is not for the programs to judge.
#[test]
fn a_datagram_without_a_sum_is_its_owners() {
    let mut bench = Bench::new("nosum").unwrap();
    for family in families() {
        bench.remember(key((family.client, 1000), PORT, frame::UDP), family.service, Slot::A, 0).unwrap();
        let without = |port| {
            let mut packet = udp((family.client, port), (family.service, PORT), b"question");
            packet.payload[6..8].fill(0);
            packet
        };
        for (word, port, counted) in [
            (STEADY, 1000, &["to_a"][..]),
            (DRAINING, 1000, &["to_a", "kept_by_retiring"]),
            (DRAINING, 1001, &["to_b"]),
        ] {
            bench.word(word).unwrap();
            for is_open in [true, false] {
                bench.short_way(is_open).unwrap();
                // That nothing of it is changed is looked at there.
                check(&bench.client(&without(port)).unwrap(), REDIRECT, counted, "no sum");
            }
        }
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

/// The first chunk of an association, or its answer, with the addresses under which its sender is reached as well
/// (RFC 9260 3.3.2.1).
fn init(kind: u8, addresses: &[IpAddr]) -> Vec<u8> {
    let mut parameters = Vec::new();
    for address in addresses {
        match address {
            IpAddr::V4(v4) => parameters.extend([&[0, 5, 0, 8][..], &v4.octets()].concat()),
            IpAddr::V6(v6) => parameters.extend([&[0, 6, 0, 20][..], &v6.octets()].concat()),
        }
    }
    let fixed = [0, 0, 0, 7, 0, 1, 0, 0, 0, 10, 0, 10, 0, 0, 0, 1];
    let length = (4 + fixed.len() + parameters.len()) as u16;
    [&[kind, 0][..], &length.to_be_bytes(), &fixed, &parameters].concat()
}

/// The packet that it is alone in. Who begins knows no tag of the other one yet.
fn begins(from: (IpAddr, u16), to: (IpAddr, u16), kind: u8, addresses: &[IpAddr]) -> Ip {
    let mut packet = sctp(from, to, &init(kind, addresses));
    if kind == INIT {
        packet.payload[4..8].fill(0);
    }
    packet
}

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;

fn everywhere(of: impl Fn(Family) -> IpAddr) -> Vec<IpAddr> {
    families().map(of).to_vec()
}

/// An association goes by its ports. The addresses that it names are told as they are, the partition's own as well: a
/// client that tries them comes to the retiring partition by the right one and to nobody by another.
#[test]
fn an_association_that_names_more_addresses_is_passed_on_as_it_is() {
    let mut bench = Bench::new("multihomed").unwrap();
    for family in families() {
        let (client, service) = ((family.client, 1000), (family.service, PORT));
        let kept = &["to_a", "kept_by_retiring"][..];
        let clients = everywhere(|family| family.client);
        let first = begins(client, service, INIT, &clients);
        bench.word(STEADY).unwrap();
        check(&bench.client(&first).unwrap(), REDIRECT, &["to_a"], "in peace");
        bench.word(DRAINING).unwrap();
        check(&bench.client(&first).unwrap(), REDIRECT, &["to_b"], "a new one");
        bench.remember(key(client, PORT, frame::SCTP), family.service, Slot::A, 0).unwrap();
        check(&bench.client(&first).unwrap(), REDIRECT, kept, "of the retiring one");
        let other = begins((family.client, 1001), service, INIT, &clients);
        check(&bench.client(&other).unwrap(), REDIRECT, &["to_b"], "other ports");
        // Of the answer nothing changes but the source of the packet: not its addresses, not the sum of SCTP.
        bench.word(DRAINING.with_notice(true)).unwrap();
        let own = everywhere(|family| family.own_a);
        let answer = begins((family.own_a, PORT), client, INIT_ACK, &own);
        let seen = bench.partition(Slot::A, &answer).unwrap();
        let rewritten = if family.client.is_ipv4() { "rewritten_v4" } else { "rewritten_v6" };
        check(&seen, REDIRECT, &["out", rewritten, "learned"], "its answer");
        let wanted = Ip { from: family.service, ..answer };
        assert_eq!(seen.frame, wanted.frame(bench.links[0].mac));
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

/// What a partition asks itself is remembered as what it answers is: by what it sends.
#[test]
fn answers_to_a_partitions_own_echo_come_back_to_it() {
    let mut bench = Bench::new("ownecho").unwrap();
    for family in families() {
        let v4 = family.client.is_ipv4();
        let (request, answer) = if v4 { (8, 0) } else { (128, 129) };
        let ping = |from, id| icmp(from, family.client, request, [0, id, 0, 1], b"ping");
        let pong = |id| icmp(family.client, family.service, answer, [0, id, 0, 1], b"ping");
        bench.word(STEADY.with_learning(true)).unwrap();
        let seen = bench.partition(Slot::A, &ping(family.service, 7)).unwrap();
        check(&seen, REDIRECT, &["out", "learned"], "it asks");
        check(&bench.client(&pong(7)).unwrap(), REDIRECT, &["to_a"], "in peace");
        bench.word(DRAINING.with_notice(true)).unwrap();
        let kept = &["to_a", "kept_by_retiring"][..];
        check(&bench.client(&pong(7)).unwrap(), REDIRECT, kept, "while it retires");
        check(&bench.client(&pong(8)).unwrap(), REDIRECT, &["to_b"], "the answer to nobody's question");
        // It goes on asking, under the one address or the other.
        let seen = bench.partition(Slot::A, &ping(family.service, 7)).unwrap();
        check(&seen, REDIRECT, &["out", "learned"], "it asks again");
        let packet = ping(family.own_a, 7);
        let seen = bench.partition(Slot::A, &packet).unwrap();
        let rewritten = if v4 { "rewritten_v4" } else { "rewritten_v6" };
        check(&seen, REDIRECT, &["out", rewritten, "learned"], "under its own address");
        let mut wanted = Ip { from: family.service, ..packet };
        seal(&mut wanted, 2);
        assert_eq!(seen.frame, wanted.frame(bench.links[0].mac));
        check(&bench.client(&pong(7)).unwrap(), REDIRECT, kept, "as before");
        let (flow, ago) = (key((family.client, 7), 0, packet_protocol(v4)), LONG_AGO.as_nanos() as u64);
        bench.remember(flow, family.service, Slot::A, ago).unwrap();
        check(&bench.client(&pong(7)).unwrap(), REDIRECT, &["to_b"], "long after");
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

fn packet_protocol(v4: bool) -> u8 {
    if v4 { frame::ICMP } else { frame::ICMPV6 }
}
