//! A canary: some of the new flows first, then more, and back by itself if the new side does worse.

use std::time::Duration;

use patchswitch_load::client::Settings;
use patchswitch_load::record::Class;
use patchswitch_load::report::Run;
use patchswitch_tests::programs;
use rustix::process::Signal;
use serde_json::Value;

use crate::rig::{ECHO, Load, NAME, Rig, Server, echo_in, load};

/// How many requests of a class each side answered that were due between two marks.
fn answered(run: &Run, class: Class, from: &str, to: &str) -> (usize, usize) {
    let at = |name: &str| (run.mark(name).unwrap() - run.started_ns) / 1000;
    let (from, to) = (at(from), at(to));
    let answers = run.answers.iter().filter(|series| series.class == class).flat_map(|series| series.iter());
    let due = answers.filter(|answer| answer.due_us() >= from && answer.done_us < to);
    let by: Vec<&str> = due.map(|answer| run.instances[usize::from(answer.instance)].as_str()).collect();
    let count = |name: &str| by.iter().filter(|by| **by == name).count();
    (count("a"), count("b"))
}

fn phase(rig: &Rig) -> (Value, Value) {
    let status = rig.ok(&["status", NAME]).unwrap();
    let one = &status["attachments"][0];
    (one["phase"].clone(), one["share"].clone())
}

#[test]
fn a_share_of_the_new_flows_goes_to_the_new_side_and_nobody_sees_it() {
    let rig = Rig::new("canary").unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    echo_in(a, "a").unwrap();
    echo_in(b, "b").unwrap();
    rig.attach_owned(Duration::from_secs(125)).unwrap();
    // Datagram sockets are never renewed: all their flows are a's before the canary.
    let settings = Settings { rate: 600.0, udp_port: Some(ECHO), udp_rate: 100.0, ..load() };
    let load = Load::start(&rig.lab.client, settings);
    std::thread::sleep(Duration::from_millis(500));
    for (share, mark) in [("20", "twenty"), ("60", "sixty")] {
        let mut words = vec!["switch", NAME, "--share", share];
        if share == "20" {
            words.extend(["--learn", "1"]);
        }
        let said = rig.ok(&words).unwrap();
        assert_eq!(said["share"].to_string(), share);
        assert_eq!(phase(&rig), ("sharing".into(), share.parse::<u64>().unwrap().into()));
        load.order(&format!("mark {mark}")).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        load.order(&format!("mark end-{mark}")).unwrap();
    }
    let said = rig.run(&["drain", NAME]).unwrap();
    assert!(said.code == Some(1) && said.stderr.contains("patchswitch switch"), "{said:?}");
    let canary = ["switch", NAME, "--share", "80,100", "--every", "1s"];
    let said = rig.ok(&canary).unwrap();
    assert_eq!(
        (&said["canary"]["share"], &said["canary"]["given_back"]),
        (&100.into(), &Value::Null),
        "{said}"
    );
    assert_eq!(phase(&rig).0, "draining");
    load.order("mark all").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    for (mark, share) in [("twenty", 0.2), ("sixty", 0.6)] {
        let (old, new) = answered(&run, Class::New, mark, &format!("end-{mark}"));
        let part = f64::from(u32::try_from(new).unwrap()) / f64::from(u32::try_from(old + new).unwrap());
        // Five standard deviations of 600 throws.
        assert!((part - share).abs() < 0.1, "{mark}: {new} of {}", old + new);
    }
    assert_eq!(answered(&run, Class::New, "all", "end").0, 0);
    // Kept connections stay where they began, and so do the datagrams of one socket.
    assert_eq!(answered(&run, Class::Keepalive, "twenty", "end").1, 0);
    let (old, new) = answered(&run, Class::Udp, "twenty", "end");
    assert!(old > 300 && new == 0, "{old} {new}");
    let conduct = &said["canary"]["new"];
    assert!(conduct["asked"].as_u64() > Some(100) && conduct["asked"] == conduct["answered"], "{said}");
    rig.finish_owned().unwrap();
}

#[test]
fn a_new_side_that_does_worse_is_given_back() {
    let rig = Rig::new("worse").unwrap();
    // Nobody listens in the new one.
    let _server = Server::start(&rig.lab.a, "a").unwrap();
    rig.attach().unwrap();
    let load = Load::start(&rig.lab.client, Settings { rate: 400.0, ..load() });
    std::thread::sleep(Duration::from_millis(500));
    let ended = rig.run(&["switch", NAME, "--share", "10,50,100", "--every", "20s"]).unwrap();
    load.order("mark back").unwrap();
    assert_eq!(ended.code, Some(22), "{ended:?}");
    assert!(ended.stdout.contains("given back at 10 of 100") && ended.stdout.contains("reset"), "{ended:?}");
    assert_eq!(phase(&rig).0, "draining");
    std::thread::sleep(Duration::from_secs(1));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    let back = run.mark("back").unwrap();
    let late: Vec<_> = run.failures.iter().filter(|failure| failure.due_ns >= back).collect();
    assert!(late.is_empty(), "{late:?}");
    // A tenth of 200 new connections a second, until it is looked at twice.
    assert!((5..100).contains(&run.failures.len()), "{}", run.failures.len());
    let (old, new) = answered(&run, Class::New, "back", "end");
    assert!(old > 100 && new == 0, "{old} {new}");
    rig.ok(&["drain", NAME, "--deadline", "5"]).unwrap();
    assert_eq!(phase(&rig).0, "steady");
    rig.finish().unwrap();
}

#[test]
fn who_is_killed_leaves_a_canary_that_goes_on_and_can_be_called_off() {
    let rig = Rig::new("off").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let load = Load::start(&rig.lab.client, Settings { rate: 400.0, ..load() });
    let program = programs::built("patchswitch").unwrap();
    let argv = [program.to_str().unwrap(), "switch", NAME, "--share", "50,100", "--every", "60s"];
    for (signal, code) in [(Signal::KILL, None), (Signal::INT, Some(130))] {
        let running = rig.lab.host.spawn(&argv, None).unwrap();
        for _ in 0..100 {
            if phase(&rig).0 == "sharing" {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_millis(300));
        running.signal(signal).unwrap();
        assert_eq!(running.wait(Duration::from_secs(20)).unwrap().code(), code);
        let expected = if code.is_none() { "sharing" } else { "draining" };
        assert_eq!(phase(&rig).0, expected, "{signal:?}");
    }
    // The side that served is the active one again.
    let said = rig.run(&["switch", NAME, "--to", rig.lab.a.name()]).unwrap();
    assert!(said.code == Some(0) && said.stdout.contains("serves already"), "{said:?}");
    assert_eq!(load.stop().unwrap().failures, []);
    rig.finish().unwrap();
}

#[test]
fn a_share_that_makes_no_sense_is_refused() {
    let rig = Rig::new("shares").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    for (arguments, code, words) in [
        (&["--share", "0"][..], 2, "0"),
        (&["--share", "101"], 2, "101"),
        (&["--share", "10", "--every", "5"], 2, "unit"),
        (&["--every", "5s"], 2, "--share"),
        (&["--share", "10,5", "--every", "1s"], 1, "larger"),
        (&["--share", "10,100"], 1, "--every"),
        (&["--share", "10", "--to", rig.lab.a.name()], 1, "serves already"),
    ] {
        let said = rig.refused(&[&["switch", NAME][..], arguments].concat(), code).unwrap();
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    assert_eq!(phase(&rig), ("steady".into(), 0.into()));
    rig.switch_to(&rig.lab.b).unwrap();
    let said = rig.refused(&["switch", NAME, "--share", "10"], 1).unwrap();
    assert!(said.contains("patchswitch drain"), "{said}");
    rig.finish().unwrap();
}
