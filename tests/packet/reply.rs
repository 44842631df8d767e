//! What a partition sends: who may, what is learned of it, what is rewritten, and where it goes.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use patchswitch::dataplane::probe_mark;
use patchswitch_common::Slot;
use patchswitch_common::verdict::{AGAIN_MARK, Hook};
use patchswitch_common::word::Word;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with};

use crate::bench::{
    Bench, DROP, Family, IDLE_NS, LEARNED, NEXT, PORT, REDIRECT, Seen, families, key, service,
};
use crate::frame::{self, Ip, Place, ethernet, finish, icmp, payload_sum, sctp, seal, sum, tcp, udp};
use crate::steer::{ACK, DRAINING, SYN};

const STEADY: Word = Word::steady(Slot::A, 1);

fn check(seen: &Seen, action: i32, counted: &[&str], what: &str) {
    let mut counted = counted.to_vec();
    counted.sort_unstable();
    assert_eq!((seen.action, seen.counted.as_slice()), (action, counted.as_slice()), "{what}");
}

fn reply(from: IpAddr, family: Family) -> Ip {
    udp((from, PORT), (family.client, 1000), b"answer")
}

#[test]
fn a_partition_sends_under_its_own_addresses_only() {
    let mut bench = Bench::new("source").unwrap();
    bench.word(STEADY).unwrap();
    for family in families() {
        for (what, from, to, action, verdict) in [
            ("the service to a client", family.service, family.client, REDIRECT, "out"),
            ("the service to the host", family.service, family.host, NEXT, "out_by_stack"),
            ("its own", family.own_a, family.client, NEXT, "out_by_stack"),
            ("the other partition's own", family.own_b, family.client, DROP, "spoofed"),
            ("the host's", family.host, family.client, DROP, "spoofed"),
            ("a stranger's", family.stranger, family.client, DROP, "spoofed"),
            ("the client's", family.client, family.client, DROP, "spoofed"),
        ] {
            let packet = udp((from, PORT), (to, 1000), b"x");
            let seen = bench.partition(Slot::A, &packet).unwrap();
            check(&seen, action, &[verdict], what);
            assert_eq!(seen.frame, packet.frame(bench.links[0].mac));
        }
    }
    let [_, v6] = families();
    let link_local: IpAddr = "fe80::2".parse().unwrap();
    for from in [link_local, IpAddr::from([0_u16; 8])] {
        let packet = icmp(from, "ff02::16".parse().unwrap(), 143, [0; 4], &[0; 20]);
        check(&bench.partition(Slot::A, &packet).unwrap(), NEXT, &["out_by_stack"], "of the link");
    }
    // Addresses of IPv4 in packets of IPv6: the flow of such a packet would be one of IPv4.
    let [v4, _] = families();
    let mapped = |address: IpAddr| match address {
        IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
        v6 => v6,
    };
    for (from, to) in
        [(v4.service, v4.client), (v4.own_a, v4.client), (v4.service, v6.client), (v6.service, v4.client)]
    {
        let packet = udp((mapped(from), PORT), (mapped(to), 1000), b"x");
        check(&bench.partition(Slot::A, &packet).unwrap(), DROP, &["martian"], "mapped");
    }
    // IPv4 has nothing of the kind.
    for from in ["169.254.7.7", "0.0.0.0"] {
        let packet = udp((from.parse().unwrap(), 68), (v4.client, 67), b"x");
        check(&bench.partition(Slot::A, &packet).unwrap(), DROP, &["spoofed"], from);
    }
    let mac = bench.links[0].mac;
    let other = bench.run(Hook::FromPartition, bench.links[0], 0, &ethernet(mac, 0x88b5, &[0; 46])).unwrap();
    check(&other, NEXT, &["not_ours"], "no IP");
    let elsewhere = reply(v6.service, v6).frame(bench.uplink.mac);
    let seen = bench.run(Hook::FromPartition, bench.uplink, 0, &elsewhere).unwrap();
    check(&seen, NEXT, &["not_ours"], "a link of nobody's");
    let mut bad = reply(v4.service, v4).frame(mac);
    bad[frame::ETHERNET] = 0x44;
    let seen = bench.run(Hook::FromPartition, bench.links[0], 0, &bad).unwrap();
    check(&seen, DROP, &["malformed"], "a header of four words");
    bench.finish().unwrap();
}

#[test]
fn a_standby_answers_probes_and_is_mute_otherwise() {
    let mut bench = Bench::new("quarantine").unwrap();
    bench.word(STEADY).unwrap();
    for family in families() {
        // A probe on its way: bound to the standby's link, in SYN_SENT.
        let open = |device: Option<&str>, port: u16| {
            bench.lab.host.enter(|| {
                let kind = if family.client.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = socket_with(kind, SocketType::STREAM, flags, Some(ipproto::TCP))?;
                let socket = socket2::Socket::from(socket);
                socket.bind_device(device.map(str::as_bytes))?;
                bind(&socket, &SocketAddr::new(family.host, port))?;
                let width = if family.client.is_ipv4() { 32 } else { 128 };
                bench.lab.host.ip(&format!("route replace {}/{width} dev lcb metric 9", family.service))?;
                let done = connect(&socket, &service(family));
                anyhow::ensure!(done == Err(rustix::io::Errno::INPROGRESS), "{done:?}");
                Ok(socket)
            })
        };
        let (_probe, _other) = (open(Some("lcb"), 6000).unwrap(), open(None, 6001).unwrap());
        let answer = |port| tcp((family.service, PORT), (family.host, port), SYN | ACK, b"");
        let seen = bench.partition(Slot::B, &answer(6000)).unwrap();
        check(&seen, NEXT, &["probe"], "the answer to a probe");
        assert_eq!(seen.mark, probe_mark(Slot::B), "for the check of the way back");
        for (what, packet) in [
            ("the answer to somebody else's connection", answer(6001)),
            ("a segment of no connection", answer(6002)),
            ("a segment to a client", tcp((family.service, PORT), (family.client, 1000), ACK, b"x")),
            ("a datagram", udp((family.service, PORT), (family.host, 6000), b"x")),
            ("a datagram from its own address", udp((family.own_b, PORT), (family.client, 1), b"x")),
            (
                "an echo",
                icmp(family.service, family.host, if family.host.is_ipv4() { 8 } else { 128 }, [0; 4], b"x"),
            ),
        ] {
            let seen = bench.partition(Slot::B, &packet).unwrap();
            check(&seen, DROP, &["quarantined"], what);
            assert_eq!(seen.mark, 0, "{what}");
        }
    }
    bench.finish().unwrap();
}

#[test]
fn what_the_host_would_not_take_here_comes_in_where_its_route_points() {
    let mut bench = Bench::new("again").unwrap();
    bench.word(DRAINING).unwrap();
    for family in families() {
        // The host's route for the service leads to the first partition.
        let packet = tcp((family.service, PORT), (family.host, 1000), ACK, b"x");
        let seen = bench.partition(Slot::A, &packet).unwrap();
        check(&seen, NEXT, &["out_by_stack"], "from where the route points");
        assert_eq!(seen.mark, 0);
        let seen = bench.partition(Slot::B, &packet).unwrap();
        check(&seen, REDIRECT, &["out_by_stack"], "from the other one");
        assert_eq!(seen.mark, AGAIN_MARK);
        let seen = bench.run(Hook::FromPartition, bench.links[0], AGAIN_MARK, &seen.frame).unwrap();
        check(&seen, NEXT, &["again"], "its second look");
        assert_eq!(seen.mark, 0, "nobody else sees the mark");
    }
    bench.finish().unwrap();
}

#[test]
fn flows_are_learned_from_what_the_serving_one_answers() {
    let mut bench = Bench::new("learn").unwrap();
    let learning = STEADY.with_learning(true);
    for family in families() {
        let flow = key((family.client, 1000), PORT, frame::UDP);
        for (what, word, slot, packet, learned) in [
            ("not asked to", STEADY, Slot::A, reply(family.service, family), false),
            (
                "a connection",
                learning,
                Slot::A,
                tcp((family.service, PORT), (family.client, 1000), ACK, b""),
                false,
            ),
            ("its own address", learning, Slot::A, reply(family.own_a, family), false),
            ("the retiring one", DRAINING.with_learning(true), Slot::A, reply(family.service, family), false),
            ("an answer", learning, Slot::A, reply(family.service, family), true),
        ] {
            bench.word(word).unwrap();
            bench.partition(slot, &packet).unwrap();
            let record = bench.remembered(flow).unwrap();
            assert_eq!(record.is_some(), learned, "{what}");
            if let Some(record) = record {
                assert_eq!((record.slot, record.local), (0, patchswitch::dataplane::to_wire(family.service)));
            }
        }
        // A flow that goes on has a new time; one that moves to the other side is that one's.
        let told = |bench: &mut Bench| bench.remembered(flow).unwrap().unwrap();
        for (slot, what) in [(Slot::A, "again"), (Slot::B, "the other one"), (Slot::A, "and back")] {
            bench.word(Word::steady(slot, 1).with_learning(true)).unwrap();
            let before = told(&mut bench);
            let seen = bench.partition(slot, &reply(family.service, family)).unwrap();
            check(&seen, REDIRECT, &["out", "learned"], what);
            let after = told(&mut bench);
            assert!(after.seen_ns > before.seen_ns, "{what}");
            assert_eq!((after.slot, after.local), (slot.index(), before.local), "{what}");
        }
        bench.forget().unwrap();
        // An echo by its identifier, an error not at all.
        bench.word(learning).unwrap();
        let v4 = family.client.is_ipv4();
        let (kind, protocol) = if v4 { (0, frame::ICMP) } else { (129, frame::ICMPV6) };
        bench.partition(Slot::A, &icmp(family.service, family.client, kind, [0, 7, 0, 1], b"pong")).unwrap();
        assert!(bench.remembered(key((family.client, 7), 0, protocol)).unwrap().is_some());
        let quoted = udp((family.client, 1001), (family.service, PORT), b"x").bytes();
        let error = icmp(family.service, family.client, if v4 { 3 } else { 1 }, [0; 4], &quoted);
        bench.partition(Slot::A, &error).unwrap();
        assert!(bench.remembered(key((family.client, 1001), PORT, frame::UDP)).unwrap().is_none());
        bench.forget().unwrap();
    }
    let [family, _] = families();
    for port in 0..LEARNED + 2 {
        let port = 2000 + port as u16;
        let seen =
            bench.partition(Slot::A, &udp((family.service, PORT), (family.client, port), b"x")).unwrap();
        let event = if u32::from(port - 2000) < LEARNED { "learned" } else { "learn_full" };
        check(&seen, REDIRECT, &["out", event], "a table of four");
    }
    // What is known is refreshed even then.
    let seen = bench.partition(Slot::A, &udp((family.service, PORT), (family.client, 2000), b"x")).unwrap();
    check(&seen, REDIRECT, &["out", "learned"], "a full table");
    bench.finish().unwrap();
}

/// The packet that a client must get: the same with another source and right sums.
fn expected(packet: &Ip, source: IpAddr, at: Option<usize>) -> Ip {
    let mut wanted = Ip { from: source, ..packet.clone() };
    if let Some(at) = at {
        seal(&mut wanted, at);
    }
    wanted
}

/// A datagram of a client, as an error about it quotes it.
fn quoted_by(client: (IpAddr, u16), family: Family) -> Vec<u8> {
    udp(client, (family.service, PORT), b"x").bytes()
}

#[test]
fn replies_of_learned_flows_get_the_services_address() {
    let mut bench = Bench::new("rewrite").unwrap();
    let noticed = DRAINING.with_notice(true);
    let mac = bench.links[0].mac;
    for family in families() {
        let v4 = family.client.is_ipv4();
        let (rewritten, icmp_protocol) = if v4 { ("rewritten_v4", 1) } else { ("rewritten_v6", 58) };
        for (port, protocol) in
            [(1000, frame::UDP), (7, icmp_protocol), (1000, frame::TCP), (1000, frame::SCTP)]
        {
            let service_port = if protocol == icmp_protocol { 0 } else { PORT };
            bench
                .remember(key((family.client, port), service_port, protocol), family.service, Slot::A, 0)
                .unwrap();
        }
        let pong = if v4 { 0 } else { 129 };
        let own = (family.own_a, PORT);
        let client = (family.client, 1000);
        for (what, packet, at) in [
            ("a datagram", udp(own, client, b"answer"), Some(6)),
            ("a datagram of odd length", udp(own, client, b"odd"), Some(6)),
            ("a segment", tcp(own, client, ACK, b"x"), Some(16)),
            // Its sum is not about addresses, and stays.
            ("an association", sctp(own, client, b"chunk"), None),
            ("an echo", icmp(family.own_a, family.client, pong, [0, 7, 0, 1], b"pong"), Some(2)),
        ] {
            bench.word(noticed).unwrap();
            let seen = bench.partition(Slot::A, &packet).unwrap();
            check(&seen, REDIRECT, &["out", rewritten, "learned"], what);
            assert_eq!(seen.frame, expected(&packet, family.service, at).frame(mac), "{what}");
            // Without the notice it stays as it is, and is not the service's.
            bench.word(DRAINING).unwrap();
            let seen = bench.partition(Slot::A, &packet).unwrap();
            check(&seen, NEXT, &["out_by_stack"], what);
            assert_eq!(seen.frame, packet.frame(mac), "{what}");
        }
        bench.word(noticed).unwrap();
        // The error that the retiring one sends about a client's datagram; what it quotes is not touched.
        let quoted = quoted_by(client, family);
        let behind = Ip {
            extensions: if v4 { Vec::new() } else { vec![0, 60] },
            ..udp(client, (family.service, PORT), b"x")
        };
        let association = sctp(client, (family.service, PORT), b"chunk").bytes();
        for quoted in [quoted, behind.bytes(), association] {
            let error = icmp(family.own_a, family.client, if v4 { 3 } else { 1 }, [0; 4], &quoted);
            let seen = bench.partition(Slot::A, &error).unwrap();
            check(&seen, REDIRECT, &["out", rewritten], "an error");
            assert_eq!(seen.frame, expected(&error, family.service, Some(2)).frame(mac));
        }
        // What is nobody's, and what has the right source already.
        let unknown = udp(own, (family.client, 1001), b"x");
        let seen = bench.partition(Slot::A, &unknown).unwrap();
        check(&seen, NEXT, &["out_by_stack"], "a flow that was not learned");
        assert_eq!(seen.frame, unknown.frame(mac));
        let right = reply(family.service, family);
        let seen = bench.partition(Slot::A, &right).unwrap();
        check(&seen, REDIRECT, &["out", "learned"], "its own right answer");
        assert_eq!(seen.frame, right.frame(mac));
        // The active one is not rewritten, whatever was learned.
        let other = udp((family.own_b, PORT), client, b"x");
        check(&bench.partition(Slot::B, &other).unwrap(), NEXT, &["out_by_stack"], "the active one's own");
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

/// An error is no answer; and what is pushed after the idle time gets the right address, but the flow is over.
#[test]
fn neither_an_error_nor_a_late_answer_keeps_a_flow() {
    let mut bench = Bench::new("late").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    for family in families() {
        let v4 = family.client.is_ipv4();
        let (client, own) = ((family.client, 1000), (family.own_a, PORT));
        let flow = key(client, PORT, frame::UDP);
        let rewritten = if v4 { "rewritten_v4" } else { "rewritten_v6" };
        let error =
            icmp(family.service, family.client, if v4 { 3 } else { 1 }, [0; 4], &quoted_by(client, family));
        let late = [
            ("its error", 0, error, &["out"][..]),
            ("too late", IDLE_NS + 1_000_000_000, reply(family.service, family), &["out"]),
            (
                "too late, from its own address",
                IDLE_NS + 1_000_000_000,
                udp(own, client, b"late"),
                &["out", rewritten],
            ),
        ];
        for (what, age, packet, counted) in late {
            bench.remember(flow, family.service, Slot::A, age).unwrap();
            let before = bench.remembered(flow).unwrap();
            check(&bench.partition(Slot::A, &packet).unwrap(), REDIRECT, counted, what);
            assert!(before.is_some() && bench.remembered(flow).unwrap() == before, "{what}");
        }
    }
    bench.finish().unwrap();
}

#[test]
fn sums_that_are_none_and_sums_that_become_none() {
    let mut bench = Bench::new("zero").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    let mac = bench.links[0].mac;
    for family in families() {
        let client = (family.client, 1000);
        bench.remember(key(client, PORT, frame::UDP), family.service, Slot::A, 0).unwrap();
        let mut without = reply(family.own_a, family);
        without.payload[6..8].fill(0);
        let seen = bench.partition(Slot::A, &without).unwrap();
        assert_eq!(seen.frame, Ip { from: family.service, ..without.clone() }.frame(mac), "none stays none");
        // A payload for which the rewritten packet's sum comes out as 0, which must be sent as 0xFFFF (RFC 768).
        let mut wanted = udp((family.service, PORT), client, &[0, 0]);
        wanted.payload[6..8].fill(0);
        let last = wanted.payload.len() - 2;
        let filler = finish(payload_sum(&wanted)).to_be_bytes();
        wanted.payload[last..].copy_from_slice(&filler);
        assert_eq!(finish(payload_sum(&wanted)), 0);
        let mut packet = Ip { from: family.own_a, ..wanted };
        seal(&mut packet, 6);
        let seen = bench.partition(Slot::A, &packet).unwrap();
        let header = if family.client.is_ipv4() { 20 } else { 40 };
        let at = frame::ETHERNET + header + 6;
        assert_eq!(seen.frame[at..at + 2], [0xff, 0xff]);
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

/// Each namespace counts identifications by itself; a client that gets two datagrams under one may mix them.
#[test]
fn identifications_that_both_use_are_counted() {
    let mut bench = Bench::new("ids").unwrap();
    let noticed = DRAINING.with_notice(true);
    for family in families() {
        let rewritten = if family.client.is_ipv4() { "rewritten_v4" } else { "rewritten_v6" };
        let of = |from: IpAddr, to: IpAddr, id, offset| {
            let place = Place { offset, more: offset == 0, id };
            Ip { place: Some(place), ..udp((from, PORT), (to, 1000), &[7; 64]) }
        };
        let (service, client) = (family.service, family.client);
        let another: IpAddr = if client.is_ipv4() { "10.77.0.99" } else { "fd77::99" }.parse().unwrap();
        let first = |id| of(service, client, id, 0);
        let (alone, shared) = (&["out"][..], &["out", "fragment_id_shared"][..]);
        let mut step = |word: Word, slot: Slot, packet: Ip, counted: &[&str], what: &str| {
            bench.word(word).unwrap();
            let seen = bench.partition(slot, &packet).unwrap();
            check(&seen, REDIRECT, counted, what);
            assert_eq!(seen.frame, packet.frame(bench.links[slot as usize].mac), "{what}");
        };
        // In peace there is one who sends.
        step(STEADY, Slot::A, first(1), alone, "in peace");
        step(DRAINING, Slot::B, first(1), alone, "its first");
        step(DRAINING, Slot::B, first(1), alone, "its own again");
        step(DRAINING, Slot::A, first(2), alone, "another number");
        step(DRAINING, Slot::A, first(1), shared, "the other one's number");
        step(DRAINING, Slot::B, first(1), shared, "and back");
        step(DRAINING, Slot::A, of(service, client, 1, 8), alone, "a later fragment");
        step(DRAINING, Slot::A, of(service, another, 1, 0), alone, "to another client");
        // What is rewritten is sent from the service's address as well.
        bench.remember(key((client, 1000), PORT, frame::UDP), service, Slot::A, 0).unwrap();
        let mut step = |word: Word, slot: Slot, packet: Ip, counted: &[&str], what: &str| {
            bench.word(word).unwrap();
            check(&bench.partition(slot, &packet).unwrap(), REDIRECT, counted, what);
        };
        step(noticed, Slot::B, first(5), alone, "who serves");
        let own = of(family.own_a, client, 5, 0);
        step(noticed, Slot::A, own, &["out", rewritten, "learned", "fragment_id_shared"], "rewritten");
        bench.age_fragments(Duration::from_secs(31)).unwrap();
        bench.word(DRAINING).unwrap();
        let seen = bench.partition(Slot::B, &first(5)).unwrap();
        check(&seen, REDIRECT, alone, "after half a minute");
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

#[test]
fn later_fragments_are_rewritten_as_the_first_was() {
    let mut bench = Bench::new("refragment").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    let mac = bench.links[0].mac;
    for family in families() {
        let client = (family.client, 1000);
        bench.remember(key(client, PORT, frame::UDP), family.service, Slot::A, 0).unwrap();
        let rewritten = if family.client.is_ipv4() { "rewritten_v4" } else { "rewritten_v6" };
        let of = |id, offset| {
            let place = Place { offset, more: offset == 0, id };
            let whole = udp((family.own_a, PORT), client, &[7; 64]);
            Ip { place: Some(place), ..whole }
        };
        let later = of(1, 100);
        let seen = bench.partition(Slot::A, &later).unwrap();
        check(&seen, NEXT, &["out_by_stack"], "before the first one");
        let first = of(1, 0);
        let seen = bench.partition(Slot::A, &first).unwrap();
        check(&seen, REDIRECT, &["out", rewritten, "learned"], "the first one");
        let sum_at = 6;
        // The first fragment has the datagram's sum, which is about all of it: what changes is the address in it.
        let wanted = expected(&first, family.service, Some(sum_at)).frame(mac);
        assert_eq!(seen.frame, wanted);
        let seen = bench.partition(Slot::A, &later).unwrap();
        check(&seen, REDIRECT, &["out", rewritten], "after it");
        assert_eq!(seen.frame, Ip { from: family.service, ..later.clone() }.frame(mac), "addresses alone");
        if family.client.is_ipv4() {
            assert_eq!(finish(sum(&seen.frame[14..34])), 0, "the header's sum");
        }
        let seen = bench.partition(Slot::A, &of(2, 100)).unwrap();
        check(&seen, NEXT, &["out_by_stack"], "of another datagram");
        bench.age_fragments(Duration::from_secs(29)).unwrap();
        let seen = bench.partition(Slot::A, &later).unwrap();
        check(&seen, REDIRECT, &["out", rewritten], "29 seconds after it");
        bench.age_fragments(Duration::from_secs(2)).unwrap();
        let seen = bench.partition(Slot::A, &later).unwrap();
        check(&seen, NEXT, &["out_by_stack"], "31 seconds after it");
        assert_eq!(seen.frame, later.frame(mac));
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}
