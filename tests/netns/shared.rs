//! What a host has beside one attachment: another one on the same uplink, routes learned from routers, and the own
//! addresses of partitions.

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_tests::netlab::{CLIENT, CLIENT_LINK, Ns, OWN_A, OWN_B, SERVICE, UPLINK};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, sendto, socket_with, sockopt};

use crate::ask::{Asking, who};
use crate::rig::{NAME, PORT, Rig, Server, ends};

const OTHER: [&str; 2] = ["10.77.0.20", "fd77::20"];

fn other_ends() -> [SocketAddr; 2] {
    OTHER.map(|address| SocketAddr::new(address.parse().unwrap(), PORT))
}

/// Attaches the same namespaces the other way round, under other addresses.
fn attach_other(rig: &Rig) {
    let (a, b) = (rig.lab.a.name(), rig.lab.b.name());
    rig.ok(&["attach", "other", "--address", OTHER[0], "--address", OTHER[1], "--uplink", UPLINK, b, a])
        .unwrap();
}

#[test]
fn two_attachments_share_an_uplink_and_the_last_one_puts_the_settings_back() {
    for first_to_go in [NAME, "other"] {
        let rig = Rig::new("two").unwrap();
        let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
        rig.attach().unwrap();
        attach_other(&rig);
        let client = &rig.lab.client;
        for (end, other) in ends().into_iter().zip(other_ends()) {
            assert_eq!((who(client, end).unwrap(), who(client, other).unwrap()), ("a".into(), "b".into()));
        }
        rig.switch_to(&rig.lab.b).unwrap();
        for (end, other) in ends().into_iter().zip(other_ends()) {
            assert_eq!((who(client, end).unwrap(), who(client, other).unwrap()), ("b".into(), "b".into()));
        }
        rig.ok(&["detach", first_to_go, "--force"]).unwrap();
        // Whoever changed a setting first, the one that stays still needs it.
        let stays = if first_to_go == NAME { other_ends() } else { ends() };
        for end in stays {
            assert_eq!(who(client, end).unwrap(), "b", "{first_to_go} is gone");
        }
        assert!(!rig.left().unwrap().is_empty());
        let last = if first_to_go == NAME { "other" } else { NAME };
        rig.ok(&["detach", last, "--force"]).unwrap();
        rig.nothing_left().unwrap();
    }
}

#[test]
fn settings_of_others_are_put_back_as_they_were() {
    let mut rig = Rig::new("settings").unwrap();
    // A host that forwards on one device but not on all, which the kernel's own switch would level.
    for (key, value) in [
        ("net/ipv6/conf/uplink0/forwarding", "1"),
        ("net/ipv4/neigh/uplink0/proxy_delay", "33"),
        ("net/ipv4/conf/uplink0/forwarding", "1"),
    ] {
        rig.lab.host.sysctl(key, value).unwrap();
    }
    rig.furnished().unwrap();
    rig.attach().unwrap();
    rig.ok(&["detach", NAME]).unwrap();
    rig.nothing_left().unwrap();
    // What somebody decides meanwhile stays as he decided.
    rig.attach().unwrap();
    rig.lab.host.sysctl("net/ipv4/neigh/uplink0/proxy_delay", "44").unwrap();
    rig.ok(&["detach", NAME]).unwrap();
    assert_eq!(rig.lab.host.proc("sys/net/ipv4/neigh/uplink0/proxy_delay").unwrap().trim(), "44");
    rig.lab.host.sysctl("net/ipv4/neigh/uplink0/proxy_delay", "33").unwrap();
    rig.nothing_left().unwrap();
}

/// Says "I am a router" to all nodes on the client's link (RFC 4861 4.2); the kernel does the checksum.
fn advertise(client: &Ns) -> anyhow::Result<()> {
    client.enter(|| {
        let socket =
            socket_with(AddressFamily::INET6, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::ICMPV6))?;
        sockopt::set_ipv6_multicast_hops(&socket, 255)?;
        let index: u32 = std::fs::read_to_string(format!("/proc/thread-self/net/dev_snmp6/{CLIENT_LINK}"))?
            .lines()
            .find_map(|line| line.strip_prefix("ifIndex")?.trim().parse().ok())
            .unwrap_or_default();
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let lifetime = 1800_u16.to_be_bytes();
        let message = [&[134, 0, 0, 0, 64, 0][..], &lifetime, &[0; 8]].concat();
        let to = SocketAddrV6::new(all_nodes, 0, 0, index);
        sendto(&socket, &message, rustix::net::SendFlags::empty(), &to)?;
        Ok(())
    })
}

#[test]
fn a_default_route_learned_from_a_router_survives() {
    let mut rig = Rig::new("router").unwrap();
    rig.lab.host.sysctl(&format!("net/ipv6/conf/{UPLINK}/accept_ra"), "1").unwrap();
    let default = |rig: &Rig| rig.lab.host.ip("-6 route show default").unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while !default(&rig).contains("proto ra") {
        assert!(Instant::now() < end, "the router is not heard");
        advertise(&rig.lab.client).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    rig.furnished().unwrap();
    rig.attach().unwrap();
    assert!(default(&rig).contains("proto ra"), "a host reached over IPv6 would have cut itself off");
    // And it goes on listening.
    rig.lab.host.ip("-6 route del default").unwrap();
    while !default(&rig).contains("proto ra") {
        assert!(Instant::now() < end, "the router is not heard any more");
        advertise(&rig.lab.client).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    rig.finish().unwrap();
}

/// The address under which a connection from a namespace arrives at the client.
fn outgoing(rig: &Rig, ns: &Ns, family: usize) -> anyhow::Result<String> {
    let listener = rig.lab.client.enter(|| Ok(TcpListener::bind((CLIENT[family], 0))?))?;
    let to = listener.local_addr()?;
    let stream = ns.enter(|| Ok(TcpStream::connect_timeout(&to, Duration::from_secs(3))?))?;
    let (_far, from) = listener.accept()?;
    drop(stream);
    Ok(from.ip().to_string())
}

#[test]
fn the_retiring_one_is_known_by_its_own_address() {
    let rig = Rig::new("own").unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    rig.attach_owned(Duration::from_secs(5)).unwrap();
    let end = |address: &str| SocketAddr::new(address.parse().unwrap(), PORT);
    // Two partitions with one address never choose the same port.
    let range = |ns: &Ns| ns.proc("sys/net/ipv4/ip_local_port_range").unwrap();
    let numbers = |ns: &Ns| range(ns).split_whitespace().map(|n| n.parse().unwrap()).collect::<Vec<u16>>();
    let (low, high) = (numbers(a), numbers(b));
    assert!(low[0] < low[1] && low[1] < high[0] && high[0] < high[1], "{low:?} {high:?}");
    for family in 0..2 {
        assert_eq!(who(&rig.lab.client, end(OWN_A[family])).unwrap(), "a", "before");
        assert_eq!(outgoing(&rig, a, family).unwrap(), SERVICE[family]);
    }
    // Roles there, back, and there again.
    for (to, [serving, retiring], own) in
        [(Slot::B, [b, a], OWN_A), (Slot::A, [a, b], OWN_B), (Slot::B, [b, a], OWN_A)]
    {
        rig.with(async |attachment| Ok(attachment.switch(to).await?)).unwrap();
        let names = if to == Slot::A { ["a", "b"] } else { ["b", "a"] };
        for family in 0..2 {
            assert_eq!(who(&rig.lab.client, end(SERVICE[family])).unwrap(), names[0]);
            assert_eq!(who(&rig.lab.client, end(own[family])).unwrap(), names[1], "by its own address");
            assert_eq!(outgoing(&rig, serving, family).unwrap(), SERVICE[family]);
            assert_eq!(outgoing(&rig, retiring, family).unwrap(), own[family]);
        }
    }
    rig.finish_owned().unwrap();
}

#[test]
fn a_partition_leaves_and_another_one_joins_while_the_service_goes_on() {
    let mut rig = Rig::new("join").unwrap();
    let third = rig.lab.lab.namespace("c").unwrap();
    let _servers = [
        Server::start(&rig.lab.a, "a").unwrap(),
        Server::start(&rig.lab.b, "b").unwrap(),
        Server::start(&third, "c").unwrap(),
    ];
    rig.furnished().unwrap();
    rig.attach_owned(Duration::from_secs(5)).unwrap();
    let mut kept: Vec<Asking> = ends().map(|end| Asking::from(&rig.lab.client, end).unwrap()).into();
    let refused = rig.with(async |attachment| Ok(attachment.leave(Slot::A).await.is_err()));
    assert!(refused.unwrap(), "the active one cannot leave");
    let partition = crate::rig::owned(&third, ["10.77.0.13", "fd77::13"]).unwrap();
    rig.with(async |attachment| {
        attachment.leave(Slot::B).await?;
        // An address that is taken, and a namespace that is: refused, and the slot stays empty.
        let mut bad = partition.clone();
        bad.inside = patchswitch::attachment::Inside::Owned { own: vec![SERVICE[0].parse()?] };
        anyhow::ensure!(attachment.join(Slot::B, &bad).await.is_err());
        let same = crate::rig::owned(&rig.lab.a, OWN_B)?;
        anyhow::ensure!(attachment.join(Slot::B, &same).await.is_err());
        anyhow::ensure!(attachment.record().slots[1].is_none());
        attachment.join(Slot::B, &partition).await?;
        Ok(attachment.switch(Slot::B).await?)
    })
    .unwrap();
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "c");
    }
    for asking in &mut kept {
        assert_eq!(asking.who().unwrap(), "a");
    }
    drop(kept);
    rig.ok(&["drain", NAME, "--deadline", "10"]).unwrap();
    rig.finish_owned().unwrap();
}

/// Binds a socket of a family, with the option that lets several share a port.
pub(crate) fn bound(address: SocketAddr) -> anyhow::Result<std::net::UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(ipproto::UDP))?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    bind(&socket, &address)?;
    Ok(socket.into())
}
