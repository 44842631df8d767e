//! `switch --hold`: new flows wait while a command does what only one partition can do at a time.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use patchswitch::attachment::{Attachment, Pumped, SwitchOptions};
use patchswitch::config::duration;
use patchswitch::exit::ExitCode;
use patchswitch::host::linux::programs::{Program, Run};
use patchswitch_common::Slot;
use serde_json::json;

use super::alone::netns_name;
use super::{job, print};

/// How much longer than the command flows may wait: what comes after it is done by then, also on a slow machine.
const MARGIN: Duration = Duration::from_secs(1);

/// How `switch` has flows wait.
#[derive(Debug, Args)]
pub(crate) struct Waiting {
    /// Have new flows wait while the command of --run does what only one side can do at a time, such as moving a database.
    /// The command may take so long, such as 5s. Below a second clients notice nothing but the wait.
    #[arg(long, value_name = "TIME", requires = "run", conflicts_with = "share", value_parser = some_time)]
    hold: Option<Duration>,
    /// What is done meanwhile: a command of the shell, with the root as its directory, an empty environment and nothing to
    /// read. It is killed with all that it started if it takes longer, and what it has left running in the background when
    /// it ends. If it fails, those that wait go to the side that served before, and patchswitch ends with 22.
    #[arg(long, value_name = "COMMAND", requires = "hold", value_parser = NonEmptyStringValueParser::new())]
    run: Option<String>,
}

impl Waiting {
    /// How long, and for what, if flows are to wait.
    pub(crate) fn given(&self) -> Option<(Duration, &str)> {
        self.hold.zip(self.run.as_deref())
    }
}

/// A length of time in which something can be done.
fn some_time(text: &str) -> Result<Duration, String> {
    match duration::parse(text) {
        Ok(Duration::ZERO) => Err("nothing can be done in no time".to_owned()),
        other => other.map_err(|error| error.to_string()),
    }
}

/// Holds, runs the command, and lets go.
pub(crate) async fn run(
    attachment: &mut Attachment,
    to: Slot,
    (limit, command): (Duration, &str),
    json: bool,
) -> anyhow::Result<ExitCode> {
    job::watch_signals(json)?;
    let (old, new) = (netns_name(attachment.record(), to.other()), netns_name(attachment.record(), to));
    let hold = attachment.hold(to, limit + MARGIN, SwitchOptions::default()).await?;
    if !json {
        print::progress(&format!("flows of {old} go on; new ones wait for {new}, {limit:?} at most"));
    }
    let failure = match shell(command, limit).await {
        // What it was to move has been moved, whatever somebody wants meanwhile.
        Ok(()) => None,
        Err(_) if job::is_stopped() => Some("called off".to_owned()),
        Err(error) => Some(format!("{error:#}")),
    };
    let pumped = match failure {
        None => attachment.release(hold).await?,
        Some(_) => attachment.call_off(hold).await?,
    };
    let serving = if failure.is_none() { &new } else { &old };
    if json {
        print::json(&json!({
            "schema": "patchswitch.hold/1", "changed": failure.is_none(), "serving": serving, "failure": failure,
            "waited": pumped,
        }))?;
    } else {
        print::text(&conclusion(failure.as_deref(), serving, pumped, &attachment.record().name.to_string()));
    }
    Ok(match failure {
        None => ExitCode::Done,
        Some(_) if job::is_stopped() => ExitCode::Interrupted,
        Some(_) => ExitCode::GivenBack,
    })
}

/// Runs a command of the administrator's; what it prints goes where our own errors go.
async fn shell(command: &str, limit: Duration) -> anyhow::Result<()> {
    let output = std::io::stderr().as_fd().try_clone_to_owned()?;
    let run = Run::new(Program::Shell).args(["-c", command]).limit(limit).output_to(output.into());
    let run = run.whole_group().stopped_by(job::is_stopped);
    let ended = tokio::task::spawn_blocking(|| run.status()).await?.context("the command")?;
    anyhow::ensure!(ended.status.success(), "the command failed ({})", ended.status);
    Ok(())
}

fn conclusion(failure: Option<&str>, serving: &str, pumped: Pumped, name: &str) -> String {
    let Pumped { frames, connections, repeats, lost, held_ms, pump_ms } = pumped;
    let first = match failure {
        None => format!("{serving} gets new flows"),
        Some(failure) => {
            format!("given back: {failure}\n{serving} gets new flows again, if it still answers")
        }
    };
    let mut text = format!(
        "{first}\n{frames} packets waited, {connections} of them new connections ({repeats} sent twice), for at most \
         {held_ms:.0} ms; delivered within {pump_ms:.0} ms"
    );
    if lost > 0 {
        text.push_str(&format!("\n{lost} found no room; those of TCP are sent again by their clients"));
    }
    if failure.is_none() {
        text.push_str(&format!("\nnext: patchswitch drain {name}"));
    }
    text
}
