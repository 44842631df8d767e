//! The configuration: TOML in `/etc/patchswitch/patchswitch.toml` and in drop-ins beside it.
//!
//! Drop-ins (`config.d/*.toml`) are read after the main file, in the order of their names; a key that is set again
//! replaces the earlier value, services add up. A key that is unknown, or that has no effect where it stands, is an
//! error: silence would look like consent. Every error begins with `file:line:column`.
//!
//! ```toml
//! [job]
//! boot = "60s"                        # until the clone has booted
//! copy = "1h"                         # for whole copies of disks (:log, :mirror)
//! store_lasts = "10m"                 # what a clone's store takes, if it could fill up, at the pace of writers
//! extend_stores = true                # of clones that could fill up, while they are in use
//!
//! [scan]
//! command = "clamscan -ri \"$PATCHSWITCH_ROOT\""
//!
//! [[service]]
//! name = "web"
//! addresses = ["192.0.2.10", "2001:db8::10"]
//! uplinks = ["eth0"]
//! partition = "web-a"                 # the one that serves when the service is added
//! udp_idle = "10s"
//! may_lose = ["/var/log/**"]
//! strategy = "takeover"               # takeover | quiesce | device | address | letter
//!
//! [service.drain]
//! command = "nginx -s quit"
//! command_after = "10s"                # flows may end by themselves until then
//! deadline = "10m"
//! on_deadline = "keep"                # keep | abort | reset
//!
//! [[service.probe]]
//! kind = "http"                       # http | tcp | command
//! port = 80
//! path = "/"
//! ```

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::exit::ExitCode;
use crate::names::Name;

mod check;
mod datagrams;
pub mod duration;
mod load;
mod place;
mod raw;
mod strategy;
#[cfg(test)]
mod tests;
mod text;

pub(crate) use check::undeliverable;
pub use datagrams::{BadDatagrams, Datagrams, Quic};
pub use load::{DEFAULT_FILE, load};
pub use place::Place;
pub use strategy::{Exchange, Left, Quiesce, Strategy};

/// `udp_idle` of a service that does not say: what most resolvers and NATs allow a silent flow.
const DEFAULT_UDP_IDLE: Duration = Duration::from_secs(30);
/// How long new flows may wait: less than clients of TCP do, and more than a database that is well needs.
const DEFAULT_HOLD: Duration = Duration::from_secs(30);

/// The whole configuration, complete and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `[agent]`: the host.
    pub agent: Agent,
    /// `[job]`: what every job may take.
    pub job: Job,
    /// `[scan]`: what is done to a clone before anything is put into it (patent step 702).
    pub scan: Scan,
    /// `[[service]]`, in the order of the files.
    pub services: Vec<Service>,
}

/// `[agent]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// Where the store, the patch files and the disks are.
    pub state_dir: PathBuf,
    /// The OCI runtime.
    pub runtime: Runtime,
}

/// The OCI runtime that starts partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// crun, the default.
    Crun,
    /// runc.
    Runc,
}

/// `[job]`: deadlines of the phases, each counted from the phase's own beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// From the start of the clone until its init has come up.
    #[serde(with = "duration")]
    pub boot: Duration,
    /// For one patch.
    #[serde(with = "duration")]
    pub patch: Duration,
    /// For the restart after the patches (patent step 708).
    #[serde(with = "duration")]
    pub restart: Duration,
    /// For a partition to stop before its cgroup is killed.
    #[serde(with = "duration")]
    pub stop: Duration,
    /// For copies of whole disks (`:log`, `:mirror`), until they are ready for the cut.
    #[serde(with = "duration")]
    pub copy: Duration,
    /// How long the old partition is kept, stopped, after it was drained.
    #[serde(with = "duration")]
    pub keep_old: Duration,
    /// For how long a store smaller than its disk is to take what is written to the disk: so large it is made at the clone, from
    /// the pace of writers then.
    #[serde(with = "duration")]
    pub store_lasts: Duration,
    /// Whether the store of a clone that could fill up is extended while it is in use, as long as the host's file system
    /// has room. Otherwise, and where it has none, the job turns back before the store is full.
    pub extend_stores: bool,
}

/// `[scan]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scan {
    /// Whether the files of the clone are compared with the digests of its package database.
    pub packages: bool,
    /// A shell command of the administrator. `PATCHSWITCH_ROOT` is the root of the clone, mounted read-only. It ends
    /// with 0 (clean), 1 (found something) or another number (failed), as virus scanners do.
    pub command: Option<String>,
    /// For each of the two.
    #[serde(with = "duration")]
    pub limit: Duration,
    /// When something was found.
    pub on_finding: Policy,
    /// When a check could not be made.
    pub on_failure: Policy,
}

/// What a result of the scan means for the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The job ends; the default.
    FailClosed,
    /// The job says so and goes on.
    Warn,
}

/// `[[service]]`: an address that clients use, and how it is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The name.
    pub name: Name,
    /// The service addresses, at least one.
    pub addresses: Vec<IpAddr>,
    /// The network devices of the host on which clients' packets arrive, at least one.
    pub uplinks: Vec<Uplink>,
    /// The partition that serves when the service is added; afterwards the store knows who does.
    pub partition: Name,
    /// How long a UDP flow may be silent before it is forgotten; also how long flows are learned before a switch.
    #[serde(with = "duration")]
    pub udp_idle: Duration,
    /// `stateless` and `[service.quic]`: what is declared of its datagrams.
    #[serde(default)]
    pub datagrams: Datagrams,
    /// Patterns of absolute paths inside the partition: what may be lost without `--discard-writes`.
    pub may_lose: Vec<String>,
    /// What the automatic give-back does if it would lose writes.
    pub lossy_give_back: LossyGiveBack,
    /// `strategy`, `[service.quiesce]` and `[service.exchange]`: how another partition gets it.
    #[serde(default)]
    pub strategy: Strategy,
    /// `[service.gate]`: the checks before the switch.
    pub gate: Gate,
    /// `[service.observe]`: the checks after it.
    pub observe: Observe,
    /// `[service.drain]`: the end of the old partition.
    pub drain: Drain,
    /// `[[service.probe]]`, at least one: health is never assumed.
    pub probes: Vec<Probe>,
}

/// A network device of the host: 1 to 15 bytes, no slash, no white space (`dev_valid_name` of the kernel).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(into = "String")]
pub struct Uplink(String);

/// A text that is not the name of a network device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of a network device: 1 to 15 bytes, without slash, colon and white space")]
pub struct BadUplink(String);

/// What the automatic give-back does if it would lose writes of the new side (exit 25 when it does).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossyGiveBack {
    /// It does not happen; a person decides. The default.
    Refuse,
    /// It happens, and the loss is counted and reported.
    Allow,
}

/// `[gate]`: all probes must succeed several times in a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    /// How many times in a row.
    pub need: u32,
    /// From the start of one round to the start of the next.
    #[serde(with = "duration")]
    pub every: Duration,
    /// For one probe.
    #[serde(with = "duration")]
    pub timeout: Duration,
    /// For the whole gate.
    #[serde(with = "duration")]
    pub deadline: Duration,
}

/// `[observe]`: the service is watched through its own address after the switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observe {
    /// How long; 0 means not at all.
    #[serde(with = "duration")]
    pub length: Duration,
    /// From the start of one round to the start of the next.
    #[serde(with = "duration")]
    pub every: Duration,
    /// This many failures …
    pub fail: u32,
    /// … among the last so many rounds give the service back.
    pub of: u32,
}

/// `[drain]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// A shell command run inside the old partition, to make its server end gracefully, when flows are left after
    /// `command_after`. It waits until every connection has been accepted, and is not run if that never is so: a server
    /// that closes its listener resets those that wait.
    pub command: Option<String>,
    /// How long flows may take to end by themselves before the command is run. A server that ends closes connections
    /// on which it sees no request, and a request that comes at this very moment is answered by a reset (RFC 9112,
    /// section 9.5); the fewer are in use by then, the better.
    #[serde(with = "duration")]
    pub command_after: Duration,
    /// How long flows may take to end.
    #[serde(with = "duration")]
    pub deadline: Duration,
    /// What happens then.
    pub on_deadline: OnDeadline,
}

/// What happens to flows that are left at the end of the drain's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDeadline {
    /// The old partition stays until they have ended. The default.
    Keep,
    /// The service is given back.
    Abort,
    /// They are reset, counted, and the job ends with 24.
    Reset,
}

/// `[[service.probe]]`: one way to find out whether the service works. `tcp` and `http` are tried at every address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Probe {
    /// A TCP connection is accepted.
    Tcp {
        /// The port.
        port: NonZeroU16,
    },
    /// A GET is answered as expected.
    Http {
        /// The port.
        port: NonZeroU16,
        /// The path with its query, from the slash on.
        path: String,
        /// The `Host` field; the address if there is none.
        host: Option<String>,
        /// The status that counts as success.
        status: u16,
        /// What the body must have in it.
        contains: Option<String>,
    },
    /// A shell command ends with 0. It is run inside the partition that is probed: sent from the host to the service
    /// address it would be answered by whoever serves.
    Command {
        /// The command.
        command: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            agent: Agent { state_dir: PathBuf::from(crate::names::STATE_ROOT), runtime: Runtime::Crun },
            job: Job {
                boot: Duration::from_secs(60),
                patch: Duration::from_secs(900),
                restart: Duration::from_secs(60),
                stop: Duration::from_secs(30),
                copy: Duration::from_secs(3600),
                keep_old: Duration::from_secs(3600),
                store_lasts: Duration::from_secs(600),
                extend_stores: true,
            },
            scan: Scan {
                packages: true,
                command: None,
                limit: Duration::from_secs(600),
                on_finding: Policy::FailClosed,
                on_failure: Policy::FailClosed,
            },
            services: Vec::new(),
        }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            need: 3,
            every: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
            deadline: Duration::from_secs(60),
        }
    }
}

impl Default for Observe {
    fn default() -> Self {
        Self { length: Duration::from_secs(30), every: Duration::from_millis(500), fail: 2, of: 4 }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            command: None,
            command_after: Duration::from_secs(10),
            deadline: Duration::from_secs(600),
            on_deadline: OnDeadline::Keep,
        }
    }
}

impl Uplink {
    /// Checks a text and makes a device name of it.
    ///
    /// # Errors
    /// [`BadUplink`].
    pub fn new(text: &str) -> Result<Self, BadUplink> {
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        let good = (1..=15).contains(&text.len()) && text != "." && text != ".." && !text.contains(bad);
        if good { Ok(Self(text.to_owned())) } else { Err(BadUplink(text.to_owned())) }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Uplink {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text::parsed(deserializer, "the name of a network device", Self::new)
    }
}

impl From<Uplink> for String {
    fn from(uplink: Uplink) -> Self {
        uplink.0
    }
}

impl std::fmt::Display for Uplink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The text is wrong.
    #[error("{place}: {message}")]
    Text {
        /// Where.
        place: Place,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A value is wrong that no file sets: one given on the command line or by a default.
    #[error("{0}")]
    Value(String),
    /// A file could not be read.
    #[error("failed to read {path:?}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Not a file that can be trusted: its commands run with the agent's rights.
    #[error("refused {path:?}: {reason}")]
    Unsafe {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl ConfigError {
    /// Always [`ExitCode::Config`], except that a file that may not be read is a matter of permission.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                ExitCode::Permission
            }
            _ => ExitCode::Config,
        }
    }
}

/// Parses one file as if it were the whole configuration.
///
/// # Errors
/// [`ConfigError::Text`] with the place.
pub fn parse(text: &str, file_name: &str) -> Result<Config, ConfigError> {
    parse_all([(file_name, text)])
}

/// Parses several files, later ones over earlier ones: `(name, text)`.
///
/// # Errors
/// [`ConfigError::Text`] with the place.
pub fn parse_all<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Config, ConfigError> {
    let mut builder = raw::Builder::default();
    for (name, text) in files {
        builder.add(name, text)?;
    }
    builder.finish()
}

impl Service {
    /// Checks a service that was not read from a file, e.g. made from the command line.
    ///
    /// # Errors
    /// [`ConfigError::Value`] that names the key.
    pub fn check(&self) -> Result<(), ConfigError> {
        check::service(self, &|_key| None)
    }

    /// How long flows of a side may take that has been given up: as long as the drain may, but to the letter only answers under
    /// way are still worth waiting for.
    pub(crate) fn last_flows(&self) -> Duration {
        match self.strategy {
            Strategy::Letter => self.drain.deadline.min(self.udp_idle),
            _ => self.drain.deadline,
        }
    }
}
