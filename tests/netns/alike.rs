//! What clients would notice if the two partitions differed in it.

use patchswitch::names::host_link;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::Counters;

use crate::ask::{who, who_at_once};
use crate::rig::{NAME, Rig, Server, ends, name};

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
    let switched = |times: usize, what: &str| {
        let ended = rig.run(&["switch", NAME]).unwrap();
        assert_eq!((ended.code, told(&ended.stderr)), (Some(0), times), "{what}: {ended:?}");
        ended.stderr
    };
    switched(0, "nothing differs");
    // Inside, of a namespace of somebody else's.
    let link = host_link(&name().unwrap(), 0);
    let hops = format!("ipv6/conf/{link}/hop_limit");
    let settings =
        ["ipv4/tcp_timestamps", "ipv4/ip_default_ttl", "ipv4/tcp_max_syn_backlog", "core/somaxconn", &hops];
    for (at, setting) in settings.into_iter().enumerate() {
        let path = format!("net/{setting}");
        let before = rig.lab.a.run(&["sysctl", "-n", &path]).unwrap();
        let before = before.trim();
        let other = if before == "1" { "0" } else { "1" };
        rig.lab.a.sysctl(&path, other).unwrap();
        // Whichever of the two serves, and the other way round at every second setting.
        let said = switched(1, setting);
        let setting = setting.replace('/', ".");
        let (serving, next) = if at % 2 == 0 { (before, other) } else { (other, before) };
        assert!(said.contains(&format!("net.{setting} is {serving} in the")), "{setting}: {said}");
        assert!(said.contains(&format!("and {next} in the one that takes over")), "{setting}: {said}");
        rig.lab.a.sysctl(&path, before).unwrap();
    }
    assert_eq!(who(&rig.lab.client, ends()[0]).unwrap(), "a");
    rig.finish().unwrap();
}
