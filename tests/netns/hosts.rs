//! Hosts on which the service cannot be, or not as it is asked for: a clear error, and nothing is left; or a limit that is
//! said.

use std::time::{Duration, Instant};

use patchswitch_tests::leftovers::Leftover;
use patchswitch_tests::netlab::{CLIENT, Ns, SERVICE, UPLINK};

use crate::ask::{Asking, who};
use crate::rig::{NAME, Rig, Server, ends};

fn attach<'a>(rig: &'a Rig, more: &[&'a str]) -> Vec<&'a str> {
    let start = ["attach", NAME, "--announce", "1", "--address", SERVICE[0]];
    [&start[..], more, &[rig.lab.a.name(), rig.lab.b.name()]].concat()
}

#[test]
fn an_uplink_without_ethernet_frames_is_refused() {
    let mut rig = Rig::new("tunnel").unwrap();
    rig.lab.host.ip("tuntap add dev tunnel0 mode tun").unwrap();
    rig.furnished().unwrap();
    let said = rig.refused(&attach(&rig, &["--uplink", UPLINK, "--uplink", "tunnel0"]), 1).unwrap();
    assert!(said.contains("tunnel0 has no Ethernet frames"), "{said}");
    rig.nothing_left().unwrap();
    // Whose frames are Ethernet's is good, whatever it is.
    rig.lab.host.ip("tuntap add dev tap0 mode tap").unwrap();
    rig.furnished().unwrap();
    rig.ok(&attach(&rig, &["--uplink", UPLINK, "--uplink", "tap0"])).unwrap();
    rig.finish().unwrap();
}

#[test]
fn an_address_of_a_family_that_is_switched_off_is_refused() {
    for (place, key) in [
        ("the host", "net/ipv6/conf/uplink0/disable_ipv6"),
        ("the host", "net/ipv6/conf/default/disable_ipv6"),
        ("b", "net/ipv6/conf/all/disable_ipv6"),
    ] {
        let mut rig = Rig::new("family").unwrap();
        let ns = if place == "b" { &rig.lab.b } else { &rig.lab.host };
        ns.sysctl(key, "1").unwrap();
        let name = if place == "b" { rig.lab.b.name().to_owned() } else { place.to_owned() };
        rig.furnished().unwrap();
        let both = attach(&rig, &["--address", SERVICE[1], "--uplink", UPLINK]);
        let said = rig.refused(&both, 1).unwrap();
        assert!(said.contains("IPv6 is switched off"), "{key}: {said}");
        assert!(said.contains(&name) && said.contains(SERVICE[1]), "{key}: {said}");
        rig.nothing_left().unwrap();
        // The other family needs none of it.
        let _server = Server::start(&rig.lab.a, "a").unwrap_or_else(|error| panic!("{key}: {error:#}"));
        rig.ok(&attach(&rig, &["--uplink", UPLINK])).unwrap();
        assert_eq!(who(&rig.lab.client, ends()[0]).unwrap(), "a");
        rig.finish().unwrap();
    }
}

#[test]
fn a_route_of_the_hosts_own_for_the_address_is_not_replaced() {
    for (option, address, gateway) in [("-4", SERVICE[0], CLIENT[0]), ("-6", SERVICE[1], CLIENT[1])] {
        let mut rig = Rig::new("routed").unwrap();
        rig.lab.host.ip(&format!("{option} route add {address} via {gateway} dev {UPLINK}")).unwrap();
        rig.furnished().unwrap();
        let both = ["--address", SERVICE[1], "--uplink", UPLINK];
        let said = rig.refused(&attach(&rig, &both), 1).unwrap();
        assert!(said.contains(&format!("ip {option} route del {address}")), "{said}");
        rig.nothing_left().unwrap();
        rig.lab.host.ip(&format!("{option} route del {address}")).unwrap();
        // A wider one is none for the address.
        let wide = if option == "-4" { "10.77.0.0/25" } else { "fd77::/65" };
        rig.lab.host.ip(&format!("{option} route add {wide} via {gateway} dev {UPLINK}")).unwrap();
        rig.furnished().unwrap();
        rig.ok(&attach(&rig, &both)).unwrap();
        rig.finish().unwrap();
    }
}

fn mtu(ns: &Ns, link: &str) -> u64 {
    let shown: serde_json::Value = serde_json::from_str(&ns.ip("-j link show").unwrap()).unwrap();
    let links = shown.as_array().unwrap();
    links.iter().find(|one| one["ifname"].as_str().unwrap().starts_with(link)).unwrap()["mtu"]
        .as_u64()
        .unwrap()
}

#[test]
fn uplinks_whose_mtus_differ_give_the_smallest_and_that_is_said() {
    let mut rig = Rig::new("mtus").unwrap();
    rig.lab.lab.veth((&rig.lab.client, "eth1"), (&rig.lab.host, "uplink1")).unwrap();
    let uplinks = ["--uplink", UPLINK, "--uplink", "uplink1"];
    let same = rig.run(&attach(&rig, &uplinks)).unwrap();
    assert!(same.code == Some(0) && !same.stderr.contains("MTU"), "{same:?}");
    assert_eq!(mtu(&rig.lab.a, "ps"), 1500);
    rig.ok(&["detach", NAME]).unwrap();
    rig.lab.host.ip("link set uplink1 mtu 1400").unwrap();
    rig.furnished().unwrap();
    let other = rig.run(&attach(&rig, &uplinks)).unwrap();
    assert_eq!(other.code, Some(0), "{other:?}");
    // Said once, and in characters that a file can have.
    let said = other.stderr.matches("MTUs from 1400 to 1500; partitions get 1400").count();
    assert!(said == 1 && !other.stderr.contains('\u{1b}'), "{other:?}");
    for ns in [&rig.lab.a, &rig.lab.b] {
        assert_eq!(mtu(ns, "ps"), 1400);
    }
    rig.finish().unwrap();
}

/// Fetches a large body: it takes many segments.
fn fetch(rig: &Rig) {
    for end in ends() {
        let mut asking = Asking::from(&rig.lab.client, end).unwrap();
        let begin = Instant::now();
        let body = asking.get("/bytes?n=2000000").unwrap();
        assert_eq!(body.len(), 2_000_000);
        assert!(begin.elapsed() < Duration::from_secs(3), "{end}: {:?}", begin.elapsed());
    }
}

/// How many packets from the service are bigger than a size, as the client's kernel counts them.
fn too_big(rig: &Rig) -> u64 {
    let shown = rig.lab.client.run(&["nft", "-j", "list", "table", "inet", "sizes"]).unwrap();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let objects = shown["nftables"].as_array().unwrap();
    let rule = objects.iter().find_map(|object| object.get("rule")).unwrap();
    rule["expr"].as_array().unwrap().iter().find_map(|one| one["counter"]["packets"].as_u64()).unwrap()
}

#[test]
fn an_mtu_that_becomes_smaller_is_brought_to_the_partitions_by_who_mends() {
    let rig = Rig::new("shrink").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    // Packets as they would be on a wire, one by one.
    rig.lab.host.run(&["ethtool", "-K", UPLINK, "tso", "off", "gso", "off"]).unwrap();
    for line in [
        "add table inet sizes",
        "add chain inet sizes seen { type filter hook input priority 0 ; }",
        "add rule inet sizes seen meta length > 1300 counter",
    ] {
        rig.lab.client.run(&[&["nft"][..], &line.split(' ').collect::<Vec<_>>()].concat()).unwrap();
    }
    rig.attach().unwrap();
    fetch(&rig);
    let before = too_big(&rig);
    assert!(before > 1000, "{before}");
    // Of the host alone: the client still offers segments for 1500.
    rig.lab.host.ip(&format!("link set {UPLINK} mtu 1300")).unwrap();
    let mended = |count: usize| {
        let said = rig.ok(&["switch", NAME, "--to", rig.lab.a.name()]).unwrap();
        let mended = said["mended"].as_array().unwrap();
        assert_eq!(mended.len(), count, "{said}");
        mended
            .iter()
            .for_each(|what| assert!(what.as_str().unwrap().contains("at most 1300 bytes"), "{said}"));
    };
    mended(1);
    mended(0);
    let before = too_big(&rig);
    fetch(&rig);
    assert_eq!(too_big(&rig) - before, 0);
    // What somebody has made smaller inside stays so.
    let links = rig.lab.a.ip("-o link show").unwrap();
    let link = links.split(|c: char| !c.is_ascii_alphanumeric()).find(|word| word.starts_with("ps")).unwrap();
    rig.lab.a.ip(&format!("link set {link} mtu 1280")).unwrap();
    fetch(&rig);
    assert_eq!(mtu(&rig.lab.b, "ps"), 1300);
    rig.lab.host.ip(&format!("link set {UPLINK} mtu 1500")).unwrap();
    rig.ok(&["switch", NAME, "--to", rig.lab.a.name()]).unwrap();
    assert_eq!([mtu(&rig.lab.a, "ps"), mtu(&rig.lab.b, "ps")], [1280, 1500]);
    rig.lab.client.run(&["nft", "delete", "table", "inet", "sizes"]).unwrap();
    rig.finish().unwrap();
}

fn nft(rig: &Rig, rule: &str) {
    rig.lab.host.run(&[&["nft"][..], &rule.split(' ').collect::<Vec<_>>()].concat()).unwrap();
}

#[test]
fn a_firewall_that_names_the_service_is_told_of() {
    let rig = Rig::new("named").unwrap();
    let _server = Server::start(&rig.lab.a, "a").unwrap();
    nft(&rig, "add table inet guard");
    nft(&rig, "add chain inet guard passing { type filter hook forward priority 0 ; policy accept ; }");
    nft(&rig, "add rule inet guard passing ip daddr 10.77.0.50 drop");
    nft(&rig, "add rule inet guard passing iifname old0 drop");
    nft(&rig, &format!("add rule inet guard passing iifname {UPLINK} accept"));
    let arguments = rig.attach_arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let quiet = rig.run(&arguments).unwrap();
    assert!(quiet.code == Some(0) && !quiet.stderr.contains("warning"), "{quiet:?}");
    rig.ok(&["detach", NAME]).unwrap();
    nft(&rig, "add rule inet guard passing ip daddr 10.77.0.10 drop");
    let told = rig.run(&arguments).unwrap();
    assert_eq!(told.code, Some(0), "{told:?}");
    assert!(told.stderr.contains("rules of inet guard passing name the service"), "{told:?}");
    // It is as it says: the fast path passes them by.
    assert_eq!(who(&rig.lab.client, ends()[0]).unwrap(), "a");
    rig.ok(&["detach", NAME, "--force"]).unwrap();
    nft(&rig, "flush chain inet guard passing");
    for direction in ["iifname", "oifname"] {
        nft(&rig, &format!("add rule inet guard passing {direction} {UPLINK} drop"));
        let told = rig.run(&arguments).unwrap();
        assert_eq!(told.code, Some(0), "{told:?}");
        assert!(
            told.stderr.contains(&format!("rules of inet guard passing drop what comes or goes by {UPLINK}")),
            "{told:?}"
        );
        assert!(!told.stderr.contains("name the service"), "{told:?}");
        assert_eq!(who(&rig.lab.client, ends()[0]).unwrap(), "a");
        rig.ok(&["detach", NAME, "--force"]).unwrap();
        nft(&rig, "flush chain inet guard passing");
    }
    rig.ok(&arguments).unwrap();
    nft(&rig, "delete table inet guard");
    rig.finish().unwrap();
}

/// A service that clients reached by another link of the namespace before.
fn older_way(rig: &mut Rig) {
    rig.lab.lab.veth((&rig.lab.a, "old0"), (&rig.lab.host, "old0")).unwrap();
    rig.lab.host.ip_batch("addr add 10.99.0.1/24 dev old0\nroute add 10.99.0.0/25 dev old0\n").unwrap();
    rig.lab.a.ip_batch("addr add 10.99.0.10/24 dev old0\nroute add default via 10.99.0.1\n").unwrap();
    for link in ["old0", UPLINK] {
        rig.lab.host.sysctl(&format!("net/ipv4/conf/{link}/forwarding"), "1").unwrap();
    }
    rig.lab.client.ip("route add 10.99.0.0/24 via 10.77.0.1").unwrap();
}

#[test]
fn connections_older_than_the_attachment_are_not_cut_by_a_detach_that_was_not_forced() {
    for drops in [false, true] {
        let mut rig = Rig::new("older").unwrap();
        older_way(&mut rig);
        let _server = Server::start(&rig.lab.a, "a").unwrap();
        nft(&rig, "add table inet guard");
        nft(&rig, "add chain inet guard passing { type filter hook forward priority 0 ; policy accept ; }");
        nft(&rig, "add rule inet guard passing ct state new accept");
        if drops {
            nft(&rig, "add rule inet guard passing ct state invalid drop");
        }
        rig.furnished().unwrap();
        let end = std::net::SocketAddr::from(([10, 99, 0, 10], ends()[0].port()));
        let mut older = Asking::from(&rig.lab.client, end).unwrap();
        assert_eq!(older.who().unwrap(), "a");
        let names = [rig.lab.a.name(), rig.lab.b.name()];
        let start = ["attach", NAME, "--announce", "1", "--address", "10.99.0.10", "--uplink", UPLINK];
        rig.ok(&[&start[..], &names].concat()).unwrap();
        // More than a window that the firewall does not see.
        for _ in 0..50 {
            assert_eq!(older.get("/bytes?n=100000").unwrap().len(), 100_000);
        }
        let said = rig.refused(&["detach", NAME], 1).unwrap();
        assert!(said.contains("still has 1 flows"), "{said}");
        assert_eq!(said.contains("inet guard passing drops what connection tracking"), drops, "{said}");
        assert_eq!(older.who().unwrap(), "a");
        rig.ok(&["detach", NAME, "--force"]).unwrap();
        // It is as it says.
        assert_eq!(older.who().is_ok(), !drops, "dropped: {drops}");
        drop(older);
        let left: Vec<Leftover> = rig.left().unwrap();
        assert!(left.is_empty(), "{left:?}");
    }
}
