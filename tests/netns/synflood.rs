//! A flood of SYNs that nobody means: who means it gets through by SYN cookies, across switches as well.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use patchswitch_load::client::Settings;
use patchswitch_load::record::Class;
use patchswitch_tests::frame::tcp;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::{Counters, tcp_sockets_in};

use crate::rig::{Load, PORT, Rig, Server, load, service};
use crate::syns::{self, SYN, source};

/// So many connections that have only begun fill a listener; then it answers by cookies.
const ROOM: &str = "128";
/// In each millisecond, of each family.
const BURST: u32 = 5;
const SWITCHES: usize = 10;

/// SYNs from addresses that nobody has, again and again the same ones, until it is told to stop; how many.
fn flood(rig: &Rig, stop: &Arc<AtomicBool>) -> Result<JoinHandle<Result<u32>>> {
    let ((mut sender, mac), stop) = (syns::sender(rig)?, Arc::clone(stop));
    Ok(std::thread::spawn(move || {
        let mut number = 0;
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..BURST {
                for address in service() {
                    let from = source(address.is_ipv4(), 0, number % 100_000);
                    let frame = tcp(from, (address, PORT), SYN, &[]).frame(mac);
                    sender.send_to(&frame, None).context("no room to send")??;
                }
                number += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(number)
    }))
}

/// Cookies that a namespace's listeners gave out, and those that came back good.
fn cookies(ns: &Ns) -> [i64; 2] {
    let counters = Counters::of(ns).unwrap();
    ["TcpExt.SyncookiesSent", "TcpExt.SyncookiesRecv"].map(|name| counters.get(name).unwrap())
}

#[test]
fn a_flood_of_syns_keeps_nobody_out_while_it_switches() {
    let mut rig = Rig::new("synflood").unwrap();
    for ns in [&rig.lab.a, &rig.lab.b] {
        // A listener is given its room when it begins.
        ns.sysctl("net/core/somaxconn", ROOM).unwrap();
        ns.sysctl("net/ipv4/tcp_syncookies", "1").unwrap();
    }
    syns::routes(&rig).unwrap();
    rig.furnished().unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    rig.attach().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let flooding = flood(&rig, &stop).unwrap();
    let load = Load::start(&rig.lab.client, Settings { rate: 400.0, ..load() });
    std::thread::sleep(Duration::from_secs(1));
    for to in [b, a].into_iter().cycle().take(SWITCHES) {
        rig.switch_to(to).unwrap();
        std::thread::sleep(Duration::from_millis(300));
    }
    let half_open = [a, b]
        .map(|ns| tcp_sockets_in(ns).unwrap().iter().filter(|socket| socket.state == "SYN-RECV").count());
    let run = load.stop().unwrap();
    stop.store(true, Ordering::Relaxed);
    let sent = flooding.join().unwrap().unwrap();
    assert_eq!(run.failures, []);
    let new: usize = run
        .answers
        .iter()
        .filter(|series| series.class == Class::New)
        .map(|series| series.iter().count())
        .sum();
    let counted = [a, b].map(cookies);
    eprintln!(
        "{sent} SYNs of each family, {new} new connections, cookies sent and honoured {counted:?}, {half_open:?}"
    );
    assert!(new > 300 && sent > 1000, "{new} {sent}");
    for [given, honoured] in counted {
        assert!(given > 200 && honoured > 20, "no flood: {counted:?}");
    }
    assert!(half_open.iter().all(|count| *count >= 100), "{half_open:?}");
    rig.finish().unwrap();
}
