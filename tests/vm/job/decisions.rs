//! What a person decides after a job: what would be lost is counted and asked for, what cannot be done leaves who
//! serves as he is, and what was begun and not done is finished by `up`.

use std::fs;
use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use patchswitch::names::Name;
use patchswitch::store::JobLock;
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab::{self, Ns};
use patchswitch_tests::programs::run;
use rustix::process::Signal;
use serde_json::Value;

use super::client::Client;
use super::stage::{SERVICE, Settings, Stage, path, wait_until};

/// A port of the service on which nobody accepts.
const PORT: u16 = 81;

/// One after the other on the same ground. The partitions have an application disk, which no pattern of `may_lose`
/// covers, and the store of the clone of the system disk is one that can fill up.
#[test]
fn decisions_are_counted_refused_and_finished() {
    let stage = Stage::new(&Settings {
        disks: &["data:8M:/data"],
        standby: &["--size", "40M", "--store", "16M"],
        stores: "extend_stores = false",
        drain: "deadline = \"4s\"\non_deadline = \"reset\"\ncommand_after = \"100ms\"\ncommand = \"touch /asked\"",
        ..Settings::default()
    });
    inside(&stage, "web-a", "echo before > /data/kept");
    let before = Snapshot::take().unwrap();
    let client = Client::start(&stage.client);
    killed_while_planning(&stage);
    stage.nothing_of_a_job_left(&before);
    let id = stage.says("v2");
    nobody_accepts(&stage, &id);
    writes_to_an_application_disk_are_asked_for(&stage);
    the_old_partition_does_not_come_up(&stage);
    a_discard_that_fails_is_finished(&stage);
    a_clone_that_is_lost_is_not_merged(&stage, &id);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    stage.nothing_of_a_job_left(&before);

    stage.ok(&["apply", SERVICE, "--patch", &id]);
    inside(&stage, "web-b", "echo after > /data/after");
    a_commit_that_fails_is_finished(&stage);
    assert_eq!(inside(&stage, "web-b", "cat /data/kept /data/after"), "before\nafter\n");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(client.all_answered(), ["v1", "v2", "v1", "v2", "v1", "v2"]);
    stage.finish();
}

/// Runs a line of shell in a partition; what it printed.
#[track_caller]
fn inside(stage: &Stage, partition: &str, line: &str) -> String {
    stage.ok(&["partition", "exec", partition, "--", "/bin/sh", "-c", line])
}

/// Nothing is made yet, and nothing is written down: there is nothing to put right.
fn killed_while_planning(stage: &Stage) {
    // Its digest takes a while.
    let id = stage.patch("large", &format!("true\n# {}", "x".repeat(8 << 20)));
    let service: Name = SERVICE.parse().unwrap();
    let job = stage.start(&["apply", SERVICE, "--patch", &id]);
    let planning = || JobLock::holder(Path::new("/run/patchswitch"), &service).unwrap().is_some();
    wait_until("the job has the lock", Duration::from_secs(20), planning);
    job.signal(Signal::KILL).unwrap();
    assert_eq!(job.wait(Duration::from_secs(10)).unwrap().code(), None, "not killed, but ended");
    assert!(!fs::read_to_string(path("said")).unwrap().contains('…'), "a phase had begun");
    assert!(stage.ok(&["up"]).contains("nothing to do"));
}

/// Said of a store that nobody watches any more and that is not to become larger.
pub(super) const UNWATCHED: &str =
    "the store of ps-web-b-root can fill up, and nobody watches it from now on";

/// A connection waits for being accepted for longer than the drain may take. The command that makes the server end is
/// not run: it would reset the connection. At the deadline that is what happens, and is counted.
fn nobody_accepts(stage: &Stage, id: &str) {
    let address = netlab::SERVICE[0];
    let listener = Ns::named("ps-web-a").unwrap().enter(|| Ok(TcpListener::bind((address, PORT))?)).unwrap();
    let mut waits = stage.client.enter(|| Ok(TcpStream::connect((address, PORT))?)).unwrap();
    let said = stage.ends_with(24, &["apply", SERVICE, "--patch", id]);
    assert!(said.contains("the drain command was not run: connections wait for being accepted"), "{said}");
    assert!(said.contains(UNWATCHED), "{said}");
    waits.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let end = waits.read(&mut [0]).unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset, "{end}");
    drop(listener);
    let report = &stage.json(&["report"])["report"];
    let of = |key: &str| report["drain"][key].as_u64();
    assert_eq!((of("left"), of("reset")), (Some(1), Some(1)), "{report}");
    // What the command would have left behind.
    assert_eq!(report["lost_by_switch"]["files"], 0, "{report}");
    assert_eq!(stage.who(), "v2");
}

/// What the new side wrote is lost by a rollback: refused with the count, and nothing is touched.
fn writes_to_an_application_disk_are_asked_for(stage: &Stage) {
    inside(stage, "web-b", "echo order >> /data/kept");
    let said = stage.ends_with(25, &["rollback", SERVICE]);
    assert!(said.contains("has written 1 files since the switch that may_lose does not declare"), "{said}");
    assert!(said.contains("(/data/kept)") && said.contains("--discard-writes rolls back"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(stage.json(&["partition", "show", "web-a"])["running"], false);
}

/// It is started and does not pass its checks: the clone goes on serving, and what was started is stopped again.
fn the_old_partition_does_not_come_up(stage: &Stage) {
    let before = Snapshot::take().unwrap();
    let broken = on_the_disk_of("web-a", |root| {
        let serve = root.join("usr/bin/serve");
        let good = fs::read_to_string(&serve).unwrap();
        fs::write(&serve, "#!/bin/sh\nexec sleep 1000\n").unwrap();
        good
    });
    let said = stage.ends_with(21, &["rollback", SERVICE, "--discard-writes"]);
    assert!(said.contains("verify failed: not healthy") && said.contains("now: web-b serves"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(stage.json(&["partition", "show", "web-a"])["running"], false);
    let status = stage.json(&["status", SERVICE]);
    assert_eq!(status["attachments"][0]["partitions"].as_array().map(Vec::len), Some(1), "{status}");
    assert_eq!(status["jobs"].as_array().map(Vec::len), Some(0), "{status}");
    on_the_disk_of("web-a", |root| {
        let serve = root.join("usr/bin/serve");
        fs::write(&serve, broken).unwrap();
        assert_eq!(fs::metadata(serve).unwrap().permissions().mode() & 0o777, 0o755);
    });
    stage.nothing_of_a_job_left(&before);
}

/// Does something with the root of a partition that does not run.
pub(super) fn on_the_disk_of<T>(partition: &str, work: impl FnOnce(&Path) -> T) -> T {
    let (root, disk) = (path("mnt"), format!("/dev/mapper/ps-{partition}-root"));
    fs::create_dir_all(&root).unwrap();
    run(&["mount", &disk, root.to_str().unwrap()]).unwrap();
    let done = work(&root);
    run(&["umount", root.to_str().unwrap()]).unwrap();
    done
}

/// Somebody holds the store of the clone: it cannot be made free.
struct Held;

impl Held {
    fn store() -> Self {
        // `0 81920 snapshot 7:0 7:2 PO 64`: the fifth word is the store.
        let table = run(&["dmsetup", "table", "ps-web-b-root"]).unwrap();
        let store = table.split_whitespace().nth(4).unwrap();
        run(&["dmsetup", "create", "holder", "--table", &format!("0 8 linear {store} 0")]).unwrap();
        Self
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        run(&["dmsetup", "remove", "holder"]).unwrap();
    }
}

/// The store is nearly full, which is no reason to stay with it. The service is given back, the clone cannot be taken
/// away: the job stays open, and `up` ends it.
fn a_discard_that_fails_is_finished(stage: &Stage) {
    let clones = |scarce: bool| {
        let status = stage.json(&["status", SERVICE]);
        let clone = &status["clones"][0];
        assert_eq!(
            (&clone["clone"], &clone["scarce"]),
            (&"ps-web-b-root".into(), &scarce.into()),
            "{status}"
        );
        assert_eq!(status["clones"].as_array().map(Vec::len), Some(1), "{status}");
        clone["percent"].as_u64().unwrap()
    };
    assert!(clones(false) < 80);
    inside(stage, "web-b", "dd if=/dev/urandom of=/srv/much bs=1M count=11 conv=fsync 2>/dev/null");
    assert!(clones(true) >= 80);

    let held = Held::store();
    let said = stage.ends_with(23, &["rollback", SERVICE, "--discard-writes"]);
    assert!(said.contains("web-a serves again; `patchswitch up` takes the patched one away"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    let jobs = &stage.json(&["status", SERVICE])["jobs"];
    assert_eq!((&jobs[0]["job"]["kind"], &jobs[0]["progress"]), (&"rollback".into(), &"interrupted".into()));
    // As long as it cannot be done it stays so.
    stage.ends_with(1, &["up"]);
    drop(held);
    let said = stage.ok(&["up"]);
    assert!(said.contains("the clone web-b was discarded"), "{said}");
    assert!(stage.ok(&["up"]).contains("nothing to do"));
}

/// Its store is full, and nobody watches it. There is a way back as long as nothing is merged.
fn a_clone_that_is_lost_is_not_merged(stage: &Stage, id: &str) {
    stage.ok(&["apply", SERVICE, "--patch", id]);
    let fill = "dd if=/dev/urandom of=/srv/much bs=1M count=20 conv=fsync";
    let filled = stage.run(&["partition", "exec", "web-b", "--", "/bin/sh", "-c", fill]);
    assert_ne!(filled.code, 0, "it had the room");
    assert_eq!(stage.json(&["status"])["clones"][0]["percent"], Value::Null);
    let said = stage.ends_with(1, &["commit", SERVICE]);
    assert!(said.contains("nothing was merged; `patchswitch rollback web --discard-writes`"), "{said}");
    assert!(stage.ok(&["up"]).contains("nothing to do"));
    // What it has can be read, and counted.
    let said = stage.ok(&["rollback", SERVICE]);
    assert!(said.contains("sectors, 0 files outside may_lose"), "{said}");
    assert!(stage.ok(&["up"]).contains("nothing to do"));
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
}

/// There is no way back from a merge: the job stays open, and `up` ends it.
fn a_commit_that_fails_is_finished(stage: &Stage) {
    let held = Held::store();
    let said = stage.ends_with(1, &["commit", SERVICE]);
    assert!(said.contains("web-b serves; the merge is not done: `patchswitch up` goes on with it"), "{said}");
    assert_eq!(stage.who(), "v2");
    let jobs = &stage.json(&["status", SERVICE])["jobs"];
    assert_eq!((&jobs[0]["job"]["kind"], &jobs[0]["progress"]), (&"commit".into(), &"interrupted".into()));
    stage.ends_with(1, &["up"]);
    drop(held);
    let said = stage.ok(&["up"]);
    assert!(said.contains("the commit was finished"), "{said}");
    assert!(stage.ok(&["up"]).contains("nothing to do"));
    stage.ends_with(10, &["commit", SERVICE]);
}
