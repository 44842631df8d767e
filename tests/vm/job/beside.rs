//! Commands beside each other, and services beside each other: what one does to a service, another does not undo, and what
//! fails for one service does not keep the others.

use std::path::Path;
use std::time::Duration;

use patchswitch::exit::ExitCode;
use patchswitch::names::Name;
use patchswitch::store::{JobLock, NewJob, Store};
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab;
use patchswitch_tests::programs::Running;
use rustix::process::Signal;

use super::client::{self, who_at};
use super::mend::{MOVED, add_api, comes, dies, nothing_to_do, remove_api};
use super::stage::{SERVICE, Settings, Stage, path, wait_until};

/// Starts a command and stops it as soon as it has the lock of a service.
#[track_caller]
fn halted(stage: &Stage, arguments: &[&str], service: &str) -> Running {
    let name: Name = service.parse().unwrap();
    let running = stage.start(arguments);
    wait_until(&format!("{arguments:?} has the lock of {service}"), Duration::from_secs(20), || {
        let holder = JobLock::holder(Path::new("/run/patchswitch"), &name).unwrap();
        holder.is_some_and(|holder| holder.pid == running.pid())
    });
    running.signal(Signal::STOP).unwrap();
    running
}

/// Lets it go on to its end; what it said.
#[track_caller]
fn go_on(running: Running, code: i32) -> String {
    running.signal(Signal::CONT).unwrap();
    let status = running.wait(Duration::from_secs(60)).unwrap();
    let said = std::fs::read_to_string(path("said")).unwrap();
    assert_eq!(status.code(), Some(code), "{said}");
    said
}

#[track_caller]
fn refused(stage: &Stage, arguments: &[&str], holder: &Running) {
    let said = stage.ends_with(75, arguments);
    assert!(said.contains(&format!("service web is busy: process {} since", holder.pid())), "{said}");
}

#[test]
fn commands_and_services_beside_each_other() {
    let stage = Stage::bare(&Settings::default());
    stage.define(&Settings::default());
    one_of_add_and_remove(&stage);
    let uplink = "link add uplink1 type veth peer name uplink1x";
    stage.host_ip(uplink);
    add_api(&stage, &[netlab::UPLINK, "uplink1"]);
    up_beside(&stage);
    what_fails_for_one_service_does_not_keep_the_others(&stage, uplink);
    remove_api(&stage);
    stage.host_ip("link del uplink1");
    stage.finish();
}

/// Whoever comes second is refused, and whoever is first gets to his end.
fn one_of_add_and_remove(stage: &Stage) {
    let before = Snapshot::take().unwrap();
    let (add, remove) = (&["service", "add", SERVICE], &["service", "remove", SERVICE]);
    let adding = halted(stage, add, SERVICE);
    refused(stage, remove, &adding);
    nothing_to_do(stage);
    go_on(adding, 0);
    assert_eq!(stage.who(), "v1");

    let removing = halted(stage, remove, SERVICE);
    refused(stage, add, &removing);
    refused(stage, remove, &removing);
    nothing_to_do(stage);
    go_on(removing, 0);
    assert!(client::who(&stage.client).is_err());
    assert_eq!(stage.json(&["partition", "show", "web-a"])["running"], false);
    let said = stage.ok(remove);
    assert!(said.contains("not there, nothing to do"), "{said}");
    let mut left = Snapshot::left_since(&before, Duration::from_secs(5)).unwrap();
    // The log of a console stays as long as its partition.
    left.retain(|one| !one.name.starts_with("/run/patchswitch/"));
    assert!(left.is_empty(), "{left:?}");
    stage.ok(add);
    assert_eq!(stage.who(), "v1");
}

/// `up` has read the list of services and jobs, and is at another one; meanwhile things change.
fn up_beside(stage: &Stage) {
    let beside = |change: &dyn Fn()| {
        dies(stage, "api-a");
        let up = halted(stage, &["up"], "api");
        change();
        let said = go_on(up, 0);
        assert!(said.contains("service api was started") && !said.contains("service web"), "{said}");
        comes(stage, MOVED);
        nothing_to_do(stage);
    };
    // Another address would take the service away from clients.
    let moved = ["10.77.0.30", "fd77::30"];
    beside(&|| {
        stage.configure(&Settings { addresses: moved, ..Settings::default() });
        stage.ok(&["service", "add", SERVICE]);
    });
    assert_eq!(who_at(&stage.client, moved).unwrap(), "v1");
    stage.configure(&Settings::default());
    beside(&|| {
        stage.ok(&["service", "remove", SERVICE]);
    });
    assert_eq!(stage.json(&["partition", "show", "web-a"])["running"], false);
    assert!(who_at(&stage.client, moved).is_err());
    stage.ok(&["service", "add", SERVICE]);
    assert_eq!(stage.who(), "v1");
    a_job_that_ends_meanwhile(stage);
}

/// It is over, so it was not interrupted.
fn a_job_that_ends_meanwhile(stage: &Stage) {
    let mut store = Store::open(&path("state")).unwrap();
    let (api, web): (Name, Name) = ("api".parse().unwrap(), SERVICE.parse().unwrap());
    let plan = serde_json::json!({});
    let [_, ends] = [&api, &web].map(|service| {
        store.begin_job(&NewJob { service, kind: "commit", plan: &plan, boot_id: "another" }).unwrap()
    });
    let up = halted(stage, &["up"], "api");
    let _ = store.end_job(ends, ExitCode::Nothing, "there is nothing to commit").unwrap();
    let said = go_on(up, 0);
    assert!(said.contains("of service api: interrupted") && !said.contains("service web"), "{said}");
    let job = store.job(ends).unwrap().unwrap();
    assert_eq!(job.message.as_deref(), Some("there is nothing to commit"), "{job:?}");
}

fn what_fails_for_one_service_does_not_keep_the_others(stage: &Stage, uplink: &str) {
    let told = |what: &str| {
        dies(stage, "web-a");
        let said = stage.run(&["up"]);
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.stderr.contains("service api: ") && said.stderr.contains(what), "{said:?}");
        assert!(said.stdout.contains("service web was started"), "{said:?}");
        comes(stage, netlab::SERVICE);
        assert_eq!(who_at(&stage.client, MOVED).unwrap(), "v1");
    };
    // The source of what it begins itself cannot be looked at.
    stage.host_ip("-n ps-api-a link set eth0 name eth9");
    told("\"eth0\"");
    stage.host_ip("-n ps-api-a link set eth9 name eth0");
    nothing_to_do(stage);

    stage.host_ip("link del uplink1");
    told("\"uplink1\"");
    // As it was before, but for the programs.
    stage.host_ip(uplink);
    let said = stage.ok(&["up"]);
    assert!(
        said.contains("service api: it was attached anew: one of its uplinks is another device now"),
        "{said}"
    );
    comes(stage, MOVED);
    nothing_to_do(stage);
}
