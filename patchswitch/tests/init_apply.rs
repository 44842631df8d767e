//! `patchswitch-init apply` as a program, on a root that is a plain directory. Needs no privilege.
#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use patchswitch::control::{self, Answer, Boot, Frames, Message};
use patchswitch::patch::wire::{
    Driver, Identity, OnError, PatchFailure, PatchInput, PatchOutcome, PatchResults, PatchTableInput,
    PatchVerdict, WIRE_VERSION,
};
use sha2::{Digest, Sha256};

struct Lab {
    dir: tempfile::TempDir,
    table: PatchTableInput,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["var/lib/patchswitch/patches", "usr/sbin", "usr/bin", "run/patchswitch/control"] {
            fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        let table = PatchTableInput {
            version: WIRE_VERSION,
            job: "job-1".to_owned(),
            on_error: OnError::Stop,
            identity: Identity::Keep,
            patches: Vec::new(),
        };
        Self { dir, table }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches('/'))
    }

    fn add(&mut self, driver: Driver, content: &str) -> PatchInput {
        let id = format!("p{}", self.table.patches.len());
        let sha256 = Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
        let patch = PatchInput {
            file: format!("{id}.patch"),
            id,
            sha256,
            size: content.len() as u64,
            driver,
            time_limit_s: 20,
            group: 0,
        };
        fs::write(self.at(&patch.path()), content).unwrap();
        self.table.patches.push(patch.clone());
        patch
    }

    fn script(&mut self, body: &str) -> PatchInput {
        self.add(Driver::Script, &format!("#!/bin/sh\n{body}\n"))
    }

    /// A dpkg that writes down how it was called.
    fn fake_dpkg(&self, status: i32) {
        let script = format!(
            "#!/bin/sh\nd=${{0%/usr/bin/dpkg}}\necho \"$DEBIAN_FRONTEND $*\" >>$d/calls\n\
             test -x $d/usr/sbin/policy-rc.d && $d/usr/sbin/policy-rc.d; echo policy $? >>$d/calls\nexit {status}\n"
        );
        let path = self.at("usr/bin/dpkg");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[expect(clippy::disallowed_methods, reason = "a test of a program starts it")]
    fn start(&self) -> std::process::Child {
        fs::write(self.at("var/lib/patchswitch/table.json"), serde_json::to_vec(&self.table).unwrap())
            .unwrap();
        Command::new(env!("CARGO_BIN_EXE_patchswitch-init"))
            .args(["apply", "--root"])
            .arg(self.dir.path())
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn apply(&self) -> (i32, String) {
        let output = self.start().wait_with_output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn results(&self) -> PatchResults {
        PatchResults::parse(&fs::read(self.at("var/lib/patchswitch/result.json")).unwrap()).unwrap()
    }

    fn outcomes(&self) -> Vec<PatchOutcome> {
        self.results().outcomes
    }

    fn trace(&self) -> String {
        fs::read_to_string(self.at("trace")).unwrap_or_default()
    }
}

#[test]
fn scripts_run_in_order_once_and_say_what_they_wrote() {
    let mut lab = Lab::new();
    for word in ["one", "two"] {
        lab.script(&format!(
            "echo {word} >>$PATCHSWITCH_ROOT/trace; echo out {word}; echo err {word} >&2; echo $PATCHSWITCH_JOB $PATCHSWITCH_PATCHES"
        ));
    }
    let (code, console) = lab.apply();
    assert_eq!(code, 0, "{console}");
    assert_eq!(lab.trace(), "one\ntwo\n");
    let results = lab.results();
    assert_eq!(results.verdict(&lab.table), PatchVerdict::Applied);
    assert!(results.started.is_empty());
    let log = "out two\nerr two\njob-1 p1\n";
    assert_eq!(results.outcomes[1].log_tail, log);
    let digest: String = Sha256::digest(log).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(results.outcomes[1].log_digest, digest);
    assert!(console.contains("out one\nerr one\n"), "the console has it as well: {console}");
    // The second boot of the same job.
    let (code, console) = lab.apply();
    assert_eq!((code, lab.trace().as_str()), (0, "one\ntwo\n"));
    assert!(console.contains("have been dealt with"), "{console}");
}

#[test]
fn the_results_of_an_earlier_job_on_the_same_disk_do_not_count() {
    let mut lab = Lab::new();
    lab.script("echo ran >>$PATCHSWITCH_ROOT/trace");
    assert_eq!(lab.apply().0, 0);
    lab.table.job = "job-2".to_owned();
    assert_eq!(lab.apply().0, 0);
    assert_eq!((lab.trace().as_str(), lab.results().job.as_str()), ("ran\nran\n", "job-2"));
}

#[test]
fn a_failure_stops_the_ones_after_it_unless_the_table_says_otherwise() {
    for (on_error, expected) in [(OnError::Stop, "one\n"), (OnError::Continue, "one\nthree\n")] {
        let mut lab = Lab::new();
        lab.table.on_error = on_error;
        lab.script("echo one >>$PATCHSWITCH_ROOT/trace");
        lab.script("echo the reason; exit 3");
        lab.script("echo three >>$PATCHSWITCH_ROOT/trace");
        assert_eq!(lab.apply().0, 20);
        assert_eq!(lab.trace(), expected);
        let outcomes = lab.outcomes();
        assert_eq!(outcomes[1].exit_code, Some(3));
        assert_eq!(outcomes[1].log_tail, "the reason\n");
        let last = if on_error == OnError::Stop { Some(PatchFailure::NotRun) } else { None };
        assert_eq!(outcomes[2].failure, last);
        let failed = if on_error == OnError::Stop { vec!["p1", "p2"] } else { vec!["p1"] };
        let failed = PatchVerdict::Failed(failed.into_iter().map(ToOwned::to_owned).collect());
        assert_eq!(lab.results().verdict(&lab.table), failed);
    }
}

#[test]
fn a_signal_is_told_from_an_exit() {
    let mut lab = Lab::new();
    lab.script("kill -SEGV $$");
    assert_eq!(lab.apply().0, 20);
    assert_eq!((lab.outcomes()[0].exit_code, lab.outcomes()[0].signal), (None, Some(11)));
}

/// Whether a process with this marker among its arguments is alive.
fn alive(marker: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let has = |path: PathBuf| {
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        // A zombie has no arguments any more.
        String::from_utf8_lossy(&line).split('\0').any(|argument| argument == marker)
    };
    processes
        .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
        .any(|e| has(e.path()))
}

#[test]
fn a_hanging_patch_is_killed_with_a_grandchild_that_left_its_session_and_ignores_everything() {
    let mut lab = Lab::new();
    let marker = format!("77{}", std::process::id());
    lab.script(&format!(
        "trap '' TERM HUP INT\nsetsid sh -c 'trap \"\" TERM HUP INT; while :; do sleep {marker}; done' &\n\
         echo begun; while :; do sleep {marker}; done"
    ));
    lab.script("echo never >>$PATCHSWITCH_ROOT/trace");
    lab.table.patches[0].time_limit_s = 1;
    let start = Instant::now();
    assert_eq!(lab.apply().0, 20);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert!(!alive(&marker), "the grandchild lives on");
    let outcomes = lab.outcomes();
    assert_eq!(outcomes[0].failure, Some(PatchFailure::TimeOut));
    assert_eq!(outcomes[0].log_tail, "begun\n");
    assert_eq!(outcomes[1].failure, Some(PatchFailure::NotRun));
}

#[test]
fn a_patch_that_leaves_a_child_behind_ends_with_its_own_end() {
    let mut lab = Lab::new();
    let marker = format!("78{}", std::process::id());
    lab.script(&format!("sleep {marker} & echo $! >$PATCHSWITCH_ROOT/trace; echo done"));
    let start = Instant::now();
    assert_eq!(lab.apply().0, 0);
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(lab.outcomes()[0].log_tail, "done\n");
    let pid = rustix::process::Pid::from_raw(lab.trace().trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_file_that_changed_or_vanished_is_not_run_and_neither_is_anything_else() {
    let change = |lab: &Lab, patch: &PatchInput| fs::write(lab.at(&patch.path()), "#!/bin/sh\n").unwrap();
    let same_size = |lab: &Lab, patch: &PatchInput| {
        let path = lab.at(&patch.path());
        let content = fs::read_to_string(&path).unwrap();
        fs::write(path, content.replace("echo", "ECHO")).unwrap();
    };
    let vanish = |lab: &Lab, patch: &PatchInput| fs::remove_file(lab.at(&patch.path())).unwrap();
    let fifo = |lab: &Lab, patch: &PatchInput| {
        let path = lab.at(&patch.path());
        fs::remove_file(&path).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    };
    let link = |lab: &Lab, patch: &PatchInput| {
        let path = lab.at(&patch.path());
        fs::rename(&path, lab.at("elsewhere")).unwrap();
        std::os::unix::fs::symlink(lab.at("elsewhere"), path).unwrap();
    };
    type Change<'a> = &'a dyn Fn(&Lab, &PatchInput);
    let cases: [(Change<'_>, PatchFailure); 5] = [
        (&change, PatchFailure::Digest),
        (&same_size, PatchFailure::Digest),
        (&vanish, PatchFailure::Missing),
        (&fifo, PatchFailure::Missing),
        (&link, PatchFailure::Missing),
    ];
    for (spoil, failure) in cases {
        let mut lab = Lab::new();
        lab.script("echo first >>$PATCHSWITCH_ROOT/trace");
        let second = lab.script("echo second >>$PATCHSWITCH_ROOT/trace");
        spoil(&lab, &second);
        assert_eq!(lab.apply().0, 20);
        assert_eq!(lab.trace(), "", "verified before anything is run");
        let outcomes = lab.outcomes();
        assert_eq!(outcomes[0].failure, Some(PatchFailure::NotRun));
        assert_eq!(outcomes[1].failure, Some(failure));
    }
}

#[test]
fn packages_are_given_to_one_dpkg_with_the_guard_in_place() {
    let mut lab = Lab::new();
    lab.fake_dpkg(0);
    let (first, second) = (lab.add(Driver::Deb, "deb 1"), lab.add(Driver::Deb, "deb 2"));
    fs::write(lab.at("usr/sbin/policy-rc.d"), "the administrator's").unwrap();
    let (code, console) = lab.apply();
    assert_eq!(code, 0, "{console}");
    let files = [first, second].map(|patch| lab.at(&patch.path()).display().to_string()).join(" ");
    let expected =
        format!("noninteractive --force-confdef --force-confold --force-unsafe-io -i {files}\npolicy 101\n");
    assert_eq!(fs::read_to_string(lab.at("calls")).unwrap(), expected);
    assert_eq!(fs::read_to_string(lab.at("usr/sbin/policy-rc.d")).unwrap(), "the administrator's");
    assert!(lab.outcomes().iter().all(PatchOutcome::success));
}

#[test]
fn a_failing_dpkg_fails_every_package_of_its_group_and_an_absent_one_too() {
    let mut lab = Lab::new();
    lab.fake_dpkg(2);
    lab.add(Driver::Deb, "deb 1");
    lab.add(Driver::Deb, "deb 2");
    assert_eq!(lab.apply().0, 20);
    assert!(lab.outcomes().iter().all(|outcome| outcome.exit_code == Some(2)));
    assert!(!lab.at("usr/sbin/policy-rc.d").exists(), "the guard is gone after a failure as well");
    lab.table.job = "job-2".to_owned();
    fs::remove_file(lab.at("usr/bin/dpkg")).unwrap();
    assert_eq!(lab.apply().0, 20);
    assert!(lab.outcomes().iter().all(|outcome| outcome.failure == Some(PatchFailure::Driver)));
}

#[test]
fn a_patch_that_a_power_cut_interrupted_is_not_run_again() {
    let mut lab = Lab::new();
    lab.script("echo one >>$PATCHSWITCH_ROOT/trace");
    lab.script("echo two >>$PATCHSWITCH_ROOT/trace");
    let cut = PatchResults { started: vec!["p0".to_owned()], ..PatchResults::new("job-1", "earlier") };
    fs::write(lab.at("var/lib/patchswitch/result.json"), cut.encode().unwrap()).unwrap();
    assert_eq!(lab.apply().0, 20);
    assert_eq!(lab.trace(), "");
    let outcomes = lab.outcomes();
    assert_eq!(outcomes[0].failure, Some(PatchFailure::Interrupted));
    assert_eq!(outcomes[1].failure, Some(PatchFailure::NotRun));
}

#[test]
fn a_power_cut_between_two_patches_goes_on_with_the_second() {
    let mut lab = Lab::new();
    lab.script("echo one >>$PATCHSWITCH_ROOT/trace");
    lab.script("echo two >>$PATCHSWITCH_ROOT/trace; kill -KILL $PPID; sleep 60");
    lab.script("echo three >>$PATCHSWITCH_ROOT/trace");
    // The program is killed in the middle of the second patch, as by a power cut.
    let status = lab.start().wait().unwrap();
    assert!(!status.success());
    let cut = lab.results();
    assert_eq!(
        (cut.started.as_slice(), cut.outcomes.len(), cut.finished),
        (["p1".to_owned()].as_slice(), 1, false)
    );
    lab.table.on_error = OnError::Continue;
    assert_eq!(lab.apply().0, 20);
    assert_eq!(lab.trace(), "one\ntwo\nthree\n", "nothing twice");
    let failures: Vec<_> = lab.outcomes().iter().map(|outcome| outcome.failure).collect();
    assert_eq!(failures, [None, Some(PatchFailure::Interrupted), None]);
}

#[test]
fn a_request_to_stop_ends_the_patch_and_says_so() {
    let mut lab = Lab::new();
    lab.script("echo begun >$PATCHSWITCH_ROOT/trace; sleep 60");
    let mut child = lab.start();
    let end = Instant::now() + Duration::from_secs(10);
    while lab.trace().is_empty() {
        assert!(Instant::now() < end, "the patch did not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(20));
    assert_eq!(lab.outcomes()[0].failure, Some(PatchFailure::Interrupted));
}

#[test]
fn a_table_that_cannot_be_used_is_an_error_and_no_table_is_none() {
    let mut lab = Lab::new();
    lab.script("echo ran >>$PATCHSWITCH_ROOT/trace");
    lab.table.patches[0].file = "../../etc/passwd".to_owned();
    let (code, console) = lab.apply();
    assert_eq!((code, lab.trace().as_str()), (74, ""));
    assert!(console.contains("bad file"), "{console}");
    let empty = Lab::new();
    assert_eq!(empty.apply().0, 0);
    assert!(empty.results().finished);
}

#[test]
fn a_clone_gets_an_identity_of_its_own_if_the_table_says_so() {
    let mut lab = Lab::new();
    fs::create_dir_all(lab.at("etc/ssh")).unwrap();
    fs::write(lab.at("etc/machine-id"), "0123456789abcdef0123456789abcdef\n").unwrap();
    fs::write(lab.at("etc/ssh/ssh_host_rsa_key"), "secret").unwrap();
    lab.script("cat $PATCHSWITCH_ROOT/etc/machine-id");
    assert_eq!(lab.apply().0, 0);
    assert_eq!(lab.outcomes()[0].log_tail, "0123456789abcdef0123456789abcdef\n");
    assert!(lab.at("etc/ssh/ssh_host_rsa_key").exists());
    lab.table.job = "job-2".to_owned();
    lab.table.identity = Identity::Renew;
    assert_eq!(lab.apply().0, 0);
    let id = fs::read_to_string(lab.at("etc/machine-id")).unwrap();
    assert!(id.len() == 33 && !id.starts_with("0123456789abcdef"), "{id:?}");
    assert_eq!(lab.outcomes()[0].log_tail, id, "before any patch");
    assert!(!lab.at("etc/ssh/ssh_host_rsa_key").exists());
}

/// Answers like the agent and returns everything that was said.
fn listen(socket: &Path, answers: usize) -> std::thread::JoinHandle<Vec<Message>> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut frames, mut said, mut piece) = (Frames::default(), Vec::new(), [0; 4096]);
        while said.len() < answers {
            let count = stream.read(&mut piece).unwrap();
            assert!(count > 0, "closed early");
            frames.push(&piece[..count]);
            while let Some(frame) = frames.next_frame().unwrap() {
                said.push(control::parse(&frame).unwrap());
                stream.write_all(&control::encode_answer(&Answer::Accepted).unwrap()).unwrap();
            }
        }
        said
    })
}

#[test]
fn the_results_are_told_over_the_control_socket_and_kept_in_the_file() {
    let mut lab = Lab::new();
    lab.script("echo patched");
    let boot = Boot::new().unwrap();
    fs::write(lab.at("run/patchswitch/control/boot.json"), serde_json::to_vec(&boot).unwrap()).unwrap();
    let agent = listen(&lab.at("run/patchswitch/control/agent.sock"), 2);
    assert_eq!(lab.apply().0, 0);
    let said = agent.join().unwrap();
    assert_eq!(said[0], Message::Hello { boot_id: boot.boot_id.clone(), nonce: boot.nonce });
    assert_eq!(said[1], Message::Results(lab.results()));
    assert_eq!(lab.results().boot_id, boot.boot_id);
}

#[test]
fn with_nobody_listening_the_file_is_all_and_the_wait_is_short() {
    let mut lab = Lab::new();
    lab.script("true");
    let boot = Boot::new().unwrap();
    fs::write(lab.at("run/patchswitch/control/boot.json"), serde_json::to_vec(&boot).unwrap()).unwrap();
    let start = Instant::now();
    let (code, console) = lab.apply();
    assert_eq!(code, 0);
    assert!(console.contains("nobody hears us"), "{console}");
    assert!((4..20).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert_eq!(lab.results().verdict(&lab.table), PatchVerdict::Applied);
}
