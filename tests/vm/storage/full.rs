//! Stores that fill up, and stores that are refused because they could.

use std::fs::File;
use std::os::unix::fs::FileExt;

use patchswitch::storage::StorageError;
use patchswitch::storage::cow::{HIGH_WATER, Watch, cow_level, cow_sectors, status, watch};
use patchswitch::storage::disk::{Backing, Room};
use patchswitch::storage::extend::{extend_for, keep_room};
use patchswitch::storage::merge::{Patience, commit};
use patchswitch::storage::snapshot::{WhenBusy, clone_disks, discard};

use super::lab::{LIMIT, Lab, device_digest, sh};

/// The mark is passed before the end, the end is recognised, and the origin never notices.
#[test]
fn a_full_store_loses_the_clone_and_nothing_else() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", 64);
    let clones = [lab.clone_into(&disk, "b", "root", 16 << 11)];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let judge = || watch(status(&lab.dm, &clones[0].clone).unwrap(), disk.sectors, HIGH_WATER);
    assert!(matches!(judge(), Watch::Below { percent: 0 }));

    let write = |from: u64, count: u64| {
        sh(&format!(
            "dd if=/dev/urandom of={} bs=1M seek={from} count={count} oflag=direct status=none",
            active.path.display()
        ));
    };
    write(0, 11);
    assert!(matches!(judge(), Watch::Below { percent: 60..80 }), "{:?}", judge());
    write(11, 3);
    assert!(matches!(judge(), Watch::TurnBack { percent: 80..100 }), "{:?}", judge());
    let level = cow_level(&lab.dm, &clones[0].clone).unwrap();
    assert_eq!(level.total, 16 << 11);
    // Over the end, while the origin must take every byte.
    write(14, 20);
    assert_eq!(judge(), Watch::Lost);
    assert!(sh(&format!("dmsetup status {}", clones[0].clone)).contains("Invalid"));
    let lost = cow_level(&lab.dm, &clones[0].clone).unwrap_err();
    assert!(matches!(lost, StorageError::CloneLost { .. }), "{lost}");
    let clone = File::open(&cut.clones[0].path).unwrap();
    assert!(clone.read_exact_at(&mut [0; 512], 0).is_err(), "a lost clone must not give data");
    drop(clone);

    let origin = device_digest(&active.path);
    let patience = Patience { close: LIMIT, busy: WhenBusy::Refuse, merge: LIMIT };
    let refused = commit(&lab.dm, &clones, patience, &mut |_| ()).unwrap_err();
    assert!(matches!(refused.0.as_slice(), [StorageError::CloneLost { .. }]), "{refused}");
    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    assert_eq!(device_digest(&active.path), origin);

    // The next attempt starts clean.
    let again = [lab.clone_of(&disk, "c", "root")];
    let cut = clone_disks(&lab.dm, &again).unwrap();
    assert_eq!(device_digest(&cut.clones[0].path), origin);
    assert_eq!(watch(status(&lab.dm, &again[0].clone).unwrap(), disk.sectors, HIGH_WATER), Watch::Ample);
    discard(&lab.dm, &again, LIMIT, WhenBusy::Refuse).unwrap();
    lab.finish(&[&disk]);
}

/// Who fills it himself is told so, and what he has written before is there.
#[test]
fn a_store_that_its_clone_fills_takes_no_more_and_can_be_read() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", 64);
    sh(&format!("dd if=/dev/urandom of={} bs=1M count=64 oflag=direct status=none", active.path.display()));
    let origin = device_digest(&active.path);
    let clones = [lab.clone_into(&disk, "b", "root", 16 << 11)];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let path = cut.clones[0].path.display();
    let filled = sh(&format!("dd if=/dev/zero of={path} bs=1M count=20 oflag=direct 2>&1 || echo failed"));
    assert!(filled.contains("failed"), "{filled}");
    assert_eq!(watch(status(&lab.dm, &clones[0].clone).unwrap(), disk.sectors, HIGH_WATER), Watch::Full);
    assert!(sh(&format!("dmsetup status {}", clones[0].clone)).contains("Overflow"));
    let mut first = [1; 512];
    File::open(&cut.clones[0].path).unwrap().read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [0; 512]);
    assert_eq!(device_digest(&active.path), origin);
    // It is not whole, and nobody makes it the disk.
    let patience = Patience { close: LIMIT, busy: WhenBusy::Refuse, merge: LIMIT };
    let refused = commit(&lab.dm, &clones, patience, &mut |_| ()).unwrap_err();
    assert!(refused.to_string().contains("Overflow"), "{refused}");
    assert_eq!(device_digest(&active.path), origin);
    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    lab.finish(&[&disk]);
}

/// While it is written to, as long as there is room: then it holds everything, or turns back as one that cannot be extended.
#[test]
fn a_store_is_extended_while_it_is_in_use() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", 64);
    let write = |from: u64, count: u64| {
        sh(&format!(
            "dd if=/dev/urandom of={} bs=1M seek={from} count={count} oflag=direct status=none",
            active.path.display()
        ));
    };
    write(0, 64);
    let before = device_digest(&active.path);
    let clones = [lab.clone_into(&disk, "b", "root", 16 << 11)];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let size = || cow_level(&lab.dm, &clones[0].clone).unwrap().total;
    write(0, 11);
    // Not if nobody wants it.
    assert!(matches!(keep_room(&lab.dm, &clones[0], false).unwrap(), Watch::Below { percent: 60..80 }));
    assert_eq!(size(), 16 << 11);
    // Somebody was killed who had extended the file, and not yet the device.
    sh(&format!("fallocate -l 18M {}", clones[0].cow.path().display()));
    assert_eq!(extend_for(&clones[0], 1).unwrap(), Some(18 << 20), "nothing more is wanted");
    assert_eq!((size(), extend_for(&clones[0], 1).unwrap()), (18 << 11, None));
    // And whoever wants more gets that as well.
    sh(&format!("fallocate -l 20M {}", clones[0].cow.path().display()));
    for (from, more, wanted) in [(11, 12, 36 << 11), (23, 11, 54 << 11), (34, 1, cow_sectors(disk.sectors))] {
        let extended = keep_room(&lab.dm, &clones[0], true).unwrap();
        assert!(matches!(extended, Watch::Below { percent: 30..60 } | Watch::Ample), "{extended:?}");
        assert_eq!(size(), wanted);
        write(from, more);
    }
    assert_eq!(keep_room(&lab.dm, &clones[0], true).unwrap(), Watch::Ample);
    write(0, 64);
    assert_eq!(device_digest(&cut.clones[0].path), before, "the clone has the content of the cut");
    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    lab.finish(&[&disk]);
}

/// What is missing is said in bytes, and nothing has been touched.
#[test]
fn a_store_that_could_fill_up_is_refused_with_the_missing_bytes() {
    let lab = Lab::new();
    let (disk, _) = lab.disk("a", "root", 16);
    let wanted = cow_sectors(disk.sectors);

    let mut small = lab.clone_into(&disk, "b", "root", wanted - 24);
    small.watched = false;
    let error = clone_disks(&lab.dm, std::slice::from_ref(&small)).unwrap_err();
    assert!(error.undo.is_empty());
    match error.cause {
        StorageError::CowTooSmall { short_by, wanted: bytes, .. } => {
            assert_eq!((short_by, bytes), (24 * 512, wanted * 512));
        }
        other => panic!("{other}"),
    }

    let mut sparse = small.clone();
    sparse.cow = lab.image("sparse", wanted, Room::Sparse);
    let Backing::Image(path) = &sparse.cow else { unreachable!() };
    sh(&format!("fallocate -o 8192 -l 65536 {}", path.display()));
    let error = clone_disks(&lab.dm, std::slice::from_ref(&sparse)).unwrap_err();
    match error.cause {
        StorageError::CowNotAllocated { short_by, .. } => assert_eq!(short_by, wanted * 512 - 65536),
        other => panic!("{other}"),
    }
    assert_eq!(lab.kind(&disk.name), "linear");
    assert_eq!(lab.kind(&small.clone), "");
    lab.finish(&[&disk]);
}
