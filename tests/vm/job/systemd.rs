//! A whole job of a Debian partition whose own systemd is PID 1, with a real update of its web server.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use patchswitch_tests::netlab;

use super::client::{Client, who};
use super::stage::{SERVICE, Settings, Stage, wait_until};

/// To boot systemd in an emulated machine takes its time.
const BOOT: Duration = Duration::from_secs(120);
/// How long systemd may take to stop; in order it is a matter of seconds.
const STOP: &str = "60s";

/// Runs a line of shell in a partition; what it printed.
#[track_caller]
fn inside(stage: &Stage, partition: &str, line: &str) -> String {
    stage.ok(&["partition", "exec", partition, "--", "/bin/sh", "-c", line])
}

/// The partition serves and has nothing left to start.
fn running(stage: &Stage, partition: &str) {
    wait_until("it serves", BOOT, || who(&stage.client).is_ok());
    let end = Instant::now() + BOOT;
    loop {
        let state = inside(stage, partition, "systemctl is-system-running || :");
        if state.trim() == "running" {
            return;
        }
        let failed = || inside(stage, partition, "systemctl --failed --no-pager");
        assert!(Instant::now() < end, "{state}{}", failed());
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// `web-a` with systemd serves `v1`, `web-b` is its standby.
fn stage() -> Stage {
    let settings =
        Settings { patch_limit: "200s", observe: "4s", come_up: "120s", stop: STOP, ..Settings::default() };
    let stage = Stage::bare(&settings);
    let root = artifacts().join("root-systemd.tar");
    let [a, b] = [netlab::OWN_A, netlab::OWN_B];
    let size = ["--size", "400M", "--memory", "400M"];
    let first = ["--from", root.to_str().unwrap(), "--singleton", "cron", "--own", a[0], "--own", a[1]];
    stage.ok(&[&["partition", "define", "web-a"][..], &first, &size].concat());
    let second = ["--standby", "--own", b[0], "--own", b[1]];
    stage.ok(&[&["partition", "define", "web-b"][..], &second, &size].concat());
    stage.ok(&["service", "add", SERVICE]);
    running(&stage, "web-a");
    inside(&stage, "web-a", "echo v1 > /var/www/html/index.html; sync");
    stage
}

fn artifacts() -> PathBuf {
    PathBuf::from(std::env::var("PATCHSWITCH_ARTIFACTS").unwrap())
}

/// The real update, and before it a script that sees which services run at that time; how many files these are.
fn patches(stage: &Stage) -> usize {
    let trace = "systemctl is-active nginx cron >> /trace; echo v2 > /var/www/html/index.html; exit 0";
    stage.patch("trace", trace);
    let packages = fs::read_dir(artifacts().join("patch")).unwrap().map(|entry| entry.unwrap().path());
    let packages: Vec<String> = packages.map(|path| path.display().to_string()).collect();
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    stage.ok(&[&["patch", "add"][..], &packages, &["--type", "security", "--approve"]].concat());
    1 + packages.len()
}

/// One test: patched before its services are started, once; what must not run twice is masked until the old partition
/// has stopped; both stop in order.
#[test]
fn a_partition_with_systemd_is_patched_and_takes_over() {
    let stage = stage();
    let version = || {
        let active = stage.active();
        inside(&stage, &active, "dpkg-query --show --showformat='${Version}' nginx-light")
    };
    let old = version();
    let patches = patches(&stage);

    // Its client comes later: an active partition that is idle leaves the clone more of the machine's one processor.
    let job = stage.start_until(&["apply", SERVICE], "verify");
    let client = Client::start(&stage.client);
    wait_until("observe", BOOT, || job.output().contains("observe …"));
    let state = "systemctl is-enabled cron; systemctl is-active nginx cron; cat /trace";
    assert_eq!(inside(&stage, "web-b", state), "masked-runtime\nactive\ninactive\ninactive\ninactive\n");
    let ended = job.wait(BOOT).unwrap();
    let report = &stage.json(&["report"])["report"];
    assert_eq!(ended.code(), Some(0), "{report}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(inside(&stage, "web-b", "systemctl is-active nginx cron"), "active\nactive\n");
    assert_eq!(report["patches"].as_array().map(Vec::len), Some(patches), "{report}");
    let new = version();
    assert_ne!(new, old);
    // One that does not stop by itself is killed at the end of its time.
    for name in ["restart", "retire"] {
        let phase = report["phases"].as_array().unwrap().iter().find(|phase| phase[0] == name).unwrap();
        assert!(phase[1].as_f64().unwrap() < 50.0, "{phase}");
    }

    stage.ok(&["commit", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(client.all_answered(), ["v1", "v2"]);
    stage.finish();
}
