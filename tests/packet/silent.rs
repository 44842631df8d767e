//! Connections on which nothing is said for however long: whoever asks whether the other end is still there, or has room
//! again, asks their owner (packet cases D-24 and D-25).

use std::io::{ErrorKind, Write as _};
use std::net::TcpStream;

use patchswitch_common::Slot;
use patchswitch_common::maps::Settings;
use patchswitch_common::word::Word;

use crate::bench::{Bench, Family, PORT, REDIRECT, families};
use crate::frame::{Ip, seal, tcp};
use crate::steer::{ACK, DRAINING, check, connection, listener};

/// A client's segment with numbers of its own.
fn probe(family: Family, port: u16, sequence: u32, window: u16, payload: &[u8]) -> Ip {
    let mut segment = tcp((family.client, port), (family.service, PORT), ACK, payload);
    segment.payload[4..8].copy_from_slice(&sequence.to_be_bytes());
    segment.payload[14..16].copy_from_slice(&window.to_be_bytes());
    seal(&mut segment, 16);
    segment
}

/// What is sent on a silent connection, each also with one byte, as some do (RFC 1122 4.2.3.6).
fn probes(family: Family, port: u16) -> [(&'static str, Ip); 5] {
    [
        // One before the number that comes next (RFC 9293 3.8.4): 0 is before the first byte of the stream.
        ("a keep-alive", probe(family, port, 0, 0xffff, b"")),
        ("a keep-alive with a byte", probe(family, port, u32::MAX, 0xffff, &[0])),
        ("a probe of the window", probe(family, port, 0x8000_0000, 0xffff, b"")),
        ("a probe of the window with a byte", probe(family, port, 0x8000_0001, 0xffff, &[7])),
        ("the answer to one, without room", probe(family, port, 1, 0, b"")),
    ]
}

/// Writes until the other end has no room left.
fn fill(stream: &mut TcpStream) -> anyhow::Result<()> {
    stream.set_nonblocking(true)?;
    loop {
        match stream.write(&[7; 1 << 16]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[test]
fn probes_of_a_silent_connection_are_its_owners() {
    let mut bench = Bench::new("silent").unwrap();
    // Whatever runs out in these programs has run out: hours are no more than that.
    bench.declare(|settings| Settings { learned_idle_ns: 1, ..settings }).unwrap();
    let given_back = Word::steady(Slot::B, 1).taken_over_by(Slot::A);
    for family in families() {
        let spaces = [bench.lab.a.clone(), bench.lab.b.clone()];
        let listening = spaces.each_ref().map(|ns| listener(ns, family).unwrap());
        let mut ends = Vec::new();
        for (ns, listening, port) in [
            (&spaces[0], &listening[0], 1000),
            (&spaces[0], &listening[0], 1001),
            (&spaces[1], &listening[1], 2000),
        ] {
            ends.push(connection(ns, listening, family, port).unwrap());
        }
        // One of them has no room; nobody reads.
        fill(&mut ends[1][0]).unwrap();
        for (word, port, counted) in [
            (DRAINING, 1000, &["to_a", "kept_by_retiring"][..]),
            (DRAINING, 1001, &["to_a", "kept_by_retiring"]),
            (DRAINING, 2000, &["to_b"]),
            (given_back, 1000, &["to_a"]),
            (given_back, 1001, &["to_a"]),
            (given_back, 2000, &["to_b", "kept_by_retiring"]),
        ] {
            bench.word(word).unwrap();
            for (what, packet) in probes(family, port) {
                check(&bench.client(&packet).unwrap(), REDIRECT, counted, &format!("{what}, port {port}"));
            }
        }
        // The retiring side answers, and asks itself: nothing of it is changed.
        bench.word(DRAINING.with_notice(true)).unwrap();
        for port in [1000, 1001] {
            let segment = tcp((family.service, PORT), (family.client, port), ACK, b"");
            let seen = bench.partition(Slot::A, &segment).unwrap();
            check(&seen, REDIRECT, &["out"], "of the retiring side");
            assert_eq!(seen.frame, segment.frame(bench.links[0].mac));
        }
    }
    bench.finish().unwrap();
}
