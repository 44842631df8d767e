//! Replies that are rewritten while somebody else holds their bytes as well: whoever captures, a program whose own
//! pages are sent, and the kernel that has joined several packets into one.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use patchswitch_common::Slot;
use patchswitch_load::echo;
use patchswitch_tests::frame;
use patchswitch_tests::netlab::{CLIENT_LINK, Ns, OWN_A, SERVICE, UPLINK};
use patchswitch_tests::observe::Capture;
use patchswitch_tests::sockets::set_option;
use pnet::datalink::{self, Channel, Config};
use pnet::packet::Packet as _;
use pnet::packet::ethernet::{EtherTypes, EthernetPacket};
use pnet::packet::ip::IpNextHeaderProtocols;
use pnet::packet::ipv4::Ipv4Packet;
use pnet::packet::ipv6::Ipv6Packet;
use pnet::packet::udp::{UdpPacket, ipv4_checksum, ipv6_checksum};

use crate::rig::{ECHO, Rig};
use crate::udp::{ask, clients, echoing, event, learn, switch};

/// The port of the servers of this file.
const OTHER: u16 = 7300;
/// Length of one datagram of many, and how many there are.
const PIECE: usize = 600;
const PIECES: usize = 10;

/// A flow is remembered for so long without a packet: longer than a switch and two captures take to begin.
pub(crate) const IDLE: Duration = Duration::from_secs(4);

/// Switches while flows of both families are in flight: remembered for as long as a flow may be idle, and never idle.
pub(crate) fn take_over(rig: &Rig, mut answered: impl FnMut()) -> anyhow::Result<()> {
    learn(rig)?;
    for _ in 0..4 {
        std::thread::sleep(IDLE / 3);
        answered();
    }
    switch(rig, Slot::B)
}

/// Servers of both families in the first partition, on wildcard sockets.
pub(crate) fn servers(rig: &Rig) -> anyhow::Result<[UdpSocket; 2]> {
    let servers = rig.lab.a.enter(|| Ok(echo::bind(OTHER)?))?;
    for server in &servers {
        server.set_read_timeout(Some(Duration::from_secs(5)))?;
    }
    Ok(servers)
}

#[test]
fn who_captures_in_a_partition_sees_what_it_sent() {
    let rig = echoing("captures", IDLE).unwrap();
    let sockets = clients(&rig, ECHO).unwrap();
    let asked = |number| {
        for socket in &sockets {
            assert_eq!(ask(socket, number).unwrap(), "a");
        }
    };
    take_over(&rig, || asked(1)).unwrap();
    let filter = format!("udp and src port {ECHO}");
    let inside = Capture::start_in(&rig.lab.a, "eth0", &filter).unwrap();
    let outside = Capture::start_in(&rig.lab.client, CLIENT_LINK, &filter).unwrap();
    for number in 2..12 {
        asked(number);
    }
    let from = |captured: Capture| -> Vec<IpAddr> {
        captured.stop().unwrap().packets.iter().map(|packet| packet.from.unwrap().ip()).collect()
    };
    let (inside, outside) = (from(inside), from(outside));
    assert_eq!((inside.len(), outside.len()), (20, 20));
    for (seen, addresses) in [(inside, OWN_A), (outside, SERVICE)] {
        for address in addresses {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(seen.iter().filter(|one| **one == address).count(), 10, "{address}: {seen:?}");
        }
    }
    rig.finish_owned().unwrap();
}

/// Sends what lies in the program's own pages, without a copy, and waits until the kernel has done with them.
fn send_own_pages(socket: &UdpSocket, to: SocketAddr, pages: &[u8]) -> anyhow::Result<()> {
    let sent = socket2::SockRef::from(socket).send_to_with_flags(pages, &to.into(), libc::MSG_ZEROCOPY)?;
    ensure!(sent == pages.len(), "sent {sent}");
    let end = Instant::now() + Duration::from_secs(5);
    let mut nothing = [std::mem::MaybeUninit::uninit(); 1];
    // The kernel says it in the queue of errors.
    while let Err(error) =
        socket2::SockRef::from(socket).recv_with_flags(&mut nothing, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
    {
        ensure!(error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < end, "{error}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[test]
fn what_a_program_sends_of_its_own_pages_stays_as_it_is() {
    let rig = Rig::new("zerocopy").unwrap();
    let servers = servers(&rig).unwrap();
    rig.attach_owned(IDLE).unwrap();
    let sockets = clients(&rig, OTHER).unwrap();
    let pages: Vec<u8> = (0..1200_u32).map(|n| (n % 249) as u8).collect();
    let answered = || {
        for (client, server) in sockets.iter().zip(&servers) {
            client.send(b"?").unwrap();
            let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
            let before = pages.clone();
            send_own_pages(server, from, &pages).unwrap();
            let mut answer = [0; 2000];
            let length = client.recv(&mut answer).unwrap();
            assert_eq!(answer[..length], before, "what the client got");
            assert_eq!(pages, before, "what the program has");
        }
    };
    for server in &servers {
        set_option(server, libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1_i32).unwrap();
    }
    take_over(&rig, answered).unwrap();
    answered();
    assert!(event(&rig, "rewritten_v4") == 1 && event(&rig, "rewritten_v6") == 1);
    rig.finish_owned().unwrap();
}

/// The datagrams of the service that come to a link, each with whether its sum is right, until there are so many.
pub(crate) fn datagrams(
    ns: &Ns,
    link: &str,
    wanted: usize,
    ask: impl FnOnce() + Send,
) -> anyhow::Result<Vec<(Vec<u8>, bool)>> {
    ns.enter(|| {
        let link = datalink::interfaces().into_iter().find(|found| found.name == link).context("no link")?;
        let config = Config { read_timeout: Some(Duration::from_millis(100)), ..Config::default() };
        let Channel::Ethernet(_sender, mut receiver) = datalink::channel(&link, config)? else {
            anyhow::bail!("not a link of frames")
        };
        ask();
        let (mut found, end) = (Vec::new(), Instant::now() + Duration::from_secs(5));
        while found.len() < wanted && Instant::now() < end {
            found.extend(receiver.next().ok().and_then(datagram));
        }
        Ok(found)
    })
}

/// What the service says in a datagram, and whether its sum is right.
fn datagram(bytes: &[u8]) -> Option<(Vec<u8>, bool)> {
    let ethernet = EthernetPacket::new(bytes)?;
    let service: Vec<IpAddr> = SERVICE.iter().filter_map(|text| text.parse().ok()).collect();
    if ethernet.get_ethertype() == EtherTypes::Ipv4 {
        let ip = Ipv4Packet::new(ethernet.payload())?;
        let udp = UdpPacket::new(ip.payload())?;
        let ours = ip.get_next_level_protocol() == IpNextHeaderProtocols::Udp
            && service.contains(&ip.get_source().into())
            && udp.get_source() == OTHER;
        let sum = ipv4_checksum(&udp, &ip.get_source(), &ip.get_destination());
        let header_right = frame::finish(frame::sum(&ethernet.payload()[..20])) == 0;
        return ours.then(|| (udp.payload().to_vec(), header_right && sent(sum) == udp.get_checksum()));
    }
    let ip = Ipv6Packet::new(ethernet.payload())?;
    let udp = UdpPacket::new(ip.payload())?;
    let ours = ip.get_next_header() == IpNextHeaderProtocols::Udp
        && service.contains(&ip.get_source().into())
        && udp.get_source() == OTHER;
    let sum = ipv6_checksum(&udp, &ip.get_source(), &ip.get_destination());
    ours.then(|| (udp.payload().to_vec(), sent(sum) == udp.get_checksum()))
}

/// What is sent of a sum: zero would mean that there is none.
fn sent(sum: u16) -> u16 {
    if sum == 0 { u16::MAX } else { sum }
}

/// Where the kernel joins packets into a list (`rx-gro-list`), a program sees the first one's header only.
#[test]
fn packets_that_were_joined_into_a_list_are_rewritten_each() {
    let rig = Rig::new("grolist").unwrap();
    let servers = servers(&rig).unwrap();
    rig.attach_owned(IDLE).unwrap();
    // The partition's kernel cuts what its server sends and makes the sums (the kernel forgets, of what it joins, that
    // sums are still to be made), the host's joins it again, and makes all sums when it sends.
    rig.lab.a.run(&["ethtool", "-K", "eth0", "tx", "off", "tx-udp-segmentation", "off"]).unwrap();
    let status = rig.ok(&["status", "web"]).unwrap();
    let link = status["attachments"][0]["partitions"][0]["link"].as_str().unwrap().to_owned();
    rig.lab.host.run(&["ethtool", "-K", &link, "gro", "on", "rx-gro-list", "on"]).unwrap();
    rig.lab.host.run(&["ethtool", "-K", UPLINK, "tx", "off", "tx-udp-segmentation", "off"]).unwrap();
    let sockets = clients(&rig, OTHER).unwrap();
    for server in &servers {
        set_option(server, libc::SOL_UDP, libc::UDP_SEGMENT, PIECE as i32).unwrap();
    }
    let whole: Vec<u8> = (0..PIECE * PIECES).map(|n| (n / PIECE) as u8).collect();
    let answer = |n: usize| {
        sockets[n].send(b"?").unwrap();
        let (_, from) = servers[n].recv_from(&mut [0; 8]).unwrap();
        servers[n].send_to(&whole, from).unwrap();
    };
    take_over(&rig, || (0..2).for_each(answer)).unwrap();
    for family in 0..2 {
        let before = rig.counter(&["packets", "from_partition", "out"]).unwrap();
        let came = datagrams(&rig.lab.client, CLIENT_LINK, PIECES, || answer(family)).unwrap();
        let packets = rig.counter(&["packets", "from_partition", "out"]).unwrap() - before;
        assert!((1..PIECES as u64 / 2).contains(&packets), "{packets} packets were not joined");
        assert_eq!(came.len(), PIECES, "in {packets} packets");
        for (number, (piece, is_right)) in came.iter().enumerate() {
            assert_eq!(piece, &vec![number as u8; PIECE], "piece {number}");
            assert!(is_right, "the sum of piece {number} of family {family}");
        }
    }
    rig.finish_owned().unwrap();
}
