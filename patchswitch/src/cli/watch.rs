//! `watch`: what happens beside the service, as it happens.

use std::time::Duration;

use clap::Args;
use patchswitch::attachment::{ANNOUNCE_EVERY, Seen, Watch as Watched};
use patchswitch::exit::ExitCode;
use patchswitch::names::Name;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::print;

/// Arguments of `watch`.
#[derive(Debug, Args)]
#[command(after_help = "\
Told are claims of the service addresses by others on the uplinks, and what the BPF programs log. Whoever claims an
address is answered by an announcement of it, at most once in ten seconds. Without somebody who watches, a drain, a job
or this, nobody answers those who ask by ARP whether an IPv4 address is free.")]
pub(crate) struct Watch {
    /// Name of an attachment or service.
    name: Name,
    /// Ends after so many seconds; default: when it is interrupted.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// How often the service addresses are announced to neighbours.
    #[arg(long, value_name = "SECONDS", default_value_t = ANNOUNCE_EVERY.as_secs_f64())]
    every: f64,
}

impl Watch {
    pub(crate) async fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        let every = Duration::try_from_secs_f64(self.every)?;
        let time = self.seconds.map(Duration::try_from_secs_f64).transpose()?;
        let mut watched = Watched::open(&self.name, every).await?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let over = async {
            match time {
                Some(time) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(over);
        if !json {
            print::progress(&format!("watching {}", self.name));
        }
        loop {
            let seen = tokio::select! {
                seen = watched.next() => seen?,
                () = &mut over => return Ok(ExitCode::Done),
                _ = interrupt.recv() => return Ok(ExitCode::Done),
                _ = terminate.recv() => return Ok(ExitCode::Done),
            };
            let Some(seen) = seen else {
                anyhow::bail!("{} is not attached any more", self.name);
            };
            for seen in &seen {
                tell(seen, json)?;
            }
        }
    }
}

fn tell(seen: &Seen, json: bool) -> anyhow::Result<()> {
    if json {
        return print::json_line(&as_json(seen));
    }
    match seen {
        Seen::Foreign(foreign) => print::text(&foreign.to_string()),
        Seen::Programs(line) => print::text(&format!("{}: {}", line.level, line.text)),
    }
    Ok(())
}

fn as_json(seen: &Seen) -> Value {
    let (event, what) = match seen {
        Seen::Foreign(foreign) => ("claim", json!(foreign)),
        Seen::Programs(line) => ("programs", json!({"level": line.level.as_str(), "text": line.text})),
    };
    json!({"schema": "patchswitch.watch/1", "at": jiff::Timestamp::now(), "event": event, "what": what})
}
