//! Packets whose bytes lie in pages, all but the link header: what is done with them is the same.
//!
//! A test run of Linux 6.18 and older makes none (it refuses a `data_end` in the context and every flag for it; where it
//! does not, such runs are made as well), but a wire does: of a frame of a page or more that a packet socket sends, the kernel keeps the link header alone in the
//! buffer's own memory (`packet_alloc_skb`). Padding makes any frame as long as that, and is none of the packet.

use std::time::{Duration, Instant};

use anyhow::ensure;
use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;
use patchswitch_tests::netlab::{CLIENT_LINK, UPLINK};
use pnet::datalink::{DataLinkReceiver, DataLinkSender};
use proptest::strategy::{Strategy as _, ValueTree as _};

use crate::bench::{Bench, PORT, Seen, families, key};
use crate::frame::{self, Ip, Place, icmp, seal, tcp, udp};
use crate::model::{bytes, made};
use crate::seed::runner;
use crate::steer::{ACK, DRAINING, connection, listener};
use crate::wire::wire;

/// How many packets of a client.
const PACKETS: usize = 600;
/// Where the client is said to be.
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x77];
/// More than any page that Linux has on these processors.
const LENGTH: usize = 4400;
pub(crate) const RST: u8 = 4;

/// A bench whose links take long frames, and whose client says nothing by itself.
pub(crate) fn bench(label: &str) -> anyhow::Result<Bench> {
    let bench = Bench::new(label)?;
    let lab = &bench.lab;
    for (ns, link) in [
        (&lab.client, CLIENT_LINK),
        (&lab.host, UPLINK),
        (&lab.host, "lca"),
        (&lab.host, "lcb"),
        (&lab.a, "eth0"),
        (&lab.b, "eth0"),
    ] {
        ns.ip(&format!("link set {link} mtu 9000"))?;
    }
    lab.client.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
    lab.client.ip(&format!("addr flush dev {CLIENT_LINK}"))?;
    Ok(bench)
}

pub(crate) fn padded(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame.resize(LENGTH, 0);
    frame
}

/// What is counted of a frame that comes by the wire.
pub(crate) fn counted(
    bench: &mut Bench,
    sender: &mut Box<dyn DataLinkSender>,
    frame: &[u8],
    verdicts: usize,
) -> anyhow::Result<Vec<&'static str>> {
    let before = bench.counters()?;
    ensure!(matches!(sender.send_to(frame, None), Some(Ok(()))), "not sent");
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let after = bench.counters()?;
        let moved: Vec<_> = after
            .iter()
            .filter(|(name, count)| before.get(*name) != Some(count))
            .map(|(name, _)| *name)
            .collect();
        if moved.len() >= verdicts {
            return Ok(moved);
        }
        ensure!(Instant::now() < end, "{moved:?} is not all of it");
    }
}

/// The frame that was sent, as it arrived; nothing if it does not come.
fn arrived(receiver: &mut Box<dyn DataLinkReceiver>, wanted: &[u8]) -> bool {
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        // Others may come: what the kernel says by itself.
        if receiver.next().is_ok_and(|frame| frame == wanted) {
            return true;
        }
    }
    false
}

#[test]
fn what_lies_in_pages_goes_where_the_same_in_one_piece_goes() {
    let mut bench = bench("paged").unwrap();
    bench.attach(Hook::Uplink, UPLINK).unwrap();
    bench.word(DRAINING).unwrap();
    let mut held = Vec::new();
    for family in families() {
        for (ns, port) in [(&bench.lab.a, 1000), (&bench.lab.b, 2000)] {
            let listening = listener(ns, family).unwrap();
            held.push((connection(ns, &listening, family, port).unwrap(), listening));
        }
        bench.remember(key((family.client, 3000), PORT, frame::UDP), family.service, Slot::A, 0).unwrap();
    }
    let (mut sender, _) = wire(&bench.lab.client, CLIENT_LINK).unwrap();
    let mut partitions = [&bench.lab.a, &bench.lab.b].map(|ns| wire(ns, "eth0").unwrap().1);
    let (mut runner, strategy) = (runner().unwrap(), made());
    let mut seen = std::collections::BTreeMap::<&str, u32>::new();
    let (mut runs, mut refused) = (0, 0);
    for number in 0..PACKETS {
        let mut made = strategy.new_tree(&mut runner).unwrap().current();
        // Whole, as it would be shorter than it says otherwise; a reset could be one.
        (made.arrives, made.flags) = (100, made.flags & !RST);
        made.damage.clear();
        let frame = bytes(&made, families()[usize::from(made.v6)], bench.uplink.mac);
        let linear: Seen = bench.run(Hook::Uplink, bench.uplink, 0, &frame).unwrap();
        match bench.run_in_pages(bench.uplink, &frame).unwrap() {
            Some(seen) => {
                let is = (seen.action, &seen.frame, &seen.counted, &seen.compared);
                assert_eq!(
                    is,
                    (linear.action, &frame, &linear.counted, &linear.compared),
                    "{number}: {made:?}"
                );
                runs += 1;
            }
            None => refused += 1,
        }
        let paged = padded(&frame);
        let mut expected = [linear.counted, linear.compared].concat();
        expected.sort_unstable();
        let by_wire = counted(&mut bench, &mut sender, &paged, expected.len()).unwrap();
        assert_eq!(by_wire, expected, "{number}: {made:?}");
        for (receiver, verdict) in partitions.iter_mut().zip(["to_a", "to_b"]) {
            if by_wire.contains(&verdict) {
                assert!(arrived(receiver, &paged), "{number}: not as it was sent: {made:?}");
            }
        }
        for verdict in by_wire {
            *seen.entry(verdict).or_default() += 1;
        }
    }
    for verdict in ["to_a", "to_b", "kept_by_retiring", "malformed", "source_route", "to_both"] {
        assert!(seen.get(verdict).is_some_and(|n| *n >= 3), "{verdict}: {seen:?}");
    }
    println!("in pages: {seen:?}");
    // A kernel knows such runs or does not, whatever the packet is.
    assert!(runs == 0 || refused == 0, "{runs} test runs in pages, and {refused} were refused");
    if runs == 0 {
        println!("not tested by this kernel: test runs of packets in pages");
    }
}

#[test]
fn replies_that_lie_in_pages_are_rewritten_whole() {
    let mut bench = bench("pagedback").unwrap();
    bench.attach(Hook::FromPartition, "lca").unwrap();
    bench.word(DRAINING.with_notice(true)).unwrap();
    let (mut sender, _) = wire(&bench.lab.a, "eth0").unwrap();
    let (_, mut client) = wire(&bench.lab.client, CLIENT_LINK).unwrap();
    for family in families() {
        let v4 = family.client.is_ipv4();
        bench
            .lab
            .host
            .ip(&format!("neigh replace {} lladdr 02:00:00:00:00:77 dev {UPLINK}", family.client))
            .unwrap();
        let (own, to) = ((family.own_a, PORT), (family.client, 1000));
        let (rewritten, pong, number) = if v4 { ("rewritten_v4", 0, 1) } else { ("rewritten_v6", 129, 58) };
        for (port, service_port, protocol) in
            [(1000, PORT, frame::UDP), (1000, PORT, frame::TCP), (7, 0, number)]
        {
            bench
                .remember(key((family.client, port), service_port, protocol), family.service, Slot::A, 0)
                .unwrap();
        }
        let quoted = udp(to, (family.service, PORT), b"x").bytes();
        let place = Some(Place { offset: 0, more: true, id: 9 });
        let long = vec![0x5a; 3000];
        for (what, packet, at, events) in [
            ("a datagram", udp(own, to, b"answer"), 6, 1),
            ("a long datagram", udp(own, to, &long), 6, 1),
            ("a segment", tcp(own, to, ACK, b"x"), 16, 1),
            ("an echo", icmp(family.own_a, family.client, pong, [0, 7, 0, 1], b"pong"), 2, 1),
            ("an error", icmp(family.own_a, family.client, if v4 { 3 } else { 1 }, [0; 4], &quoted), 2, 0),
            ("a first fragment", Ip { place, ..udp(own, to, &[7; 64]) }, 6, 1),
        ] {
            let mut expected = vec!["out", rewritten];
            expected.extend((events == 1).then_some("learned"));
            expected.sort_unstable();
            let paged = padded(&packet.frame(bench.links[0].mac));
            let seen = counted(&mut bench, &mut sender, &paged, expected.len()).unwrap();
            assert_eq!(seen, expected, "{what}");
            let mut right = Ip { from: family.service, ..packet };
            if right.place.is_none() {
                seal(&mut right, at);
            } else {
                // The sum is about the whole datagram; what changes is the address in it.
                let mut whole = Ip { place: None, ..right.clone() };
                seal(&mut whole, at);
                right.payload = whole.payload;
            }
            // Only the link addresses are the next hop's.
            let mut wanted = padded(&right.frame(CLIENT_MAC));
            wanted[6..12].copy_from_slice(&bench.uplink.mac);
            assert!(arrived(&mut client, &wanted), "{what}, {}", family.client);
        }
        bench.forget().unwrap();
    }
}
