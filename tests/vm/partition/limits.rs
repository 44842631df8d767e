//! A partition has what the resource table says, and no more.

use std::fs;
use std::time::{Duration, Instant};

use patchswitch::host::linux::cgroup::Cgroup;
use patchswitch::host::linux::programs::Program;

use super::lab::Lab;

#[test]
fn the_kernel_has_the_limits_of_the_table() {
    for program in [Program::Crun, Program::Runc] {
        let mut lab = Lab::with(program);
        (lab.spec.cpu_percent, lab.spec.memory, lab.spec.pids) = (25, 96 << 20, 64);
        let started = lab.start();
        assert_eq!(lab.cgroup("cpu.max"), "25000 100000");
        assert_eq!(lab.cgroup("memory.max"), (96 << 20).to_string());
        assert_eq!(lab.cgroup("pids.max"), "64");
        let members = lab.cgroup("cgroup.procs");
        assert!(members.lines().any(|pid| pid == started.process.pid().to_string()), "{members}");
    }
}

/// On a host with one processor nobody is to notice that a standby boots and patches itself.
#[test]
fn a_standby_gets_what_the_active_one_leaves_until_it_is_checked() {
    for program in [Program::Crun, Program::Runc] {
        let mut lab = Lab::with(program);
        lab.quiet = true;
        let _started = lab.start();
        assert_eq!(lab.cgroup("cpu.idle"), "1");
        patchswitch::partition::lifecycle::full_speed(lab.name()).unwrap();
        assert_eq!((lab.cgroup("cpu.idle"), lab.cgroup("cpu.weight")), ("0".to_owned(), "100".to_owned()));
        lab.stop(Duration::from_secs(5));
        lab.quiet = false;
        let _started = lab.start();
        assert_eq!(lab.cgroup("cpu.idle"), "0");
    }
}

#[test]
fn a_busy_loop_gets_its_share_of_one_processor() {
    let mut lab = Lab::new();
    lab.spec.cpu_percent = 25;
    let _started = lab.start();
    let cgroup = Cgroup::new("/patchswitch/lab").unwrap();
    lab.sh("sh -c 'while :; do :; done' >/dev/null 2>&1 &");
    std::thread::sleep(Duration::from_secs(1));
    let (before, start) = (cgroup.usage().unwrap(), Instant::now());
    std::thread::sleep(Duration::from_secs(6));
    let (after, elapsed) = (cgroup.usage().unwrap(), start.elapsed());
    let share = (after.cpu_us - before.cpu_us) as f64 / elapsed.as_micros() as f64;
    assert!((0.22..=0.28).contains(&share), "{share} of a processor");
    assert!(after.throttled_us > before.throttled_us);
}

#[test]
fn memory_beyond_the_limit_kills_inside_only() {
    let mut lab = Lab::new();
    lab.spec.memory = 64 << 20;
    let started = lab.start();
    let done = lab.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M count=1"]);
    assert_eq!(done.code, 137, "{done:?}");
    let cgroup = Cgroup::new("/patchswitch/lab").unwrap();
    assert!(cgroup.usage().unwrap().oom_kills >= 1);
    assert!(!started.process.has_ended().unwrap(), "the init goes on");
}

#[test]
fn processes_beyond_the_limit_are_refused_inside_only() {
    let mut lab = Lab::new();
    lab.spec.pids = 20;
    let _started = lab.start();
    let done = lab.exec(&[
        "sh",
        "-c",
        "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 30 & done; echo all",
    ]);
    assert!(done.code != 0 && done.stderr.contains("fork"), "{done:?}");
    assert!(Cgroup::new("/patchswitch/lab").unwrap().usage().unwrap().pids <= 20);
}

#[test]
fn root_inside_is_not_root_outside() {
    for program in [Program::Crun, Program::Runc] {
        let lab = Lab::with(program);
        let _started = lab.start();
        assert_eq!(lab.sh("id -u"), "0");
        let status = lab.sh("cat /proc/self/status");
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_eq!(field("Seccomp:"), "2");
        // chown dac_override fowner fsetid kill setgid setuid net_bind_service setfcap
        assert_eq!(u64::from_str_radix(field("CapBnd:"), 16).unwrap(), 0x8000_04fb);
        assert_eq!(field("CapEff:"), field("CapBnd:"));
        for (refused, why) in [
            ("mount -t tmpfs none /srv", "mounting"),
            ("unshare --user true", "a user namespace"),
            ("unshare --mount true", "a mount namespace"),
            ("mknod /srv/disk b 7 0", "a device node"),
            ("echo 1 >/proc/sys/kernel/sysrq", "a setting of the host"),
            ("echo b >/proc/sysrq-trigger", "a reset of the host"),
            ("echo 1 >/sys/fs/cgroup/cgroup.kill", "its own cgroup"),
            ("hostname other", "its name"),
            ("touch /run/patchswitch/control/x", "the control directory"),
            ("cat /proc/kcore | head -c 1 | grep .", "the kernel's memory"),
        ] {
            let done = lab.exec(&["sh", "-c", refused]);
            assert_ne!(done.code, 0, "{why} is possible under {program}: {refused}");
        }
        assert_eq!(
            lab.sh("ls /dev")
                .split_whitespace()
                .filter(|n| n.starts_with("vd") || n.starts_with("loop"))
                .count(),
            0
        );
        let secret = format!("/proc/{}/environ", std::process::id());
        assert_ne!(lab.exec(&["cat", &secret]).code, 0, "a process of the host is visible");
        assert!(fs::metadata("/proc/sysrq-trigger").is_ok());
    }
}
