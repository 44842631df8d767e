//! Why something could not be done to a partition or a service as a whole.

use std::io;
use std::path::PathBuf;

use crate::attachment::{AttachError, RecordError};
use crate::config::ConfigError;
use crate::exit::ExitCode;
use crate::host::linux::cgroup::CgroupError;
use crate::host::linux::dm::DmError;
use crate::host::linux::mountns::MountNsError;
use crate::host::linux::netns::NetnsError;
use crate::host::linux::programs::ProgramError;
use crate::host::linux::root::RootError;
use crate::host::linux::runtime::RuntimeError;
use crate::names::Name;
use crate::partition::define::DefineError;
use crate::partition::lifecycle::LifecycleError;
use crate::partition::resources::NoStandby;
use crate::partition::spec::SpecError;
use crate::patch::inject::InjectError;
use crate::patch::table::TableError;
use crate::storage::{Failed, StorageError, Unfinished};
use crate::store::{LockError, StoreError};

/// Why something could not be done; the cause keeps its own text and exit code.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another job has the service.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The definition of a partition.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// No standby covers the active partition (patent step 701).
    #[error(transparent)]
    NoStandby(#[from] NoStandby),
    /// Disks.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A clone that was undone.
    #[error(transparent)]
    Clone(#[from] Failed),
    /// Disks that could not all be freed.
    #[error(transparent)]
    Unfinished(#[from] Unfinished),
    /// Device-mapper itself.
    #[error(transparent)]
    Dm(#[from] DmError),
    /// Mounts.
    #[error(transparent)]
    Mount(#[from] MountNsError),
    /// The life of a partition.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    /// The content of a partition's disks.
    #[error(transparent)]
    Define(#[from] DefineError),
    /// The runtime.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// Control groups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Network namespaces.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The data path of a service.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The patch table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// What is put into a clone.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// The root of a clone.
    #[error(transparent)]
    Root(#[from] RootError),
    /// A program of the host.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file operation.
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
    /// There is no such thing; says what there is instead.
    #[error("there is no {kind} {name}; `patchswitch {kind} list` lists those there are")]
    Unknown {
        /// `partition` or `service`.
        kind: &'static str,
        /// Its name.
        name: Name,
    },
    /// What was asked makes no sense now; nothing was changed.
    #[error("{message}")]
    Refused {
        /// Why, and what to do instead.
        message: String,
        /// The code for this end of a command.
        code: ExitCode,
    },
    /// Several things failed while cleaning up.
    #[error("failed to clean up: {}", .0.join("; "))]
    Cleanup(Vec<String>),
}

impl ManagerError {
    /// A refusal that has no code of its own.
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::Refused { message: message.into(), code: ExitCode::Failed }
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// The code for this end of a command.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Store(error) => error.exit_code(),
            Self::Lock(error) => error.exit_code(),
            Self::Config(error) => error.exit_code(),
            Self::Spec(error) => error.exit_code(),
            Self::NoStandby(error) => error.exit_code(),
            Self::Table(error) => error.exit_code(),
            Self::Inject(error) => error.exit_code(),
            Self::Root(error) => error.exit_code(),
            Self::Define(error) => error.exit_code(),
            Self::Attach(AttachError::Record(RecordError::Busy(_))) => ExitCode::Busy,
            Self::Io { source, .. } => ExitCode::of_io(source),
            Self::Refused { code, .. } => *code,
            Self::Dm(_) | Self::Program(ProgramError::Missing { .. }) => ExitCode::Unavailable,
            _ => ExitCode::Failed,
        }
    }
}
