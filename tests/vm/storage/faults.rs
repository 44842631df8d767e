//! Devices that fail below a disk or below a store: who serves sees what he would see without a clone, and no more.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use patchswitch::storage::StorageError;
use patchswitch::storage::copy::{self, CopyOf};
use patchswitch::storage::cow::{HIGH_WATER, Watch, cow_sectors, status, watch};
use patchswitch::storage::disk::{Active, Backing, Disk, Room, activate};
use patchswitch::storage::merge::{Patience, commit, resume_merge};
use patchswitch::storage::mirror;
use patchswitch::storage::snapshot::{CloneOf, WhenBusy, clone_disks, discard};

use patchswitch_tests::programs;

use super::lab::{LIMIT, Lab, device_digest, dm_name, sh, wait_until};

const DISK: u64 = 32 << 11;
const MIB: u64 = 2048;
const PATIENCE: Patience = Patience { close: LIMIT, busy: WhenBusy::Refuse, merge: LIMIT };

/// A device that does as it is told.
struct Weak {
    name: &'static str,
    sectors: u64,
    node: String,
    image: Backing,
}

impl Weak {
    fn new(lab: &Lab, name: &'static str, sectors: u64) -> Self {
        let image = lab.image(name, sectors, Room::Allocated);
        let node = sh(&format!("losetup --find --show {}", image.path().display())).trim().to_owned();
        sh(&format!("dmsetup create lab-{name} --table '0 {sectors} linear {node} 0'"));
        Self { name, sectors, node, image }
    }

    fn backing(&self) -> Backing {
        Backing::Device(format!("/dev/mapper/lab-{}", self.name).into())
    }

    fn becomes(&self, table: &str) {
        sh(&format!(
            "printf '%s\\n' '{table}' | tr ';' '\\n' | dmsetup load lab-{0}; dmsetup resume --nolockfs lab-{0}",
            self.name
        ));
    }

    /// Everything works, as at first.
    fn heals(&self) {
        self.becomes(&format!("0 {} linear {} 0", self.sectors, self.node));
    }

    /// Sectors cannot be read and not be written.
    fn breaks(&self, from: u64, sectors: u64) {
        let Self { node, sectors: all, .. } = self;
        let end = from + sectors;
        let before = if from == 0 { String::new() } else { format!("0 {from} linear {node} 0;") };
        let after =
            if end == *all { String::new() } else { format!(";{end} {} linear {node} {end}", all - end) };
        self.becomes(&format!("{before}{from} {sectors} error{after}"));
    }

    fn remove(self) {
        sh(&format!("dmsetup remove lab-{}; losetup --detach {}", self.name, self.node));
        std::fs::remove_file(self.image.path()).unwrap();
    }
}

fn disk(lab: &Lab, backing: Backing) -> (Disk, Active) {
    let disk = Disk { name: dm_name("a", "root"), backing, sectors: DISK };
    let active = activate(&lab.dm, &disk).unwrap();
    sh(&format!("dd if=/dev/urandom of={} bs=1M count=32 oflag=direct status=none", active.path.display()));
    (disk, active)
}

fn clone_of(disk: &Disk, cow: Backing) -> CloneOf {
    CloneOf {
        active: disk.name.clone(),
        clone: dm_name("b", "root"),
        origin: disk.backing.clone(),
        cow,
        sectors: DISK,
        watched: false,
    }
}

/// Writes a page past the cache.
fn write(device: &Path, sector: u64, byte: u8) -> std::io::Result<()> {
    let file = File::options().write(true).custom_flags(libc::O_DIRECT | libc::O_SYNC).open(device)?;
    let bytes = vec![byte; 8192];
    let start = bytes.as_ptr().align_offset(4096);
    file.write_all_at(&bytes[start..start + 4096], sector * 512)
}

fn level(lab: &Lab, of: &CloneOf) -> Watch {
    watch(status(&lab.dm, &of.clone).unwrap(), of.sectors, HIGH_WATER)
}

/// The disk below the one that serves has a place that cannot be read any more, so that what was there cannot be kept for the
/// clone.
#[test]
fn a_disk_that_cannot_be_read_loses_its_clone_and_its_writer_sees_only_his_own_error() {
    let lab = Lab::new();
    let base = Weak::new(&lab, "base", DISK);
    let (disk, active) = disk(&lab, base.backing());
    let of = clone_of(&disk, lab.image("store", cow_sectors(DISK), Room::Allocated));
    clone_disks(&lab.dm, std::slice::from_ref(&of)).unwrap();
    write(&active.path, 0, 1).unwrap();
    assert_eq!(level(&lab, &of), Watch::Ample);

    base.breaks(8 * MIB, MIB);
    let error = write(&active.path, 8 * MIB, 2).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(level(&lab, &of), Watch::Lost);
    // Everywhere else he writes as ever.
    write(&active.path, 16 * MIB, 3).unwrap();
    let refused = commit(&lab.dm, std::slice::from_ref(&of), PATIENCE, &mut |_| ()).unwrap_err();
    assert!(matches!(refused.0.as_slice(), [StorageError::CloneLost { .. }]), "{refused}");

    base.heals();
    write(&active.path, 8 * MIB, 4).unwrap();
    assert_eq!(level(&lab, &of), Watch::Lost, "what is lost stays lost");
    discard(&lab.dm, std::slice::from_ref(&of), LIMIT, WhenBusy::Refuse).unwrap();
    let cut = clone_disks(&lab.dm, std::slice::from_ref(&of)).unwrap();
    assert_eq!(device_digest(&cut.clones[0].path), device_digest(&active.path));
    discard(&lab.dm, std::slice::from_ref(&of), LIMIT, WhenBusy::Refuse).unwrap();
    patchswitch::storage::disk::deactivate(&lab.dm, &disk, LIMIT).unwrap();
    base.remove();
    lab.finish(&[]);
}

/// A store that takes no more writes: the clone is lost, and who serves does not notice.
#[test]
fn a_store_that_cannot_be_written_loses_the_clone_alone() {
    let lab = Lab::new();
    let (disk, active) = disk(&lab, lab.image("base", DISK, Room::Sparse));
    let store = Weak::new(&lab, "store", cow_sectors(DISK));
    let of = clone_of(&disk, store.backing());
    clone_disks(&lab.dm, std::slice::from_ref(&of)).unwrap();
    write(&active.path, 0, 1).unwrap();

    // Reads go on, writes fail, for an hour.
    store.becomes(&format!("0 {} flakey {} 0 0 3600 1 error_writes", store.sectors, store.node));
    for place in 1..8 {
        write(&active.path, place * MIB, 2).unwrap();
    }
    assert_eq!(level(&lab, &of), Watch::Lost);
    store.heals();
    let digest = device_digest(&active.path);
    discard(&lab.dm, std::slice::from_ref(&of), LIMIT, WhenBusy::Refuse).unwrap();
    assert_eq!(device_digest(&active.path), digest);
    store_is_free(&lab, &of);
    store.remove();
    lab.finish(&[&disk]);
}

/// The next clone is a good one.
fn store_is_free(lab: &Lab, of: &CloneOf) {
    let cut = clone_disks(&lab.dm, std::slice::from_ref(of)).unwrap();
    assert!(cut.clones[0].path.exists());
    discard(&lab.dm, std::slice::from_ref(of), LIMIT, WhenBusy::Refuse).unwrap();
}

/// A store that cannot be read in the middle of the commit: the merge stops, the clone has what it had, and once the device
/// is well again the commit is gone on with.
#[test]
fn a_merge_that_cannot_read_its_store_stops_and_is_gone_on_with() {
    let lab = Lab::new();
    let (disk, active) = disk(&lab, lab.image("base", DISK, Room::Sparse));
    let store = Weak::new(&lab, "store", cow_sectors(DISK));
    let of = clone_of(&disk, store.backing());
    let cut = clone_disks(&lab.dm, std::slice::from_ref(&of)).unwrap();
    let clone = &cut.clones[0].path;
    sh(&format!("dd if=/dev/urandom of={} bs=1M count=12 seek=4 oflag=direct status=none", clone.display()));
    let digest = device_digest(clone);
    assert_ne!(digest, device_digest(&active.path));

    store.breaks(6 * MIB, MIB);
    let failed = commit(&lab.dm, std::slice::from_ref(&of), PATIENCE, &mut |_| ()).unwrap_err();
    assert!(matches!(failed.0.as_slice(), [StorageError::MergeFailed { .. }]), "{failed}");
    // Not better by itself.
    let failed = resume_merge(&lab.dm, std::slice::from_ref(&of), PATIENCE, &mut |_| ()).unwrap_err();
    assert!(matches!(failed.0.as_slice(), [StorageError::MergeFailed { .. }]), "{failed}");

    store.heals();
    assert_eq!(device_digest(clone), digest);
    let done = resume_merge(&lab.dm, std::slice::from_ref(&of), PATIENCE, &mut |_| ()).unwrap();
    assert_eq!(device_digest(&lab.dm.node(&of.clone).unwrap()), digest);
    assert_eq!(lab.kind(&of.clone), "linear");
    store.remove();
    lab.finish(&[&done.disks[0]]);
}

/// A copy that cannot be written: writes to the disk wait until its mirror is taken away, and are done then. Whoever mirrors sees to
/// that, and somebody else when he was killed.
#[test]
fn what_a_mirror_holds_back_is_written_when_it_is_gone() {
    for killed in [false, true] {
        mirror_that_holds_back(killed);
    }
}

fn mirror_that_holds_back(killed: bool) {
    let lab = Lab::new();
    let (disk, active) = disk(&lab, lab.image("a-root", DISK, Room::Allocated));
    let weak = Weak::new(&lab, "weak", DISK);
    let of = CopyOf {
        active: disk.name.clone(),
        copy: dm_name("b", "root"),
        origin: disk.backing.clone(),
        target: weak.backing(),
        sectors: DISK,
    };
    let mirror = mirror::begin(&lab.dm, std::slice::from_ref(&of)).unwrap();
    mirror.wait(LIMIT, |_| Ok(())).unwrap();
    let mut mirror = Some(mirror);
    if killed {
        drop(mirror.take());
    }
    weak.breaks(0, DISK);
    let path = active.path.display();
    let write = format!(
        "tr '\\0' x < /dev/zero | dd of={path} bs=64k seek=80 count=1 iflag=fullblock oflag=direct status=none"
    );
    let mut writer = programs::spawn(&["/bin/sh", "-ec", &write], None).unwrap();
    if killed {
        wait_until("the mirror says so", LIMIT, || {
            lab.dm.status(&disk.name).unwrap()[0].params.contains("AD")
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(!writer.has_ended(), "the write did not wait");
        let _ = copy::abandon(&lab.dm, &of, LIMIT).unwrap();
    }
    assert!(writer.wait(LIMIT).unwrap().success(), "the write failed with the mirror");
    assert_eq!(lab.kind(&disk.name), "linear");
    if let Some(mirror) = mirror {
        let refused = mirror.split().unwrap_err();
        assert!(matches!(refused.cause, StorageError::MirrorBroken { .. }), "{refused}");
        assert!(refused.undo.is_empty(), "{refused}");
    }
    let found =
        sh(&format!("dd if={path} bs=64k skip=80 count=1 iflag=direct status=none | tr -d x | wc -c"));
    assert_eq!(found.trim(), "0");
    weak.remove();
    lab.finish(&[&disk]);
}
