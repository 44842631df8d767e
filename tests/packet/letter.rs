//! A switch to the letter of the patent (figures 22 to 26): what clients send goes to the new side, whoever has a socket for
//! it; what the old side still sends is sent on, as in any switch.

use std::net::UdpSocket;

use patchswitch_common::Slot;

use crate::bench::{Bench, PORT, REDIRECT, families, key, service};
use crate::frame::{self, Place, tcp, udp};
use crate::steer::{ACK, DRAINING, FIN, RST, STEADY, SYN, check, connection, listener, segment};

#[test]
fn nothing_is_steered_to_who_retires() {
    let mut bench = Bench::new("letter").unwrap();
    let word = STEADY.moved_to(Slot::B);
    for family in families() {
        let listening = listener(&bench.lab.a, family).unwrap();
        let _ends = connection(&bench.lab.a, &listening, family, 1000).unwrap();
        let connected = bench.lab.a.enter(|| {
            let socket = UdpSocket::bind(service(family))?;
            socket.connect((family.client, 1000))?;
            Ok(socket)
        });
        let _connected = connected.unwrap();
        bench.remember(key((family.client, 1001), PORT, frame::UDP), family.service, Slot::A, 0).unwrap();
        let datagram = |port: u16| udp((family.client, port), (family.service, PORT), b"x");
        let mut packets =
            vec![("a connected socket's", datagram(1000)), ("a learned flow's", datagram(1001))];
        packets
            .extend([ACK, ACK | FIN, SYN, RST].map(|flags| ("a connection's", segment(family, 1000, flags))));
        for (what, packet) in packets {
            bench.word(DRAINING).unwrap();
            assert!(bench.client(&packet).unwrap().counted.contains(&"to_a"), "{what}");
            bench.word(word).unwrap();
            // It is not even asked whose it is.
            check(&bench.client(&packet).unwrap(), REDIRECT, &["to_b"], what);
        }
        let mut later = datagram(1000);
        later.place = Some(Place { offset: 1, more: false, id: 7 });
        check(&bench.client(&later).unwrap(), REDIRECT, &["to_b"], "a fragment of something");
    }
    bench.finish().unwrap();
}

#[test]
fn what_who_retires_still_sends_is_sent_on() {
    let mut bench = Bench::new("letterout").unwrap();
    bench.word(STEADY.with_notice(true).moved_to(Slot::B)).unwrap();
    for family in families() {
        let rewritten = if family.client.is_ipv4() { "rewritten_v4" } else { "rewritten_v6" };
        bench.remember(key((family.client, 1000), PORT, frame::UDP), family.service, Slot::A, 0).unwrap();
        let reply = udp((family.own_a, PORT), (family.client, 1000), b"late");
        let seen = bench.partition(Slot::A, &reply).unwrap();
        check(&seen, REDIRECT, &["out", rewritten, "learned"], "a reply of a learned flow");
        let wanted = udp((family.service, PORT), (family.client, 1000), b"late");
        assert_eq!(seen.frame, wanted.frame(bench.links[0].mac));
        let data = tcp((family.service, PORT), (family.client, 1000), ACK, b"late");
        check(&bench.partition(Slot::A, &data).unwrap(), REDIRECT, &["out"], "the rest of an answer");
    }
    bench.finish().unwrap();
}
