//! Jobs in the background: they go on without their terminal, are told of while they run, and a rollback stops them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::client::Client;
use super::stage::{SERVICE, Settings, Stage, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

/// A job in the background: its process and its number.
struct Job {
    pid: String,
    id: String,
}

/// Starts a job in the background.
#[track_caller]
fn start(stage: &Stage) -> Job {
    let started = stage.json(&["apply", SERVICE, "--detach"]);
    let pid = started["pid"].to_string();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Field 6 is the session, field 3 the state (proc_pid_stat(5)).
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    assert_eq!(fields[3], pid, "not the leader of a session: {stat}");
    Job { pid, id: started["job"].to_string() }
}

/// Waits until a job is in a phase: by its log, as the processor is needed for the job.
#[track_caller]
fn reaches(stage: &Stage, job: &Job, phase: &str) {
    let report = stage.json(&["report", &job.id]);
    assert_eq!(report["progress"], "running", "{report}");
    let begins = format!("{phase} …");
    let log = report["log"].as_str().unwrap();
    wait_until(&begins, LIMIT, || fs::read_to_string(log).unwrap().lines().any(|line| line.trim() == begins));
}

#[track_caller]
fn ended(stage: &Stage, job: &Job) -> (Value, String) {
    let report = stage.json(&["report", &job.id]);
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
    reaches(&stage, &job, "verify");
    let report = stage.json(&["report", &job.id]);
    assert!(report["steps"].as_array().unwrap().iter().any(|step| step["phase"] == "boot"), "{report}");
    wait_until("the job is over", LIMIT, || !Path::new("/proc").join(&job.pid).exists());
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
    assert!(said.contains(&format!("job {} was stopped and undone", job.id)), "{said}");
    let (code, said) = ended(&stage, &job);
    assert_eq!((&code, stage.who().as_str()), (&130.into(), "v1"), "{said}");
    assert_eq!(client.all_answered(), ["v1", "v2", "v1", "v2", "v1"]);
    stage.finish();
}
