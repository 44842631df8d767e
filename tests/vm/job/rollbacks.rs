//! Rollbacks of what was not switched by the book: the old side died while it had flows, nobody remembered the new side's
//! flows, the switch was made in part, or what it lost is not known any more.

use std::fs;
use std::time::Duration;

use patchswitch::dataplane::Dataplane;
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::programs::{Running, run};
use rustix::process::Signal;
use serde_json::Value;

use super::client::{Client, Datagrams, Kept};
use super::decisions::UNWATCHED;
use super::keeper;
use super::mend::{dies, last_report, nothing_to_do};
use super::stage::{SERVICE, Settings, Stage, path, wait_until};

/// A job that was killed after its switch, and put right while the old side still has a flow, which is returned.
pub(super) fn switched(stage: &Stage) -> Kept {
    let mut old = Kept::begin(&stage.client);
    assert_eq!(old.who().unwrap(), "v1");
    let job = stage.start_until(&["apply", SERVICE], "observe");
    job.signal(Signal::KILL).unwrap();
    assert_eq!(job.wait(Duration::from_secs(10)).unwrap().code(), None);
    let said = stage.ok(&["up"]);
    assert!(said.contains("web-b serves; web-a, which still has flows,"), "{said}");
    assert_eq!((stage.who().as_str(), old.who().unwrap().as_str()), ("v2", "v1"));
    old
}

/// Flows with the side that is to go.
struct Flows {
    connection: Kept,
    datagrams: Datagrams,
}

impl Flows {
    fn begin(stage: &Stage) -> Self {
        let mut connection = Kept::begin(&stage.client);
        assert_eq!(connection.who().unwrap(), "v2");
        Self { connection, datagrams: Datagrams::begin(&stage.client, "web-b") }
    }

    #[track_caller]
    fn ask(&mut self) {
        assert_eq!(self.connection.who().unwrap(), "v2");
        self.datagrams.ask();
    }
}

/// Rolls back while these flows go on, until they end by themselves after the switch; what it said.
#[track_caller]
fn roll_back_under(stage: &Stage, mut flows: Flows) -> String {
    let mut rollback: Running = stage.start(&["rollback", SERVICE]);
    while !rollback.output().contains("give_back done") {
        assert!(!rollback.has_ended(), "{}", rollback.output());
        flows.ask();
        // Well within the idle time of a flow, but not so often that any moment would do.
        std::thread::sleep(Duration::from_millis(800));
    }
    for _ in 0..3 {
        flows.ask();
    }
    drop(flows);
    let said = rollback.output();
    let code = rollback.wait(Duration::from_secs(60)).unwrap().code();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    said
}

/// The two ways back to a side that was not stopped in order.
#[test]
fn a_rollback_keeps_flows_that_nobody_remembered_and_starts_a_side_that_died() {
    let stage = Stage::new(&Settings {
        observe: "60s",
        udp_idle: "4s",
        standby: &["--size", "40M", "--store", "16M"],
        stores: "extend_stores = false",
        ..Settings::default()
    });
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    let client = Client::start(&stage.client);

    let mut old = switched(&stage);
    // Who would have watched the store of the clone has been killed, and whoever comes says so.
    let again = stage.run(&["up"]);
    assert!(again.stderr.contains(UNWATCHED), "{}", again.stderr);
    forgets();
    let said = roll_back_under(&stage, Flows::begin(&stage));
    assert!(said.contains("arm …") && !said.contains("boot …"), "{said}");
    assert_eq!(old.who().unwrap(), "v1");
    drop(old);

    let old = switched(&stage);
    let flows = Flows::begin(&stage);
    dies(&stage, "web-a");
    let said = roll_back_under(&stage, flows);
    assert!(said.contains("boot …") && said.contains("verify done"), "{said}");
    drop(old);

    assert_eq!(client.all_answered(), ["v1", "v2", "v1", "v2", "v1"]);
    stage.nothing_of_a_job_left(&before);
    nothing_to_do(&stage);
    stage.finish();
}

/// As a kill leaves it between the store of the word and what is done at once afterwards.
pub(super) fn forgets() {
    let plane = Dataplane::open(&SERVICE.parse().unwrap()).unwrap();
    let word = plane.word();
    assert!(word.learns(), "{word:?}");
    plane.store(word, word.with_learning(false)).unwrap();
    plane.forget_learned().unwrap();
}

/// The link inside a partition has another name, under which packets go on to pass: what is done by name fails.
fn rename(stage: &Stage, partition: &str, from: &str, to: &str) {
    stage.host_ip(&format!("-n ps-{partition} link set {from} name {to}"));
}

/// The word is stored, what follows it fails.
#[test]
fn a_switch_that_is_made_in_part_has_a_way_back() {
    let stage = Stage::new(&Settings::default());
    stage.says("v2");
    // IPv4 addresses carry the name of their link, numbered from the second change on.
    rename(&stage, "web-a", "eth0", "eth9");
    rename(&stage, "web-a", "eth9", "eth0");
    let before = Snapshot::take().unwrap();
    let client = Client::start(&stage.client);
    rename(&stage, "web-a", "eth0", "eth9");
    let said = stage.ends_with(74, &["apply", SERVICE]);
    assert!(said.contains("web-b serves; the old partition is still there"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));

    // Not before the store: nothing is switched, and the record says the same.
    let said = stage.ends_with(1, &["rollback", SERVICE]);
    assert!(said.contains("eth0") && said.contains("now: web-b serves"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    rename(&stage, "web-a", "eth9", "eth0");

    // After it: there is only one way from there on.
    rename(&stage, "web-b", "eth0", "eth9");
    let said = stage.ends_with(23, &["rollback", SERVICE]);
    assert!(said.contains("now: web-a serves again; `patchswitch up` takes the patched one away"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    assert_eq!(stage.patch_row("1")["applied"], Value::Null);
    let said = stage.ok(&["up"]);
    assert!(said.contains("web-a serves, again; the clone web-b was discarded"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    nothing_to_do(&stage);
    assert_eq!(client.all_answered(), ["v1", "v2", "v1"]);
    stage.nothing_of_a_job_left(&before);
    what_is_not_known_is_not_claimed(&stage);
    stage.finish();
}

/// After a boot, or `down`, there is a way back also from a side that does not start.
#[test]
fn a_side_that_does_not_start_is_rolled_back_from() {
    for settings in [Settings::default(), keeper::settings()] {
        let moves = !settings.disks.is_empty();
        let stage = Stage::new(&settings);
        stage.says("v2");
        stage.ok(&["apply", SERVICE]);
        let inside = |partition: &str, script: &str| {
            stage.ok(&["partition", "exec", partition, "--", "/bin/sh", "-c", script])
        };
        if moves {
            inside("web-b", "echo kept > /data/kept");
        }
        inside("web-b", "chmod 644 /usr/lib/patchswitch/init");
        stage.ok(&["down"]);
        stage.ends_with(1, &["up"]);
        let said = stage.ends_with(25, &["rollback", SERVICE]);
        assert!(said.contains("web-b does not start") && said.contains("--discard-writes"), "{said}");
        // Nothing is given up for one that does not start either.
        let init = |mode: &str| {
            stage.ok(&["down"]);
            let at = path("mnt-old").display().to_string();
            let image = path("state/disks/web-a-root.img").display().to_string();
            run(&["mkdir", "-p", &at]).unwrap();
            run(&["mount", "-n", "-o", "loop", &image, &at]).unwrap();
            run(&["chmod", mode, &format!("{at}/usr/lib/patchswitch/init")]).unwrap();
            run(&["umount", "-n", &at]).unwrap();
        };
        init("644");
        let said = stage.ends_with(1, &["rollback", SERVICE, "--discard-writes"]);
        assert!(said.contains("neither web-b starts") && said.contains("nothing was changed"), "{said}");
        assert_eq!(stage.active(), "web-b");
        init("755");
        let said = stage.ends_with(25, &["rollback", SERVICE, "--discard-writes"]);
        wait_until("v1 serves", Duration::from_secs(60), || super::client::who(&stage.client).is_ok());
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"), "{said}");
        if moves {
            // What goes over goes back as it is.
            assert_eq!(inside("web-a", "cat /data/kept").trim(), "kept");
        }
        nothing_to_do(&stage);
        assert_eq!(stage.patch_row("1")["applied"], Value::Null);
        stage.ok(&["down"]);
        stage.ok(&["up"]);
        assert_eq!(stage.who(), "v1");
        stage.finish();
    }
}

/// The devices are made anew, so their counts are not those of before; then the report is gone.
fn what_is_not_known_is_not_claimed(stage: &Stage) {
    stage.ok(&["apply", SERVICE]);
    stage.ok(&["down"]);
    stage.ok(&["up"]);
    stage.ok(&["partition", "exec", "web-b", "--", "/bin/sh", "-c", "echo order > /etc/order"]);
    let said = stage.ends_with(25, &["rollback", SERVICE]);
    assert!(said.contains("/etc/order"), "{said}");
    let lost = &stage.json(&["report"])["report"]["lost_by_give_back"];
    assert_eq!((&lost["sectors"], lost["files"].as_u64() > Some(0)), (&Value::Null, true), "{lost}");

    let ((last, _), aside) = (last_report(), path("aside"));
    fs::rename(&last, &aside).unwrap();
    for verb in ["commit", "rollback"] {
        let said = stage.ends_with(25, &[verb, SERVICE]);
        assert!(said.contains("is not known") && said.contains("--discard-writes"), "{verb}: {said}");
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    }
    fs::rename(aside, last).unwrap();
    let said = stage.run(&["rollback", SERVICE, "--discard-writes"]);
    assert_eq!(said.code, 25, "{said:?}");
    assert!(said.stdout.contains("lost by the rollback: sectors that are not known"), "{said:?}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
}

/// A standby may have more disks than whom it patches: what is not needed waits meanwhile, and is removed with the partition at last.
#[test]
fn a_standby_with_more_disks_gets_them_all_back() {
    let stage = Stage::new(&Settings {
        standby: &["--size", "40M", "--disk", "more:80M:/more"],
        ..Settings::default()
    });
    stage.says("v2");
    let disks = || {
        let of = |name: &str| stage.json(&["partition", "show", name])["disks"].as_array().unwrap().len();
        let images = fs::read_dir(path("state/disks")).unwrap().count();
        (of("web-a"), of("web-b"), images)
    };
    assert_eq!(disks(), (1, 2, 3));
    // Who is removed while it is lent, or was, has them all.
    for command in ["rollback", "commit"] {
        stage.ok(&["apply", SERVICE]);
        assert_eq!(disks(), (1, 1, 3));
        stage.ok(&[command, SERVICE]);
        assert_eq!(disks(), if command == "commit" { (1, 1, 3) } else { (1, 2, 3) });
    }
    // And from one that has some beyond its own: while it serves, when it is free, lent again, and free again.
    for says in ["v3", "v4"] {
        stage.says(says);
        stage.ok(&["apply", SERVICE, "--commit"]);
        assert_eq!(disks(), (1, 1, 3));
    }
    stage.ok(&["service", "remove", SERVICE]);
    for partition in ["web-a", "web-b"] {
        stage.ok(&["partition", "remove", partition]);
    }
    assert_eq!(fs::read_dir(path("state/disks")).map_or(0, Iterator::count), 0);
    stage.nothing_left();
}
