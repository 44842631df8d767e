//! The write-loss meter on real devices.

use patchswitch::storage::StorageError;
use patchswitch::storage::disk::{activate, deactivate};
use patchswitch::storage::meter::{Limits, Mark, MayLose, changed_since, since};
use patchswitch::storage::snapshot::{WhenBusy, clone_disks, discard};

use super::lab::{LIMIT, Lab, sh};

/// k sectors written on either side are k sectors, not one more.
#[test]
fn sectors_are_counted_exactly_on_both_sides() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", 32);
    let write = |path: &std::path::Path, sectors: u64, seek: u64| {
        let path = path.display();
        sh(&format!(
            "dd if=/dev/urandom of={path} bs=512 count={sectors} seek={seek} oflag=direct status=none"
        ));
    };
    write(&active.path, 77, 0);
    let clones = [lab.clone_of(&disk, "b", "root")];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let clone = &cut.clones[0];
    let flip = Mark::now(clone.device).unwrap();
    assert_eq!(since(&cut.marks[0]).unwrap().sectors, 0, "what was before the cut is not lost");
    write(&active.path, 123, 5);
    write(&clone.path, 45, 1000);
    assert_eq!(since(&cut.marks[0]).unwrap().sectors, 123);
    assert_eq!(since(&flip).unwrap().sectors, 45);

    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    // The change of the table does not begin the count anew.
    write(&active.path, 2, 9);
    assert_eq!(since(&cut.marks[0]).unwrap().sectors, 125);
    // A device made anew does, and the mark knows.
    deactivate(&lab.dm, &disk, LIMIT).unwrap();
    activate(&lab.dm, &disk).unwrap();
    let error = since(&cut.marks[0]).unwrap_err();
    assert!(matches!(error, StorageError::AnotherDevice(_)), "{error}");
    lab.finish(&[&disk]);
}

/// Each subvolume of a btrfs looks like another device, and is a part of the disk all the same.
#[test]
fn files_in_subvolumes_are_seen() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", 160);
    sh(&format!("mkfs.btrfs -q -f {}", active.path.display()));
    let mount = lab.mount(&active.path, "a");
    let at = mount.0.display().to_string();
    sh(&format!("btrfs -q subvolume create {at}/sub; btrfs -q subvolume create {at}/sub/below; sleep 0.1"));
    let now = std::time::SystemTime::now();
    sh(&format!("sleep 0.1; echo new > {at}/sub/below/file"));
    let none = MayLose::parse([]).unwrap();
    let changes =
        changed_since(&mount.0, std::path::Path::new("/srv"), now, &none, Limits::default()).unwrap();
    let paths: Vec<_> = changes.undeclared.iter().map(|file| file.path.to_str().unwrap()).collect();
    assert!(paths.contains(&"/srv/sub/below/file"), "{paths:?}");
    mount.unmount();
    lab.finish(&[&disk]);
}

/// What was flushed by the cut itself is in the clone, so it is not counted as lost.
#[test]
fn what_the_cut_writes_out_is_not_counted_as_lost() {
    let lab = Lab::new();
    let (disk, active) = lab.formatted("a", "root", 32);
    let mount = lab.mount(&active.path, "a");
    sh(&format!("dd if=/dev/urandom of={}/dirty bs=1M count=4 status=none", mount.0.display()));
    let clones = [lab.clone_of(&disk, "b", "root")];
    let cut = clone_disks(&lab.dm, &clones).unwrap();
    let lost = since(&cut.marks[0]).unwrap().sectors;
    assert!(lost < 1 << 11, "{lost} sectors are counted as lost, and 4 MiB of them are in the clone");

    // Files: changed before the cut or after it, in the declared place or not.
    std::thread::sleep(std::time::Duration::from_millis(50));
    let at = mount.0.display();
    sh(&format!("mkdir -p {at}/var/log; echo x > {at}/var/log/access.log; echo x > {at}/order; sync"));
    let may_lose = MayLose::parse(["/var/log"]).unwrap();
    let changes =
        changed_since(&mount.0, std::path::Path::new("/"), cut.before, &may_lose, Limits::default()).unwrap();
    let names = |files: &[patchswitch::storage::meter::ChangedFile]| {
        let mut names: Vec<_> = files.iter().map(|file| file.path.display().to_string()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&changes.undeclared), ["/", "/order"]);
    assert_eq!(names(&changes.declared), ["/var", "/var/log", "/var/log/access.log"]);
    assert!(since(&cut.marks[0]).unwrap().sectors > lost);
    mount.unmount();
    discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
    lab.finish(&[&disk]);
}
