//! What a clone has after the injection, and that nothing else has changed.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use jiff::Timestamp;

use super::super::table::{Wish, add};
use super::*;
use crate::config::Config;
use crate::host::linux::root::Refusal;
use crate::names::Name;
use crate::store::{NewJob, Store, Who};

/// A host with patches and a job, and the root of a clone.
struct Setting {
    dir: tempfile::TempDir,
    patches: Vec<Patch>,
    job: JobId,
}

impl Setting {
    /// Patches by name, date and content.
    fn new(files: &[(&str, &str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(&dir.path().join("state")).unwrap();
        let who = Who { name: "root".to_owned(), how: "test".to_owned() };
        for (name, date, content) in files {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            let issued_at = Some(date.parse::<Timestamp>().unwrap());
            let wish = Wish { types: "security".parse().unwrap(), issued_at, approve: true, who: &who };
            add(&mut store, &dir.path().join("state"), &[path], &wish).unwrap();
        }
        let (service, plan) = (Name::new("web").unwrap(), serde_json::json!(null));
        let job = NewJob { service: &service, kind: "apply", plan: &plan, boot_id: "b" };
        let job = store.begin_job(&job).unwrap();
        std::fs::create_dir_all(dir.path().join("clone/usr/lib")).unwrap();
        std::fs::create_dir_all(dir.path().join("clone/var/lib")).unwrap();
        std::fs::write(dir.path().join("patchswitch-init"), "\u{7f}ELF init").unwrap();
        Self { patches: store.patches().unwrap(), dir, job }
    }

    fn table(&self) -> PatchTableInput {
        let job = Config::default().job;
        table_of(self.job, &self.patches, &job, OnError::Stop, Identity::Keep).unwrap()
    }

    fn inject(&self, unit: Option<&str>) -> Result<(), InjectError> {
        let table = self.table();
        let payload = Payload {
            init: &self.dir.path().join("patchswitch-init"),
            scripts: &[("50-hello", b"#!/bin/sh\n")],
            unit,
            table: &table,
            patches: &self.patches,
            state_dir: &self.dir.path().join("state"),
        };
        write_all(&self.root(), &payload)
    }

    fn root(&self) -> Root {
        Root::open(&self.at("")).unwrap()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("clone").join(path)
    }

    fn read(&self, path: &str) -> (u32, Vec<u8>) {
        let mode = std::fs::metadata(self.at(path)).unwrap().permissions().mode() & 0o7777;
        (mode, std::fs::read(self.at(path)).unwrap())
    }
}

const OLD: &str = "2026-11-01T00:00:00Z";
const NEW: &str = "2026-11-02T00:00:00Z";
const NEWER: &str = "2026-11-03T00:00:00Z";

fn deb(name: &str) -> Patch {
    // Only the table is made of these; a real package is not needed for that.
    let setting = Setting::new(&[(name, NEW, "#!x")]);
    Patch { driver: Driver::Deb, ..setting.patches[0].clone() }
}

#[test]
fn everything_is_there_with_its_mode_and_the_table_reads_back() {
    let setting = Setting::new(&[("one.sh", OLD, "#!one"), ("two.sh", NEW, "#!two")]);
    setting.inject(None).unwrap();
    assert_eq!(setting.read("usr/lib/patchswitch/init"), (0o755, b"\x7fELF init".to_vec()));
    assert_eq!(setting.read("etc/patchswitch/start.d/50-hello"), (0o755, b"#!/bin/sh\n".to_vec()));
    let table = PatchTableInput::parse(&setting.read("var/lib/patchswitch/table.json").1).unwrap();
    assert_eq!(table, setting.table());
    assert_eq!(table.patches.len(), 2);
    for (patch, content) in table.patches.iter().zip(["#!one", "#!two"]) {
        let path = patch.path();
        assert_eq!(setting.read(path.trim_start_matches('/')), (0o755, content.as_bytes().to_vec()));
    }
    assert!(!setting.at("etc/systemd").exists());
}

#[test]
fn where_systemd_is_the_init_a_unit_is_enabled_by_a_link() {
    let setting = Setting::new(&[("one.sh", OLD, "#!one")]);
    setting.inject(Some("[Unit]\n")).unwrap();
    assert_eq!(setting.read("etc/systemd/system/patchswitch-apply.service"), (0o644, b"[Unit]\n".to_vec()));
    let link = setting.at("etc/systemd/system/multi-user.target.wants/patchswitch-apply.service");
    assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("../patchswitch-apply.service"));
    assert!(link.is_file(), "the link leads to the unit");
}

#[test]
fn what_an_earlier_job_left_on_the_disk_is_gone() {
    let setting = Setting::new(&[("one.sh", OLD, "#!one")]);
    setting.inject(None).unwrap();
    for file in ["result.json", "result.json.new", "patches/old.deb"] {
        std::fs::write(setting.at("var/lib/patchswitch").join(file), "{}").unwrap();
    }
    std::fs::write(setting.at("etc/patchswitch/start.d/10-admin"), "mine").unwrap();
    setting.inject(None).unwrap();
    let mut names: Vec<_> = std::fs::read_dir(setting.at("var/lib/patchswitch"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["patches", "table.json"]);
    assert_eq!(std::fs::read_dir(setting.at("var/lib/patchswitch/patches")).unwrap().count(), 1);
    assert!(setting.at("etc/patchswitch/start.d/10-admin").exists(), "the administrator's scripts stay");
    assert_eq!(read_results(&setting.root()).unwrap(), None);
}

#[test]
fn a_patch_that_changed_after_it_was_added_is_refused_and_there_is_no_table() {
    let setting = Setting::new(&[("one.sh", OLD, "#!one")]);
    let patch = &setting.patches[0];
    let stored = setting.dir.path().join("state/patches").join(format!("{}-one.sh", patch.sha256));
    std::fs::write(stored, "#!two").unwrap();
    let error = setting.inject(None).unwrap_err();
    assert!(error.to_string().contains("has changed since it was added"), "{error}");
    assert_eq!(error.exit_code(), ExitCode::BadData);
    assert!(!setting.at("var/lib/patchswitch/table.json").exists());
    assert_eq!(std::fs::read_dir(setting.at("var/lib/patchswitch/patches")).unwrap().count(), 0);
}

#[test]
fn traps_of_the_clone_are_refused_and_nothing_outside_changes() {
    let traps =
        ["var/lib/patchswitch", "var/lib/patchswitch/patches", "usr/lib/patchswitch", "etc/patchswitch"];
    for trap in traps {
        let setting = Setting::new(&[("one.sh", OLD, "#!one")]);
        let outside = setting.dir.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("init"), "dear").unwrap();
        std::fs::create_dir_all(setting.at(trap).parent().unwrap()).unwrap();
        symlink(&outside, setting.at(trap)).unwrap();
        let error = setting.inject(None).unwrap_err();
        match error {
            InjectError::Root(RootError::Refused { path, reason: Refusal::Symlink }) => {
                assert_eq!(path, trap);
            }
            other => panic!("{other:?}"),
        }
        let left: Vec<_> = std::fs::read_dir(&outside).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["init"]);
        assert_eq!(std::fs::read(outside.join("init")).unwrap(), b"dear");
    }
}

#[test]
fn an_unguarded_mount_is_refused_before_anything_is_written() {
    let setting = Setting::new(&[("one.sh", OLD, "#!one")]);
    let table = setting.table();
    let payload = Payload {
        init: Path::new("/nowhere"),
        scripts: &[],
        unit: None,
        table: &table,
        patches: &setting.patches,
        state_dir: setting.dir.path(),
    };
    // A proof either way: where the temporary directory happens to be guarded, the missing init is what is noticed.
    let error = inject(&setting.root(), &payload).unwrap_err();
    if setting.root().is_guarded().unwrap() {
        assert!(matches!(error, InjectError::Init { .. }), "{error}");
    } else {
        assert!(matches!(error, InjectError::Unguarded), "{error}");
        assert!(!setting.at("var/lib/patchswitch").exists());
    }
}

#[test]
fn packages_go_together_and_scripts_by_their_date() {
    let setting = Setting::new(&[("first.sh", OLD, "#!1"), ("last.sh", NEWER, "#!2")]);
    let mut patches = setting.patches.clone();
    let (one, two) = (deb("a.deb"), deb("b.deb"));
    let ids: Vec<_> =
        Setting::new(&[("w", OLD, "#!w"), ("x", OLD, "#!x"), ("y", OLD, "#!y"), ("z", OLD, "#!z")])
            .patches
            .iter()
            .map(|patch| patch.id)
            .collect();
    // The second package is newer than the last script: it goes with the first one all the same.
    patches.push(Patch { id: ids[2], ..one });
    patches.push(Patch { id: ids[3], issued_at: "2026-12-01T00:00:00Z".parse().unwrap(), ..two });
    let limits = Job { patch: Duration::from_millis(10), ..Config::default().job };
    let table = table_of(setting.job, &patches, &limits, OnError::Continue, Identity::Renew).unwrap();
    let order: Vec<_> = table.patches.iter().map(|patch| (patch.file.as_str(), patch.group)).collect();
    assert_eq!(order, [("first.sh", 0), ("a.deb", 1), ("b.deb", 1), ("last.sh", 2)]);
    assert!(table.patches.iter().all(|patch| patch.time_limit_s == 1), "never 0");
    assert_eq!((table.on_error, table.identity), (OnError::Continue, Identity::Renew));
}

#[test]
fn results_are_read_and_traps_in_their_place_are_not() {
    let setting = Setting::new(&[("one.sh", OLD, "#!one")]);
    assert_eq!(read_results(&setting.root()).unwrap(), None, "no folder yet");
    setting.inject(None).unwrap();
    let result = setting.at("var/lib/patchswitch/result.json");
    let good = PatchResults::new(&setting.job.to_string(), "boot");
    std::fs::write(&result, good.encode().unwrap()).unwrap();
    assert_eq!(read_results(&setting.root()).unwrap(), Some(good));

    std::fs::write(&result, "{ \"version\": 1").unwrap();
    assert!(matches!(read_results(&setting.root()), Err(InjectError::Results(_))));
    std::fs::File::create(&result).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(read_results(&setting.root()), Err(InjectError::Root(RootError::Refused { .. }))));
    std::fs::remove_file(&result).unwrap();
    symlink("/etc/passwd", &result).unwrap();
    assert!(matches!(read_results(&setting.root()), Err(InjectError::Root(RootError::Refused { .. }))));
    std::fs::remove_file(&result).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &result, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let start = std::time::Instant::now();
    assert!(matches!(read_results(&setting.root()), Err(InjectError::Root(RootError::Refused { .. }))));
    assert!(start.elapsed() < Duration::from_secs(2), "a pipe blocks its reader");
}
