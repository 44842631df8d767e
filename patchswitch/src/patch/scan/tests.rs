//! Clones that are clean, broken and hostile.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use md5::{Digest, Md5};

use super::*;
use crate::patch::digest::hex;

/// A root with the package `tool`, which has two programs and a configuration file.
struct Clone {
    dir: tempfile::TempDir,
}

impl Clone {
    fn new() -> Self {
        let clone = Self { dir: tempfile::tempdir().unwrap() };
        for (path, content) in [
            ("root/usr/bin/tool", "tool 1.0"),
            ("root/usr/bin/other", "other 1.0"),
            ("root/etc/tool.conf", "changed by the administrator"),
            ("outside/secret", "tool 1.0"),
        ] {
            clone.put(path, content);
        }
        symlink("usr/bin", clone.at("root/bin")).unwrap();
        let conffile = format!("{}  etc/tool.conf\n", md5_of("as delivered"));
        clone.put(
            "root/var/lib/dpkg/status",
            "Package: tool\nStatus: install ok installed\nArchitecture: amd64\nConffiles:\n /etc/tool.conf 00\n\n\
             Package: empty\nStatus: install ok installed\nArchitecture: all\n",
        );
        let sums =
            [("usr/bin/tool", "tool 1.0"), ("bin/other", "other 1.0"), ("usr/share/doc/tool", "left out")];
        let sums = sums.map(|(path, content)| format!("{}  {path}\n", md5_of(content))).concat();
        clone.put("root/var/lib/dpkg/info/tool:amd64.md5sums", &(sums + &conffile));
        clone
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn put(&self, path: &str, content: &str) {
        let path = self.at(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn scan(&self, wanted: &Scan) -> Report {
        scan(&self.at("root"), wanted)
    }

    fn packages(&self) -> Verdict {
        self.scan(&wanted(None)).checks.remove(0).verdict
    }

    fn command(&self, command: &str) -> Verdict {
        self.scan(&Scan { packages: false, ..wanted(Some(command)) }).checks.remove(1).verdict
    }
}

fn md5_of(content: &str) -> String {
    hex(&Md5::digest(content))
}

fn wanted(command: Option<&str>) -> Scan {
    Scan {
        packages: true,
        command: command.map(str::to_owned),
        limit: Duration::from_secs(20),
        on_finding: Policy::FailClosed,
        on_failure: Policy::FailClosed,
    }
}

fn found(verdict: Verdict) -> Vec<String> {
    match verdict {
        Verdict::Found { findings, count } => {
            assert_eq!(count, findings.len());
            findings
        }
        other => panic!("{other:?}"),
    }
}

fn failed(verdict: Verdict) -> String {
    match verdict {
        Verdict::Failed(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_clean_clone_passes_with_its_changed_configuration_and_without_its_documentation() {
    let clone = Clone::new();
    let expected = "3 files of 2 packages; 1 files are missing, 1 packages have no digests";
    assert_eq!(clone.packages(), Verdict::Clean(expected.to_owned()));
    let report = clone.scan(&wanted(None));
    assert_eq!(report.judge(&wanted(None)), Ok(Vec::new()));
    assert_eq!(report.checks[1].verdict, Verdict::NotRun("there is no command".to_owned()));
    let off = clone.scan(&Scan { packages: false, ..wanted(None) });
    assert!(matches!(off.checks[0].verdict, Verdict::NotRun(_)));
}

#[test]
fn a_changed_program_is_found_also_behind_a_link_of_the_clone() {
    let clone = Clone::new();
    clone.put("root/usr/bin/tool", "tool 1.O");
    clone.put("root/usr/bin/other", "");
    let expected =
        ["\"/usr/bin/tool\" of package tool has changed", "\"/bin/other\" of package tool has changed"];
    assert_eq!(found(clone.packages()), expected);
}

#[test]
fn a_program_that_leads_out_of_the_clone_is_not_opened() {
    let clone = Clone::new();
    let tool = clone.at("root/usr/bin/tool");
    // The content outside would have the right digest.
    for target in
        [clone.at("outside/secret"), PathBuf::from("../../../outside/secret"), PathBuf::from("/dev/zero")]
    {
        std::fs::remove_file(&tool).unwrap();
        symlink(&target, &tool).unwrap();
        assert_eq!(found(clone.packages()), ["\"/usr/bin/tool\" of package tool is a Symlink"]);
    }
    std::fs::remove_file(&tool).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o755);
    rustix::fs::mknodat(rustix::fs::CWD, &tool, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let start = Instant::now();
    assert_eq!(found(clone.packages()), ["\"/usr/bin/tool\" of package tool is a Fifo"]);
    assert!(start.elapsed() < Duration::from_secs(5), "a pipe blocks its reader");
    // A directory that leads out: inside the clone there is no such place.
    let bin = clone.at("root/usr/bin");
    std::fs::remove_dir_all(&bin).unwrap();
    symlink(clone.at("outside"), &bin).unwrap();
    assert!(matches!(clone.packages(), Verdict::Clean(text) if text.contains("3 files are missing")));
}

#[test]
fn a_database_that_cannot_be_trusted_to_be_one_is_a_failure() {
    let clone = Clone::new();
    let status = clone.at("root/var/lib/dpkg/status");
    std::fs::write(&status, "nonsense").unwrap();
    assert!(failed(clone.packages()).contains("names no package"));
    std::fs::remove_file(&status).unwrap();
    symlink("/etc/passwd", &status).unwrap();
    assert!(failed(clone.packages()).contains("is a Symlink"));
    std::fs::remove_file(&status).unwrap();
    std::fs::File::create(&status).unwrap().set_len(1 << 40).unwrap();
    assert!(failed(clone.packages()).contains("bytes"));
    let clone = Clone::new();
    clone.put("root/var/lib/dpkg/info/tool:amd64.md5sums", "not a digest\n");
    assert!(failed(clone.packages()).contains("not a digest"));
    let none = Clone { dir: tempfile::tempdir().unwrap() };
    std::fs::create_dir(none.at("root")).unwrap();
    assert_eq!(none.packages(), Verdict::NotRun("the clone has no dpkg database".to_owned()));
    let gone = scan(&none.at("nowhere"), &wanted(None));
    assert!(failed(gone.checks[0].verdict.clone()).contains("failed to open the root"));
}

#[test]
fn an_endless_file_ends_with_the_time() {
    let clone = Clone::new();
    std::fs::File::create(clone.at("root/usr/bin/tool")).unwrap().set_len(1 << 42).unwrap();
    let start = Instant::now();
    let short = Scan { limit: Duration::from_millis(300), ..wanted(None) };
    assert!(failed(clone.scan(&short).checks[0].verdict.clone()).contains("no time was left"));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn the_command_sees_the_root_and_its_status_decides() {
    let clone = Clone::new();
    let root = clone.at("root").to_string_lossy().into_owned();
    assert!(matches!(clone.command("test -f \"$PATCHSWITCH_ROOT/usr/bin/tool\""), Verdict::Clean(_)));
    let eicar = "echo \"$PATCHSWITCH_ROOT/x: Eicar FOUND\"; printf 'a\\033[2Jb\\n' >&2; exit 1";
    assert_eq!(found(clone.command(eicar)), [format!("{root}/x: Eicar FOUND"), "a\u{fffd}[2Jb".to_owned()]);
    assert_eq!(found(clone.command("exit 1")), ["the command ended with 1 and said nothing"]);
    assert_eq!(
        failed(clone.command("echo no signatures >&2; exit 2")),
        "the command ended with 2: no signatures"
    );
    assert!(failed(clone.command("kill -9 $$")).contains("signal 9"));
    assert!(failed(clone.command("/nowhere/scanner")).contains("ended with 127"));
    let start = Instant::now();
    let short = Scan { packages: false, limit: Duration::from_millis(200), ..wanted(Some("sleep 60")) };
    assert!(failed(clone.scan(&short).checks[1].verdict.clone()).contains("did not end within 200ms"));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn many_findings_are_counted_and_some_are_kept() {
    let clone = Clone::new();
    let Verdict::Found { findings, count } = clone.command("seq 1 500; exit 1") else { panic!() };
    assert_eq!((findings.len(), count), (KEPT, 500));
    let report = clone.scan(&Scan { packages: false, ..wanted(Some("seq 1 500; exit 1")) });
    let error = report.judge(&wanted(None)).unwrap_err();
    assert_eq!(error.to_string(), "the scan (command) of the clone found 500: 1; 2; 3; and 497 more");
    assert_eq!(error.exit_code().number(), 65);
}

#[test]
fn the_policy_decides_for_findings_and_failures_by_themselves() {
    let clone = Clone::new();
    clone.put("root/usr/bin/tool", "");
    let report = clone.scan(&wanted(Some("exit 9")));
    let policy = |on_finding, on_failure| Scan { on_finding, on_failure, ..wanted(None) };
    let closed = report.judge(&policy(Policy::FailClosed, Policy::FailClosed));
    assert!(matches!(closed, Err(ScanError::Found { check: "packages", .. })));
    let closed = report.judge(&policy(Policy::Warn, Policy::FailClosed));
    assert!(matches!(closed, Err(ScanError::Failed { check: "command", .. })));
    let warnings = report.judge(&policy(Policy::Warn, Policy::Warn)).unwrap();
    assert_eq!(warnings.len(), 2);
    assert!(warnings[0].contains("usr/bin/tool") && warnings[1].contains("ended with 9"), "{warnings:?}");
}
