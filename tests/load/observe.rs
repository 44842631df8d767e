//! What the observers say is what happened.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use patchswitch_tests::netlab::{CLIENT_LINK, HOST, Lab, SwitchLab, UPLINK};
use patchswitch_tests::observe::{Capture, Counters, RESETS, tcp_sockets_in};
use rustix::net::sockopt::set_socket_linger;

/// Connects from the client to a listener on the host, says one byte, and ends by a close or a reset.
fn converse(lab: &SwitchLab, address: &str, reset: bool) {
    let listener = lab.host.enter(|| Ok(TcpListener::bind((address, 0))?)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client = lab.client.enter(|| Ok(TcpStream::connect((address, port))?)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    if reset {
        set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
        drop(client);
        assert!(server.read(&mut [0]).is_err(), "reset");
    } else {
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn resets_are_captured_in_both_families_and_nothing_else_is() {
    let lab = SwitchLab::new("resets").unwrap();
    let capture = Capture::start_in(&lab.host, UPLINK, RESETS).unwrap();
    for address in HOST {
        converse(&lab, address, false);
        converse(&lab, address, true);
    }
    let captured = capture.stop().unwrap();
    let sources: Vec<_> =
        captured.packets.iter().map(|packet| packet.from.unwrap().ip().to_string()).collect();
    assert_eq!(sources, ["10.77.0.2", "fd77::2"], "{captured:?}");
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = u64::try_from(now.tv_sec).unwrap() * 1_000_000_000;
    assert_eq!(captured.count(now - 30_000_000_000, now + 2_000_000_000), 2, "{now} {captured:?}");
}

#[test]
fn a_capture_on_a_link_that_is_not_there_is_an_error() {
    let mut lab = Lab::new("nolink");
    let ns = lab.namespace("a").unwrap();
    let error = Capture::start_in(&ns, "nolink0", RESETS).unwrap_err();
    assert!(format!("{error:#}").contains("nolink0"), "{error:#}");
}

#[test]
fn resets_and_retransmissions_are_counted_where_they_happen() {
    let lab = SwitchLab::new("counters").unwrap();
    let before = Counters::of(&lab.client).unwrap();
    converse(&lab, HOST[0], false);
    let quiet = Counters::of(&lab.client).unwrap().since(&before).trouble().unwrap();
    assert_eq!((quiet.resets_sent, quiet.retransmitted, quiet.established_reset), (0, 0, 0));
    converse(&lab, HOST[1], true);
    let after = Counters::of(&lab.client).unwrap().since(&before).trouble().unwrap();
    assert_eq!((after.resets_sent, after.retransmitted), (1, 0));

    // A byte that is lost on the way is sent again.
    let listener = lab.host.enter(|| Ok(TcpListener::bind((HOST[0], 0))?)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client = lab.client.enter(|| Ok(TcpStream::connect((HOST[0], port))?)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    // To a wrong hardware address: the host throws the frame away.
    let neighbour = format!("{} dev {CLIENT_LINK}", HOST[0]);
    lab.client.ip(&format!("neigh replace {neighbour} lladdr 02:00:00:00:00:99 nud permanent")).unwrap();
    client.write_all(b"y").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    lab.client.ip(&format!("neigh del {neighbour}")).unwrap();
    server.read_exact(&mut [0]).unwrap();
    let lost = Counters::of(&lab.client).unwrap().since(&before).trouble().unwrap();
    assert!(lost.retransmitted >= 1, "{lost:?}");
    let other = Counters::of(&lab.a).unwrap().trouble().unwrap();
    assert_eq!((other.resets_sent, other.retransmitted), (0, 0), "another namespace counts for itself");
}

#[test]
fn open_connections_are_listed_in_the_namespace_that_has_them() {
    let lab = SwitchLab::new("ss").unwrap();
    for address in HOST {
        let listener = lab.host.enter(|| Ok(TcpListener::bind((address, 0))?)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = lab.client.enter(|| Ok(TcpStream::connect((address, port))?)).unwrap();
        let ours = client.local_addr().unwrap();
        let (_server, _) = listener.accept().unwrap();
        for (ns, peer) in [(&lab.client, client.peer_addr().unwrap()), (&lab.host, ours)] {
            let sockets = tcp_sockets_in(ns).unwrap();
            let found = sockets.iter().find(|socket| socket.peer == peer);
            assert_eq!(found.map(|socket| socket.state.as_str()), Some("ESTAB"), "{sockets:?}");
        }
        assert_eq!(tcp_sockets_in(&lab.a).unwrap(), []);
    }
}
