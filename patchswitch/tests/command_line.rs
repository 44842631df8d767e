//! The command line as a program: what it prints, and the number it ends with.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where something is not as it should be")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use patchswitch::exit::ExitCode;
use patchswitch::names::Name;
use patchswitch::store::{NewJob, StepState, Store};
use serde_json::{Value, json};

#[expect(clippy::disallowed_methods, reason = "a test of a program starts it")]
fn patchswitch(state: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patchswitch"));
    command.args(arguments).arg("--config").arg(state.join("patchswitch.toml"));
    command.env("PATCHSWITCH_STATE_DIR", state.join("state")).stdin(Stdio::null()).output().unwrap()
}

fn read(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text} {output:?}"))
}

fn item<'a>(doctor: &'a Value, name: &str) -> &'a Value {
    let items = doctor["doctor"]["items"].as_array().unwrap();
    items.iter().find(|item| item["name"] == name).unwrap_or_else(|| panic!("no {name} in {doctor}"))
}

#[test]
fn doctor_ends_with_what_it_says_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let output = patchswitch(dir.path(), &["doctor", "--json"]);
    let doctor = read(&output);
    assert_eq!(doctor["schema"], "patchswitch.doctor/1");
    let whole_job = doctor["doctor"]["whole_job"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if whole_job { 0 } else { 69 }));
    // What this test can find out by itself.
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(item(&doctor, "kernel")["found"], release.trim());
    let has_dm = Path::new("/dev/mapper/control").exists();
    assert_eq!(item(&doctor, "device-mapper")["state"] == "missing", !has_dm);
    if !has_dm {
        assert!(
            !whole_job && item(&doctor, "device-mapper")["cost"].as_str().unwrap().contains("only attach")
        );
    }
    assert_eq!(item(&doctor, "configuration")["state"], "ok");
    assert!(!dir.path().join("state").exists(), "the store was made");
    let text = patchswitch(dir.path(), &["doctor"]);
    assert_eq!(text.status.code(), output.status.code());
    assert!(String::from_utf8_lossy(&text.stdout).contains("out of scope"));
}

#[test]
fn doctor_tells_of_a_configuration_that_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("patchswitch.toml"), "[job]\nbooot = \"60s\"\n").unwrap();
    let output = patchswitch(dir.path(), &["doctor", "--json"]);
    assert_eq!(output.status.code(), Some(69));
    let doctor = read(&output);
    let configuration = item(&doctor, "configuration");
    assert_eq!(configuration["state"], "missing");
    assert!(configuration["found"].as_str().unwrap().contains("patchswitch.toml:2:1"), "{configuration}");
}

#[test]
fn host_show_tells_what_a_standby_has_taken() {
    let dir = tempfile::tempdir().unwrap();
    let show = || read(&patchswitch(dir.path(), &["host", "show", "--json"]));
    let before = show();
    assert_eq!(before["schema"], "patchswitch.host/1");
    let define =
        ["partition", "define", "spare", "--standby", "--size", "4M", "--memory", "64M", "--network", "lan7"];
    let defined = patchswitch(dir.path(), &define);
    assert!(defined.status.success(), "{defined:?}");
    let after = show();
    let share = &after["host"]["shares"][0];
    assert_eq!((&share["partition"], &share["network"]), (&"spare".into(), &"lan7".into()));
    assert_eq!(share["amounts"]["memory"], 64 << 20);
    let free = |table: &Value| table["host"]["free"]["memory"].as_i64().unwrap();
    assert_eq!(free(&before) - free(&after), 64 << 20);
    let text = patchswitch(dir.path(), &["host", "show"]);
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(text.contains("spare") && text.contains("(host)") && text.contains("(free)"), "{text}");
}

#[test]
fn a_job_can_be_read_before_it_is_over_and_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let report = || patchswitch(dir.path(), &["report", "--json"]);
    assert_eq!(report().status.code(), Some(1), "there was no job yet");
    let mut store = Store::open(&dir.path().join("state")).unwrap();
    let service = Name::new("web").unwrap();
    let new = NewJob { service: &service, kind: "apply", plan: &json!({}), boot_id: "another boot" };
    let job = store.begin_job(&new).unwrap();
    let clone = store.intend(job, "clone", &json!({})).unwrap();
    let _ = store.conclude(clone, StepState::Done, &json!({"freeze_ms": 41.5})).unwrap();
    store.intend(job, "boot", &json!({})).unwrap();
    // The store stays open, as that of a job under way does.
    let under_way = read(&report());
    assert_eq!((&under_way["progress"], &under_way["report"]), (&"interrupted".into(), &Value::Null));
    assert_eq!(under_way["steps"].as_array().unwrap().len(), 2);
    let status = read(&patchswitch(dir.path(), &["status", "--json"]));
    assert_eq!((&status["jobs"][0]["job"]["kind"], &status["jobs_error"]), (&"apply".into(), &Value::Null));
    let text = patchswitch(dir.path(), &["report"]);
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(
        ["job 1 (apply of web)", "patchswitch up", "freeze_ms 41.5", "boot"]
            .iter()
            .all(|part| text.contains(part)),
        "{text}"
    );
    let _ = store.end_job(job, ExitCode::GateFailed, "verify failed: nobody answers").unwrap();
    assert_eq!(read(&report())["progress"], "over");
    let text = patchswitch(dir.path(), &["report", "1"]);
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(text.contains("nobody answers") && text.contains("exit code 21"), "{text}");
    assert_eq!(read(&patchswitch(dir.path(), &["status", "--json"]))["jobs"], json!([]));
    assert_eq!(patchswitch(dir.path(), &["report", "2"]).status.code(), Some(1));
}

#[test]
fn what_can_be_known_is_said_before_anything_goes_to_the_background() {
    let dir = tempfile::tempdir().unwrap();
    let output = patchswitch(dir.path(), &["apply", "web", "--detach"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no service web"), "{output:?}");
    assert!(!dir.path().join("state/logs").exists());
    let both = patchswitch(dir.path(), &["apply", "web", "--detach", "--supervised"]);
    assert_eq!(both.status.code(), Some(2));
}
