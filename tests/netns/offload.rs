//! Sums that are left to the card (`CHECKSUM_PARTIAL`): a partition's kernel leaves them to its veth, and whoever makes
//! them in the end makes them of the addresses that a packet leaves with. Seen at the client's link, byte by byte.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use patchswitch_tests::frame::{self, Ip};
use patchswitch_tests::netlab::{CLIENT_LINK, Ns, OWN_A, UPLINK};
use pnet::datalink::{self, Channel, Config};
use pnet::packet::Packet as _;
use pnet::packet::ethernet::{EtherTypes, EthernetPacket};
use pnet::packet::ipv4::Ipv4Packet;
use pnet::packet::ipv6::Ipv6Packet;

use crate::buffers::{IDLE, servers, take_over};
use crate::rig::{Rig, service};
use crate::udp::{clients, event};

/// The port of the servers.
const OTHER: u16 = 7300;
/// What a server of connections says: many segments of any link.
const LONG: usize = 40_000;

/// What came to a link from a server.
#[derive(Debug)]
struct Arrived {
    from: IpAddr,
    data: Vec<u8>,
    /// Whether all sums are right, the network header's as well.
    is_right: bool,
}

/// What the servers send by a protocol, as it comes to a link, until it is so many bytes.
fn arrived(
    ns: &Ns,
    link: &str,
    (protocol, bytes): (u8, usize),
    ask: impl FnOnce() -> anyhow::Result<()> + Send,
) -> anyhow::Result<Vec<Arrived>> {
    ns.enter(|| {
        let link = datalink::interfaces().into_iter().find(|found| found.name == link).context("no link")?;
        // Longer than what a kernel joins: a packet is never read in part.
        let config = Config {
            read_timeout: Some(Duration::from_millis(100)),
            read_buffer_size: 1 << 17,
            ..Config::default()
        };
        let Channel::Ethernet(_sender, mut receiver) = datalink::channel(&link, config)? else {
            anyhow::bail!("not a link of frames")
        };
        ask()?;
        let (mut found, mut length, end) = (Vec::new(), 0, Instant::now() + Duration::from_secs(5));
        while length < bytes && Instant::now() < end {
            let Some(one) = receiver.next().ok().and_then(|frame| read(frame, protocol)) else { continue };
            length += one.data.len();
            found.push(one);
        }
        Ok(found)
    })
}

/// A packet of a server's port by a protocol.
fn read(frame: &[u8], protocol: u8) -> Option<Arrived> {
    let ethernet = EthernetPacket::new(frame)?;
    let mut header_right = true;
    let ip = match ethernet.get_ethertype() {
        EtherTypes::Ipv4 => {
            let ip = Ipv4Packet::new(ethernet.payload())?;
            header_right = frame::finish(frame::sum(ethernet.payload().get(..20)?)) == 0;
            let (from, to) = (ip.get_source().into(), ip.get_destination().into());
            Ip::new(from, to, ip.get_next_level_protocol().0, ip.payload().to_vec())
        }
        EtherTypes::Ipv6 => {
            let ip = Ipv6Packet::new(ethernet.payload())?;
            let (from, to) = (ip.get_source().into(), ip.get_destination().into());
            Ip::new(from, to, ip.get_next_header().0, ip.payload().to_vec())
        }
        _ => return None,
    };
    if ip.protocol != protocol || ip.payload.get(..2)? != OTHER.to_be_bytes() {
        return None;
    }
    let header = if protocol == frame::UDP { 8 } else { usize::from(ip.payload.get(12)? >> 4) * 4 };
    let data = ip.payload.get(header..)?.to_vec();
    Some(Arrived {
        from: ip.from,
        data,
        is_right: header_right && frame::finish(frame::payload_sum(&ip)) == 0,
    })
}

/// Says which of the two leave sums to others: the partition's link, and the uplink.
fn leave(rig: &Rig, [partition, uplink]: [&str; 2]) -> anyhow::Result<()> {
    rig.lab.a.run(&["ethtool", "-K", "eth0", "tx", partition])?;
    rig.lab.host.run(&["ethtool", "-K", UPLINK, "tx", uplink]).map(drop)
}

/// The host's end of the first partition's link.
pub(crate) fn link(rig: &Rig) -> anyhow::Result<String> {
    let status = rig.ok(&["status", "web"])?;
    let link = status["attachments"][0]["partitions"][0]["link"].as_str();
    Ok(link.context("no link")?.to_owned())
}

fn answer(client: &UdpSocket, server: &UdpSocket, data: &[u8]) -> anyhow::Result<()> {
    client.send(b"?")?;
    let (_, from) = server.recv_from(&mut [0; 8])?;
    server.send_to(data, from)?;
    let mut got = [0; 2000];
    let length = client.recv(&mut got)?;
    anyhow::ensure!(&got[..length] == data, "the client got something else");
    Ok(())
}

#[test]
fn sums_that_are_left_to_the_card_are_those_of_what_leaves() {
    let rig = Rig::new("partial").unwrap();
    let servers = servers(&rig).unwrap();
    rig.attach_owned(IDLE).unwrap();
    let link = link(&rig).unwrap();
    let sockets = clients(&rig, OTHER).unwrap();
    let each = || sockets.iter().zip(&servers);
    take_over(&rig, || each().for_each(|(client, server)| answer(client, server, b"before").unwrap()))
        .unwrap();
    for [partition, uplink] in [["on", "off"], ["off", "on"], ["off", "off"]] {
        leave(&rig, [partition, uplink]).unwrap();
        for (family, (client, server)) in each().enumerate() {
            for length in [1, 2, 7, 600, 1401] {
                let what = format!("partition {partition}, uplink {uplink}, family {family}, {length} bytes");
                let data: Vec<u8> = (0..length).map(|n| (n % 251) as u8 ^ 0x5a).collect();
                let wanted = (frame::UDP, length);
                // What comes out of the partition: of its own address, and with a sum only if nobody else makes it.
                let came = arrived(&rig.lab.host, &link, wanted, || answer(client, server, &data)).unwrap();
                let [one] = &came[..] else { panic!("{what}: {came:?}") };
                assert_eq!(
                    (one.from, one.is_right),
                    (OWN_A[family].parse().unwrap(), partition == "off"),
                    "{what}"
                );
                let came =
                    arrived(&rig.lab.client, CLIENT_LINK, wanted, || answer(client, server, &data)).unwrap();
                let [one] = &came[..] else { panic!("{what}: {came:?}") };
                assert_eq!((one.from, one.is_right), (service()[family], true), "{what}");
                assert_eq!(one.data, data, "{what}");
            }
        }
    }
    assert!(event(&rig, "rewritten_v4") >= 30 && event(&rig, "rewritten_v6") >= 30);
    rig.finish_owned().unwrap();
}

/// Says the same to everybody who connects, until the test's process ends.
fn talker(ns: &Ns, data: &[u8]) -> anyhow::Result<()> {
    let listener = ns.enter(|| Ok(TcpListener::bind((Ipv6Addr::UNSPECIFIED, OTHER))?))?;
    let data = data.to_owned();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // Whoever does not hear it says so.
            drop(stream.write_all(&data));
        }
    });
    Ok(())
}

#[test]
fn segments_whose_sums_are_left_to_the_card_arrive_with_right_ones() {
    let mut rig = Rig::new("partialtcp").unwrap();
    // A probe for the last segment (TLP) would be seen as one more.
    rig.lab.a.sysctl("net/ipv4/tcp_early_retrans", "0").unwrap();
    rig.furnished().unwrap();
    let data: Vec<u8> = (0..LONG).map(|n| (n % 251) as u8).collect();
    talker(&rig.lab.a, &data).unwrap();
    rig.attach_owned(IDLE).unwrap();
    let link = link(&rig).unwrap();
    for [partition, uplink] in [["on", "off"], ["off", "on"]] {
        leave(&rig, [partition, uplink]).unwrap();
        for address in service() {
            let what = format!("partition {partition}, uplink {uplink}, {address}");
            let hear = || {
                let mut got = Vec::new();
                TcpStream::connect((address, OTHER))?.read_to_end(&mut got)?;
                anyhow::ensure!(got == data, "the client got something else");
                Ok(())
            };
            // The client's side of what is seen at the host's link is in the client's namespace.
            let there = || rig.lab.client.enter(hear);
            let wanted = (frame::TCP, LONG);
            let came = arrived(&rig.lab.host, &link, wanted, there).unwrap();
            let right = came.iter().filter(|one| one.is_right).count();
            assert_eq!(right, if partition == "off" { came.len() } else { 0 }, "{what}");
            let came = arrived(&rig.lab.client, CLIENT_LINK, wanted, hear).unwrap();
            assert!(came.len() > 2 && came.iter().all(|one| one.is_right), "{what}: {came:?}");
            assert!(came.iter().all(|one| one.from == address), "{what}");
            let whole: Vec<u8> = came.into_iter().flat_map(|one| one.data).collect();
            assert_eq!(whole, data, "{what}");
        }
    }
    rig.finish_owned().unwrap();
}
