//! The device of a VLAN as an uplink: the kernel takes the tag out before the programs see a packet, and older ones leave
//! its number beside it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use patchswitch_load::client::Settings;
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab::{CLIENT, CLIENT_LINK, HOST, Ns, SERVICE, SwitchLab, UPLINK};
use patchswitch_tests::programs;
use patchswitch_tests::traffic::{Load, PORT, Server};
use serde_json::Value;

/// Moves a namespace's addresses from its link to a VLAN on it.
fn tagged(ns: &Ns, link: &str, [v4, v6]: [&str; 2]) -> anyhow::Result<()> {
    ns.ip_batch(&format!(
        "addr flush dev {link} scope global\nlink add link {link} name {link}.7 type vlan id 7\n\
         link set {link}.7 up\naddr add {v4}/24 dev {link}.7\naddr add {v6}/64 dev {link}.7 nodad\n"
    ))
    .map(drop)
}

#[test]
fn a_vlan_is_an_uplink_like_another() {
    let lab = SwitchLab::new("vlan").unwrap();
    let patchswitch = programs::built("patchswitch").unwrap();
    tagged(&lab.client, CLIENT_LINK, CLIENT).unwrap();
    tagged(&lab.host, UPLINK, HOST).unwrap();
    let before = Snapshot::take().unwrap();
    let run = |line: &str| -> Value {
        let path = patchswitch.to_string_lossy();
        let argv: Vec<&str> = [path.as_ref()].into_iter().chain(line.split(' ')).chain(["--json"]).collect();
        serde_json::from_str(&lab.host.run(&argv).unwrap()).unwrap()
    };
    let _servers = [Server::start(&lab.a, "a").unwrap(), Server::start(&lab.b, "b").unwrap()];
    let [v4, v6] = SERVICE;
    let (a, b) = (lab.a.name(), lab.b.name());
    run(&format!("attach tagged --address {v4} --address {v6} --uplink {UPLINK}.7 --announce 1 {a} {b}"));
    for address in SERVICE {
        let settings = Settings {
            rate: 50.0,
            connections: 4,
            renew: Duration::from_secs(1),
            ..Settings::new(vec![address.parse::<IpAddr>().unwrap()], PORT)
        };
        let load = Load::start(&lab.client, settings);
        for to in [b, a] {
            std::thread::sleep(Duration::from_millis(500));
            run(&format!("switch tagged --to {to}"));
        }
        std::thread::sleep(Duration::from_millis(500));
        let seen = load.stop().unwrap();
        assert_eq!(seen.failures, [], "{address}");
        assert!(seen.stats(seen.whole()).requests > 20, "{address}");
    }
    // The host's routes would have served the clients as well, only slower, and new ones alone.
    let status = run("status tagged");
    let uplink = &status["attachments"][0]["counters"]["packets"]["uplink"];
    assert!(uplink["to_a"].as_u64() > Some(50) && uplink["to_b"].as_u64() > Some(50), "{status}");
    let asked = SERVICE.map(|address| {
        let to = SocketAddr::new(address.parse().unwrap(), PORT);
        lab.client.enter(|| Ok(std::net::TcpStream::connect(to)?)).is_ok()
    });
    assert_eq!(asked, [true; 2]);
    run("detach tagged --force");
    let mut left = Snapshot::left_since(&before, Duration::from_secs(5)).unwrap();
    left.retain(|one| one.is_of(lab.prefix()));
    assert!(left.is_empty(), "{left:?}");
}
