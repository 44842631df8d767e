//! Several attachments of one group: one store moves the new flows of all of them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_load::client::Settings;
use patchswitch_load::record::Class;
use patchswitch_load::report::Run;
use patchswitch_tests::netlab::{Ns, UPLINK};
use serde_json::Value;

use crate::rig::{Load, NAME, PORT, Rig, Server, ends, load};
use crate::{ask, uplinks};

pub(crate) const OTHER: &str = "other";
pub(crate) const ADDRESSES: [&str; 2] = ["10.77.0.20", "fd77::20"];

/// Attaches the second service at an uplink, apart from the first.
fn at(uplink: &str, first: &Ns, second: &Ns) -> Vec<String> {
    let [v4, v6] = ADDRESSES;
    let words = ["attach", OTHER, "--address", v4, "--address", v6, "--uplink", uplink];
    let words = words.into_iter().chain(["--announce", "1", first.name(), second.name()]);
    words.map(str::to_owned).collect()
}

pub(crate) fn beside(first: &Ns, second: &Ns) -> Vec<String> {
    at(UPLINK, first, second)
}

/// Into the group of the first service.
fn with(words: Vec<String>) -> Vec<String> {
    [words, vec!["--with".to_owned(), NAME.to_owned()]].concat()
}

pub(crate) fn join(first: &Ns, second: &Ns) -> Vec<String> {
    with(beside(first, second))
}

fn status(rig: &Rig, name: &str) -> Value {
    rig.ok(&["status", name]).unwrap()["attachments"][0].clone()
}

pub(crate) fn words(list: &[String]) -> Vec<&str> {
    list.iter().map(String::as_str).collect()
}

/// Load on the second service.
fn load_on_other() -> Settings {
    let targets = ADDRESSES.map(|address| address.parse().unwrap());
    Settings { targets: targets.to_vec(), port: PORT, ..load() }
}

/// From whom the answers on new connections came that were due after a mark.
fn who(run: &Run, from: &str) -> Vec<String> {
    let from = (run.mark(from).unwrap() - run.started_ns) / 1000;
    let answers =
        run.answers.iter().filter(|series| series.class == Class::New).flat_map(|series| series.iter());
    let mut found: Vec<_> = answers
        .filter(|answer| answer.due_us() >= from)
        .map(|answer| run.instances[usize::from(answer.instance)].clone())
        .collect();
    found.sort();
    found.dedup();
    found
}

#[test]
fn all_of_a_group_switch_by_one_store_and_drain_together() {
    let rig = Rig::new("group").unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    rig.attach().unwrap();
    let joined = rig.ok(&words(&join(a, b))).unwrap();
    assert_eq!(joined["attachments"][0]["switches_with"], Value::from(vec![NAME]));
    let loads = [
        Load::start(&rig.lab.client, Settings { rate: 300.0, ..load() }),
        Load::start(&rig.lab.client, Settings { rate: 300.0, ..load_on_other() }),
    ];
    std::thread::sleep(Duration::from_millis(500));
    // Of either name.
    let done = rig.ok(&["switch", OTHER]).unwrap();
    for load in &loads {
        load.order("mark switched").unwrap();
    }
    assert_eq!(
        (&done["changed"], &done["members"]),
        (&true.into(), &Value::from(vec![OTHER, NAME])),
        "{done}"
    );
    let states = [status(&rig, NAME), status(&rig, OTHER)];
    for state in &states {
        assert_eq!(
            (&state["phase"], &state["generation"]),
            (&"draining".into(), &done["switch"]["generation"])
        );
        assert_eq!(state["group"], NAME);
    }
    std::thread::sleep(Duration::from_secs(1));
    // Kept connections of both services are waited for, whoever is asked.
    let waited = rig.run(&["drain", NAME, "--deadline", "0.3"]).unwrap();
    assert_eq!(waited.code, Some(1), "{waited:?}");
    let [first, second] = loads;
    assert_eq!(first.stop().unwrap().failures, []);
    let waited = rig.run(&["drain", NAME, "--deadline", "0.3"]).unwrap();
    assert_eq!(waited.code, Some(1), "the other service still has flows: {waited:?}");
    let run = second.stop().unwrap();
    assert_eq!((run.failures.len(), who(&run, "switched")), (0, vec!["b".to_owned()]));
    rig.ok(&["drain", OTHER, "--deadline", "5"]).unwrap();
    assert_eq!(
        (&status(&rig, NAME)["phase"], &status(&rig, OTHER)["phase"]),
        (&"steady".into(), &"steady".into())
    );
    rig.ok(&["detach", OTHER, "--force"]).unwrap();
    assert_eq!(status(&rig, NAME)["switches_with"], Value::from(Vec::<String>::new()));
    rig.finish().unwrap();
}

#[test]
fn who_joins_later_serves_where_the_group_serves_and_outlives_its_first() {
    let rig = Rig::new("later").unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    rig.attach().unwrap();
    rig.switch_to(b).unwrap();
    let said = rig.refused(&words(&join(b, a)), 1).unwrap();
    assert!(said.contains("patchswitch drain web"), "{said}");
    rig.ok(&["drain", NAME, "--deadline", "5"]).unwrap();
    rig.ok(&words(&join(b, a))).unwrap();
    let load = Load::start(&rig.lab.client, Settings { rate: 300.0, ..load_on_other() });
    load.order("mark joined").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    rig.ok(&["detach", NAME, "--force"]).unwrap();
    let said = rig.refused(&words(&rig.attach_arguments()), 1).unwrap();
    assert!(said.contains("--with other"), "{said}");
    rig.ok(&["switch", OTHER, "--to", a.name()]).unwrap();
    load.order("mark moved").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    assert_eq!((who(&run, "moved"), who(&run, "joined")), (vec!["a".into()], vec!["a".into(), "b".into()]));
    for (with, words) in [("nobody", "nothing is attached"), (OTHER, "")] {
        let mut arguments = rig.attach_arguments();
        arguments.extend(["--with".to_owned(), with.to_owned()]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        if words.is_empty() {
            rig.ok(&["drain", OTHER, "--deadline", "5"]).unwrap();
            rig.ok(&arguments).unwrap();
        } else {
            let said = rig.refused(&arguments, 1).unwrap();
            assert!(said.contains(words), "{said}");
        }
    }
    rig.ok(&["detach", OTHER, "--force"]).unwrap();
    rig.finish().unwrap();
}

/// So many times a group on two uplinks switches.
const FLIPS: usize = 20;
/// So many answers of the new side in a row, before the next one.
const ENOUGH: usize = 40;

/// Asks all ends in turn, one after the other, each on a new connection, until there are enough answers of one side in a
/// row; the answers in their order.
fn ask_in_turn(places: &[(&Ns, SocketAddr)], until: &str) -> anyhow::Result<Vec<String>> {
    let (mut answers, mut row, limit) = (Vec::new(), 0, Instant::now() + Duration::from_secs(30));
    for (ns, end) in places.iter().cycle() {
        let answer = ask::who(ns, *end)?;
        row = if answer == until { row + 1 } else { 0 };
        answers.push(answer);
        if row == ENOUGH {
            break;
        }
        anyhow::ensure!(Instant::now() < limit, "no end of the old side");
    }
    Ok(answers)
}

#[test]
fn a_group_on_several_uplinks_never_gives_mixed_answers() {
    let mut rig = Rig::new("mixed").unwrap();
    let other = uplinks::second(&mut rig).unwrap();
    let [v4, v6] = ADDRESSES;
    other.ip_batch(&format!("route add {v4}/32 dev eth0\nroute add {v6}/128 dev eth0\n")).unwrap();
    rig.furnished().unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    rig.attach().unwrap();
    rig.ok(&words(&with(at(uplinks::SECOND, a, b)))).unwrap();
    // The first service at the first uplink, the second at the second, and so on.
    let others = ADDRESSES.map(|address| SocketAddr::new(address.parse().unwrap(), PORT));
    let places: Vec<_> = ends()
        .into_iter()
        .zip(others)
        .flat_map(|(one, two)| [(&rig.lab.client, one), (&other, two)])
        .collect();
    let mut seen_old = 0;
    for (to, [old, new]) in [(Slot::B, ["a", "b"]), (Slot::A, ["b", "a"])].into_iter().cycle().take(FLIPS) {
        let answers = std::thread::scope(|scope| {
            // Two who ask, the one ahead of the other.
            let askers = [0, 1].map(|ahead| {
                let mut places = places.clone();
                places.rotate_left(ahead);
                scope.spawn(move || ask_in_turn(&places, new))
            });
            std::thread::sleep(Duration::from_millis(20));
            rig.with(async |attachment| Ok(attachment.switch(to).await?)).unwrap();
            askers.map(|asker| asker.join().unwrap().unwrap())
        });
        for answers in answers {
            let moved = answers.iter().position(|answer| answer == new).unwrap();
            let back = answers[moved..].iter().filter(|answer| *answer == old).count();
            assert_eq!(back, 0, "from {old} to {new}: {answers:?}");
            seen_old += moved;
        }
    }
    // Else nobody asked while it was switched.
    assert!(seen_old > FLIPS, "{seen_old}");
    // It was the programs of both uplinks, and one word.
    for name in [NAME, OTHER] {
        let state = status(&rig, name);
        assert_eq!(
            (&state["group"], &state["generation"]),
            (&NAME.into(), &status(&rig, NAME)["generation"])
        );
        assert!(state["counters"]["packets"]["uplink"]["to_b"].as_u64() > Some(0), "{state}");
    }
    rig.ok(&["detach", OTHER, "--force"]).unwrap();
    rig.finish().unwrap();
}
