//! More than one uplink.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use patchswitch_load::client::Settings;
use patchswitch_tests::netlab::{CLIENT_LINK, Ns, SERVICE, UPLINK};

use crate::ask::{Asking, who};
use crate::claims::Wire;
use crate::rig::{Load, NAME, PORT, Rig, Server, ends, load};

pub(crate) const SECOND: &str = "uplink1";

/// Attaches both namespaces at some uplinks.
fn attach(rig: &Rig, uplinks: &[&str], announce: &str) -> anyhow::Result<()> {
    let start = ["attach", NAME, "--address", SERVICE[0], "--address", SERVICE[1], "--announce", announce];
    let at = uplinks.iter().flat_map(|uplink| ["--uplink", uplink]);
    let words = start.into_iter().chain(at).chain([rig.lab.a.name(), rig.lab.b.name()]);
    rig.ok(&words.collect::<Vec<_>>()).map(drop)
}

/// Whether it is the programs at the uplinks that serve a client. The host's routes would do it as well, only slower.
fn by_the_uplink(rig: &Rig, ns: &Ns) -> bool {
    let counted = || rig.counter(&["packets", "uplink", "to_a"]).unwrap();
    ends().into_iter().all(|end| {
        let before = counted();
        assert_eq!(who(ns, end).unwrap(), "a", "{end} from {}", ns.name());
        counted() > before
    })
}

/// A client on a network of its own, at a second uplink, which looks for the service on its link.
pub(crate) fn second(rig: &mut Rig) -> anyhow::Result<Ns> {
    let other = rig.lab.lab.namespace("other")?;
    rig.lab.lab.veth((&other, "eth0"), (&rig.lab.host, SECOND))?;
    rig.lab
        .host
        .ip_batch(&format!("addr add 10.78.0.1/24 dev {SECOND}\naddr add fd78::1/64 dev {SECOND} nodad\n"))?;
    let [v4, v6] = SERVICE;
    other.ip_batch(&format!(
        "addr add 10.78.0.2/24 dev eth0\naddr add fd78::2/64 dev eth0 nodad\n\
         route add {v4}/32 dev eth0\nroute add {v6}/128 dev eth0\n"
    ))?;
    rig.furnished()?;
    Ok(other)
}

/// Clients of every namespace see a switch there and back under load as those of one do: not at all.
fn nobody_sees_the_switch(rig: &Rig, spaces: &[&Ns]) {
    const LENGTH: usize = 2 << 20;
    let mut old: Vec<Asking> =
        spaces.iter().flat_map(|ns| ends().map(|end| Asking::from(ns, end).unwrap())).collect();
    let loads: Vec<Load> =
        spaces.iter().map(|ns| Load::start(ns, Settings { rate: 200.0, ..load() })).collect();
    for (to, serving) in [(&rig.lab.a, "a"), (&rig.lab.b, "b"), (&rig.lab.a, "a"), (&rig.lab.b, "b")] {
        rig.ok(&["switch", NAME, "--to", to.name()]).unwrap();
        for ns in spaces {
            for end in ends() {
                let mut asking = Asking::from(ns, end).unwrap();
                assert_eq!(asking.who().unwrap(), serving, "{end} from {}", ns.name());
                // Many segments, which the kernel sends as few packets.
                assert_eq!(asking.get(&format!("/bytes?n={LENGTH}")).unwrap().len(), LENGTH, "{end}");
            }
        }
        assert!(old.iter_mut().all(|asking| asking.who().unwrap() == "a"), "old flows stay");
    }
    for load in loads {
        let run = load.stop().unwrap();
        assert_eq!(run.failures, []);
        assert!(run.stats(run.whole()).requests > 20);
    }
}

#[test]
fn clients_of_a_second_uplink_are_served_and_switched_as_those_of_the_first() {
    let mut rig = Rig::new("uplinks").unwrap();
    let other = second(&mut rig).unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    attach(&rig, &[UPLINK, SECOND], "1").unwrap();
    for ns in [&rig.lab.client, &other] {
        assert!(by_the_uplink(&rig, ns), "{}", ns.name());
    }
    nobody_sees_the_switch(&rig, &[&rig.lab.client, &other]);
    rig.finish().unwrap();
}

/// How many announcements of each address came: so many, or what there was after a while; and whatever comes on top.
pub(crate) fn heard(wire: &mut Wire, expected: usize) -> [usize; 2] {
    let end = Instant::now() + Duration::from_secs(5);
    let mut count = [0; 2];
    let mut is_last = false;
    while !is_last {
        is_last = count.iter().all(|one| *one >= expected) || Instant::now() >= end;
        let more = wire.announcements(Duration::from_millis(200));
        count = [count[0] + more[0], count[1] + more[1]];
    }
    count
}

#[test]
fn each_uplink_hears_five_announcements_at_once_and_five_later_and_none_of_a_switch() {
    let mut rig = Rig::new("volleys").unwrap();
    let other = second(&mut rig).unwrap();
    let (client, host) = (&rig.lab.client, &rig.lab.host);
    let mut wires = [
        Wire::between((client, CLIENT_LINK), (host, UPLINK)).unwrap(),
        Wire::between((&other, "eth0"), (host, SECOND)).unwrap(),
    ];
    for (times, expected) in [("1", 5), ("2", 10)] {
        attach(&rig, &[UPLINK, SECOND], times).unwrap();
        for wire in &mut wires {
            assert_eq!(heard(wire, expected), [expected; 2], "told {times} times");
        }
        // A switch moves no address: there is nothing to tell.
        rig.switch_to(&rig.lab.b).unwrap();
        for wire in &mut wires {
            assert_eq!(heard(wire, 0), [0; 2]);
        }
        rig.ok(&["detach", NAME]).unwrap();
    }
    rig.nothing_left().unwrap();
}

/// Addresses of the service beside its first two, in the networks of the first uplink.
const MORE: [&str; 6] = ["10.77.0.20", "10.77.0.21", "10.77.0.22", "fd77::20", "fd77::21", "fd77::22"];

/// An answer: when it was asked for, when it was there, and whose it was.
type Answer = (Instant, Instant, String);

/// Asks all addresses in turn, each time on a connection of its own, until it is told to end.
fn ask_all(ns: &Ns, addresses: &[SocketAddr], ending: &AtomicBool) -> anyhow::Result<Vec<Answer>> {
    let mut answers = Vec::new();
    for address in addresses.iter().cycle() {
        if ending.load(Ordering::Relaxed) {
            break;
        }
        let begun = Instant::now();
        let side = who(ns, *address)?;
        answers.push((begun, Instant::now(), side));
    }
    Ok(answers)
}

/// Two uplinks, four addresses of each family: one store is the switch of them all. Once somebody has been answered by the new
/// side, nobody who asks after that is answered by the old one, wherever he is and whatever address he asks.
#[test]
fn all_addresses_at_all_uplinks_switch_in_one_instant() {
    let mut rig = Rig::new("instant").unwrap();
    let other = second(&mut rig).unwrap();
    for address in MORE {
        let width = if address.contains(':') { 128 } else { 32 };
        other.ip(&format!("route add {address}/{width} dev eth0")).unwrap();
    }
    rig.furnished().unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    let addresses: Vec<&str> = SERVICE.into_iter().chain(MORE).collect();
    let words = ["attach", NAME, "--announce", "1", "--uplink", UPLINK, "--uplink", SECOND];
    let held = addresses.iter().flat_map(|address| ["--address", address]);
    let words: Vec<&str> =
        words.into_iter().chain(held).chain([rig.lab.a.name(), rig.lab.b.name()]).collect();
    rig.ok(&words).unwrap();
    let ends: Vec<SocketAddr> =
        addresses.iter().map(|address| SocketAddr::new(address.parse().unwrap(), PORT)).collect();
    for (to, side) in [(&rig.lab.b, "b"), (&rig.lab.a, "a"), (&rig.lab.b, "b")] {
        let ending = AtomicBool::new(false);
        let answers = std::thread::scope(|scope| {
            let spaces = [&rig.lab.client, &other, &rig.lab.client, &other];
            let asking = spaces.map(|ns| scope.spawn(|| ask_all(ns, &ends, &ending)));
            std::thread::sleep(Duration::from_millis(500));
            rig.switch_to(to).unwrap();
            std::thread::sleep(Duration::from_millis(500));
            ending.store(true, Ordering::Relaxed);
            asking.map(|thread| thread.join().unwrap().unwrap())
        });
        let first = answers.iter().flatten().filter(|(_, _, who)| who == side).map(|(_, at, _)| *at).min();
        let first = first.expect("the new side answers");
        for answers in &answers {
            assert!(answers.iter().any(|(_, _, who)| who != side), "the old side answered before");
            let after = answers.iter().filter(|(begun, _, _)| *begun > first);
            assert!(after.clone().count() > ends.len(), "{} answers in all", answers.len());
            assert!(after.into_iter().all(|(_, _, who)| who == side), "mixed answers");
        }
        rig.ok(&["drain", NAME, "--deadline", "30"]).unwrap();
    }
    rig.finish().unwrap();
}
