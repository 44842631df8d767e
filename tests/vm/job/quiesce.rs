//! A service with one writer goes over with its disk, while new connections wait: none is refused, and all that was
//! acknowledged is there, whatever happens.

use std::fs;
use std::time::Duration;

use patchswitch_tests::leftovers::Snapshot;
use rustix::process::Signal;

use super::keeper::{SERVER, Writers, nothing_left, settings};
use super::mend::nothing_to_do;
use super::moments::{Moment, start_until};
use super::stage::{SERVICE, Settings, Stage};

/// There, and back, and there for good.
#[test]
fn a_single_writer_goes_over_with_its_disk() {
    there_and_back(&settings());
}

#[track_caller]
pub(super) fn there_and_back(settings: &Settings) {
    let stage = Stage::new(settings);
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    let writers = Writers::start(&stage);
    std::thread::sleep(Duration::from_secs(1));
    // Somebody ends a moment after the server, and has something to write until then.
    let inside = |partition: &str, script: &str| {
        stage.ok(&["partition", "exec", partition, "--", "/bin/sh", "-c", script])
    };
    let late = "(exec 3>/data/late; while [ -e /run/redis.pid ]; do sleep 0.1; done; sleep 0.5; echo late >&3) \
                >/dev/null 2>&1 </dev/null &";
    inside("web-a", late);
    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(inside("web-b", "cat /data/late").trim(), "late");
    let report = &stage.json(&["report"])["report"];
    let waited = |key: &str| report["waited"][key].as_f64().unwrap();
    for part in ["stop_ms", "move_ms", "start_ms", "check_ms"] {
        assert!(waited(part) > 0.0, "{report}");
    }
    assert!(report["waited"]["flows"]["connections"].as_u64() > Some(0), "{report}");
    // What moves is not lost, and not counted.
    assert_eq!(report["lost_by_switch"]["files"], 0, "{report}");
    nothing_to_do(&stage);
    // Whoever goes back has to know how.
    stage.configure(&Settings { more: "", ..settings.clone() });
    let said = stage.ends_with(1, &["service", "add", SERVICE]);
    assert!(
        said.contains("its strategy stays as it is") && said.contains("patchswitch rollback web"),
        "{said}"
    );
    stage.configure(settings);
    std::thread::sleep(Duration::from_secs(1));

    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    nothing_left(&stage, &before);
    std::thread::sleep(Duration::from_secs(1));

    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    nothing_to_do(&stage);
    std::thread::sleep(Duration::from_secs(1));
    writers.stop_unnoticed(&stage);
    stage.finish();
}

/// Before the first client's packet: the old side goes on with what it had.
#[test]
fn a_server_that_does_not_begin_or_does_not_end_is_put_back() {
    let stage = Stage::new(&Settings { more: BRIEF, ..settings() });
    let before = Snapshot::take().unwrap();
    let writers = Writers::start(&stage);
    // It begins for the check. A second time it begins as well, but does not say so; and it does not end. By then the time in which
    // clients were to wait is over.
    let id = stage.patch(
        "begins-once",
        "echo v2 > /etc/says; cat /usr/bin/db > /usr/bin/db.well; chmod 755 /usr/bin/db.well; cat > /usr/bin/db <<'END'\n\
         #!/bin/sh\n\
         if [ -e /run/again ]; then sleep 8; echo no >&2; exit 1; fi\n\
         if [ \"$1\" = start ] && [ -e /run/begun ]; then\n\
         echo half > /data/half; /usr/bin/db.well start; touch /run/again; sleep 1000; fi\n\
         touch /run/begun\nexec /usr/bin/db.well \"$1\"\nEND",
    );
    let said = stage.ends_with(22, &["apply", SERVICE, "--patch", &id]);
    assert!(
        said.contains("start failed in web-b: the command") && said.contains("did not end within"),
        "{said}"
    );
    assert!(said.contains("stop failed in web-b: exit status 1: no; the partition is stopped"), "{said}");
    assert!(said.contains("web-a serves, again; the clone was discarded"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    // Nor is anything there of what it had begun.
    stage.ends_with(1, &["partition", "exec", "web-a", "--", "cat", "/data/half"]);
    nothing_to_do(&stage);
    nothing_left(&stage, &before);

    stage.configure(&Settings { more: HANGS, ..settings() });
    stage.ok(&["service", "add", SERVICE]);
    let id = stage.says("v3");
    let said = stage.ends_with(22, &["apply", SERVICE, "--patch", &id]);
    assert!(
        said.contains("finish failed in web-a: the command") && said.contains("did not end within"),
        "{said}"
    );
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    nothing_left(&stage, &before);
    writers.stop_unnoticed(&stage);
    stage.configure(&settings());
    stage.finish();
}

/// It has begun to end when its time is over, and cannot begin before it has ended: neither by itself, nor with its partition if it
/// never does.
#[test]
fn a_server_that_is_still_ending_is_put_back_when_it_has_ended() {
    let stage = Stage::new(&Settings { more: LINGERS, ..settings() });
    let before = Snapshot::take().unwrap();
    let writers = Writers::start(&stage);
    let id = stage.says("v2");
    let put_back = |warned: &str| {
        let said = stage.ends_with(22, &["apply", SERVICE, "--patch", &id]);
        assert!(said.contains("stop failed in web-a: the command"), "{said}");
        assert!(
            said.contains("start failed in web-a: exit status 1: it is ending; it is ended first"),
            "{said}"
        );
        assert_eq!(said.contains("the partition is started anew"), !warned.is_empty(), "{said}");
        assert!(said.contains(warned), "{said}");
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
        nothing_to_do(&stage);
    };
    put_back("");
    writers.stop_unnoticed(&stage);
    nothing_left(&stage, &before);
    stage.ok(&["partition", "exec", "web-a", "--", "/bin/sh", "-c", "echo never > /run/lingers"]);
    put_back("did not end within 30.0 s and was killed; the partition is started anew");
    stage.configure(&settings());
    stage.finish();
}

/// It stands still when it is told to end, until it is told once more; or for ever.
const LINGERS: &str = r#"strategy = "quiesce"
[service.quiesce]
stop = """
pid=$(cat /run/redis.pid)
if [ $(cat /etc/says) = v1 ]; then
    case $(cat /run/lingers 2>/run/said) in
    again) kill -CONT $pid; rm /run/lingers;;
    never) kill -STOP $pid;;
    *) kill -STOP $pid; echo again > /run/lingers;;
    esac
fi
/usr/bin/db stop
"""
start = """
if [ -e /run/lingers ] && [ -e /proc/$(cat /run/redis.pid)/exe ]; then echo it is ending >&2; exit 1; fi
/usr/bin/db start
"""
hold = "2s"
[[service.probe]]
kind = "tcp"
port = 6379
"#;

/// Clients are not to wait for long.
const BRIEF: &str = "strategy = \"quiesce\"\n\
    [service.quiesce]\nstop = \"/usr/bin/db stop\"\nstart = \"/usr/bin/db start\"\nhold = \"6s\"\n\
    [[service.probe]]\nkind = \"tcp\"\nport = 6379\n";

/// What clients do does not end in time.
const HANGS: &str = "strategy = \"quiesce\"\n\
    [service.quiesce]\nfinish = \"sleep 1000\"\nstop = \"/usr/bin/db stop\"\nstart = \"/usr/bin/db start\"\nhold = \"2s\"\n\
    [[service.probe]]\nkind = \"tcp\"\nport = 6379\n";

/// After clients have written: the disk goes back as it is, also from a side whose server does not end.
#[test]
fn what_was_written_at_the_new_side_comes_back() {
    let stage = Stage::new(&Settings { observe: "30s", more: BRIEF, ..settings() });
    let before = Snapshot::take().unwrap();
    let writers = Writers::start(&stage);
    let id = stage.patch(
        "dies-later",
        "echo v2 > /etc/says; cat /usr/bin/db > /usr/bin/db.well; chmod 755 /usr/bin/db.well; cat > /usr/bin/db <<'END'\n\
         #!/bin/sh\n\
         if [ \"$1\" = stop ] && [ -e /run/again ]; then sleep 1000; fi\n\
         /usr/bin/db.well \"$1\" || exit 1\n\
         if [ \"$1\" = start ] && [ -e /run/begun ]; then touch /run/again; (sleep 3; kill -9 $(cat /run/redis.pid)) >/run/said 2>&1 & fi\n\
         touch /run/begun\nEND",
    );
    let apply = stage.start_until(&["apply", SERVICE, "--patch", &id], "observe");
    assert_eq!(stage.who(), "v2");
    let status = apply.wait(Duration::from_secs(120)).unwrap();
    let said = fs::read_to_string(super::stage::path("said")).unwrap();
    assert_eq!(status.code(), Some(22), "{said}");
    assert!(said.contains("web-a serves again"), "{said}");
    // That has used up all of the time for which new flows wait.
    assert!(
        said.contains("stop failed in web-b: the command") && said.contains("the partition is stopped"),
        "{said}"
    );
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    drop(writers.stop(&stage));
    nothing_left(&stage, &before);
    nothing_to_do(&stage);
    stage.finish();
}

/// Whoever comes next goes on from what is written down: either the one or the other has the disk, and serves. All moments, and power
/// cuts in them, are in the tier `soak`.
#[test]
fn a_move_that_is_killed_is_put_right() {
    let stage = Stage::new(&Settings { more: SHORT, observe: "0s", ..settings() });
    stage.says("v2");
    let writers = Writers::start(&stage);
    let go_on = |arguments: [&str; 2], serves: &str| {
        // Which of the two it is by then is told by nobody but the store.
        if stage.who() != serves {
            stage.ok(&arguments);
        }
        assert_eq!(stage.who(), serves);
        nothing_to_do(&stage);
    };
    killed(&stage, (&["apply", SERVICE], "web-b"), Moment::Moved);
    go_on(["apply", SERVICE], "v2");
    killed(&stage, (&["rollback", SERVICE], "web-a"), Moment::Begun);
    go_on(["rollback", SERVICE], "v1");
    writers.stop_unnoticed(&stage);
    stage.finish();
}

/// A command that is killed when its switch to a partition is so far, and what `up` says of it.
#[track_caller]
fn killed(stage: &Stage, (arguments, to): (&[&str], &str), moment: Moment) {
    let job = start_until(stage, arguments, (to, SERVER), moment);
    job.signal(Signal::KILL).unwrap();
    // It may have come to its end.
    let _ = job.wait(Duration::from_secs(10)).unwrap();
    let said = stage.ok(&["up"]);
    println!("{moment:?} of the switch to {to}: {said}");
}

/// Flows wait for less than a test can; and a command that is left to itself still has something to do.
const SHORT: &str = "strategy = \"quiesce\"\n\
    [service.quiesce]\nfinish = \"sleep 0.2\"\nstop = \"sleep 0.2; /usr/bin/db stop\"\nstart = \"/usr/bin/db start\"\nhold = \"6s\"\n\
    [[service.probe]]\nkind = \"tcp\"\nport = 6379\n";

/// Found when it is planned.
#[test]
fn a_disk_that_moves_and_a_strategy_belong_together() {
    let stage = Stage::new(&Settings { more: "", ..settings() });
    stage.says("v2");
    let said = stage.ends_with(78, &["plan", SERVICE]);
    assert!(
        said.contains("disk data of web-a has one writer at a time") && said.contains("quiesce"),
        "{said}"
    );
    stage.ends_with(78, &["apply", SERVICE]);
    assert_eq!(stage.who(), "v1");
    stage.finish();

    let stage = Stage::new(&Settings { standby: &["--size", "80M", "--store", "8M"], ..settings() });
    stage.says("v2");
    let said = stage.ends_with(78, &["plan", SERVICE]);
    assert!(said.contains("can fill up, which that of a disk that moves must not"), "{said}");
    stage.finish();
}
