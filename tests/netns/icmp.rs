//! Ping, and errors of routers on the way: they follow the flow they belong to.

use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_tests::netlab::{CLIENT, CLIENT_LINK, Ns, SERVICE, UPLINK};
use patchswitch_tests::observe::Counters;

use crate::ask::Asking;
use crate::rig::{Rig, Server, ends};

const IDLE: Duration = Duration::from_secs(3);

/// Echo requests that a partition answered, of both families.
pub(crate) fn echoes(ns: &Ns) -> i64 {
    let counters = Counters::of(ns).unwrap();
    counters.get("Icmp.InEchos").unwrap() + counters.get("Icmp6.InEchos").unwrap()
}

#[test]
fn a_ping_under_way_stays_and_a_new_one_moves() {
    let rig = Rig::new("ping").unwrap();
    rig.attach_owned(IDLE).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let pings = SERVICE.map(|address| {
        let argv = ["ping", "-n", "-q", "-i", "0.02", "-c", "100", address];
        rig.lab.client.spawn(&argv, Some(&directory.path().join(address.replace(':', "_")))).unwrap()
    });
    rig.with(async |attachment| Ok(attachment.learn()?)).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    rig.with(async |attachment| Ok(attachment.switch(Slot::B).await?)).unwrap();
    let at_switch = (echoes(&rig.lab.a), echoes(&rig.lab.b));
    for (ping, address) in pings.into_iter().zip(SERVICE) {
        assert!(ping.wait(Duration::from_secs(30)).unwrap().success());
        let text = std::fs::read_to_string(directory.path().join(address.replace(':', "_"))).unwrap();
        assert!(text.contains("100 packets transmitted, 100 received, 0% packet loss"), "{text}");
    }
    let after = (echoes(&rig.lab.a), echoes(&rig.lab.b));
    assert!(after.0 > at_switch.0 + 20, "{at_switch:?} {after:?}");
    assert_eq!(after.1, at_switch.1, "the new partition got none of them");
    for address in SERVICE {
        rig.lab.client.run(&["ping", "-n", "-q", "-c", "1", "-W", "2", address]).unwrap();
    }
    assert_eq!((echoes(&rig.lab.a), echoes(&rig.lab.b)), (after.0, after.1 + 2));
    rig.finish_owned().unwrap();
}

/// Answers to echo requests that a partition got, of each family.
fn answers(ns: &Ns) -> [i64; 2] {
    let counters = Counters::of(ns).unwrap();
    ["Icmp.InEchoReps", "Icmp6.InEchoReplies"].map(|name| counters.get(name).unwrap())
}

#[test]
fn a_ping_of_a_partition_goes_on_while_it_retires() {
    let rig = Rig::new("ownping").unwrap();
    rig.attach_owned(IDLE).unwrap();
    rig.with(async |attachment| Ok(attachment.learn()?)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let output = |family: usize| directory.path().join(family.to_string());
    let pings = [0, 1].map(|family| {
        let argv = ["ping", "-n", "-q", "-i", "0.02", "-c", "300", "-I", SERVICE[family], CLIENT[family]];
        rig.lab.a.spawn(&argv, Some(&output(family))).unwrap()
    });
    let end = Instant::now() + Duration::from_secs(5);
    while answers(&rig.lab.a).contains(&0) {
        assert!(Instant::now() < end, "nobody answers");
        std::thread::sleep(Duration::from_millis(5));
    }
    rig.with(async |attachment| Ok(attachment.switch(Slot::B).await?)).unwrap();
    let at_switch = answers(&rig.lab.a);
    for (family, ping) in pings.into_iter().enumerate() {
        assert!(ping.wait(Duration::from_secs(30)).unwrap().success());
        let text = std::fs::read_to_string(output(family)).unwrap();
        assert!(text.contains("300 packets transmitted, 300 received, 0% packet loss"), "{text}");
    }
    let after = answers(&rig.lab.a);
    assert!((0..2).all(|family| after[family] > at_switch[family]), "all was over before the switch");
    assert_eq!((after, answers(&rig.lab.b)), ([300; 2], [0; 2]));
    rig.finish_owned().unwrap();
}

/// A client behind a router whose link to it is narrower than both ends know.
pub(crate) fn far(rig: &mut Rig) -> anyhow::Result<Ns> {
    let far = rig.lab.lab.namespace("far")?;
    rig.lab.lab.veth((&far, "eth0"), (&rig.lab.client, "far0"))?;
    far.ip_batch(
        "addr add 10.99.0.2/24 dev eth0\naddr add fd99::2/64 dev eth0 nodad\n\
         route add default via 10.99.0.1\nroute add default via fd99::1\n",
    )?;
    let router = &rig.lab.client;
    router.ip_batch(
        "addr add 10.99.0.1/24 dev far0\naddr add fd99::1/64 dev far0 nodad\nlink set far0 mtu 1280\n",
    )?;
    for link in [CLIENT_LINK, "far0"] {
        router.sysctl(&format!("net/ipv4/conf/{link}/forwarding"), "1")?;
    }
    router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    rig.lab.host.ip_batch(&format!(
        "route add 10.99.0.0/24 via {} dev {UPLINK}\nroute add fd99::/64 via {} dev {UPLINK}\n",
        CLIENT[0], CLIENT[1]
    ))?;
    Ok(far)
}

#[test]
fn a_router_with_a_narrow_link_is_heard_by_the_flows_owner() {
    const LENGTH: usize = 4 << 20;
    let mut rig = Rig::new("narrow").unwrap();
    let far = far(&mut rig).unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.furnished().unwrap();
    rig.attach().unwrap();
    let mut before: Vec<Asking> = ends().map(|end| Asking::from(&far, end).unwrap()).into();
    for asking in &mut before {
        assert_eq!(asking.who().unwrap(), "a");
    }
    rig.switch_to(&rig.lab.b).unwrap();
    let heard = |ns: &Ns| {
        let counters = Counters::of(ns).unwrap();
        counters.get("Icmp.InDestUnreachs").unwrap() + counters.get("Icmp6.InPktTooBigs").unwrap()
    };
    for asking in &mut before {
        assert_eq!(asking.get(&format!("/bytes?n={LENGTH}")).unwrap().len(), LENGTH);
    }
    assert!(heard(&rig.lab.a) >= 2, "no router said that a packet was too big: the test proves nothing");
    assert_eq!(heard(&rig.lab.b), 0);
    // The new partition hears of its own flows.
    for end in ends() {
        let mut asking = Asking::from(&far, end).unwrap();
        assert_eq!(asking.get(&format!("/bytes?n={LENGTH}")).unwrap().len(), LENGTH);
    }
    assert!(heard(&rig.lab.b) >= 2);
    rig.finish().unwrap();
}
