//! The switch alone: `attach`, `switch`, `drain`, `flows`, `detach`; `status` is next door.

use std::fmt::Write;
use std::net::IpAddr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use patchswitch::attachment::{
    ANNOUNCE_AGAIN, Attachment, DrainOptions, Flows, OnDeadline, Partition, Record, Spec, SwitchOptions,
    Switched, UDP_IDLE, View,
};
use patchswitch::config::{Datagrams, Quic};
use patchswitch::dataplane::HookKind;
use patchswitch::exit::ExitCode;
use patchswitch::host::linux::netns::NetnsRef;
use patchswitch::names::Name;
use patchswitch_common::Slot;
use patchswitch_common::word::Phase;
use serde_json::{Value, json};

use super::canary::Steps;
use super::hold::{self, Waiting};
use super::{beside, print, status};

/// An attachment, by name.
#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name of the attachment.
    name: Name,
}

/// Arguments of `attach`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each namespace gets a veth of its own with the service address; nothing else in it is touched.
A namespace is a name of `ip netns`, an absolute path such as /proc/PID/ns/net, or pid:NUMBER.

Example, two namespaces behind eth0, the first one serving:
  patchswitch attach web --address 192.0.2.80 --address 2001:db8::80 --uplink eth0 old new")]
pub(crate) struct Attach {
    /// Name of the attachment: lower-case letters, digits, dashes.
    name: Name,
    /// The namespace that serves.
    first: NetnsRef,
    /// The namespace that can take over. Without one the service is steered, and there is nothing to switch to.
    second: Option<NetnsRef>,
    /// A service address; may be given several times, for both families.
    #[arg(long = "address", required = true, value_name = "ADDRESS")]
    addresses: Vec<IpAddr>,
    /// A network device on which clients are; may be given several times.
    #[arg(long = "uplink", required = true, value_name = "DEVICE")]
    uplinks: Vec<String>,
    /// Of two uplinks the first is the first namespace's and the second the second's: the addresses are answered for at the one of
    /// who serves, and go to the other one by `switch --hold TIME --exchange address`.
    #[arg(long, requires = "second")]
    own_uplinks: bool,
    /// How the programs are attached. `auto` is `tc`, and says why.
    #[arg(long, value_enum, default_value = "auto")]
    hook: HookChoice,
    /// After so many seconds without an answer a datagram flow that was remembered for a switch is forgotten.
    #[arg(long, value_name = "SECONDS", default_value_t = UDP_IDLE.as_secs_f64())]
    udp_idle: f64,
    /// A UDP port of which each datagram stands for itself, as those of DNS: with a switch all go to the new partition.
    /// May be given several times.
    #[arg(long, value_name = "PORT")]
    stateless: Vec<u16>,
    /// A port of QUIC, and which bytes of its servers' connection ids tell who made them: clients that go on from
    /// another address stay with the partition that has them.
    #[arg(long, value_name = "PORT:OFFSET:LENGTH[:MASK]")]
    quic: Option<Quic>,
    /// An attachment with which this one is to be in a group: they switch at the same moment, by one store. The first
    /// namespace is the one that serves then.
    #[arg(long, value_name = "NAME")]
    with: Option<Name>,
    /// How often neighbours on the uplinks are told (ARP, NDP) where the addresses are; a second apart.
    #[arg(long, value_name = "TIMES", default_value = "2", value_parser = clap::value_parser!(u32).range(1..=60))]
    announce: u32,
}

/// Where the programs are on the path of a packet.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum HookChoice {
    /// The best for these uplinks: TC.
    Auto,
    /// TCX where the kernel has it, else clsact.
    Tc,
    /// TCX, since Linux 6.6.
    Tcx,
    /// A filter of the clsact qdisc.
    Clsact,
    /// Native XDP at the uplinks, and TC for what XDP leaves to it: for physical devices whose driver has it.
    Xdp,
}

impl Attach {
    pub(crate) async fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        let spec = Spec {
            name: self.name.clone(),
            addresses: self.addresses.clone(),
            uplinks: self.uplinks.clone(),
            udp_idle: Duration::try_from_secs_f64(self.udp_idle)?,
            datagrams: Datagrams { stateless: self.stateless.clone(), quic: self.quic },
            hook: match self.hook {
                HookChoice::Auto => None,
                HookChoice::Tc => Some(HookKind::of_this_kernel()),
                HookChoice::Tcx => Some(HookKind::Tcx),
                HookChoice::Clsact => Some(HookKind::Clsact),
                HookChoice::Xdp => Some(HookKind::Xdp),
            },
            of_service: false,
            own_uplinks: self.own_uplinks,
            with: self.with.clone(),
        };
        let first = Partition::guest(self.first.clone(), &self.name);
        let second = self.second.clone().map(|netns| Partition::guest(netns, &self.name));
        let attachment = Attachment::create(&spec, &first, second.as_ref()).await?;
        beside::warn_of_the_firewall(attachment.record());
        status::show(&attachment, json).await?;
        for _ in 1..self.announce {
            tokio::time::sleep(ANNOUNCE_AGAIN).await;
            attachment.announce().await;
        }
        Ok(ExitCode::Done)
    }
}

/// Arguments of `switch`.
#[derive(Debug, Args)]
#[command(after_help = "\
The switch is one 8-byte store. It is reversed by the same command with the roles exchanged:
  patchswitch switch web            # to the other one, whichever serves now
  patchswitch switch web --to old   # to this one; already so: nothing to do, exit 0
In steps, and back by itself if the new side does worse than the old one:
  patchswitch switch web --share 1,10,50,100 --every 30s
With new flows waiting while something moves from the old side to the new one:
  patchswitch switch web --hold 3s --run /usr/local/sbin/move-database")]
pub(crate) struct Switch {
    /// Name of the attachment.
    name: Name,
    /// The namespace that is to serve, as it was named at `attach`; default: the one that does not.
    #[arg(long, value_name = "NAMESPACE")]
    to: Option<NetnsRef>,
    /// Before the switch or the first share, remember for so many seconds which flows without a connection (UDP, ICMP) the old partition
    /// answers: it keeps these. Give at least the time after which your clients give up.
    #[arg(long, value_name = "SECONDS")]
    learn: Option<f64>,
    /// Steer nothing to the old partition any more, as the patent's second embodiment has it: what its clients still send comes to the
    /// new one, which resets their connections. For comparison, and for services of single datagrams.
    #[arg(long, conflicts_with_all = ["share", "hold"])]
    letter: bool,
    #[command(flatten)]
    steps: Steps,
    #[command(flatten)]
    waiting: Waiting,
}

impl Switch {
    pub(crate) async fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        let mut attachment = Attachment::open(&self.name)?;
        attachment.record().by_hand(&SWITCHES)?;
        let active = attachment.plane().word().active();
        let to = match &self.to {
            None => active.other(),
            Some(netns) => slot_of(attachment.record(), netns)?,
        };
        let shares = attachment.plane().word().phase() == Phase::Sharing;
        if self.steps.is_given() {
            anyhow::ensure!(
                to != active,
                "{} serves already; a share is given to the other one",
                netns_name(attachment.record(), to)
            );
            self.steps.check()?;
        } else if to == active && !shares {
            let mended = attachment.reassert().await?;
            print_already(json, &netns_name(attachment.record(), to), &mended)?;
            return Ok(ExitCode::Done);
        }
        if let Some(seconds) = self.learn {
            let time = Duration::try_from_secs_f64(seconds)?;
            attachment.learn()?;
            tokio::time::sleep(time).await;
        }
        if self.steps.is_given() {
            beside::warn_of_the_firewall(attachment.record());
            return self.steps.run(&mut attachment, json).await;
        }
        if let Some(waiting) = self.waiting.given() {
            let ended = hold::run(&mut attachment, to, waiting, json).await?;
            announce_again(&attachment).await;
            return Ok(ended);
        }
        let options = SwitchOptions { letter: self.letter, ..SwitchOptions::default() };
        let done = attachment.switch_with(to, options).await?;
        // Afterwards: the rules of a host can be many, and who switches may be in a hurry.
        beside::warn_of_the_firewall(attachment.record());
        print_switch(json, &attachment, to, done)?;
        announce_again(&attachment).await;
        Ok(ExitCode::Done)
    }
}

/// Where a switch takes the addresses to another uplink it is said once more, for neighbours who did not hear it.
async fn announce_again(attachment: &Attachment) {
    if attachment.record().own_uplinks {
        tokio::time::sleep(ANNOUNCE_AGAIN).await;
        attachment.announce().await;
    }
}

/// What switches a service, for who wants to do it by hand.
const SWITCHES: [&str; 2] = ["apply", "rollback"];

fn print_already(json: bool, serving: &str, mended: &[String]) -> anyhow::Result<()> {
    if json {
        return print::json(&json!({
            "schema": "patchswitch.switch/1", "changed": false, "serving": serving, "switch": null,
            "mended": mended,
        }));
    }
    for what in mended {
        print::text(&format!("mended: {what}"));
    }
    let rest = if mended.is_empty() { "; nothing to do" } else { "" };
    print::text(&format!("{serving} serves already{rest}"));
    Ok(())
}

fn print_switch(json: bool, attachment: &Attachment, to: Slot, done: Switched) -> anyhow::Result<()> {
    let serving = netns_name(attachment.record(), to);
    if json {
        return print::json(&json!({
            "schema": "patchswitch.switch/1", "changed": true, "serving": serving, "switch": done, "mended": [],
            "members": attachment.members(),
        }));
    }
    if let [_, others @ ..] = &attachment.members()[..]
        && !others.is_empty()
    {
        let others: Vec<_> = others.iter().map(ToString::to_string).collect();
        print::text(&format!("{} was switched with {}", attachment.record().name, others.join(", ")));
    }
    print::text(&format!(
        "{serving} serves new flows since now (store {:.1} µs, fence {:.0} µs, generation {})\n\
         next: patchswitch drain {}",
        done.flip_us,
        done.fence_us,
        done.generation,
        attachment.record().name,
    ));
    Ok(())
}

fn slot_of(record: &Record, netns: &NetnsRef) -> anyhow::Result<Slot> {
    let at = record.slots.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.netns.is_as(netns)));
    match at {
        Some(0) => Ok(Slot::A),
        Some(_) => Ok(Slot::B),
        None => anyhow::bail!(
            "{} has no partition {netns}; it has {}",
            record.name,
            record.slots.iter().flatten().map(|s| s.netns.to_string()).collect::<Vec<_>>().join(" and "),
        ),
    }
}

pub(super) fn netns_name(record: &Record, slot: Slot) -> String {
    record.slots[slot as usize].as_ref().map_or_else(|| "nobody".to_owned(), |slot| slot.netns.to_string())
}

/// What to do with flows that are left at the deadline.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Late {
    /// They stay with the old partition.
    Keep,
    /// The switch is reversed.
    Abort,
    /// They are reset.
    Reset,
}

/// Arguments of `drain`.
#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// Name of the attachment.
    name: Name,
    /// The longest time to wait, in seconds; default: for ever.
    #[arg(long, value_name = "SECONDS")]
    deadline: Option<f64>,
    /// What happens to flows that are left then.
    #[arg(long, value_enum, default_value = "keep", requires = "deadline")]
    on_deadline: Late,
}

impl Drain {
    pub(crate) async fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        let deadline = self.deadline.map(Duration::try_from_secs_f64).transpose()?;
        let on_deadline = match self.on_deadline {
            Late::Keep => OnDeadline::Keep,
            Late::Abort => OnDeadline::Abort,
            Late::Reset => OnDeadline::Reset,
        };
        let mut attachment = Attachment::open(&self.name)?;
        if on_deadline == OnDeadline::Abort {
            attachment.record().by_hand(&["rollback"])?;
        }
        let options = DrainOptions { deadline, on_deadline };
        let is_over = attachment.plane().word().phase() == Phase::Steady;
        let report = attachment
            .drain(&options, |left| {
                if !json {
                    print::progress(&format!("{left} flows left"));
                }
            })
            .await?;
        if json {
            print::json(
                &json!({"schema": "patchswitch.drain/1", "on_deadline": on_deadline, "drain": report}),
            )?;
        } else {
            print::text(&match (report.settled, report.reset, on_deadline) {
                (true, 0, _) if is_over => format!("no switch of {} is under way; nothing to do", self.name),
                (true, 0, _) => format!("drained in {:.1} s; the switch is over", report.seconds),
                (true, cut, _) => format!("deadline: {cut} flows were cut; the switch is over"),
                (false, _, OnDeadline::Abort) => {
                    format!("deadline: {} flows left; the switch was reversed", report.left)
                }
                (false, ..) => format!(
                    "deadline: {} flows left; they stay with the old partition\nnext: patchswitch drain {}",
                    report.left, self.name
                ),
            });
        }
        Ok(match (report.settled, report.reset, on_deadline) {
            (true, 0, _) => ExitCode::Done,
            (true, ..) => ExitCode::DrainForced,
            (false, _, OnDeadline::Abort) => ExitCode::GivenBack,
            (false, ..) => ExitCode::Failed,
        })
    }
}

impl Named {
    /// `flows`.
    pub(crate) fn flows(&self, json: bool) -> anyhow::Result<ExitCode> {
        let view = View::open(&self.name)?;
        let active = view.plane().word().active();
        let mut slots = Vec::new();
        for slot in [active, active.other()] {
            if view.record().slots[slot as usize].is_some() {
                slots.push((slot, view.flows(slot)?));
            }
        }
        if json {
            let entries: Vec<Value> = slots
                .iter()
                .map(|(slot, flows)| {
                    json!({"netns": netns_name(view.record(), *slot), "active": *slot == active, "flows": flows})
                })
                .collect();
            print::json(&json!({"schema": "patchswitch.flows/1", "partitions": entries}))?;
        } else {
            for (slot, flows) in &slots {
                let role = if *slot == active { "active" } else { "other" };
                print::text(&flow_lines(&netns_name(view.record(), *slot), role, flows)?);
            }
        }
        Ok(ExitCode::Done)
    }
}

fn flow_lines(netns: &str, role: &str, flows: &Flows) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    writeln!(
        text,
        "{netns} ({role}): {} accepted, {} waiting for accept, {} outgoing, {} learned",
        flows.accepted.len(),
        flows.queued,
        flows.outgoing.len(),
        flows.learned
    )?;
    for (direction, list) in [("accepted", &flows.accepted), ("outgoing", &flows.outgoing)] {
        for flow in list {
            writeln!(text, "  {direction}  {:<12}  {} <- {}", flow.state, flow.local, flow.remote)?;
        }
    }
    Ok(text)
}

/// Arguments of `detach`.
#[derive(Debug, Args)]
#[command(after_help = "The service address goes away with the attachment: connections that use it end.")]
pub(crate) struct Detach {
    /// Name of the attachment.
    name: Name,
    /// Detach although flows are left: they are cut.
    #[arg(long)]
    force: bool,
}

impl Detach {
    pub(crate) async fn run(&self, json: bool) -> anyhow::Result<ExitCode> {
        use patchswitch::attachment::{AttachError, RecordError};
        if let Ok(record) = Record::load(&self.name) {
            record.by_hand(&["service remove", "down"])?;
        }
        let there = match Attachment::open(&self.name) {
            Err(AttachError::Record(RecordError::Unknown(_))) => None,
            // Half of it is there: all the more reason to remove it.
            Err(AttachError::Dataplane(_) | AttachError::Incomplete(_)) => None,
            other => Some(other?),
        };
        if let Some(attachment) = there
            && !self.force
        {
            let mut left = 0;
            for slot in [Slot::A, Slot::B] {
                if attachment.record().slots[slot as usize].is_some() {
                    left += attachment.flows(slot).map_or(0, |flows| flows.count());
                }
            }
            anyhow::ensure!(
                left == 0,
                "{} still has {left} flows, which would be cut{}; nothing was changed\n\
                 next: patchswitch flows {0}, or patchswitch detach {0} --force",
                self.name,
                beside::cut_by_the_firewall()
            );
        }
        match Attachment::detach(&self.name).await {
            Err(AttachError::Record(RecordError::Unknown(_))) => self.done(json, false),
            other => other.map_err(anyhow::Error::from).and_then(|()| self.done(json, true)),
        }
    }

    fn done(&self, json: bool, changed: bool) -> anyhow::Result<ExitCode> {
        if json {
            print::json(&json!({"schema": "patchswitch.detach/1", "name": self.name, "changed": changed}))?;
        } else if changed {
            print::text(&format!("{} is detached", self.name));
        } else {
            print::text(&format!("nothing is attached as {}; nothing to do", self.name));
        }
        Ok(ExitCode::Done)
    }
}
