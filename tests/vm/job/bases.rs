//! Partitions whose disks lie on volumes of LVM and on partitions of a disk, with XFS and btrfs as well as ext4.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use patchswitch::host::linux::dm::UUID_PREFIX;
use patchswitch::host::linux::filesystem::{FileSystem, Kind};
use patchswitch_tests::netlab::{OWN_A, OWN_B};
use patchswitch_tests::{programs, vm};

use super::client::{self, Client};
use super::keeper::{self, Writers};
use super::mend::nothing_to_do;
use super::stage::{SERVICE, Settings, Stage, job_root, wait_until};

/// How LVM is called: nobody's udev is waited for, and it keeps nothing.
const LVM: &str = "--config 'devices { use_devicesfile=0 } activation { udev_sync=0 udev_rules=0 monitoring=0 } \
                   global { use_lvmpolld=0 } backup { backup=0 archive=0 }'";

/// A link to a partition of a disk, as udev makes them.
const MORE: &str = "/run/patchswitch-test-more";

/// A disk in two parts: volumes of LVM, and a plain partition.
struct Volumes {
    disk: PathBuf,
}

fn sh(script: &str) -> String {
    programs::run(&["/bin/sh", "-ec", &format!("export DM_DISABLE_UDEV=1; {script}")]).unwrap()
}

impl Volumes {
    fn make() -> Self {
        let disk = vm::disk(1).unwrap().expect("these tests overwrite a disk: they run in the test machine");
        let volumes = Self { disk };
        let shown = volumes.disk.display();
        let sectors = |mib: u64| mib * 2048;
        // As a table of partitions would have them; the kernel only has to know where they are.
        sh(&format!(
            "wipefs -q --all {shown}; addpart {shown} 1 2048 {}; addpart {shown} 2 {} {}",
            sectors(1500),
            sectors(1600),
            sectors(160)
        ));
        let [one, two] = [1, 2].map(|number| volumes.part(number).display().to_string());
        sh(&format!(
            "wipefs -q --all {one}; wipefs -q --all {two}; pvcreate -q {LVM} {one}; vgcreate -q {LVM} psbase {one}"
        ));
        volumes
    }

    fn part(&self, number: u8) -> PathBuf {
        PathBuf::from(format!("{}{number}", self.disk.display()))
    }

    fn add(&self, name: &str, mib: u64) -> String {
        sh(&format!("lvcreate -q -y {LVM} -Wy -L {mib}m -n {name} psbase"));
        format!("/dev/psbase/{name}")
    }

    /// What is in a file of a file system, which is clean.
    fn read(device: &str, check: &str, file: &str) -> String {
        let at = "/run/patchswitch-test-base";
        sh(&format!(
            "{check} {device} >&2; mkdir -p {at}; mount -n -o ro {device} {at}; cat {at}/{file}; umount -n {at}; rmdir {at}"
        ))
    }

    /// The plain partition, by a name that somebody has given to it.
    fn named(&self) -> String {
        sh(&format!("ln -sfn {} {MORE}", self.part(2).display()));
        MORE.to_owned()
    }

    fn remove(self) {
        fs::remove_file(MORE).unwrap();
        let disk = self.disk.display();
        sh(&format!("vgremove -q -y -ff {LVM} psbase; pvremove -q -y -ff {LVM} {}", self.part(1).display()));
        sh(&format!("wipefs -q --all {}; delpart {disk} 1; delpart {disk} 2", self.part(2).display()));
    }
}

/// Puts a root or a file on a device, in a file system of its own, as somebody did long before patchswitch came.
fn put(device: &str, mkfs: &str, from: &str) {
    let at = "/run/patchswitch-test-base";
    sh(&format!(
        "{mkfs} {device}; mkdir -p {at}; mount -n {device} {at}; {from} {at}; umount -n {at}; rmdir {at}"
    ));
}

/// The standby, whose root and one data disk have their stores on volumes, and the other one in an image.
fn standby(stage: &Stage, [root, data]: &[String; 2]) {
    let (root, data) = (format!("root={root}"), format!("data={data}"));
    let [v4, v6] = OWN_B;
    let disks = ["--disk", "data:320M:/srv/data", "--disk", "more:160M:/srv/more"];
    let arguments = ["partition", "define", "web-b", "--standby", "--size", "64M", "--store", "64M"];
    let own = ["--own", v4, "--own", v6, "--on", &root, "--on", &data];
    stage.ok(&[&arguments[..], &own, &disks].concat());
}

/// A partition on devices, with what is on them, and its standby; both are clients' after this.
fn on_devices(stage: &Stage, devices: [&str; 3], stores: &[String; 2]) {
    let on: Vec<String> = ["root", "data", "more"]
        .iter()
        .zip(devices)
        .map(|(disk, device)| format!("{disk}={device}"))
        .collect();
    let on: Vec<&str> = on.iter().flat_map(|on| ["--on", on]).collect();
    let [v4, v6] = OWN_A;
    let arguments = ["partition", "define", "web-a", "--fs", "xfs", "--own", v4, "--own", v6];
    let disks = ["--disk", "data::/srv/data", "--disk", "more::/srv/more", "--command", "/usr/bin/serve"];
    stage.ok(&[&arguments[..], &on, &disks].concat());
    let again = ["partition", "define", "web-c", "--on", on[1]];
    assert!(stage.ends_with(78, &again).contains("is a disk of partition web-a"));
    standby(stage, stores);
    stage.ok(&["service", "add", SERVICE]);
    wait_until("v1 serves", Duration::from_secs(60), || client::who(&stage.client).is_ok());
}

/// Both data disks of both sides, by their superblocks.
fn kinds() -> [FileSystem; 4] {
    let disks = ["web-a-data", "web-a-more", "web-b-data", "web-b-more"];
    disks.map(|disk| FileSystem::read(Path::new(&format!("/dev/mapper/ps-{disk}"))).unwrap().unwrap())
}

/// Adopted as they are, cloned, given back, cloned again, made permanent, and the other way round; at the end the volumes
/// have what was written, and everything is clean.
#[test]
fn volumes_and_partitions_of_disks_are_patched_and_stay() {
    let volumes = Volumes::make();
    let (root, data) = (volumes.add("root", 64), volumes.add("data", 320));
    let stores = [volumes.add("store-root", 64), volumes.add("store-data", 64)];
    let more = volumes.named();
    put(&root, "mkfs.ext4 -q -F", &format!("cp -aT {}", job_root().display()));
    put(&more, "mkfs.btrfs -q -f", "sh -c 'echo kept > $0/kept'");
    let stage = Stage::bare(&Settings::default());
    refusals(&stage, &volumes, [&root, &data, &more]);
    on_devices(&stage, [&root, &data, &more], &stores);
    let client = Client::start(&stage.client);
    let inside = |partition: &str, script: &str| {
        stage.ok(&["partition", "exec", partition, "--", "sh", "-c", script]).trim().to_owned()
    };
    let read = |partition: &str| inside(partition, "cat /srv/data/is /srv/more/is /srv/more/kept");
    let write = |partition: &str, what: &str| {
        inside(partition, &format!("echo {what} > /srv/data/is; echo {what} > /srv/more/is"))
    };
    write("web-a", "one");

    stage.says("v2");
    // Somebody has come to use what looked like nobody's.
    sh(&format!("printf 'LUKS\\272\\276\\0\\1' | dd of={} conv=notrunc status=none", stores[0]));
    let said = stage.ends_with(78, &["apply", SERVICE]);
    assert!(said.contains("has crypto_LUKS on it (`wipefs --all` if nobody wants that)"), "{said}");
    sh(&format!("wipefs --noheadings {0} | grep -q crypto_LUKS; wipefs -q --all {0}", stores[0]));
    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    let all = kinds();
    assert_eq!(all.map(|one| one.kind), [Kind::Xfs, Kind::Btrfs, Kind::Xfs, Kind::Btrfs]);
    assert!(!all[1].is_taken_for(&all[3]), "{all:?}");
    write("web-b", "two");
    assert_eq!(read("web-b"), "two\ntwo\nkept");
    nothing_to_do(&stage);
    stage.ok(&["down"]);
    stage.ok(&["up"]);
    wait_until("v2 serves", Duration::from_secs(60), || client::who(&stage.client).is_ok());
    assert_eq!(read("web-b"), "two\ntwo\nkept");
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    assert_eq!(read("web-a"), "one\none\nkept");

    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!(read("web-b"), "one\none\nkept");
    write("web-b", "three");
    stage.says("v3");
    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v3", "web-a"));
    assert_eq!(read("web-a"), "three\nthree\nkept");
    nothing_to_do(&stage);
    drop(client);
    stage.finish();

    assert_eq!(Volumes::read(&root, "e2fsck -fn", "etc/says"), "v3\n");
    assert_eq!(Volumes::read(&data, "xfs_repair -n", "is"), "three\n");
    assert_eq!(Volumes::read(&more, "btrfs check -q --readonly", "is"), "three\n");
    volumes.remove();
}

/// What cannot be a partition's disk is refused before anything is changed.
fn refusals(stage: &Stage, volumes: &Volumes, [root, data, more]: [&str; 3]) {
    let refused = |code: i32, words: &[&str], why: &str| {
        let said = stage.ends_with(code, &[&["partition", "define", "web-c"][..], words].concat());
        assert!(said.contains(why), "{words:?}: {said}");
        assert!(stage.ok(&["partition", "list"]).contains("no partition is defined"));
    };
    let physical = "/run/patchswitch-test-physical";
    sh(&format!("ln -s {} {physical}", volumes.part(1).display()));
    let on = |disk: &str, device: &str| format!("{disk}={device}");
    refused(1, &["--on", &on("root", physical)], "is in use");
    fs::remove_file(physical).unwrap();
    refused(78, &["--on", &on("root", &volumes.part(2).display().to_string())], "by a name that stays");
    refused(78, &["--on", &on("root", root), "--size", "32M"], "give no size");
    refused(1, &["--on", &on("root", "/dev/psbase/absent")], "/dev/psbase/absent");
    refused(1, &["--on", &on("root", "/dev/null")], "is not a block device");
    refused(78, &["--on", &on("root", data)], "has no file system that is known here");
    refused(78, &["--on", &on("other", root), "--size", "64M", "--from", "/etc/hostname"], "does not have");
    refused(1, &["--on", &on("root", root), "--size", "1G"], "bytes");
    refused(
        78,
        &["--on", &on("root", root), "--on", &on("data", root), "--disk", "data::/srv/data"],
        "given for two disks",
    );
    refused(
        78,
        &["--standby", "--on", &on("root", root), "--size", "32M"],
        "is not empty, there is ext4 on it",
    );
    let directory = job_root().display().to_string();
    refused(78, &["--from", &directory, "--on", &on("root", more)], "there is btrfs on it");
    let half = volumes.add("half", 128);
    // Half of a root is nobody's.
    refused(
        65,
        &["--from", "/etc/hostname", "--on", &on("root", &half)],
        "it is not the whole archive of a root",
    );
    assert_eq!(sh(&format!("wipefs --noheadings {half}")), "");
    // A device whose maker keeps it to himself: what is on it cannot be seen.
    let private = "/dev/mapper/ps-private";
    let table = format!("0 262144 linear {half} 0");
    sh(&format!("dmsetup create ps-private --uuid {UUID_PREFIX}ps-private --table '{table}'"));
    refused(78, &["--from", "/etc/hostname", "--on", &on("root", private)], "is a private device");
    sh("dmsetup remove ps-private");
    // Half of a file system.
    let other = volumes.add("other", 128);
    sh(&format!("mkfs.btrfs -q -f {half} {other}"));
    refused(78, &["--on", &on("root", &half)], "is one of 2 devices of a btrfs");
    // In use: mounted by somebody.
    let at = "/run/patchswitch-test-base";
    sh(&format!("mkdir -p {at}; mount -n {root} {at}"));
    refused(1, &["--on", &on("root", root)], "is in use");
    sh(&format!("umount -n {at}; rmdir {at}; lvremove -q -y {LVM} psbase/half psbase/other"));
    fs::metadata(root).unwrap();
}

/// A single writer's disk on a volume, copied to another one and back: what one job leaves on them is not in the way of the next.
#[test]
fn copies_on_volumes_are_made_again_and_again() {
    let volumes = Volumes::make();
    let (data, store) = (volumes.add("data", 64), volumes.add("store", 72));
    volumes.named();
    let settings = Settings { disks: &[], ..keeper::settings() };
    let stage = Stage::bare(&settings);
    let root = (keeper::settings().root.0)();
    let [on_data, on_store] = [&data, &store].map(|device| format!("data={device}"));
    let define = |name: &str, [v4, v6]: [&str; 2], more: &[&str]| {
        stage.ok(&[&["partition", "define", name, "--size", "80M", "--own", v4, "--own", v6], more].concat());
    };
    let (from, command) = (root.to_str().unwrap(), ["--command", "/usr/bin/serve"]);
    define(
        "web-a",
        OWN_A,
        &[&["--from", from, "--on", &on_data, "--disk", "data:64M:/data:log"][..], &command].concat(),
    );
    define(
        "web-b",
        OWN_B,
        &["--standby", "--store", "72M", "--on", &on_store, "--disk", "data:64M:/data:log"],
    );
    stage.ok(&["service", "add", SERVICE]);
    wait_until("v1 serves", Duration::from_secs(60), || client::who(&stage.client).is_ok());
    let writers = Writers::start(&stage);
    stage.says("v2");
    stage.ok(&["apply", SERVICE]);
    assert_eq!(stage.who(), "v2");
    stage.ok(&["rollback", SERVICE]);
    // The disk came back on the other volume; its store was the disk.
    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!(stage.who(), "v2");
    nothing_to_do(&stage);
    writers.stop_unnoticed(&stage);
    stage.finish();
    // What serves is whole, the store is empty, wherever they are.
    let found = [&data, &store]
        .map(|device| sh(&format!("wipefs --noheadings {device}")).split_whitespace().last().is_some());
    assert_eq!(found.iter().filter(|is_there| **is_there).count(), 1);
    volumes.remove();
}

/// A copy of a btrfs beside it, closed and opened again by turns, on a disk that moves.
#[test]
fn a_btrfs_that_moves_is_told_from_its_copies() {
    let settings = Settings {
        fs: "btrfs",
        root: (keeper::settings().root.0, "160M"),
        standby: &["--size", "160M"],
        disks: &["data:128M:/data:move"],
        ..keeper::settings()
    };
    let stage = Stage::new(&settings);
    stage.says("v2");
    let writers = Writers::start(&stage);
    std::thread::sleep(Duration::from_secs(1));
    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    std::thread::sleep(Duration::from_secs(1));
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    std::thread::sleep(Duration::from_secs(1));
    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    nothing_to_do(&stage);
    writers.stop_unnoticed(&stage);
    stage.finish();
}
