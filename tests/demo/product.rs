//! patchswitch, as an operator uses it: by its command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use patchswitch_tests::programs::{self, Output};
use serde_json::Value;

use crate::content;

/// From the start of a job until something must be wrong.
const JOB_LIMIT: Duration = Duration::from_secs(400);

/// Before a command that is to wait for all others.
const NICE: [&str; 3] = ["nice", "-n", "19"];

/// The command.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    binary: PathBuf,
    config: PathBuf,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) report: Value,
    pub(crate) stderr: String,
}

impl Product {
    pub(crate) fn new(config: &Path) -> anyhow::Result<Self> {
        Ok(Self { binary: programs::built("patchswitch")?, config: config.to_owned() })
    }

    fn argv(&self, arguments: &[&str]) -> Vec<String> {
        let head = [self.binary.display().to_string(), "--config".into(), self.config.display().to_string()];
        head.into_iter().chain(arguments.iter().map(|word| (*word).to_owned())).collect()
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub(crate) fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.follow(arguments, &mut |_| {})?;
        if !output.status.success() {
            let Output { status, stdout, stderr } = output;
            bail!("patchswitch {}: {status}\n{stderr}{stdout}", arguments.join(" "));
        }
        Ok(output.stdout)
    }

    /// Asks for something and changes nothing. The demo's own curiosity is not to take the processor from what is
    /// measured.
    fn ask(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let argv = self.argv(arguments);
        let argv: Vec<&str> = NICE.into_iter().chain(argv.iter().map(String::as_str)).collect();
        programs::follow(&argv, JOB_LIMIT, &mut |_: &str| {})
    }

    /// Asks for something that must be known.
    fn answer(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let Output { status, stdout, stderr } = self.ask(arguments)?;
        anyhow::ensure!(status.success(), "patchswitch {}: {status}\n{stderr}{stdout}", arguments.join(" "));
        Ok(stdout)
    }

    /// Asks for something as JSON.
    fn ask_json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let arguments: Vec<&str> = ["--json"].into_iter().chain(arguments.iter().copied()).collect();
        parse(&arguments, &self.answer(&arguments)?)
    }

    /// Runs a command that must succeed and print JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let arguments: Vec<&str> = ["--json"].into_iter().chain(arguments.iter().copied()).collect();
        parse(&arguments, &self.run(&arguments)?)
    }

    /// Runs a job, however it ends, and passes on each line of its progress.
    pub(crate) fn job(&self, arguments: &[&str], line: &mut dyn FnMut(&str)) -> anyhow::Result<Ended> {
        let before = self.last_job()?;
        let output = self.follow(arguments, line)?;
        let code = output.status.code();
        let code = code.with_context(|| format!("patchswitch was killed:\n{}", output.stderr))?;
        // Without a new one it ended before it had begun; what it said tells why.
        let job = self.last_job()?.filter(|job| number(job) != before.as_ref().and_then(number));
        let report = job.map_or(Value::Null, |job| job["report"].clone());
        Ok(Ended { code, report, stderr: output.stderr })
    }

    /// What is known of the last job, if there was one.
    fn last_job(&self) -> anyhow::Result<Option<Value>> {
        let output = self.ask(&["--json", "report"])?;
        if !output.status.success() {
            return Ok(None);
        }
        serde_json::from_str(&output.stdout).map(Some).context("failed to parse the report of a job")
    }

    fn follow(&self, arguments: &[&str], line: &mut dyn FnMut(&str)) -> anyhow::Result<Output> {
        let argv = self.argv(arguments);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        programs::follow(&argv, JOB_LIMIT, line)
    }

    /// The version of the web server in a partition, asked of dpkg inside.
    pub(crate) fn version(&self, partition: &str) -> anyhow::Result<String> {
        let query = ["dpkg-query", "-W", "-f", "${Version}", "nginx"];
        let head = ["partition", "exec", partition, "--"].into_iter().chain(NICE);
        Ok(self.answer(&head.chain(query).collect::<Vec<_>>())?.trim().to_owned())
    }

    /// A digest of the service's files in a partition.
    pub(crate) fn fingerprint(&self, partition: &str) -> anyhow::Result<String> {
        let head = ["partition", "exec", partition, "--"].into_iter().chain(NICE);
        self.answer(&head.chain(["/bin/sh", "-c", content::FINGERPRINT]).collect::<Vec<_>>())
    }

    /// The partition that serves.
    pub(crate) fn active(&self, service: &str) -> anyhow::Result<String> {
        let list = self.ask_json(&["partition", "list"])?;
        let is_active = |row: &&Value| row["role"] == "active" && row["service"] == service;
        let found = list["partitions"].as_array().and_then(|rows| rows.iter().find(is_active));
        let name = found.and_then(|row| row["name"].as_str());
        name.map(str::to_owned).with_context(|| format!("no partition is active: {list}"))
    }

    /// Datagrams whose source was rewritten so far, in IPv4 and in IPv6.
    pub(crate) fn rewritten(&self, service: &str) -> anyhow::Result<[u64; 2]> {
        let status = self.ask_json(&["status", service])?;
        let events = &status["attachments"][0]["counters"]["events"];
        anyhow::ensure!(events.is_object(), "the status has no counters: {status}");
        // What never happened is left out.
        Ok(["rewritten_v4", "rewritten_v6"].map(|event| events[event].as_u64().unwrap_or(0)))
    }
}

fn parse(arguments: &[&str], text: &str) -> anyhow::Result<Value> {
    serde_json::from_str(text)
        .with_context(|| format!("patchswitch {} printed no JSON: {text}", arguments.join(" ")))
}

/// The number of a job.
fn number(job: &Value) -> Option<u64> {
    job["job"]["id"].as_u64()
}
