//! The cut itself.

use std::time::Duration;

use patchswitch::host::linux::dm::Done;
use patchswitch::storage::disk::{Room, activate};
use patchswitch::storage::snapshot::{WhenBusy, clone_disks, close, discard, reopen};
use patchswitch::storage::table::CHUNK;

use super::lab::{self, LIMIT, Lab, Writer, assert_clean, device_digest, digests, records, sh};

/// Under a writer that alternates between two disks, both clones hold exactly the records of one instant: none
/// that was acknowledged before is missing, and none on one disk is newer than the first missing on the other.
#[test]
fn two_disks_are_cut_in_one_instant_under_a_writer() {
    let lab = Lab::new();
    let (root, root_active) = lab.formatted("a", "root", 128);
    let (data, data_active) = lab.formatted("a", "data", 96);
    let (root_mount, data_mount) =
        (lab.mount(&root_active.path, "a"), lab.mount(&data_active.path, "a-data"));
    let writer = Writer::start(&[&root_mount.0, &data_mount.0]);
    let clones = [lab.clone_of(&root, "b", "root"), lab.clone_of(&data, "b", "data")];

    for round in 0..3 {
        let so_far = writer.acknowledged();
        lab::wait_until("the writer writes", LIMIT, || writer.acknowledged() > so_far + 20);
        let before = writer.acknowledged();
        let cut = clone_disks(&lab.dm, &clones).unwrap();
        let after = writer.acknowledged();
        println!("round {round}: frozen {:?}, records {before} to {after}", cut.freeze);
        assert!(cut.freeze < Duration::from_secs(2), "frozen for {:?}", cut.freeze);

        // The journals were written out: clean without replay.
        for clone in &cut.clones {
            assert_clean(&clone.path);
            let features = sh(&format!("dumpe2fs -h {} 2>/dev/null", clone.path.display()));
            assert!(!features.contains("needs_recovery"), "the clone's journal must be replayed");
        }
        let mounts = [lab.mount(&cut.clones[0].path, "b"), lab.mount(&cut.clones[1].path, "b-data")];
        let found = records(&[&mounts[0].0, &mounts[1].0]);
        assert!(found >= before, "{before} records were acknowledged before, the clones have {found}");
        assert!(found <= after + 1, "{found} records, but only {after} were acknowledged afterwards");
        mounts.into_iter().for_each(lab::Mount::unmount);
        discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
        assert_eq!((lab.kind(&root.name), lab.kind(&data.name)), ("linear".into(), "linear".into()));
    }

    let written = writer.stop();
    assert_eq!(records(&[&root_mount.0, &data_mount.0]), written);
    root_mount.unmount();
    data_mount.unmount();
    assert_clean(&root_active.path);
    assert_clean(&data_active.path);
    lab.finish(&[&root, &data]);
}

/// Writes larger than a chunk, past the page cache, are what corrupts a clone whose origin was resumed too early.
#[test]
fn a_clone_keeps_the_content_of_the_cut_under_big_writes() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", 48);
    let path = active.path.display();
    sh(&format!("dd if=/dev/urandom of={path} bs=1M count=48 oflag=direct status=none"));
    let before = device_digest(&active.path);

    let clones = [lab.clone_of(&disk, "b", "root")];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    sh(&format!("dd if=/dev/urandom of={path} bs=1M count=32 oflag=direct status=none"));
    sh(&format!("dd if=/dev/urandom of={path} bs=68K seek=497 count=97 oflag=direct status=none"));
    assert_eq!(device_digest(&cut.clones[0].path), before, "the clone has changed with its origin");
    let now = device_digest(&active.path);
    assert_ne!(now, before);

    // And the other way round.
    sh(&format!(
        "dd if=/dev/urandom of={} bs=1M count=16 seek=24 oflag=direct status=none",
        cut.clones[0].path.display()
    ));
    assert_eq!(device_digest(&active.path), now, "the origin has changed with its clone");

    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    assert_eq!(device_digest(&active.path), now);
    // Done again, nothing happens.
    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    lab.finish(&[&disk]);
}

/// After a reboot both sides are there again, with what each had written, and the clone is still safe.
#[test]
fn clones_are_reopened_when_their_tables_are_gone() {
    let lab = Lab::new();
    let (disk, active) = lab.formatted("a", "root", 64);
    let mount = lab.mount(&active.path, "a");
    sh(&format!("dd if=/dev/urandom of={}/file bs=1M count=8 conv=fsync status=none", mount.0.display()));
    let clones = [lab.clone_of(&disk, "b", "root")];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let clone = lab.mount(&cut.clones[0].path, "b");
    sh(&format!("echo old > {}/side; echo new > {}/side; sync", mount.0.display(), clone.0.display()));
    let (old, new) = (digests(&mount.0), digests(&clone.0));
    let refused = close(&lab.dm, &clones, Duration::from_millis(200)).unwrap_err();
    assert!(refused.to_string().contains("still open"), "{refused}");
    assert_eq!(lab.kind(&clones[0].clone), "snapshot", "the clone must not go before its disk");
    mount.unmount();
    // The disk goes, the clone is in use and stays; then the disk comes back beside it.
    close(&lab.dm, &clones, Duration::from_millis(200)).unwrap_err();
    assert_eq!((lab.kind(&clones[0].active), lab.kind(&clones[0].clone)), (String::new(), "snapshot".into()));
    reopen(&lab.dm, &clones).unwrap();
    assert_eq!(lab.kind(&clones[0].active), "snapshot-origin");
    clone.unmount();
    for _ in 0..2 {
        close(&lab.dm, &clones, LIMIT).unwrap();
        assert_eq!((lab.kind(&clones[0].active), lab.kind(&clones[0].clone)), (String::new(), String::new()));
    }
    reopen(&lab.dm, &clones).unwrap();
    // What a reboot takes away.
    sh(&format!("dmsetup remove {}; dmsetup remove {}", clones[0].clone, clones[0].active));

    for _ in 0..2 {
        reopen(&lab.dm, &clones).unwrap();
        assert_eq!(
            (lab.kind(&clones[0].active), lab.kind(&clones[0].clone)),
            ("snapshot-origin".into(), "snapshot".into())
        );
    }
    assert_eq!(activate(&lab.dm, &disk).unwrap().done, Done::AlreadySo);
    let (mount, clone) = (lab.mount(&active.path, "a"), lab.mount(&cut.clones[0].path, "b"));
    assert_eq!((digests(&mount.0), digests(&clone.0)), (old, new.clone()));
    sh(&format!(
        "dd if=/dev/zero of={}/file bs=1M count=8 conv=notrunc oflag=direct status=none",
        mount.0.display()
    ));
    sh("echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(digests(&clone.0), new, "the origin was resumed before its snapshot");
    mount.unmount();
    clone.unmount();
    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    assert!(reopen(&lab.dm, &clones).is_err(), "there is no clone any more");
    lab.finish(&[&disk]);
}

/// The store takes a change of every single chunk, in any order, and of the whole disk: the computed size is enough.
#[test]
fn the_computed_store_takes_every_chunk() {
    let lab = Lab::new();
    // Two full metadata chunks and not a chunk more: the third is cleared, and has to have its place.
    let entries = CHUNK * 512 / 16;
    let sectors = 2 * entries * CHUNK;
    let backing = lab.image("a-root", sectors, Room::Sparse);
    let disk = patchswitch::storage::disk::Disk { name: lab::dm_name("a", "root"), backing, sectors };
    let active = activate(&lab.dm, &disk).unwrap();
    let clones = [lab.clone_of(&disk, "b", "root")];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let (half, chunk) = (entries, CHUNK * 512);
    for (path, skip) in [(&cut.clones[0].path, 0), (&active.path, half)] {
        sh(&format!(
            "dd if=/dev/urandom of={} bs={chunk} seek={skip} count={half} oflag=direct status=none",
            path.display()
        ));
    }
    let status = sh(&format!("dmsetup status {}", clones[0].clone));
    let store = patchswitch::storage::cow::cow_sectors(sectors);
    let metadata = (1 + 3) * CHUNK;
    let allocated = sectors + metadata;
    assert_eq!(allocated, store);
    // The kernel counts up to the next free chunk, past the metadata chunk that follows.
    assert_eq!(status.trim(), format!("0 {sectors} snapshot {store}/{store} {metadata}"));
    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();

    // One chunk less, and the clone is lost by the very last change.
    let short = [lab.clone_into(&disk, "c", "root", store - CHUNK)];
    let cut = clone_disks(&lab.dm, &short).unwrap();
    let fill =
        format!("dd if=/dev/urandom of={} bs={chunk} oflag=direct status=none", cut.clones[0].path.display());
    lab::try_sh(&fill);
    assert!(sh(&format!("dmsetup status {}", short[0].clone)).contains("Invalid"));
    discard(&lab.dm, &short, LIMIT, WhenBusy::Refuse).unwrap();
    lab.finish(&[&disk]);
}
