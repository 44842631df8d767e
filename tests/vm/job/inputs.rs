//! What makes no sense, comes too early or goes wrong outside: refused with a word and a code of its own, or undone in
//! order.

use std::fs;
use std::time::Duration;

use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab::{HOST, OWN_A, SERVICE as ADDRESSES};
use patchswitch_tests::programs::run;
use rustix::process::Signal;

use super::client::{Client, Kept};
use super::stage::{SERVICE, Settings, Stage, job_root, path, script};

/// One after the other on the same ground: nothing is made, nothing is stored, and what is right goes through afterwards.
#[test]
fn what_makes_no_sense_is_refused_with_its_place() {
    let small = &["--size", "30M", "--memory", "200M", "--cpu", "90"];
    let mut settings = Settings { more: "udp_idel = \"1s\"", ..Settings::default() };
    let stage = Stage::bare(&settings);
    unknown_key(&stage);
    settings = Settings { uplink: "nowhere0", standby: small, ..Settings::default() };
    stage.configure(&settings);
    names_of_patches(&stage);

    stage.define(&settings);
    let stopped = || stage.json(&["partition", "show", "web-a"])["running"] == false;
    let said = stage.ends_with(1, &["service", "add", SERVICE]);
    assert!(said.contains("nowhere0") && stopped(), "{said}");
    settings = Settings { addresses: HOST, ..Settings::default() };
    stage.configure(&settings);
    let said = stage.ends_with(1, &["service", "add", SERVICE]);
    assert!(said.contains("10.77.0.1 belongs to this host itself") && stopped(), "{said}");

    stage.configure(&Settings::default());
    partitions(&stage);
    stage.ok(&["service", "add", SERVICE]);
    let said = stage.ends_with(1, &["apply", SERVICE, "--patch", "../../../etc/passwd"]);
    assert!(said.contains("../../../etc/passwd"), "{said}");
    before_the_clone(&stage);
    assert_eq!(stage.who(), "v1");
    stage.finish();
}

fn unknown_key(stage: &Stage) {
    let said = stage.ends_with(78, &["partition", "list"]);
    let line = fs::read_to_string(path("patchswitch.toml")).unwrap();
    let line = line.lines().position(|line| line.contains("udp_idel")).unwrap() + 1;
    assert!(said.contains(&format!("patchswitch.toml:{line}:1")) && said.contains("udp_idel"), "{said}");
    stage.nothing_left();
}

/// Partitions that cannot be, and those that are but not for this.
fn partitions(stage: &Stage) {
    let before = Snapshot::take().unwrap();
    let rows = || stage.json(&["partition", "list"]);
    let known = rows();
    let [own, service] = [OWN_A[0], ADDRESSES[0]];
    for (arguments, why) in [
        (&["--own", "127.0.0.1"][..], "loopback"),
        (&["--own", own], "partition web-a has it"),
        (&["--own", service], "it is an address of service"),
        (&["--own", "192.0.2.1", "--own", "192.0.2.2"], "the second one of its family"),
        (&["--size", "900G"], "nothing was changed"),
        (&["--store", "900G"], "nothing was changed"),
    ] {
        let size = if arguments[0] == "--size" { &[][..] } else { &["--size", "40M"] };
        let define = [&["partition", "define", "odd", "--standby"][..], size, arguments].concat();
        let said = stage.ends_with(78, &define);
        assert!(said.contains(why), "{define:?}: {said}");
    }
    let said = stage.ends_with(1, &["partition", "start", "web-b"]);
    assert!(said.contains("web-b is a standby"), "{said}");
    assert_eq!(rows(), known);
    // What a clone writes has to fit, not what it is a clone of.
    stage.ok(&["partition", "define", "large", "--standby", "--size", "900G", "--store", "40M"]);
    stage.ok(&["partition", "remove", "large"]);
    stage.ok(&["partition", "start", "web-a"]);
    let said = stage.ends_with(1, &["partition", "remove", "web-a"]);
    assert!(said.contains("runs, nothing was removed") && said.contains("--force"), "{said}");
    for result in ["stopped", "stopped already"] {
        assert_eq!(stage.json(&["partition", "stop", "web-a"])["result"], result);
    }
    stage.nothing_of_a_job_left(&before);
}

/// Names of patches that lead elsewhere.
fn names_of_patches(stage: &Stage) {
    let good = script("good", "true");
    let dots = script("a..b", "true");
    let parent = format!("{}/..", path("patches").display());
    for (bad, why) in [(parent.as_str(), "two dots"), (dots.to_str().unwrap(), "two dots")] {
        // With a good one before it: nothing is stored of either.
        let said = stage.ends_with(65, &["patch", "add", good.to_str().unwrap(), bad, "--type", "bugfix"]);
        assert!(said.contains(why), "{said}");
    }
    assert_eq!(stage.json(&["patch", "list"])["patches"].as_array().map(Vec::len), Some(0));
}

/// What is not right is found before the clone is made.
fn before_the_clone(stage: &Stage) {
    let id = stage.says("v2");
    let before = Snapshot::take().unwrap();
    for verb in ["plan", "apply"] {
        let said = stage.ends_with(69, &[verb, SERVICE]);
        for lack in ["web-b has", "10", "memory", "disk"] {
            assert!(said.contains(lack), "{lack}: {said}");
        }
    }
    stage.ok(&["partition", "remove", "web-b"]);
    // One with a root of its own is somebody's, although no service has it: a clone would overwrite it.
    let root = job_root();
    stage.ok(&[
        "partition",
        "define",
        "archive",
        "--from",
        root.to_str().unwrap(),
        "--size",
        "40M",
        "--command",
        "/usr/bin/serve",
    ]);
    let said = stage.ends_with(69, &["plan", SERVICE]);
    assert!(!said.contains("archive"), "{said}");
    stage.ok(&["partition", "start", "archive"]);
    let said = stage.ends_with(1, &["partition", "remove", "archive"]);
    assert!(said.contains("archive runs"), "{said}");
    stage.ok(&["partition", "remove", "archive", "--force"]);
    stage.ok(&["partition", "define", "web-b", "--standby", "--size", "40M"]);

    let row = stage.patch_row(&id);
    let stored = format!("state/patches/{}-says-v2", row["sha256"].as_str().unwrap());
    let content = fs::read(path(&stored)).unwrap();
    fs::write(path(&stored), [&content[..], b"touch /srv/evil\n"].concat()).unwrap();
    let said = stage.ends_with(65, &["apply", SERVICE]);
    assert!(said.contains("has changed since it was added") && said.contains("add it again"), "{said}");
    stage.nothing_of_a_job_left(&before);

    fs::write(path(&stored), content).unwrap();
    stage.ok(&["plan", SERVICE]);

    // What nobody watches must have its room before it is needed.
    let store = path("state/disks/web-b-root.img");
    let part = |options: &[&str]| {
        let range = ["--offset", "8M", "--length", "1M", store.to_str().unwrap()];
        run(&[&["fallocate"][..], options, &range].concat()).unwrap();
    };
    part(&["--punch-hole"]);
    for verb in ["plan", "apply"] {
        let said = stage.ends_with(78, &[verb, SERVICE]);
        assert!(said.contains("web-b for ps-web-a-root has holes, for which the host had no room"), "{said}");
    }
    stage.nothing_of_a_job_left(&before);
    part(&[]);
    stage.ok(&["plan", SERVICE]);
}

#[test]
fn one_job_at_a_time_and_it_can_be_called_off() {
    let stage = Stage::new(&Settings { observe: "20s", ..Settings::default() });
    let client = Client::start(&stage.client);
    let before = Snapshot::take().unwrap();
    // While the clone patches itself, which would take long.
    let hangs = stage.patch("hangs", "sleep 1000");
    let job = stage.start_until(&["apply", SERVICE], "patch");
    for command in [
        &["apply", SERVICE][..],
        &["commit", SERVICE],
        &["service", "add", SERVICE],
        &["service", "remove", SERVICE],
        &["down"],
    ] {
        let said = stage.ends_with(75, command);
        assert!(said.contains(&format!("process {} since", job.pid())), "{said}");
    }
    assert!(stage.ok(&["up"]).contains("nothing to do"), "somebody is at it");
    job.signal(Signal::INT).unwrap();
    assert_eq!(job.wait(Duration::from_secs(20)).unwrap().code(), Some(130));
    let said = fs::read_to_string(path("said")).unwrap();
    assert!(said.contains("web-a serves, it was not touched; the clone was discarded"), "{said}");
    stage.nothing_of_a_job_left(&before);

    // After the switch.
    assert_ne!(hangs, stage.says("v2"));
    let job = stage.start_until(&["apply", SERVICE, "--patch", "says-v2"], "observe");
    assert_eq!(stage.who(), "v2");
    job.signal(Signal::TERM).unwrap();
    assert_eq!(job.wait(Duration::from_secs(30)).unwrap().code(), Some(130));
    let said = fs::read_to_string(path("said")).unwrap();
    assert!(said.contains("web-a serves again; web-b was discarded"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    assert_eq!(client.all_answered(), ["v1", "v2", "v1"]);
    stage.nothing_of_a_job_left(&before);
    stage.finish();
}

/// Of a clone whose store is small.
const SMALL: &[&str] = &["--size", "40M", "--store", "6M"];
/// More than fits into it.
const WRITES: &str =
    "for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/srv/$i bs=256k count=4 conv=fsync; sleep 0.3; done";

/// The store of the clone is smaller than what the patch writes.
#[test]
fn a_job_turns_back_before_its_clone_is_full() {
    let stores = "extend_stores = false";
    let stage = Stage::new(&Settings { standby: SMALL, stores, observe: "20s", ..Settings::default() });
    let before = Snapshot::take().unwrap();
    let client = Client::start(&stage.client);
    let id = stage.patch("writes-too-much", WRITES);
    let said = stage.ends_with(20, &["apply", SERVICE, "--patch", &id]);
    assert!(said.contains("% full; define a standby with a larger --store"), "{said}");
    assert!(said.contains("web-a serves, it was not touched"), "{said}");
    stage.nothing_of_a_job_left(&before);

    // After the switch: by a service that writes.
    let id = stage.patch("v2-writes", "echo v2 > /etc/says");
    let job = stage.start_until(&["apply", SERVICE, "--patch", &id], "observe");
    assert_eq!(stage.who(), "v2");
    stage.run(&["partition", "exec", "web-b", "--", "/bin/sh", "-c", WRITES]);
    assert_eq!(job.wait(Duration::from_secs(30)).unwrap().code(), Some(22));
    let said = fs::read_to_string(path("said")).unwrap();
    assert!(said.contains("% full") && said.contains("web-a serves again"), "{said}");
    stage.nothing_of_a_job_left(&before);

    // The same where stores become larger: nobody turns back.
    stage.configure(&Settings {
        standby: SMALL,
        observe: "1s",
        stores: "store_lasts = \"15s\"",
        drain: "deadline = \"1s\"",
        ..Settings::default()
    });
    stage.ok(&["service", "add", SERVICE]);
    let id = stage.patch("writes-as-much", &format!("{WRITES}; echo v3 > /etc/says"));
    is_left_with_an_ample_store(&stage, &id);
    // Who asks a server whose disk is being filled waits for as long as that takes.
    assert_eq!(client.all_answered(), ["v1", "v2", "v1", "v3"]);
    let inside = |line: &str| stage.ok(&["partition", "exec", "web-b", "--", "/bin/sh", "-c", line]);
    inside("cat /dev/zero > /srv/full; : > /srv/full");
    assert_eq!(rooms(&stage), 0);
    stage.ok(&["commit", SERVICE]);
    inside("[ -s /srv/1 ] && [ -s /srv/8 ]");
    assert_eq!(stage.who(), "v3");
    stage.finish();
}

/// At first the store is as large as the pace of the old side asks for. It is an error that ends the job, after the switch: a client
/// stays with the old side. Nobody watches the store then, and nobody has to: it can take everything.
fn is_left_with_an_ample_store(stage: &Stage, patch: &str) {
    let slowly = "(while dd if=/dev/zero of=/srv/again bs=4k count=1 conv=fsync; do sleep 0.5; done) >/dev/null 2>&1 </dev/null &";
    stage.ok(&["partition", "exec", "web-a", "--", "/bin/sh", "-c", slowly]);
    let mut stays = Kept::begin(&stage.client);
    assert_eq!(stays.who().unwrap(), "v1");
    let said = stage.ends_with(1, &["apply", SERVICE, "--patch", patch]);
    assert!(said.contains("stay with the old partition") && said.contains("web-b serves"), "{said}");
    assert!(!said.contains("can fill up"), "{said}");
    assert_eq!((stays.who().unwrap().as_str(), stage.who().as_str()), ("v1", "v3"));
    let told = said.lines().find(|line| line.contains("ps-web-a-root is written at"));
    let told = told.unwrap_or_else(|| panic!("{said}"));
    let mib: f64 = told.split("a store of ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((7.0..36.0).contains(&mib), "{told}: neither what it was, nor all that it can need");
    assert_eq!(rooms(stage), 0);
}

/// How many clones there are whose stores can fill up.
fn rooms(stage: &Stage) -> usize {
    stage.json(&["status"])["clones"].as_array().unwrap().len()
}
