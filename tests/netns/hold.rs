//! New flows wait while something is moved that only one side can have.

use std::time::{Duration, Instant};

use patchswitch_load::client::Settings;
use patchswitch_load::record::Class;

use crate::load::answered;
use crate::rig::{Load, NAME, Rig, Server, load};

fn loaded(label: &str) -> anyhow::Result<(Rig, [Server; 2], Load)> {
    let rig = Rig::new(label)?;
    let servers = [Server::start(&rig.lab.a, "a")?, Server::start(&rig.lab.b, "b")?];
    rig.attach()?;
    let load = Load::start(&rig.lab.client, Settings { rate: 300.0, connections: 8, ..load() });
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark begun")?;
    Ok((rig, servers, load))
}

#[test]
fn what_waits_goes_to_the_new_side_and_nobody_fails() {
    let (rig, _servers, load) = loaded("hold").unwrap();
    let held = rig.ok(&["switch", NAME, "--hold", "30s", "--run", "sleep 0.6"]).unwrap();
    load.order("mark released").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    assert_eq!(held["serving"], rig.lab.b.name(), "{held}");
    assert!(held["waited"]["connections"].as_u64().unwrap() > 50, "{held}");
    assert_eq!(held["waited"]["lost"], 0, "{held}");
    assert!(held["waited"]["held_ms"].as_f64().unwrap() >= 600.0, "{held}");
    // Connections that were there stay, and are answered meanwhile; new ones are the new side's.
    assert_eq!(answered(&run, Class::Keepalive, "begun", "end").unwrap(), ["a"]);
    assert_eq!(answered(&run, Class::New, "released", "end").unwrap(), ["b"]);
    rig.finish().unwrap();
}

#[test]
fn a_command_that_fails_or_takes_too_long_gives_back() {
    let (rig, _servers, load) = loaded("holdback").unwrap();
    for (limit, command) in [("30s", "sleep 0.3; exit 3"), ("500ms", "exec sleep 20")] {
        let begun = Instant::now();
        let ended = rig.run(&["switch", NAME, "--hold", limit, "--run", command]).unwrap();
        assert_eq!(ended.code, Some(22), "{command}: {ended:?}");
        assert!(begun.elapsed() < Duration::from_secs(15), "{command}: {:?}", begun.elapsed());
    }
    load.order("mark back").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    assert_eq!(answered(&run, Class::New, "back", "end").unwrap(), ["a"]);
    rig.finish().unwrap();
}

#[test]
fn whoever_holds_may_be_killed() {
    let (rig, _servers, load) = loaded("holdkill").unwrap();
    let killed = crate::kill::kill_after(
        &rig,
        &["switch", NAME, "--hold", "2s", "--run", "exec sleep 3"],
        Duration::from_millis(700),
    );
    assert!(killed.unwrap());
    // The end of the hold is nobody's to decide any more.
    std::thread::sleep(Duration::from_millis(2500));
    load.order("mark over").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    assert_eq!(answered(&run, Class::New, "over", "end").unwrap(), ["b"]);
    let mended = rig.ok(&["switch", NAME, "--to", rig.lab.b.name()]).unwrap();
    assert_eq!(mended["mended"][0], "packets that waited go on", "{mended}");
    rig.finish().unwrap();
}
