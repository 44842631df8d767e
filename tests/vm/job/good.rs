//! Jobs that go well, and `down` and `up` between them.

use std::fs;

use super::client::Client;
use super::stage::{SERVICE, Settings, Stage, path};

/// Clone, patch, take over, drain, retire, commit; then again, with the roles exchanged. Without `--commit` the old
/// partition is kept: rolled back to, and after the next job committed away, here by the example of the crate.
#[test]
fn jobs_go_there_and_back() {
    let stage = Stage::new(&Settings { scan: true, ..Settings::default() });
    let client = Client::start(&stage.client);
    let id = stage.says("v2");
    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(stage.patch_row(&id)["last_result"]["success"], true);
    assert!(stage.ends_with(10, &["apply", SERVICE]).contains("no patch is approved"));

    stage.says("v3");
    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v3", "web-a"));
    let refused = stage.ends_with(1, &["apply", SERVICE]);
    assert!(refused.contains("still has web-b of the last job"), "{refused}");
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    armed(&stage);

    // The patch is not applied any more. This time by a program that uses the crate, as its documentation shows.
    let said = stage.example("whole_job", &[SERVICE]);
    for line in [
        "web-b will be cloned into web-a and patched with says-v3",
        "take_over done",
        "web-a serves, and is the disk",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v3", "web-a"));
    assert!(stage.ends_with(10, &["rollback", SERVICE]).contains("there is no old partition"));
    assert!(stage.ends_with(10, &["commit", SERVICE]).contains("nothing to commit"));
    assert_eq!(client.all_answered(), ["v1", "v2", "v3", "v2", "v3"]);
    stage.finish();
}

/// Before the switch back, flows without a socket were remembered for the whole of `udp_idle`, a second.
fn armed(stage: &Stage) {
    let report = stage.json(&["report"]);
    let phases = report["report"]["phases"].as_array().unwrap();
    let names: Vec<&str> = phases.iter().filter_map(|phase| phase[0].as_str()).collect();
    assert_eq!(names, ["boot", "verify", "arm", "give_back", "drain"], "{report}");
    let seconds: f64 = phases[1..3].iter().filter_map(|phase| phase[1].as_f64()).sum();
    assert!(seconds >= 1.0, "{report}");
}

/// Everything out of the kernel, and back: first a partition alone, then a clone that serves and an old side to go back
/// to.
#[test]
fn down_leaves_nothing_and_up_brings_the_same_service_back() {
    let stage = Stage::new(&Settings::default());
    down_and_up(&stage, "v1");
    stage.says("v2");
    stage.ok(&["apply", SERVICE]);
    // Left by a `patch add` that was killed.
    let copy = path("state/patches/.new-1-0");
    fs::write(&copy, "#!/bin").unwrap();
    let said = down_and_up(&stage, "v2");
    assert!(said.contains("half copied") && !copy.exists(), "{said}");
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    stage.finish();
}

/// What `up` said.
#[track_caller]
fn down_and_up(stage: &Stage, who: &str) -> String {
    let said = stage.ok(&["down"]);
    assert!(said.contains("`patchswitch up` brings them back"), "{said}");
    stage.nothing_left();
    assert!(stage.ok(&["down"]).contains("nothing to do"));
    let said = stage.ok(&["up"]);
    assert!(said.contains("service web was started"), "{said}");
    assert_eq!(stage.who(), who);
    assert!(stage.ok(&["up"]).contains("nothing to do"));
    said
}
