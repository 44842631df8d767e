//! `status`: what is attached, who serves, and which jobs are open.

use std::fmt::Write;
use std::path::Path;

use clap::Args;
use patchswitch::attachment::{Attachment, Record, phase_name};
use patchswitch::dataplane::{Dataplane, DataplaneError};
use patchswitch::exit::ExitCode;
use patchswitch::names::Name;
use patchswitch_common::Slot;
use patchswitch_common::word::{Phase, Word};
use serde_json::{Value, json};

use super::{beside, print, report};

/// Arguments of `status`.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Name of an attachment; default: all.
    name: Option<Name>,
}

impl Status {
    pub(crate) async fn run(&self, config: &Path, json: bool) -> anyhow::Result<ExitCode> {
        let records = match &self.name {
            Some(name) => vec![Record::load(name)?],
            None => Record::all()?,
        };
        let mut states = Vec::new();
        for record in &records {
            states.push(state(record).await?);
        }
        // Who serves is to be seen whatever is wrong with the store or the configuration.
        let (jobs, rooms, trouble) = match report::open_jobs(config, self.name.as_ref()) {
            Ok((jobs, rooms)) => (jobs, rooms, None),
            Err(error) => (Vec::new(), Vec::new(), Some(format!("jobs are not known: {error:#}"))),
        };
        if json {
            print::json(&json!({
                "schema": "patchswitch.status/1", "attachments": states, "jobs": jobs, "clones": rooms,
                "jobs_error": trouble,
            }))?;
            return Ok(ExitCode::Done);
        }
        if states.is_empty() {
            print::text("nothing is attached");
        }
        for state in &states {
            print::text(&lines(state)?);
        }
        for job in &jobs {
            print::text(&report::open_job_lines(job));
        }
        for room in &rooms {
            print::text(&report::room_lines(room));
        }
        if let Some(trouble) = trouble {
            print::progress(&trouble);
        }
        Ok(ExitCode::Done)
    }
}

/// Shows one attachment, as `attach` does at its end.
pub(super) async fn show(attachment: &Attachment, json: bool) -> anyhow::Result<()> {
    let state = state(attachment.record()).await?;
    if json {
        return print::json(&json!({"schema": "patchswitch.status/1", "attachments": [state]}));
    }
    print::text(&lines(&state)?);
    Ok(())
}

fn broken(record: &Record) -> Value {
    let next = if record.of_service { "up".to_owned() } else { format!("detach {}", record.name) };
    json!({"name": record.name, "phase": "broken", "next": format!("patchswitch {next}")})
}

async fn state(record: &Record) -> anyhow::Result<Value> {
    let plane = match Dataplane::open(&record.name) {
        // Somebody removed the pins, or it was not made to its end.
        Err(DataplaneError::NotAttached(_)) => return Ok(broken(record)),
        other => other?,
    };
    let word = plane.word();
    let partitions: Vec<_> = [Slot::A, Slot::B]
        .into_iter()
        .filter_map(|slot| record.slots[slot as usize].as_ref().map(|entry| (slot, entry)))
        .map(|(slot, entry)| {
            let role = match (slot == word.active(), phase_name(word)) {
                (true, _) => "active",
                (false, "draining" | "letter") => "retiring",
                (false, "sharing") => "canary",
                (false, _) => "standby",
            };
            json!({
                "netns": entry.netns, "role": role, "link": entry.link,
                "uplink": record.own_uplinks.then(|| record.uplinks_of(slot)), "gone": record.gone(slot),
                "paths_refused": record.paths_refused(slot),
                "held_ms": plane.held(slot).ok().flatten().map(|left| left.as_millis() as u64),
            })
        })
        .collect();
    Ok(json!({
        "name": record.name,
        "addresses": record.addresses,
        "uplinks": record.uplinks,
        "uplinks_lost": record.lost_uplinks(&plane.uplinks()?),
        "of_service": record.of_service,
        "phase": phase_name(word),
        "share": word.share(),
        "generation": word.generation(),
        "notice": word.notice(),
        "hook": record.hook_kind,
        "group": record.group(),
        "switches_with": record.others()?.into_iter().map(|other| other.name).collect::<Vec<_>>(),
        "xdp": record.xdp,
        "hook_reason": record.hook_reason,
        "reload_unfinished": plane.is_half_replaced(),
        "partitions": partitions,
        "next": record.way_back(word.active()).or_else(|| without_canary(record, word)),
        "programs": beside::programs(record).await,
        "counters": plane.counters()?,
    }))
}

/// What to type when the canary is gone, and its share of the new flows reaches nobody. Of a service its job decides.
fn without_canary(record: &Record, word: Word) -> Option<String> {
    let serving = record.slots[word.active() as usize].as_ref()?;
    let is_needed = word.phase() == Phase::Sharing
        && record.gone(word.active().other()).is_some()
        && record.gone(word.active()).is_none();
    (is_needed && !record.of_service)
        .then(|| format!("patchswitch switch {} --to {}", record.name, serving.netns))
}

/// Which new flows reach somebody when a side is gone.
fn reach(state: &Value) -> &'static str {
    let mut partitions = state["partitions"].as_array().into_iter().flatten();
    if partitions.any(|one| one["role"] == "canary" && !one["gone"].is_null()) {
        "the canary's share of new flows is not"
    } else if state["phase"] == "sharing" {
        "only the canary's share of new flows is"
    } else {
        "no new flow is"
    }
}

/// What it means that uplinks have no programs, and what to type.
fn lost_uplinks(state: &Value, lost: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    if !lost.is_empty() {
        writeln!(text, "             {lost}: gone or made anew, and nothing that comes there is taken")?;
        let next = match (state["of_service"] == true, state["name"].as_str()) {
            (true, _) => "patchswitch up".to_owned(),
            (false, name) => format!("patchswitch detach {}, and attach it again", name.unwrap_or("?")),
        };
        writeln!(text, "  next       once it is there: {next}")?;
    }
    Ok(text)
}

fn lines(state: &Value) -> anyhow::Result<String> {
    let list = |key: &str| {
        let items = state[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        items.collect::<Vec<_>>().join(", ")
    };
    let word = |key: &str| state[key].as_str().unwrap_or("?").to_owned();
    if state["phase"] == "broken" {
        return Ok(format!("{}: broken, its programs are gone\n  next: {}", word("name"), word("next")));
    }
    let mut text = String::new();
    writeln!(
        text,
        "{}: {} (generation {}, hook {}{})",
        word("name"),
        word("phase"),
        state["generation"],
        word("hook"),
        if state["xdp"] == true { " and xdp" } else { "" },
    )?;
    if let Some(reason) = state["hook_reason"].as_str().filter(|reason| !reason.is_empty()) {
        writeln!(text, "  hook       {reason}")?;
    }
    writeln!(text, "  addresses  {}", list("addresses"))?;
    if state["switches_with"].as_array().is_some_and(|others| !others.is_empty()) {
        writeln!(text, "  with       {}", list("switches_with"))?;
    }
    writeln!(text, "  uplinks    {}", list("uplinks"))?;
    text.push_str(&lost_uplinks(state, &list("uplinks_lost"))?);
    for partition in state["partitions"].as_array().into_iter().flatten() {
        let of = |key: &str| partition[key].as_str().unwrap_or("?");
        let gone = partition["gone"].as_str().map(|what| format!(": its {what} is gone")).unwrap_or_default();
        let share = match (of("role"), &state["share"]) {
            ("canary", share) => format!(", {share} of 100 new flows"),
            _ => String::new(),
        };
        let uplink = partition["uplink"][0].as_str().map(|link| format!(", at {link}")).unwrap_or_default();
        writeln!(text, "  {:<9}  {} ({}){uplink}{share}{gone}", of("role"), of("netns"), of("link"))?;
        if let Some(left) = partition["held_ms"].as_u64() {
            writeln!(text, "             new flows wait for it, {left} ms more at most")?;
        }
        if let Some(count @ 1..) = partition["paths_refused"].as_u64() {
            writeln!(
                text,
                "             refused {count} further paths of Multipath TCP connections that it does not have"
            )?;
        }
    }
    if let Some(next) = state["next"].as_str() {
        writeln!(text, "  next       {next}\n             {} served", reach(state))?;
    }
    if state["reload_unfinished"] == true {
        writeln!(text, "  reload     was killed; to go on with it: patchswitch reload {}", word("name"))?;
    }
    text.push_str(&beside::lines(&state["programs"])?);
    Ok(text)
}
