//! Patches applied at the boot of a partition.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use patchswitch::host::linux::cgroup::Cgroup;
use patchswitch::partition::lifecycle;
use patchswitch::patch::wire::{
    Driver, Identity, OnError, PatchFailure, PatchInput, PatchResults, PatchTableInput, PatchVerdict,
    WIRE_VERSION,
};
use patchswitch_tests::programs::run;

use super::lab::{Lab, SOON};

/// Gives the partition a table with these scripts, each with a limit in seconds.
pub(super) fn table(lab: &Lab, scripts: &[(&str, u64)]) -> PatchTableInput {
    let mut table = PatchTableInput {
        version: WIRE_VERSION,
        job: "job-1".to_owned(),
        on_error: OnError::Stop,
        identity: Identity::Keep,
        patches: Vec::new(),
    };
    for (index, (body, limit)) in scripts.iter().enumerate() {
        let content = format!("#!/bin/sh\n{body}\n");
        let file = super::lab::scratch("patch").join("content");
        fs::write(&file, &content).unwrap();
        let sha256 = run(&["sha256sum", file.to_str().unwrap()]).unwrap()[..64].to_owned();
        fs::remove_dir_all(file.parent().unwrap()).unwrap();
        let patch = PatchInput {
            id: format!("p{index}"),
            file: format!("script{index}"),
            sha256,
            size: content.len() as u64,
            driver: Driver::Script,
            time_limit_s: *limit,
            group: 0,
        };
        lab.put(&patch.path(), 0o644, &content);
        table.patches.push(patch);
    }
    lab.put("/var/lib/patchswitch/table.json", 0o644, &serde_json::to_string(&table).unwrap());
    table
}

/// Adds the packages of a directory to the table, to be installed together.
pub(super) fn with_packages(lab: &Lab, table: &mut PatchTableInput, dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let sha256 = run(&["sha256sum", path.to_str().unwrap()]).unwrap()[..64].to_owned();
        let patch = PatchInput {
            id: format!("p{}", table.patches.len()),
            file: path.file_name().unwrap().to_string_lossy().into_owned(),
            sha256,
            size: fs::metadata(&path).unwrap().len(),
            driver: Driver::Deb,
            time_limit_s: 100,
            group: 1,
        };
        let (content, place) =
            (fs::read(&path).unwrap(), lab.root.join(patch.path().trim_start_matches('/')));
        lab.mounts.run(|_| fs::write(place, content)).unwrap().unwrap();
        table.patches.push(patch);
    }
    assert!(!table.patches.is_empty());
    lab.put("/var/lib/patchswitch/table.json", 0o644, &serde_json::to_string(table).unwrap());
}

#[test]
fn patches_are_applied_at_the_first_boot_reported_and_followed_by_the_service() {
    let lab = Lab::new();
    lab.script("50-script", "echo starting >>/trace");
    let table = table(&lab, &[("echo one >>/trace; echo said", 60), ("echo two >>/trace", 60)]);
    let mut started = lab.try_start().unwrap();
    let results = lifecycle::wait_results(&mut started, &table, Instant::now() + SOON).unwrap().unwrap();
    assert_eq!(results.verdict(&table), PatchVerdict::Applied);
    assert_eq!(results.boot_id, started.control.boot().boot_id);
    assert_eq!(results.outcomes[0].log_tail, "said\n");
    lifecycle::wait_started(&mut started, Instant::now() + SOON).unwrap().unwrap();
    assert_eq!(lab.get("/trace").unwrap(), "starting\none\ntwo\n");
    // The restart that lets them take effect: nothing is run twice, and the results are still there.
    lab.stop(SOON);
    let again = lab.start();
    assert_ne!(again.control.boot().boot_id, results.boot_id);
    assert_eq!(lab.get("/trace").unwrap(), "starting\none\ntwo\nstarting\n");
    assert_eq!(lifecycle::read_results(&lab.mounts, &lab.root).unwrap(), Some(results));
}

#[test]
fn a_failing_patch_is_reported_and_ends_the_partition_before_its_service() {
    let lab = Lab::new();
    let table = table(&lab, &[("echo the reason; exit 6", 60), ("echo never >>/trace", 60)]);
    let mut started = lab.try_start().unwrap();
    let results = lifecycle::wait_results(&mut started, &table, Instant::now() + SOON).unwrap().unwrap();
    assert_eq!(results.verdict(&table), PatchVerdict::Failed(vec!["p0".to_owned(), "p1".to_owned()]));
    assert_eq!(results.outcomes[0].exit_code, Some(6));
    let reason = lifecycle::wait_started(&mut started, Instant::now() + SOON).unwrap().unwrap_err();
    assert!(reason.contains("applying the patches ended with status 20"), "{reason}");
    assert!(started.process.wait(Instant::now() + SOON).unwrap());
    assert_eq!(lab.get("/trace"), None);
    assert!(!lab.logs().contains("serving"), "{}", lab.logs());
}

#[test]
fn a_hanging_patch_is_killed_by_the_init_and_then_everything_by_the_agent() {
    let lab = Lab::new();
    let stubborn = "trap '' TERM HUP INT QUIT";
    let script = format!(
        "{stubborn}\nsetsid sh -c \"{stubborn}; while :; do sleep 4248; done\" &\nwhile :; do sleep 4249; done"
    );
    let table = table(&lab, &[(&script, 2)]);
    let mut started = lab.try_start().unwrap();
    let results = lifecycle::wait_results(&mut started, &table, Instant::now() + SOON).unwrap().unwrap();
    assert_eq!(results.outcomes[0].failure, Some(PatchFailure::TimeOut));
    lab.stop(Duration::ZERO);
    let processes = run(&["ps", "-e", "-o", "args="]).unwrap();
    assert!(!processes.contains("4248") && !processes.contains("4249"), "{processes}");
}

#[test]
fn a_patch_that_outlives_the_agent_s_patience_is_killed_with_its_whole_cgroup() {
    let lab = Lab::new();
    let table = table(&lab, &[("echo begun; trap '' TERM; while :; do sleep 4250; done", 3600)]);
    let mut started = lab.try_start().unwrap();
    let limit = Instant::now() + Duration::from_secs(4);
    let reason = lifecycle::wait_results(&mut started, &table, limit).unwrap().unwrap_err();
    assert_eq!(reason, "it said nothing in its time");
    let cgroup = Cgroup::new("/patchswitch/lab").unwrap();
    assert!(!cgroup.is_empty().unwrap());
    let start = Instant::now();
    cgroup.kill_all(Duration::from_secs(10)).unwrap();
    assert!(cgroup.is_empty().unwrap());
    eprintln!("cgroup.kill until empty: {:?}", start.elapsed());
    assert!(lab.stop(Duration::ZERO).changed);
    // What was begun and never ended is known to the next boot.
    let unfinished = lifecycle::read_results(&lab.mounts, &lab.root).unwrap().unwrap();
    assert_eq!(unfinished.verdict(&table), PatchVerdict::Unfinished);
    assert_eq!(unfinished.started, ["p0"]);
}

#[test]
fn with_no_agent_listening_the_file_has_the_results() {
    let lab = Lab::new();
    let table = table(&lab, &[("echo patched", 60)]);
    let started = lab.try_start().unwrap();
    // The agent dies.
    let (process, control) = (started.process, started.control);
    drop(control);
    let end = Instant::now() + SOON;
    while !lifecycle::read_results(&lab.mounts, &lab.root).unwrap().is_some_and(|results| results.finished) {
        assert!(Instant::now() < end && !process.has_ended().unwrap(), "no results");
        std::thread::sleep(Duration::from_millis(200));
    }
    let results = lifecycle::read_results(&lab.mounts, &lab.root).unwrap().unwrap();
    assert_eq!(results.verdict(&table), PatchVerdict::Applied);
    // The partition does not wait for an agent for ever.
    while !lab.logs().contains("serving") {
        assert!(Instant::now() < end, "the service was not started");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_result_that_is_no_plain_file_is_refused_without_blocking() {
    let lab = Lab::new();
    let path: PathBuf = lab.root.join("var/lib/patchswitch/result.json");
    assert_eq!(lifecycle::read_results(&lab.mounts, &lab.root).unwrap(), None);
    let put = |make: &(dyn Fn(&Path) + Sync)| {
        lab.mounts
            .run(|_| {
                drop(fs::remove_file(&path));
                make(&path);
            })
            .unwrap();
        lifecycle::read_results(&lab.mounts, &lab.root).unwrap_err().to_string()
    };
    let linked = put(&|path| symlink("/etc/hostname", path).unwrap());
    assert!(linked.contains("result.json"), "{linked}");
    let fifo = put(&|path| drop(run(&["mkfifo", path.to_str().unwrap()])));
    assert!(fifo.contains("result.json"), "{fifo}");
    let noise = put(&|path| fs::write(path, "{").unwrap());
    assert!(noise.contains("failed to parse"), "{noise}");
    let huge = put(&|path| fs::write(path, vec![b' '; 2 << 20]).unwrap());
    assert!(huge.contains("result.json"), "{huge}");
}

/// Results of a partition that lies: another job's are passed over, and so the wait ends with the deadline.
#[test]
fn results_of_another_job_are_passed_over() {
    let lab = Lab::new();
    let mut table = table(&lab, &[("true", 60)]);
    let mut started = lab.try_start().unwrap();
    table.job = "job-2".to_owned();
    let limit = Instant::now() + Duration::from_secs(8);
    let reason = lifecycle::wait_results(&mut started, &table, limit).unwrap().unwrap_err();
    assert_eq!(reason, "it said nothing in its time");
}

/// The patch of the demo: a real root, a real security update, one `dpkg`.
#[test]
fn a_debian_package_is_applied_by_the_partition_s_own_dpkg() {
    let artifacts = PathBuf::from(std::env::var("PATCHSWITCH_ARTIFACTS").unwrap());
    let disk = patchswitch_tests::vm::scratch_disk().unwrap().unwrap();
    let mut lab = Lab::on(&disk, &artifacts.join("root.tar"));
    lab.spec.memory = 256 << 20;
    let mut table = table(&lab, &[]);
    with_packages(&lab, &mut table, &artifacts.join("patch"));
    lab.spec.service = Some(super::lab::service("exec nginx -g 'daemon off;'"));
    lab.spec.service.as_mut().unwrap().stop_signal = 3;
    let mut started = lab.try_start().unwrap();
    let limit = Instant::now() + Duration::from_secs(240);
    let results: PatchResults = lifecycle::wait_results(&mut started, &table, limit).unwrap().unwrap();
    assert_eq!(results.verdict(&table), PatchVerdict::Applied, "{}", lab.logs());
    eprintln!("dpkg took {} ms", results.outcomes[0].duration_ms);
    lifecycle::wait_started(&mut started, Instant::now() + SOON).unwrap().unwrap();
    let version = lab.sh("dpkg-query -W -f '${Version} ${db:Status-Status}' nginx");
    assert!(version.ends_with(" installed"), "{version}");
    let wanted = table.patches.iter().find(|patch| patch.file.starts_with("nginx_")).unwrap();
    assert!(wanted.file.contains(version.split(' ').next().unwrap()), "{version}");
    assert!(lab.get("/usr/sbin/policy-rc.d").is_none(), "the guard is gone");
    // It serves, in its own network.
    let end = Instant::now() + SOON;
    let answer = loop {
        let done = lab.exec(&["perl", "-MIO::Socket::INET", "-e",
            "$s = IO::Socket::INET->new('127.0.0.1:80') or die; print $s \"GET / HTTP/1.0\\r\\n\\r\\n\"; print <$s>"]);
        if done.code == 0 {
            break done.stdout;
        }
        assert!(Instant::now() < end, "nginx does not answer: {}", done.stderr);
        std::thread::sleep(Duration::from_millis(200));
    };
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(!lab.stop(SOON).killed);
}
