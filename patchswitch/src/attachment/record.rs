//! What an attachment consists of, written down before it is made.
//!
//! An attachment lives no longer than the kernel's own objects, so its record is in `/run` and goes with them at a
//! boot. Whoever changes it holds its [`Lock`](super::Lock).

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use patchswitch_common::Slot;
use serde::{Deserialize, Serialize};

use super::{AttachError, Spec};
use crate::config::Datagrams;
use crate::dataplane::{Hook, HookKind};
use crate::host::linux::netns::{Netns, NetnsError, NetnsRef};
use crate::names::{Name, RUN_ROOT};

/// Why a record could not be read, written or locked.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No such attachment.
    #[error("nothing is attached as {0}; `patchswitch status` lists what is")]
    Unknown(Name),
    /// There is one already.
    #[error("{0} is attached already; `patchswitch detach {0}` removes it")]
    Exists(Name),
    /// Another process is changing it.
    #[error("{0} is being changed by another process; try again when it is done")]
    Busy(String),
    /// A file operation failed.
    #[error("failed to {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is not a record.
    #[error("failed to read the record {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// How a partition's inner end of the veth pair is set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Inside {
    /// Somebody else's namespace: a link of our own beside theirs, and a routing table for what the service sends.
    Guest {
        /// The routing table, looked up for packets from the service addresses.
        table: u32,
    },
    /// A partition of ours: the only link, the default route.
    Owned {
        /// Addresses that belong to this partition alone, at most one per family.
        own: Vec<IpAddr>,
    },
}

/// A partition in one of the two slots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRecord {
    /// Its namespace as the user named it.
    pub netns: NetnsRef,
    /// The bind mount that holds the namespace.
    pub held: PathBuf,
    /// The host-side link.
    pub link: String,
    /// The link inside.
    pub inner_link: String,
    /// How the inside is set up.
    pub inside: Inside,
}

/// One attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: Name,
    /// Device and inode of the host's network namespace.
    pub host: (u64, u64),
    /// The service addresses.
    pub addresses: Vec<IpAddr>,
    /// Links on which the clients are.
    pub uplinks: Vec<String>,
    /// The partitions.
    pub slots: [Option<SlotRecord>; 2],
    /// How programs are attached on this kernel.
    pub hook_kind: HookKind,
    /// Whether the uplinks have XDP in addition.
    #[serde(default)]
    pub xdp: bool,
    /// Why it is done so, for people.
    #[serde(default)]
    pub hook_reason: String,
    /// Programs on links, in the order in which they were attached.
    pub hooks: Vec<Hook>,
    /// Ports on which the retiring partition served when the switch was made: flows to them are accepted ones.
    pub service_ports: ServicePorts,
    /// How many packets had not been learned for want of room when the learning began.
    pub learn_full: u64,
    /// After this time without an answer a flow without a socket of its own is forgotten.
    pub udp_idle: Duration,
    /// What is declared of its datagrams.
    #[serde(default)]
    pub datagrams: Datagrams,
    /// Whether a service of that name has it: what is done to it by hand would be unknown to the service's record.
    pub of_service: bool,
    /// [`Spec::own_uplinks`].
    #[serde(default)]
    pub own_uplinks: bool,
    /// The group that it has joined: the name of the first of it.
    #[serde(default)]
    pub group: Option<Name>,
    /// Whether it was made to its end. If not, its maker was killed, and the next one removes what is there first.
    pub ready: bool,
}

/// Ports of a service, by protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePorts {
    /// With a listener.
    pub tcp: Vec<u16>,
    /// With an unconnected socket.
    pub udp: Vec<u16>,
}

fn directory() -> PathBuf {
    Path::new(RUN_ROOT).join("attachments")
}

fn file(name: &Name) -> PathBuf {
    directory().join(format!("{name}.json"))
}

pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    move |source| RecordError::Io { action, path: path.to_owned(), source }
}

impl Record {
    /// The record of something that is not made yet.
    pub(super) fn new(spec: &Spec, host: (u64, u64)) -> Self {
        Self {
            name: spec.name.clone(),
            host,
            addresses: spec.addresses.clone(),
            uplinks: uplinks(spec),
            slots: [None, None],
            hook_kind: match spec.hook {
                None | Some(HookKind::Xdp) => HookKind::of_this_kernel(),
                Some(kind) => kind,
            },
            xdp: spec.hook == Some(HookKind::Xdp),
            hook_reason: String::new(),
            hooks: Vec::new(),
            service_ports: ServicePorts::default(),
            learn_full: 0,
            udp_idle: spec.udp_idle,
            datagrams: spec.datagrams.clone(),
            of_service: spec.of_service,
            own_uplinks: spec.own_uplinks,
            group: None,
            ready: false,
        }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`RecordError::Unknown`] if there is none.
    pub fn load(name: &Name) -> Result<Self, RecordError> {
        let path = file(name);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RecordError::Unknown(name.clone()));
            }
            other => other.map_err(io("read", &path))?,
        };
        serde_json::from_str(&text).map_err(|source| RecordError::Parse { path, source })
    }

    /// All records, by name.
    ///
    /// # Errors
    /// [`RecordError`] of the first that cannot be read.
    pub fn all() -> Result<Vec<Self>, RecordError> {
        let entries = match fs::read_dir(directory()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(io("read", &directory()))?,
        };
        let names = entries
            .flatten()
            .filter_map(|entry| Name::new(entry.file_name().to_str()?.strip_suffix(".json")?).ok());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names.iter().map(Self::load).collect()
    }

    /// Refuses to be changed by hand where a service has it: the service's record would not follow. `verbs` do what is
    /// wanted instead.
    ///
    /// # Errors
    /// [`AttachError::OfService`].
    pub fn by_hand(&self, verbs: &[&str]) -> Result<(), AttachError> {
        if !self.of_service {
            return Ok(());
        }
        let name = self.name.clone();
        let verbs: Vec<_> = verbs.iter().map(|verb| instead(verb, &name)).collect();
        Err(AttachError::OfService { instead: verbs.join(" or "), name })
    }

    /// Whether this is what a service asks for, but for what is declared of its datagrams, which can be changed at any time.
    pub fn is_of(&self, spec: &Spec) -> bool {
        self.addresses == spec.addresses
            && self.uplinks == uplinks(spec)
            && self.own_uplinks == spec.own_uplinks
    }

    /// The uplinks on which the host answers for what the partition in a slot has.
    pub fn uplinks_of(&self, slot: Slot) -> &[String] {
        match (self.own_uplinks, self.uplinks.as_slice()) {
            (true, [first, second]) => std::slice::from_ref(if slot == Slot::A { first } else { second }),
            (_, all) => all,
        }
    }

    /// Writes the record, all or nothing.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn save(&self) -> Result<(), RecordError> {
        let path = file(&self.name);
        fs::create_dir_all(directory()).map_err(io("make", &directory()))?;
        write_json(&path, self)
    }

    /// Removes the record: the attachment is gone.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn delete(&self) -> Result<(), RecordError> {
        remove_json(&file(&self.name))?;
        sweep(&self.name);
        Ok(())
    }
}

/// Removes what is left of an attachment that has no record: what was being written when somebody was killed, and the
/// directories of records if they are empty.
pub(super) fn sweep(name: &Name) {
    // Not there, or not empty: nothing to do.
    let _ = fs::remove_file(unfinished(&file(name)));
    let _ = fs::remove_dir(directory());
    let _ = fs::remove_dir(RUN_ROOT);
}

/// A command that the user can type; `down` is for all services.
fn instead(verb: &str, name: &Name) -> String {
    if verb == "down" { "`patchswitch down`".to_owned() } else { format!("`patchswitch {verb} {name}`") }
}

fn uplinks(spec: &Spec) -> Vec<String> {
    let mut uplinks = spec.uplinks.clone();
    if spec.own_uplinks {
        // Which is whose is told by their order.
        return uplinks;
    }
    uplinks.sort();
    uplinks.dedup();
    uplinks
}

/// Device and inode of a network namespace.
pub(super) fn identity(netns: &Netns) -> Result<(u64, u64), NetnsError> {
    use std::os::fd::AsFd;
    let stat = rustix::fs::fstat(netns.as_fd());
    let stat = stat.map_err(|e| NetnsError::Open { reference: netns.to_string(), source: e.into() })?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Where a file is written before it gets its name.
fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Removes a file of [`write_json`], also one that was not written to its end. Not there: nothing to do.
pub(super) fn remove_json(path: &Path) -> Result<(), RecordError> {
    for path in [unfinished(path), path.to_owned()] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io("remove", &path)(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Writes a file as a whole or not at all.
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), RecordError> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|source| RecordError::Parse { path: path.to_owned(), source })?;
    let new = unfinished(path);
    fs::write(&new, text).map_err(io("write", &new))?;
    fs::rename(&new, path).map_err(io("write", path))
}
