//! What a running udev, blkid and LVM make of disks and clones: nothing by which anybody could take the one for the other.

use std::path::Path;
use std::time::Duration;

use patchswitch::host::linux::block::DeviceNumber;
use patchswitch::storage::disk::Room;
use patchswitch::storage::snapshot::{WhenBusy, clone_disks, discard};
use patchswitch_tests::programs;

use super::lab::{self, LIMIT, Lab, sh};

/// The devices to which links below `/dev/disk` lead, by their kernel's names.
fn linked() -> String {
    sh("udevadm settle --timeout=60; find /dev/disk -type l -exec readlink -f {} + 2>/dev/null || :")
}

#[test]
fn others_are_found_and_disks_and_clones_are_not() {
    let lab = Lab::new();
    let log = lab.path("udev-log");
    let udev = programs::spawn(&["sh", "-c", "exec /lib/systemd/systemd-udevd"], Some(&log)).unwrap();
    lab::wait_until("udev is there", LIMIT, || Path::new("/run/udev/control").exists());
    sh("udevadm control --ping --timeout=60");
    let (disk, active) = lab.formatted("a", "root", 64);
    let clone = lab.clone_of(&disk, "b", "root");
    let cut = clone_disks(&lab.dm, std::slice::from_ref(&clone)).unwrap();
    // A device that somebody else has made, to see that udev is at work.
    let other = lab.image("other", 64 << 11, Room::Sparse);
    let node = sh(&format!("losetup --find --show {}", other.path().display()));
    let node = node.trim();
    sh(&format!("mkfs.ext4 -q -F {node}; dmsetup create lab-other --table '0 {} linear {node} 0'", 64 << 11));
    // Whoever has had a device open for writing makes udev look at it again.
    sh(&format!(": >> {}; : >> {}", active.path.display(), cut.clones[0].path.display()));
    let other_device = DeviceNumber::of_path(Path::new("/dev/mapper/lab-other")).unwrap();
    let (links, others) = (linked(), other_device.node().unwrap().display().to_string());
    for device in [active.device, cut.clones[0].device] {
        let node = device.node().unwrap();
        assert!(!links.lines().any(|link| link == node.to_str().unwrap()), "{links}");
    }
    assert!(links.lines().any(|link| link == others), "{links} has no {others}");
    sh("udevadm settle --timeout=60; udevadm control --exit");
    assert!(udev.wait(Duration::from_secs(30)).unwrap().success());
    sh(&format!("rm -rf /run/udev /dev/disk {}", log.display()));

    // Nor are they found by those who read all devices. LVM shows what is no volume only beside one.
    let volume = lab.image("volume", 64 << 11, Room::Sparse);
    let held = sh(&format!("losetup --find --show {}", volume.path().display()));
    sh(&format!("pvcreate --quiet {}", held.trim()));
    for command in ["blkid -c /dev/null", "pvs --all", "lvmdiskscan"] {
        let all = sh(command);
        let found = |names: [&str; 2]| all.split([' ', ':', '\n']).any(|word| names.contains(&word));
        assert!(found(["/dev/mapper/lab-other", &others]), "{command}: {all}");
        for (name, device) in [(&disk.name, active.device), (&clone.clone, cut.clones[0].device)] {
            let node = device.node().unwrap().display().to_string();
            assert!(!found([&format!("/dev/mapper/{name}"), &node]), "{command}: {all}");
        }
    }
    sh(&format!("dmsetup remove lab-other; losetup --detach {node} {}", held.trim()));
    sh(&format!("rm {} {}", other.path().display(), volume.path().display()));
    discard(&lab.dm, std::slice::from_ref(&clone), LIMIT, WhenBusy::Refuse).unwrap();
    lab.finish(&[&disk]);
}
