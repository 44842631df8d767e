//! Cut off at any byte, a packet never goes to a partition without the whole key of its flow.

use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;

use crate::bench::{Bench, DROP, Family, NEXT, REDIRECT, families, key};
use crate::frame::{ETHERNET, ICMP, ICMPV6, Ip, Place, TCP, UDP, ethernet, icmp, tcp, udp};
use crate::steer::{ACK, DRAINING};

/// Packets of a client, and how many bytes of each the decision needs: the header of a segment, a datagram or an echo,
/// and the ports of what an error quotes.
fn questions(family: Family) -> Vec<(&'static str, Ip, usize)> {
    let v4 = family.client.is_ipv4();
    let header = if v4 { 20 } else { 40 };
    let (client, service) = ((family.client, 1000), (family.service, 80));
    let (error, ping) = if v4 { (3, 8) } else { (1, 128) };
    let segment = tcp(client, service, ACK, b"data");
    let answer = tcp(service, client, ACK, b"data");
    let about = |inner: &Ip| icmp(family.stranger, family.service, error, [0; 4], &inner.bytes());
    let extra = if v4 { 40 } else { 24 };
    // As many as are read of IPv6, and as many bytes as IPv4 can have.
    let most = if v4 { 40 } else { 48 };
    let chain = [0, 60, 43, 51, 60, 60];
    let part = |offset, ip: Ip| Ip { place: Some(Place { offset, more: true, id: 7 }), ..ip };
    let place = if v4 { 0 } else { 8 };
    vec![
        ("a segment", segment.clone(), header + 20),
        ("a segment behind options", behind(&chain[..3], segment.clone()), header + extra + 20),
        ("a datagram", udp(client, service, b"data"), header + 8),
        ("a datagram behind many", behind(&chain, udp(client, service, b"data")), header + most + 8),
        ("an echo", icmp(family.client, family.service, ping, [0; 4], b"x"), header + 8),
        ("an error", about(&answer), header + 8 + header + 4),
        ("an error behind options", behind(&chain[..3], about(&answer)), header + extra + 8 + header + 4),
        (
            "an error about what is behind options",
            about(&behind(&chain[..3], answer.clone())),
            header + 8 + header + extra + 4,
        ),
        ("an error about a fragment", about(&part(0, answer)), header + 8 + header + place + 4),
        ("a first fragment", part(0, segment.clone()), header + place + 20),
        (
            "a first fragment behind options",
            part(0, behind(&chain[..3], segment)),
            header + extra + place + 20,
        ),
        // Whoever has the first one gets it; nobody is known to, so both do.
        ("a later fragment", part(9, Ip::new(client.0, service.0, UDP, vec![7; 9])), header + place),
    ]
}

/// The packet with options, or with extension headers of these numbers.
fn behind(chain: &[u8], packet: Ip) -> Ip {
    if packet.from.is_ipv4() {
        Ip { options: vec![1; 40], ..packet }
    } else {
        Ip { extensions: chain.to_vec(), ..packet }
    }
}

#[test]
fn no_prefix_is_steered_without_a_whole_key() {
    let mut bench = Bench::new("prefix").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    for family in families() {
        let v4 = family.client.is_ipv4();
        let header = if v4 { 20 } else { 40 };
        for (what, packet, needed) in questions(family) {
            let whole = packet.frame(bench.uplink.mac);
            for length in ETHERNET + 1..=whole.len() {
                // Cut off on its way, it says that it is longer than it is; sent as it is, it says the truth.
                let cut = whole[..length].to_vec();
                for (frame, steered) in [
                    (cut.clone(), length == whole.len()),
                    (as_long_as_it_is(cut, v4), length >= ETHERNET + needed),
                ] {
                    try_all(&mut bench, what, &frame, (steered, length < ETHERNET + header)).unwrap();
                }
            }
        }
    }
    bench.word(DRAINING.taken_over_by(Slot::A)).unwrap();
    bench.finish().unwrap();
}

/// A tag in the bytes: where it ends, and what is behind it, is nobody's to guess.
#[test]
fn no_prefix_of_a_tagged_packet_is_taken_for_another() {
    let mut bench = Bench::new("tagprefix").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    for family in families() {
        let client = (family.client, 1000);
        bench.remember(key(client, 80, UDP), family.service, Slot::A, 0).unwrap();
        let kind: u16 = if family.client.is_ipv4() { 0x0800 } else { 0x86dd };
        let tagged =
            |tag, ip: &Ip, mac| ethernet(mac, tag, &[&[0, 7], &kind.to_be_bytes()[..], &ip.bytes()].concat());
        let (link, uplink) = (bench.links[0], bench.uplink);
        for tag in [0x8100, 0x88a8] {
            let question = tagged(tag, &udp(client, (family.service, 80), b"question"), uplink.mac);
            let answer = tagged(tag, &udp((family.own_a, 80), client, b"answer"), link.mac);
            for (hook, on, whole, action) in
                [(Hook::Uplink, uplink, question, NEXT), (Hook::FromPartition, link, answer, DROP)]
            {
                for length in ETHERNET + 1..=whole.len() {
                    let seen = bench.run(hook, on, 0, &whole[..length]).unwrap();
                    assert_eq!(seen.action, action, "{length} bytes at {hook:?}: {seen:?}");
                    assert_eq!(seen.frame, whole[..length], "{length} bytes at {hook:?}");
                }
            }
        }
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

/// What a partition sends of its flows in flight; a first fragment before the one that follows it.
fn answers(family: Family) -> Vec<(&'static str, Ip)> {
    let (error, pong) = if family.client.is_ipv4() { (3, 0) } else { (1, 129) };
    let (own, client) = ((family.own_a, 80), (family.client, 1000));
    let chain = [60, 0, 43];
    let datagram = udp(own, client, b"answer");
    let question = udp(client, (family.service, 80), b"question");
    let about = |asked: &Ip| icmp(family.own_a, family.client, error, [0; 4], &asked.bytes());
    let part = |offset, ip: Ip| Ip { place: Some(Place { offset, more: true, id: 9 }), ..ip };
    let later = Ip::new(own.0, client.0, UDP, vec![7; 16]);
    vec![
        ("a datagram", datagram.clone()),
        ("a datagram behind options", behind(&chain, datagram.clone())),
        ("a segment", tcp(own, client, ACK, b"data")),
        ("an echo", icmp(family.own_a, family.client, pong, [0, 7, 0, 1], b"pong")),
        ("an error", about(&question)),
        ("an error behind options", behind(&chain, about(&question))),
        ("an error about what is behind options", about(&behind(&chain, question.clone()))),
        ("an error about a fragment", about(&part(0, question))),
        ("a first fragment", part(0, datagram.clone())),
        ("a later fragment", part(9, later.clone())),
        ("a first fragment behind options", part(0, behind(&chain, datagram))),
        ("a later fragment behind options", part(9, behind(&chain, later))),
    ]
}

/// A reply that is to be rewritten, cut off at any byte: it is rewritten whole, or left as it is.
#[test]
fn no_prefix_of_a_reply_is_changed_in_part() {
    let mut bench = Bench::new("cutback").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    let link = bench.links[0];
    for family in families() {
        let v4 = family.client.is_ipv4();
        let echo = if v4 { ICMP } else { ICMPV6 };
        for (port, service_port, protocol) in [(1000, 80, UDP), (1000, 80, TCP), (7, 0, echo)] {
            let key = key((family.client, port), service_port, protocol);
            bench.remember(key, family.service, Slot::A, 0).unwrap();
        }
        let source = if v4 { ETHERNET + 12..ETHERNET + 16 } else { ETHERNET + 8..ETHERNET + 24 };
        for (what, packet) in answers(family) {
            let whole = packet.frame(link.mac);
            let to = Ip { from: family.service, ..packet }.frame(link.mac);
            let mut rewritten = 0;
            for length in ETHERNET + if v4 { 20 } else { 40 }..=whole.len() {
                let cut = whole[..length].to_vec();
                for frame in [cut.clone(), as_long_as_it_is(cut, v4)] {
                    let seen = bench.run(Hook::FromPartition, link, 0, &frame).unwrap();
                    let was = seen.counted.iter().any(|name| name.starts_with("rewritten"));
                    assert_eq!(was, seen.frame != frame, "{what}: {length} of {}: {seen:?}", whole.len());
                    let is = &seen.frame[source.clone()];
                    assert_eq!(is, if was { &to[source.clone()] } else { &frame[source.clone()] }, "{what}");
                    rewritten += u32::from(was);
                }
            }
            // Whole, it is rewritten however its length is stated.
            assert!(rewritten >= 2, "{what}: {rewritten}");
        }
        bench.forget().unwrap();
    }
    bench.finish().unwrap();
}

/// A frame whose network header states the length that there is.
fn as_long_as_it_is(mut frame: Vec<u8>, v4: bool) -> Vec<u8> {
    let length = frame.len() - ETHERNET;
    let (at, stated) = if v4 { (ETHERNET + 2, length) } else { (ETHERNET + 4, length.saturating_sub(40)) };
    if let Some(field) = frame.get_mut(at..at + 2) {
        field.copy_from_slice(&(stated as u16).to_be_bytes());
    }
    frame
}

fn try_all(
    bench: &mut Bench,
    what: &str,
    frame: &[u8],
    (steered, is_short): (bool, bool),
) -> anyhow::Result<()> {
    let seen = match bench.run(Hook::Uplink, bench.uplink, 0, frame) {
        // From 6.18 on the kernel does not take packets without a whole network header for a test.
        Err(_) if is_short => return Ok(()),
        other => other?,
    };
    let action = if steered { REDIRECT } else { NEXT };
    assert_eq!(seen.action, action, "{what}, {} bytes: {seen:?}", frame.len());
    assert_eq!(seen.frame, frame);
    // The other direction must stand it as well.
    let back = bench.links[0];
    bench.run(Hook::FromPartition, back, 0, frame)?;
    bench.run(Hook::ToPartition, back, 0, frame)?;
    Ok(())
}
