//! The store as its users see it; crashes and damage are in their own files.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use super::*;
use crate::exit::ExitCode;
use crate::names::Name;
use crate::patch::name::FileName;
use crate::patch::wire::Driver;

mod crash;
mod hostile;
mod lock;

pub(super) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

pub(super) fn admin() -> Who {
    Who { name: "root".to_owned(), how: "command line".to_owned() }
}

pub(super) fn partition(text: &str) -> Partition {
    Partition {
        name: name(text),
        cpu_percent: 50,
        memory: 256 << 20,
        network: Some("eth0".to_owned()),
        role: Role::Standby,
        state: State::Defined,
        service: None,
        generation: 0,
        definition: json!({ "hostname": text }),
    }
}

fn service(text: &str, address: &str, partition: &str) -> crate::config::Service {
    let text = format!(
        "[[service]]\nname = \"{text}\"\naddresses = [\"{address}\"]\nuplinks = [\"eth0\"]\n\
         partition = \"{partition}\"\n[[service.probe]]\nkind = \"tcp\"\nport = 80\n"
    );
    crate::config::parse(&text, "test").unwrap().services.remove(0)
}

pub(super) fn new_patch(file: &str, digit: u8) -> NewPatch {
    NewPatch {
        file: FileName::new(file).unwrap(),
        types: Types { security: true, ..Types::default() },
        issued_at: "2026-11-20T00:00:00Z".parse().unwrap(),
        sha256: format!("{digit:02x}").repeat(32),
        size: 7,
        source: "/root/patch".to_owned(),
        driver: Driver::Deb,
        package: None,
    }
}

pub(super) fn begin(store: &mut Store, service: &str) -> JobId {
    let plan = json!({ "patches": [] });
    let service = name(service);
    store.begin_job(&NewJob { service: &service, kind: "apply", plan: &plan, boot_id: "boot" }).unwrap()
}

/// A service `web` with its active partition `web-a` and the standby `web-b`.
fn web(store: &mut Store) {
    for text in ["web-a", "web-b", "free"] {
        assert_eq!(store.put_partition(&partition(text)).unwrap(), Change::Changed);
    }
    assert_eq!(store.put_service(&service("web", "192.0.2.10", "web-a")).unwrap(), Change::Changed);
    assert_eq!(store.assign_standby(&name("web-b"), Some(&name("web"))).unwrap(), Change::Changed);
}

fn roles(store: &Store) -> Vec<(String, Role)> {
    store.partitions().unwrap().into_iter().map(|p| (p.name.to_string(), p.role)).collect()
}

fn conflict<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    match result {
        Err(StoreError::Conflict(text)) => text,
        other => panic!("no conflict: {other:?}"),
    }
}

#[test]
fn only_the_agent_sees_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut store = Store::open(&state).unwrap();
    let _ = store.put_partition(&partition("a")).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state), 0o700);
    let files: Vec<_> = std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 2, "the file and its log: {files:?}");
    for file in files {
        assert_eq!(mode(&file), 0o600, "{file:?}");
    }
    drop(store);
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(state.join(FILE), std::fs::Permissions::from_mode(0o644)).unwrap();
    drop(Store::open(&state).unwrap());
    assert_eq!((mode(&state), mode(&state.join(FILE))), (0o700, 0o600));
}

#[test]
fn a_link_in_place_of_the_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("other"), "").unwrap();
    std::os::unix::fs::symlink("other", dir.path().join(FILE)).unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::Unsafe { .. }), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Permission);
    assert_eq!(std::fs::read(dir.path().join("other")).unwrap(), b"");
}

#[test]
fn partitions_and_disks_are_kept_and_repeating_is_fine() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let a = partition("a");
    let disk = Disk {
        partition: name("a"),
        name: name("root"),
        sectors: 2048,
        backing: json!({ "image": "/x" }),
        cow: Some(json!({ "device": "/y" })),
    };
    assert!(matches!(store.put_disk(&disk), Err(StoreError::NotFound { .. })));
    assert_eq!(store.put_partition(&a).unwrap(), Change::Changed);
    assert_eq!(store.put_partition(&a).unwrap(), Change::AlreadySo);
    assert_eq!(store.put_disk(&disk).unwrap(), Change::Changed);
    assert_eq!(store.put_disk(&disk).unwrap(), Change::AlreadySo);
    assert_eq!(store.set_partition_state(&name("a"), State::Running).unwrap(), Change::Changed);
    drop(store);
    let mut store = Store::open(dir.path()).unwrap();
    assert_eq!(store.partition(&name("a")).unwrap(), Some(Partition { state: State::Running, ..a }));
    assert_eq!(store.disks(&name("a")).unwrap(), [disk]);
    assert_eq!(store.remove_partition(&name("a")).unwrap(), Change::Changed);
    assert_eq!(store.remove_partition(&name("a")).unwrap(), Change::AlreadySo);
    assert_eq!(store.disks(&name("a")).unwrap(), []);
}

#[test]
fn the_schema_knows_every_word() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    web(&mut store);
    for state in State::ALL {
        let _ = store.set_partition_state(&name("free"), *state).unwrap();
    }
    let service = Some(name("web"));
    for role in [Role::Retiring, Role::Standby] {
        let _ =
            store.put_partition(&Partition { role, service: service.clone(), ..partition("free") }).unwrap();
    }
    let (id, _) = store.add_patch(&new_patch("a.deb", 1), &admin()).unwrap();
    for decision in Decision::ALL {
        let _ = store.decide(id, *decision, &admin()).unwrap();
    }
    for driver in [Driver::Deb, Driver::Script] {
        let patch = NewPatch { driver, ..new_patch("a.deb", 2 + driver as u8) };
        let (id, _) = store.add_patch(&patch, &admin()).unwrap();
        assert_eq!(store.find_patch(&id.to_string()).unwrap().driver, driver);
    }
    let job = begin(&mut store, "web");
    for state in [StepState::Done, StepState::Failed, StepState::Undone] {
        let step = store.intend(job, "clone", &json!(null)).unwrap();
        let _ = store.conclude(step, state, &json!(null)).unwrap();
    }
}

#[test]
fn a_switch_exchanges_the_roles_in_one_write_and_only_forward() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    web(&mut store);
    let (web, a, b) = (name("web"), name("web-a"), name("web-b"));
    assert_eq!(store.primary(&web).unwrap().unwrap().partition, a);
    assert_eq!(store.record_switch(&web, &b, 1).unwrap(), Change::Changed);
    assert_eq!(store.record_switch(&web, &b, 1).unwrap(), Change::AlreadySo);
    let expected = [("free", Role::Standby), ("web-a", Role::Retiring), ("web-b", Role::Active)];
    assert_eq!(roles(&store), expected.map(|(name, role)| (name.to_owned(), role)));
    assert!(conflict(store.record_switch(&web, &a, 1)).contains("not newer"));
    assert!(conflict(store.record_switch(&web, &name("free"), 2)).contains("does not belong"));
    // The give-back is the same with the roles exchanged.
    assert_eq!(store.record_switch(&web, &a, 2).unwrap(), Change::Changed);
    let primary = store.primary(&web).unwrap().unwrap();
    assert_eq!((primary.partition, primary.generation), (a.clone(), 2));
    assert!(conflict(store.assign_standby(&a, None)).contains("active"));
    assert_eq!(store.assign_standby(&b, None).unwrap(), Change::Changed);
    assert_eq!(store.partition(&b).unwrap().unwrap().role, Role::Standby);
}

#[test]
fn a_partition_and_an_address_belong_to_one_service() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    web(&mut store);
    assert!(conflict(store.put_service(&service("api", "192.0.2.10", "free"))).contains("192.0.2.10"));
    assert!(conflict(store.put_service(&service("api", "192.0.2.11", "web-a"))).contains("taken by"));
    let none = store.put_service(&service("api", "192.0.2.11", "none"));
    assert!(matches!(none, Err(StoreError::NotFound { .. })));
    assert_eq!(store.services().unwrap().len(), 1, "nothing is left of those that were refused");
    let both = Partition { role: Role::Active, service: Some(name("web")), ..partition("free") };
    assert!(conflict(store.put_partition(&both)).contains("another active partition"));
    assert!(conflict(store.remove_partition(&name("web-a"))).contains("belongs to service"));
    let taken = store.assign_standby(&name("web-b"), Some(&name("api")));
    assert!(conflict(taken).contains("taken by"));

    let job = begin(&mut store, "web");
    assert!(conflict(store.remove_service(&name("web"))).contains("not over"));
    let _ = store.end_job(job, ExitCode::Done, "").unwrap();
    assert_eq!(store.remove_service(&name("web")).unwrap(), Change::Changed);
    assert_eq!(store.remove_service(&name("web")).unwrap(), Change::AlreadySo);
    assert!(store.partitions().unwrap().iter().all(|p| p.service.is_none() && p.role == Role::Standby));
    assert_eq!(store.put_service(&service("api", "192.0.2.10", "web-a")).unwrap(), Change::Changed);
}

#[test]
fn the_same_file_is_the_same_patch_and_decisions_are_audited() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let (id, change) = store.add_patch(&new_patch("a.deb", 1), &admin()).unwrap();
    assert_eq!(change, Change::Changed);
    assert_eq!(store.add_patch(&new_patch("other.deb", 1), &admin()).unwrap(), (id, Change::AlreadySo));
    let types = "bugfix, enhancement".parse().unwrap();
    let more = NewPatch { types, ..new_patch("a.deb", 1) };
    assert_eq!(store.add_patch(&more, &admin()).unwrap(), (id, Change::Changed));
    let nothing = NewPatch { types: Types::default(), ..new_patch("b.deb", 2) };
    assert!(conflict(store.add_patch(&nothing, &admin())).contains("no type"));

    let mail = Who { name: "alice".to_owned(), how: "mail".to_owned() };
    assert_eq!(store.decide(id, Decision::Approved, &mail).unwrap(), Change::Changed);
    assert_eq!(store.decide(id, Decision::Approved, &admin()).unwrap(), Change::AlreadySo);
    let patch = store.find_patch("a.deb").unwrap();
    assert_eq!(patch.types.to_string(), "security,bugfix,enhancement");
    assert_eq!((patch.decision, &patch.decided_by), (Decision::Approved, &mail));
    assert_eq!(patch.issued_at, new_patch("a.deb", 1).issued_at);
    let audit = store.audit(10).unwrap();
    let lines: Vec<String> = audit
        .iter()
        .map(|row| format!("{} {} {}: {} > {}", row.who.name, row.action, row.subject, row.before, row.after))
        .collect();
    assert_eq!(
        lines,
        [
            "root add patch 1:  > a.deb",
            "root join types patch 1: security > security,bugfix,enhancement",
            "alice decide patch 1: pending > approved",
        ]
    );
    assert_eq!(store.audit(1).unwrap(), audit[2..]);
}

#[test]
fn a_patch_is_found_by_number_name_and_digest() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let (one, _) = store.add_patch(&new_patch("a.deb", 0xab), &admin()).unwrap();
    let (two, _) = store.add_patch(&new_patch("a.deb", 0xac), &admin()).unwrap();
    assert_eq!(store.find_patch("1").unwrap().id, one);
    assert_eq!(store.find_patch("acacacac").unwrap().id, two);
    assert!(conflict(store.find_patch("a.deb")).contains("means 2"));
    for none in ["3", "b.deb", "abab", "acacacad", "", "' OR 1=1 --"] {
        assert!(matches!(store.find_patch(none), Err(StoreError::NotFound { .. })), "{none}");
    }
}

#[test]
fn a_service_has_one_open_job_and_steps_go_one_way() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let job = begin(&mut store, "web");
    let other = begin(&mut store, "api");
    let (web, plan) = (name("web"), json!(null));
    let again = NewJob { service: &web, kind: "commit", plan: &plan, boot_id: "boot" };
    assert!(conflict(store.begin_job(&again)).contains("job 1 (apply) of service web is not over"));
    let step = store.intend(job, "clone", &json!({ "device": "ps-web-b-root" })).unwrap();
    assert_eq!(store.steps(job).unwrap()[0].state, StepState::Intended);
    assert_eq!(store.conclude(step, StepState::Done, &json!({ "ms": 7 })).unwrap(), Change::Changed);
    assert_eq!(store.conclude(step, StepState::Done, &json!(null)).unwrap(), Change::AlreadySo);
    assert!(conflict(store.conclude(step, StepState::Failed, &json!(null))).contains("cannot become"));
    assert_eq!(store.conclude(step, StepState::Undone, &json!(null)).unwrap(), Change::Changed);
    assert!(conflict(store.conclude(step, StepState::Done, &json!(null))).contains("cannot become"));

    assert_eq!(store.open_jobs().unwrap().len(), 2);
    assert_eq!(store.end_job(job, ExitCode::PatchFailed, "dpkg: 1").unwrap(), Change::Changed);
    assert_eq!(store.end_job(job, ExitCode::PatchFailed, "again").unwrap(), Change::AlreadySo);
    assert!(conflict(store.end_job(job, ExitCode::Done, "")).contains("ended with 20"));

    assert!(conflict(store.intend(job, "boot", &json!(null))).contains("is over"));
    assert_eq!(store.open_job(&web).unwrap(), None);
    assert_eq!(store.open_jobs().unwrap()[0].id, other);
    let next = begin(&mut store, "web");
    let listed: Vec<JobId> = store.jobs(Some(&web), 10).unwrap().iter().map(|job| job.id).collect();
    assert_eq!(listed, [job, next]);
    let ended = store.job(job).unwrap().unwrap();
    assert_eq!((ended.exit_code, ended.message.as_deref()), (Some(20), Some("dpkg: 1")));
}

#[test]
fn the_last_job_that_was_to_patch_a_service_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let (web, plan) = (name("web"), json!(null));
    assert_eq!(store.last_apply(&web).unwrap(), None);
    let first = begin(&mut store, "web");
    let _other = begin(&mut store, "api");
    assert_eq!(store.end_job(first, ExitCode::Done, "").unwrap(), Change::Changed);
    let commit = NewJob { service: &web, kind: "commit", plan: &plan, boot_id: "boot" };
    let commit = store.begin_job(&commit).unwrap();
    assert_eq!(store.last_apply(&web).unwrap(), Some(first), "neither the commit nor the other service's");
    assert_eq!(store.end_job(commit, ExitCode::Done, "").unwrap(), Change::Changed);
    let second = begin(&mut store, "web");
    assert_eq!(store.last_apply(&web).unwrap(), Some(second));
}
