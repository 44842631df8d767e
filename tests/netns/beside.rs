//! Programs of somebody else on the same links: they go on seeing what they saw, ours go on working, and `status` lists
//! all of them.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use patchswitch_tests::netlab::{HOST, Ns, SERVICE, UPLINK};
use serde_json::Value;

use crate::ask::who;
use crate::foreign::{Counter, Place};
use crate::rig::{NAME, Rig, Server, ends};

/// So many datagrams are sent where they are counted; neighbours and routers add some packets of their own.
const PACKETS: u64 = 200;
const NOISE: u64 = 40;

/// Sends datagrams from the client.
fn send(rig: &Rig, to: &str) {
    let to = SocketAddr::new(to.parse().unwrap(), 9);
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let client = rig.lab.client.enter(|| {
        let socket = UdpSocket::bind(any)?;
        for _ in 0..PACKETS {
            socket.send_to(b"x", to)?;
        }
        Ok(())
    });
    client.unwrap();
}

/// How many packets a counter meets while datagrams of both families are sent.
fn met(rig: &Rig, counter: &Counter, to: [&str; 2]) -> u64 {
    let before = counter.count();
    for address in to {
        send(rig, address);
    }
    let end = Instant::now() + Duration::from_secs(2);
    while counter.count() - before < 2 * PACKETS && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    counter.count() - before
}

/// The service works, and moves there and back.
fn works(rig: &Rig) {
    for (serving, next) in [("a", &rig.lab.b), ("b", &rig.lab.a)] {
        for end in ends() {
            assert_eq!(who(&rig.lab.client, end).unwrap(), serving);
        }
        rig.switch_to(next).unwrap();
    }
}

fn servers(rig: &Rig) -> [Server; 2] {
    let start = |ns: &Ns, tag| Server::start(ns, tag).unwrap();
    [start(&rig.lab.a, "a"), start(&rig.lab.b, "b")]
}

/// What `status` says of the uplink's ingress: hook, name and owner of each.
fn listed(rig: &Rig) -> Vec<(String, String, Option<String>)> {
    let status = rig.ok(&["status", NAME]).unwrap();
    let lists = status["attachments"][0]["programs"].as_array().unwrap().clone();
    let list = lists.iter().find(|list| list["link"] == UPLINK && list["direction"] == "ingress").unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let one = |placed: &Value| {
        let owner = placed["attachment"].as_str().map(str::to_owned);
        (text(&placed["hook"]), text(&placed["program"]["name"]), owner)
    };
    list["programs"].as_array().unwrap().iter().map(one).collect()
}

fn entry(hook: &str, name: &str, owner: Option<&str>) -> (String, String, Option<String>) {
    (hook.to_owned(), name.to_owned(), owner.map(str::to_owned))
}

fn ours(hook: &str) -> (String, String, Option<String>) {
    entry(hook, "ps_uplink", Some(NAME))
}

#[test]
fn programs_of_others_on_the_same_hook_see_what_is_not_ours() {
    let rig = Rig::new("beside").unwrap();
    let _servers = servers(&rig);
    let host = &rig.lab.host;
    // One that was there before, and one that comes later and puts itself first.
    let old = Counter::on(host, UPLINK, Place::TcxLast, "was_there").unwrap();
    rig.attach().unwrap();
    let first = Counter::on(host, UPLINK, Place::TcxFirst, "comes_first").unwrap();
    let last = Counter::on(host, UPLINK, Place::TcxLast, "comes_last").unwrap();
    assert_eq!(
        listed(&rig),
        [
            entry("tcx", "comes_first", None),
            entry("tcx", "was_there", None),
            ours("tcx"),
            entry("tcx", "comes_last", None),
        ]
    );
    for counter in [&old, &first, &last] {
        assert!(met(&rig, counter, HOST) >= 2 * PACKETS, "what is not ours");
    }
    for counter in [&old, &first] {
        assert!(met(&rig, counter, SERVICE) >= 2 * PACKETS, "whoever is before us sees ours as well");
    }
    assert!(met(&rig, &last, SERVICE) <= NOISE, "ours do not come so far");
    works(&rig);
    let text = rig.run(&["status", NAME]).unwrap().stdout;
    assert!(text.contains("tcx comes_first ") && text.contains("(ours, web)"), "{text}");
    // They stay when ours go.
    rig.ok(&["detach", NAME, "--force"]).unwrap();
    for counter in [&old, &first, &last] {
        assert!(met(&rig, counter, HOST) >= 2 * PACKETS, "after the detach");
    }
    drop((old, first, last));
    rig.nothing_left().unwrap();
}

/// A pin that goes with the test.
struct Pin(PathBuf);

impl Drop for Pin {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// Hangs a counter onto `clsact`.
fn filter(rig: &Rig, name: &str, priority: &str) -> Counter {
    let counter = Counter::load(name, false).unwrap();
    let pin = Pin(PathBuf::from(format!("/sys/fs/bpf/{}-{name}", rig.lab.host.name())));
    counter.pin(&pin.0).unwrap();
    let add = ["tc", "filter", "add", "dev", UPLINK, "ingress", "pref", priority, "bpf", "direct-action"];
    let path = pin.0.to_string_lossy();
    rig.lab.host.run(&[add.as_slice(), &["object-pinned", path.as_ref()]].concat()).unwrap();
    counter
}

#[test]
fn filters_of_others_beside_ours_see_what_is_not_ours() {
    for kind in ["clsact", "tcx"] {
        let mut rig = Rig::new("beside-filter").unwrap();
        let _servers = servers(&rig);
        rig.lab.host.run(&["tc", "qdisc", "add", "dev", UPLINK, "clsact"]).unwrap();
        let (before, after) = (filter(&rig, "before", "7"), filter(&rig, "after", "60000"));
        rig.furnished().unwrap();
        let mut arguments = rig.attach_arguments();
        arguments.extend(["--hook".to_owned(), kind.to_owned()]);
        rig.ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        let (before_us, after_us) = (entry("clsact", "before", None), entry("clsact", "after", None));
        if kind == "clsact" {
            assert_eq!(listed(&rig), [before_us, ours("clsact"), after_us]);
            assert!(met(&rig, &before, SERVICE) >= 2 * PACKETS, "whoever is before us sees ours as well");
        } else {
            assert_eq!(listed(&rig), [ours("tcx"), before_us, after_us]);
        }
        for counter in [&before, &after] {
            assert!(met(&rig, counter, HOST) >= 2 * PACKETS, "what is not ours, {kind}");
        }
        assert!(met(&rig, &after, SERVICE) <= NOISE, "ours do not come so far, {kind}");
        works(&rig);
        rig.ok(&["detach", NAME, "--force"]).unwrap();
        rig.nothing_left().unwrap();
    }
}

#[test]
fn an_xdp_program_on_the_uplink_changes_nothing() {
    for (place, hook) in [(Place::XdpGeneric, "xdp-generic"), (Place::XdpNative, "xdp-native")] {
        let rig = Rig::new("beside-xdp").unwrap();
        let _servers = servers(&rig);
        let counter = Counter::on(&rig.lab.host, UPLINK, place, "passes").unwrap();
        rig.attach().unwrap();
        assert_eq!(listed(&rig), [entry(hook, "passes", None), ours("tcx")]);
        let before = counter.count();
        works(&rig);
        assert!(counter.count() > before, "it sees nothing");
        let mut waiting = crate::ask::Asking::from(&rig.lab.client, ends()[0]).unwrap();
        assert_eq!(waiting.who().unwrap(), "a");
        rig.switch_to(&rig.lab.b).unwrap();
        assert_eq!(waiting.who().unwrap(), "a", "a flow that exists stays");
        drop((waiting, counter));
        rig.finish().unwrap();
    }
}
