//! Injection into a clone with real mounts, devices and owners. Needs root; everything happens in a mount namespace of
//! the test's own.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use patchswitch::config::Config;
use patchswitch::host::linux::mountns::MountNamespace;
use patchswitch::host::linux::root::{Absent, Place, Refusal, Root, RootError};
use patchswitch::names::Name;
use patchswitch::patch::inject::{InjectError, Payload, inject, read_results, table_of};
use patchswitch::patch::table::{Wish, add};
use patchswitch::patch::wire::{Identity, OnError};
use patchswitch::store::{JobId, NewJob, Patch, Store, Who};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{MountFlags, mount, mount_bind};

struct Setting {
    dir: tempfile::TempDir,
    patches: Vec<Patch>,
    job: JobId,
}

impl Setting {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let mut store = Store::open(&state).unwrap();
        let who = Who { name: "root".to_owned(), how: "test".to_owned() };
        let path = dir.path().join("fix.sh");
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        let wish = Wish { types: "security".parse().unwrap(), issued_at: None, approve: true, who: &who };
        add(&mut store, &state, &[path], &wish).unwrap();
        let (service, plan) = (Name::new("web").unwrap(), serde_json::json!(null));
        let job = NewJob { service: &service, kind: "apply", plan: &plan, boot_id: "b" };
        let job = store.begin_job(&job).unwrap();
        for path in ["clone", "outside"] {
            std::fs::create_dir(dir.path().join(path)).unwrap();
        }
        std::fs::write(dir.path().join("outside/init"), "dear").unwrap();
        std::fs::write(dir.path().join("patchswitch-init"), "init").unwrap();
        Self { patches: store.patches().unwrap(), dir, job }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("clone").join(path)
    }

    fn outside(&self) -> PathBuf {
        self.dir.path().join("outside")
    }

    fn inject(&self) -> Result<(), InjectError> {
        let job = Config::default().job;
        let table = table_of(self.job, &self.patches, &job, OnError::Stop, Identity::Keep)?;
        let payload = Payload {
            init: &self.dir.path().join("patchswitch-init"),
            scripts: &[],
            unit: None,
            table: &table,
            patches: &self.patches,
            state_dir: &self.dir.path().join("state"),
        };
        inject(&Root::open(&self.at(""))?, &payload)
    }

    /// Runs a piece of work with the clone mounted as the agent mounts it.
    fn mounted(&self, flags: MountFlags, work: impl FnOnce() + Send) {
        let namespace = self.dir.path().join("ns");
        std::fs::create_dir(&namespace).unwrap();
        let agent = MountNamespace::open(&namespace).unwrap();
        let ended = agent.run(|_inside| {
            mount("tmpfs", self.at(""), "tmpfs", flags, c"size=8m,mode=755").unwrap();
            for path in ["var/lib", "usr/lib", "etc"] {
                std::fs::create_dir_all(self.at(path)).unwrap();
            }
            work();
        });
        assert!(MountNamespace::remove(&namespace).unwrap());
        ended.unwrap();
        let left: Vec<_> =
            std::fs::read_dir(self.outside()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["init"], "something was made outside the clone");
        assert_eq!(std::fs::read(self.outside().join("init")).unwrap(), b"dear");
    }

    fn guarded(&self, work: impl FnOnce() + Send) {
        self.mounted(MountFlags::NOSUID | MountFlags::NODEV, work);
    }
}

fn refusal(error: InjectError) -> (String, Refusal) {
    match error {
        InjectError::Root(RootError::Refused { path, reason }) => (path, reason),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_guarded_clone_gets_everything_and_belongs_to_root() {
    let setting = Setting::new();
    setting.guarded(|| {
        // A directory with the set-group-id bit hands its group down.
        std::fs::create_dir_all(setting.at("var/lib/patchswitch")).unwrap();
        chown(setting.at("var/lib/patchswitch"), Some(0), Some(50)).unwrap();
        let mode = std::fs::Permissions::from_mode(0o2755);
        std::fs::set_permissions(setting.at("var/lib/patchswitch"), mode).unwrap();
        setting.inject().unwrap();
        for (path, mode) in [
            ("usr/lib/patchswitch", 0o40755),
            ("usr/lib/patchswitch/init", 0o100755),
            ("var/lib/patchswitch/patches", 0o40755),
            ("var/lib/patchswitch/table.json", 0o100644),
        ] {
            let meta = std::fs::symlink_metadata(setting.at(path)).unwrap();
            assert_eq!((meta.uid(), meta.gid(), meta.mode()), (0, 0, mode), "{path}");
        }
    });
}

#[test]
fn an_unguarded_clone_is_refused() {
    for flags in [MountFlags::empty(), MountFlags::NOSUID, MountFlags::NODEV] {
        let setting = Setting::new();
        setting.mounted(flags, || {
            assert!(matches!(setting.inject(), Err(InjectError::Unguarded)));
            assert!(!setting.at("var/lib/patchswitch").exists());
        });
    }
}

#[test]
fn mounts_inside_the_clone_are_not_crossed() {
    let places = ["usr/lib", "usr/lib/patchswitch", "etc/patchswitch/start.d", "var/lib/patchswitch/patches"];
    for place in places {
        let setting = Setting::new();
        setting.guarded(|| {
            std::fs::create_dir_all(setting.at(place)).unwrap();
            mount_bind(setting.outside(), setting.at(place)).unwrap();
            let refused = refusal(setting.inject().unwrap_err());
            assert_eq!(refused, (place.to_owned(), Refusal::OtherFileSystem));
        });
    }
}

#[test]
fn a_file_that_is_mounted_over_is_neither_replaced_nor_read() {
    let setting = Setting::new();
    setting.guarded(|| {
        std::fs::create_dir_all(setting.at("var/lib/patchswitch")).unwrap();
        for file in ["table.json", "result.json"] {
            let file = setting.at("var/lib/patchswitch").join(file);
            std::fs::write(&file, "").unwrap();
            mount_bind(setting.outside().join("init"), &file).unwrap();
        }
        let root = Root::open(&setting.at("")).unwrap();
        let read = refusal(read_results(&root).unwrap_err());
        assert_eq!(read, ("var/lib/patchswitch/result.json".to_owned(), Refusal::OtherFileSystem));
        let written = refusal(setting.inject().unwrap_err());
        assert_eq!(written, ("var/lib/patchswitch/table.json".to_owned(), Refusal::OtherFileSystem));
        let folder = root.folder(Place::State, &[], Absent::Fail).unwrap();
        assert!(matches!(folder.write("table.json", 0o644, b""), Err(RootError::Refused { .. })));
    });
}

#[test]
fn a_device_in_place_of_the_result_is_not_opened() {
    let setting = Setting::new();
    setting.guarded(|| {
        std::fs::create_dir_all(setting.at("var/lib/patchswitch")).unwrap();
        let result = setting.at("var/lib/patchswitch/result.json");
        // Nobody has this number: an open would fail with ENXIO and not with a refusal of the kind.
        for (kind, number) in
            [(FileType::CharacterDevice, makedev(1, 5)), (FileType::BlockDevice, makedev(4095, 7))]
        {
            mknodat(CWD, &result, kind, Mode::from_raw_mode(0o666), number).unwrap();
            let root = Root::open(&setting.at("")).unwrap();
            let refused = refusal(read_results(&root).unwrap_err());
            assert_eq!(refused, ("var/lib/patchswitch/result.json".to_owned(), Refusal::NotAFile(kind)));
            std::fs::remove_file(&result).unwrap();
        }
    });
}

#[test]
fn a_directory_of_a_user_of_the_partition_is_refused() {
    let setting = Setting::new();
    setting.guarded(|| {
        let place: &Path = &setting.at("usr/lib/patchswitch");
        std::fs::create_dir(place).unwrap();
        chown(place, Some(1000), Some(1000)).unwrap();
        let refused = refusal(setting.inject().unwrap_err());
        let reason = Refusal::Writable { owner: 1000, mode: 0o755 };
        assert_eq!(refused, ("usr/lib/patchswitch".to_owned(), reason));
    });
}
