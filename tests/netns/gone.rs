//! Partitions whose namespace or link is taken away while they are attached: every verb says what is true, and the one
//! that is left serves.

use std::net::TcpStream;
use std::time::Duration;

use patchswitch_tests::leftovers::Leftover;
use patchswitch_tests::netlab::{Ns, UPLINK};
use patchswitch_tests::programs;
use serde_json::{Value, json};

use crate::ask::{Asking, who};
use crate::group;
use crate::rig::{NAME, Rig, Server, ends};

/// Removes the link that the product has made in a namespace.
fn remove_link(ns: &Ns) {
    let links: Value = serde_json::from_str(&ns.ip("-j link show").unwrap()).unwrap();
    let links = links.as_array().unwrap().iter().filter_map(|link| link["ifname"].as_str());
    let ours: Vec<&str> = links.filter(|name| name.starts_with("ps")).collect();
    assert_eq!(ours.len(), 1, "{ours:?}");
    ns.ip(&format!("link del {}", ours[0])).unwrap();
}

/// Takes a namespace away from everybody who holds it, and waits until the kernel has let it go.
fn remove_namespace(rig: &Rig, side: &str) {
    let ns = if side == "a" { &rig.lab.a } else { &rig.lab.b };
    programs::run(&["umount", &format!("/run/patchswitch/netns/{NAME}-{side}")]).unwrap();
    // The laboratory's own descriptor keeps it alive otherwise; its link goes with it.
    remove_link(ns);
}

/// What `status` says of the partitions: role, and what is gone.
fn partitions(rig: &Rig) -> Vec<(Value, Value)> {
    let status = rig.ok(&["status", NAME]).unwrap();
    let partitions = status["attachments"][0]["partitions"].as_array().unwrap().clone();
    partitions.iter().map(|one| (one["role"].clone(), one["gone"].clone())).collect()
}

fn only_gone(left: &[Leftover]) -> bool {
    left.iter().all(|one| one.after.is_none())
}

fn attached(label: &str) -> (Rig, [Server; 2]) {
    let rig = Rig::new(label).unwrap();
    let servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    (rig, servers)
}

#[test]
fn nobody_is_switched_to_a_partition_that_is_gone() {
    for (what, remove) in [
        ("link", &(|rig: &Rig| remove_link(&rig.lab.b)) as &dyn Fn(&Rig)),
        ("namespace", &|rig| remove_namespace(rig, "b")),
    ] {
        let (rig, _servers) = attached("gone-standby");
        remove(&rig);
        assert_eq!(partitions(&rig), [("active".into(), Value::Null), ("standby".into(), json!(what))]);
        let text = rig.run(&["status", NAME]).unwrap().stdout;
        assert!(text.contains("is gone"), "{text}");
        let said = rig.refused(&["switch", NAME], 1).unwrap();
        assert!(said.contains("is gone; nothing was switched"), "{what}: {said}");
        for end in ends() {
            assert_eq!(who(&rig.lab.client, end).unwrap(), "a", "{what}");
        }
        assert_eq!(rig.ok(&["flows", NAME]).unwrap()["partitions"].as_array().unwrap().len(), 2);
        assert_eq!(rig.ok(&["drain", NAME]).unwrap()["drain"]["settled"], true);
        rig.ok(&["detach", NAME, "--force"]).unwrap();
        let left = rig.left().unwrap();
        assert!(only_gone(&left), "{left:?}");
    }
}

#[test]
fn the_one_that_is_left_takes_over_from_one_that_is_gone() {
    for (what, remove) in [
        ("link", &(|rig: &Rig| remove_link(&rig.lab.a)) as &dyn Fn(&Rig)),
        ("namespace", &|rig| remove_namespace(rig, "a")),
    ] {
        let (rig, _servers) = attached("gone-active");
        remove(&rig);
        assert_eq!(partitions(&rig), [("active".into(), json!(what)), ("standby".into(), Value::Null)]);
        rig.switch_to(&rig.lab.b).unwrap();
        for end in ends() {
            assert_eq!(who(&rig.lab.client, end).unwrap(), "b", "{what}");
        }
        assert_eq!(partitions(&rig), [("retiring".into(), json!(what)), ("active".into(), Value::Null)]);
        rig.refused(&["switch", NAME, "--to", rig.lab.a.name()], 1).unwrap();
        assert_eq!(rig.ok(&["drain", NAME, "--deadline", "10"]).unwrap()["drain"]["settled"], true, "{what}");
        rig.ok(&["detach", NAME]).unwrap();
        let left = rig.left().unwrap();
        assert!(only_gone(&left), "{left:?}");
    }
}

#[test]
fn a_drain_does_not_wait_for_one_whose_namespace_is_gone() {
    let (rig, _servers) = attached("gone-retiring");
    let mut asking = Asking::from(&rig.lab.client, ends()[0]).unwrap();
    assert_eq!(asking.who().unwrap(), "a");
    rig.switch_to(&rig.lab.b).unwrap();
    remove_namespace(&rig, "a");
    let again = rig.ok(&["switch", NAME, "--to", rig.lab.b.name()]).unwrap();
    assert_eq!(again["changed"], false, "{again}");
    let report = rig.ok(&["drain", NAME, "--deadline", "10"]).unwrap();
    assert_eq!(report["drain"]["settled"], true, "{report}");
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "b");
    }
    drop(asking);
    rig.ok(&["detach", NAME, "--force"]).unwrap();
    let left = rig.left().unwrap();
    assert!(only_gone(&left), "{left:?}");
}

#[test]
fn an_uplink_that_is_gone_or_was_made_anew_is_told_of() {
    let (rig, _servers) = attached("gone-uplink");
    let lost = |rig: &Rig| {
        let told = rig.ok(&["status", NAME]).unwrap()["attachments"][0]["uplinks_lost"].clone();
        let text = rig.run(&["status", NAME]).unwrap().stdout;
        assert_eq!(text.contains("nothing that comes there is taken"), told != json!([]), "{text}");
        assert_eq!(text.contains(&format!("patchswitch detach {NAME}")), told != json!([]), "{text}");
        told
    };
    assert_eq!(lost(&rig), json!([]));
    rig.lab.host.ip(&format!("link del {UPLINK}")).unwrap();
    assert_eq!(lost(&rig), json!([UPLINK]));
    rig.lab.host.ip(&format!("link add {UPLINK} type veth peer name other0")).unwrap();
    assert_eq!(lost(&rig), json!([UPLINK]));
    rig.ok(&["detach", NAME, "--force"]).unwrap();
    rig.lab.host.ip(&format!("link del {UPLINK}")).unwrap();
    let left = rig.left().unwrap();
    assert!(only_gone(&left), "{left:?}");
}

/// Tries a new connection of each family, and returns how many packets were sent towards the second partition for it.
fn nobody_answers(rig: &Rig) -> u64 {
    let counted = || rig.counter(&["packets", "uplink", "to_b"]).unwrap();
    let before = counted();
    for end in ends() {
        let tried = rig.lab.client.enter(|| Ok(TcpStream::connect_timeout(&end, Duration::from_millis(300))));
        tried.unwrap().unwrap_err();
    }
    counted() - before
}

#[test]
fn flows_of_the_old_side_go_on_when_the_serving_one_is_lost_and_there_is_a_way_back() {
    for (what, remove) in [
        ("link", &(|rig: &Rig| remove_link(&rig.lab.b)) as &dyn Fn(&Rig)),
        ("namespace", &|rig| remove_namespace(rig, "b")),
    ] {
        let (rig, _servers) = attached("gone-serving");
        let mut old = ends().map(|end| Asking::from(&rig.lab.client, end).unwrap());
        assert!(old.iter_mut().all(|asking| asking.who().unwrap() == "a"));
        rig.switch_to(&rig.lab.b).unwrap();
        remove(&rig);
        assert!(old.iter_mut().all(|asking| asking.who().unwrap() == "a"), "{what}");
        assert!(nobody_answers(&rig) >= 2, "{what}: each is counted where it was sent to");
        // Both say what is the matter and what to do.
        let way = format!("patchswitch switch {NAME} --to {}", rig.lab.a.name());
        assert_eq!(partitions(&rig), [("retiring".into(), Value::Null), ("active".into(), json!(what))]);
        assert_eq!(rig.ok(&["status", NAME]).unwrap()["attachments"][0]["next"], json!(way));
        let text = rig.run(&["status", NAME]).unwrap().stdout;
        assert!(text.contains(&way), "{text}");
        let drain = rig.run(&["drain", NAME, "--deadline", "0.5"]).unwrap();
        assert_eq!(drain.code, Some(1), "the old flows are still there: {drain:?}");
        assert!(drain.stderr.contains("is gone") && drain.stderr.contains(&way), "{drain:?}");
        assert!(old.iter_mut().all(|asking| asking.who().unwrap() == "a"), "{what}");

        rig.switch_to(&rig.lab.a).unwrap();
        for end in ends() {
            assert_eq!(who(&rig.lab.client, end).unwrap(), "a", "{what}");
        }
        assert!(old.iter_mut().all(|asking| asking.who().unwrap() == "a"), "{what}");
        assert_eq!(rig.ok(&["drain", NAME, "--deadline", "10"]).unwrap()["drain"]["settled"], true, "{what}");
        assert_eq!(rig.ok(&["status", NAME]).unwrap()["attachments"][0]["next"], Value::Null);
        drop(old);
        rig.ok(&["detach", NAME, "--force"]).unwrap();
        let left = rig.left().unwrap();
        assert!(only_gone(&left), "{left:?}");
    }
}

#[test]
fn a_canary_says_what_is_served_when_a_side_is_lost() {
    for (what, remove) in [
        (
            "link",
            &(|rig: &Rig, side: &str| remove_link(if side == "a" { &rig.lab.a } else { &rig.lab.b }))
                as &dyn Fn(&Rig, &str),
        ),
        ("namespace", &remove_namespace),
    ] {
        for (lost, left) in [("a", "b"), ("b", "a")] {
            let (rig, _servers) = attached("gone-canary");
            rig.ok(&["switch", NAME, "--share", "50"]).unwrap();
            remove(&rig, lost);
            let of = |side: &str| if side == lost { json!(what) } else { Value::Null };
            assert_eq!(partitions(&rig), [("active".into(), of("a")), ("canary".into(), of("b"))]);
            let there = if left == "a" { rig.lab.a.name() } else { rig.lab.b.name() };
            let way = format!("patchswitch switch {NAME} --to {there}");
            assert_eq!(rig.ok(&["status", NAME]).unwrap()["attachments"][0]["next"], json!(way));
            let text = rig.run(&["status", NAME]).unwrap().stdout;
            let (only, not) = (
                text.contains("only the canary's share of new flows is served"),
                text.contains("the canary's share of new flows is not served"),
            );
            assert_eq!((only, not), (lost == "a", lost == "b"), "{text}");
            assert!(text.contains(&way) && text.contains(&format!("its {what} is gone")), "{text}");
            let canary = text.lines().find(|line| line.trim_start().starts_with("canary")).unwrap();
            assert!(canary.contains("50 of 100 new flows"), "{text}");
            assert_eq!(canary.contains("is gone"), lost == "b", "{text}");
            // What is told leads to where all new flows are served.
            rig.ok(&["switch", NAME, "--to", there]).unwrap();
            for end in ends() {
                assert_eq!(who(&rig.lab.client, end).unwrap(), left, "{what}");
            }
            rig.ok(&["detach", NAME, "--force"]).unwrap();
            let remains = rig.left().unwrap();
            assert!(only_gone(&remains), "{remains:?}");
        }
    }
}

#[test]
fn a_drain_tells_of_another_member_of_the_group_whose_serving_side_is_lost() {
    let (rig, _servers) = attached("gone-member");
    rig.ok(&group::words(&group::join(&rig.lab.a, &rig.lab.b))).unwrap();
    let mut old = Asking::from(&rig.lab.client, ends()[0]).unwrap();
    assert_eq!(old.who().unwrap(), "a");
    rig.switch_to(&rig.lab.b).unwrap();
    let drain = || rig.run(&["drain", NAME, "--deadline", "0.5"]).unwrap();
    let well = drain();
    assert_eq!(well.code, Some(1), "the old flow is still there: {well:?}");
    assert!(!well.stderr.contains("is gone"), "{well:?}");
    let status = rig.ok(&["status", group::OTHER]).unwrap()["attachments"][0].clone();
    let serving =
        status["partitions"].as_array().unwrap().iter().find(|one| one["role"] == "active").unwrap();
    rig.lab.host.ip(&format!("link del {}", serving["link"].as_str().unwrap())).unwrap();
    let told = drain();
    let way = format!("patchswitch switch {} --to {}", group::OTHER, rig.lab.a.name());
    assert_eq!(told.code, Some(1), "{told:?}");
    assert!(told.stderr.contains("new flows reach nobody") && told.stderr.contains(&way), "{told:?}");
    assert!(!told.stderr.contains(&format!("patchswitch switch {NAME} ")), "its own is there: {told:?}");
    assert_eq!(old.who().unwrap(), "a");
    drop(old);
    rig.ok(&["detach", group::OTHER, "--force"]).unwrap();
    rig.ok(&["detach", NAME, "--force"]).unwrap();
    let left = rig.left().unwrap();
    assert!(only_gone(&left), "{left:?}");
}
