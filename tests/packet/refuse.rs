//! What is dropped, or left to the host, whoever serves; and what goes to both partitions.

use std::net::IpAddr;
use std::num::NonZeroU32;

use anyhow::Context as _;
use patchswitch_common::Slot;
use patchswitch_common::verdict::{AGAIN_MARK, Hook};
use patchswitch_common::word::Word;
use patchswitch_tests::netlab::Ns;
use rustix::net::{AddressFamily, SocketFlags, SocketType, recv, socket_with};

use crate::bench::{Bench, DROP, Family, NEXT, PORT, REDIRECT, Seen, families};
use crate::frame::{ETHERNET, ICMP, ICMPV6, IGMP, Ip, Place, SENDER, ethernet, icmp, tcp, udp};
use crate::steer::{ACK, DRAINING, RST, SYN, connection, listener};

const STEADY: Word = Word::steady(Slot::A, 1);

fn check(seen: &Seen, action: i32, counted: &[&str], what: &str) {
    let mut counted = counted.to_vec();
    counted.sort_unstable();
    assert_eq!((seen.action, seen.counted.as_slice()), (action, counted.as_slice()), "{what}");
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap_or(IpAddr::from([0; 4]))
}

#[test]
fn nobody_gets_what_should_not_have_been_sent() {
    let mut bench = Bench::new("refused").unwrap();
    let [v4, v6] = families();
    let segment = |family: Family, from: IpAddr| tcp((from, 1000), (family.service, PORT), SYN, b"");
    let routed = |kind: u8| {
        let options = vec![kind, 7, 4, 10, 66, 6, 6, 0];
        Ip { options, ..segment(v4, v4.client) }
    };
    let quoted4 = icmp(v4.service, v4.client, 3, [0; 4], &[0; 28]).bytes();
    let quoted6 = icmp(v6.service, v6.client, 1, [0; 4], &[0; 48]).bytes();
    let chained6 = Ip { extensions: vec![0, 60], ..icmp(v6.service, v6.client, 3, [0; 4], &[0; 48]) }.bytes();
    let split = Ip {
        place: Some(Place { offset: 0, more: true, id: 7 }),
        ..icmp(v6.client, v6.service, 135, [0; 4], &[0; 16])
    };
    let cases = [
        ("a source of nobody's", segment(v4, address("127.0.0.1")), DROP, "martian"),
        ("a group as source", segment(v4, address("224.0.0.1")), DROP, "martian"),
        ("the broadcast as source", segment(v4, address("255.255.255.255")), DROP, "martian"),
        ("no source", segment(v6, address("::")), DROP, "martian"),
        ("the loopback as source", segment(v6, address("::1")), DROP, "martian"),
        ("a mapped source", segment(v6, address("::ffff:10.77.0.2")), DROP, "martian"),
        ("a group as source, v6", segment(v6, address("ff02::1")), DROP, "martian"),
        ("a loose source route", routed(131), DROP, "source_route"),
        ("a strict source route", routed(137), DROP, "source_route"),
        ("a redirect", icmp(v4.client, v4.service, 5, [0; 4], &quoted4), DROP, "redirect"),
        ("a redirect, v6", icmp(v6.client, v6.service, 137, [0; 4], &[0; 32]), DROP, "redirect"),
        ("an error about an error", icmp(v4.client, v4.service, 3, [0; 4], &quoted4), DROP, "nested_error"),
        (
            "an error about an error, v6",
            icmp(v6.client, v6.service, 1, [0; 4], &quoted6),
            DROP,
            "nested_error",
        ),
        (
            "an error about an error behind extension headers",
            icmp(v6.client, v6.service, 2, [0; 4], &chained6),
            DROP,
            "nested_error",
        ),
        ("neighbour discovery in a fragment", split, DROP, "split_discovery"),
        ("a source of the link", segment(v6, address("fe80::9")), NEXT, "for_host"),
        ("a question for the time", icmp(v4.client, v4.service, 13, [0; 4], &[0; 12]), NEXT, "for_host"),
        ("a router", icmp(v4.client, v4.service, 9, [0; 4], &[0; 8]), NEXT, "for_host"),
        ("IGMP to one alone", Ip::new(v4.client, v4.service, IGMP, vec![0x11; 8]), NEXT, "for_host"),
        ("a listener's report", icmp(v6.client, v6.service, 143, [0; 4], &[0; 20]), NEXT, "for_host"),
    ];
    for word in [STEADY, DRAINING] {
        bench.word(word).unwrap();
        for (what, packet, action, verdict) in &cases {
            check(&bench.client(packet).unwrap(), *action, &[verdict], what);
            // The same for what the host or another partition sends.
            let frame = packet.frame(bench.links[0].mac);
            let seen = bench.run(Hook::ToPartition, bench.links[0], 0, &frame).unwrap();
            check(&seen, *action, &[verdict], what);
        }
    }
    bench.finish().unwrap();
}

#[test]
fn what_is_too_short_for_what_it_says_is_left_to_the_kernel() {
    let mut bench = Bench::new("stated").unwrap();
    bench.word(DRAINING).unwrap();
    for family in families() {
        let _listening = listener(&bench.lab.a, family).unwrap();
        let v4 = family.client.is_ipv4();
        let header = if v4 { 20 } else { 40 };
        let whole = tcp((family.client, 1000), (family.service, PORT), ACK, b"data");
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut frame = whole.frame(bench.uplink.mac);
            change(&mut frame);
            frame
        };
        let at = ETHERNET + header;
        let length = ETHERNET + if v4 { 3 } else { 5 };
        let stated = |value: u8| move |frame: &mut Vec<u8>| frame[length] = value;
        let base = if v4 { 20 } else { 0 };
        // A frame has at least 60 bytes; what follows the packet is none of it.
        let padded = |value: u8| {
            move |frame: &mut Vec<u8>| {
                frame.resize(120, 0x50);
                frame[length] = value;
            }
        };
        let cases: [(&str, Vec<u8>, &str); 9] = [
            ("longer than its frame", with(&stated(base + 25)), "malformed"),
            ("shorter than its frame", with(&padded(base + 24)), "to_b"),
            ("a header without its last byte", with(&padded(base + 19)), "malformed"),
            ("a header alone", with(&padded(base + 20)), "to_b"),
            ("a data offset of four words", with(&|f| f[at + 12] = 0x40), "malformed"),
            ("a data offset beyond the end", with(&|f| f[at + 12] = 0x70), "malformed"),
            ("from port 0", with(&|f| f[at..at + 2].fill(0)), "malformed"),
            ("to port 0", with(&|f| f[at + 2..at + 4].fill(0)), "malformed"),
            ("no payload at all", with(&stated(base)), "malformed"),
        ];
        for (what, frame, verdict) in cases {
            let seen = bench.run(Hook::Uplink, bench.uplink, 0, &frame).unwrap();
            let action = if verdict == "malformed" { NEXT } else { REDIRECT };
            check(&seen, action, &[verdict], &format!("{what}, IPv{}", if v4 { 4 } else { 6 }));
            assert_eq!(seen.frame, frame);
        }
        let short =
            Ip { payload: vec![0, 9, 0, 80, 0, 8, 0], ..udp((family.client, 9), (family.service, 80), b"") };
        check(&bench.client(&short).unwrap(), NEXT, &["malformed"], "a datagram of seven bytes");
        let tiny = Ip {
            place: Some(Place { offset: 0, more: true, id: 3 }),
            payload: whole.payload[..16].to_vec(),
            ..whole
        };
        check(&bench.client(&tiny).unwrap(), NEXT, &["malformed"], "a first fragment that hides the header");
    }
    bench.finish().unwrap();
}

#[test]
fn what_pads_a_frame_is_no_part_of_what_an_error_quotes() {
    let mut bench = Bench::new("padded").unwrap();
    bench.word(DRAINING).unwrap();
    for family in families() {
        let v4 = family.client.is_ipv4();
        let header = if v4 { 20 } else { 40 };
        let mac = bench.uplink.mac;
        let quoted = Ip::new(family.service, family.client, 47, vec![7; 8]).bytes();
        let about = |length: usize| {
            let (quoted, padding) = quoted.split_at(length);
            let error = icmp(family.stranger, family.service, if v4 { 3 } else { 1 }, [0; 4], quoted);
            [error.frame(mac), padding.to_vec()].concat()
        };
        for (length, action, counted) in
            [(12, NEXT, "malformed"), (header - 1, NEXT, "malformed"), (header, REDIRECT, "to_b")]
        {
            let frame = about(length);
            let seen = bench.run(Hook::Uplink, bench.uplink, 0, &frame).unwrap();
            check(&seen, action, &[counted], &format!("an error that quotes {length} bytes"));
        }
    }
    bench.finish().unwrap();
}

#[test]
fn a_partition_says_nothing_that_is_not_its_to_say() {
    let mut bench = Bench::new("control").unwrap();
    let [v4, v6] = families();
    let service = |family: Family| match family.service {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let (ff02, metadata) = (address("ff02::1"), address("169.254.169.254"));
    let claim = |target: Vec<u8>| icmp(v6.service, ff02, 136, [0x20, 0, 0, 0], &target);
    let own = match v6.own_a {
        IpAddr::V6(address) => address.octets().to_vec(),
        IpAddr::V4(_) => Vec::new(),
    };
    let cases = [
        (
            "a router's advertisement",
            icmp(address("fe80::2"), ff02, 134, [0; 4], &[0; 8]),
            DROP,
            "forged_control",
        ),
        ("a redirect", icmp(v4.service, v4.client, 5, [0; 4], &[0; 28]), DROP, "forged_control"),
        ("a redirect, v6", icmp(v6.service, v6.client, 137, [0; 4], &[0; 32]), DROP, "forged_control"),
        ("a claim of the service", claim(service(v6)), DROP, "forged_control"),
        ("a claim of its own address", claim(own), NEXT, "out_by_stack"),
        ("an answer of DHCP", udp((v4.service, 67), (v4.client, 68), &[0; 8]), DROP, "forged_control"),
        ("an answer of DHCPv6", udp((v6.service, 547), (v6.client, 546), &[0; 8]), DROP, "forged_control"),
        ("to the other one", udp((v4.own_a, 9), (v4.own_b, 9), b"x"), DROP, "lateral"),
        ("to the other one, v6", udp((v6.service, 9), (v6.own_b, 9), b"x"), DROP, "lateral"),
        (
            "a question for members of groups",
            Ip::new(v4.service, v4.client, IGMP, vec![0x11; 8]),
            DROP,
            "forged_control",
        ),
        ("the same, v6", icmp(v6.service, v6.client, 130, [0; 4], &[0; 16]), DROP, "forged_control"),
        (
            "a report to a group",
            Ip::new(v4.own_a, address("224.0.0.22"), IGMP, vec![0x22; 8]),
            NEXT,
            "out_by_stack",
        ),
        ("to the metadata", tcp((v4.service, 9), (metadata, 80), SYN, b""), DROP, "host_control"),
        ("the same, its own", udp((v4.own_a, 9), (metadata, 80), b"x"), DROP, "host_control"),
        ("for a name", udp((v4.own_a, 9), (metadata, 53), b"x"), NEXT, "out_by_stack"),
        ("to the loopback", tcp((v4.service, 9), (address("127.0.0.1"), 80), SYN, b""), DROP, "host_control"),
        ("to the loopback, v6", tcp((v6.own_a, 9), (address("::1"), 80), SYN, b""), DROP, "host_control"),
        ("to a client", udp((v4.service, 67), (v4.client, 69), &[0; 8]), REDIRECT, "out"),
    ];
    for word in [STEADY, DRAINING] {
        bench.word(word).unwrap();
        for (what, packet, action, verdict) in &cases {
            let seen = bench.partition(Slot::A, packet).unwrap();
            check(&seen, *action, &[verdict], what);
            assert_eq!(seen.frame, packet.frame(bench.links[0].mac), "{what}");
        }
    }
    bench.finish().unwrap();
}

#[test]
fn a_partitions_frames_are_its_own() {
    let mut bench = Bench::new("frames").unwrap();
    let [v4, _] = families();
    let link = bench.links[0];
    let service = match v4.service {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(_) => Vec::new(),
    };
    for word in [STEADY, DRAINING] {
        bench.word(word).unwrap();
        for (what, frame, action, verdict) in [
            ("another link address", reply_from([2, 0, 0, 0, 0, 8], v4), DROP, "spoofed_mac"),
            ("no ARP at all", ethernet(link.mac, 0x0806, &[0; 8]), NEXT, "malformed"),
            ("its question for the gateway", ask(service.clone(), [169, 254, 1, 1]), NEXT, "not_ours"),
            ("its claim of the service", ask(service.clone(), [10, 77, 0, 10]), DROP, "forged_control"),
            (
                "its question as somebody else",
                ask(vec![10, 66, 6, 6], [169, 254, 1, 1]),
                DROP,
                "forged_control",
            ),
            (
                "to the bridges",
                ethernet([1, 0x80, 0xc2, 0, 0, 0], 0x0027, &[0x42; 39]),
                DROP,
                "forged_control",
            ),
            ("a tag in the bytes", ethernet(link.mac, 0x8100, &[0; 46]), DROP, "forged_control"),
            ("a tag of a provider's", ethernet(link.mac, 0x88a8, &[0; 46]), DROP, "forged_control"),
            ("to ports", ethernet([1, 0x80, 0xc2, 0, 0, 3], 0x888e, &[1; 46]), DROP, "forged_control"),
            ("another EtherType", ethernet(link.mac, 0x88b5, &[0; 46]), NEXT, "not_ours"),
        ] {
            let seen = bench.run(Hook::FromPartition, link, 0, &frame).unwrap();
            check(&seen, action, &[verdict], what);
        }
    }
    bench.finish().unwrap();
}

/// Keeps what the programs have to say.
#[derive(Default)]
struct Lines(std::sync::Mutex<Vec<String>>);

impl log::Log for &'static Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if let Ok(mut lines) = self.0.lock() {
            lines.push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

#[test]
fn a_flood_of_forged_frames_is_told_in_a_few_lines() {
    const FRAMES: u64 = 200;
    static LINES: Lines = Lines(std::sync::Mutex::new(Vec::new()));
    let mut bench = Bench::new("told").unwrap();
    let [v4, v6] = families();
    let mut ring = bench.told(&LINES).unwrap();
    let link = bench.links[0];
    bench.word(STEADY).unwrap();
    let standby = bench.links[1];
    let IpAddr::V4(service) = v4.service else { unreachable!("the first family") };
    let service = service.to_ipv6_mapped();
    let quarantined =
        format!("a partition sent a packet from {service}, which is not its address, or not yet: dropped");
    for (what, link, frame, verdict, line) in [
        (
            "a link address",
            link,
            reply_from([2, 0, 0x5e, 0, 0xab, 8], v4),
            "spoofed_mac",
            "a partition sent a frame from 02:00:5e:00:ab:08, which is not its link address: dropped",
        ),
        (
            "an address",
            link,
            udp((v6.stranger, PORT), (v6.client, 1000), b"x").frame(link.mac),
            "spoofed",
            "a partition sent a packet from fd66::6, which is not its address, or not yet: dropped",
        ),
        (
            "the service's address, before it serves",
            standby,
            udp((v4.service, PORT), (v4.client, 1000), b"x").frame(standby.mac),
            "quarantined",
            &quarantined,
        ),
    ] {
        for _ in 0..FRAMES {
            if link.index == standby.index {
                // What is dropped without a word is not counted among what is told.
                let own = udp((v4.own_b, PORT), (v4.client, 1000), b"x").frame(link.mac);
                check(&bench.run(Hook::FromPartition, link, 0, &own).unwrap(), DROP, &["quarantined"], what);
            }
            let seen = bench.run(Hook::FromPartition, link, 0, &frame).unwrap();
            check(&seen, DROP, &[verdict], what);
            assert_eq!(seen.frame, frame, "{what}");
        }
        ring.flush();
        let lines = std::mem::take(&mut *LINES.0.lock().unwrap());
        // The 1st, 2nd, 4th … of each processor.
        let most = 10 * std::thread::available_parallelism().unwrap().get();
        assert!((1..=most).contains(&lines.len()), "{what}: {lines:#?}");
        assert!(lines.iter().all(|text| text.eq_ignore_ascii_case(line)), "{what}: {lines:#?}");
    }
    bench.finish().unwrap();
}

fn reply_from(mac: [u8; 6], family: Family) -> Vec<u8> {
    let mut frame = udp((family.service, PORT), (family.client, 1000), b"x").frame([2; 6]);
    frame[6..12].copy_from_slice(&mac);
    frame
}

/// An ARP question.
fn ask(sender: Vec<u8>, target: [u8; 4]) -> Vec<u8> {
    let packet = [&[0, 1, 8, 0, 6, 4, 0, 1], &SENDER[..], &sender, &[0; 6], &target].concat();
    ethernet([0xff; 6], 0x0806, &packet)
}

/// What the kernel would forward without looking into it, so that nobody could say whose it is.
#[test]
fn what_cannot_be_judged_does_not_leave_a_partition() {
    let mut bench = Bench::new("unjudged").unwrap();
    let [_, v6] = families();
    for (slot, word) in [(Slot::A, STEADY), (Slot::B, STEADY), (Slot::A, DRAINING), (Slot::B, DRAINING)] {
        bench.word(word).unwrap();
        for from in [v6.service, v6.own_a, v6.stranger] {
            let packet = udp((from, 9), (v6.client, 9), b"x");
            let long = Ip { extensions: vec![60; 7], ..packet.clone() };
            check(&bench.partition(slot, &long).unwrap(), DROP, &["malformed"], "a chain of seven");
            let mut beyond = Ip { extensions: vec![60], ..packet }.frame(bench.links[slot as usize].mac);
            beyond[ETHERNET + 41] = 200;
            let seen = bench.run(Hook::FromPartition, bench.links[slot as usize], 0, &beyond).unwrap();
            check(&seen, DROP, &["malformed"], "an extension header beyond the end");
        }
    }
    bench.finish().unwrap();
}

#[test]
fn who_retires_opens_no_connection_that_the_other_one_has() {
    let mut bench = Bench::new("tuple").unwrap();
    for family in families() {
        let listening = listener(&bench.lab.b, family).unwrap();
        let _ends = connection(&bench.lab.b, &listening, family, 1000).unwrap();
        let opening = |port| tcp((family.service, PORT), (family.client, port), SYN, b"");
        bench.word(DRAINING).unwrap();
        let seen = bench.partition(Slot::A, &opening(1000)).unwrap();
        check(&seen, DROP, &["tuple_in_use"], "a pair of ends that the other one has");
        let seen = bench.partition(Slot::A, &opening(1001)).unwrap();
        check(&seen, REDIRECT, &["out"], "another pair");
        let answer = tcp((family.service, PORT), (family.client, 1000), SYN | ACK, b"");
        check(&bench.partition(Slot::A, &answer).unwrap(), REDIRECT, &["out"], "an answer is none");
        check(&bench.partition(Slot::B, &opening(1000)).unwrap(), REDIRECT, &["out"], "who serves may");
        bench.word(STEADY).unwrap();
        check(&bench.partition(Slot::A, &opening(1000)).unwrap(), REDIRECT, &["out"], "in peace");
    }
    bench.finish().unwrap();
}

/// The kernel of the serving side does not know which pairs of ends the other one has. What it opens with one of them comes
/// to nothing: the connection that is there is not touched, and gets the answer as any segment of its own.
#[test]
fn what_who_serves_opens_with_ends_in_use_harms_nobody_but_itself() {
    let mut bench = Bench::new("ends").unwrap();
    let kept = &["to_a", "kept_by_retiring"][..];
    for family in families() {
        let listening = listener(&bench.lab.a, family).unwrap();
        let _ends = connection(&bench.lab.a, &listening, family, 1000).unwrap();
        let opening = |port| tcp((family.service, PORT), (family.client, port), SYN, b"");
        let answer = |port| tcp((family.client, port), (family.service, PORT), SYN | ACK, b"");
        bench.word(DRAINING).unwrap();
        for (port, counted, what) in [(1000, kept, "ends in use"), (1001, &["to_b"], "others")] {
            check(&bench.partition(Slot::B, &opening(port)).unwrap(), REDIRECT, &["out"], what);
            check(&bench.client(&answer(port)).unwrap(), REDIRECT, counted, what);
        }
        for flags in [ACK, SYN, RST] {
            let segment = tcp((family.client, 1000), (family.service, PORT), flags, b"");
            check(&bench.client(&segment).unwrap(), REDIRECT, kept, "the connection that is there");
        }
        // When it is over, nothing is in the way.
        bench.word(Word::steady(Slot::B, 2)).unwrap();
        check(&bench.client(&answer(1000)).unwrap(), REDIRECT, &["to_b"], "after the drain");
    }
    bench.finish().unwrap();
}

#[test]
fn what_nobody_can_tell_goes_to_both() {
    let mut bench = Bench::new("both").unwrap();
    let (uplink, links) = (bench.uplink, bench.links);
    for family in families() {
        let later = Place { offset: 100, more: false, id: 77 };
        let fragment = Ip { place: Some(later), ..Ip::new(family.client, family.service, 17, vec![7; 64]) };
        let quoted = Ip { place: Some(later), ..Ip::new(family.service, family.client, 17, vec![7; 64]) };
        let kind = if family.client.is_ipv4() { 3 } else { 2 };
        let error = icmp(family.stranger, family.service, kind, [0; 4], &quoted.bytes());
        for (what, packet) in [("a later fragment", &fragment), ("an error about one", &error)] {
            let unknown: &[&str] =
                if what == "a later fragment" { &["to_both", "fragment_unknown"] } else { &["to_both"] };
            let frame = packet.frame(uplink.mac);
            bench.word(DRAINING).unwrap();
            let listening = listen(&bench.lab.host, "lca").unwrap();
            let seen = bench.run(Hook::Uplink, uplink, 0, &frame).unwrap();
            check(&seen, REDIRECT, unknown, what);
            assert_eq!((&seen.frame, seen.mark), (&frame, 0), "{what}: as it came");
            // The copy is addressed to the partition, and is the same but for that.
            let copy = received(&listening).unwrap();
            assert_eq!((&copy[..6], &copy[6..]), (&SENDER[..], &frame[6..]), "{what}");
            // From the host or another partition: the same, on whichever link it is.
            let frame = packet.frame(SENDER);
            for (on, action) in [(links[1], NEXT), (links[0], REDIRECT)] {
                let seen = bench.run(Hook::ToPartition, on, 0x55, &frame).unwrap();
                check(&seen, action, unknown, what);
                let mark = if action == REDIRECT { AGAIN_MARK } else { 0x55 };
                assert_eq!((&seen.frame, seen.mark), (&frame, mark), "{what}");
                assert_eq!(received(&listening).unwrap(), frame, "{what}");
            }
            let seen = bench.run(Hook::ToPartition, links[0], AGAIN_MARK, &frame).unwrap();
            check(&seen, NEXT, &["again"], "the copy itself");
            assert_eq!(seen.mark, 0);
            // Nobody to copy it to.
            bench.word(Word::steady(Slot::A, 1)).unwrap();
            let seen = bench.run(Hook::Uplink, uplink, 0, &packet.frame(uplink.mac)).unwrap();
            assert_eq!(seen.action, REDIRECT, "{what}, in peace");
            assert_eq!(seen.counted, ["to_a"], "{what}, in peace");
        }
    }
    bench.finish().unwrap();
}

/// A socket that sees every frame of a link.
fn listen(ns: &Ns, link: &str) -> anyhow::Result<socket2::Socket> {
    ns.enter(|| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // `ETH_P_ALL` of `linux/if_ether.h`.
        let protocol = rustix::net::Protocol::from_raw(
            NonZeroU32::new(u32::from(0x0003_u16.to_be())).context("no protocol")?,
        );
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(protocol))?;
        let socket = socket2::Socket::from(socket);
        socket.bind_device(Some(link.as_bytes()))?;
        Ok(socket)
    })
}

/// The next frame of IP that was seen; others come by themselves.
fn received(socket: &socket2::Socket) -> anyhow::Result<Vec<u8>> {
    let mut bytes = [0_u8; 2048];
    let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while std::time::Instant::now() < end {
        match recv(socket, &mut bytes[..], rustix::net::RecvFlags::empty()) {
            Ok((length, _)) => {
                let frame = bytes[..length].to_vec();
                let number = if frame[12..14] == [8, 0] { frame[23] } else { frame[20] };
                if frame[..6] == SENDER && [17, ICMP, 44, ICMPV6].contains(&number) {
                    return Ok(frame);
                }
            }
            Err(rustix::io::Errno::AGAIN) => std::thread::sleep(std::time::Duration::from_millis(5)),
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("no copy")
}
