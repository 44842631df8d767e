//! The command line as a program: what it prints, and the number it ends with.
#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

#[expect(clippy::disallowed_methods, reason = "a test of a program starts it")]
fn patchswitch(state: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patchswitch"));
    command.args(arguments).arg("--config").arg(state.join("patchswitch.toml"));
    command.env("PATCHSWITCH_STATE_DIR", state.join("state")).stdin(Stdio::null()).output().unwrap()
}

fn json(output: &Output) -> Value {
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
    let doctor = json(&output);
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
    let doctor = json(&output);
    let configuration = item(&doctor, "configuration");
    assert_eq!(configuration["state"], "missing");
    assert!(configuration["found"].as_str().unwrap().contains("patchswitch.toml:2:1"), "{configuration}");
}

#[test]
fn host_show_tells_what_a_standby_has_taken() {
    let dir = tempfile::tempdir().unwrap();
    let show = || json(&patchswitch(dir.path(), &["host", "show", "--json"]));
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
