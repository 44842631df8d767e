//! Clients that are not behind the uplink: the host itself, and a namespace that the host routes for. The kernel's
//! route for the service names one partition, but the flow's owner decides.

use patchswitch_tests::netlab::{Ns, UPLINK};

use crate::ask::{Asking, who};
use crate::rig::{Rig, Server, ends};

/// A third namespace behind the host.
fn third(rig: &mut Rig) -> anyhow::Result<Ns> {
    let third = rig.lab.lab.namespace("third")?;
    rig.lab.lab.veth((&third, "eth0"), (&rig.lab.host, "third0"))?;
    rig.lab.host.ip_batch("addr add 10.88.0.1/24 dev third0\naddr add fd88::1/64 dev third0 nodad\n")?;
    third.ip_batch(
        "addr add 10.88.0.2/24 dev eth0\naddr add fd88::2/64 dev eth0 nodad\n\
         route add default via 10.88.0.1\nroute add default via fd88::1\n",
    )?;
    rig.lab.host.sysctl("net/ipv4/conf/third0/forwarding", "1")?;
    Ok(third)
}

fn everybody_is_served_by_the_owner(label: &str, rp_filter: &str) {
    let mut rig = Rig::new(label).unwrap();
    let third = third(&mut rig).unwrap();
    for link in ["all", UPLINK, "third0"] {
        rig.lab.host.sysctl(&format!("net/ipv4/conf/{link}/rp_filter"), rp_filter).unwrap();
    }
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    rig.furnished().unwrap();
    rig.attach().unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let clients = [("host", &rig.lab.host), ("third", &third), ("outside", &rig.lab.client)];
    let mut kept = Vec::new();
    let (mut serving, mut other) = ("a", "b");
    for (round, to) in [b, a, b].into_iter().enumerate() {
        for (place, ns) in clients {
            for end in ends() {
                let mut asking = Asking::from(ns, end).unwrap();
                assert_eq!(asking.who().unwrap(), serving, "{place} {end} before switch {round}");
                kept.push((place, end, serving, asking));
            }
        }
        rig.switch_to(to).unwrap();
        (serving, other) = (other, serving);
        for (place, end, owner, asking) in &mut kept {
            // Two switches later the owner's turn may be over: a flow lives as long as its partition retires or serves.
            assert_eq!(asking.who().unwrap(), *owner, "{place} {end} after switch {round}");
        }
        for (place, ns) in clients {
            for end in ends() {
                assert_eq!(who(ns, end).unwrap(), serving, "{place} {end} new after switch {round}");
            }
        }
    }
    rig.finish().unwrap();
}

#[test]
fn local_clients_without_a_check_of_the_way_back() {
    everybody_is_served_by_the_owner("local0", "0");
}

#[test]
fn local_clients_with_the_strict_check_of_the_way_back() {
    everybody_is_served_by_the_owner("local1", "1");
}

#[test]
fn local_clients_with_the_loose_check_of_the_way_back() {
    everybody_is_served_by_the_owner("local2", "2");
}
