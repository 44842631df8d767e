//! Partitions with disks of which whoever takes over gets whole copies, by a log of writes and by a mirror.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use patchswitch::host::linux::dm::Dm;
use patchswitch_tests::leftovers::Snapshot;
use rustix::process::Signal;
use serde_json::Value;

use super::client::Client;
use super::keeper;
use super::mend::nothing_to_do;
use super::quiesce::there_and_back;
use super::stage::{SERVICE, Settings, Stage, path};

pub(super) const DISKS: &[&str] = &["data:24M:/srv/data:log", "more:32M:/srv/more:mirror"];

/// One that writes to both disks, line after line, until its partition ends. A copy of both has the same of both, or one line more
/// of the first.
const WRITER: &str = "sh -c 'n=0; while echo $n >> /srv/data/lines && echo $n >> /srv/more/lines; do n=$((n+1)); sleep 0.01; done' \
                      > /dev/null 2>&1 < /dev/null &";

fn settings() -> Settings {
    Settings { disks: DISKS, ..Settings::default() }
}

fn inside(stage: &Stage, partition: &str, script: &str) -> String {
    stage.ok(&["partition", "exec", partition, "--", "sh", "-c", script])
}

/// What a partition has of the lines on both disks: all from the first on, and of the same moment.
#[track_caller]
fn lines(stage: &Stage, partition: &str) -> usize {
    let read = |disk: &str| inside(stage, partition, &format!("cat /srv/{disk}/lines"));
    // Of one that is being written the second is read later.
    let (data, more) = (read("data"), read("more"));
    for text in [&data, &more] {
        let numbers: Vec<usize> = text.lines().map(|line| line.trim().parse().unwrap()).collect();
        assert!(numbers.iter().enumerate().all(|(place, number)| place == *number), "{text}");
    }
    let [data, more] = [data, more].map(|text| text.lines().count());
    assert!(data == more || data == more + 1, "{data} lines on one disk, {more} on the other");
    data
}

/// The devices of both disks of a partition, as device-mapper has them.
fn kinds(partition: &str) -> [String; 2] {
    let dm = Dm::open().unwrap();
    ["data", "more"].map(|disk| {
        let lines = dm.table(&format!("ps-{partition}-{disk}")).unwrap();
        lines.iter().map(|line| line.kind.clone()).collect()
    })
}

/// No log of writes is left where disks are.
#[track_caller]
fn no_logs() {
    let all = fs::read_dir(path("state/disks")).unwrap().flatten();
    let logs: Vec<_> =
        all.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().contains(".log")).collect();
    assert!(logs.is_empty(), "{logs:?}");
}

/// The report says how each copy was made.
#[track_caller]
fn accounts(report: &Value) {
    let copies = report["copies"].as_array().unwrap();
    let by = |engine: &str| {
        copies.iter().find(|copy| copy["engine"] == engine).unwrap_or_else(|| panic!("{report}"))
    };
    assert_eq!(by("mirror")["bytes"].as_u64(), Some(32 << 20), "{report}");
    assert_eq!(by("log")["bulk"]["bytes"].as_u64(), Some(24 << 20), "{report}");
    assert!(by("log")["rounds"].as_array().unwrap().len() >= 3, "{report}");
    // What the old side wrote until it was stopped is counted, as with a clone.
    assert!(report["lost_by_switch"]["sectors"].as_u64() > Some(0), "{report}");
}

/// Somebody else has the copy open, and is cut off from it.
fn roll_back_despite_a_holder(stage: &Stage) {
    let dm = Dm::open().unwrap();
    let held = fs::File::open(dm.node("ps-web-b-data").unwrap()).unwrap();
    stage.ok(&["rollback", SERVICE]);
    assert!(held.read_exact_at(&mut [0; 512], 0).is_err(), "he reads what is a store again");
    drop(held);
    let gone = || dm.info("ps-web-b-data").unwrap().is_none();
    super::stage::wait_until("it goes when he lets go", Duration::from_secs(10), gone);
}

/// As well as that at a commit, of the old side's disk: not before it is certain that there is no way back.
fn commit_despite_a_holder(stage: &Stage) {
    let dm = Dm::open().unwrap();
    let held = fs::File::open(dm.node("ps-web-b-data").unwrap()).unwrap();
    let said = stage.ends_with(1, &["apply", SERVICE, "--commit"]);
    assert!(said.contains("ps-web-b-data") && said.contains("web-a serves"), "{said}");
    held.read_exact_at(&mut [0; 512], 0).unwrap();
    stage.ok(&["commit", SERVICE]);
    // Not what has been read for him already.
    assert!(held.read_exact_at(&mut [0; 512], 8 << 20).is_err(), "he reads what is a store again");
    nothing_to_do(stage);
    drop(held);
    let gone = || dm.info("ps-web-b-data").unwrap().is_none();
    super::stage::wait_until("it goes when he lets go", Duration::from_secs(10), gone);
}

/// Cut in one instant with the clone of the system disk, while all are written; given back, made permanent, and the other way
/// round.
#[test]
fn whole_copies_are_cut_with_the_clone_and_become_the_disks() {
    let stage = Stage::new(&settings());
    let client = Client::start(&stage.client);
    let before = Snapshot::take().unwrap();
    inside(&stage, "web-a", WRITER);
    stage.says("v2");
    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    let copied = lines(&stage, "web-b");
    assert!(copied > 0, "nothing was written before the cut");
    assert_eq!(kinds("web-b"), ["linear", "linear"]);
    accounts(&stage.json(&["report"])["report"]);
    no_logs();
    nothing_to_do(&stage);

    // Both go their own ways, and back is what the old one had in the end.
    inside(&stage, "web-b", "echo here > /srv/data/new");
    roll_back_despite_a_holder(&stage);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    let kept = lines(&stage, "web-a");
    assert!(kept >= copied, "{kept} lines, and the copy had {copied}");
    inside(&stage, "web-a", "test ! -e /srv/data/new");
    stage.nothing_of_a_job_left(&before);

    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(lines(&stage, "web-b"), kept);
    let behind = |partition: &str| -> Vec<Value> {
        let shown = stage.json(&["partition", "show", partition]);
        shown["disks"].as_array().unwrap().iter().map(|disk| disk["backing"]["image"].clone()).collect()
    };
    // The system disk has been merged; the others lie where the standby's stores were.
    let (active, standby) = (behind("web-b"), behind("web-a"));
    println!("{active:?} {standby:?}");
    let of = |all: &[Value], partition: &str| {
        let image = |disk: &str| {
            all.iter().any(|one| one.as_str().unwrap().ends_with(&format!("/{partition}-{disk}.img")))
        };
        ["root", "data", "more"].map(image)
    };
    assert_eq!(
        (of(&active, "web-a"), of(&active, "web-b")),
        ([true, false, false], [false, true, true]),
        "{active:?}"
    );
    assert_eq!(
        (of(&standby, "web-a"), of(&standby, "web-b")),
        ([false, true, true], [true, false, false]),
        "{standby:?}"
    );
    nothing_to_do(&stage);
    inside(&stage, "web-b", "echo here > /srv/data/new");
    stage.says("v3");
    commit_despite_a_holder(&stage);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v3", "web-a"));
    assert_eq!((lines(&stage, "web-a"), inside(&stage, "web-a", "cat /srv/data/new").trim()), (kept, "here"));
    assert_eq!(client.all_answered(), ["v1", "v2", "v1", "v2", "v3"]);
    stage.ok(&["down"]);
    stage.ok(&["up"]);
    assert_eq!((stage.who().as_str(), lines(&stage, "web-a")), ("v3", kept));
    stage.finish();
}

/// Of a single writer it is the disk as the writer left it, and it goes back as it is then.
#[test]
fn a_single_writer_goes_over_as_a_copy() {
    there_and_back(&Settings { disks: &["data:16M:/data:log"], ..keeper::settings() });
}

/// The same by a mirror. A btrfs is known by its identity: the copy needs one of its own while its original is there.
#[test]
fn a_single_writer_on_a_btrfs_goes_over_as_a_copy() {
    there_and_back(&Settings {
        fs: "btrfs",
        root: (keeper::settings().root.0, "160M"),
        standby: &["--size", "160M"],
        disks: &["data:128M:/data:mirror"],
        ..keeper::settings()
    });
}

/// Called off, and killed, in the middle of it: the disk is plain again, the standby's a store.
#[test]
fn a_copy_that_is_called_off_or_killed_leaves_nothing() {
    for (phase, more) in [("clone", ""), ("quiesce", keeper::settings().more)] {
        let disks = &["data:64M:/data:log", "more:64M:/more:mirror"];
        let stage = Stage::new(&Settings { disks, more, ..keeper::settings() });
        // Something to copy.
        for disk in ["data", "more"] {
            inside(
                &stage,
                "web-a",
                &format!("dd if=/dev/urandom of=/{disk}/ballast bs=1M count=48 conv=fsync"),
            );
        }
        stage.says("v2");
        let before = Snapshot::take().unwrap();
        for (signal, disk, engine) in [
            (Signal::TERM, "data", "log-writes"),
            (Signal::KILL, "more", "mirror"),
            (Signal::KILL, "data", "log-writes"),
        ] {
            let running = stage.start_until(&["apply", SERVICE], phase);
            let copied = format!("{phase}: 20 % of ps-web-a-{disk} copied");
            super::stage::wait_until(&copied, Duration::from_secs(60), || running.output().contains(&copied));
            let kind =
                |disk: &str| Dm::open().unwrap().table(&format!("ps-web-a-{disk}")).unwrap()[0].kind.clone();
            assert_eq!(kind(disk), engine);
            running.signal(signal).unwrap();
            let status = running.wait(Duration::from_secs(60)).unwrap();
            if signal == Signal::TERM {
                let said = fs::read_to_string(path("said")).unwrap();
                assert!(said.contains("web-a serves, it was not touched; the clone was discarded"), "{said}");
                assert_eq!(status.code(), Some(130), "{said}");
            } else {
                println!("{}", stage.ok(&["up"]));
            }
            assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
            assert_eq!([kind("data"), kind("more")], ["linear", "linear"]);
            no_logs();
            nothing_to_do(&stage);
            keeper::nothing_left(&stage, &before);
        }
        stage.ok(&["apply", SERVICE, "--commit"]);
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
        inside(&stage, "web-b", "test $(stat -c %s /data/ballast) = $(stat -c %s /more/ballast)");
        stage.finish();
    }
}

/// Found when it is planned, or defined.
#[test]
fn a_copy_needs_room_and_a_disk_of_its_own() {
    let stage = Stage::new(&Settings { standby: &["--size", "40M", "--store", "16M"], ..settings() });
    stage.says("v2");
    let said = stage.ends_with(78, &["plan", SERVICE]);
    assert!(said.contains("is smaller than the disk, of which it is to be a whole copy"), "{said}");
    let root = super::stage::job_root();
    let define = |disk: &str| {
        let root = root.to_str().unwrap();
        stage
            .ends_with(78, &["partition", "define", "web-c", "--from", root, "--size", "40M", "--disk", disk])
    };
    let said = define("data:16M:/:log");
    assert!(said.contains("mount point"), "{said}");
    stage.finish();
}
