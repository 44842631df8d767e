//! The load on the service: one client for the whole demo, in a namespace and a process of its own.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use patchswitch_load::control::Client;
use patchswitch_load::knee::Knee;
use patchswitch_load::report::{Report, Run};
use patchswitch_tests::netlab::{self, Ns};
use patchswitch_tests::programs::{self, Running};

use crate::content;

/// Datagrams a second, in both families together.
const UDP_RATE: u32 = 50;
/// How fast the long download is read, in bytes a second: 64 s for all of it.
const DOWNLOAD_RATE: u32 = 128 * 1024;
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
const END_LIMIT: Duration = Duration::from_secs(60);

/// The client, running.
#[derive(Debug)]
pub(crate) struct Load {
    process: Running,
    client: Client,
    socket: PathBuf,
    out: PathBuf,
    helpers: Vec<JoinHandle<()>>,
}

fn target() -> [&'static str; 4] {
    let [v4, v6] = netlab::SERVICE;
    ["--target4", v4, "--target6", v6]
}

fn program() -> anyhow::Result<String> {
    Ok(programs::built("patchswitch-load")?.display().to_string())
}

/// How much the service bears.
pub(crate) fn knee(client: &Ns) -> anyhow::Result<Knee> {
    let program = program()?;
    let command: Vec<&str> = [program.as_str(), "knee"].into_iter().chain(target()).collect();
    serde_json::from_str(&client.run(&command)?).context("failed to parse the knee")
}

impl Load {
    /// Starts the client; it makes its load from now on.
    pub(crate) fn start(client: &Ns, rate: f64, directory: &Path) -> anyhow::Result<Self> {
        let (socket, out) = (directory.join("load.sock"), directory.join("load.json"));
        let program = program()?;
        let mut command: Vec<String> = vec![program, "run".into()];
        command.extend(target().map(str::to_owned));
        let mut option = |name: &str, value: String| command.extend([format!("--{name}"), value]);
        option("rate", format!("{rate}"));
        option("udp-port", content::UDP_PORT.to_string());
        option("udp-rate", UDP_RATE.to_string());
        option("download", content::DOWNLOAD.into());
        option("download-rate", DOWNLOAD_RATE.to_string());
        option("control", socket.display().to_string());
        option("out", out.display().to_string());
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let process = client.spawn(&command, Some(&directory.join("load.log")))?;
        let client = Client::connect(&socket, CONNECT_LIMIT)
            .with_context(|| format!("the load client did not start: {}", process.output()))?;
        Ok(Self { process, client, socket, out, helpers: Vec::new() })
    }

    /// A phase begins.
    pub(crate) fn mark(&mut self, name: &str) -> anyhow::Result<u64> {
        self.client.mark(name).context("failed to mark a phase")
    }

    /// Opens idle connections, one in each family.
    pub(crate) fn open_idle(&mut self) -> anyhow::Result<()> {
        self.client.order("open-idle").map(drop).context("failed to open idle connections")
    }

    /// Starts the long downloads.
    pub(crate) fn start_download(&mut self) -> anyhow::Result<()> {
        self.client.order("start-download").map(drop).context("failed to start the downloads")
    }

    /// Requests made and failed so far.
    pub(crate) fn so_far(&mut self) -> anyhow::Result<(u64, u64)> {
        let status = self.client.status().context("failed to ask the load client")?;
        Ok((status.issued, status.failed))
    }

    /// Uses the idle connections now, and lets the downloads come to their end after a while. Does not wait: how it
    /// went is in the client's report.
    pub(crate) fn use_idle_and_finish_downloads(&mut self, after: Duration) -> anyhow::Result<()> {
        let mut client =
            Client::connect(&self.socket, CONNECT_LIMIT).context("failed to reach the load client")?;
        self.helpers.push(std::thread::spawn(move || {
            // Failed ones are in the report, with the reason.
            drop(client.order("use-idle"));
            std::thread::sleep(after);
            drop(client.order("finish-download"));
        }));
        Ok(())
    }

    /// Waits for what [`Self::use_idle_and_finish_downloads`] began.
    pub(crate) fn settle(&mut self) -> anyhow::Result<()> {
        let mut helpers = self.helpers.drain(..);
        helpers.try_for_each(|helper| {
            helper.join().map_err(|_panic| anyhow::anyhow!("a helper of the load panicked"))
        })
    }

    /// Ends the load and reads its report, of which a copy is kept.
    pub(crate) fn stop(mut self, copy: &Path) -> anyhow::Result<Run> {
        self.settle()?;
        self.client.order("stop").context("failed to stop the load client")?;
        let log = self.process.output();
        let status = self.process.wait(END_LIMIT)?;
        anyhow::ensure!(status.success(), "the load client ended with {status}: {log}");
        let text = std::fs::read_to_string(&self.out).context("failed to read the load client's report")?;
        std::fs::write(copy, &text).with_context(|| format!("failed to write {}", copy.display()))?;
        Ok(Report::parse(&text)?.run)
    }
}
