//! What clients would notice if the two partitions differed in it.

use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::Counters;

use crate::ask::{who, who_at_once};
use crate::rig::{NAME, Rig, Server, ends};

/// Data in the first segment: asked for, and taken by every listener (`TFO_CLIENT_ENABLE`, `TFO_SERVER_ENABLE`,
/// `TFO_SERVER_WO_SOCKOPT1` of `include/net/tcp.h`).
const FAST_OPEN: &str = "1027";

/// How many first segments brought data that was taken.
fn taken(ns: &Ns) -> anyhow::Result<i64> {
    Counters::of(ns)?.get("TcpExt.TCPFastOpenPassive")
}

#[test]
fn a_cookie_for_data_in_the_first_segment_is_good_on_both_sides() {
    let mut rig = Rig::new("fastopen").unwrap();
    for ns in [&rig.lab.client, &rig.lab.a, &rig.lab.b] {
        ns.sysctl("net/ipv4/tcp_fastopen", FAST_OPEN).unwrap();
    }
    rig.furnished().unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    // Each side makes a key of its own when it is listened on; the first connection of a client brings a cookie.
    for end in ends() {
        assert_eq!(who_at_once(&rig.lab.client, end).unwrap(), "a");
    }
    let before = taken(&rig.lab.a).unwrap();
    for end in ends() {
        assert_eq!(who_at_once(&rig.lab.client, end).unwrap(), "a");
    }
    assert_eq!(taken(&rig.lab.a).unwrap(), before + 2, "the laboratory has no Fast Open");
    rig.switch_to(&rig.lab.b).unwrap();
    for (times, owner, ns) in [(1, "b", &rig.lab.b), (2, "a", &rig.lab.a)] {
        let before = taken(ns).unwrap();
        for end in ends() {
            assert_eq!(who_at_once(&rig.lab.client, end).unwrap(), owner);
        }
        assert_eq!(taken(ns).unwrap(), before + 2, "switch {times}: a cookie was not taken");
        if times == 1 {
            rig.switch_to(&rig.lab.a).unwrap();
        }
    }
    rig.finish().unwrap();
}

#[test]
fn a_setting_that_clients_see_and_that_differs_is_told() {
    let rig = Rig::new("alike").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let told = |text: &str| text.lines().filter(|line| line.contains("in the partition that serves")).count();
    let same = rig.run(&["switch", NAME]).unwrap();
    assert_eq!((same.code, told(&same.stderr)), (Some(0), 0), "{same:?}");
    rig.lab.a.sysctl("net/ipv4/tcp_timestamps", "0").unwrap();
    let other = rig.run(&["switch", NAME]).unwrap();
    assert_eq!((other.code, told(&other.stderr)), (Some(0), 1), "{other:?}");
    assert!(other.stderr.contains("net.ipv4.tcp_timestamps is 1"), "{other:?}");
    assert_eq!(who(&rig.lab.client, ends()[0]).unwrap(), "a");
    rig.lab.a.sysctl("net/ipv4/tcp_timestamps", "1").unwrap();
    rig.finish().unwrap();
}
