//! Jobs that fail: each with its own exit code, the service untouched or given back, and nothing of it left. The same
//! standby serves for the next job each time.

use std::fs;
use std::time::Duration;

use patchswitch_tests::leftovers::Snapshot;

use super::client::{Client, Datagrams};
use super::stage::{SERVICE, Settings, Stage, path};

/// Runs a job that must end with this code before the switch; what it said.
#[track_caller]
fn fails(stage: &Stage, code: i32, patch: &str) -> String {
    let said = stage.ends_with(code, &["apply", SERVICE, "--patch", patch, "--commit"]);
    assert!(said.contains("web-a serves, it was not touched; the clone was discarded"), "{said}");
    assert_eq!(stage.who(), "v1");
    said
}

#[test]
fn a_job_that_fails_is_undone() {
    let stage = Stage::new(&Settings { patch_limit: "2s", observe: "10s", ..Settings::default() });
    let before = Snapshot::take().unwrap();
    let client = Client::start(&stage.client);
    let id = stage.patch("fails", "echo half a patch > /srv/half\necho the library is missing >&2\nexit 3");
    let said = fails(&stage, 20, &id);
    assert!(said.contains("the library is missing"), "{said}");

    // With everything that it started.
    let id = stage.patch("hangs", "setsid sleep 1000 &\nsleep 1000");
    let said = fails(&stage, 20, &id);
    assert!(said.contains("did not end in its time and was killed"), "{said}");

    let id = stage.patch("kills-the-service", "echo '#!/bin/sh\nsleep 1000' > /usr/bin/serve");
    let said = fails(&stage, 21, &id);
    assert!(said.contains("verify failed"), "{said}");

    let id = stage.patch("breaks-the-start", "chmod 644 /usr/lib/patchswitch/init");
    let said = fails(&stage, 21, &id);
    assert!(said.contains("restart failed"), "{said}");

    assert_eq!((client.all_answered(), stage.active().as_str()), (vec!["v1".to_owned()], "web-a"));
    breaks_after_the_switch(&stage);
    stage.nothing_of_a_job_left(&before);
    stage.ok(&["plan", SERVICE]); // nothing is applied
    stage.finish();
}

/// A patch with which the service ends when it is told to.
pub(super) fn breaks_later(stage: &Stage) -> String {
    stage.patch(
        "breaks-later",
        "echo v2 > /etc/says\n\
         cat > /usr/bin/serve <<'END'\n#!/bin/sh\n\
         /usr/bin/patchswitch-load serve --port 80 --tag v2 &\n\
         while [ ! -e /srv/break ]; do sleep 0.1; done\nkill -9 $!\nsleep 1000\nEND",
    )
}

/// Passes its probes, and breaks a moment after the switch: given back by itself. Flows that the patched partition has
/// stay with it until they end, those without a connection as well.
fn breaks_after_the_switch(stage: &Stage) {
    let id = breaks_later(stage);
    let mut apply = stage.start_until(&["apply", SERVICE, "--patch", &id, "--commit"], "observe");
    assert_eq!(stage.who(), "v2");
    let flow = Datagrams::begin(&stage.client, "web-b");
    stage.ok(&["partition", "exec", "web-b", "--", "/bin/sh", "-c", "touch /srv/break"]);
    while !apply.output().contains("give_back: web-a serves again") {
        assert!(!apply.has_ended(), "{}", apply.output());
        flow.ask();
        std::thread::sleep(Duration::from_millis(50));
    }
    flow.ask();
    drop(flow);
    let status = apply.wait(Duration::from_secs(60)).unwrap();
    let said = fs::read_to_string(path("said")).unwrap();
    assert_eq!(status.code(), Some(22), "{said}");
    assert!(said.contains("web-a serves again"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
}
