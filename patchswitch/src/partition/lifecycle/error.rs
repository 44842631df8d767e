//! Why a partition does not live as it should.

use std::io;
use std::path::{Path, PathBuf};

use super::*;
use crate::host::linux::programs::ProgramError;

/// Why a partition could not be started, stopped or asked.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// Its definition.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The agent's mount namespace.
    #[error(transparent)]
    Mount(#[from] MountNsError),
    /// The OCI runtime.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// Its control channel.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Its console log.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A path in its root.
    #[error(transparent)]
    Root(#[from] RootError),
    /// Its results.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Its bundle could not be written.
    #[error("failed to write the bundle")]
    Bundle(#[from] oci_spec::OciSpecError),
    /// Its root has no program that could be PID 1.
    #[error("the root has no {file} that could be its init: {reason}")]
    NoInit {
        /// The program, as the partition has it.
        file: &'static str,
        /// What is there instead.
        reason: String,
    },
    /// Its init was gone before it was started.
    #[error(
        "the init of {name} ended before it was started; `patchswitch partition logs {name}` may say why"
    )]
    EndedEarly {
        /// The partition.
        name: Name,
    },
    /// It does not run.
    #[error("partition {name} does not run")]
    NotRunning {
        /// The partition.
        name: Name,
    },
    /// Its singletons could not be started.
    #[error("failed to start the singletons of {name} (status {code}): {text}")]
    Unmask {
        /// The partition.
        name: Name,
        /// The exit status of the command.
        code: i32,
        /// What it said.
        text: String,
    },
    /// A file could not be read or written.
    #[error("failed to {action} {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not everything of it could be cleared away.
    #[error("something of partition {name} is left: {}", list(.failed))]
    Remains {
        /// The partition.
        name: Name,
        /// What failed, in order.
        failed: Vec<LifecycleError>,
    },
    /// It did not start, and what had been made could not all be undone.
    #[error("{}; and {}", chain(.cause), chain(.undo))]
    NotUndone {
        /// Why it did not start.
        cause: Box<LifecycleError>,
        /// Why something is left.
        undo: Box<LifecycleError>,
    },
}

impl LifecycleError {
    /// The code for this end of a command.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Spec(error) => error.exit_code(),
            Self::Cgroup(CgroupError::NotVersion2(_))
            | Self::Runtime(RuntimeError::Program(ProgramError::Missing { .. }))
            | Self::Console(ConsoleError::Keeper(_)) => ExitCode::Unavailable,
            Self::Io { source, .. } => ExitCode::of_io(source),
            Self::Wire(_) => ExitCode::BadData,
            Self::NotUndone { cause, .. } => cause.exit_code(),
            _ => ExitCode::Failed,
        }
    }

    pub(super) fn io(action: &'static str, path: impl AsRef<Path>) -> impl Fn(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path: path.clone(), source }
    }
}

fn list(errors: &[LifecycleError]) -> String {
    errors.iter().map(|error| chain(error)).collect::<Vec<_>>().join("; ")
}

/// An error with its causes: in a list they have no other place.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
