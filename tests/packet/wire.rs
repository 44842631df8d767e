//! What a test run cannot make: the kernel takes a VLAN tag out of a frame when it comes in, before the program sees it.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;
use patchswitch_common::word::Word;
use patchswitch_tests::netlab::{CLIENT_LINK, Ns, UPLINK};
use pnet::datalink::{self, Channel, DataLinkReceiver, DataLinkSender};

use crate::bench::{Bench, Family, PORT, families};
use crate::frame::{ETHERNET, udp};
use crate::steer::DRAINING;

/// A frame with a tag: priority and number of the VLAN.
pub(crate) fn tagged(frame: &[u8], priority: u16, number: u16) -> Vec<u8> {
    let tag = (priority << 13 | number).to_be_bytes();
    [&frame[..12], &[0x81, 0x00], &tag, &frame[12..]].concat()
}

/// What sends frames as they are, and sees those that come.
pub(crate) fn wire(
    ns: &Ns,
    link: &str,
) -> anyhow::Result<(Box<dyn DataLinkSender>, Box<dyn DataLinkReceiver>)> {
    let config = datalink::Config {
        write_buffer_size: 16_384,
        read_buffer_size: 16_384,
        read_timeout: Some(Duration::from_millis(100)),
        ..datalink::Config::default()
    };
    ns.enter(|| {
        let link = datalink::interfaces().into_iter().find(|found| found.name == link);
        match datalink::channel(&link.context("no link")?, config)? {
            Channel::Ethernet(sender, receiver) => Ok((sender, receiver)),
            _ => anyhow::bail!("not a link of frames"),
        }
    })
}

/// A server for a family in each partition, whose kernel does not ask where clients are.
fn servers(bench: &Bench, family: Family) -> anyhow::Result<[UdpSocket; 2]> {
    let of = |ns: &Ns| {
        for link in ["all", "eth0"] {
            ns.sysctl(&format!("net/ipv4/conf/{link}/rp_filter"), "0")?;
        }
        ns.enter(|| {
            let socket = UdpSocket::bind(SocketAddr::new(family.service, PORT))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })
    };
    Ok([of(&bench.lab.a)?, of(&bench.lab.b)?])
}

/// What the servers get, and which of them, up to the datagram that says the last word.
fn received(servers: &[UdpSocket; 2], last: &[u8]) -> anyhow::Result<Vec<(usize, Vec<u8>)>> {
    let (mut bytes, end) = ([0; 64], Instant::now() + Duration::from_secs(5));
    let mut all: Vec<(usize, Vec<u8>)> = Vec::new();
    while all.last().is_none_or(|(_, text)| text != last) {
        anyhow::ensure!(Instant::now() < end, "the last word did not come after {all:?}");
        for (index, server) in servers.iter().enumerate() {
            match server.recv_from(&mut bytes) {
                Ok((length, _)) => all.push((index, bytes[..length].to_vec())),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(all)
}

/// A test run takes none either, so the programs never see one.
#[test]
fn nothing_shorter_than_its_header_comes_in() {
    let mut bench = Bench::new("runt").unwrap();
    let (mut wire, _) = wire(&bench.lab.client, CLIENT_LINK).unwrap();
    let frame = udp((families()[0].client, 1000), (families()[0].service, PORT), b"").frame(bench.uplink.mac);
    let short = |length: usize| frame[..length].to_vec();
    for length in [1, 13] {
        let refused = wire.send_to(&short(length), None).unwrap().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{length} bytes: {refused}");
        assert!(bench.run_xdp(bench.uplink, &short(length)).is_err(), "{length} bytes");
        assert!(bench.run_filter(Hook::Uplink, bench.uplink, 0, &short(length)).is_err(), "{length} bytes");
    }
    wire.send_to(&frame, None).unwrap().unwrap();
    assert!(bench.run(Hook::Uplink, bench.uplink, 0, &frame).is_ok());
}

/// A frame that ends where its packet should begin. Not every kernel takes it in a test run.
#[test]
fn a_frame_without_a_packet_is_left_to_the_kernel() {
    let mut bench = Bench::new("empty").unwrap();
    bench.attach(Hook::Uplink, UPLINK).unwrap();
    let (mut wire, _) = wire(&bench.lab.client, CLIENT_LINK).unwrap();
    for family in families() {
        let servers = servers(&bench, family).unwrap();
        for (word, to) in [(Word::steady(Slot::A, 1), 0), (DRAINING, 1)] {
            bench.word(word).unwrap();
            let last = udp((family.stranger, 1000), (family.service, PORT), b"last").frame(bench.uplink.mac);
            let before = bench.counters().unwrap();
            for frame in [&last[..ETHERNET], &last] {
                wire.send_to(frame, None).unwrap().unwrap();
            }
            assert_eq!(received(&servers, b"last").unwrap(), [(to, b"last".to_vec())]);
            let after = bench.counters().unwrap();
            assert_eq!(after["malformed"] - before["malformed"], 1, "{before:?} {after:?}");
        }
    }
}

#[test]
fn a_tag_that_names_no_vlan_is_none() {
    let mut bench = Bench::new("tagged").unwrap();
    bench.attach(Hook::Uplink, UPLINK).unwrap();
    let (mut wire, _) = wire(&bench.lab.client, CLIENT_LINK).unwrap();
    for family in families() {
        let servers = servers(&bench, family).unwrap();
        for (word, to, verdict) in [(Word::steady(Slot::A, 1), 0, "to_a"), (DRAINING, 1, "to_b")] {
            bench.word(word).unwrap();
            let says = |text: &[u8]| {
                udp((family.stranger, 1000), (family.service, PORT), text).frame(bench.uplink.mac)
            };
            let (plain, last) = (says(b"question"), says(b"last"));
            for (what, frame, answered) in [
                ("no tag", plain.clone(), true),
                ("a priority", tagged(&plain, 5, 0), true),
                ("no priority and no number", tagged(&plain, 0, 0), true),
                ("a VLAN", tagged(&plain, 0, 7), false),
                ("a priority in a VLAN", tagged(&plain, 5, 4095), false),
                ("a VLAN within a priority", tagged(&tagged(&plain, 0, 7), 5, 0), false),
            ] {
                let before = bench.counters().unwrap();
                for frame in [&frame, &last] {
                    wire.send_to(frame, None).unwrap().unwrap();
                }
                let mut expected = vec![(to, b"last".to_vec())];
                if answered {
                    expected.insert(0, (to, b"question".to_vec()));
                }
                assert_eq!(received(&servers, b"last").unwrap(), expected, "{what}");
                let after = bench.counters().unwrap();
                let steered = after[verdict] - before[verdict];
                assert_eq!(steered, expected.len() as u64, "{what}: {before:?} {after:?}");
            }
        }
    }
}
