//! Frames as they are on the client's link: under which link addresses, from whom, and in which pieces.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use patchswitch_common::Slot;
use patchswitch_load::echo;
use patchswitch_tests::frame;
use patchswitch_tests::netlab::{CLIENT, CLIENT_LINK, Ns, OWN_A, OWN_B, SERVICE, UPLINK};
use patchswitch_tests::observe::Counters;

use crate::ask::{Asking, who};
use crate::rig::{ECHO, PORT, Rig, Server, ends, service};
use crate::shared::bound;
use crate::tap::{Frame, tapped};
use crate::udp::{ask, big_echo, clients, echoing, learn, send_frames, switch};

/// Flows stay known for the length of a test.
const IDLE: Duration = Duration::from_secs(60);
/// Ports of servers whose sockets are wild, and connected.
const WILD: u16 = 7200;
const CONNECTED: u16 = 7400;

/// The link address of a link.
fn mac(ns: &Ns, link: &str) -> anyhow::Result<[u8; 6]> {
    let shown: serde_json::Value = serde_json::from_str(&ns.ip(&format!("-j link show dev {link}"))?)?;
    let mac: pnet::datalink::MacAddr = shown[0]["address"].as_str().context("no address")?.parse()?;
    Ok(mac.octets())
}

/// The source of a packet.
fn source(frame: &[u8]) -> Option<IpAddr> {
    match frame.get(12..14)? {
        [0x08, 0x00] => Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(26..30)?).ok()?)),
        [0x86, 0xdd] => Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(22..38)?).ok()?)),
        _ => None,
    }
}

fn addresses(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

/// Whether a packet is of the service or of a partition.
fn is_theirs(frame: &[u8]) -> bool {
    let theirs = addresses(&[SERVICE, OWN_A, OWN_B].concat());
    source(frame).is_some_and(|source| theirs.contains(&source))
}

/// Asks a partition by every way that leads to it: connections and flows that it has, and its own addresses.
fn asked(
    rig: &Rig,
    asking: &mut [Asking],
    sockets: &[UdpSocket],
    own: [&str; 2],
    name: &str,
) -> anyhow::Result<()> {
    for asking in asking {
        ensure!(asking.who()? == name, "not {name}");
    }
    for socket in sockets {
        ensure!(ask(socket, 1)? == name, "not {name}");
    }
    for address in own {
        let end = SocketAddr::new(address.parse()?, PORT);
        ensure!(who(&rig.lab.client, end)? == name, "{end} is not {name}");
    }
    Ok(())
}

/// Whoever a packet comes from, on the client's link it comes from the uplink.
#[test]
fn both_partitions_send_under_the_uplinks_link_address() {
    let rig = echoing("linkaddress", IDLE).unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    let to = mac(&rig.lab.client, CLIENT_LINK).unwrap();
    let from = mac(&rig.lab.host, UPLINK).unwrap();
    let check = |frames: &[Frame], own: &[&str], what: &str| {
        assert!(frames.iter().all(|frame| frame.head[..12] == [to, from].concat()), "{what}: {frames:?}");
        let sources: BTreeSet<_> = frames.iter().filter_map(|frame| source(&frame.head)).collect();
        assert_eq!(sources, addresses(&[&SERVICE[..], own].concat()), "{what}");
    };
    // Each of the two serves while the other one retires; what each has of clients it keeps.
    let mut flows: Vec<(Vec<Asking>, [UdpSocket; 2])> = Vec::new();
    let sides = [(Slot::A, "a", OWN_A), (Slot::B, "b", OWN_B)];
    for (slot, name, own) in sides {
        if slot == Slot::B {
            switch(&rig, slot).unwrap();
        }
        learn(&rig).unwrap();
        let mut asking = ends().map(|end| Asking::from(&rig.lab.client, end).unwrap());
        let sockets = clients(&rig, ECHO).unwrap();
        let during = || asked(&rig, &mut asking, &sockets, own, name);
        let ((), frames) = tapped(&rig.lab.client, CLIENT_LINK, is_theirs, during).unwrap();
        check(&frames, &own, &format!("{name} serves"));
        flows.push((asking.into(), sockets));
    }
    for serving in [Slot::B, Slot::A] {
        if serving == Slot::A {
            switch(&rig, serving).unwrap();
        }
        for ((asking, sockets), (_, name, own)) in flows.iter_mut().zip(sides) {
            let during = || asked(&rig, asking, sockets, own, name);
            let ((), frames) = tapped(&rig.lab.client, CLIENT_LINK, is_theirs, during).unwrap();
            check(&frames, &own, &format!("{name}, while {serving:?} serves"));
        }
    }
    rig.finish_owned().unwrap();
}

/// Whether a frame is a fragment of a datagram to the client.
fn is_fragment(frame: &[u8]) -> bool {
    let clients = addresses(&CLIENT);
    let is_part = match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.get(20..22).is_some_and(|place| place[0] & 0x3f != 0 || place[1] != 0),
        Some([0x86, 0xdd]) => frame.get(20) == Some(&44),
        _ => false,
    };
    is_part && source(frame).is_some_and(|source| !clients.contains(&source))
}

/// A socket of the first partition that is connected to a client's, and the wild one beside it that others speak to.
fn connected(rig: &Rig, client: &UdpSocket) -> anyhow::Result<[UdpSocket; 2]> {
    let family = usize::from(client.local_addr()?.is_ipv6());
    let peer = SocketAddr::new(CLIENT[family].parse()?, client.local_addr()?.port());
    let any: IpAddr = if family == 0 { [0; 4].into() } else { [0; 16].into() };
    rig.lab.a.enter(|| {
        let wild = bound((any, CONNECTED).into())?;
        let connected = bound((service()[family], CONNECTED).into())?;
        connected.connect(peer)?;
        connected.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok([wild, connected])
    })
}

/// What takes three fragments of either family.
fn long() -> Vec<u8> {
    (0..4000_u32).map(|n| (n % 251) as u8).collect()
}

/// Asks with fragments; who answers so.
fn asks_long(socket: &UdpSocket) -> anyhow::Result<u8> {
    let (question, mut answer) = (long(), vec![0; 1 << 16]);
    socket.send(&question)?;
    let length = socket.recv(&mut answer)?;
    ensure!(answer[1..length] == question[1..], "{length} bytes came, or others");
    Ok(answer[0])
}

/// A client's socket hears nobody but the service; of what it hears, the kernel has joined the pieces. Here they are.
#[test]
fn every_fragment_of_an_answer_is_from_the_service() {
    let rig = Rig::new("pieces").unwrap();
    big_echo(&rig.lab.a, WILD, b'a').unwrap();
    for port in [WILD, CONNECTED] {
        big_echo(&rig.lab.b, port, b'b').unwrap();
    }
    rig.attach_owned(IDLE).unwrap();
    let learned = clients(&rig, WILD).unwrap();
    learn(&rig).unwrap();
    for socket in &learned {
        assert_eq!(asks_long(socket).unwrap(), b'a');
    }
    let linked = clients(&rig, CONNECTED).unwrap();
    let servers = linked.each_ref().map(|client| connected(&rig, client).unwrap());
    switch(&rig, Slot::B).unwrap();
    let (new, others) = (clients(&rig, WILD).unwrap(), clients(&rig, CONNECTED).unwrap());
    let during = || {
        for (sockets, who) in [(&learned, b'a'), (&new, b'b'), (&others, b'b')] {
            for socket in sockets {
                ensure!(asks_long(socket)? == who, "not {who}");
            }
        }
        // These have said nothing before: it is the socket that tells whose they are.
        for (client, [_wild, server]) in linked.iter().zip(&servers) {
            let (question, mut got) = (long(), vec![0; 1 << 16]);
            for [from, to] in [[client, server], [server, client]] {
                from.send(&question)?;
                let length = to.recv(&mut got)?;
                ensure!(got[..length] == question, "{length} bytes came, or others");
            }
        }
        Ok(())
    };
    let ((), pieces) = tapped(&rig.lab.client, CLIENT_LINK, is_fragment, during).unwrap();
    let sources = pieces.iter().filter_map(|piece| source(&piece.head));
    let [v4, v6] = service().map(|address| sources.clone().filter(|source| *source == address).count());
    // Four answers of each family, of three pieces each.
    assert_eq!([v4, v6, pieces.len()], [12, 12, 24], "{pieces:?}");
    rig.finish_owned().unwrap();
}

/// How many datagrams a partition's kernel has refused for their sums.
fn refused(ns: &Ns) -> anyhow::Result<[i64; 2]> {
    let counters = Counters::of(ns)?;
    Ok([counters.get("Udp.InCsumErrors")?, counters.get("Udp6.InCsumErrors")?])
}

#[test]
fn a_datagram_without_a_sum_is_judged_by_its_owners_kernel() {
    let rig = echoing("nosum", IDLE).unwrap();
    let old = clients(&rig, ECHO).unwrap();
    learn(&rig).unwrap();
    for socket in &old {
        assert_eq!(ask(socket, 1).unwrap(), "a");
    }
    switch(&rig, Slot::B).unwrap();
    let new = clients(&rig, ECHO).unwrap();
    let [a, b] = [&rig.lab.a, &rig.lab.b];
    for (sockets, name, owner, other) in [(&old, "a", a, b), (&new, "b", b, a)] {
        let before = [refused(owner).unwrap(), refused(other).unwrap()];
        for (socket, service) in sockets.iter().zip(service()) {
            let client = socket.local_addr().unwrap();
            let question = echo::question(1, 77);
            let mut packet = frame::udp((client.ip(), client.port()), (service, ECHO), &question);
            packet.payload[6..8].fill(0);
            send_frames(&rig, &[packet]).unwrap();
            if service.is_ipv4() {
                let mut answer = [0; echo::DATAGRAM_MAX];
                let length = socket.recv(&mut answer).unwrap();
                let (_, number, tag) = echo::parse(&answer[..length]).unwrap();
                assert_eq!((number, tag), (77, name.as_bytes()), "over IPv4 it is as good as any");
            }
            // What comes next is answered first, if that was not.
            assert_eq!(ask(socket, 78).unwrap(), name, "{service}");
        }
        let ([v4, v6], other_before) = (before[0], before[1]);
        assert_eq!(refused(owner).unwrap(), [v4, v6 + 1], "{name} has refused the one of IPv6");
        assert_eq!(refused(other).unwrap(), other_before, "the other one has seen none");
    }
    rig.finish_owned().unwrap();
}
