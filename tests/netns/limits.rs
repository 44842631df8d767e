//! What a switch would cut although it should not is refused or told before it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use patchswitch::attachment::{Attachment, SwitchOptions};
use patchswitch_common::Slot;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::Counters;
use socket2::{Domain, Protocol, Socket, Type};

use crate::ask::who;
use crate::rig::{NAME, PORT, Rig, Server, ends};

/// A listener that only packets of a device find.
fn bound(ns: &Ns, device: &str) -> anyhow::Result<Socket> {
    ns.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind_device(Some(device.as_bytes()))?;
        socket.bind(&SocketAddr::from(([0, 0, 0, 0], PORT)).into())?;
        socket.listen(1)?;
        Ok(socket)
    })
}

#[test]
fn a_service_that_is_bound_to_a_device_is_not_switched() {
    let rig = Rig::new("device").unwrap();
    let _server = Server::start(&rig.lab.b, "b").unwrap();
    rig.attach_owned(Duration::from_secs(125)).unwrap();
    let listener = bound(&rig.lab.a, "eth0").unwrap();
    let said = rig.refused(&["switch", NAME], 1).unwrap();
    assert!(said.contains("SO_BINDTODEVICE") && said.contains("nothing was switched"), "{said}");
    let active = |attachment: &Attachment| attachment.plane().word().active();
    assert_eq!(rig.with(async |attachment| Ok(active(attachment))).unwrap(), Slot::A);
    // Who goes back has a reason to: it is told, and done.
    let options = SwitchOptions { despite_losses: true, ..SwitchOptions::default() };
    rig.with(async |attachment| Ok(attachment.switch_with(Slot::B, options).await?)).unwrap();
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "b");
    }
    rig.with(async |attachment| Ok(attachment.switch(Slot::A).await?)).unwrap();
    drop(listener);
    // One that is bound to another device has never had a packet of the service.
    let other = bound(&rig.lab.a, "lo").unwrap();
    rig.with(async |attachment| Ok(attachment.switch(Slot::B).await?)).unwrap();
    assert_eq!(rig.with(async |attachment| Ok(active(attachment))).unwrap(), Slot::B);
    drop(other);
    rig.finish_owned().unwrap();
}

/// A datagram socket, of one device or of any; with a client that it has to itself, or with whoever comes.
fn datagrams(ns: &Ns, device: Option<&str>, service: &str, client: Option<&str>) -> anyhow::Result<Socket> {
    ns.enter(|| {
        let service: SocketAddr = service.parse()?;
        let socket = Socket::new(Domain::for_address(service), Type::DGRAM, None)?;
        socket.bind_device(device.map(str::as_bytes))?;
        socket.set_reuse_address(true)?;
        socket.bind(&service.into())?;
        if let Some(client) = client {
            socket.connect(&client.parse::<SocketAddr>()?.into())?;
        }
        Ok(socket)
    })
}

/// As servers of QUIC and DTLS have them: a socket for each client beside the one for whoever comes.
#[test]
fn a_datagram_flow_that_is_bound_to_a_device_is_not_cut() {
    let rig = Rig::new("flows").unwrap();
    rig.attach_owned(Duration::from_secs(125)).unwrap();
    for [service, client] in [["10.77.0.10:4433", "10.77.0.2:50000"], ["[fd77::10]:4433", "[fd77::2]:50000"]]
    {
        let _others = datagrams(&rig.lab.a, None, service, None).unwrap();
        let flow = datagrams(&rig.lab.a, Some("eth0"), service, Some(client)).unwrap();
        let said = rig.refused(&["switch", NAME], 1).unwrap();
        assert!(said.contains(service) && said.contains("SO_BINDTODEVICE"), "{said}");
        assert!(said.contains("nothing was switched"), "{said}");
        drop(flow);
        // One that every packet finds is no reason.
        let _free = datagrams(&rig.lab.a, None, service, Some(client)).unwrap();
        for _ in 0..2 {
            let ended = rig.run(&["switch", NAME]).unwrap();
            assert_eq!(ended.code, Some(0), "{ended:?}");
        }
    }
    rig.finish_owned().unwrap();
}

/// A stream socket of Multipath TCP.
fn multipath() -> std::io::Result<Socket> {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP))
}

/// A listener of Multipath TCP on the service's port.
fn multipath_listener(ns: &Ns) -> anyhow::Result<TcpListener> {
    ns.enter(|| {
        let socket = multipath()?;
        socket.bind(&SocketAddr::from(([0, 0, 0, 0], PORT)).into())?;
        socket.listen(4)?;
        Ok(TcpListener::from(socket))
    })
}

#[test]
fn clients_of_multipath_tcp_are_told_of() {
    let rig = Rig::new("paths").unwrap();
    rig.attach().unwrap();
    let listener = multipath_listener(&rig.lab.a).unwrap();
    let warned = |ended: &crate::rig::Ended| ended.stderr.contains("Multipath TCP");
    let connect = |make: &(dyn Fn() -> std::io::Result<Socket> + Sync)| {
        let client = rig.lab.client.enter(|| {
            let socket = make()?;
            socket.connect(&ends()[0].into())?;
            Ok(TcpStream::from(socket))
        });
        drop((client.unwrap(), listener.accept().unwrap()));
    };
    connect(&|| Socket::new(Domain::IPV4, Type::STREAM, None));
    let plain = rig.run(&["switch", NAME]).unwrap();
    assert!(plain.code == Some(0) && !warned(&plain), "{plain:?}");
    rig.run(&["switch", NAME]).unwrap();
    connect(&multipath);
    assert_eq!(Counters::of(&rig.lab.a).unwrap().get("MPTcpExt.MPCapableACKRX").unwrap(), 1);
    let told = rig.run(&["switch", NAME]).unwrap();
    assert!(told.code == Some(0) && warned(&told), "{told:?}");
    rig.finish().unwrap();
}

#[test]
fn paths_that_are_refused_after_a_switch_are_counted_and_the_connection_goes_on() {
    let mut rig = Rig::new("joins").unwrap();
    rig.lab.client.ip("address add 10.77.0.3/24 dev eth0").unwrap();
    rig.furnished().unwrap();
    rig.attach().unwrap();
    let (old, _new) = (multipath_listener(&rig.lab.a).unwrap(), multipath_listener(&rig.lab.b).unwrap());
    let client = rig.lab.client.enter(|| {
        let socket = multipath()?;
        socket.connect(&ends()[0].into())?;
        Ok(TcpStream::from(socket))
    });
    let (mut client, (mut server, _)) = (client.unwrap(), old.accept().unwrap());
    let mut exchange = || {
        client.write_all(b"?").unwrap();
        let mut byte = [0];
        server.read_exact(&mut byte).unwrap();
        server.write_all(b"!").unwrap();
        client.read_exact(&mut byte).unwrap();
    };
    // The first answer completes the handshake: no path is added before it.
    exchange();
    rig.run(&["switch", NAME]).unwrap();
    let refused = || {
        let status = rig.ok(&["status", NAME]).unwrap();
        let of = |index: usize| status["attachments"][0]["partitions"][index]["paths_refused"].clone();
        (of(0), of(1))
    };
    assert_eq!(refused(), (0.into(), 0.into()));
    rig.lab.client.ip("mptcp limits set subflow 2").unwrap();
    rig.lab.client.ip("mptcp endpoint add 10.77.0.3 dev eth0 subflow").unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while refused().1 == 0 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    let (of_old, of_new) = refused();
    assert!(of_old == 0 && of_new.as_u64() >= Some(1), "{of_old} {of_new}");
    exchange();
    let text = rig.run(&["status", NAME]).unwrap().stdout;
    assert!(text.contains("further paths of Multipath TCP"), "{text}");
    drop((client, server));
    rig.finish().unwrap();
}

#[test]
fn guests_that_open_connections_from_the_same_ports_are_told_how_to_separate_them() {
    let mut rig = Rig::new("ranges").unwrap();
    let attach = |rig: &Rig| {
        let arguments = rig.attach_arguments();
        let ended = rig.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.stderr
    };
    let said = attach(&rig);
    assert!(
        said.contains("open connections from the same ports (32768 to 60999 and 32768 to 60999)"),
        "{said}"
    );
    rig.ok(&["detach", NAME]).unwrap();
    // As it is said, by a shell.
    let commands = said.split("next: ").find(|text| text.contains("ip_local_port_range")).unwrap();
    let commands = commands.lines().next().unwrap();
    assert_eq!(commands.matches("nsenter").count(), 2, "{commands}");
    rig.lab.host.run(&["sh", "-c", commands]).unwrap();
    rig.furnished().unwrap();
    let said = attach(&rig);
    assert!(!said.contains("from the same ports"), "{said}");
    rig.ok(&["detach", NAME]).unwrap();
    // One port is enough.
    rig.lab.b.sysctl("net/ipv4/ip_local_port_range", "46883 60999").unwrap();
    assert!(attach(&rig).contains("from the same ports (32768 to 46883 and 46883 to 60999)"));
    rig.lab.b.sysctl("net/ipv4/ip_local_port_range", "46884 60999").unwrap();
    rig.finish().unwrap();
}
