//! The job whose switch is to the letter of the patent: new clients notice as little as ever, those of the old side are cut.

use std::fs;
use std::io::ErrorKind;
use std::time::Duration;

use patchswitch_tests::leftovers::Snapshot;

use super::client::Kept;
use super::failing::breaks_later;
use super::mend::nothing_to_do;
use super::stage::{SERVICE, Settings, Stage, path};

/// Longer than it takes to ask a client of the old side.
const DRAIN: &str = "deadline = \"8s\"\non_deadline = \"reset\"";

/// 2205: what fails when it serves is given back, to the letter as well.
fn given_back(stage: &Stage, settings: &Settings) {
    stage.configure(&Settings { observe: "20s", ..settings.clone() });
    stage.ok(&["service", "add", SERVICE]);
    let id = breaks_later(stage);
    let apply = stage.start_until(&["apply", SERVICE, "--patch", &id], "observe");
    assert_eq!(stage.who(), "v2");
    stage.ok(&["partition", "exec", "web-b", "--", "/bin/sh", "-c", "touch /srv/break"]);
    let status = apply.wait(Duration::from_secs(60)).unwrap();
    let said = fs::read_to_string(path("said")).unwrap();
    assert_eq!(status.code(), Some(22), "{said}");
    assert!(said.contains("web-a serves again"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    nothing_to_do(stage);
}

#[test]
fn to_the_letter_new_clients_are_served_and_old_ones_are_cut() {
    let settings =
        Settings { more: "strategy = \"letter\"\n", drain: DRAIN, observe: "0s", ..Settings::default() };
    let stage = Stage::new(&settings);
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    for (arguments, from, to) in [(["apply", SERVICE], "v1", "v2"), (["rollback", SERVICE], "v2", "v1")] {
        let mut old = Kept::begin(&stage.client);
        assert_eq!(old.who().unwrap(), from);
        let job = stage.start_until(&arguments, "drain");
        // By the one that serves now, and not by the end of the drain.
        let error = old.who().unwrap_err();
        let kind = error.root_cause().downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        assert!(matches!(kind, Some(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)), "{error:?}");
        assert_eq!(stage.who(), to);
        // What the old side's end of it waits for does not come.
        let status = job.wait(Duration::from_secs(60)).unwrap();
        let said = fs::read_to_string(path("said")).unwrap();
        assert_eq!(status.code(), Some(24), "{said}");
        assert_eq!(stage.who(), to);
        nothing_to_do(&stage);
    }
    assert_eq!(stage.active(), "web-a");
    given_back(&stage, &settings);
    stage.nothing_of_a_job_left(&before);

    stage.configure(&Settings { drain: "on_deadline = \"abort\"", ..settings });
    let said = stage.ends_with(78, &["service", "add", SERVICE]);
    assert!(said.contains("every connection is left at the deadline"), "{said}");
    stage.configure(&Settings::default());
    stage.finish();
}
