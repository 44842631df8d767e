//! The data path: the only code that names aya.
//!
//! ```text
//!  load ─► pin maps and programs ─► attach (replies first, clients last) ─► Dataplane
//!                                                                            │ word: one 8-byte store, then the fence
//!  /sys/fs/bpf/patchswitch/v1/NAME/{maps,programs,links,twin}  ◄── open ─────┘ counters, learned flows
//! ```
//!
//! Everything is pinned, so the path of a packet does not depend on any process: a [`Dataplane`] is a view on the
//! pins, made anew by each command. Killing the agent at any moment changes no packet's fate.

mod attach;
mod beside;
mod counters;
mod fence;
mod load;
mod log;
mod maps;
mod replace;
mod self_test;
mod word;
mod xdp;

pub use attach::{Hook, HookKind, Point};
pub use beside::{OnLink, Placed, Program};
pub use counters::Counters;
pub use load::{ensure_bpffs, object};
pub use log::Line;
pub use self_test::SelfTestError;

use std::collections::HashSet;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use patchswitch_common::Slot;
use patchswitch_common::maps::{Address, Settings, SlotEntry, UplinkEntry, mapped};
use patchswitch_common::verdict::Event;
use patchswitch_common::word::Word;

use crate::host::linux::clock::boot_ns;
use crate::host::linux::netlink::{Netlink, NetlinkError};
use crate::names::{self, Name};

/// The mark of the agent's own probes of slot A (`SO_MARK`); an even number.
pub const PROBE_MARK: u32 = 0x7073_7072;

/// The mark of the agent's own probes of a slot.
pub const fn probe_mark(slot: Slot) -> u32 {
    PROBE_MARK | slot.index()
}

/// Why the data path could not be built, changed or read.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The object could not be read into the kernel.
    #[error("failed to load the BPF object")]
    Load(#[source] Box<aya::EbpfError>),
    /// The kernel refused a program.
    #[error("failed to {action} BPF program {program}: {reason}")]
    Program {
        /// `load`, `pin`, `attach`, `detach` or `open`.
        action: &'static str,
        /// Its name.
        program: String,
        /// What the kernel said; of the verifier, the end of its log, where the reason is.
        reason: String,
    },
    /// The kernel refused a map.
    #[error("failed to {action} BPF map {map}")]
    Map {
        /// `pin`, `open`, `read` or `write`.
        action: &'static str,
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<aya::maps::MapError>,
    },
    /// A file system operation on the pins or on the object failed.
    #[error("failed to {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// There is no BPF file system, and one mounted here would vanish with the process.
    #[error(
        "no BPF file system is mounted at /sys/fs/bpf in this private mount namespace; to run in a network namespace \
         use `nsenter --net=/run/netns/NAME patchswitch …` instead of `ip netns exec`"
    )]
    PrivateMounts,
    /// The object is not the one this version was built for.
    #[error("the BPF object has no {0}")]
    Missing(String),
    /// The programs that are attached belong to a version whose maps have another form.
    #[error(
        "this version's map {0} has another form than the one in use, so its programs cannot take the place of those \
         that are attached; nothing was changed; detach and attach again when the service may pause"
    )]
    OtherMaps(&'static str),
    /// Nothing is pinned under that name.
    #[error("the programs of {0} are gone; `patchswitch detach {0}` removes what else there is")]
    NotAttached(Name),
    /// XDP cannot be used on a device.
    #[error("XDP cannot be used on {link}: {reason}; --hook tc does the same there")]
    Xdp {
        /// The device.
        link: String,
        /// Why, and what to do about it.
        reason: String,
    },
    /// A system call of the fence failed.
    #[error("failed to wait for the packets under way")]
    Fence(#[source] std::io::Error),
    /// Somebody else changed the word meanwhile.
    #[error("the phase word was changed by another process")]
    Changed,
    /// The network could not be asked.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The programs do not do what they should.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
}

/// The pinned data path of one attachment.
#[derive(Debug)]
pub struct Dataplane {
    directory: PathBuf,
    word: word::MappedWord,
    log: Option<log::EventLog>,
}

impl Dataplane {
    /// Loads the object, pins everything below `/sys/fs/bpf/patchswitch/v1/NAME` and fills the maps that do not change.
    ///
    /// Nothing is attached yet. The word is steady on slot A, or that of `with`: both read one from then on.
    /// The program for XDP is loaded only if it is wanted.
    ///
    /// # Errors
    /// [`DataplaneError`]; what was pinned until then stays and is removed by [`Dataplane::remove`].
    pub fn create(
        name: &Name,
        addresses: &[IpAddr],
        settings: &Settings,
        (with, xdp): (Option<&Name>, bool),
    ) -> Result<Self, DataplaneError> {
        let directory = names::pin_dir(name);
        load::load_and_pin(&directory, with.map(names::pin_dir).as_deref(), xdp)?;
        let plane = Self::of(directory)?;
        maps::write_settings(&plane.directory, settings)?;
        maps::write_addresses(&plane.directory, &on_wire(addresses))?;
        self_test::prepare(&twin_dir(&plane.directory), addresses, xdp)?;
        Ok(plane)
    }

    /// Opens what is pinned.
    ///
    /// # Errors
    /// [`DataplaneError::NotAttached`] if nothing is.
    pub fn open(name: &Name) -> Result<Self, DataplaneError> {
        let directory = names::pin_dir(name);
        let path = maps::path(&directory, maps::WORD);
        // Who may not look does not know.
        match path.try_exists() {
            Ok(true) => Self::of(directory),
            Ok(false) => Err(DataplaneError::NotAttached(name.clone())),
            Err(source) => Err(DataplaneError::File { action: "look for", path, source }),
        }
    }

    fn of(directory: PathBuf) -> Result<Self, DataplaneError> {
        let word = word::MappedWord::open(&maps::path(&directory, maps::WORD))?;
        Ok(Self { directory, word, log: None })
    }

    /// What the programs had to say since the last time; nothing if another process reads it now.
    ///
    /// # Errors
    /// [`DataplaneError::Program`] if the programs' ring cannot be opened.
    pub fn events(&mut self) -> Result<Option<Vec<Line>>, DataplaneError> {
        // The programs of another version have a ring of their own.
        self.log = self.log.take().filter(|log| log.is_current(&self.directory));
        if self.log.is_none() {
            self.log = log::EventLog::open(&self.directory)?;
        }
        Ok(self.log.as_mut().map(log::EventLog::take))
    }

    /// Writes what the programs had to say since the last time into this process's log (`tracing`), unless another
    /// process reads it.
    ///
    /// # Errors
    /// As [`Dataplane::events`].
    pub fn report_events(&mut self) -> Result<(), DataplaneError> {
        self.events()?.into_iter().flatten().for_each(|line| line.log());
        Ok(())
    }

    /// Removes every pin of a name. Nothing there: nothing to do.
    ///
    /// # Errors
    /// [`DataplaneError::File`] of the first pin that stays; the others are removed all the same.
    pub fn remove(name: &Name) -> Result<(), DataplaneError> {
        load::remove_pins(&names::pin_dir(name))
    }

    /// The phase word as the programs read it now.
    pub fn word(&self) -> Word {
        self.word.load()
    }

    /// Stores the next phase word, if nobody changed it since `old` was read. This one store is the switch.
    ///
    /// # Errors
    /// [`DataplaneError::Changed`].
    pub fn store(&self, old: Word, new: Word) -> Result<(), DataplaneError> {
        if self.word.exchange(old, new) { Ok(()) } else { Err(DataplaneError::Changed) }
    }

    /// Returns when no packet is under way that saw an older word.
    ///
    /// # Errors
    /// [`DataplaneError::Fence`].
    pub fn fence(&self) -> Result<(), DataplaneError> {
        fence::wait().map_err(DataplaneError::Fence)
    }

    /// Says where a partition is. Never to be called for a slot that the word points at.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn set_slot(&self, slot: Slot, entry: &SlotEntry) -> Result<(), DataplaneError> {
        maps::write_slot(&self.directory, slot, entry)
    }

    /// Has packets for a slot wait in the queue of a link until a moment of the boot clock, in nanoseconds. May be called
    /// while the word points at the slot.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn hold(&self, slot: Slot, ifindex: u32, until_ns: u64) -> Result<(), DataplaneError> {
        let entry = maps::read_slot(&self.directory, slot)?;
        // The end first: no program may see the queue with an older one.
        maps::write_slot(&self.directory, slot, &SlotEntry { hold: 0, hold_until_ns: until_ns, ..entry })?;
        maps::write_slot(
            &self.directory,
            slot,
            &SlotEntry { hold: ifindex, hold_until_ns: until_ns, ..entry },
        )
    }

    /// Has packets that wait for a slot wait until another moment of the boot clock, in nanoseconds.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn hold_until(&self, slot: Slot, until_ns: u64) -> Result<(), DataplaneError> {
        let entry = maps::read_slot(&self.directory, slot)?;
        maps::write_slot(&self.directory, slot, &SlotEntry { hold_until_ns: until_ns, ..entry })
    }

    /// For how much longer packets for a slot wait; nothing if they do not.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn held(&self, slot: Slot) -> Result<Option<Duration>, DataplaneError> {
        let entry = maps::read_slot(&self.directory, slot)?;
        let left = entry.hold_until_ns.checked_sub(boot_ns()).filter(|_| entry.hold != 0);
        Ok(left.map(Duration::from_nanos))
    }

    /// Has packets for a slot wait no longer. Those that wait stay where they are.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn release(&self, slot: Slot) -> Result<(), DataplaneError> {
        let entry = maps::read_slot(&self.directory, slot)?;
        maps::write_slot(&self.directory, slot, &SlotEntry { hold: 0, ..entry })
    }

    /// Where a partition is.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn slot(&self, slot: Slot) -> Result<SlotEntry, DataplaneError> {
        maps::read_slot(&self.directory, slot)
    }

    /// Lets replies go straight to a link's next hops, and tells XDP under which link address it takes frames.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn add_uplink(&self, ifindex: u32, mac: [u8; 6]) -> Result<(), DataplaneError> {
        maps::add_uplink(&self.directory, ifindex, mac)
    }

    /// The indices of the links that [`Dataplane::add_uplink`] was told.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn uplinks(&self) -> Result<Vec<u32>, DataplaneError> {
        Ok(indices(&maps::uplinks(&self.directory)?))
    }

    /// Writes the settings anew; packets under way may still see the old ones.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn set_settings(&self, settings: &Settings) -> Result<(), DataplaneError> {
        maps::write_settings(&self.directory, settings)
    }

    /// Attaches the program of a point to a link of this namespace.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn attach(&self, hook: &Hook) -> Result<(), DataplaneError> {
        attach::attach(&self.directory, hook)
    }

    /// Detaches what [`Dataplane::attach`] attached, by name alone. Not attached: nothing to do.
    ///
    /// # Errors
    /// [`DataplaneError::Program`] or [`DataplaneError::File`].
    pub fn detach(name: &Name, hook: &Hook) -> Result<(), DataplaneError> {
        attach::detach(&names::pin_dir(name), hook)
    }

    /// Puts the programs of this version in the place of those that are attached, without a packet lost; whether they
    /// were others. The maps stay, and with them the word, the counters and the learned flows.
    ///
    /// # Errors
    /// [`DataplaneError::OtherMaps`] and [`DataplaneError::SelfTest`] before anything is changed. With any other error
    /// some hooks may have the new program already, which works; to be repeated.
    pub fn replace(&mut self, what: Replacement<'_>) -> Result<bool, DataplaneError> {
        // The programs write their log into a ring of their own.
        self.log = None;
        replace::replace(&self.directory, what)
    }

    /// Whether a [`Dataplane::replace`] was killed while it exchanged programs: some hooks may have another version than
    /// the others. That works, and the next one goes on.
    pub fn is_half_replaced(&self) -> bool {
        replace::is_unfinished(&self.directory)
    }

    /// What the programs counted since they were loaded.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn counters(&self) -> Result<Counters, DataplaneError> {
        counters::read(&self.directory)
    }

    /// How often one thing happened since the programs were loaded.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn count_of(&self, event: Event) -> Result<u64, DataplaneError> {
        counters::event(&self.directory, event)
    }

    /// How many flows without a socket of their own are remembered of a slot, those that are idle for too long left
    /// out and removed.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn learned(&self, slot: Slot) -> Result<usize, DataplaneError> {
        self.learned_but(slot, &HashSet::new())
    }

    /// As [`Dataplane::learned`], and these flows of UDP are not counted.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn learned_but(&self, slot: Slot, those: &HashSet<UdpEnds>) -> Result<usize, DataplaneError> {
        maps::count_learned(&self.directory, slot, those)
    }

    /// Forgets all learned flows.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn forget_learned(&self) -> Result<(), DataplaneError> {
        maps::clear_learned(&self.directory)
    }

    /// Every program on some links, those of others included, in the order in which packets meet them. Links that are
    /// gone are left out.
    ///
    /// # Errors
    /// [`DataplaneError::Netlink`], [`DataplaneError::Program`], [`DataplaneError::File`].
    pub async fn beside(host: &Netlink, links: &[&str]) -> Result<Vec<OnLink>, DataplaneError> {
        beside::list(host, links).await
    }

    /// The service addresses and the indices of the uplinks, as far as they can be read of what is pinned.
    pub fn remains(name: &Name) -> (Vec<IpAddr>, Vec<u32>) {
        let directory = names::pin_dir(name);
        let addresses = maps::addresses(&directory).unwrap_or_default().iter().map(from_wire).collect();
        (addresses, indices(&maps::uplinks(&directory).unwrap_or_default()))
    }

    /// Sends packets through a twin of the programs that knows the same partitions, in the kernel but not on any wire,
    /// and checks who would get them. What serves is not touched.
    ///
    /// # Errors
    /// [`DataplaneError::SelfTest`] if a packet would go to the wrong partition.
    pub fn self_test(&self, ends: &[self_test::End<'_>]) -> Result<(), DataplaneError> {
        let slots = [self.slot(Slot::A)?, self.slot(Slot::B)?];
        self_test::run(&twin_dir(&self.directory), &slots, ends)
    }

    /// Sends frames through the twin of the program for XDP, which redirects them: each has to arrive at a socket of the
    /// partition that owns it.
    ///
    /// # Errors
    /// [`DataplaneError::SelfTest`] if one does not.
    pub fn self_test_xdp(&self, ends: &[self_test::End<'_>]) -> Result<(), DataplaneError> {
        xdp::run(&self.directory, &twin_dir(&self.directory), ends)
    }
}

pub use replace::Replacement;
pub use self_test::End;

/// Where the self-test's twin of what is pinned in a directory is pinned.
fn twin_dir(directory: &Path) -> PathBuf {
    directory.join("twin")
}

fn indices(uplinks: &[(u32, UplinkEntry)]) -> Vec<u32> {
    uplinks.iter().map(|(index, _)| *index).collect()
}

/// A flow of UDP: address and port of the other end, and the port of the service; ports in the processor's byte order.
pub type Datagrams = (Address, u16, u16);

/// The ends of a flow of UDP: address and port of the other one, and the port of the partition's; ports in the processor's byte
/// order.
pub type UdpEnds = (Address, u16, u16);

/// An address as the maps have it.
pub fn to_wire(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn on_wire(addresses: &[IpAddr]) -> Vec<Address> {
    addresses.iter().copied().map(to_wire).collect()
}

fn from_wire(address: &Address) -> IpAddr {
    Ipv6Addr::from(*address).to_canonical()
}
