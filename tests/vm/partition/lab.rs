//! A partition to play with: a small root on a disk of its own, a network namespace, and a list of what the kernel had
//! before.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use patchswitch::host::linux::filesystem::Kind;
use patchswitch::host::linux::mountns::MountNamespace;
use patchswitch::host::linux::netns::{Netns, NetnsRef};
use patchswitch::host::linux::programs::Program;
use patchswitch::host::linux::runtime::{Executed, Runtime};
use patchswitch::names::Name;
use patchswitch::partition::define::{self, DefineError};
use patchswitch::partition::lifecycle::{self, LifecycleError, Site, Started, Stopped};
use patchswitch::partition::spec::{Init, PartitionSpec, Service};
use patchswitch_tests::programs::run;
use patchswitch_tests::root;

/// Long enough for a slow machine, short enough to be noticed.
pub(super) const SOON: Duration = Duration::from_secs(60);

/// What the kernel and the file system have of ours, by their own words.
#[derive(Debug, PartialEq, Eq)]
struct World {
    cgroups: BTreeSet<String>,
    mounts: BTreeSet<String>,
    loops: String,
    namespaces: BTreeSet<String>,
    files: BTreeSet<String>,
    processes: Vec<String>,
}

impl World {
    fn look() -> Self {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounts = table.lines().filter_map(|line| line.split(' ').nth(4));
        let names = |dir: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        let mut files = BTreeSet::new();
        tree(Path::new("/run/patchswitch"), &mut files);
        let mut cgroups = BTreeSet::new();
        tree(Path::new("/sys/fs/cgroup"), &mut cgroups);
        cgroups.retain(|path| Path::new(path).is_dir());
        let processes = run(&["ps", "-e", "-o", "args="]).unwrap();
        let ours = |line: &&str| {
            ["patchswitch-init", "crun", "runc", "/usr/lib/patchswitch/"].iter().any(|n| line.contains(n))
        };
        Self {
            cgroups,
            // iproute2 makes this one for its namespaces and keeps it.
            mounts: mounts.filter(|target| *target != "/run/netns").map(ToOwned::to_owned).collect(),
            loops: run(&["losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"]).unwrap(),
            namespaces: names("/run/netns"),
            files,
            processes: processes.lines().filter(ours).map(ToOwned::to_owned).collect(),
        }
    }
}

fn tree(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        found.insert(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            tree(&entry.path(), found);
        }
    }
}

/// Compares the kernel's lists at its end with those of its beginning. To be made first, so that it ends last.
struct Watch(World);

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        // The console's keeper ends when it has written the last words.
        let end = Instant::now() + Duration::from_secs(5);
        while World::look() != self.0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(World::look(), self.0, "something of the test is left behind");
    }
}

/// A partition, not yet started.
pub(super) struct Lab {
    pub(super) spec: PartitionSpec,
    pub(super) runtime: Runtime,
    pub(super) mounts: MountNamespace,
    pub(super) root: PathBuf,
    pub(super) quiet: bool,
    device: String,
    netns: Netns,
    _watch: Watch,
}

/// Where test files lie: a mount that the agent's namespace has as well.
pub(super) fn scratch(name: &str) -> PathBuf {
    let dir = Path::new("/run/patchswitch-test").join(name);
    fs::create_dir_all(&dir).unwrap();
    dir
}

impl Lab {
    /// A partition under crun with the small root.
    pub(super) fn new() -> Self {
        Self::with(Program::Crun)
    }

    pub(super) fn with(program: Program) -> Self {
        let watch = Watch(World::look());
        let dir = scratch("lab");
        let image = dir.join("root.img");
        fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let device =
            run(&["losetup", "--find", "--show", image.to_str().unwrap()]).unwrap().trim().to_owned();
        let small = root::small().unwrap();
        Self::fill(program, watch, device, |mounts, root| define::copy_tree(mounts, &small, root))
    }

    /// A partition on this disk, with a root from this archive.
    pub(super) fn on(disk: &Path, archive: &Path) -> Self {
        let watch = Watch(World::look());
        scratch("lab");
        let device = disk.to_str().unwrap().to_owned();
        Self::fill(Program::Crun, watch, device, |mounts, root| define::unpack(mounts, archive, root))
    }

    fn fill(
        program: Program,
        watch: Watch,
        device: String,
        fill: impl FnOnce(&MountNamespace, &Path) -> Result<(), DefineError>,
    ) -> Self {
        let name = Name::new("lab").unwrap();
        define::make_file_system(Kind::Ext4, Path::new(&device)).unwrap();
        let mounts = MountNamespace::open(Path::new("/run/patchswitch/mnt")).unwrap();
        let root = PathBuf::from("/run/patchswitch/roots/lab");
        let mounted = mounts.run(|inside| inside.mount(Path::new(&device), &root, false)).unwrap();
        assert!(mounted.unwrap());
        fill(&mounts, &root).unwrap();
        define::prepare(&mounts, &root).unwrap();
        run(&["ip", "netns", "add", "ps-lab"]).unwrap();
        run(&["ip", "-n", "ps-lab", "link", "set", "lo", "up"]).unwrap();
        let netns = Netns::open(&NetnsRef::Named("ps-lab".to_owned())).unwrap();
        let mut spec = PartitionSpec::new(name, 80, 128 << 20, 64 << 20, Name::new("root").unwrap());
        spec.init = Init::Patchswitch;
        spec.stop_limit_s = 5;
        spec.service =
            Some(service("trap 'echo bye; exit 0' TERM; echo serving; while :; do sleep 0.1; done"));
        let runtime = Runtime::new(program, Path::new("/run/patchswitch/oci"));
        Self { spec, runtime, mounts, root, quiet: false, device, netns, _watch: watch }
    }

    pub(super) fn name(&self) -> &Name {
        &self.spec.name
    }

    /// A file of the partition, written while it does not run.
    pub(super) fn put(&self, path: &str, mode: u32, content: &str) {
        let path = self.root.join(path.trim_start_matches('/'));
        let written = self.mounts.run(|_| {
            fs::create_dir_all(path.parent().unwrap())?;
            fs::write(&path, content)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        });
        written.unwrap().unwrap();
    }

    /// A starting script.
    pub(super) fn script(&self, name: &str, body: &str) {
        self.put(&format!("/etc/patchswitch/start.d/{name}"), 0o755, &format!("#!/bin/sh\n{body}\n"));
    }

    /// A file of the partition, whether it runs or not.
    pub(super) fn get(&self, path: &str) -> Option<String> {
        let path = self.root.join(path.trim_start_matches('/'));
        self.mounts.run(|_| fs::read_to_string(path).ok()).unwrap()
    }

    pub(super) fn site(&self) -> Site<'_> {
        Site { spec: &self.spec, root: &self.root, netns: &self.netns, data: Vec::new(), quiet: self.quiet }
    }

    pub(super) fn try_start(&self) -> Result<Started, LifecycleError> {
        lifecycle::start(&self.runtime, &self.mounts, &self.site())
    }

    /// Starts it and waits for its service.
    pub(super) fn start(&self) -> Started {
        let mut started = self.try_start().unwrap();
        lifecycle::wait_started(&mut started, Instant::now() + SOON).unwrap().unwrap();
        started
    }

    pub(super) fn stop(&self, limit: Duration) -> Stopped {
        lifecycle::stop(&self.runtime, &self.mounts, &self.spec, limit).unwrap()
    }

    pub(super) fn exec(&self, command: &[&str]) -> Executed {
        lifecycle::exec(&self.runtime, &self.mounts, self.name(), command, SOON).unwrap()
    }

    /// What a shell inside prints.
    pub(super) fn sh(&self, script: &str) -> String {
        let done = self.exec(&["sh", "-c", script]);
        assert_eq!(done.code, 0, "{script}: {}{}", done.stdout, done.stderr);
        done.stdout.trim_end().to_owned()
    }

    pub(super) fn logs(&self) -> String {
        lifecycle::logs(self.name(), 64 << 10).unwrap()
    }

    /// A file of the partition's cgroup.
    pub(super) fn cgroup(&self, file: &str) -> String {
        let path = Path::new("/sys/fs/cgroup/patchswitch").join(self.name().as_str()).join(file);
        fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
            .trim()
            .to_owned()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("console of the partition:\n{}", self.logs());
        }
        // What fails here shows in what is left behind.
        drop(lifecycle::stop(&self.runtime, &self.mounts, &self.spec, Duration::ZERO));
        drop(patchswitch::partition::console::Console::of(self.name()).remove());
        drop(self.mounts.run(|inside| inside.unmount(&self.root)));
        drop(fs::remove_dir("/run/patchswitch/roots"));
        drop(run(&["losetup", "--detach", &self.device]));
        drop(fs::remove_dir_all(scratch("lab")));
        drop(run(&["ip", "netns", "delete", "ps-lab"]));
        drop(MountNamespace::remove(Path::new("/run/patchswitch/mnt")));
        drop(fs::remove_dir("/run/patchswitch/oci"));
        drop(fs::remove_dir("/run/patchswitch"));
    }
}

/// A service that a shell does.
pub(super) fn service(script: &str) -> Service {
    Service {
        command: ["/bin/sh", "-c", script].map(ToOwned::to_owned).to_vec(),
        stop_signal: 15,
        restarts: 0,
    }
}
