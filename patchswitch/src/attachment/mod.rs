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

mod drain;
mod record;
mod wiring;

pub use drain::{DrainOptions, DrainReport, Flows, OnDeadline};
pub use record::{Inside, Lock, Record, RecordError, SlotRecord};

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::maps::{Settings, SlotEntry};
use patchswitch_common::word::{Phase, Word};

use crate::dataplane::{self, Dataplane, DataplaneError, End, Hook, HookKind, Point};
use crate::host::linux::netlink::{Link, Netlink, NetlinkError};
use crate::host::linux::netns::{Netns, NetnsError, NetnsRef};
use crate::host::linux::sockets::SocketsError;
use crate::host::linux::sysctl::{self, SysctlError};
use crate::names::{self, Name};

/// Ids of namespaces begin here: the kernel's own choice is the lowest free number, so a high base keeps clear of it.
const NSID_BASE: u32 = 0x5053_0000;
/// Default of [`Spec::udp_idle`].
pub const UDP_IDLE: Duration = Duration::from_secs(125);

/// Why something could not be attached, switched or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The data path.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// A namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The network.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A kernel setting.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The list of sockets.
    #[error(transparent)]
    Sockets(#[from] SocketsError),
    /// The request makes no sense on this host; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// Building failed and was undone, or the undoing failed as well.
    #[error("failed to attach {name}; {undone}")]
    Undone {
        /// The attachment.
        name: Name,
        /// What became of what was built until then.
        undone: String,
        /// Why.
        #[source]
        cause: Box<AttachError>,
    },
    /// Not everything could be removed.
    #[error("failed to remove all of {name}: {}", causes.join("; "))]
    Removal {
        /// The attachment.
        name: Name,
        /// Everything that failed.
        causes: Vec<String>,
    },
}

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
        Self { netns, inner_link, inside: Inside::Guest { table: guest_table(name) } }
    }
}

/// A routing table of its own for each attachment, well away from those that people number by hand.
fn guest_table(name: &Name) -> u32 {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(name.as_str().as_bytes());
    0x7073_0000 | u32::from(u16::from_be_bytes([digest[0], digest[1]]))
}

/// What a switch did.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Switched {
    /// The generation of the word from then on.
    pub generation: u32,
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
        let shared = Lock::host()?;
        let lock = Lock::of(&spec.name)?;
        let own = Netns::own()?;
        let host = Netlink::open(&own)?;
        let links = preflight(spec, &own, &host, first, second).await?;
        let mut record = Record {
            name: spec.name.clone(),
            host: identity(&own)?,
            addresses: spec.addresses.clone(),
            uplinks: spec.uplinks.clone(),
            slots: [None, None],
            hook_kind: HookKind::of_this_kernel(),
            hooks: Vec::new(),
            sysctls: Vec::new(),
            service_ports: Vec::new(),
        };
        record.save()?;
        match build(&mut record, spec, &host, &links, first, second).await {
            Ok(plane) => Ok(Self { record, plane, host, _lock: lock }),
            Err(cause) => {
                let undone = match remove(&record, &host, &shared).await {
                    Ok(()) => "everything was undone".to_owned(),
                    Err(error) => error.to_string(),
                };
                Err(AttachError::Undone { name: spec.name.clone(), undone, cause: Box::new(cause) })
            }
        }
    }

    /// Opens an attachment for changes.
    ///
    /// # Errors
    /// [`RecordError::Unknown`], [`RecordError::Busy`], or [`AttachError::Refused`] from another network namespace.
    pub fn open(name: &Name) -> Result<Self, AttachError> {
        let lock = Lock::of(name)?;
        let record = Record::load(name)?;
        let own = here(&record)?;
        let host = Netlink::open(&own)?;
        Ok(Self { plane: Dataplane::open(name)?, record, host, _lock: lock })
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
        let entry = self.slot(slot)?;
        Ok(Netns::open(&NetnsRef::Path(entry.held.clone()))?)
    }

    fn slot(&self, slot: Slot) -> Result<&SlotRecord, AttachError> {
        let found = self.record.slots[slot as usize].as_ref();
        found.ok_or_else(|| AttachError::Refused(format!("{} has no second partition", self.record.name)))
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
        let mtu = mtu(&self.host, &self.record.uplinks).await?;
        let joined = join(&mut self.record, &self.plane, &self.host, slot, partition, mtu).await;
        if let Err(cause) = joined {
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
        let Some(entry) = self.record.slots[slot as usize].clone() else { return Ok(()) };
        self.plane.set_slot(slot, &SlotEntry::default())?;
        self.plane.fence()?;
        let mut errors = Vec::new();
        for hook in self.record.hooks.iter().filter(|hook| hook.link == entry.link) {
            errors.extend(Dataplane::detach(&self.record.name, hook).err().map(AttachError::Dataplane));
        }
        errors.extend(wiring::remove_slot(&self.host, &self.record, &entry).await);
        removal(&self.record.name, &errors)?;
        self.record.hooks.retain(|hook| hook.link != entry.link);
        self.record.slots[slot as usize] = None;
        Ok(self.record.save()?)
    }

    /// Gives new flows to a slot; flows that exist stay where they are. The same for there and back.
    ///
    /// The order: notice on, flip (one store), fence, then what the slow paths say.
    ///
    /// # Errors
    /// [`AttachError`]; before the store nothing has changed, after it the switch is done whatever else fails.
    pub async fn switch(&mut self, to: Slot) -> Result<Switched, AttachError> {
        let (from, target) = (to.other(), self.slot(to)?.clone());
        self.record.service_ports = self.listening_ports(from)?;
        self.record.save()?;
        let ready = self.plane.word().with_notice(true);
        self.plane.store(self.plane.word(), ready)?;
        let start = Instant::now();
        self.plane.store(ready, ready.taken_over_by(to))?;
        let stored = Instant::now();
        self.plane.fence()?;
        let fenced = Instant::now();
        wiring::slow_path(&self.host, &self.record, &target).await?;
        wiring::prefer_source(&self.record, &target, &self.netns(to)?, true).await?;
        if let Ok(retiring) = self.slot(from) {
            wiring::prefer_source(&self.record, retiring, &self.netns(from)?, false).await?;
        }
        Ok(Switched {
            generation: self.plane.word().generation(),
            flip_us: (stored - start).as_secs_f64() * 1e6,
            fence_us: (fenced - stored).as_secs_f64() * 1e6,
        })
    }

    /// Begins to remember the flows of the serving partition that no socket tells of.
    ///
    /// # Errors
    /// [`AttachError::Dataplane`].
    pub fn learn(&self) -> Result<(), AttachError> {
        let word = self.plane.word();
        Ok(self.plane.store(word, word.with_learning(true))?)
    }

    /// Ends the switch: nobody retires any more, the notice is off, learned flows are forgotten.
    ///
    /// # Errors
    /// [`AttachError::Dataplane`].
    pub fn settle(&self) -> Result<(), AttachError> {
        let word = self.plane.word();
        if word != word.settled() && word.phase() != Phase::Steady || word.notice() || word.learns() {
            self.plane.store(word, word.settled())?;
        }
        self.plane.fence()?;
        Ok(self.plane.forget_learned()?)
    }

    /// Detaches everything, whatever of it is there.
    ///
    /// # Errors
    /// [`AttachError::Removal`] with all that could not be removed; the record stays, and detaching again goes on.
    pub async fn detach(name: &Name) -> Result<(), AttachError> {
        let shared = Lock::host()?;
        let _lock = Lock::of(name)?;
        let record = Record::load(name)?;
        let host = Netlink::open(&here(&record)?)?;
        remove(&record, &host, &shared).await
    }
}

/// The phase of a word, for people.
pub fn phase_name(word: Word) -> &'static str {
    match word.phase() {
        Phase::Steady => "steady",
        Phase::Draining => "draining",
    }
}

fn identity(netns: &Netns) -> Result<(u64, u64), AttachError> {
    use std::os::fd::AsFd;
    let stat = rustix::fs::fstat(netns.as_fd());
    let stat = stat.map_err(|e| NetnsError::Open { reference: netns.to_string(), source: e.into() })?;
    Ok((stat.st_dev, stat.st_ino))
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

/// Everything that can be known beforehand. Returns the host's links.
async fn preflight(
    spec: &Spec,
    own: &Netns,
    host: &Netlink,
    first: &Partition,
    second: Option<&Partition>,
) -> Result<Vec<Link>, AttachError> {
    let refuse = |text: String| Err(AttachError::Refused(text));
    if names::pin_dir(&spec.name).exists() || Record::load(&spec.name).is_ok() {
        return Err(RecordError::Exists(spec.name.clone()).into());
    }
    if spec.addresses.is_empty() || spec.uplinks.is_empty() {
        return refuse("a service needs at least one address and one uplink".to_owned());
    }
    let held = host.addresses().await?;
    for address in &spec.addresses {
        if address.is_loopback() || address.is_multicast() || address.is_unspecified() {
            return refuse(format!("{address} cannot be a service address"));
        }
        if held.contains(address) {
            return refuse(format!(
                "service address {address} belongs to this host itself; take it off its link first"
            ));
        }
        for other in Record::all()?.iter().filter(|record| record.addresses.contains(address)) {
            return refuse(format!("service address {address} is attached already, as {}", other.name));
        }
    }
    let links = host.links().await?;
    for uplink in &spec.uplinks {
        if !links.iter().any(|link| &link.name == uplink) {
            return Err(NetlinkError::NoLink(uplink.clone()).into());
        }
    }
    let mut seen: Vec<Netns> = Vec::new();
    for partition in std::iter::once(first).chain(second) {
        let netns = Netns::open(&partition.netns)?;
        let same = |other: &Netns| netns.is_same(other).unwrap_or(false);
        if same(own) {
            return refuse(format!("{} is the host's own network namespace", partition.netns));
        }
        if seen.iter().any(same) {
            return refuse("both partitions are the same network namespace".to_owned());
        }
        seen.push(netns);
    }
    Ok(links)
}

async fn mtu(host: &Netlink, uplinks: &[String]) -> Result<u32, AttachError> {
    let mut smallest = u32::from(u16::MAX);
    for uplink in uplinks {
        smallest = smallest.min(host.link(uplink).await?.mtu);
    }
    Ok(smallest)
}

/// The order of things: replies before clients, so that no connection ever has one direction on each path.
async fn build(
    record: &mut Record,
    spec: &Spec,
    host: &Netlink,
    links: &[Link],
    first: &Partition,
    second: Option<&Partition>,
) -> Result<Dataplane, AttachError> {
    let settings = Settings {
        learned_idle_ns: u64::try_from(spec.udp_idle.as_nanos()).unwrap_or(u64::MAX),
        probe_mark: dataplane::PROBE_MARK,
        pad: 0,
    };
    dataplane::ensure_bpffs()?;
    let plane = Dataplane::create(&spec.name, &spec.addresses, &settings)?;
    let mtu = mtu(host, &spec.uplinks).await?;
    for uplink in &spec.uplinks {
        plane.add_uplink(host.link(uplink).await?.index)?;
    }
    change_settings(record, &wiring::settings(record, links))?;
    join(record, &plane, host, Slot::A, first, mtu).await?;
    if let Some(second) = second {
        join(record, &plane, host, Slot::B, second, mtu).await?;
    }
    self_test(record, &plane)?;
    let serving = record.slots[0].clone();
    if let Some(slot) = &serving {
        wiring::slow_path(host, record, slot).await?;
    }
    for uplink in spec.uplinks.clone() {
        attach(record, &plane, Point::Uplink, uplink)?;
    }
    wiring::answer(host, record).await?;
    Ok(plane)
}

/// Writes settings, each recorded with its old value before it is changed.
fn change_settings(record: &mut Record, wanted: &[(String, &str)]) -> Result<(), AttachError> {
    for (key, value) in wanted {
        let old = sysctl::read(key)?;
        if old != *value {
            record.sysctls.push((key.clone(), old));
            record.save()?;
            sysctl::write(key, value)?;
        }
    }
    Ok(())
}

async fn join(
    record: &mut Record,
    plane: &Dataplane,
    host: &Netlink,
    slot: Slot,
    partition: &Partition,
    mtu: u32,
) -> Result<(), AttachError> {
    let netns = Netns::open(&partition.netns)?;
    let entry = SlotRecord {
        netns: partition.netns.clone(),
        held: names::held_netns(&record.name, slot as u8),
        link: names::host_link(&record.name, slot as u8),
        inner_link: partition.inner_link.clone(),
        inside: partition.inside.clone(),
    };
    record.slots[slot as usize] = Some(entry.clone());
    record.save()?;
    netns.hold(&entry.held)?;
    // Before the veth: making one would give the namespace an id of the kernel's choice.
    let nsid = host.nsid(&netns, wanted_nsid(&record.name, slot)).await?;
    let link = wiring::make_slot(host, record, &entry, &netns, mtu).await?;
    let own = |v4: bool| match &entry.inside {
        Inside::Owned { own } => own.iter().copied().find(|a| a.is_ipv4() == v4).map(dataplane::to_wire),
        Inside::Guest { .. } => None,
    };
    let value = SlotEntry {
        ifindex: link.index,
        nsid,
        own4: own(true).unwrap_or_default(),
        own6: own(false).unwrap_or_default(),
    };
    plane.set_slot(slot, &value)?;
    attach(record, plane, Point::FromPartition, entry.link.clone())?;
    attach(record, plane, Point::ToPartition, entry.link.clone())?;
    wiring::host_side(host, record, &entry).await?;
    wiring::own_addresses(host, record, &entry).await
}

fn wanted_nsid(name: &Name, slot: Slot) -> i32 {
    let id = NSID_BASE | (guest_table(name) & 0x7fff) << 1 | slot.index();
    i32::try_from(id & 0x7fff_ffff).unwrap_or(i32::MAX)
}

fn attach(record: &mut Record, plane: &Dataplane, point: Point, link: String) -> Result<(), AttachError> {
    let hook = Hook { point, link, kind: record.hook_kind };
    record.hooks.push(hook.clone());
    record.save()?;
    Ok(plane.attach(&hook)?)
}

fn self_test(record: &Record, plane: &Dataplane) -> Result<(), AttachError> {
    let mut namespaces = Vec::new();
    for (index, slot) in record.slots.iter().enumerate() {
        if let Some(slot) = slot {
            let netns = Netns::open(&NetnsRef::Path(slot.held.clone()))?;
            namespaces.push((Slot::from_bit(u8::from(index == 1)), netns));
        }
    }
    // With one partition there is nobody to confuse it with.
    if namespaces.len() < 2 {
        return Ok(());
    }
    let ends: Vec<End<'_>> = namespaces
        .iter()
        .flat_map(|(slot, netns)| {
            record.addresses.iter().map(|address| End { slot: *slot, netns, address: *address })
        })
        .collect();
    Ok(plane.self_test(&ends)?)
}

/// Takes everything of a record away, clients first. Goes on after errors and reports them all.
async fn remove(record: &Record, host: &Netlink, _shared: &Lock) -> Result<(), AttachError> {
    let mut errors: Vec<AttachError> = Vec::new();
    for hook in record.hooks.iter().rev() {
        errors.extend(Dataplane::detach(&record.name, hook).err().map(AttachError::Dataplane));
    }
    errors.extend(wiring::remove_host_side(host, record).await);
    for slot in record.slots.iter().flatten() {
        errors.extend(wiring::remove_slot(host, record, slot).await);
    }
    errors.extend(restore_settings(record));
    errors.extend(Dataplane::remove(&record.name).err().map(AttachError::Dataplane));
    removal(&record.name, &errors)?;
    record.delete()?;
    // Empty directories go with the last attachment.
    for directory in ["netns", ""] {
        let _ = std::fs::remove_dir(Path::new(names::RUN_ROOT).join(directory));
    }
    Ok(())
}

/// Puts settings back, the last one first. One that another attachment needs as well is handed over to it.
fn restore_settings(record: &Record) -> Vec<AttachError> {
    let mut errors = Vec::new();
    let others = Record::all().unwrap_or_default();
    for (key, old) in record.sysctls.iter().rev() {
        let heir = others
            .iter()
            .find(|other| other.name != record.name && other.host == record.host && needs(other, key));
        let done = match heir {
            Some(heir) => hand_over(heir, key, old),
            // The link of the setting is gone: nothing to put back.
            None if sysctl::read(key).is_err() => Ok(()),
            None => sysctl::write(key, old).map_err(AttachError::Sysctl),
        };
        errors.extend(done.err());
    }
    errors
}

fn needs(record: &Record, key: &str) -> bool {
    let of_an_uplink = record.uplinks.iter().any(|uplink| key.contains(&format!("/{uplink}/")));
    let of_ipv6 = key.starts_with("ipv6/") && record.addresses.iter().any(IpAddr::is_ipv6);
    let shared = key.contains("/all/") || key.ends_with("/accept_ra");
    (of_an_uplink && (key.starts_with("ipv4/") || of_ipv6)) || (shared && of_ipv6)
}

fn hand_over(heir: &Record, key: &str, old: &str) -> Result<(), AttachError> {
    let mut heir = Record::load(&heir.name)?;
    heir.sysctls.push((key.to_owned(), old.to_owned()));
    Ok(heir.save()?)
}

fn removal(name: &Name, errors: &[AttachError]) -> Result<(), AttachError> {
    if errors.is_empty() {
        return Ok(());
    }
    let text = |error: &AttachError| match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    };
    Err(AttachError::Removal { name: name.clone(), causes: errors.iter().map(text).collect() })
}
pub fn probe_socket(link: &str, address: std::net::SocketAddr) -> std::io::Result<std::os::fd::OwnedFd> {
    let fd = crate::verify::plain_socket(address)?;

    let _ = link;
    Ok(fd)
}
