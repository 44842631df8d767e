//! Devices of which a killed command has left the beginning: they are there, their table waits and holds what it names, and
//! none is in use.

use patchswitch::host::linux::dm::UUID_PREFIX;
use patchswitch::storage::disk::{Backing, Disk, Room, activate};
use patchswitch::storage::snapshot::{
    CloneOf, WhenBusy, clone_closed, discard, free_cow, reopen, unclone_closed,
};
use patchswitch::storage::table::CHUNK;
use patchswitch::storage::{cow, disk::deactivate};

use super::lab::{LIMIT, Lab, dm_name, sh};

/// A device of ours whose table has not been resumed.
fn begin(name: &str, table: &str) {
    sh(&format!(
        "dmsetup create {name} -u {UUID_PREFIX}{name} --notable && dmsetup load {name} --table '{table}'"
    ));
}

/// The number of the loop device of an image, `MAJOR:MINOR`.
fn number(backing: &Backing) -> String {
    let path = backing.path().display();
    sh(&format!("losetup -n -O MAJ:MIN -j {path}")).trim().to_owned()
}

#[test]
fn a_disk_that_was_begun_is_activated() {
    let lab = Lab::new();
    let sectors = 16 << 11;
    let backing = lab.image("a-data", sectors, Room::Sparse);
    let disk = Disk { name: dm_name("a", "data"), backing, sectors };
    // What it holds goes with the test.
    let held = disk.backing.attach().unwrap();
    begin(&disk.name, &format!("0 {sectors} linear {} 0", number(&disk.backing)));
    activate(&lab.dm, &disk).unwrap();
    assert_eq!(lab.kind(&disk.name), "linear");
    drop(held);
    lab.finish(&[&disk]);
}

/// Of a disk that goes over: whatever is there is taken away, or made again.
#[test]
fn a_move_that_was_begun_is_taken_back_and_made_again() {
    let lab = Lab::new();
    let (disk, _) = lab.formatted("a", "data", 16);
    deactivate(&lab.dm, &disk, LIMIT).unwrap();
    let clone = CloneOf {
        active: dm_name("b", "data"),
        clone: disk.name.clone(),
        cow: lab.image("b-data", cow::cow_sectors(disk.sectors), Room::Allocated),
        origin: disk.backing.clone(),
        sectors: disk.sectors,
        watched: false,
    };
    let both = [&clone.clone, &clone.active];
    let kinds = || both.map(|name| lab.kind(name));
    let held = [clone.origin.attach().unwrap(), clone.cow.attach().unwrap()];
    let (origin, store) = (number(&clone.origin), number(&clone.cow));
    let tables = [
        format!("0 {} snapshot {origin} {store} PO {CHUNK}", disk.sectors),
        format!("0 {} snapshot-origin {origin}", disk.sectors),
    ];
    // So many of the two were made: none, one, both; and the last of them not to its end.
    for made in 0..2 {
        for resumed in 0..=made {
            for (at, (name, table)) in both.iter().zip(&tables).enumerate().take(made + 1) {
                begin(name, table);
                if at < resumed {
                    sh(&format!("dmsetup resume {name}"));
                }
            }
            unclone_closed(&lab.dm, std::slice::from_ref(&clone), LIMIT).unwrap();
            assert_eq!(sh("dmsetup ls").matches("data").count(), 0, "{made} {resumed}");
        }
    }
    // A table that waits has written into its store already.
    free_cow(&clone.cow).unwrap();
    begin(both[1], &tables[1]);
    clone_closed(&lab.dm, std::slice::from_ref(&clone)).unwrap();
    assert_eq!(kinds(), ["snapshot", "snapshot-origin"]);
    // After a boot.
    sh(&format!("dmsetup remove {} && dmsetup remove {}", both[1], both[0]));
    begin(both[0], &tables[0]);
    begin(both[1], &tables[1]);
    reopen(&lab.dm, std::slice::from_ref(&clone)).unwrap();
    assert_eq!(kinds(), ["snapshot", "snapshot-origin"]);
    unclone_closed(&lab.dm, std::slice::from_ref(&clone), LIMIT).unwrap();
    // Whoever discards a clone meets it as well.
    begin(both[1], &tables[1]);
    discard(&lab.dm, std::slice::from_ref(&clone), LIMIT, WhenBusy::Refuse).unwrap();
    assert_eq!(sh("dmsetup ls").matches("data").count(), 0);
    drop(held);
    clone.cow.detach().unwrap();
    lab.finish(&[&disk]);
}
