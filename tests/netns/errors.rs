//! Errors of datagrams that are under way: whoever has the flow hears of them, wherever they come from.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::ensure;
use patchswitch_common::Slot;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::Counters;
use patchswitch_tests::sockets::set_option;

use crate::icmp::far;
use crate::rig::{Rig, service};
use crate::shared::bound;
use crate::udp::{learn, switch};

const PORT: u16 = 7600;
/// No flow is forgotten while a test runs.
const IDLE: Duration = Duration::from_secs(60);

/// A server's sockets, one of each family, which hear of every error.
fn server(ns: &Ns) -> anyhow::Result<[UdpSocket; 2]> {
    ns.enter(|| {
        let (v4, v6) = (bound(([0, 0, 0, 0], PORT).into())?, bound(([0_u16; 8], PORT).into())?);
        set_option(&v4, libc::IPPROTO_IP, libc::IP_RECVERR, 1_i32)?;
        set_option(&v6, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1_i32)?;
        for socket in [&v4, &v6] {
            socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        }
        Ok([v4, v6])
    })
}

/// A client's sockets, one of each family, connected to the service.
fn clients(ns: &Ns) -> anyhow::Result<[UdpSocket; 2]> {
    let open = |to: SocketAddr| {
        ns.enter(|| {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(Duration::from_secs(3)))?;
            Ok(socket)
        })
    };
    let [v4, v6] = service().map(|address| open((address, PORT).into()));
    Ok([v4?, v6?])
}

/// A question and its answer; returns the client's end.
fn talk(client: &UdpSocket, server: &UdpSocket) -> anyhow::Result<SocketAddr> {
    client.send(b"?")?;
    let (_, peer) = server.recv_from(&mut [0; 8])?;
    server.send_to(b"!", peer)?;
    ensure!(client.recv(&mut [0; 8])? == 1);
    Ok(peer)
}

/// The number of the error that a socket is told of; nothing: none came.
fn told(socket: &UdpSocket) -> anyhow::Result<Option<i32>> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match socket.take_error()? {
            Some(error) => return Ok(error.raw_os_error()),
            None if Instant::now() >= end => return Ok(None),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// What nobody was told of.
fn untold(sockets: &[UdpSocket; 2]) -> bool {
    sockets.iter().all(|socket| matches!(socket.take_error(), Ok(None)))
}

/// Clients of which the first side has a flow each, and those of the second side after a switch.
fn under_way(rig: &Rig, from: &Ns, [a, b]: [&[UdpSocket; 2]; 2]) -> anyhow::Result<[[UdpSocket; 2]; 2]> {
    learn(rig)?;
    let old = clients(from)?;
    for (client, server) in old.iter().zip(a) {
        talk(client, server)?;
    }
    switch(rig, Slot::B)?;
    let new = clients(from)?;
    for (client, server) in new.iter().zip(b) {
        talk(client, server)?;
    }
    Ok([old, new])
}

#[test]
fn a_client_that_has_gone_is_told_to_the_owner_of_its_flow() {
    let rig = Rig::new("gone-client").unwrap();
    rig.attach_owned(IDLE).unwrap();
    let (a, b) = (server(&rig.lab.a).unwrap(), server(&rig.lab.b).unwrap());
    let [old, new] = under_way(&rig, &rig.lab.client, [&a, &b]).unwrap();
    for (clients, owner, other) in [(old, &a, &b), (new, &b, &a)] {
        for (client, server) in clients.into_iter().zip(owner) {
            let peer = talk(&client, server).unwrap();
            drop(client);
            server.send_to(b"late", peer).unwrap();
            assert_eq!(told(server).unwrap(), Some(libc::ECONNREFUSED), "{peer}");
        }
        assert!(untold(other));
    }
    rig.finish_owned().unwrap();
}

/// How often a namespace said that something is not there, in both families.
fn said(ns: &Ns) -> anyhow::Result<i64> {
    let counters = Counters::of(ns)?;
    Ok(counters.get("Icmp.OutDestUnreachs")? + counters.get("Icmp6.OutDestUnreachs")?)
}

#[test]
fn a_server_that_has_gone_is_told_to_the_clients_of_its_flows_alone() {
    let rig = Rig::new("gone-server").unwrap();
    rig.attach_owned(IDLE).unwrap();
    let (a, b) = (server(&rig.lab.a).unwrap(), server(&rig.lab.b).unwrap());
    let [old, new] = under_way(&rig, &rig.lab.client, [&a, &b]).unwrap();
    drop(a);
    let before = (said(&rig.lab.a).unwrap(), said(&rig.lab.b).unwrap());
    for client in &old {
        client.send(b"?").unwrap();
        let error = client.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    }
    let after = (said(&rig.lab.a).unwrap(), said(&rig.lab.b).unwrap());
    assert_eq!(after, (before.0 + 2, before.1));
    // Those of the other side have their server.
    for (client, server) in new.iter().zip(&b) {
        talk(client, server).unwrap();
    }
    rig.finish_owned().unwrap();
}

/// A client that asks again and again comes to the other side once nobody has answered it for the idle time.
#[test]
fn errors_of_a_server_that_has_gone_keep_no_flow_alive() {
    /// More often than a flow is forgotten: each error would be in time to keep it.
    const PACE: Duration = Duration::from_millis(200);
    let rig = Rig::new("refusing").unwrap();
    rig.attach_owned(Duration::from_secs(2)).unwrap();
    let (a, b) = (server(&rig.lab.a).unwrap(), server(&rig.lab.b).unwrap());
    let [old, _new] = under_way(&rig, &rig.lab.client, [&a, &b]).unwrap();
    drop(a);
    for server in &b {
        server.set_read_timeout(Some(PACE)).unwrap();
    }
    let (mut asked, mut came) = (0, [false; 2]);
    while came != [true; 2] {
        assert!(asked < 50, "{came:?}");
        asked += 1;
        for ((client, server), came) in old.iter().zip(&b).zip(&mut came) {
            // It is told of the error before: then nothing was sent.
            client.send(b"?").or_else(|_| client.send(b"?")).unwrap();
            *came |= server.recv_from(&mut [0; 8]).is_ok();
        }
        assert!(asked > 2 || came == [false; 2], "they have flows");
    }
    rig.finish_owned().unwrap();
}

#[test]
fn a_router_with_a_narrow_link_is_heard_by_the_owner_of_a_flow_of_datagrams() {
    /// Too long for the client's link of 1280 bytes, not for the service's.
    const LENGTH: usize = 1400;
    let mut rig = Rig::new("narrow-udp").unwrap();
    let far = far(&mut rig).unwrap();
    rig.furnished().unwrap();
    rig.attach_owned(IDLE).unwrap();
    let (a, b) = (server(&rig.lab.a).unwrap(), server(&rig.lab.b).unwrap());
    let [old, new] = under_way(&rig, &far, [&a, &b]).unwrap();
    for (clients, owner, other) in [(old, &a, &b), (new, &b, &a)] {
        for (client, server) in clients.iter().zip(owner) {
            let peer = talk(client, server).unwrap();
            server.send_to(&[7; LENGTH], peer).unwrap();
            assert_eq!(told(server).unwrap(), Some(libc::EMSGSIZE), "{peer}");
            // Who knows how narrow it is sends it in parts.
            server.send_to(&[8; LENGTH], peer).unwrap();
            let mut bytes = [0; 2000];
            assert_eq!((client.recv(&mut bytes).unwrap(), bytes[0]), (LENGTH, 8), "{peer}");
        }
        assert!(untold(other));
    }
    rig.finish_owned().unwrap();
}
