//! `switch --share`: a canary.

use std::time::Duration;

use clap::Args;
use patchswitch::attachment::{Attachment, Canary, CanaryReport, Conduct};
use patchswitch::config::duration;
use patchswitch::exit::ExitCode;
use patchswitch_common::Slot;
use serde_json::json;

use super::alone::netns_name;
use super::{job, print};

/// How `switch` goes in steps.
#[derive(Debug, Args)]
pub(crate) struct Steps {
    /// Give the other partition only so many of a hundred new connections, in steps that each add to the one before;
    /// 100 is the switch. Flows that exist stay where they are.
    #[arg(long, value_name = "SHARES", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=100))]
    share: Vec<u8>,
    /// How long each step lasts, such as 30s. If the new side does worse meanwhile than the old one (connections not
    /// accepted or reset, segments sent again), new connections go back to the old side and the command ends with 22.
    #[arg(long, value_name = "TIME", requires = "share", value_parser = duration::parse)]
    every: Option<Duration>,
}

impl Steps {
    pub(crate) fn is_given(&self) -> bool {
        !self.share.is_empty()
    }

    /// Refuses shares that are none of a canary.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.share.windows(2).all(|pair| pair[0] < pair[1]),
            "each share must be larger than the one before; nothing was changed"
        );
        anyhow::ensure!(
            self.every.is_some() || matches!(self.share[..], [1..=99]),
            "several shares, and the whole, need a time for each, such as --every 30s; nothing was changed"
        );
        Ok(())
    }

    /// Runs the canary on the partition that is not active, if [`Steps::check`] has nothing to say.
    pub(crate) async fn run(&self, attachment: &mut Attachment, json: bool) -> anyhow::Result<ExitCode> {
        match (self.every, &self.share[..]) {
            (None, [share]) => alone(attachment, *share, json).await,
            (every, shares) => {
                let every = every.unwrap_or_default();
                watched(attachment, Canary { shares: shares.to_vec(), every }, json).await
            }
        }
    }
}

/// One share, and nobody who watches.
async fn alone(attachment: &mut Attachment, share: u8, json: bool) -> anyhow::Result<ExitCode> {
    attachment.share(share).await?;
    let (old, new) = sides(attachment);
    if json {
        print::json(&json!({"schema": "patchswitch.share/1", "share": share, "old": old, "new": new}))?;
        return Ok(ExitCode::Done);
    }
    let name = &attachment.record().name;
    print::text(&format!(
        "{new} gets {share} of 100 new flows since now, {old} the others; nobody watches how it does\n\
         next: patchswitch switch {name} --to {new}, or back: patchswitch switch {name} --to {old}"
    ));
    Ok(ExitCode::Done)
}

async fn watched(attachment: &mut Attachment, canary: Canary, json: bool) -> anyhow::Result<ExitCode> {
    job::watch_signals(json)?;
    let (old, new) = sides(attachment);
    let report = attachment
        .canary(&canary, &job::is_stopped, |share, ours, others| {
            if !json {
                print::progress(&format!(
                    "{share} of 100 new flows to {new}: {}; {old}: {}",
                    line(ours),
                    line(others)
                ));
            }
        })
        .await?;
    if json {
        print::json(&json!({"schema": "patchswitch.canary/1", "old": old, "new": new, "canary": report}))?;
    } else {
        print::text(&conclusion(&report, &attachment.record().name.to_string(), (&old, &new)));
    }
    Ok(match &report {
        CanaryReport { given_back: Some(_), .. } => ExitCode::GivenBack,
        CanaryReport { called_off: true, .. } => ExitCode::Interrupted,
        _ => ExitCode::Done,
    })
}

fn conclusion(report: &CanaryReport, name: &str, (old, new): (&str, &str)) -> String {
    let drain = format!("next: patchswitch drain {name}");
    match report {
        CanaryReport { given_back: Some(why), share, .. } => {
            format!("given back at {share} of 100: {why}\n{old} serves new flows again\n{drain}")
        }
        CanaryReport { called_off: true, share, .. } => {
            format!("called off at {share} of 100: {old} serves new flows again\n{drain}")
        }
        CanaryReport { share: 100, .. } => format!("{new} serves all new flows\n{drain}"),
        CanaryReport { share, .. } => format!(
            "{new} keeps {share} of 100 new flows; nobody watches how it does any more\n\
             next: patchswitch switch {name} --to {new}, or back: patchswitch switch {name} --to {old}"
        ),
    }
}

fn line(side: Conduct) -> String {
    let Conduct { asked, answered, reset, sent, sent_again } = side;
    format!(
        "{answered} of {asked} connections accepted, {reset} reset, {sent_again} of {sent} segments sent again"
    )
}

/// The names of the active side and of the other one.
fn sides(attachment: &Attachment) -> (String, String) {
    let active: Slot = attachment.plane().word().active();
    (netns_name(attachment.record(), active), netns_name(attachment.record(), active.other()))
}
