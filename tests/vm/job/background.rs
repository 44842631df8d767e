//! Jobs in the background: they go on without their terminal, are told of while they run, and a rollback stops them.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::client::Client;
use super::stage::{SERVICE, Settings, Stage, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

/// Starts a job in the background; its number.
#[track_caller]
fn start(stage: &Stage) -> String {
    let started = stage.json(&["apply", SERVICE, "--detach"]);
    let stat = fs::read_to_string(format!("/proc/{}/stat", started["pid"])).unwrap_or_default();
    // Field 6 is the session, field 3 the state (proc_pid_stat(5)).
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    assert_eq!(fields[3], started["pid"].to_string(), "not the leader of a session: {stat}");
    started["job"].to_string()
}

/// Waits until a job is in a phase.
#[track_caller]
fn reaches(stage: &Stage, job: &str, phase: &str) {
    wait_until(phase, LIMIT, || {
        let report = stage.json(&["report", job]);
        assert_eq!(report["progress"], "running", "{report}");
        report["steps"].as_array().unwrap().iter().any(|step| step["phase"] == phase)
    });
}

#[track_caller]
fn ended(stage: &Stage, job: &str) -> (Value, String) {
    let report = stage.json(&["report", job]);
    assert_eq!(report["progress"], "over", "{report}");
    assert_eq!(stage.json(&["status"])["jobs"], Value::Array(Vec::new()));
    let said = fs::read_to_string(report["log"].as_str().unwrap()).unwrap();
    (report["job"]["exit_code"].clone(), said)
}

#[test]
fn a_job_in_the_background_goes_on_by_itself_and_is_undone_by_a_rollback() {
    let stage = Stage::new(&Settings::default());
    let client = Client::start(&stage.client);
    stage.says("v2");
    let job = start(&stage);
    wait_until("the job is over", LIMIT, || stage.json(&["report", &job])["progress"] == "over");
    let (code, said) = ended(&stage, &job);
    assert_eq!((&code, stage.who().as_str()), (&0.into(), "v2"), "{said}");
    assert!(said.contains("take_over done"), "{said}");
    stage.ok(&["rollback", SERVICE]);

    // After the switch, while the service is watched.
    stage.configure(&Settings { observe: "60s", ..Settings::default() });
    stage.ok(&["service", "add", SERVICE]);
    let job = start(&stage);
    reaches(&stage, &job, "observe");
    assert_eq!(stage.who(), "v2");
    let status = stage.json(&["status", SERVICE]);
    assert_eq!(status["jobs"][0]["progress"], "running", "{status}");
    assert_eq!(stage.json(&["flows", SERVICE])["partitions"].as_array().unwrap().len(), 2);
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    let (code, said) = ended(&stage, &job);
    assert_eq!(code, 130, "{said}");
    assert!(said.contains("web-a serves again"), "{said}");

    // Before it: the clone goes, the service is never touched.
    let job = start(&stage);
    reaches(&stage, &job, "boot");
    let said = stage.ok(&["rollback", SERVICE]);
    assert!(said.contains(&format!("job {job} was stopped and undone")), "{said}");
    let (code, said) = ended(&stage, &job);
    assert_eq!((&code, stage.who().as_str()), (&130.into(), "v1"), "{said}");
    assert_eq!(client.all_answered(), ["v1", "v2", "v1", "v2", "v1"]);
    stage.finish();
}
