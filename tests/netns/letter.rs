//! A switch to the letter of the patent: datagrams that answer arrive with the service's address, connections are reset by the first
//! segment that their client sends, be it an acknowledgement of the answer. That is what the switch of patchswitch is for.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use patchswitch::attachment::SwitchOptions;
use patchswitch_common::Slot;
use patchswitch_load::echo;
use patchswitch_tests::netlab::Ns;

use crate::ask::Asking;
use crate::rig::{NAME, Rig, Server, ends, service};
use crate::udp::{clients, event, learn, switch};

/// Ports of the servers that answer late.
const LATE: u16 = 7300;
const IDLE: Duration = Duration::from_secs(60);
const LIMIT: Duration = Duration::from_secs(5);

fn datagrams(ns: &Ns) -> [UdpSocket; 2] {
    let servers = ns.enter(|| Ok(echo::bind(LATE)?)).unwrap();
    for server in &servers {
        server.set_read_timeout(Some(LIMIT)).unwrap();
    }
    servers
}

/// Connections to the first partition, both ends of each.
fn connections(rig: &Rig) -> Vec<[TcpStream; 2]> {
    let connect = |address| {
        let end = SocketAddr::new(address, LATE);
        let listener = rig.lab.a.enter(|| Ok(TcpListener::bind(end)?)).unwrap();
        let client = rig.lab.client.enter(|| Ok(TcpStream::connect_timeout(&end, LIMIT)?)).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        [client, listener.accept().unwrap().0]
    };
    service().into_iter().map(connect).collect()
}

#[test]
fn datagrams_under_way_arrive_and_connections_are_reset() {
    let rig = Rig::new("letter").unwrap();
    let [old, new] = [&rig.lab.a, &rig.lab.b].map(datagrams);
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach_owned(IDLE).unwrap();
    let mut connections = connections(&rig);
    let sockets = clients(&rig, LATE).unwrap();
    learn(&rig).unwrap();
    let mut asked = Vec::new();
    for (socket, server) in sockets.iter().zip(&old) {
        // Answered once, it is known; asked again, its answer is under way.
        for _ in 0..2 {
            socket.send(b"?").unwrap();
            let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
            server.send_to(b"first", from).unwrap();
            assert_eq!(socket.recv(&mut [0; 8]).unwrap(), 5);
            asked.push(from);
        }
    }
    let letter = SwitchOptions { letter: true, ..SwitchOptions::default() };
    rig.with(async |attachment| Ok(attachment.switch_with(Slot::B, letter).await?)).unwrap();
    let status = rig.ok(&["status", NAME]).unwrap();
    assert_eq!(status["attachments"][0]["phase"], "letter", "{status}");
    let roles = [0, 1].map(|slot| status["attachments"][0]["partitions"][slot]["role"].as_str());
    assert_eq!(roles, [Some("retiring"), Some("active")], "{status}");

    for ((socket, servers), from) in sockets.iter().zip(old.iter().zip(&new)).zip(asked.chunks(2)) {
        servers.0.send_to(b"late", from[0]).unwrap();
        // From the service: the client's socket hears nobody else.
        assert_eq!(socket.recv(&mut [0; 8]).unwrap(), 4);
        socket.send(b"next").unwrap();
        assert_eq!(
            servers.1.recv_from(&mut [0; 8]).unwrap().0,
            4,
            "what is asked from now on is the new side's"
        );
    }
    assert_eq!([event(&rig, "rewritten_v4"), event(&rig, "rewritten_v6")], [1; 2]);
    for [client, _server] in &mut connections {
        // The new side knows nothing of it.
        client.write_all(b"more").unwrap();
        let error = client.read_exact(&mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    let mut there: Vec<_> =
        ends().into_iter().map(|end| Asking::from(&rig.lab.client, end).unwrap()).collect();
    for asking in &mut there {
        assert_eq!(asking.who().unwrap(), "b");
    }
    // Back as usual: nobody's connection is reset.
    switch(&rig, Slot::A).unwrap();
    for (asking, end) in there.iter_mut().zip(ends()) {
        assert_eq!(asking.who().unwrap(), "b");
        assert_eq!(Asking::from(&rig.lab.client, end).unwrap().who().unwrap(), "a");
    }
    drop(connections);
    rig.finish_owned().unwrap();
}

#[test]
fn it_is_a_way_of_the_command() {
    let rig = Rig::new("letterway").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let [end, _] = ends();
    let mut kept = Asking::from(&rig.lab.client, end).unwrap();
    assert_eq!(kept.who().unwrap(), "a");
    rig.refused(&["switch", NAME, "--letter", "--share", "10"], 2).unwrap();
    rig.refused(&["switch", NAME, "--letter", "--hold", "1s", "--run", "true"], 2).unwrap();
    let done = rig.ok(&["switch", NAME, "--letter"]).unwrap();
    assert_eq!(done["changed"], true, "{done}");
    assert_eq!(rig.ok(&["switch", NAME, "--letter", "--to", rig.lab.b.name()]).unwrap()["changed"], false);
    let error = kept.who().unwrap_err();
    let kind = error.root_cause().downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    assert!(matches!(kind, Some(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)), "{error:?}");
    assert_eq!(Asking::from(&rig.lab.client, end).unwrap().who().unwrap(), "b");
    // The old side's socket waits for acknowledgements that go to somebody else, until the deadline.
    let drained = rig.run(&["drain", NAME, "--deadline", "1", "--on-deadline", "reset", "--json"]).unwrap();
    assert!(drained.code == Some(24) && drained.stdout.contains("\"reset\": 1"), "{drained:?}");
    rig.finish().unwrap();
}
