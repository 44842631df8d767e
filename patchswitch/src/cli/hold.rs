//! `switch --hold`: new flows wait while a command does what only one partition can do at a time.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, ValueEnum};
use patchswitch::attachment::{Attachment, DrainOptions, Exchange, Hold, OnDeadline, Pumped, SwitchOptions};
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
#[group(id = "waiting", multiple = true)]
#[command(group(ArgGroup::new("deed").multiple(true)))]
pub(crate) struct Waiting {
    /// Have new flows wait while the command of --run does what only one side can do at a time, such as moving a database.
    /// All of it may take so long, such as 5s. Below a second clients notice nothing but the wait.
    #[arg(long, value_name = "TIME", requires = "deed", conflicts_with = "share", value_parser = some_time)]
    hold: Option<Duration>,
    /// What goes over meanwhile, as soon as the flows of the old side have ended. A command of --run comes after it.
    #[arg(long, value_name = "WHAT", requires = "hold", group = "deed", value_enum)]
    exchange: Option<What>,
    /// What becomes of flows of the old side that have not ended in the time of --hold: with `abort` nothing is switched.
    #[arg(long, value_name = "WHAT", requires = "exchange", value_enum, default_value = "abort")]
    left: Left,
    /// What is done meanwhile: a command of the shell, with the root as its directory, an empty environment and nothing to
    /// read. It is killed with all that it started if it takes longer, and what it has left running in the background when
    /// it ends. If it fails, those that wait go to the side that served before, and patchswitch ends with 22.
    #[arg(long, value_name = "COMMAND", requires = "hold", group = "deed", value_parser = NonEmptyStringValueParser::new())]
    run: Option<String>,
}

/// What goes over.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// The network devices of the two sides change places.
    Device,
    /// The service's addresses go to the uplink of the other side, for what was attached with --own-uplinks.
    Address,
}

/// What becomes of flows that do not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Left {
    /// Those that wait go to the side that served before, and patchswitch ends with 22.
    Abort,
    /// They are reset, and patchswitch ends with 24.
    Reset,
}

/// What is done while flows wait, and for how long at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deed<'a> {
    limit: Duration,
    exchange: Option<Exchange>,
    left: Left,
    command: Option<&'a str>,
}

impl Waiting {
    /// For what, if flows are to wait.
    pub(crate) fn given(&self) -> Option<Deed<'_>> {
        let exchange = self.exchange.map(|what| match what {
            What::Device => Exchange::Device,
            What::Address => Exchange::Address,
        });
        let (left, command) = (self.left, self.run.as_deref());
        self.hold.map(|limit| Deed { limit, exchange, left, command })
    }
}

/// A length of time in which something can be done.
fn some_time(text: &str) -> Result<Duration, String> {
    match duration::parse(text) {
        Ok(Duration::ZERO) => Err("nothing can be done in no time".to_owned()),
        other => other.map_err(|error| error.to_string()),
    }
}

/// How far a deed has come.
#[derive(Clone, Copy, Debug, Default)]
struct SoFar {
    /// Flows that were reset.
    reset: usize,
    /// Whether there is something that goes back when something after it fails.
    exchanged: bool,
}

impl Deed<'_> {
    /// Does it.
    async fn run(self, attachment: &mut Attachment, to: Slot, so_far: &mut SoFar) -> anyhow::Result<()> {
        let end = Instant::now() + self.limit;
        let left = || end.saturating_duration_since(Instant::now());
        if let Some(what) = self.exchange {
            so_far.reset = self.finish(attachment).await?;
            so_far.exchanged = true;
            attachment.exchange(what, to).await?;
        }
        match self.command {
            Some(command) => shell(command, left()).await,
            None => Ok(()),
        }
    }

    /// Waits until the old side has no flow left; how many were cut.
    async fn finish(self, attachment: &mut Attachment) -> anyhow::Result<usize> {
        let on_deadline = match self.left {
            Left::Abort => OnDeadline::Keep,
            Left::Reset => OnDeadline::Reset,
        };
        // The rest is for what comes after it.
        let options = DrainOptions { deadline: Some(self.limit / 2), on_deadline };
        let drained = attachment.drain_until(&options, &job::is_stopped, |_| {}).await?;
        anyhow::ensure!(drained.settled, "{} flows of the old side have not ended", drained.left);
        Ok(drained.reset)
    }
}

/// Holds, does what is to be done, and lets go.
pub(crate) async fn run(
    attachment: &mut Attachment,
    to: Slot,
    deed: Deed<'_>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    job::watch_signals(json)?;
    let (old, new) = (netns_name(attachment.record(), to.other()), netns_name(attachment.record(), to));
    let Deed { limit, exchange, .. } = deed;
    exchange.map_or(Ok(()), |what| attachment.can_exchange(what))?;
    let hold = attachment.hold(to, limit + MARGIN, SwitchOptions::default()).await?;
    if !json {
        print::progress(&format!("flows of {old} go on; new ones wait for {new}, {limit:?} at most"));
    }
    let mut so_far = SoFar::default();
    let failure = match deed.run(attachment, to, &mut so_far).await {
        // What it was to move has been moved, whatever somebody wants meanwhile.
        Ok(()) => None,
        Err(_) if job::is_stopped() => Some("called off".to_owned()),
        Err(error) => Some(format!("{error:#}")),
    };
    let pumped = match &failure {
        None => attachment.release(hold).await?,
        Some(why) => {
            let exchanged = exchange.filter(|_| so_far.exchanged);
            put_back(attachment, exchanged, (to.other(), hold)).await.with_context(|| why.clone())?
        }
    };
    let serving = if failure.is_none() { &new } else { &old };
    if json {
        print::json(&json!({
            "schema": "patchswitch.hold/1", "changed": failure.is_none(), "serving": serving, "failure": failure,
            "waited": pumped, "reset": so_far.reset,
        }))?;
    } else {
        let name = attachment.record().name.to_string();
        print::text(&conclusion(failure.as_deref(), serving, (pumped, so_far.reset), &name));
    }
    Ok(match failure {
        None if so_far.reset > 0 => ExitCode::DrainForced,
        None => ExitCode::Done,
        Some(_) if job::is_stopped() => ExitCode::Interrupted,
        Some(_) => ExitCode::GivenBack,
    })
}

/// What went over goes back, and what waits as well.
async fn put_back(
    attachment: &mut Attachment,
    exchanged: Option<Exchange>,
    (old, hold): (Slot, Hold),
) -> anyhow::Result<Pumped> {
    let Some(what) = exchanged else { return Ok(attachment.call_off(hold).await?) };
    if hold.left().is_zero() {
        // Clients have the new side by now: what they use is not taken away under them.
        attachment.release(hold).await?;
        anyhow::bail!(
            "the {} was not put back: the time was over, and the new side has got the flows",
            what.name()
        );
    }
    let back = attachment.exchange(what, old).await;
    let pumped = attachment.call_off(hold).await;
    if let Err(error) = back {
        // Once more, by what the record says.
        let _ = attachment.reassert().await?;
        return Err(error).context("what had gone over was put back only at the second attempt");
    }
    Ok(pumped?)
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

fn conclusion(failure: Option<&str>, serving: &str, (pumped, reset): (Pumped, usize), name: &str) -> String {
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
    if reset > 0 {
        text.push_str(&format!("\n{reset} flows had not ended in time, and were reset"));
    }
    if failure.is_none() {
        text.push_str(&format!("\nnext: patchswitch drain {name}"));
    }
    text
}
