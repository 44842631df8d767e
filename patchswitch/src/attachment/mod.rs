//! The switch alone: one service address, two network namespaces of anybody's, no clone and no agent.
//!
//! ```text
//!            ┌────────── attach ──────────┐
//!  nothing ──┤ record ─ nsids ─ links ─   ├─► steady on A ── switch ──► draining to B ── drain ──► steady on B
//!            │ programs ─ self-test ─     │        ▲                         │
//!            │ routes ─ uplinks, last     │        └───────── switch ────────┘  (the same, roles exchanged)
//!            └────────────────────────────┘
//!  detach: the reverse, from the record alone, whatever of it was made
//! ```
//!
//! The record of an attachment is in `/run/patchswitch/attachments`, its programs, maps and links are pinned, and no
//! process has to live for it to work.

mod announce;
mod beside;
mod build;
mod canary;
mod drain;
mod error;
mod exchange;
mod flows;
mod group;
mod hold;
mod limits;
mod lock;
mod parity;
mod ports;
mod preflight;
mod presence;
mod probe;
mod reassert;
mod record;
mod remove;
mod settings;
mod watch;
mod wiring;
mod xdp;

pub use announce::{AGAIN as ANNOUNCE_AGAIN, EVERY as ANNOUNCE_EVERY};
pub use canary::{Canary, CanaryReport, Conduct};
pub use drain::{DrainOptions, DrainReport, OnDeadline};
pub use error::AttachError;
pub use exchange::Exchange;
pub use flows::{Flow, Flows, View};
pub use hold::{Hold, Pumped};
pub use lock::Lock;
pub use presence::Gone;
pub use probe::Prober;
pub use record::{Inside, Record, RecordError, ServicePorts, SlotRecord};
pub use watch::{Foreign, Seen, Watch, Watching};

use std::net::IpAddr;
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::maps::SlotEntry;
use patchswitch_common::verdict::Event;
use patchswitch_common::word::{Phase, Word};

use self::record::identity;
use self::settings::Settings;
use crate::config::Datagrams;
use crate::dataplane::{Dataplane, HookKind, Replacement};
use crate::host::linux::netlink::Netlink;
use crate::host::linux::netns::{Netns, NetnsRef};
use crate::host::linux::sockets;
use crate::names::{self, Name};

/// Default of [`Spec::udp_idle`].
pub const UDP_IDLE: Duration = Duration::from_secs(125);

/// What to attach.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name.
    pub name: Name,
    /// The service addresses, of either family.
    pub addresses: Vec<IpAddr>,
    /// Links of this namespace on which the clients are.
    pub uplinks: Vec<String>,
    /// After this time without an answer a flow without a socket of its own is forgotten.
    pub udp_idle: Duration,
    /// What is declared of its datagrams.
    pub datagrams: Datagrams,
    /// How programs are attached; nothing: the best that this kernel has. With [`HookKind::Xdp`] the uplinks have XDP
    /// in addition to that.
    pub hook: Option<HookKind>,
    /// Whether a service of that name has it, whose record has to follow every switch.
    pub of_service: bool,
    /// Whether each partition has an uplink of its own, at which the host answers for the service while that partition serves:
    /// the first of two for the first slot (figure 17 of the patent). Else it answers on all.
    pub own_uplinks: bool,
    /// An attachment with which it is to be in a group: both switch by one store.
    pub with: Option<Name>,
}

/// Who goes into a slot.
#[derive(Clone, Debug)]
pub struct Partition {
    /// Its network namespace.
    pub netns: NetnsRef,
    /// The link inside.
    pub inner_link: String,
    /// How the inside is set up.
    pub inside: Inside,
}

impl Partition {
    /// Somebody else's namespace.
    pub fn guest(netns: NetnsRef, name: &Name) -> Self {
        let inner_link = names::host_link(name, 0);
        Self { netns, inner_link, inside: Inside::Guest { table: wiring::guest_table(name) } }
    }
}

/// What a switch does beside the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwitchOptions {
    /// Give replies of the retiring partition that carry its own address the service's: the notice of the patent. Off
    /// only to show what it is good for.
    pub notice: bool,
    /// Switch although it cuts flows: those without a socket that could not all be remembered, and those of sockets that
    /// are bound to a device.
    pub despite_losses: bool,
    /// Steer nothing to the retiring partition: the patent's second embodiment to the letter (figures 22 to 26). What clients
    /// send to it comes to the new one, which knows nothing of their connections and resets them, be it with the first
    /// acknowledgement of an answer. The baseline, for comparison, and for services of single datagrams.
    pub letter: bool,
}

impl Default for SwitchOptions {
    fn default() -> Self {
        Self { notice: true, despite_losses: false, letter: false }
    }
}

/// What a switch did.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Switched {
    /// The generation of the word from then on.
    pub generation: u32,
    /// What came before the store, from the call on, in microseconds.
    pub prepare_us: f64,
    /// From before the store to after it, in microseconds.
    pub flip_us: f64,
    /// From the store until no packet under way had read the older word, in microseconds.
    pub fence_us: f64,
}

/// One attachment, open for changes.
#[derive(Debug)]
pub struct Attachment {
    record: Record,
    plane: Dataplane,
    host: Netlink,
    /// The others of its group.
    others: Vec<Attachment>,
    _lock: Lock,
}

impl Attachment {
    /// Attaches two partitions, the first of which serves. All or nothing: on an error everything is undone.
    ///
    /// To be called in the network namespace of the uplinks, as root, inside a tokio runtime.
    ///
    /// # Errors
    /// [`AttachError::Refused`] before anything is changed, [`AttachError::Undone`] afterwards.
    pub async fn create(
        spec: &Spec,
        first: &Partition,
        second: Option<&Partition>,
    ) -> Result<Self, AttachError> {
        preflight::root()?;
        let shared = Lock::host()?;
        let lock = Lock::of(&spec.name)?;
        let own = Netns::own()?;
        let host = Netlink::open(&own)?;
        if let Ok(unfinished) = Record::load(&spec.name)
            && !unfinished.ready
        {
            tracing::info!(name = %spec.name, "removing what a killed process left");
            remove::remove(&unfinished, &Netlink::open(&here(&unfinished)?)?, &shared).await?;
        }
        let partitions: Vec<&Partition> = std::iter::once(first).chain(second).collect();
        let links = preflight::check(spec, &own, &host, &partitions).await?;
        xdp::check(spec, &links)?;
        let mut record = Record::new(spec, identity(&own)?);
        record.group = group::leader(spec)?;
        let others = Self::open_others(&record)?;
        // Once more, now that their locks are held and nobody can begin a switch.
        group::leader(spec)?;
        record.hook_reason = xdp::reason(spec, &links);
        record.save()?;
        let mut settings = Settings::load(record.host, &shared)?;
        let plan = (links.as_slice(), partitions.as_slice());
        match build::build(&mut record, spec, &host, &mut settings, plan).await {
            Ok(plane) => {
                let attachment = Self { record, plane, host, others, _lock: lock };
                attachment.announce().await;
                ports::tell_of_overlap(&attachment.record);
                Ok(attachment)
            }
            Err(cause) => {
                let undone = match remove::remove(&record, &host, &shared).await {
                    Ok(()) => "everything was undone".to_owned(),
                    Err(error) => error.to_string(),
                };
                Err(AttachError::Undone { name: spec.name.clone(), undone, cause: Box::new(cause) })
            }
        }
    }

    /// Tells everybody on the uplinks that the service addresses are here. [`Attachment::create`] has done it once; as a
    /// frame may be lost, it is to be done again after [`ANNOUNCE_AGAIN`]. A failure is logged.
    pub async fn announce(&self) {
        let uplinks = self.record.uplinks_of(self.plane.word().active());
        announce::announce(&self.record, uplinks, &self.host, announce::VOLLEY).await;
    }

    /// Whether [`Attachment::create`] would be refused, if what has the name now were detached first.
    ///
    /// # Errors
    /// [`AttachError::Refused`] and others, as there.
    pub async fn check(spec: &Spec, first: &Partition) -> Result<(), AttachError> {
        preflight::root()?;
        let own = Netns::own()?;
        preflight::check_spec(spec, &own, &Netlink::open(&own)?, &[first]).await.map(drop)
    }

    /// Opens an attachment for changes.
    ///
    /// # Errors
    /// [`RecordError::Unknown`], [`RecordError::Busy`], [`AttachError::Incomplete`], [`AttachError::Refused`] from another
    /// network namespace, or [`NotAttached`](crate::dataplane::DataplaneError::NotAttached) if its pins are gone.
    pub fn open(name: &Name) -> Result<Self, AttachError> {
        preflight::root()?;
        let lock = Lock::of(name)?;
        let record = Record::load(name)?;
        let host = Netlink::open(&here(&record)?)?;
        if !record.ready {
            return Err(AttachError::Incomplete(name.clone()));
        }
        let others = Self::open_others(&record)?;
        Ok(Self { plane: Dataplane::open(name)?, record, host, others, _lock: lock })
    }

    /// What it consists of.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Its data path.
    pub fn plane(&self) -> &Dataplane {
        &self.plane
    }

    /// The namespace of the partition in a slot.
    ///
    /// # Errors
    /// [`AttachError::Refused`] if the slot is empty.
    pub fn netns(&self, slot: Slot) -> Result<Netns, AttachError> {
        flows::netns(&self.record, slot)
    }

    fn slot(&self, slot: Slot) -> Result<&SlotRecord, AttachError> {
        let found = self.record.slots[slot as usize].as_ref();
        found.ok_or_else(|| AttachError::Refused(format!("{} has no second partition", self.record.name)))
    }

    /// Whether the partition in a slot is still in the network namespace that its name stands for. One that died and
    /// was started again may have a new one, of which this attachment knows nothing.
    ///
    /// # Errors
    /// [`AttachError::Netns`].
    pub fn is_current(&self, slot: Slot) -> Result<bool, AttachError> {
        let named = Netns::open(&self.slot(slot)?.netns)?;
        Ok(identity(&named)? == identity(&self.netns(slot)?)?)
    }

    /// Whether an uplink is not the device to which the programs were attached: one that was removed and made again is
    /// another one, on which nothing is. One that is gone is for [`Attachment::reassert`] to tell.
    ///
    /// # Errors
    /// [`AttachError::Netlink`], [`AttachError::Dataplane`].
    pub async fn has_other_uplinks(&self) -> Result<bool, AttachError> {
        let (known, links) = (self.plane.uplinks()?, self.host.links().await?);
        let mut there = links.iter().filter(|link| self.record.uplinks.contains(&link.name));
        Ok(there.any(|link| !known.contains(&link.index)))
    }

    /// Changes [`Spec::udp_idle`] and [`Spec::datagrams`]; whether they were others.
    ///
    /// # Errors
    /// [`AttachError::Refused`] if they make no sense, [`AttachError::Dataplane`], [`AttachError::Record`].
    pub fn set_datagrams(&mut self, udp_idle: Duration, datagrams: &Datagrams) -> Result<bool, AttachError> {
        if self.record.udp_idle == udp_idle && self.record.datagrams == *datagrams {
            return Ok(false);
        }
        datagrams.check().map_err(|error| AttachError::Refused(error.to_string()))?;
        self.plane.set_settings(&build::map_settings(&self.record.name, udp_idle, datagrams))?;
        self.record.udp_idle = udp_idle;
        self.record.datagrams = datagrams.clone();
        self.record.save()?;
        Ok(true)
    }

    /// Puts a partition into the slot that is empty. It is in quarantine until it serves: it reaches nothing but the
    /// host's own probes, and gets nothing else.
    ///
    /// # Errors
    /// [`AttachError`]; the slot is empty again then.
    pub async fn join(&mut self, slot: Slot, partition: &Partition) -> Result<(), AttachError> {
        if self.record.slots[slot as usize].is_some() {
            return Err(AttachError::Refused(format!("both slots of {} are taken", self.record.name)));
        }
        preflight::check_join(&self.record, &Netns::own()?, &self.host, partition).await?;
        let joined = build::join(&mut self.record, &self.plane, &self.host, slot, partition).await;
        if let Err(cause) = joined.and_then(|()| build::self_test(&self.record, &self.plane)) {
            let undone = match self.leave(slot).await {
                Ok(()) => "the slot is empty again".to_owned(),
                Err(error) => error.to_string(),
            };
            return Err(AttachError::Undone {
                name: self.record.name.clone(),
                undone,
                cause: Box::new(cause),
            });
        }
        Ok(())
    }

    /// Empties a slot that does not serve.
    ///
    /// # Errors
    /// [`AttachError::Refused`] if it serves or still has flows, [`AttachError::Removal`].
    pub async fn leave(&mut self, slot: Slot) -> Result<(), AttachError> {
        let word = self.plane.word();
        if word.active() == slot || word.phase() != Phase::Steady {
            return Err(AttachError::Refused("a partition that serves or drains cannot leave".to_owned()));
        }
        if self.record.slots[slot as usize].is_none() {
            return Ok(());
        }
        // A switch that was killed may have left the host's route to the link that goes.
        if let Err(error) = self.reassert().await {
            tracing::warn!("{error}");
        }
        self.clear(slot).await
    }

    /// Takes everything of a slot away.
    async fn clear(&mut self, slot: Slot) -> Result<(), AttachError> {
        let Some(entry) = self.record.slots[slot as usize].clone() else { return Ok(()) };
        self.plane.set_slot(slot, &SlotEntry::default())?;
        self.plane.fence()?;
        let mut errors = Vec::new();
        for hook in self.record.hooks.iter().filter(|hook| hook.link == entry.link) {
            errors.extend(Dataplane::detach(&self.record.name, hook).err().map(AttachError::Dataplane));
        }
        errors.extend(wiring::disown(&self.host, &self.record, &entry).await);
        errors.extend(wiring::remove_slot(&self.host, &self.record, slot, &entry).await);
        remove::removal(&self.record.name, &errors)?;
        self.record.hooks.retain(|hook| hook.link != entry.link);
        self.record.slots[slot as usize] = None;
        Ok(self.record.save()?)
    }

    /// Gives a partition whose link or namespace is gone another one, in the slot that it has. Who is in the other slot
    /// is not touched, nor are its flows; those of the slot itself went with the link. As root, in the network namespace of the
    /// uplinks, inside a tokio runtime.
    ///
    /// # Errors
    /// [`AttachError`]; from the first change on the attachment is of no use then, and counts as one whose maker was
    /// killed.
    pub async fn renew(&mut self, slot: Slot, partition: &Partition) -> Result<(), AttachError> {
        // An uplink that is gone is no reason to cut what passes the others.
        let _ = build::mtu(&self.host, &self.record.uplinks).await?;
        self.record.ready = false;
        self.record.save()?;
        self.clear(slot).await?;
        preflight::check_join(&self.record, &Netns::own()?, &self.host, partition).await?;
        build::join(&mut self.record, &self.plane, &self.host, slot, partition).await?;
        build::self_test(&self.record, &self.plane)?;
        // The host's route went with the link.
        let _ = self.reassert_own().await?;
        self.record.ready = true;
        Ok(self.record.save()?)
    }

    /// [`Attachment::switch_with`] the default options.
    ///
    /// # Errors
    /// As there.
    pub async fn switch(&mut self, to: Slot) -> Result<Switched, AttachError> {
        self.switch_with(to, SwitchOptions::default()).await
    }

    /// Gives new flows to a slot; flows that exist stay where they are. The same for there and back.
    ///
    /// The order: notice on, flip (one store), fence, then what the slow paths say. A partition that takes over again
    /// gets the service address as its source before the flip: until then the notice rewrites its replies.
    ///
    /// # Errors
    /// [`AttachError::AfterSwitch`] if the switch is made but not all that belongs to it; with any other error nothing
    /// was switched.
    pub async fn switch_with(&mut self, to: Slot, options: SwitchOptions) -> Result<Switched, AttachError> {
        let switched = self.give_flows(to, options).await?;
        for member in std::iter::once(&*self).chain(&self.others) {
            member
                .answer(to)
                .await
                .map_err(|error| AttachError::AfterSwitch { causes: vec![remove::text(&error)] })?;
        }
        Ok(switched)
    }

    /// The switch, but for who answers the neighbours where each side has an uplink of its own.
    pub(super) async fn give_flows(
        &mut self,
        to: Slot,
        options: SwitchOptions,
    ) -> Result<Switched, AttachError> {
        let begun = Instant::now();
        self.prepare(to, options).await?;
        for other in &mut self.others {
            other.prepare(to, options).await?;
        }
        let word = self.plane.word();
        let ready = word.with_notice(options.notice);
        self.plane.store(word, ready)?;
        let start = Instant::now();
        self.plane.store(ready, if options.letter { ready.moved_to(to) } else { ready.taken_over_by(to) })?;
        let stored = Instant::now();
        let fence = self.plane.fence();
        let fenced = Instant::now();
        let mut errors: Vec<AttachError> = fence.err().map(AttachError::Dataplane).into_iter().collect();
        for member in std::iter::once(&*self).chain(&self.others) {
            errors.extend(member.follow(to).await);
        }
        if !errors.is_empty() {
            return Err(AttachError::AfterSwitch { causes: errors.iter().map(remove::text).collect() });
        }
        Ok(Switched {
            generation: self.plane.word().generation(),
            prepare_us: (start - begun).as_secs_f64() * 1e6,
            flip_us: (stored - start).as_secs_f64() * 1e6,
            fence_us: (fenced - stored).as_secs_f64() * 1e6,
        })
    }

    /// What belongs before the store of the word: nothing of it is seen by a client.
    async fn prepare(&mut self, to: Slot, options: SwitchOptions) -> Result<(), AttachError> {
        let (from, target) = (to.other(), self.slot(to)?.clone());
        self.report_events();
        self.all_learned(options)?;
        self.tell_of_unlearned(from);
        self.reachable(to)?;
        let leaving = self.leaving(from)?;
        self.look_at_retiring(from, leaving.as_ref(), options)?;
        if let Some(leaving) = &leaving {
            let links = [from, to].map(|slot| self.slot(slot).map(|slot| slot.inner_link.as_str()));
            let [from_link, to_link] = links;
            parity::prepare((leaving, from_link?), (&self.netns(to)?, to_link?));
        }
        let netns = self.netns(to)?;
        if self.record.own_uplinks {
            // It may have given them up when it retired, and with the last address of a link the kernel takes its routes and its
            // neighbours away, also the permanent ones.
            wiring::inside(&self.record, to, &target, &netns).await?;
        }
        wiring::prefer_source(&self.record, &target, &netns, true).await
    }

    /// What belongs after it: the slow path, and what the retiring side begins.
    async fn follow(&self, to: Slot) -> Vec<AttachError> {
        let slow_path = async { wiring::slow_path(&self.host, &self.record, self.slot(to)?).await };
        let retired = async {
            let leaving = self.leaving(to.other())?;
            self.retire(to.other(), leaving.as_ref()).await
        };
        let (slow_path, retired) = (slow_path.await, retired.await);
        slow_path.err().into_iter().chain(retired.err()).collect()
    }

    /// What has to be known of the side that retires: the ports on which it serves, and what a switch would cut.
    fn look_at_retiring(
        &mut self,
        from: Slot,
        leaving: Option<&Netns>,
        options: SwitchOptions,
    ) -> Result<(), AttachError> {
        self.record.service_ports = ServicePorts::default();
        if let Some((slot, netns)) = self.record.slots[from as usize].as_ref().zip(leaving) {
            let sockets = sockets::all(netns)?;
            limits::bound_to_device(slot, netns, (&sockets, &self.record.addresses), options)?;
            limits::tell_of_multipath(slot, netns);
            self.record.service_ports = flows::ports(&sockets, &self.record.addresses);
        }
        Ok(self.record.save()?)
    }

    /// What a partition begins from now on, it begins with its own address.
    async fn retire(&self, slot: Slot, leaving: Option<&Netns>) -> Result<(), AttachError> {
        // Without its link it begins nothing that could be heard of.
        let Some((entry, netns)) = self.record.slots[slot as usize].as_ref().zip(leaving) else {
            return Ok(());
        };
        if self.record.gone(slot).is_some() {
            return Ok(());
        }
        wiring::prefer_source(&self.record, entry, netns, false).await
    }

    /// Passes on what the programs have to say. That they cannot be heard is no reason to stop.
    pub(crate) fn report_events(&mut self) {
        if let Err(error) = self.plane.report_events() {
            tracing::debug!("{}", remove::text(&AttachError::Dataplane(error)));
        }
    }

    /// Warns of what a give-back cuts while the other side drains, if nobody has remembered it.
    fn tell_of_unlearned(&self, from: Slot) {
        let word = self.plane.word();
        if word.phase() != Phase::Draining || word.learns() || self.record.service_ports.udp.is_empty() {
            return;
        }
        if let Ok(entry) = self.slot(from) {
            tracing::warn!(
                "flows of datagrams that {} has begun since the switch are not known (switch --learn): the other side gets them",
                entry.netns
            );
        }
    }

    fn all_learned(&self, options: SwitchOptions) -> Result<(), AttachError> {
        if !self.plane.word().learns() {
            return Ok(());
        }
        let full = self.plane.count_of(Event::LearnFull)?;
        match full.saturating_sub(self.record.learn_full) {
            0 => Ok(()),
            packets if options.despite_losses => {
                tracing::warn!("flows of {packets} packets found no room to be remembered: they are cut");
                Ok(())
            }
            packets => Err(AttachError::LearnFull { packets }),
        }
    }

    /// Begins to remember the flows of the serving partition that no socket tells of. For a switch to keep them it has
    /// to be begun a whole idle time-out before; [`Attachment::switch`] ends it.
    ///
    /// # Errors
    /// [`AttachError::Dataplane`], [`AttachError::Record`].
    pub fn learn(&mut self) -> Result<(), AttachError> {
        self.note_what_is_full()?;
        let word = self.plane.word();
        Ok(self.plane.store(word, word.with_learning(true))?)
    }

    /// Notes, for all of a group, how often a flow found no room before the learning that begins.
    fn note_what_is_full(&mut self) -> Result<(), AttachError> {
        self.record.learn_full = self.plane.count_of(Event::LearnFull)?;
        self.record.save()?;
        self.others.iter_mut().try_for_each(Self::note_what_is_full)
    }

    /// Ends the switch: nobody retires any more, the notice is off, learned flows are forgotten. Of two sides that share,
    /// the one that is not active would lose its flows: to be ended by a switch first.
    ///
    /// # Errors
    /// [`AttachError::Dataplane`].
    pub fn settle(&self) -> Result<(), AttachError> {
        let word = self.plane.word();
        if word.phase() != Phase::Steady || word.notice() || word.learns() {
            self.plane.store(word, word.settled())?;
        }
        self.plane.fence()?;
        for member in std::iter::once(self).chain(&self.others) {
            member.plane.forget_learned()?;
        }
        Ok(())
    }

    /// Puts the programs of this version in the place of those that are attached, without a packet lost; whether they
    /// were others. With `force`, equal ones as well.
    ///
    /// # Errors
    /// As [`Dataplane::replace`]; [`AttachError::Netns`].
    pub fn reload(&mut self, force: bool) -> Result<bool, AttachError> {
        self.report_events();
        let (record, plane) = (&self.record, &mut self.plane);
        // A queue is there for moments, and if somebody was killed meanwhile, perhaps in parts.
        let queue = names::hold_link(&record.name);
        let hooks: Vec<_> = record.hooks.iter().filter(|hook| hook.link != queue).cloned().collect();
        build::with_all_ends(record, |all_ends| {
            let (hooks, addresses) = (hooks.as_slice(), record.addresses.as_slice());
            let ends = build::with_a_choice(record, all_ends);
            Ok(plane.replace(Replacement { hooks, addresses, ends, all_ends, force })?)
        })
    }

    /// Detaches everything, whatever of it is there.
    ///
    /// # Errors
    /// [`RecordError::Unknown`] if there is nothing of that name, [`AttachError::Removal`] with all that could not be
    /// removed; the record stays then, and detaching again goes on.
    pub async fn detach(name: &Name) -> Result<(), AttachError> {
        preflight::root()?;
        let shared = Lock::host()?;
        let _lock = Lock::of(name)?;
        let record = match Record::load(name) {
            // Without a record, what is pinned still tells what there is.
            Err(RecordError::Unknown(_)) if names::pin_dir(name).exists() => {
                remove::remains(name, &Netlink::open(&Netns::own()?)?).await?
            }
            Err(error @ RecordError::Unknown(_)) => {
                record::sweep(name);
                return Err(error.into());
            }
            other => other?,
        };
        let host = Netlink::open(&here(&record)?)?;
        remove::remove(&record, &host, &shared).await
    }
}

/// The phase of a word, for people.
pub fn phase_name(word: Word) -> &'static str {
    match word.phase() {
        Phase::Steady => "steady",
        Phase::Draining if word.is_to_the_letter() => "letter",
        Phase::Draining => "draining",
        Phase::Sharing => "sharing",
    }
}

/// The caller's namespace, if it is the one in which the attachment was made.
fn here(record: &Record) -> Result<Netns, AttachError> {
    let own = Netns::own()?;
    if identity(&own)? == record.host {
        return Ok(own);
    }
    Err(AttachError::Refused(format!(
        "{} was attached in another network namespace; run this there",
        record.name
    )))
}
