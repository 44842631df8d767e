//! Disks to play with, and the kernel's own lists before and after.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use patchswitch::host::linux::dm::Dm;
use patchswitch::names::{self, Name};
use patchswitch::storage::cow::cow_sectors;
use patchswitch::storage::disk::{Active, Backing, Disk, Room, activate, create_image, deactivate};
use patchswitch::storage::snapshot::CloneOf;
use patchswitch_tests::vm;

/// Where the images lie: a disk of the test machine's, which is large enough, or a directory of the host's.
const ROOT: &str = "/run/patchswitch-lab";
const SCRATCH_LABEL: &str = "ps-scratch";
pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// What the kernel has, by programs that are not ours.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    devices: String,
    loops: String,
    mounts: String,
    nodes: String,
}

impl Seen {
    fn now() -> Self {
        Self {
            devices: sh("dmsetup ls | sort"),
            loops: sh("losetup -a | sort"),
            // Mount ids change; everything else must not.
            mounts: sh("cut -d' ' -f3- /proc/self/mountinfo | sort"),
            nodes: sh("ls /dev/mapper"),
        }
    }
}

pub(super) struct Lab {
    pub(super) dm: Dm,
    before: Seen,
}

impl Lab {
    pub(super) fn new() -> Self {
        let before = Seen::now();
        fs::create_dir_all(ROOT).unwrap();
        if let Some(disk) = scratch_disk() {
            sh(&format!("mount {disk} {ROOT}"));
        }
        Self { dm: Dm::open().unwrap(), before }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        Path::new(ROOT).join(name)
    }

    pub(super) fn image(&self, name: &str, sectors: u64, room: Room) -> Backing {
        let path = self.path(name);
        create_image(&path, sectors, room).unwrap();
        Backing::Image(path)
    }

    /// An active disk over a new image.
    pub(super) fn disk(&self, partition: &str, disk: &str, mib: u64) -> (Disk, Active) {
        let sectors = mib << 11;
        let backing = self.image(&format!("{partition}-{disk}"), sectors, Room::Sparse);
        let disk = Disk { name: dm_name(partition, disk), backing, sectors };
        let active = activate(&self.dm, &disk).unwrap();
        (disk, active)
    }

    /// An active disk with an ext4 on it.
    pub(super) fn formatted(&self, partition: &str, disk: &str, mib: u64) -> (Disk, Active) {
        let (disk, active) = self.disk(partition, disk, mib);
        sh(&format!("mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 {}", active.path.display()));
        (disk, active)
    }

    /// A clone to be made, with a store that can hold everything.
    pub(super) fn clone_of(&self, disk: &Disk, partition: &str, name: &str) -> CloneOf {
        self.clone_into(disk, partition, name, cow_sectors(disk.sectors))
    }

    /// A clone to be made, with a store of this size; it is watched if that is not enough.
    pub(super) fn clone_into(&self, disk: &Disk, partition: &str, name: &str, store: u64) -> CloneOf {
        let cow = self.image(&format!("{partition}-{name}-cow"), store, Room::Allocated);
        CloneOf {
            active: disk.name.clone(),
            clone: dm_name(partition, name),
            origin: disk.backing.clone(),
            cow,
            sectors: disk.sectors,
            watched: store < cow_sectors(disk.sectors),
        }
    }

    pub(super) fn mount(&self, device: &Path, name: &str) -> Mount {
        let at = self.path(&format!("mnt-{name}"));
        fs::create_dir_all(&at).unwrap();
        // Which one it is, mount would have to be told by libblkid, which passes our devices over.
        sh(&format!("mount -t ext4,xfs,btrfs -o nosuid,nodev {} {}", device.display(), at.display()));
        Mount(at)
    }

    /// The kind of target that a device has now, as dmsetup says.
    pub(super) fn kind(&self, name: &str) -> String {
        sh(&format!("dmsetup table {name} 2>/dev/null | cut -d' ' -f3")).trim().to_owned()
    }

    /// Takes everything down that the test has left on purpose; nothing may be left then.
    pub(super) fn finish(self, disks: &[&Disk]) {
        for disk in disks {
            deactivate(&self.dm, disk, LIMIT).unwrap();
        }
        clear_root();
        let after = Seen::now();
        assert_eq!(after, self.before, "something is left");
        // Processes of the cutter: children of this one.
        let children = fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children.trim(), "", "processes are left");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The next test wants a clean machine; what this one has left is of no interest any more.
            let script = format!(
                "for m in $(grep -o ' {ROOT}/[^ ]*' /proc/self/mountinfo | sort -r); do umount -l $m; done
                 for try in 1 2 3 4 5; do
                     for d in $(dmsetup ls | grep -Eo '^(ps|lab)-[^[:space:]]*'); do
                         dmsetup clear $d; dmsetup resume $d; dmsetup remove --force $d
                     done
                     dmsetup ls | grep -Eq '^(ps|lab)-' || break
                     sleep 1
                 done"
            );
            try_sh(&script);
            clear_root();
        }
    }
}

/// Empties the place of the images, which may or may not be a mount.
fn clear_root() {
    try_sh(&format!("rm -rf --one-file-system {ROOT}/*; umount {ROOT} || umount -l {ROOT}; rmdir {ROOT}"));
}

pub(super) struct Mount(pub(super) PathBuf);

impl Mount {
    pub(super) fn unmount(self) {
        let at = self.0.display();
        sh(&format!("umount {at} && rmdir {at}"));
    }

    /// Unmounts and keeps the directory. To remove it would also detach what is mounted on it in other namespaces
    /// (`detach_mounts`, `fs/namespace.c`).
    pub(super) fn unmount_here_only(self) {
        sh(&format!("umount {}", self.0.display()));
    }
}

pub(super) fn dm_name(partition: &str, disk: &str) -> String {
    names::dm_disk(&Name::new(partition).unwrap(), &Name::new(disk).unwrap())
}

/// The test machine's disk, made ready: what another test has left on it goes. None on a host, where the images lie
/// in a directory.
pub(crate) fn scratch_disk() -> Option<String> {
    let disk = vm::scratch_disk().unwrap()?.display().to_string();
    if try_sh(&format!("blkid -o value -s LABEL {disk}")).trim() != SCRATCH_LABEL {
        sh(&format!("mkfs.ext4 -q -F -L {SCRATCH_LABEL} {disk}"));
    }
    Some(disk)
}

/// Runs a script that has to succeed.
#[track_caller]
pub(super) fn sh(script: &str) -> String {
    let output = shell(script);
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a script that may fail.
pub(super) fn try_sh(script: &str) -> String {
    String::from_utf8_lossy(&shell(&format!("set +e; {script}")).stdout).into_owned()
}

#[expect(clippy::disallowed_methods, reason = "looks at the kernel without patchswitch's own code")]
fn shell(script: &str) -> std::process::Output {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-ec", script]).env("DM_DISABLE_UDEV", "1").output().unwrap()
}

/// Names and digests of all files below a directory.
pub(super) fn digests(root: &Path) -> String {
    sh(&format!("cd {} && find . -xdev -type f -exec md5sum {{}} + | sort -k2", root.display()))
}

/// The digest of a whole device, read past the page cache. The cheapest one: the processor is emulated.
pub(super) fn device_digest(path: &Path) -> String {
    sh(&format!("dd if={} bs=1M iflag=direct status=none | md5sum", path.display()))
}

/// A file system is clean, by its own checker.
#[track_caller]
pub(super) fn assert_clean(device: &Path) {
    sh(&format!("e2fsck -fn {} >/dev/null 2>&1", device.display()));
}

/// Waits until something is so.
#[track_caller]
pub(super) fn wait_until(what: &str, limit: Duration, mut is_so: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}

/// Writes numbered records to files in turn, each on disk before the next is begun.
pub(super) struct Writer {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Writer {
    pub(super) fn start(folders: &[&Path]) -> Self {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let open =
            |folder: &&Path| File::options().create(true).append(true).open(folder.join("records")).unwrap();
        let mut files: Vec<File> = folders.iter().map(open).collect();
        let (stopped, count) = (stop.clone(), acknowledged.clone());
        let thread = std::thread::spawn(move || {
            let turns = files.len();
            for record in 0u64.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let file = &mut files[record as usize % turns];
                file.write_all(&record.to_le_bytes()).unwrap();
                file.sync_data().unwrap();
                count.store(record + 1, Ordering::SeqCst);
            }
        });
        Self { stop, acknowledged, thread }
    }

    /// How many records are certainly on disk.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    pub(super) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.acknowledged.load(Ordering::SeqCst)
    }
}

/// The records that are in the folders, in turn: how many there are from the first without a gap. There must be no
/// others, in no folder: then what the folders hold is what they held together at one instant.
#[track_caller]
pub(super) fn records(folders: &[&Path]) -> u64 {
    let contents: Vec<Vec<u8>> =
        folders.iter().map(|folder| fs::read(folder.join("records")).unwrap()).collect();
    let mut places: Vec<_> = contents.iter().map(|content| content.chunks(8)).collect();
    let turns = places.len();
    let is_last = |count: &u64| match places[*count as usize % turns].next() {
        None => true,
        Some(record) => {
            assert_eq!(record, count.to_le_bytes(), "record {count}");
            false
        }
    };
    let count = (0u64..).find(is_last).unwrap();
    for (folder, mut place) in folders.iter().zip(places) {
        assert_eq!(place.next(), None, "{} has a record after the gap at {count}", folder.display());
    }
    count
}
