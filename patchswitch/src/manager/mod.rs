//! The manager: what a command does to a partition or a service as a whole.
//!
//! A partition consists of a definition in the store, disks on device-mapper, a root mounted in the agent's own mount
//! namespace, a network namespace, and processes under an OCI runtime. Each of these has a module that knows nothing
//! of the others; here they are put together, and taken apart in the reverse order. Everything is idempotent: what is
//! so already is left alone, so the same functions serve commands, undo and recovery.
//!
//! ```text
//!  definition ─► disks ─► mounts ─► network namespace ─► processes        start
//!  processes ─► network namespace ─► mounts ─► disks                      stop
//! ```
//!
//! * `define`: partitions come into being, and go.
//! * `host`: what the host has, who has what of it, what is free.
//! * `machine`: start, stop, what is there.
//! * `moves`: disks that go from one partition to the other.
//! * `copies`: disks of which the other partition gets whole copies.
//! * `lease`: a standby is lent to a service, and given back or kept.
//! * `service`: a service address gets its partition and its data path.
//! * `stores`: stores that could fill up, when nobody watches them.
//! * `recover`: `up` and `down`: after a kill or a boot things are put right from the store and the phase word.

mod copies;
mod define;
mod error;
mod host;
mod layout;
mod lease;
mod machine;
mod moves;
mod recover;
mod service;
mod stores;

use std::path::{Path, PathBuf};

pub use define::{Definition, Origin, Source};
pub use error::ManagerError;
pub use host::{Amounts, Device, HostTable, Share};
pub use layout::Layout;
pub use machine::{Machine, MachineDisk, Running};
pub(crate) use moves::Moved;
pub use recover::Recovered;
pub(crate) use service::{attachable, is_down, slot_of};

use crate::config::{self, Config};
use crate::host::linux::dm::Dm;
use crate::host::linux::mountns::MountNamespace;
use crate::host::linux::programs::Program;
use crate::host::linux::runtime::Runtime;
use crate::names::{Name, RUN_ROOT};
use crate::store::{self, Store};

/// Everything that commands on partitions and services need, open.
#[derive(Debug)]
pub struct Manager {
    /// The configuration.
    pub config: Config,
    /// The store.
    pub store: Store,
    state: PathBuf,
    runtime: Runtime,
    /// Services whose addresses were announced once, and are to be once more.
    announced: Vec<Name>,
}

impl Manager {
    /// Reads the configuration and opens the store. Root only.
    ///
    /// # Errors
    /// [`ManagerError::Config`] or [`ManagerError::Store`].
    pub fn open(config_file: &Path) -> Result<Self, ManagerError> {
        let config = config::load(config_file)?;
        let state = store::state_dir(&config.agent.state_dir);
        let program = match config.agent.runtime {
            config::Runtime::Crun => Program::Crun,
            config::Runtime::Runc => Program::Runc,
        };
        let runtime = Runtime::new(program, &Path::new(RUN_ROOT).join("oci"));
        Ok(Self { store: Store::open(&state)?, config, state, runtime, announced: Vec::new() })
    }

    /// The directory of the store, of disks, patches and reports.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The OCI runtime.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Device-mapper. Opened when it is needed: the data path alone works without it.
    pub(crate) fn dm() -> Result<Dm, ManagerError> {
        Ok(Dm::open()?)
    }

    /// The mount namespace in which roots are mounted and the runtime is started.
    pub(crate) fn mounts() -> Result<MountNamespace, ManagerError> {
        Ok(MountNamespace::open(&Self::mount_namespace())?)
    }

    /// Where that namespace is pinned.
    fn mount_namespace() -> PathBuf {
        Path::new(RUN_ROOT).join("mnt")
    }

    /// Where a partition's root is mounted, in that namespace.
    pub(crate) fn root(partition: &Name) -> PathBuf {
        Path::new(RUN_ROOT).join("roots").join(partition.as_str())
    }

    /// One partition.
    ///
    /// # Errors
    /// [`ManagerError::Unknown`].
    pub fn machine(&self, name: &Name) -> Result<Machine, ManagerError> {
        let row = self.store.partition(name)?;
        let row = row.ok_or_else(|| ManagerError::Unknown { kind: "partition", name: name.clone() })?;
        Machine::new(row, self.store.disks(name)?)
    }

    /// One service.
    ///
    /// # Errors
    /// [`ManagerError::Unknown`].
    pub fn service(&self, name: &Name) -> Result<config::Service, ManagerError> {
        let found = self.store.service(name)?;
        found.ok_or_else(|| ManagerError::Unknown { kind: "service", name: name.clone() })
    }
}

/// Collects errors of a teardown, which goes on after each.
#[derive(Debug, Default)]
pub(crate) struct Teardown(Vec<String>);

impl Teardown {
    pub(crate) fn note<T, E: std::error::Error>(&mut self, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.0.push(chain(&error));
                None
            }
        }
    }

    pub(crate) fn finish(self) -> Result<(), ManagerError> {
        if self.0.is_empty() { Ok(()) } else { Err(ManagerError::Cleanup(self.0)) }
    }
}

/// An error with all its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
