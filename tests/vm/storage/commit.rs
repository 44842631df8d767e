//! The commit: the clone becomes the disk while it serves.

use std::time::Duration;

use patchswitch::storage::StorageError;
use patchswitch::storage::merge::{Patience, commit, resume_merge};
use patchswitch::storage::snapshot::{CloneOf, WhenBusy, clone_disks, discard};

use super::lab::{LIMIT, Lab, Mount, Writer, assert_clean, device_digest, digests, records, sh};

const PATIENCE: Patience = Patience { close: LIMIT, busy: WhenBusy::Refuse, merge: Duration::from_secs(120) };

fn fill(mount: &Mount, name: &str, mib: u64) {
    sh(&format!(
        "dd if=/dev/urandom of={}/{name} bs=1M count={mib} conv=fsync status=none",
        mount.0.display()
    ));
}

/// The store is free: its header is zero, and no loop device shows it.
fn assert_free(of: &CloneOf) {
    let path = of.cow.path().display();
    assert_eq!(sh(&format!("head -c 16 {path} | od -An -tx1 | tr -d ' \n'")), "0".repeat(32));
    assert_eq!(sh(&format!("losetup -j {path}")), "");
}

#[test]
fn a_clone_becomes_the_disk_while_it_is_mounted_and_written() {
    let lab = Lab::new();
    let (disk, active) = lab.formatted("a", "root", 128);
    let old = lab.mount(&active.path, "a");
    fill(&old, "same", 8);
    fill(&old, "changed", 16);
    let clones = [lab.clone_of(&disk, "b", "root")];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let new = lab.mount(&cut.clones[0].path, "b");
    fill(&new, "changed", 16);
    fill(&new, "added", 24);
    fill(&old, "lost", 4);
    let expected = digests(&new.0);
    old.unmount();

    let writer = Writer::start(&[&new.0]);
    let mut steps = Vec::new();
    let committed = commit(&lab.dm, &clones, PATIENCE, &mut |progress| steps.push(progress.left)).unwrap();
    let during = writer.acknowledged();
    println!("merged {} sectors in {} steps, {during} records meanwhile", steps[0], steps.len());
    assert!(steps[0] >= 40 << 11, "{steps:?}");
    assert_eq!(steps.last(), Some(&0));
    assert!(committed.removed.deferred.is_empty());
    let [disk_now] = committed.disks.as_slice() else { panic!("{committed:?}") };
    assert_eq!((&disk_now.name, &disk_now.backing), (&clones[0].clone, &disk.backing));
    assert_eq!(lab.kind(&disk_now.name), "linear");
    assert_eq!(lab.kind(&disk.name), "", "the old side's device is gone");
    assert_free(&clones[0]);

    let written = writer.stop();
    assert!(written >= during && during > 0);
    assert_eq!(records(&[&new.0]), written);
    sh(&format!("rm {}/records; echo 3 > /proc/sys/vm/drop_caches", new.0.display()));
    assert_eq!(digests(&new.0), expected);

    // Once committed, always committed; and the disk can be cloned again, the roles exchanged.
    assert_eq!(resume_merge(&lab.dm, &clones, PATIENCE, &mut |_| ()).unwrap(), committed);
    let back = [lab.clone_of(disk_now, "a", "root")];
    let cut = clone_disks(&lab.dm, &back).unwrap();
    let again = lab.mount(&cut.clones[0].path, "a");
    assert_eq!(digests(&again.0), expected);
    again.unmount();
    discard(&lab.dm, &back, LIMIT, WhenBusy::Refuse).unwrap();
    new.unmount();
    assert_clean(&cut_path(disk_now.name.as_str()));
    lab.finish(&[disk_now]);
}

fn cut_path(name: &str) -> std::path::PathBuf {
    std::path::Path::new("/dev/mapper").join(name)
}

/// How much a clone differs, in MiB: so much that a merge takes longer than a test needs to interrupt it.
const DIFFERENCE: u64 = 160;

/// A disk with a clone that differs in [`DIFFERENCE`], and the digest that the clone has.
fn to_merge(lab: &Lab) -> (patchswitch::storage::disk::Disk, [CloneOf; 1], String) {
    let (disk, active) = lab.disk("a", "root", DIFFERENCE + 8);
    sh(&format!(
        "dd if=/dev/urandom of={} bs=1M count={} oflag=direct status=none",
        active.path.display(),
        DIFFERENCE + 8
    ));
    let clones = [lab.clone_of(&disk, "b", "root")];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let path = &cut.clones[0].path;
    sh(&format!(
        "dd if=/dev/urandom of={} bs=1M count={DIFFERENCE} seek=8 oflag=direct status=none",
        path.display()
    ));
    let digest = device_digest(path);
    (disk, clones, digest)
}

/// The kernel takes its time for merges as long as this is there: a merge that is to be interrupted is not over before.
struct Slowly;

impl Slowly {
    /// How much of its time it spends on them, in percent.
    const PARAMETER: &str = "/sys/module/dm_snapshot/parameters/snapshot_copy_throttle";

    fn now() -> Self {
        std::fs::write(Self::PARAMETER, "5").unwrap();
        Self
    }
}

impl Drop for Slowly {
    fn drop(&mut self) {
        std::fs::write(Self::PARAMETER, "100").unwrap();
    }
}

fn merge_goes_on(lab: &Lab, clones: &[CloneOf]) -> Slowly {
    let slowly = Slowly::now();
    let at_once = Patience { merge: Duration::ZERO, ..PATIENCE };
    let stopped = commit(&lab.dm, clones, at_once, &mut |_| ()).unwrap_err();
    assert!(matches!(stopped.0.as_slice(), [StorageError::MergeGoesOn { .. }]), "{stopped}");
    assert_eq!(lab.kind(&clones[0].clone), "snapshot-merge");
    slowly
}

#[test]
fn a_merge_whose_time_was_up_goes_on() {
    let lab = Lab::new();
    let (_, clones, digest) = to_merge(&lab);
    let slowly = merge_goes_on(&lab, &clones);
    // The content is whole at every moment.
    assert_eq!(device_digest(&cut_path(&clones[0].clone)), digest);
    drop(slowly);
    let committed = resume_merge(&lab.dm, &clones, PATIENCE, &mut |_| ()).unwrap();
    assert_eq!(device_digest(&cut_path(&clones[0].clone)), digest);
    assert_free(&clones[0]);
    lab.finish(&[&committed.disks[0]]);
}

/// A power cut in the middle of the merge: there are no tables, half of the store is in the origin.
#[test]
fn a_merge_is_resumed_when_its_tables_are_gone() {
    let lab = Lab::new();
    let (disk, clones, digest) = to_merge(&lab);
    let slowly = merge_goes_on(&lab, &clones);
    let name = &clones[0].clone;
    lab.dm.remove(name).unwrap();
    drop(slowly);
    let raw = device_digest(disk.backing.path());
    assert_ne!(raw, digest, "the merge was already over: nothing was interrupted");

    let mut first = None;
    let committed = resume_merge(&lab.dm, &clones, PATIENCE, &mut |progress| {
        first.get_or_insert(progress.total);
    })
    .unwrap();
    println!("{first:?} sectors were left");
    assert!(first.is_some_and(|left| left > 0 && left <= DIFFERENCE << 11), "{first:?}");
    assert_eq!(device_digest(&cut_path(name)), digest);
    assert_free(&clones[0]);

    // A power cut when all was done: only the record says "merging".
    sh(&format!("dmsetup remove {name}"));
    let again =
        resume_merge(&lab.dm, &clones, PATIENCE, &mut |_| panic!("there is nothing to merge")).unwrap();
    assert_eq!(again, committed);
    assert_eq!(device_digest(&cut_path(name)), digest);
    lab.finish(&[&committed.disks[0]]);
}

/// The store of a disk that waited for its turn could fill up meanwhile.
#[test]
fn all_disks_merge_before_the_first_is_waited_for() {
    let lab = Lab::new();
    let (large, [first], digest) = to_merge(&lab);
    let (small, active) = lab.disk("a", "data", 16);
    sh(&format!("dd if=/dev/zero of={} bs=1M count=16 oflag=direct status=none", active.path.display()));
    let second = lab.clone_of(&small, "b", "data");
    let cut = clone_disks(&lab.dm, std::slice::from_ref(&second)).unwrap();
    let path = cut.clones[0].path.display();
    sh(&format!("dd if=/dev/urandom of={path} bs=1M count=8 oflag=direct status=none"));
    let clones = [first, second];
    let mut kinds = std::collections::BTreeSet::new();
    let committed = commit(&lab.dm, &clones, PATIENCE, &mut |progress| {
        if progress.clone == clones[0].clone {
            assert!(progress.total > 0, "{progress:?}");
            let _ = kinds.insert(lab.kind(&clones[1].clone));
        }
    })
    .unwrap();
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["snapshot-merge"]);
    assert_eq!(device_digest(&cut_path(&clones[0].clone)), digest);
    assert_eq!(committed.disks[0].backing, large.backing);
    lab.finish(&committed.disks.iter().collect::<Vec<_>>());
}

/// Killed after the last table, before the store was cleared.
#[test]
fn a_store_that_was_not_cleared_is_cleared() {
    let lab = Lab::new();
    let (_, clones, digest) = to_merge(&lab);
    commit(&lab.dm, &clones, PATIENCE, &mut |_| ()).unwrap();
    let cow = clones[0].cow.path().display().to_string();
    // A header as the kernel leaves it: magic, valid, version, chunk.
    sh(&format!(
        "printf 'SnAp\\001\\000\\000\\000\\001\\000\\000\\000\\100\\000\\000\\000' | dd of={cow} conv=notrunc,fsync status=none"
    ));
    let committed =
        resume_merge(&lab.dm, &clones, PATIENCE, &mut |_| panic!("there is nothing to merge")).unwrap();
    assert_free(&clones[0]);
    assert_eq!(device_digest(&cut_path(&clones[0].clone)), digest);
    lab.finish(&[&committed.disks[0]]);
}

/// Somebody holds the old side's file system in a mount namespace of his own. By default that ends the commit before
/// anything is merged; as the last resort the holder is cut off.
#[test]
fn an_old_side_that_does_not_let_go() {
    let lab = Lab::new();
    let (disk, active) = lab.formatted("a", "root", 64);
    let old = lab.mount(&active.path, "a");
    fill(&old, "file", 4);
    let clones = [lab.clone_of(&disk, "b", "root")];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let new = lab.mount(&cut.clones[0].path, "b");
    fill(&new, "file", 8);
    let expected = digests(&new.0);
    let pid = sh("unshare -m --propagation private sleep 300 >/dev/null 2>&1 & echo $!").trim().to_owned();
    // By then it has its namespace, and the mounts in it are private.
    super::lab::wait_until("the holder sleeps", LIMIT, || sh(&format!("cat /proc/{pid}/comm")) == "sleep\n");
    old.unmount_here_only();

    let hasty = Patience { close: Duration::from_millis(300), ..PATIENCE };
    let refused = commit(&lab.dm, &clones, hasty, &mut |_| ()).unwrap_err();
    assert!(refused.to_string().contains("still open 1 times"), "{refused}");
    assert_eq!(
        (lab.kind(&disk.name), lab.kind(&clones[0].clone)),
        ("snapshot-origin".into(), "snapshot".into())
    );

    let cut_off = Patience { busy: WhenBusy::CutOff, ..hasty };
    let committed = commit(&lab.dm, &clones, cut_off, &mut |_| ()).unwrap();
    assert_eq!(committed.removed.deferred, std::slice::from_ref(&disk.name));
    assert_eq!(lab.kind(&disk.name), "error");
    assert_eq!(digests(&new.0), expected);
    sh(&format!("kill {pid}"));
    super::lab::wait_until("the cut-off device goes with its holder", LIMIT, || {
        lab.kind(&disk.name).is_empty()
    });
    new.unmount();
    assert_clean(&cut_path(&clones[0].clone));
    lab.finish(&[&committed.disks[0]]);
}
