//! Power cuts: the machine is reset in the middle, and starts again with nothing but its disks.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use patchswitch::storage::StorageError;
use patchswitch::storage::disk::Disk;
use patchswitch::storage::merge::{Patience, commit, resume_merge};
use patchswitch::storage::snapshot::{CloneOf, WhenBusy, clone_disks, discard, reopen};
use patchswitch_tests::vm;
use serde::{Deserialize, Serialize};

use super::lab::{LIMIT, Lab, Writer, assert_clean, device_digest, digests, records, sh, wait_until};

/// What the agent's store would hold, and what the test has to know afterwards.
#[derive(Serialize, Deserialize)]
struct Record {
    disk: Disk,
    clones: Vec<CloneOf>,
    expected: Vec<String>,
    acknowledged: u64,
}

impl Record {
    fn path(lab: &Lab) -> PathBuf {
        lab.path("record.json")
    }

    fn save(&self, lab: &Lab) {
        fs::write(Self::path(lab), serde_json::to_string(self).unwrap()).unwrap();
        sh("sync");
    }

    fn load(lab: &Lab) -> Self {
        serde_json::from_str(&fs::read_to_string(Self::path(lab)).unwrap()).unwrap()
    }
}

fn patience(merge: Duration) -> Patience {
    Patience { close: LIMIT, busy: WhenBusy::Refuse, merge }
}

#[test]
fn a_merge_goes_on_after_a_power_cut() {
    let lab = Lab::new();
    if vm::phase().is_empty() {
        let (disk, active) = lab.disk("a", "root", 72);
        sh(&format!(
            "dd if=/dev/urandom of={} bs=1M count=72 oflag=direct status=none",
            active.path.display()
        ));
        let clones = vec![lab.clone_of(&disk, "b", "root")];
        let cut = clone_disks(&lab.dm, &clones).unwrap();
        let path = &cut.clones[0].path;
        sh(&format!(
            "dd if=/dev/urandom of={} bs=1M count=64 seek=8 oflag=direct status=none",
            path.display()
        ));
        let expected = vec![device_digest(path)];
        Record { disk, clones: clones.clone(), expected, acknowledged: 0 }.save(&lab);
        let stopped = commit(&lab.dm, &clones, patience(Duration::ZERO), &mut |_| ()).unwrap_err();
        assert!(matches!(stopped.0.as_slice(), [StorageError::MergeGoesOn { .. }]), "{stopped}");
        vm::reset("again").unwrap();
    }
    let Record { clones, expected, .. } = Record::load(&lab);
    assert_eq!(sh("dmsetup ls"), "No devices found\n");
    let mut total = None;
    let committed = resume_merge(&lab.dm, &clones, patience(LIMIT * 10), &mut |progress| {
        total.get_or_insert(progress.total);
    })
    .unwrap();
    println!("{total:?} sectors were left after the power cut");
    assert!(
        total.is_some_and(|left| left > 0),
        "nothing was left: the power cut came too late to prove anything"
    );
    assert_eq!(device_digest(&lab.dm.node(&clones[0].clone).unwrap()), expected[0]);
    lab.finish(&[&committed.disks[0]]);
}

/// Between clone and commit: both sides are there again, with every record that either had acknowledged.
#[test]
fn both_sides_survive_a_power_cut() {
    let lab = Lab::new();
    if vm::phase().is_empty() {
        let (disk, active) = lab.formatted("a", "root", 64);
        let old = lab.mount(&active.path, "a");
        sh(&format!("dd if=/dev/urandom of={}/base bs=1M count=8 conv=fsync status=none", old.0.display()));
        let clones = vec![lab.clone_of(&disk, "b", "root")];
        let cut = clone_disks(&lab.dm, &clones).unwrap();
        let new = lab.mount(&cut.clones[0].path, "b");
        sh(&format!(
            "dd if=/dev/urandom of={}/base bs=1M count=8 conv=notrunc,fsync status=none",
            new.0.display()
        ));
        sh(&format!(
            "dd if=/dev/urandom of={}/base bs=1M count=4 conv=notrunc,fsync status=none",
            old.0.display()
        ));
        let expected = vec![digests(&old.0), digests(&new.0)];
        let writers = [Writer::start(&[&old.0]), Writer::start(&[&new.0])];
        wait_until("both sides write", LIMIT, || writers.iter().all(|writer| writer.acknowledged() > 20));
        let acknowledged = writers.iter().map(Writer::acknowledged).min().unwrap();
        Record { disk, clones, expected, acknowledged }.save(&lab);
        vm::reset("again").unwrap();
    }
    let Record { disk, clones, expected, acknowledged } = Record::load(&lab);
    let found = reopen(&lab.dm, &clones).unwrap();
    let sides = [lab.dm.node(&disk.name).unwrap(), found[0].path.clone()];
    for (side, expected) in sides.iter().zip(&expected) {
        let mount = lab.mount(side, "side"); // replays its journal
        let written = records(&[&mount.0]);
        assert!(written >= acknowledged, "{acknowledged} records were acknowledged, {written} are there");
        fs::remove_file(mount.0.join("records")).unwrap();
        assert_eq!(&digests(&mount.0), expected);
        mount.unmount();
        assert_clean(side);
    }
    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    lab.finish(&[&disk]);
}

/// With a disk suspended: nothing is left of it, and the old side is what it was.
#[test]
fn a_power_cut_while_a_disk_is_suspended() {
    let lab = Lab::new();
    if vm::phase().is_empty() {
        let (disk, active) = lab.formatted("a", "root", 64);
        let old = lab.mount(&active.path, "a");
        sh(&format!("dd if=/dev/urandom of={}/base bs=1M count=8 conv=fsync status=none", old.0.display()));
        let clones = vec![lab.clone_of(&disk, "b", "root")];
        let expected = vec![digests(&old.0)];
        Record { disk: disk.clone(), clones: clones.clone(), expected, acknowledged: 0 }.save(&lab);
        let is_suspended = || lab.dm.info(&disk.name).unwrap().unwrap().suspended;
        std::thread::scope(|scope| {
            for _ in 0..50 {
                let cloning = scope.spawn(|| clone_disks(&lab.dm, &clones));
                while !cloning.is_finished() {
                    if is_suspended() {
                        vm::reset("again").unwrap();
                    }
                }
                // On one processor it may be over before anybody has seen it.
                drop(cloning.join().unwrap().unwrap());
                discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
            }
        });
        panic!("a disk was never seen suspended");
    }
    let Record { disk, clones, expected, .. } = Record::load(&lab);
    // The job had not got beyond cloning: the clone goes, then the old side comes up.
    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    let active = patchswitch::storage::disk::activate(&lab.dm, &disk).unwrap();
    let mount = lab.mount(&active.path, "a");
    assert_eq!(digests(&mount.0), expected[0]);
    mount.unmount();
    assert_clean(&active.path);
    lab.finish(&[&disk]);
}
