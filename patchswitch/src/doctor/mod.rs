//! What the host has and lacks, what that costs, and what to type.
//!
//! ```text
//!  kernel, files, programs ─► Facts (read: looks, changes nothing) ─► judge (pure) ─► Diagnosis
//! ```
//!
//! Both partitions share the host's kernel, so patches of the kernel are out of scope, whatever is found here.

mod facts;
mod firewall;
mod judge;
mod naming;
#[cfg(test)]
mod tests;

pub use facts::{Bpffs, Cgroups, Facts, Mapper, Place, RouterRoute, read};
pub use firewall::{BadRules, Rules, parse as parse_rules};
pub use judge::judge;
pub use naming::Named;

use std::net::IpAddr;

use serde::Serialize;

use crate::exit::ExitCode;

/// What the firewall of this host means for an attachment, or that it is not known; nothing if that is nothing.
pub fn firewall() -> Option<Item> {
    let item = judge::firewall(&facts::rules(), &facts::old_tables());
    (item.state != State::Ok).then_some(item)
}

/// The chains that drop what connection tracking calls invalid, as far as the rules are known.
pub fn drops_invalid() -> Vec<String> {
    facts::rules().map(|rules| rules.drop_invalid).unwrap_or_default()
}

/// The chains with rules about one of these addresses, or that drop by one of these links, as far as the rules are known.
pub fn rules_about(addresses: &[IpAddr], links: &[String]) -> Named {
    let named = facts::ruleset().ok().and_then(|text| naming::named(&text, addresses, links).ok());
    named.unwrap_or_default()
}

/// How one thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// It works, at a cost.
    Warn,
    /// It could not be found out.
    Unknown,
    /// Something does not work without it.
    Missing,
}

impl State {
    /// Its name on the screen and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Unknown => "unknown",
            Self::Missing => "missing",
        }
    }
}

/// What does not work without a thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Need {
    /// Nothing.
    Nobody,
    /// Whole jobs: partitions, clones, patches.
    Job,
    /// Everything, the switch alone included.
    Switch,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What it is.
    pub name: &'static str,
    /// How it is.
    pub state: State,
    /// What does not work without it.
    pub needed_by: Need,
    /// What was found.
    pub found: String,
    /// What that costs.
    pub cost: Option<String>,
    /// What to type, or to do.
    pub advice: Option<String>,
}

/// What was found out about a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// Whether `attach`, `switch`, `drain` and `detach` can work.
    pub switch: bool,
    /// Whether whole jobs can work.
    pub whole_job: bool,
    /// Everything that was looked at.
    pub items: Vec<Item>,
}

impl Diagnosis {
    /// What follows from what was found. What is not known is not promised.
    pub fn new(items: Vec<Item>) -> Self {
        let is_there = |item: &Item| matches!(item.state, State::Ok | State::Warn);
        let has = |needs: &[Need]| items.iter().filter(|item| needs.contains(&item.needed_by)).all(is_there);
        Self { switch: has(&[Need::Switch]), whole_job: has(&[Need::Switch, Need::Job]), items }
    }

    /// The end of the command: [`ExitCode::Done`] if whole jobs are possible, else [`ExitCode::Unavailable`].
    pub fn exit_code(&self) -> ExitCode {
        if self.whole_job { ExitCode::Done } else { ExitCode::Unavailable }
    }
}
