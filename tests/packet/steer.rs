//! Who gets a client's packet: each branch of the rules, in both families.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;
use patchswitch_common::word::Word;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::tcp_sockets_in;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with};

use crate::bench::{Bench, Family, NEXT, PORT, REDIRECT, Seen, families, key, service};
use crate::direction::{DIRECTIONS, Retiring};
use crate::frame::{self, Ip, Place, ethernet, icmp, sctp, tcp, udp};

pub(crate) const SYN: u8 = 2;
pub(crate) const FIN: u8 = 1;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

pub(crate) const STEADY: Word = Word::steady(Slot::A, 1);
pub(crate) const DRAINING: Word = STEADY.taken_over_by(Slot::B);

pub(crate) fn check(seen: &Seen, action: i32, counted: &[&str], what: &str) {
    let mut counted = counted.to_vec();
    counted.sort_unstable();
    assert_eq!((seen.action, seen.counted.as_slice()), (action, counted.as_slice()), "{what}");
}

pub(crate) fn tcp_socket(family: Family, local: SocketAddr) -> anyhow::Result<std::os::fd::OwnedFd> {
    let kind = if family.client.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(kind, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    bind(&socket, &local)?;
    Ok(socket)
}

/// A listener of a partition, and a connection to it from the client's address, both ends inside.
pub(crate) fn connection(
    ns: &Ns,
    listener: &TcpListener,
    family: Family,
    port: u16,
) -> anyhow::Result<[TcpStream; 2]> {
    let client = ns.enter(|| {
        let socket = tcp_socket(family, SocketAddr::new(family.client, port))?;
        connect(&socket, &service(family))?;
        Ok(TcpStream::from(socket))
    })?;
    Ok([client, listener.accept()?.0])
}

pub(crate) fn listener(ns: &Ns, family: Family) -> anyhow::Result<TcpListener> {
    ns.enter(|| Ok(TcpListener::bind(service(family))?))
}

pub(crate) fn segment(family: Family, port: u16, flags: u8) -> Ip {
    tcp((family.client, port), (family.service, PORT), flags, b"data")
}

/// Destinations that are no one machine's.
fn all_and_nobody(family: Family) -> impl Iterator<Item = IpAddr> {
    let v4 = ["224.0.0.1", "239.1.2.3", "255.255.255.255", "10.77.0.255", "127.0.0.1"];
    let v6 = ["ff02::1", "ff02::fb", "ff0e::1", "::1", "::"];
    let all = if family.client.is_ipv4() { v4 } else { v6 };
    all.into_iter().filter_map(|text| text.parse().ok())
}

#[test]
fn what_is_not_ours_is_left_to_others() {
    let mut bench = Bench::new("notours").unwrap();
    bench.word(DRAINING).unwrap();
    let mac = bench.uplink.mac;
    for family in families() {
        let ours = segment(family, 1000, SYN);
        let other = Ip { to: family.host, ..ours.clone() };
        let foreign = ours.frame([2, 0, 0, 0, 0, 77]);
        let broadcast = ours.frame([0xff; 6]);
        let kind = if family.client.is_ipv4() { 0x0800_u16 } else { 0x86dd };
        let tagged = [&[0, 7], &kind.to_be_bytes()[..], &ours.bytes()].concat();
        for (what, frame) in [
            ("another address", other.frame(mac)),
            ("somebody else's frame", foreign),
            ("a broadcast frame", broadcast),
            ("another EtherType", ethernet(mac, 0x0806, &[0; 46])),
            ("a VLAN tag in the bytes", ethernet(mac, 0x8100, &tagged)),
            ("a provider's tag in the bytes", ethernet(mac, 0x88a8, &tagged)),
            ("half a VLAN tag", ethernet(mac, 0x8100, &[0, 7])),
            ("a VLAN tag without anything", ethernet(mac, 0x8100, &[0, 7, 8])),
            ("a length instead of a type", ethernet(mac, 46, &[0x42; 46])),
        ]
        .into_iter()
        .chain(
            all_and_nobody(family)
                .map(|to| ("a group, everybody or the loopback", Ip { to, ..ours.clone() }.frame(mac))),
        ) {
            let seen = bench.run(Hook::Uplink, bench.uplink, 0, &frame).unwrap();
            check(&seen, NEXT, &["not_ours"], what);
            assert_eq!(seen.frame, frame);
        }
    }
    bench.finish().unwrap();
}

#[test]
fn in_peace_all_of_it_goes_to_who_serves() {
    let mut bench = Bench::new("steady").unwrap();
    for (word, verdict) in [(STEADY, "to_a"), (Word::steady(Slot::B, 7), "to_b")] {
        bench.word(word).unwrap();
        for family in families() {
            let client = (family.client, 1000);
            for packet in [
                segment(family, 1000, SYN),
                segment(family, 1000, ACK),
                udp(client, (family.service, PORT), b"x"),
                icmp(
                    family.client,
                    family.service,
                    if family.client.is_ipv4() { 8 } else { 128 },
                    [0; 4],
                    b"x",
                ),
                Ip::new(family.client, family.service, 47, vec![0; 8]),
            ] {
                check(&bench.client(&packet).unwrap(), REDIRECT, &[verdict], "steady");
            }
        }
    }
    // Nobody is there yet.
    bench.empty(Slot::B).unwrap();
    for family in families() {
        check(&bench.client(&segment(family, 1000, SYN)).unwrap(), NEXT, &["unsteered"], "an empty slot");
    }
    bench.finish().unwrap();
}

#[test]
fn what_is_malformed_is_left_to_the_kernel() {
    let mut bench = Bench::new("malformed").unwrap();
    bench.word(DRAINING).unwrap();
    let [v4, v6] = families();
    let mac = bench.uplink.mac;
    let with = |family: Family, at: usize, value: u8| {
        let mut frame = segment(family, 1000, ACK).frame(mac);
        frame[frame::ETHERNET + at] = value;
        frame
    };
    let short_total = {
        let mut frame = with(v4, 2, 0);
        frame[frame::ETHERNET + 3] = 19;
        frame
    };
    let long_chain = Ip { extensions: vec![60; 7], ..segment(v6, 1000, ACK) };
    for (what, frame) in [
        ("version 6 in an IPv4 frame", with(v4, 0, 0x65)),
        ("a header of four words", with(v4, 0, 0x44)),
        ("a total length shorter than the header", short_total),
        ("version 4 in an IPv6 frame", with(v6, 0, 0x40)),
        ("too many extension headers", long_chain.frame(mac)),
        ("an extension header beyond the end", {
            let mut frame = Ip { extensions: vec![0], ..segment(v6, 1000, ACK) }.frame(mac);
            frame[frame::ETHERNET + 41] = 255;
            frame
        }),
    ] {
        let seen = bench.run(Hook::Uplink, bench.uplink, 0, &frame).unwrap();
        check(&seen, NEXT, &["malformed"], what);
    }
    let _listening = listener(&bench.lab.a, v6).unwrap();
    // Eight of them are one too many, six are not.
    let chain = Ip { extensions: vec![0, 60, 43, 60, 51, 60], ..segment(v6, 1000, ACK) };
    check(&bench.client(&chain).unwrap(), REDIRECT, &["to_b"], "six extension headers");
    bench.finish().unwrap();
}

#[test]
fn neighbour_discovery_is_the_hosts() {
    let mut bench = Bench::new("neighbour").unwrap();
    let [_, v6] = families();
    for word in [STEADY, DRAINING] {
        bench.word(word).unwrap();
        for kind in 133..=136 {
            let packet = icmp(v6.client, v6.service, kind, [0; 4], &[0; 16]);
            check(&bench.client(&packet).unwrap(), NEXT, &["for_host"], "neighbour discovery");
        }
    }
    bench.finish().unwrap();
}

#[test]
fn a_connection_is_its_owners() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("owner").unwrap();
        let [retiring, serving] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        for family in families() {
            let listening = listener(&retiring, family).unwrap();
            let _ends = connection(&retiring, &listening, family, 1000).unwrap();
            let _other = listener(&serving, family).unwrap();
            let kept = way.kept();
            for flags in [ACK, ACK | FIN, SYN, RST, SYN | ACK, 0] {
                let seen = bench.client(&segment(family, 1000, flags)).unwrap();
                check(&seen, REDIRECT, kept, &format!("rule 1, flags {flags:#x}"));
            }
            for flags in [ACK, SYN, RST, ACK | FIN] {
                let seen = bench.client(&segment(family, 1001, flags)).unwrap();
                check(&seen, REDIRECT, way.moved(), &format!("rules 2, 4 and 5, flags {flags:#x}"));
            }
            // The same with the roles exchanged: a flow of the active one needs no question.
            bench.word(Retiring(way.0.other()).word()).unwrap();
            for port in [1000, 1001] {
                let seen = bench.client(&segment(family, port, ACK)).unwrap();
                check(&seen, REDIRECT, Retiring(way.0.other()).moved(), "given back");
            }
            bench.word(way.word()).unwrap();
        }
        bench.finish().unwrap();
    }
}

#[test]
fn options_and_extension_headers_change_nothing() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("options").unwrap();
        let [retiring, _] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        let kept = way.kept();
        for family in families() {
            let listening = listener(&retiring, family).unwrap();
            let _ends = connection(&retiring, &listening, family, 1000).unwrap();
            let plain = segment(family, 1000, ACK);
            let variants: Vec<Ip> = if family.client.is_ipv4() {
                [4, 8, 40].map(|length| Ip { options: vec![1; length], ..plain.clone() }).into()
            } else {
                [vec![0], vec![60], vec![0, 60], vec![43], vec![51, 60]]
                    .map(|extensions| Ip { extensions, ..plain.clone() })
                    .into()
            };
            for variant in variants {
                check(&bench.client(&variant).unwrap(), REDIRECT, kept, "options");
            }
        }
        bench.finish().unwrap();
    }
}

/// What the network header says besides whose packet it is.
#[test]
fn other_fields_of_the_header_change_nothing() {
    let mut bench = Bench::new("fields").unwrap();
    bench.word(DRAINING).unwrap();
    for family in families() {
        let listening = listener(&bench.lab.a, family).unwrap();
        let _ends = connection(&bench.lab.a, &listening, family, 1000).unwrap();
        // Where, by which bits, and to what.
        let fields: &[(&str, usize, u8, u8)] = if family.client.is_ipv4() {
            &[
                ("the last hop", 8, 0xff, 1),
                ("no hop left", 8, 0xff, 0),
                ("every bit of the class of service", 1, 0xff, 0xff),
                ("not to be fragmented", 6, 0x40, 0x40),
                ("the reserved bit", 6, 0x80, 0x80),
                ("an identification", 5, 0xff, 7),
                ("a wrong sum of the header", 11, 0xff, 0x55),
            ]
        } else {
            &[
                ("the last hop", 7, 0xff, 1),
                ("no hop left", 7, 0xff, 0),
                ("every bit of the traffic class", 0, 0x0f, 0x0f),
                ("every bit of the flow label", 1, 0xff, 0xff),
            ]
        };
        for (port, counted) in [(1000, &["to_a", "kept_by_retiring"][..]), (1001, &["to_b"])] {
            for (what, at, bits, value) in fields {
                let mut frame = segment(family, port, ACK).frame(bench.uplink.mac);
                let byte = &mut frame[frame::ETHERNET + at];
                *byte = *byte & !bits | value;
                let seen = bench.run(Hook::Uplink, bench.uplink, 0, &frame).unwrap();
                check(&seen, REDIRECT, counted, what);
                assert_eq!(seen.frame, frame, "{what}");
            }
        }
        // Without a flow that anybody could know: who serves gets it.
        for number in [4, 41, 50, 59, 253] {
            let other = Ip::new(family.client, family.service, number, vec![0x45; 40]);
            check(&bench.client(&other).unwrap(), REDIRECT, &["to_b"], &format!("protocol {number}"));
        }
    }
    bench.finish().unwrap();
}

#[test]
fn a_connection_that_the_partition_opens_is_its_own() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("synsent").unwrap();
        let [retiring, _] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        for family in families() {
            // Nobody answers at the host's address: the socket stays in SYN_SENT.
            let remote = SocketAddr::new(family.stranger, 443);
            let opening = retiring.enter(|| {
                let via = if family.client.is_ipv4() { "10.66.6.0/24" } else { "fd66::/64" };
                retiring.ip(&format!("route add {via} dev eth0"))?;
                let socket = tcp_socket(family, SocketAddr::new(family.service, 5555))?;
                rustix::io::ioctl_fionbio(&socket, true)?;
                let connected = connect(&socket, &remote);
                anyhow::ensure!(connected == Err(rustix::io::Errno::INPROGRESS), "{connected:?}");
                Ok(socket)
            });
            let _opening = opening.unwrap();
            let answer = tcp((family.stranger, 443), (family.service, 5555), SYN | ACK, b"");
            check(&bench.client(&answer).unwrap(), REDIRECT, way.kept(), "SYN_SENT");
        }
        bench.finish().unwrap();
    }
}

/// Makes the remains of a connection on the server's side.
pub(crate) fn time_wait(ns: &Ns, listening: &TcpListener, family: Family, port: u16) -> anyhow::Result<()> {
    let [client, server] = connection(ns, listening, family, port)?;
    drop(server);
    drop(client);
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        let there =
            |s: &patchswitch_tests::observe::TcpSocket| s.state == "TIME-WAIT" && s.peer.port() == port;
        if tcp_sockets_in(ns)?.iter().any(there) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    anyhow::bail!("no TIME-WAIT")
}

#[test]
fn remains_of_a_connection_keep_all_but_a_new_one() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("timewait").unwrap();
        let [retiring, serving] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        for family in families() {
            let listening = listener(&retiring, family).unwrap();
            time_wait(&retiring, &listening, family, 1000).unwrap();
            let kept = way.kept();
            check(
                &bench.client(&segment(family, 1000, ACK | FIN)).unwrap(),
                REDIRECT,
                kept,
                "a repeated FIN",
            );
            check(&bench.client(&segment(family, 1000, ACK)).unwrap(), REDIRECT, kept, "an ACK");
            check(
                &bench.client(&segment(family, 1000, SYN)).unwrap(),
                REDIRECT,
                way.moved(),
                "the tuple used again",
            );
            let other = listener(&serving, family).unwrap();
            check(
                &bench.client(&segment(family, 1000, ACK)).unwrap(),
                REDIRECT,
                kept,
                "a listener is no socket",
            );
            let _ends = connection(&serving, &other, family, 1000).unwrap();
            for flags in [ACK, ACK | FIN, RST] {
                check(
                    &bench.client(&segment(family, 1000, flags)).unwrap(),
                    REDIRECT,
                    way.moved(),
                    "its segments",
                );
            }
        }
        bench.finish().unwrap();
    }
}

#[test]
fn datagrams_follow_a_connected_socket_or_what_was_learned() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("datagram").unwrap();
        let [retiring, _] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        for family in families() {
            let (client, to) = ((family.client, 1000), (family.service, PORT));
            let packet = udp(client, to, b"question");
            let flow = key(client, PORT, frame::UDP);
            let any: IpAddr = if family.client.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let wild = retiring.enter(|| Ok(UdpSocket::bind((any, PORT))?)).unwrap();
            check(&bench.client(&packet).unwrap(), REDIRECT, way.moved(), "a wildcard socket tells nothing");
            drop(wild);
            let connected = retiring.enter(|| -> anyhow::Result<UdpSocket> {
                let socket = UdpSocket::bind(service(family))?;
                socket.connect(client)?;
                Ok(socket)
            });
            let connected = connected.unwrap();
            let kept = way.kept();
            check(&bench.client(&packet).unwrap(), REDIRECT, kept, "connected");
            drop(connected);
            for (what, local, slot, age_ns, counted) in [
                ("learned", family.service, way.0, 0, kept),
                ("learned of the active one", family.service, way.0.other(), 0, way.moved()),
                ("learned too long ago", family.service, way.0, 11_000_000_000, way.moved()),
                ("learned of another address", way.own(family), way.0, 0, way.moved()),
            ] {
                bench.remember(flow, local, slot, age_ns).unwrap();
                check(&bench.client(&packet).unwrap(), REDIRECT, counted, what);
            }
            bench.forget().unwrap();
            check(&bench.client(&packet).unwrap(), REDIRECT, way.moved(), "unknown");
        }
        bench.finish().unwrap();
    }
}

#[test]
fn echoes_and_other_protocols_follow_what_was_learned() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("echo").unwrap();
        bench.word(way.word()).unwrap();
        for family in families() {
            let (request, protocol) =
                if family.client.is_ipv4() { (8, frame::ICMP) } else { (128, frame::ICMPV6) };
            let echo = |id: u8| icmp(family.client, family.service, request, [0, id, 0, 1], b"ping");
            let other = Ip::new(family.client, family.service, 47, vec![0; 16]);
            bench.remember(key((family.client, 7), 0, protocol), family.service, way.0, 0).unwrap();
            let kept = way.kept();
            check(&bench.client(&echo(7)).unwrap(), REDIRECT, kept, "its identifier");
            check(&bench.client(&echo(8)).unwrap(), REDIRECT, way.moved(), "another one");
            check(&bench.client(&other).unwrap(), REDIRECT, way.moved(), "GRE");
            bench.remember(key((family.client, 0), 0, 47), family.service, way.0, 0).unwrap();
            check(&bench.client(&other).unwrap(), REDIRECT, kept, "GRE, learned");
            // Protocols with ports: by the whole flow, and not all of a client's.
            for number in [frame::SCTP, 33, 136] {
                bench.forget().unwrap();
                bench.remember(key((family.client, 1000), PORT, number), family.service, way.0, 0).unwrap();
                let packet = |port, chunk: &[u8]| Ip {
                    protocol: number,
                    ..sctp((family.client, port), (family.service, PORT), chunk)
                };
                check(&bench.client(&packet(1000, b"data")).unwrap(), REDIRECT, kept, "its ports");
                check(&bench.client(&packet(1001, b"data")).unwrap(), REDIRECT, way.moved(), "other ports");
                let mut short = packet(1000, b"");
                short.payload.truncate(7);
                check(&bench.client(&short).unwrap(), NEXT, &["malformed"], "seven bytes");
            }
            bench.forget().unwrap();
        }
        bench.finish().unwrap();
    }
}

#[test]
fn errors_follow_the_packet_they_carry() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("errors").unwrap();
        let [retiring, _] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        for family in families() {
            let listening = listener(&retiring, family).unwrap();
            let _ends = connection(&retiring, &listening, family, 1000).unwrap();
            let v4 = family.client.is_ipv4();
            let kinds: &[u8] = if v4 { &[3, 11, 12] } else { &[1, 2, 3, 4] };
            let kept = way.kept();
            let about = |inner: &Ip, length: usize| {
                let mut quoted = inner.bytes();
                quoted.truncate(length);
                quoted
            };
            let (service, client) = ((family.service, PORT), |port| (family.client, port));
            bench.remember(key(client(1000), PORT, frame::UDP), family.service, way.0, 0).unwrap();
            let echo_protocol = if v4 { frame::ICMP } else { frame::ICMPV6 };
            bench.remember(key((family.client, 7), 0, echo_protocol), family.service, way.0, 0).unwrap();
            bench.remember(key(client(1000), PORT, frame::SCTP), family.service, way.0, 0).unwrap();
            let (header, answer) = if v4 { (20, 0) } else { (40, 129) };
            let later = Place { offset: 185, more: false, id: 9 };
            for (what, inner, counted) in [
                ("a segment", tcp(service, client(1000), ACK, b"data"), kept),
                ("a segment of nobody", tcp(service, client(1001), ACK, b"data"), way.moved()),
                ("a datagram", udp(service, client(1000), b"data"), kept),
                ("a datagram of nobody", udp(service, client(1001), b"data"), way.moved()),
                ("an echo", icmp(family.service, family.client, answer, [0, 7, 0, 1], b"pong"), kept),
                (
                    "an echo of nobody",
                    icmp(family.service, family.client, answer, [0, 8, 0, 1], b"pong"),
                    way.moved(),
                ),
                (
                    "a later fragment",
                    Ip { place: Some(later), ..udp(service, client(1000), b"data") },
                    &["to_both"],
                ),
                ("another protocol", Ip::new(family.service, family.client, 47, vec![0; 8]), way.moved()),
                ("an association", sctp(service, client(1000), b"chunk"), kept),
                ("an association of nobody", sctp(service, client(1001), b"chunk"), way.moved()),
            ] {
                for kind in kinds {
                    // Eight bytes of what follows the header are sure to be there (RFC 792), and no more.
                    for length in [header + 8, usize::MAX] {
                        let quoted = about(&inner, length);
                        let error = icmp(family.stranger, family.service, *kind, [0, 0, 5, 0], &quoted);
                        let seen = bench.client(&error).unwrap();
                        check(&seen, REDIRECT, counted, &format!("type {kind} about {what}, {length} bytes"));
                    }
                }
            }
            bench.forget().unwrap();
        }
        bench.finish().unwrap();
    }
}

/// What an error says of a path is passed on as it is, a lie as well: the partition's kernel knows the least.
#[test]
fn errors_pass_whatever_they_say_of_the_path() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("mtu").unwrap();
        let [retiring, _] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        for family in families() {
            let listening = listener(&retiring, family).unwrap();
            let _ends = connection(&retiring, &listening, family, 1000).unwrap();
            for (port, counted) in [(1000, way.kept()), (1001, way.moved())] {
                let inner = tcp((family.service, PORT), (family.client, port), ACK, b"data").bytes();
                for mtu in [0_u16, 68, 1279, 1280, 1500, 65535] {
                    let [high, low] = mtu.to_be_bytes();
                    // Fragmentation needed; packet too big.
                    let mut error = icmp(family.stranger, family.service, 2, [0, 0, high, low], &inner);
                    if family.client.is_ipv4() {
                        (error.payload[0], error.payload[1]) = (3, 4);
                        frame::seal(&mut error, 2);
                    }
                    check(&bench.client(&error).unwrap(), REDIRECT, counted, &format!("MTU {mtu}"));
                }
            }
        }
        bench.finish().unwrap();
    }
}

/// What IPv6 has between the header that an error quotes and the ports.
#[test]
fn errors_follow_a_packet_with_extension_headers() {
    let mut bench = Bench::new("chained").unwrap();
    bench.word(DRAINING).unwrap();
    let [_, family] = families();
    let listening = listener(&bench.lab.a, family).unwrap();
    let _ends = connection(&bench.lab.a, &listening, family, 1000).unwrap();
    let (service, client) = ((family.service, PORT), |port| (family.client, port));
    for (port, protocol) in [(PORT, frame::UDP), (0, frame::ICMPV6)] {
        bench.remember(key(client(1000), port, protocol), family.service, Slot::A, 0).unwrap();
    }
    let kept = &["to_a", "kept_by_retiring"][..];
    let quoted = |extensions: &[u8], place: Option<Place>, inner: Ip| Ip {
        extensions: extensions.to_vec(),
        place,
        ..inner
    };
    let [high, low] = 1000_u16.to_be_bytes();
    let pong = icmp(family.service, family.client, 129, [high, low, 0, 1], b"pong");
    let (first, later) = (Place { offset: 0, more: true, id: 9 }, Place { offset: 185, more: false, id: 9 });
    for kind in 1..=4 {
        for chain in [&[0][..], &[60], &[43], &[51, 60], &[0, 60, 43, 60, 51, 60]] {
            for (what, inner, counted) in [
                ("a segment", tcp(service, client(1000), ACK, b"data"), kept),
                ("a segment of nobody", tcp(service, client(1001), ACK, b"data"), &["to_b"]),
                ("a datagram", udp(service, client(1000), b"data"), kept),
                ("a datagram of nobody", udp(service, client(1001), b"data"), &["to_b"]),
                ("an echo", pong.clone(), kept),
            ] {
                let inner = quoted(chain, None, inner).bytes();
                let error = icmp(family.stranger, family.service, kind, [0, 0, 5, 0], &inner);
                let seen = bench.client(&error).unwrap();
                check(&seen, REDIRECT, counted, &format!("type {kind} about {what} behind {chain:?}"));
            }
        }
        let segment = || tcp(service, client(1000), ACK, b"data");
        for (what, inner, action, counted) in [
            ("the first fragment", quoted(&[60], Some(first), segment()), REDIRECT, kept),
            ("a later one", quoted(&[60], Some(later), segment()), REDIRECT, &["to_both"]),
            ("what is behind seven", quoted(&[60; 7], None, segment()), NEXT, &["malformed"]),
        ] {
            let error = icmp(family.stranger, family.service, kind, [0, 0, 5, 0], &inner.bytes());
            check(&bench.client(&error).unwrap(), action, counted, &format!("type {kind} about {what}"));
        }
        // Cut off within the chain it tells of no flow.
        let mut cut = quoted(&[0, 60], None, segment()).bytes();
        cut.truncate(40 + 12);
        let error = icmp(family.stranger, family.service, kind, [0, 0, 5, 0], &cut);
        check(&bench.client(&error).unwrap(), NEXT, &["malformed"], "a chain that is cut off");
    }
    bench.finish().unwrap();
}

#[test]
fn a_namespace_that_is_not_known_owns_nothing() {
    let mut bench = Bench::new("nonsid").unwrap();
    bench.word(DRAINING).unwrap();
    // The host may have a connection with the same two ends, which is no partition's.
    bench.lab.host.ip("link set lo up").unwrap();
    let mut held = Vec::new();
    for family in families() {
        for address in [family.service, family.client] {
            let width = if family.client.is_ipv4() { "/32" } else { "/128 nodad" };
            bench.lab.host.ip(&format!("addr add {address}{width} dev lo")).unwrap();
        }
        for ns in [&bench.lab.a, &bench.lab.host] {
            let listening = listener(ns, family).unwrap();
            held.push((connection(ns, &listening, family, 1000).unwrap(), listening));
        }
    }
    let nothing = &["to_b", "nothing_in_retiring"][..];
    for family in families() {
        let kept = &["to_a", "kept_by_retiring"][..];
        check(&bench.client(&segment(family, 1000, ACK)).unwrap(), REDIRECT, kept, "its own namespace");
    }
    for nsid in [999_999, -1, i32::MIN] {
        bench.misplace(Slot::A, nsid).unwrap();
        for family in families() {
            for flags in [ACK, SYN, ACK | FIN] {
                let what = format!("the id {nsid}, flags {flags:#x}");
                check(&bench.client(&segment(family, 1000, flags)).unwrap(), REDIRECT, nothing, &what);
            }
            let udp = udp((family.client, 1000), (family.service, PORT), b"x");
            check(&bench.client(&udp).unwrap(), REDIRECT, &["to_b"], "a datagram tells nothing of it");
        }
    }
    bench.finish().unwrap();
}

#[test]
fn a_port_that_nobody_has_any_more_is_counted() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("closed").unwrap();
        let [retiring, _] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        for family in families() {
            let syn = segment(family, 1000, SYN);
            let listening = listener(&retiring, family).unwrap();
            check(&bench.client(&syn).unwrap(), REDIRECT, way.moved(), "a listener is something");
            drop(listening);
            let nothing = way.nothing();
            check(&bench.client(&syn).unwrap(), REDIRECT, nothing, "the port is closed");
            // Of the serving one the programs ask only what they must, and this is not about it.
            let listening = listener(&retiring, family).unwrap();
            time_wait(&retiring, &listening, family, 1000).unwrap();
            let kept = way.kept();
            check(
                &bench.client(&segment(family, 1000, ACK)).unwrap(),
                REDIRECT,
                kept,
                "nothing in the other",
            );
        }
        bench.finish().unwrap();
    }
}
