//! Cut off at any byte, a packet never goes to a partition without the whole key of its flow.

use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;

use crate::bench::{Bench, NEXT, REDIRECT, families, key};
use crate::frame::{ETHERNET, Ip, Place, UDP, icmp, tcp, udp};
use crate::steer::{ACK, DRAINING};

#[test]
fn no_prefix_is_steered_without_a_whole_key() {
    let mut bench = Bench::new("prefix").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    for family in families() {
        let v4 = family.client.is_ipv4();
        let header = if v4 { 20 } else { 40 };
        let (client, service) = ((family.client, 1000), (family.service, 80));
        let inner = tcp(service, client, ACK, b"data").bytes();
        let error = if v4 { 3 } else { 1 };
        let long = if v4 { vec![1; 40] } else { Vec::new() };
        let chain = if v4 { Vec::new() } else { vec![0, 60, 43] };
        let extra = if v4 { 40 } else { 24 };
        // The bytes of the packet that the decision needs: the header of a segment, a datagram or an echo, and the ports
        // of what an error quotes.
        let cases: [(&str, Ip, usize); 5] = [
            ("a segment", tcp(client, service, ACK, b"data"), header + 20),
            (
                "a segment behind options",
                Ip { options: long, extensions: chain, ..tcp(client, service, ACK, b"data") },
                header + extra + 20,
            ),
            ("a datagram", udp(client, service, b"data"), header + 8),
            (
                "an echo",
                icmp(family.client, family.service, if v4 { 8 } else { 128 }, [0; 4], b"x"),
                header + 8,
            ),
            (
                "an error",
                icmp(family.stranger, family.service, error, [0; 4], &inner),
                header + 8 + header + 4,
            ),
        ];
        for (what, packet, needed) in cases {
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

/// A reply that is to be rewritten, cut off at any byte: it is rewritten whole, or left as it is.
#[test]
fn no_prefix_of_a_reply_is_changed_in_part() {
    let mut bench = Bench::new("cutback").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    let link = bench.links[0];
    for family in families() {
        let v4 = family.client.is_ipv4();
        let client = (family.client, 1000);
        bench.remember(key(client, 80, UDP), family.service, Slot::A, 0).unwrap();
        let later = Place { offset: 0, more: true, id: 9 };
        let reply = udp((family.own_a, 80), client, b"answer");
        let first = Ip { place: Some(later), ..reply.clone() };
        let quoted = udp(client, (family.service, 80), b"question").bytes();
        let error = icmp(family.own_a, family.client, if v4 { 3 } else { 1 }, [0; 4], &quoted);
        let mut rewritten = 0;
        for packet in [reply, first, error] {
            let whole = packet.frame(link.mac);
            for length in ETHERNET + if v4 { 20 } else { 40 }..=whole.len() {
                let cut = whole[..length].to_vec();
                for frame in [cut.clone(), as_long_as_it_is(cut, v4)] {
                    let seen = bench.run(Hook::FromPartition, link, 0, &frame).unwrap();
                    let was = seen.counted.iter().any(|name| name.starts_with("rewritten"));
                    assert_eq!(was, seen.frame != frame, "{length} of {}: {seen:?}", whole.len());
                    rewritten += u32::from(was);
                }
            }
        }
        assert!(rewritten > 10, "{rewritten}");
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
