//! What is refused, and that a refusal changes nothing.

use std::io::Write as _;

use patchswitch::host::linux::block::BlockError;
use patchswitch::host::linux::dm::{DmError, Done};
use patchswitch::host::linux::loopdev;
use patchswitch::storage::StorageError;
use patchswitch::storage::disk::{Backing, Disk, Room, activate, deactivate};
use patchswitch::storage::snapshot::{CloneOf, WhenBusy, clone_disks, discard};

use super::lab::{LIMIT, Lab, dm_name, sh, wait_until};

fn over(device: &str, sectors: u64) -> Disk {
    Disk { name: dm_name("x", "root"), backing: Backing::Device(device.into()), sectors }
}

#[test]
fn devices_of_others_are_refused() {
    let lab = Lab::new();
    let file = lab.path("host-disk");
    sh(&format!("truncate -s 16M {}", file.display()));
    let device = sh(&format!("losetup -f --show {}", file.display())).trim().to_owned();
    sh(&format!("mkfs.ext4 -q {device}"));

    let mount = lab.mount(std::path::Path::new(&device), "host");
    let error = activate(&lab.dm, &over(&device, 2048)).unwrap_err();
    assert!(matches!(error, StorageError::Block(BlockError::Busy(_))), "mounted: {error}");
    mount.unmount();

    let n = 2048;
    sh(&format!("dmsetup create lab-holder --table '0 {n} linear {device} 0'"));
    let error = activate(&lab.dm, &over(&device, n)).unwrap_err();
    assert!(matches!(error, StorageError::Block(BlockError::Busy(_))), "held: {error}");
    sh("dmsetup remove lab-holder");

    let error = activate(&lab.dm, &over(&device, (16 << 11) + 8)).unwrap_err();
    assert!(matches!(error, StorageError::TooSmall { short_by: 4096, .. }), "{error}");
    let error = activate(&lab.dm, &over("/proc/self/exe", 8)).unwrap_err();
    assert!(matches!(error, StorageError::Block(BlockError::NotBlock(_))), "{error}");

    // A device of that name which somebody else made.
    sh(&format!("dmsetup create {} --table '0 8 error'", dm_name("x", "root")));
    let error = activate(&lab.dm, &over(&device, n)).unwrap_err();
    assert!(matches!(error, StorageError::Dm(DmError::NotOurs(_))), "{error}");
    assert_eq!(lab.kind(&dm_name("x", "root")), "error");
    assert_eq!(lab.dm.remove(&dm_name("x", "root")).unwrap(), Done::AlreadySo);
    sh(&format!("dmsetup remove {}", dm_name("x", "root")));

    // Now nobody has it.
    let disk = over(&device, n);
    assert_eq!(activate(&lab.dm, &disk).unwrap().done, Done::Changed);
    assert_eq!(activate(&lab.dm, &disk).unwrap().done, Done::AlreadySo);
    assert_eq!(deactivate(&lab.dm, &disk, LIMIT).unwrap(), Done::Changed);
    assert_eq!(deactivate(&lab.dm, &disk, LIMIT).unwrap(), Done::AlreadySo);
    sh(&format!("losetup -d {device}"));
    lab.finish(&[]);
}

#[test]
fn the_hosts_root_is_refused_by_name() {
    let lab = Lab::new();
    // The device under the overlay that the test machine has as its root.
    let root = sh("findmnt -rno SOURCE / | grep ^/dev || echo /dev/vda").trim().to_owned();
    let error = activate(&lab.dm, &over(&root, 2048)).unwrap_err();
    let refused = matches!(error, StorageError::HostRoot { .. } | StorageError::Block(BlockError::Busy(_)));
    assert!(refused, "{error}");
    lab.finish(&[]);
}

/// The test machine's own root is no device that a disk could be. A root on one stands for it: for whoever has that as his root.
#[test]
fn the_device_below_the_root_is_refused_as_such() {
    let lab = Lab::new();
    let (disk, active) = lab.formatted("a", "root", 64);
    let mount = lab.mount(&active.path, "a");
    let (root, device) = (mount.0.display(), active.path.display());
    let program = patchswitch_tests::programs::built("patchswitch").unwrap();
    sh(&format!(
        "cp {} {root}/patchswitch; cd {root}; mkdir -p dev proc sys run tmp etc var/lib",
        program.display()
    ));
    let define = "/patchswitch partition define web-z --standby --size 8M --own 10.9.9.9";
    let said = sh(&format!(
        "unshare -m sh -ec 'for d in dev proc sys run; do mount --rbind /$d {root}/$d; done; \
         ! chroot {root} {define} --on root={device} 2>&1'"
    ));
    assert!(said.contains("carries the host's root file system"), "{said}");
    mount.unmount();
    lab.finish(&[&disk]);
}

#[test]
fn stores_that_belong_to_something_are_refused() {
    let lab = Lab::new();
    let (disk, active) = lab.formatted("a", "root", 64);
    let clone = lab.clone_of(&disk, "b", "root");

    // On the very file system that is to be frozen: the first write to it would wait for ever.
    let mount = lab.mount(&active.path, "a");
    let inside = mount.0.join("cow");
    patchswitch::storage::disk::create_image(&inside, 1 << 11, Room::Allocated).unwrap();
    let mut on_itself = clone.clone();
    (on_itself.cow, on_itself.watched) = (Backing::Image(inside.clone()), true);
    let error = clone_disks(&lab.dm, &[on_itself]).unwrap_err();
    assert!(matches!(error.cause, StorageError::OnItself { .. }), "{error:?}");
    std::fs::remove_file(&inside).unwrap();
    mount.unmount();

    // In use.
    let held = clone.cow.attach().unwrap();
    sh(&format!("dmsetup create lab-holder --table '0 8 linear {} 0'", held.device()));
    let error = clone_disks(&lab.dm, std::slice::from_ref(&clone)).unwrap_err();
    assert!(matches!(error.cause, StorageError::Block(BlockError::Busy(_))), "{error:?}");
    sh("dmsetup remove lab-holder");
    drop(held);

    // A device that somebody has come to use: nor is what he has there taken for what a clone has left.
    let image = lab.image("taken", clone.cow.sectors().unwrap(), Room::Allocated);
    let node = sh(&format!("losetup --find --show {}", image.path().display())).trim().to_owned();
    sh(&format!("printf 'LUKS\\272\\276\\0\\1' | dd of={node} conv=notrunc,fsync status=none"));
    let taken = CloneOf { cow: Backing::Device(node.clone().into()), ..clone.clone() };
    let error = clone_disks(&lab.dm, std::slice::from_ref(&taken)).unwrap_err();
    assert!(matches!(error.cause, StorageError::CowTaken { .. }), "{error:?}");
    discard(&lab.dm, &[taken], LIMIT, WhenBusy::Refuse).unwrap();
    sh(&format!("wipefs --noheadings {node} | grep crypto_LUKS; losetup --detach {node}"));

    // The disk itself, and one store for two.
    let mut itself = clone.clone();
    (itself.cow, itself.watched) = (clone.origin.clone(), true);
    let error = clone_disks(&lab.dm, &[itself]).unwrap_err();
    assert!(
        matches!(error.cause, StorageError::Block(BlockError::Busy(_)) | StorageError::Twice(_)),
        "{error:?}"
    );

    // A clone that is still there, also when its device is gone.
    clone_disks(&lab.dm, std::slice::from_ref(&clone)).unwrap();
    let error = clone_disks(&lab.dm, std::slice::from_ref(&clone)).unwrap_err();
    assert!(matches!(error.cause, StorageError::OtherTable { .. }), "{error:?}");
    assert_eq!(lab.kind(&clone.clone), "snapshot", "the refusal has taken the clone away");
    sh(&format!("dmsetup remove {}", clone.clone));
    sh(&format!("dmsetup remove {}", clone.active));
    activate(&lab.dm, &disk).unwrap();
    let error = clone_disks(&lab.dm, std::slice::from_ref(&clone)).unwrap_err();
    assert!(matches!(error.cause, StorageError::CowNotFree { .. }), "{error:?}");

    discard(&lab.dm, &[clone], LIMIT, WhenBusy::Refuse).unwrap();
    lab.finish(&[&disk]);
}

/// A clone that is open is not torn away, unless that is asked for.
#[test]
fn a_clone_in_use_is_discarded_only_as_the_last_resort() {
    let lab = Lab::new();
    let (disk, active) = lab.formatted("a", "root", 64);
    let clones = [lab.clone_of(&disk, "b", "root")];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let mount = lab.mount(&cut.clones[0].path, "b");
    let short = std::time::Duration::from_millis(200);
    let refused = discard(&lab.dm, &clones, short, WhenBusy::Refuse).unwrap_err();
    assert!(refused.to_string().contains("still open"), "{refused}");
    assert_eq!(lab.kind(&clones[0].clone), "snapshot");

    let removed = discard(&lab.dm, &clones, short, WhenBusy::CutOff).unwrap();
    assert_eq!(removed.deferred, [clones[0].clone.clone()]);
    assert_eq!(lab.kind(&disk.name), "linear");
    // What was open has nothing below it any more.
    let file = std::fs::File::create(mount.0.join("file"));
    assert!(file.and_then(|file| (&file).write_all(&[7; 1 << 20]).and_then(|()| file.sync_all())).is_err());
    mount.unmount();
    wait_until("the device goes with its mount", LIMIT, || lab.kind(&clones[0].clone).is_empty());
    super::lab::assert_clean(&active.path);
    lab.finish(&[&disk]);
}

/// A loop device is there as long as somebody needs it, and not longer.
#[test]
fn loop_devices_go_with_their_last_user() {
    let lab = Lab::new();
    let image = lab.image("image", 2048, Room::Allocated);
    let path = image.path().to_owned();
    let shown = || sh(&format!("losetup -nO NAME,AUTOCLEAR,DIO -j {}", path.display()));
    let first = loopdev::attach(&path, 2048 * 512).unwrap();
    let second = loopdev::attach(&path, 2048 * 512).unwrap();
    assert_eq!(first.device(), second.device());
    assert_eq!(shown().lines().count(), 1, "{}", shown());
    assert!(first.is_direct().unwrap());
    assert!(shown().contains(" 1   1"), "{}", shown());

    sh(&format!("dmsetup create lab-holder --table '0 8 linear {} 0'", first.device()));
    drop((first, second));
    assert_eq!(shown().lines().count(), 1, "the table is a user");
    sh("dmsetup remove lab-holder");
    wait_until("the loop device is gone", LIMIT, || shown().is_empty());

    drop(loopdev::attach(&path, 2048 * 512).unwrap());
    wait_until("the loop device is gone", LIMIT, || shown().is_empty());
    assert_eq!(loopdev::detach(&path, 2048 * 512).unwrap(), Done::AlreadySo);
    lab.finish(&[]);
}
