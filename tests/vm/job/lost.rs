//! A side that serves is lost: it dies, or its link goes. Whoever waits for its flows, its answers or its end waits in
//! vain, so nobody does; and it is said what is true and what puts it right.

use std::fs;
use std::time::Duration;

use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::programs::Running;
use serde_json::json;

use super::client::Kept;
use super::mend::{dies, nothing_to_do};
use super::rollbacks::{forgets, switched};
use super::stage::{SERVICE, Settings, Stage, path};

/// Flows of a side that is there may end for longer than any command of these tests may take.
const DRAIN: &str = "deadline = \"600s\"";
/// A command that waits for nobody has ended by then.
const SOON: Duration = Duration::from_secs(60);

/// A way for a partition to be lost, and what is said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Dies,
    LosesItsLink,
}

impl Way {
    const BOTH: [Self; 2] = [Self::Dies, Self::LosesItsLink];

    const fn said(self) -> &'static str {
        match self {
            Self::Dies => "web-b, which serves, has ended",
            Self::LosesItsLink => "the link of web-b, which serves, is gone",
        }
    }

    #[track_caller]
    fn go(self, stage: &Stage) {
        match self {
            Self::Dies => dies(stage, "web-b"),
            Self::LosesItsLink => drop(stage.host_ip("-n ps-web-b link del eth0")),
        }
    }

    /// What `up` does about it.
    const fn mended(self) -> &'static str {
        match self {
            Self::Dies => "service web was started",
            Self::LosesItsLink => "web-b got a new link",
        }
    }
}

/// Waits for the end of a command that waits for nobody; what it said.
#[track_caller]
fn ends_soon(running: Running, code: i32) -> String {
    let status = running.wait(SOON).unwrap();
    let said = fs::read_to_string(path("said")).unwrap();
    assert_eq!(status.code(), Some(code), "{said}");
    said
}

/// Nobody probes the service any more while the old side drains.
#[test]
fn who_is_lost_while_the_other_drains_is_given_back() {
    let stage = Stage::new(&Settings { observe: "0s", drain: DRAIN, ..Settings::default() });
    let before = Snapshot::take().unwrap();
    for (way, what) in Way::BOTH.into_iter().zip(["v2", "v3"]) {
        stage.says(what);
        let mut old = Kept::begin(&stage.client);
        assert_eq!(old.who().unwrap(), "v1");
        let apply = stage.start_until(&["apply", SERVICE, "--commit"], "drain");
        let mut new = Kept::begin(&stage.client);
        assert_eq!(new.who().unwrap(), what);
        way.go(&stage);
        let said = ends_soon(apply, 22);
        assert!(said.contains(way.said()) && said.contains("web-a serves again"), "{said}");
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
        assert_eq!(old.who().unwrap(), "v1");
    }
    stage.nothing_of_a_job_left(&before);

    // Nothing is merged beside a side that does not serve: the old one's disk is the only other way to.
    stage.ok(&["apply", SERVICE]);
    for way in Way::BOTH {
        way.go(&stage);
        let said = stage.ends_with(1, &["commit", SERVICE]);
        assert!(said.contains(way.said()) && said.contains("nothing was merged; `patchswitch up`"), "{said}");
        let said = stage.ok(&["up"]);
        assert!(said.contains(way.mended()), "{said}");
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v3", "web-b"));
        nothing_to_do(&stage);
    }
    stage.ok(&["commit", SERVICE]);
    stage.finish();
}

/// It would lose in silence what was written: nobody serves until somebody decides, but for the flows of the old side.
#[test]
fn who_is_lost_with_writes_is_not_given_back_by_itself() {
    let standby = &["--size", "40M", "--store", "16M"];
    // Not as large at the clone already as it ever needs to be.
    let stores = "store_lasts = \"1s\"";
    let stage = Stage::new(&Settings { observe: "0s", drain: DRAIN, standby, stores, ..Settings::default() });
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    for way in Way::BOTH {
        let mut old = Kept::begin(&stage.client);
        assert_eq!(old.who().unwrap(), "v1");
        let apply = stage.start_until(&["apply", SERVICE], "drain");
        stage.ok(&["partition", "exec", "web-b", "--", "/bin/sh", "-c", "echo order > /etc/order"]);
        way.go(&stage);
        let said = ends_soon(apply, 23);
        let nobody = format!("nobody serves ({}); `patchswitch up` puts that right", way.said());
        assert!(said.contains(&nobody) && said.contains("files outside may_lose"), "{said}");
        assert!(said.contains("`patchswitch rollback web --discard-writes` gives that up"), "{said}");
        assert_eq!(old.who().unwrap(), "v1");
        // Nobody watches the clone's store, and nobody has to: it can take everything.
        assert_eq!(stage.json(&["status"])["clones"], json!([]));

        let said = stage.ok(&["up"]);
        assert!(said.contains(way.mended()), "{said}");
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
        // Who serves was mended beside them.
        assert_eq!(old.who().unwrap(), "v1");
        nothing_to_do(&stage);
        let said = stage.run(&["rollback", SERVICE, "--discard-writes"]);
        assert_eq!(said.code, 25, "{said:?}");
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
        assert_eq!(old.who().unwrap(), "v1");
        drop(old);
        stage.nothing_of_a_job_left(&before);
    }
    stage.finish();
}

/// Neither an idle time, in which it would say which flows it has, nor for its flows to end.
#[test]
fn a_rollback_does_not_wait_for_who_is_lost() {
    let settings = Settings { observe: "60s", udp_idle: "8s", drain: DRAIN, ..Settings::default() };
    let stage = Stage::new(&settings);
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    let mut old = switched(&stage);
    let mut new = Kept::begin(&stage.client);
    assert_eq!(new.who().unwrap(), "v2");
    Way::LosesItsLink.go(&stage);
    let said = stage.ok(&["up"]);
    assert!(said.contains(Way::LosesItsLink.mended()), "{said}");
    // The connections of both, of which the new one lay still meanwhile.
    assert_eq!((stage.who().as_str(), new.who().unwrap().as_str()), ("v2", "v2"));
    assert_eq!(old.who().unwrap(), "v1");

    forgets();
    Way::LosesItsLink.go(&stage);
    rolled_back_at_once(&stage, 24);
    assert_eq!(old.who().unwrap(), "v1");
    drop((old, new));
    stage.nothing_of_a_job_left(&before);

    // All flows of the old side have ended, and it was not stopped yet.
    drop(switched(&stage));
    let new = Kept::begin(&stage.client);
    stage.ok(&["drain", SERVICE]);
    Way::Dies.go(&stage);
    rolled_back_at_once(&stage, 0);
    drop(new);
    stage.nothing_of_a_job_left(&before);
    nothing_to_do(&stage);
    stage.finish();
}

/// With the code for flows that were cut, if those who had them could not see their end.
#[track_caller]
fn rolled_back_at_once(stage: &Stage, code: i32) {
    let said = ends_soon(stage.start(&["rollback", SERVICE]), code);
    for phase in ["arm …", "boot …"] {
        assert!(!said.contains(phase), "{said}");
    }
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
}
