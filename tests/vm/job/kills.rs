//! `kill -9` of the command in every phase: who served goes on serving, the client sees nothing of it, and `up` puts
//! things right, says what it did, and has nothing to do the second time.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use patchswitch_tests::leftovers::Snapshot;
use rustix::process::Signal;

use super::client::Client;
use super::stage::{SERVICE, Settings, Stage, wait_until};

/// How long each phase of the last job took.
fn durations(stage: &Stage) -> BTreeMap<String, f64> {
    let report = stage.json(&["report"]);
    let phases = report["report"]["phases"].as_array().unwrap();
    let pair =
        |phase: &serde_json::Value| (phase[0].as_str().unwrap().to_owned(), phase[1].as_f64().unwrap());
    phases.iter().map(pair).collect()
}

/// Kills a command so long after a phase has begun.
#[track_caller]
fn kill(stage: &Stage, arguments: &[&str], phase: &str, after: Duration) {
    let running = stage.start_until(arguments, phase);
    std::thread::sleep(after);
    running.signal(Signal::KILL).unwrap();
    let said = running.output();
    assert_eq!(running.wait(Duration::from_secs(10)).unwrap().code(), None, "not killed, but ended: {said}");
}

/// `up` says what became of the job, leaves whoever serves, and has nothing to do the second time.
#[track_caller]
fn recover(stage: &Stage) -> String {
    let serving = stage.who();
    let said = stage.ok(&["up"]);
    assert!(said.contains("interrupted"), "{said}");
    assert_eq!(stage.who(), serving, "{said}");
    let again = stage.ok(&["up"]);
    assert!(again.contains("nothing to do"), "{again}");
    said
}

/// A phase, and what part of its usual time passes before the kill.
const MOMENTS: [(&str, f64); 17] = [
    ("clone", 0.5),
    ("scan", 0.0),
    ("inject", 0.5),
    ("boot", 0.2),
    ("boot", 0.5),
    ("boot", 0.8),
    ("patch", 0.5),
    ("restart", 0.3),
    ("restart", 0.7),
    ("verify", 0.5),
    ("arm", 0.0),
    ("take_over", 0.3),
    ("take_over", 0.9),
    ("observe", 0.5),
    ("drain", 0.0),
    ("retire", 0.3),
    ("retire", 0.7),
];

#[test]
fn a_job_that_is_killed_in_any_phase_is_put_right() {
    let stage = Stage::new(&Settings { observe: "500ms", ..Settings::default() });
    stage.patch("says-v2", "sleep 0.4; echo v2 > /etc/says");
    let before = Snapshot::take().unwrap();
    stage.ok(&["apply", SERVICE]);
    let usual = durations(&stage);
    stage.ok(&["rollback", SERVICE]);
    let mut switched = Vec::new();
    for (phase, part) in MOMENTS {
        println!("killed in {phase} at {part}");
        let client = Client::start(&stage.client);
        kill(&stage, &["apply", SERVICE], phase, Duration::from_secs_f64(usual[phase] * part));
        let said = recover(&stage);
        if stage.who() == "v2" {
            assert!(said.contains("web-b serves; web-a"), "{said}");
            assert_eq!(stage.active(), "web-b");
            switched.push(phase);
            stage.ok(&["rollback", SERVICE]);
        } else {
            assert!(said.contains("web-a serves, it was not touched"), "{said}");
        }
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
        client.all_answered();
        stage.nothing_of_a_job_left(&before);
        stage.ok(&["plan", SERVICE]); // the patch is not applied
    }
    switched.dedup();
    assert!(switched.ends_with(&["observe", "drain", "retire"]), "{switched:?}");
    stage.finish();
}

/// The worst moment: the disk of the partition that serves stands still.
#[test]
fn a_job_that_is_killed_while_the_disk_is_suspended_is_put_right() {
    let stage = Stage::new(&Settings::default());
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    let client = Client::start(&stage.client);
    let state = |name: &str| format!("{}/dm/{name}", disk("ps-web-a-root"));
    let running = stage.start(&["apply", SERVICE]);
    let suspended = state("suspended");
    wait_until("suspended", Duration::from_secs(30), || {
        fs::read_to_string(&suspended).unwrap().trim() == "1"
    });
    running.signal(Signal::KILL).unwrap();
    running.wait(Duration::from_secs(10)).unwrap();
    wait_until("resumed", Duration::from_secs(3), || fs::read_to_string(&suspended).unwrap().trim() == "0");
    recover(&stage);
    client.all_answered();
    stage.nothing_of_a_job_left(&before);
    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!(stage.who(), "v2");
    stage.finish();
}

/// Where sysfs has a device of device-mapper.
fn disk(name: &str) -> String {
    let devices = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    let is_it = |path: &std::path::PathBuf| {
        fs::read_to_string(path.join("dm/name")).is_ok_and(|found| found.trim() == name)
    };
    let mut found = devices.filter(is_it);
    found.next().unwrap().display().to_string()
}

/// From the beginning of the merge there is only one way: `up` goes it to its end.
#[test]
fn a_commit_that_is_killed_is_finished() {
    let stage = Stage::new(&Settings { observe: "500ms", ..Settings::default() });
    let client = Client::start(&stage.client);
    // Enough to merge that there is time for a kill.
    stage.patch(
        "says-v2",
        "dd if=/dev/urandom of=/srv/ballast bs=1M count=8 2>/dev/null; echo v2 > /etc/says",
    );
    kill(&stage, &["apply", SERVICE, "--commit"], "commit", Duration::from_millis(100));
    let said = recover(&stage);
    assert!(said.contains("the commit was finished"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    stage.ends_with(10, &["plan", SERVICE]);

    stage.patch(
        "says-v3",
        "dd if=/dev/urandom of=/srv/ballast bs=1M count=8 2>/dev/null; echo v3 > /etc/says",
    );
    stage.ok(&["apply", SERVICE]);
    kill(&stage, &["commit", SERVICE], "commit", Duration::from_millis(300));
    recover(&stage);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v3", "web-a"));
    assert_eq!(client.all_answered(), ["v1", "v2", "v3"]);
    stage.finish();
}

#[test]
fn a_rollback_that_is_killed_is_put_right() {
    let stage = Stage::new(&Settings { observe: "500ms", ..Settings::default() });
    let client = Client::start(&stage.client);
    stage.says("v2");
    stage.ok(&["apply", SERVICE]);
    for (phase, part) in [("boot", 0.5), ("verify", 0.0), ("give_back", 0.0), ("drain", 0.0), ("drain", 0.5)]
    {
        println!("killed in {phase} at {part}");
        kill(&stage, &["rollback", SERVICE], phase, Duration::from_secs_f64(part));
        recover(&stage);
        if stage.who() == "v1" {
            assert_eq!(stage.active(), "web-a");
            stage.ok(&["apply", SERVICE]); // the patch is not applied any more
        }
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    }
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    client.all_answered();
    stage.finish();
}
