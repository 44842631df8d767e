//! With each look at a socket the kernel lends it to the program; all of them are given back.
//!
//! That a program gives back what it was lent on every path is what the verifier insists on; what it cannot know is
//! whether the helpers of the kernel at hand do what they say, in every state of a socket.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::verdict::Hook;
use patchswitch_common::word::Word;
use patchswitch_tests::netlab::Ns;

use crate::bench::{Bench, PORT, families, service};
use crate::frame;
use crate::steer::{ACK, DRAINING, FIN, SYN, connection, listener, time_wait};

/// How often each packet is sent.
const TIMES: u32 = 50_000;
/// What the kernel itself does with sockets of which nobody wants anything is over by then.
const SETTLED: Duration = Duration::from_secs(10);
/// Where `/proc/net/tcp` and its like have the references to a socket (`get_tcp4_sock` and others of the kernel).
const REFERENCES: usize = 10;

/// How many references there are to each socket of a namespace, by its ends and state.
fn references(ns: &Ns) -> anyhow::Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = ns.enter(|| Ok(std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))?))?;
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if let [_, local, remote, state, ..] = fields[..]
                && let Some(count) = fields.get(REFERENCES)
            {
                found.insert(format!("{table} {local} {remote} {state}"), (*count).to_owned());
            }
        }
    }
    Ok(found)
}

#[test]
fn every_socket_that_was_looked_at_is_given_back() {
    let mut bench = Bench::new("references").unwrap();
    let mut held = Vec::new();
    for family in families() {
        let listening = listener(&bench.lab.a, family).unwrap();
        time_wait(&bench.lab.a, &listening, family, 1001).unwrap();
        held.push((connection(&bench.lab.a, &listening, family, 1000).unwrap(), listening));
        let other = listener(&bench.lab.b, family).unwrap();
        held.push((connection(&bench.lab.b, &other, family, 1002).unwrap(), other));
    }
    let connected = families().map(|family| {
        let socket = bench.lab.a.enter(|| Ok(UdpSocket::bind(service(family))?)).unwrap();
        bench.lab.a.enter(|| Ok(socket.connect((family.client, 1000))?)).unwrap();
        socket
    });
    let spaces = [bench.lab.a.clone(), bench.lab.b.clone()];
    let count = || spaces.each_ref().map(|ns| references(ns).unwrap());
    // A timer of a connection that has just begun holds it as well, for as long as its SYN would have been waited for: the
    // kernel lets it run out (RFC 6298 2.1: a second).
    let mut before = count();
    let end = Instant::now() + SETTLED;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1500));
        let now = count();
        if now == before {
            break;
        }
        before = now;
    }
    // A listener, a connection, what remains of one and a socket of datagrams in each family.
    assert!(before[0].len() >= 8 && before[1].len() >= 4, "{before:?}");
    let uplink = bench.uplink;
    for (word, short_way) in
        [(DRAINING, true), (DRAINING, false), (Word::steady(Slot::B, 1).shared(50), true)]
    {
        bench.word(word).unwrap();
        bench.short_way(short_way).unwrap();
        for family in families() {
            let to = (family.service, PORT);
            let tcp = |port, flags| frame::tcp((family.client, port), to, flags, &[]).frame(uplink.mac);
            for (port, flags) in [
                (1000, ACK),
                (1000, SYN),
                (1001, ACK | FIN),
                (1001, SYN),
                (1002, ACK),
                (1003, SYN),
                (1003, ACK),
            ] {
                bench.repeat(Hook::Uplink, uplink, TIMES, &tcp(port, flags)).unwrap();
            }
            for port in [1000, 1003] {
                let datagram = frame::udp((family.client, port), to, b"?").frame(uplink.mac);
                bench.repeat(Hook::Uplink, uplink, TIMES, &datagram).unwrap();
            }
        }
    }
    // What the kernel itself does with a socket meanwhile is over in a moment.
    let end = Instant::now() + SETTLED;
    while count() != before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(count(), before);
    drop((held, connected));
    bench.finish().unwrap();
}
