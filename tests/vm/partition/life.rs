//! Start, stop, exec, logs; and starts that fail.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use patchswitch::host::linux::programs::Program;
use patchswitch::host::linux::runtime::RuntimeError;
use patchswitch::partition::console::Console;
use patchswitch::partition::lifecycle::{self, LifecycleError, State};
use patchswitch_tests::programs::run;

use super::lab::{Lab, SOON, service};

#[test]
fn a_partition_lives_under_crun() {
    a_life(Program::Crun);
}

#[test]
fn a_partition_lives_under_runc() {
    a_life(Program::Runc);
}

fn a_life(program: Program) {
    let lab = Lab::with(program);
    assert_eq!(lifecycle::state(lab.name()).unwrap(), State::Stopped);
    let started = lab.start();
    assert!(started.changed);
    let State::Running { pid, boot_id } = lifecycle::state(lab.name()).unwrap() else {
        panic!("not running")
    };
    assert_eq!((pid, boot_id.as_str()), (started.process.pid(), started.control.boot().boot_id.as_str()));
    assert_eq!(
        lab.sh("echo inside; cat /proc/1/cmdline | tr '\\0' ' '; hostname").lines().next(),
        Some("inside")
    );
    assert_eq!(lab.sh("hostname"), "lab");
    assert!(lab.sh("cat /proc/1/cmdline").starts_with("/usr/lib/patchswitch/init"));
    assert_eq!(lab.exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]).code, 7);
    let done = lab.exec(&["sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
    // The next agent finds it, and starting it again changes nothing.
    drop(started);
    let again = lab.try_start().unwrap();
    assert!(!again.changed && again.process.pid() == pid);
    assert!(lab.logs().contains("serving"), "{}", lab.logs());
    let stopped = lab.stop(SOON);
    assert!(stopped.changed && !stopped.killed, "{stopped:?}");
    let logs = lab.logs();
    assert!(logs.contains("bye\n") && logs.contains("asked to stop"), "{logs}");
    assert_eq!(lifecycle::state(lab.name()).unwrap(), State::Stopped);
    assert!(!lab.stop(SOON).changed, "there is nothing left to stop");
    assert!(matches!(
        lifecycle::exec(&lab.runtime, &lab.mounts, lab.name(), &["true"], SOON),
        Err(LifecycleError::NotRunning { .. })
    ));
    // And it starts again on the same root.
    let third = lab.start();
    assert!(third.changed);
    assert!(!lab.stop(SOON).killed);
}

#[test]
fn a_command_has_a_time_limit_and_leaves_nothing_waiting() {
    for program in [Program::Crun, Program::Runc] {
        let lab = Lab::with(program);
        let _started = lab.start();
        let start = Instant::now();
        let limit = Duration::from_secs(2);
        let late = lifecycle::exec(&lab.runtime, &lab.mounts, lab.name(), &["sleep", "4242"], limit);
        let Err(LifecycleError::Runtime(RuntimeError::TimeOut { command, .. })) = late else {
            panic!("{late:?} instead of a time-out")
        };
        assert_eq!(command, "sleep 4242");
        assert!(start.elapsed() < Duration::from_secs(20));
        assert!(!lab.sh("ps -e -o args=").contains("4242"), "the command lives on in the partition");
        // runc itself waits until the output is closed.
        let quiet = if program == Program::Runc { ">/dev/null 2>&1" } else { "" };
        let start = Instant::now();
        assert_eq!(lab.sh(&format!("sleep 4243 {quiet} & echo gone")), "gone");
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{program}: the caller is kept by a child that stays"
        );
        assert!(lab.sh("ps -e -o args=").contains("sleep 4243"), "what a command leaves running stays");
        let missing = lifecycle::exec(&lab.runtime, &lab.mounts, lab.name(), &["no-such-program"], SOON);
        let text = missing.unwrap_err().to_string();
        assert!(
            text.contains("failed to run a command in lab") && text.contains("no-such-program"),
            "{text}"
        );
        assert!(!Path::new("/run/patchswitch/oci.exec").exists(), "files of exec are left");
    }
}

#[test]
fn a_root_without_an_init_is_refused_and_nothing_is_left() {
    let lab = Lab::new();
    lab.mounts.run(|_| fs::remove_file(lab.root.join("usr/lib/patchswitch/init"))).unwrap().unwrap();
    let error = lab.try_start().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the root has no /usr/lib/patchswitch/init that could be its init: it is not there"
    );
    assert_eq!(lifecycle::state(lab.name()).unwrap(), State::Stopped);
}

#[test]
fn an_init_that_cannot_be_executed_is_said_by_the_runtime_and_nothing_is_left() {
    for program in [Program::Crun, Program::Runc] {
        let lab = Lab::with(program);
        lab.put("/usr/lib/patchswitch/init", 0o755, "this is no program");
        // crun notices at `start`, runc too; either way what was made is undone.
        let result = lab.try_start().and_then(|mut started| {
            let came_up = lifecycle::wait_started(&mut started, Instant::now() + SOON)?;
            assert!(came_up.is_err(), "{came_up:?}");
            Ok(())
        });
        if let Err(error) = result {
            assert!(
                matches!(error, LifecycleError::Runtime(_) | LifecycleError::EndedEarly { .. }),
                "{error:?}"
            );
        }
        lab.stop(Duration::ZERO);
        assert_eq!(lifecycle::state(lab.name()).unwrap(), State::Stopped);
        assert!(!Path::new("/run/patchswitch/oci/lab").exists());
    }
}

#[test]
fn a_service_that_does_not_exist_or_fails_ends_the_partition_with_its_reason() {
    let mut lab = Lab::new();
    for (script, reason) in
        [("exit 5", "the service ended with status 5"), ("kill -9 $$", "ended by signal 9")]
    {
        lab.spec.service = Some(service(script));
        let mut started = lab.try_start().unwrap();
        // It was started; then it fails, and there are no restarts left.
        lifecycle::wait_started(&mut started, Instant::now() + SOON).unwrap().unwrap_or_default();
        assert!(started.process.wait(Instant::now() + SOON).unwrap());
        lab.stop(Duration::ZERO);
        assert!(lab.logs().contains(reason), "{}", lab.logs());
    }
    lab.spec.service = Some(service(""));
    lab.spec.service.as_mut().unwrap().command = vec!["/no/such/program".to_owned()];
    let mut started = lab.try_start().unwrap();
    let reason = lifecycle::wait_started(&mut started, Instant::now() + SOON).unwrap().unwrap_err();
    assert!(reason.contains("failed to start the service /no/such/program"), "{reason}");
    assert!(reason.contains("status 127"), "{reason}");
}

#[test]
fn a_failed_service_is_started_again_so_often() {
    let mut lab = Lab::new();
    lab.spec.service = Some(service("echo attempt; exit 3"));
    lab.spec.service.as_mut().unwrap().restarts = 2;
    let started = lab.try_start().unwrap();
    assert!(started.process.wait(Instant::now() + SOON).unwrap());
    lab.stop(Duration::ZERO);
    assert_eq!(lab.logs().lines().filter(|line| *line == "attempt").count(), 3, "{}", lab.logs());
}

#[test]
fn starting_scripts_run_in_order_and_the_first_failure_ends_the_start() {
    let lab = Lab::new();
    for name in ["20-second", "10-first", "30-third"] {
        lab.script(name, &format!("echo {name} $PATCHSWITCH_BOOT_ID >>/trace"));
    }
    lab.put("/etc/patchswitch/start.d/README", 0o644, "no script");
    let started = lab.start();
    let boot_id = started.control.boot().boot_id.clone();
    let expected = format!("10-first {boot_id}\n20-second {boot_id}\n30-third {boot_id}\n");
    assert_eq!(lab.get("/trace").unwrap(), expected);
    lab.stop(SOON);
    lab.script("20-second", "echo fails; exit 4");
    lab.put("/trace", 0o644, "");
    let mut started = lab.try_start().unwrap();
    let reason = lifecycle::wait_started(&mut started, Instant::now() + SOON).unwrap().unwrap_err();
    assert_eq!(reason, "starting script 20-second ended with status 4 (status 4)");
    assert_eq!(lab.get("/trace").unwrap().lines().count(), 1);
    assert!(started.process.wait(Instant::now() + SOON).unwrap());
}

#[test]
fn a_hanging_starting_script_is_killed_with_a_grandchild_that_ignores_everything() {
    let lab = Lab::new();
    let stubborn = "trap '' TERM HUP INT QUIT";
    lab.script(
        "10-hangs",
        &format!("{stubborn}\nsetsid sh -c \"{stubborn}; while :; do sleep 4244; done\" &\necho begun; while :; do sleep 4245; done"),
    );
    let mut started = lab.try_start().unwrap();
    let limit = Instant::now() + Duration::from_secs(3);
    let reason = lifecycle::wait_started(&mut started, limit).unwrap().unwrap_err();
    assert_eq!(reason, "it said nothing in its time");
    assert!(lab.logs().contains("begun"));
    let start = Instant::now();
    let stopped = lab.stop(Duration::ZERO);
    assert!(stopped.killed && start.elapsed() < Duration::from_secs(10), "{stopped:?} {:?}", start.elapsed());
    let processes = run(&["ps", "-e", "-o", "args="]).unwrap();
    assert!(!processes.contains("4244") && !processes.contains("4245"), "{processes}");
}

#[test]
fn a_partition_with_a_hanging_script_still_stops_when_asked() {
    let lab = Lab::new();
    lab.script("10-hangs", "while :; do sleep 4246; done");
    let _started = lab.try_start().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let stopped = lab.stop(SOON);
    assert!(stopped.changed && !stopped.killed, "PID 1 obeys while a script hangs: {stopped:?}");
}

#[test]
fn a_service_that_ignores_its_signal_is_killed_at_the_end_of_its_time() {
    let mut lab = Lab::new();
    lab.spec.service = Some(service("trap '' TERM; while :; do sleep 0.2; done"));
    lab.spec.stop_limit_s = 2;
    let _started = lab.start();
    let start = Instant::now();
    let stopped = lab.stop(Duration::from_secs(1));
    // Its init kills it; the agent does not have to.
    assert!(stopped.changed && !stopped.killed, "{stopped:?}");
    assert!((2..12).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[test]
fn what_an_agent_left_that_was_killed_half_way_is_cleared_away_by_the_next_start() {
    let lab = Lab::new();
    // Created, and then the agent died: no record of it.
    let first = lab.try_start().unwrap();
    let pid = first.process.pid();
    fs::remove_file("/run/patchswitch/partitions/lab/record.json").unwrap();
    drop(first);
    assert_eq!(lifecycle::state(lab.name()).unwrap(), State::Remains);
    let second = lab.start();
    assert!(second.changed && second.process.pid() != pid);
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the first one lives on beside the second");
    // The init dies by itself, the agent is away: what remains is said and can be stopped.
    run(&["kill", "-KILL", &second.process.pid().to_string()]).unwrap();
    assert!(second.process.wait(Instant::now() + SOON).unwrap());
    assert_eq!(lifecycle::state(lab.name()).unwrap(), State::Remains);
    assert!(lab.stop(SOON).changed);
    assert_eq!(lifecycle::state(lab.name()).unwrap(), State::Stopped);
}

#[test]
fn singletons_wait_until_they_are_unmasked() {
    let mut lab = Lab::new();
    lab.spec.singletons = vec!["cron".to_owned()];
    lab.script("10-app", "echo app >>/trace");
    lab.script("20-cron", "echo cron >>/trace; sleep 4247 &");
    lab.quiet = true;
    let _started = lab.start();
    assert_eq!(lab.get("/trace").unwrap(), "app\n");
    lifecycle::unmask(&lab.runtime, &lab.mounts, &lab.spec).unwrap();
    assert_eq!(lab.get("/trace").unwrap(), "app\ncron\n");
    assert!(lab.sh("ps -e -o args=").contains("sleep 4247"), "what the script started stays");
    lab.script("20-cron", "echo reason >&2; exit 9");
    let error = lifecycle::unmask(&lab.runtime, &lab.mounts, &lab.spec).unwrap_err().to_string();
    assert!(error.contains("status 9") && error.contains("20-cron"), "{error}");
}

#[test]
fn a_chatty_partition_fills_nothing_and_its_last_words_survive() {
    let mut lab = Lab::new();
    lab.spec.service = Some(service(
        "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo last words; while :; do sleep 1; done",
    ));
    let _started = lab.start();
    let end = Instant::now() + SOON;
    while !lab.logs().contains("last words") {
        assert!(Instant::now() < end, "the last words did not come");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(lab.logs().len(), 64 << 10, "64 KiB are kept");
    let size = |file: &str| fs::metadata(file).map_or(0, |found| found.len());
    let (current, older) =
        (size("/run/patchswitch/console/lab.log"), size("/run/patchswitch/console/lab.log.1"));
    assert!(current + older <= 512 << 10, "{current} + {older} bytes");
    lab.stop(Duration::ZERO);
    assert!(lab.logs().ends_with("last words\n"), "they outlive the partition");
    assert!(Console::of(lab.name()).remove().unwrap());
}
