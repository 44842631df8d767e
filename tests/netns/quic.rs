//! Clients of QUIC that go on from another address, and datagrams that stand for themselves, over real sockets.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use patchswitch::config::Datagrams;
use patchswitch_common::Slot;
use patchswitch_tests::netlab::Ns;

use crate::rig::{ECHO, Rig, echo_in, service, spec};

const PORT: u16 = 4433;
const IDLE: Duration = Duration::from_secs(60);

/// As much of a server of QUIC as a switch sees: it makes connections under ids that begin with its name, and answers
/// each packet with it.
fn server(ns: &Ns, name: &'static str) {
    let sockets =
        ns.enter(|| Ok([UdpSocket::bind(("0.0.0.0", PORT))?, UdpSocket::bind(only_v6())?])).unwrap();
    for socket in sockets {
        std::thread::spawn(move || {
            let mut bytes = [0; 1500];
            while let Ok((length, client)) = socket.recv_from(&mut bytes) {
                let made =
                    [&[0xe0, 0, 0, 0, 1, 0, 8][..], &[name.as_bytes()[0]; 8], &[0; 20], name.as_bytes()]
                        .concat();
                let said = [&[0x40], name.as_bytes()].concat();
                let answer = if length > 0 && bytes[0] & 0x80 != 0 { made } else { said };
                drop(socket.send_to(&answer, client));
            }
        });
    }
}

/// The loopback of IPv6 is no wildcard; a wildcard of IPv6 alone needs the option, so the service's address is bound.
fn only_v6() -> SocketAddr {
    SocketAddr::new(service()[1], PORT)
}

/// A socket of the client, which asks and says who answered.
struct Client(UdpSocket);

impl Client {
    fn new(ns: &Ns, to: SocketAddr) -> Self {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = ns.enter(|| Ok(UdpSocket::bind(any)?)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket.connect(to).unwrap();
        Self(socket)
    }

    fn ask(&self, packet: &[u8]) -> char {
        self.0.send(packet).unwrap();
        let mut bytes = [0; 100];
        let length = self.0.recv(&mut bytes).unwrap();
        char::from(bytes[length - 1])
    }
}

fn short(name: u8) -> Vec<u8> {
    [&[0x40][..], &[name; 8], b"data of some length."].concat()
}

#[test]
fn a_client_that_goes_on_from_another_port_keeps_its_server() {
    let rig = Rig::new("quic").unwrap();
    let datagrams = Datagrams { stateless: Vec::new(), quic: "4433:0:8".parse().ok() };
    rig.attach_spec(patchswitch::attachment::Spec { datagrams, ..spec(IDLE).unwrap() }).unwrap();
    server(&rig.lab.a, "a");
    server(&rig.lab.b, "b");
    let to = service().map(|address| SocketAddr::new(address, PORT));
    rig.with(async |attachment| Ok(attachment.learn()?)).unwrap();
    let before = to.map(|to| Client::new(&rig.lab.client, to));
    for client in &before {
        assert_eq!(client.ask(&[0xc0; 40]), 'a');
    }
    rig.with(async |attachment| Ok(attachment.switch(Slot::B).await.map(drop)?)).unwrap();
    for (to, old) in to.iter().zip(&before) {
        let moved = Client::new(&rig.lab.client, *to);
        assert_eq!(moved.ask(&short(b'a')), 'a', "{to}: its connection id is the old one's");
        assert_eq!(moved.ask(&short(b'a')), 'a');
        let other = Client::new(&rig.lab.client, *to);
        assert_eq!(other.ask(&short(b'b')), 'b', "{to}: an id of the new one");
        assert_eq!(Client::new(&rig.lab.client, *to).ask(&[0xc0; 40]), 'b', "{to}: a new connection");
        assert_eq!(old.ask(&short(b'a')), 'a', "{to}: who has not moved");
    }
    assert_eq!(rig.counter(&["events", "moved"]).unwrap(), 2);
    rig.finish_owned().unwrap();
}

#[test]
fn datagrams_of_a_stateless_port_go_to_the_new_side_at_once() {
    let rig = Rig::new("stateless").unwrap();
    let datagrams = Datagrams { stateless: vec![ECHO], quic: None };
    rig.attach_spec(patchswitch::attachment::Spec { datagrams, ..spec(IDLE).unwrap() }).unwrap();
    echo_in(&rig.lab.a, "a").unwrap();
    echo_in(&rig.lab.b, "b").unwrap();
    let clients = service().map(|address| Client::new(&rig.lab.client, SocketAddr::new(address, ECHO)));
    rig.with(async |attachment| Ok(attachment.learn()?)).unwrap();
    for client in &clients {
        client.ask(b"?");
    }
    assert_eq!(rig.counter(&["events", "learned"]).unwrap(), 0);
    let to_b = || rig.counter(&["packets", "uplink", "to_b"]).unwrap();
    let before = to_b();
    rig.with(async |attachment| Ok(attachment.switch(Slot::B).await.map(drop)?)).unwrap();
    for client in &clients {
        client.ask(b"?");
    }
    assert_eq!(to_b() - before, 2);
    rig.finish_owned().unwrap();
}

#[test]
fn what_makes_no_sense_is_refused() {
    let rig = Rig::new("declared").unwrap();
    for (arguments, code, words) in [
        (&["--quic", "443:0:99"][..], 2, "1 to 16"),
        (&["--quic", "443"], 2, "PORT:OFFSET:LENGTH"),
        (&["--stateless", "443", "--quic", "443:0:8"], 1, "443"),
        (&["--stateless", "0"], 1, "0 is none"),
    ] {
        let mut all = rig.attach_arguments();
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let said = rig.refused(&all, code).unwrap();
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    rig.nothing_left().unwrap();
}
