//! The commit's merge, ended by a power cut after each of its flushes: whatever had reached the disk by then, what the next
//! start makes of it is the clone, whole and clean.
//!
//! Disk and store lie on one device, whose writes are recorded by dm-log-writes in their order. Afterwards they are put onto
//! a copy of what was there before, one after the other, and at each flush (and at each write that was one by itself) the
//! merge is gone on with from there, as `up` does it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use patchswitch::storage::cow::cow_sectors;
use patchswitch::storage::disk::{Backing, Disk, Room, activate, deactivate};
use patchswitch::storage::merge::{Patience, commit, resume_merge};
use patchswitch::storage::snapshot::{CloneOf, WhenBusy, clone_disks};

use super::lab::{LIMIT, Lab, assert_clean, device_digest, dm_name, sh};

const DISK: u64 = 16 << 11;
const LOG_MIB: u64 = 192;
/// Of the driver's entries (`drivers/md/dm-log-writes.c`).
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const PATIENCE: Patience = Patience { close: LIMIT, busy: WhenBusy::Refuse, merge: LIMIT };

/// Makes disk and store out of one image.
fn slices(image: &Path) {
    let (store, whole) = (cow_sectors(DISK), DISK + cow_sectors(DISK));
    let node = sh(&format!("losetup --find --show --direct-io=on {}", image.display()));
    sh(&format!(
        "dmsetup create lab-logged --table '0 {whole} linear {} 0'
         dmsetup create lab-origin --table '0 {DISK} linear /dev/mapper/lab-logged 0'
         dmsetup create lab-store --table '0 {store} linear /dev/mapper/lab-logged {DISK}'",
        node.trim()
    ));
}

fn no_slices(image: &Path) {
    sh(&format!(
        "dmsetup remove lab-origin; dmsetup remove lab-store; dmsetup remove lab-logged
         losetup --detach $(losetup --noheadings --output NAME --associated {})",
        image.display()
    ));
}

/// An entry of a log: flags, where its data go, and where they are.
struct Entry {
    flags: u64,
    to: u64,
    from: u64,
    length: u64,
}

/// Reads a log with nobody's code but this.
fn entries(log: &File) -> Vec<Entry> {
    let number = |at: u64| {
        let mut bytes = [0; 8];
        log.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    };
    let (count, mut at) = (number(16), 512);
    let mut all = Vec::new();
    for _ in 0..count {
        let (sector, sectors, flags, data) = (number(at), number(at + 8), number(at + 16), number(at + 24));
        assert_eq!(flags & !0x1f, 0, "entry {} is none", all.len());
        let length = if flags & DISCARD == 0 { sectors * 512 } else { 0 };
        all.push(Entry { flags, to: sector * 512, from: at + 512, length });
        at += 512 + length + if flags & 8 == 0 { 0 } else { data.div_ceil(512) * 512 };
    }
    all
}

fn replay(log: &File, entry: &Entry, image: &File) {
    let mut data = vec![0; usize::try_from(entry.length).unwrap()];
    log.read_exact_at(&mut data, entry.from).unwrap();
    image.write_all_at(&data, entry.to).unwrap();
}

/// A clone that differs from its disk, both written since the cut; its digest.
fn differing(lab: &Lab) -> (CloneOf, String) {
    let device = |name: &str| Backing::Device(format!("/dev/mapper/lab-{name}").into());
    let disk = Disk { name: dm_name("a", "root"), backing: device("origin"), sectors: DISK };
    let active = activate(&lab.dm, &disk).unwrap();
    let write = |device: &Path, name: &str, what: &str| {
        let mount = lab.mount(device, name);
        sh(&format!("for n in 1 2 3 4 5 6 7 8; do {what} > {0}/$n; done; sync -f {0}", mount.0.display()));
        mount.unmount();
    };
    sh(&format!("mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 {}", active.path.display()));
    write(&active.path, "a", "head -c 400000 /dev/urandom");
    let of = CloneOf {
        active: disk.name.clone(),
        clone: dm_name("b", "root"),
        origin: disk.backing,
        cow: device("store"),
        sectors: DISK,
        watched: false,
    };
    let cut = clone_disks(&lab.dm, std::slice::from_ref(&of)).unwrap();
    write(&cut.clones[0].path, "b", "head -c 300000 /dev/urandom");
    write(&active.path, "a", "head -c 200000 /dev/zero");
    let digest = device_digest(&cut.clones[0].path);
    assert_ne!(digest, device_digest(&active.path));
    (of, digest)
}

#[test]
fn a_merge_that_ends_at_any_flush_is_gone_on_with() {
    let lab = Lab::new();
    let whole = DISK + cow_sectors(DISK);
    let (Backing::Image(base), Backing::Image(log)) =
        (lab.image("base", whole, Room::Sparse), lab.image("log", LOG_MIB << 11, Room::Sparse))
    else {
        unreachable!()
    };
    slices(&base);
    let (of, digest) = differing(&lab);
    let state = lab.path("state");
    sh(&format!("sync; cp --sparse=always {} {}", base.display(), state.display()));
    let under = sh("dmsetup deps -o devname lab-logged | sed 's/.*(\\(.*\\)).*/\\1/'");
    let node = sh(&format!("losetup --find --show {}", log.display()));
    sh(&format!(
        "dmsetup load lab-logged --table '0 {whole} log-writes /dev/{} {}'; dmsetup resume --nolockfs lab-logged",
        under.trim(),
        node.trim()
    ));
    commit(&lab.dm, std::slice::from_ref(&of), PATIENCE, &mut |_| ()).unwrap();
    let merged = Disk { name: of.clone.clone(), backing: of.origin.clone(), sectors: DISK };
    deactivate(&lab.dm, &merged, LIMIT).unwrap();
    no_slices(&base);
    sh(&format!("losetup --detach {}", node.trim()));

    let (log_file, image) = (File::open(&log).unwrap(), File::options().write(true).open(&state).unwrap());
    let (all, copy) = (entries(&log_file), lab.path("copy"));
    let mut marks = 0;
    for (number, entry) in all.iter().enumerate() {
        replay(&log_file, entry, &image);
        if entry.flags & (FLUSH | FUA) == 0 {
            continue;
        }
        marks += 1;
        sh(&format!("cp --sparse=always {} {}", state.display(), copy.display()));
        slices(&copy);
        let done = resume_merge(&lab.dm, std::slice::from_ref(&of), PATIENCE, &mut |_| ());
        done.unwrap_or_else(|error| panic!("at entry {number} of {}: {error}", all.len()));
        let path = lab.dm.node(&of.clone).unwrap();
        assert_eq!(device_digest(&path), digest, "at entry {number} of {}", all.len());
        assert_clean(&path);
        deactivate(&lab.dm, &merged, LIMIT).unwrap();
        no_slices(&copy);
    }
    println!("{marks} flushes among {} entries", all.len());
    assert!(marks >= 5, "{marks} flushes prove little");
    for file in [&base, &log, &state, &copy] {
        fs::remove_file(file).unwrap();
    }
    lab.finish(&[]);
}
