//! Connections that are being closed: each stays its owner's until its socket is gone, whatever state that is in.

use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyhow::ensure;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::tcp_sockets_in;
use patchswitch_tests::programs;

use crate::bench::{Bench, PORT, REDIRECT, families};
use crate::direction::DIRECTIONS;
use crate::steer::{ACK, FIN, RST, SYN, check, connection, listener, segment};

/// Who closes its half, in their order; between them the server's FINs may be lost.
#[derive(Clone, Copy, Debug)]
enum Act {
    Client,
    Server,
    Lose,
}

/// Each state of the server's socket, and how it comes into it.
const STATES: [(&str, &[Act]); 5] = [
    ("FIN-WAIT-2", &[Act::Server]),
    ("CLOSE-WAIT", &[Act::Client]),
    ("FIN-WAIT-1", &[Act::Lose, Act::Server]),
    ("CLOSING", &[Act::Lose, Act::Server, Act::Client]),
    ("LAST-ACK", &[Act::Lose, Act::Client, Act::Server]),
];

/// Lets the server's FINs come to nobody, or lets them pass again.
fn lose_fins(ns: &Ns, lose: bool) -> anyhow::Result<()> {
    let rule = format!("add rule inet lose out tcp sport {PORT} tcp flags & fin == fin drop\n");
    let table = "add table inet lose\ndelete table inet lose\n";
    let chain = "add table inet lose\nadd chain inet lose out { type filter hook output priority 0; }\n";
    let text = if lose { [table, chain, &rule].concat() } else { table.to_owned() };
    ns.enter(|| programs::run_with_input(&["nft", "-f", "-"], Some(&text)).map(drop))
}

/// Waits until the server's socket is in a state.
fn wait_for(ns: &Ns, port: u16, state: &str) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let sockets = tcp_sockets_in(ns)?;
        let mut servers = sockets.iter().filter(|s| s.local.port() == PORT && s.peer.port() == port);
        if servers.any(|socket| socket.state == state) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "no {state}: {sockets:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_connection_that_closes_is_its_owners_until_it_is_gone() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("closing").unwrap();
        let [retiring, _] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        let kept = way.kept();
        for family in families() {
            let listening = listener(&retiring, family).unwrap();
            let mut held = Vec::new();
            for (number, (state, acts)) in STATES.into_iter().enumerate() {
                let port = 1000 + number as u16;
                let [client, server] = connection(&retiring, &listening, family, port).unwrap();
                for act in acts {
                    match act {
                        Act::Client => client.shutdown(Shutdown::Write).unwrap(),
                        Act::Server => server.shutdown(Shutdown::Write).unwrap(),
                        Act::Lose => lose_fins(&retiring, true).unwrap(),
                    }
                }
                wait_for(&retiring, port, state).unwrap();
                for flags in [ACK, ACK | FIN, SYN, RST | ACK] {
                    let seen = bench.client(&segment(family, port, flags)).unwrap();
                    check(&seen, REDIRECT, kept, &format!("{state}, flags {flags:#x}"));
                }
                wait_for(&retiring, port, state).unwrap();
                lose_fins(&retiring, false).unwrap();
                held.push((client, server));
            }
        }
        bench.finish().unwrap();
    }
}

#[test]
fn connections_outlive_their_listener() {
    for way in DIRECTIONS {
        let mut bench = Bench::new("outlive").unwrap();
        let [retiring, _] = way.spaces(&bench);
        bench.word(way.word()).unwrap();
        for family in families() {
            let listening = listener(&retiring, family).unwrap();
            let _ends = connection(&retiring, &listening, family, 1000).unwrap();
            drop(listening);
            let kept = way.kept();
            for flags in [ACK, ACK | FIN, SYN] {
                check(
                    &bench.client(&segment(family, 1000, flags)).unwrap(),
                    REDIRECT,
                    kept,
                    "of the connection",
                );
            }
            let nothing = way.nothing();
            check(&bench.client(&segment(family, 1001, ACK)).unwrap(), REDIRECT, nothing, "of another one");
        }
        bench.finish().unwrap();
    }
}
