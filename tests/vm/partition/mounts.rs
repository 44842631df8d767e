//! The agent's mount namespace keeps a partition's disk from being kept busy by others.

use std::fs;
use std::path::{Path, PathBuf};

use patchswitch::host::linux::filesystem::Kind;
use patchswitch::host::linux::mountns::MountNamespace;
use patchswitch::host::linux::programs::{Program, Run};
use patchswitch::partition::define;
use patchswitch_tests::programs::{run, spawn};

const NAME: &str = "pst-mounts";

struct Disk {
    path: PathBuf,
    namespace: PathBuf,
}

impl Disk {
    fn new() -> Self {
        let disk = patchswitch_tests::vm::scratch_disk().unwrap().unwrap();
        let table = format!("0 {} linear {} 0", (64 << 20) / 512, disk.display());
        run(&["dmsetup", "create", NAME, "--table", &table]).unwrap();
        let number = run(&["dmsetup", "info", "-c", "--noheadings", "-o", "minor", NAME]).unwrap();
        let path = PathBuf::from(format!("/dev/dm-{}", number.trim()));
        define::make_file_system(Kind::Ext4, &path).unwrap();
        Self { path, namespace: PathBuf::from("/run/patchswitch-test-mnt") }
    }

    fn open_count(&self) -> String {
        run(&["dmsetup", "info", "-c", "--noheadings", "-o", "open", NAME]).unwrap().trim().to_owned()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(MountNamespace::remove(&self.namespace));
        drop(run(&["dmsetup", "remove", NAME]));
    }
}

#[test]
fn a_disk_is_free_after_its_umount_whoever_unshared_meanwhile() {
    let disk = Disk::new();
    let target = Path::new("/run/patchswitch-test-root");
    let mounts = MountNamespace::open(&disk.namespace).unwrap();
    assert!(mounts.run(|inside| inside.mount(&disk.path, target, false)).unwrap().unwrap());
    assert!(!mounts.run(|inside| inside.mount(&disk.path, target, false)).unwrap().unwrap(), "so already");
    assert_eq!(disk.open_count(), "1");
    run(&["ip", "netns", "add", "pst-holder"]).unwrap();
    let holders = [
        spawn(&["ip", "netns", "exec", "pst-holder", "sleep", "600"], None).unwrap(),
        spawn(&["unshare", "--mount", "sleep", "600"], None).unwrap(),
        spawn(&["unshare", "--mount", "--propagation", "private", "sleep", "600"], None).unwrap(),
    ];
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert!(mounts.run(|inside| inside.unmount(target)).unwrap().unwrap());
    assert_eq!(disk.open_count(), "0", "somebody has a copy of the mount");
    assert!(!mounts.run(|inside| inside.unmount(target)).unwrap().unwrap(), "so already");
    drop(holders);
    run(&["ip", "netns", "delete", "pst-holder"]).unwrap();
}

/// The test above proves something only if it fails for a mount that everybody sees.
#[test]
fn the_same_umount_in_the_host_s_namespace_leaves_the_disk_busy() {
    let disk = Disk::new();
    let target = Path::new("/run/patchswitch-test-root");
    fs::create_dir_all(target).unwrap();
    let path = disk.path.to_str().unwrap();
    run(&["mount", path, target.to_str().unwrap()]).unwrap();
    let holder = spawn(&["unshare", "--mount", "--propagation", "private", "sleep", "600"], None).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    run(&["umount", target.to_str().unwrap()]).unwrap();
    assert_eq!(disk.open_count(), "1");
    drop(holder);
    fs::remove_dir(target).unwrap();
}

#[test]
fn a_mount_inside_is_guarded_shared_by_all_visitors_and_hidden_from_the_host() {
    let disk = Disk::new();
    let target = Path::new("/run/patchswitch-test-root");
    let host = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let first = MountNamespace::open(&disk.namespace).unwrap();
    first.run(|inside| inside.mount(&disk.path, target, false)).unwrap().unwrap();
    // Another run of the command line.
    let second = MountNamespace::open(&disk.namespace).unwrap();
    let found = second.run(|inside| inside.mount_at(target)).unwrap().unwrap().unwrap();
    assert_eq!(found.kind, "ext4");
    for option in ["rw", "nosuid", "nodev"] {
        assert!(found.options.split(',').any(|present| present == option), "{}", found.options);
    }
    // A program that is started there is there.
    let listed =
        second.run(|_| Run::new(Program::Shell).args(["-c", "ls -A /run/patchswitch-test-root"]).read());
    assert_eq!(listed.unwrap().unwrap().trim(), "lost+found");
    assert!(fs::read_dir(target).unwrap().next().is_none(), "the host sees the mount");
    // Something else on the same place is refused, read-only on top of read-write too.
    let other = second.run(|inside| inside.mount(&disk.path, target, true)).unwrap().unwrap_err();
    assert!(other.to_string().contains("failed to mount on"), "{other}");
    second.run(|inside| inside.unmount(target)).unwrap().unwrap();
    assert!(MountNamespace::remove(&disk.namespace).unwrap());
    assert!(!MountNamespace::remove(&disk.namespace).unwrap());
    let after = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let targets = |text: &str| {
        text.lines().filter_map(|l| l.split(' ').nth(4).map(ToOwned::to_owned)).collect::<Vec<_>>()
    };
    assert_eq!(targets(&after), targets(&host));
}

/// We must not do to others what the namespace protects us from.
#[test]
fn the_namespace_keeps_nobody_else_s_disk_busy() {
    let disk = Disk::new();
    let place = Path::new("/srv/patchswitch-test-other");
    fs::create_dir_all(place).unwrap();
    run(&["mount", "--make-private", "--bind", "/srv", "/srv"]).unwrap();
    run(&["mount", disk.path.to_str().unwrap(), place.to_str().unwrap()]).unwrap();
    let mounts = MountNamespace::open(&disk.namespace).unwrap();
    let seen = mounts.run(|inside| inside.mount_at(place)).unwrap().unwrap();
    assert_eq!(seen, None);
    run(&["umount", place.to_str().unwrap()]).unwrap();
    assert_eq!(disk.open_count(), "0");
    run(&["umount", "/srv"]).unwrap();
    fs::remove_dir(place).unwrap();
}
