//! `kill -9` of the command in every phase: who served goes on serving, the client sees nothing of it, and `up` puts
//! things right, says what it did, and has nothing to do the second time.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use patchswitch::host::linux::dm::{Dm, Suspend};
use patchswitch::names::{Name, host_link};
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab;
use patchswitch_tests::observe::Counters;
use rustix::process::Signal;

use super::client::{Client, Datagrams, Kept};
use super::stage::{SERVICE, Settings, Stage, wait_until};

/// How long each phase of the last job took.
fn durations(stage: &Stage) -> BTreeMap<String, f64> {
    let report = stage.json(&["report"]);
    let phases = report["report"]["phases"].as_array().unwrap();
    let pair =
        |phase: &serde_json::Value| (phase[0].as_str().unwrap().to_owned(), phase[1].as_f64().unwrap());
    phases.iter().map(pair).collect()
}

/// Kills a command so long after a phase has begun; what it had said.
#[track_caller]
fn kill(stage: &Stage, arguments: &[&str], phase: &str, after: Duration) -> String {
    let running = stage.start_until(arguments, phase);
    std::thread::sleep(after);
    running.signal(Signal::KILL).unwrap();
    let said = running.output();
    assert_eq!(running.wait(Duration::from_secs(10)).unwrap().code(), None, "not killed, but ended: {said}");
    said
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

fn quick() -> Settings {
    Settings { observe: "500ms", ..Settings::default() }
}

/// A phase before the switch, and what part of its usual time passes before the kill.
const BEFORE: [(&str, f64); 8] = [
    ("scan", 0.0),
    ("inject", 0.5),
    ("boot", 0.5),
    ("patch", 0.5),
    ("restart", 0.5),
    ("verify", 0.2),
    ("arm", 0.0),
    // Before it or after it: the phase word says.
    ("take_over", 0.7),
];

#[test]
fn a_job_that_is_killed_before_the_switch_is_undone() {
    let stage = Stage::new(&quick());
    stage.patch("says-v2", "sleep 0.4; echo v2 > /etc/says");
    let before = Snapshot::take().unwrap();
    let client = Client::start(&stage.client);
    killed_while_suspended(&stage);
    stage.ok(&["apply", SERVICE]);
    let usual = durations(&stage);
    stage.ok(&["rollback", SERVICE]);
    let reset = || Counters::of(&stage.client).unwrap().trouble().unwrap().established_reset;
    let reset_before = reset();
    for (phase, part) in BEFORE {
        println!("killed in {phase} at {part}");
        let (mut kept, datagrams) = (Kept::begin(&stage.client), Datagrams::begin(&stage.client, "web-a"));
        // It begins: the patch is not applied, and nothing of the last clone is in the way.
        let job = kill(&stage, &["apply", SERVICE], phase, Duration::from_secs_f64(usual[phase] * part));
        // Nobody is there now who could do anything for them.
        assert_eq!(kept.who().unwrap(), "v1", "{phase}");
        if stage.who() == "v1" {
            // Else it was silent for longer than a flow is remembered.
            datagrams.ask();
        }
        let said = recover(&stage);
        assert_eq!(kept.who().unwrap(), "v1", "{phase}");
        if stage.who() == "v2" {
            // The machine may have been slower when the times were taken.
            assert!(
                job.contains("take_over …") && said.contains("web-b serves; web-a"),
                "{phase}: {job}{said}"
            );
            stage.ok(&["rollback", SERVICE]);
        } else {
            assert!(said.contains("web-a serves, it was not touched"), "{said}");
        }
        assert_eq!((stage.who().as_str(), kept.who().unwrap().as_str()), ("v1", "v1"));
    }
    assert_eq!(stage.active(), "web-a");
    assert_eq!(reset(), reset_before);
    client.all_answered();
    stage.nothing_of_a_job_left(&before);
    stage.finish();
}

/// The worst moment: the disk of the partition that serves stands still.
fn killed_while_suspended(stage: &Stage) {
    let suspended = format!("{}/dm/suspended", disk("ps-web-a-root"));
    let is = |state: &str| fs::read_to_string(&suspended).unwrap().trim() == state;
    let running = stage.start(&["apply", SERVICE]);
    wait_until("suspended", Duration::from_secs(30), || is("1"));
    running.signal(Signal::KILL).unwrap();
    running.wait(Duration::from_secs(10)).unwrap();
    wait_until("resumed", Duration::from_secs(3), || is("0"));
    recover(stage);
    assert_eq!(stage.who(), "v1");

    // As if the cutter and its guard had been killed as well.
    let running = stage.start(&["apply", SERVICE]);
    wait_until("suspended", Duration::from_secs(30), || is("1"));
    running.signal(Signal::KILL).unwrap();
    running.wait(Duration::from_secs(10)).unwrap();
    wait_until("resumed", Duration::from_secs(3), || is("0"));
    Dm::open().unwrap().suspend("ps-web-a-root", Suspend::LockFs).unwrap();
    assert!(is("1"));
    let said = stage.ok(&["up"]);
    let woken = said.find("disk ps-web-a-root goes on");
    assert!(woken.is_some() && woken < said.find("interrupted"), "{said}");
    assert!(is("0"));
    assert!(stage.ok(&["up"]).contains("nothing to do"));
    assert_eq!(stage.who(), "v1");
}

/// From the switch on the new side serves; from the beginning of the merge there is only one way, and `up` goes it to its
/// end.
#[test]
fn a_job_that_is_killed_after_the_switch_is_finished() {
    let stage = Stage::new(&quick());
    let before = Snapshot::take().unwrap();
    let client = Client::start(&stage.client);
    // Enough to merge that there is time for a kill.
    let ballast = "dd if=/dev/urandom of=/srv/ballast bs=1M count=8 2>/dev/null";
    stage.patch("says-v2", &format!("{ballast}; echo v2 > /etc/says"));
    for (phase, after) in [("observe", 200), ("drain", 0), ("retire", 200)] {
        println!("killed in {phase} after {after} ms");
        kill(&stage, &["apply", SERVICE], phase, Duration::from_millis(after));
        if phase == "observe" {
            as_if_nothing_had_followed_the_word(&stage);
        }
        let said = recover(&stage);
        assert!(said.contains("web-b serves; web-a"), "{said}");
        if phase == "observe" {
            for mended in ["the host's route leads to ps-web-b again", "ps-web-b begins new connections"] {
                assert!(said.contains(mended), "{said}");
            }
        }
        assert_follows(&stage, "web-b");
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
        if phase == "retire" {
            rollbacks(&stage);
        } else {
            stage.ok(&["rollback", SERVICE]);
        }
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    }
    stage.nothing_of_a_job_left(&before);

    kill(&stage, &["apply", SERVICE, "--commit"], "commit", Duration::from_millis(100));
    let said = recover(&stage);
    assert!(said.contains("the commit was finished"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    stage.ends_with(10, &["plan", SERVICE]);
    client.all_answered();
    stage.finish();
}

/// As a kill leaves it between the store of the word and all that follows it: the host's route leads to the old side, and
/// the new one's sources are those of a partition that retires.
fn as_if_nothing_had_followed_the_word(stage: &Stage) {
    let old = host_link(&Name::new(SERVICE).unwrap(), 0);
    for address in netlab::SERVICE {
        stage.host_ip(&format!("route replace {address} dev {old} proto 117"));
    }
    stage.host_ip(&format!("-n ps-web-b addr change {}/128 dev eth0 preferred_lft 0", netlab::SERVICE[1]));
    assert!(routes(stage).iter().all(|link| *link == old), "the state that is to be mended");
}

/// By which links the host reaches the service.
fn routes(stage: &Stage) -> [String; 2] {
    netlab::SERVICE.map(|address| {
        let shown: serde_json::Value =
            serde_json::from_str(&stage.host_ip(&format!("-j route get {address}"))).unwrap();
        shown[0]["dev"].as_str().unwrap().to_owned()
    })
}

/// The kernel's routes lead to who serves, and clients on the host itself are answered by it.
#[track_caller]
fn assert_follows(stage: &Stage, serving: &str) {
    let alias = format!("-j -d link show {}", routes(stage)[0]);
    let inside = stage.host_ip(&format!("-n ps-{serving} -j link show eth0"));
    let (outer, inner): (serde_json::Value, serde_json::Value) =
        (serde_json::from_str(&stage.host_ip(&alias)).unwrap(), serde_json::from_str(&inside).unwrap());
    // The ends of a veth pair name each other.
    assert_eq!(outer[0]["link_index"], inner[0]["ifindex"], "{serving} serves");
    let [v4, v6] = routes(stage);
    assert_eq!(v4, v6);
}

/// Rollbacks are killed before and after they give back.
fn rollbacks(stage: &Stage) {
    kill(stage, &["rollback", SERVICE], "boot", Duration::from_millis(500));
    recover(stage);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    kill(stage, &["rollback", SERVICE], "drain", Duration::ZERO);
    let said = recover(stage);
    assert!(said.contains("web-a serves, again; the clone web-b was discarded"), "{said}");
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
