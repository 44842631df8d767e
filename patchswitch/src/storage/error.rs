//! What can go wrong with disks.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::table::BadStatus;
use crate::host::linux::block::{BlockError, DeviceNumber};
use crate::host::linux::cutter::CutError;
use crate::host::linux::dm::DmError;
use crate::host::linux::loopdev::LoopError;
use crate::host::linux::programs::ProgramError;

/// Why a step on disks was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Device-mapper.
    #[error(transparent)]
    Dm(#[from] DmError),
    /// Loop devices.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// Block devices, busy ones among them.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The cut.
    #[error(transparent)]
    Cut(#[from] CutError),
    /// A store on a device has something in it that is no clone.
    #[error(
        "{cow} is to be a store, and there is {found} on it now; if nobody wants that, `wipefs --all {cow}`"
    )]
    CowTaken {
        /// The store.
        cow: String,
        /// What is there.
        found: String,
    },
    /// A program of the host.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file system that a suspended device does not freeze, in use, without a mount by which it could be.
    #[error(
        "{0} has a btrfs in use, which only a mount of it can freeze, and none was given; unmount it, or use clone_mounted"
    )]
    NotFrozen(String),
    /// A status line that the kernel should not write.
    #[error(transparent)]
    Status(#[from] BadStatus),
    /// A file or a device could not be read or written.
    #[error("failed to {verb} {}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A disk of a partition would be the host's own.
    #[error("{what} carries the host's root file system")]
    HostRoot {
        /// The device.
        what: String,
    },
    /// What is behind a disk is smaller than the disk.
    #[error("{what} is {short_by} bytes too small for a disk of {wanted} bytes")]
    TooSmall {
        /// The image or device.
        what: String,
        /// Size of the disk, in bytes.
        wanted: u64,
        /// What is missing, in bytes.
        short_by: u64,
    },
    /// The store of a clone could fill up.
    #[error(
        "{cow} is {short_by} bytes too small to hold every chunk of the disk and the store's own metadata ({wanted} bytes)"
    )]
    CowTooSmall {
        /// The store.
        cow: String,
        /// What it must have, in bytes.
        wanted: u64,
        /// What is missing, in bytes.
        short_by: u64,
    },
    /// The store of a clone has holes, so the host's file system could fill up under it.
    #[error("{cow} is not fully allocated: {short_by} bytes are missing (fallocate it)")]
    CowNotAllocated {
        /// The store.
        cow: String,
        /// What is missing, in bytes.
        short_by: u64,
    },
    /// The store belongs to a clone already.
    #[error("{cow} holds a clone that was neither committed nor discarded")]
    CowNotFree {
        /// The store.
        cow: String,
    },
    /// The store is empty where a clone was expected.
    #[error("{cow} holds no clone")]
    CowEmpty {
        /// The store.
        cow: String,
    },
    /// A file lies on a file system that would be frozen by the cut: a write to it would wait for itself.
    #[error("{file} lies on the file system of {device}, which is to be cloned")]
    OnItself {
        /// The image.
        file: String,
        /// The disk to be cloned.
        device: String,
    },
    /// Two disks of one job are the same.
    #[error("{0} is named twice")]
    Twice(String),
    /// No disk was named.
    #[error("no disk was named")]
    NoDisks,
    /// The device has a table that does not belong there.
    #[error("device-mapper device {name} is {found:?} where {wanted} was expected")]
    OtherTable {
        /// The device.
        name: String,
        /// What it is.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// The clone's store is lost: it was full, or could not be written. The origin is untouched.
    #[error("the clone {name} is lost ({status}); its origin is untouched")]
    CloneLost {
        /// The clone.
        name: String,
        /// What the kernel says.
        status: String,
    },
    /// The count of what was written began again, so the difference is not known.
    #[error("device {0} is not the one that was marked (a reboot?): what was written since is not known")]
    AnotherDevice(DeviceNumber),
    /// A log of writes that cannot be read.
    #[error("failed to read the log of writes {log}")]
    Log {
        /// What it is in.
        log: String,
        /// What is wrong with it.
        #[source]
        source: super::write_log::format::BadLog,
    },
    /// The log of writes has no room for more: what was written since is not known.
    #[error(
        "the log of the writes to {name} is full ({used} bytes); the disk goes on, and its copy is worth nothing"
    )]
    LogFull {
        /// The disk.
        name: String,
        /// What the log has, in bytes.
        used: u64,
    },
    /// More is written than can be replayed.
    #[error(
        "{name} is written faster ({dirty:.0} bytes a second) than its log can be replayed ({replayed:.0}); the disk goes on, \
         and its copy is worth nothing"
    )]
    DoesNotConverge {
        /// The disk.
        name: String,
        /// Bytes written a second.
        dirty: f64,
        /// Bytes replayed a second.
        replayed: f64,
    },
    /// The log does not tell which of two writes to a place was the later one, and the disk cannot be asked any more.
    #[error(
        "which of several writes to {bytes} bytes of {name} was the last at the cut is not in its log; the disk goes on, and its \
         copy is worth nothing: try again"
    )]
    OrderUnknown {
        /// The disk.
        name: String,
        /// How much of it.
        bytes: u64,
    },
    /// A device of a mirror fails.
    #[error("the mirror {name} has lost one of its devices ({status}); the disk goes on")]
    MirrorBroken {
        /// The disk.
        name: String,
        /// What the kernel says.
        status: String,
    },
    /// A mirror is to be split before both devices have the same content.
    #[error("{name} is not in sync yet, and cannot be split")]
    NotInSync {
        /// The disk.
        name: String,
    },
    /// Whoever wanted it does not any more.
    #[error("it was called off")]
    CalledOff,
    /// Something that should have come did not.
    #[error("{what} after {waited:?}")]
    NotInTime {
        /// What is wrong.
        what: &'static str,
        /// How long it was waited for.
        waited: std::time::Duration,
    },
    /// The kernel could not go on merging.
    #[error("the merge of {name} failed (the kernel log says why); do not use its origin alone")]
    MergeFailed {
        /// The clone.
        name: String,
    },
    /// The time was up before the merge was done. It goes on in the kernel.
    #[error("the merge of {name} has {sectors} sectors left; it goes on, wait for it with `resume_merge`")]
    MergeGoesOn {
        /// The clone.
        name: String,
        /// How much is left.
        sectors: u64,
    },
}

impl StorageError {
    pub(super) fn io(verb: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { verb, path, source }
    }
}

/// Everything that a teardown could not do. It has done all the rest.
#[derive(Debug, thiserror::Error)]
#[error("{}", join(.0))]
pub struct Unfinished(pub Vec<StorageError>);

impl Unfinished {
    pub(super) fn check(errors: Vec<StorageError>) -> Result<(), Self> {
        if errors.is_empty() { Ok(()) } else { Err(Self(errors)) }
    }
}

/// A step that failed, and how its undo went.
#[derive(Debug)]
pub struct Failed {
    /// Why it failed.
    pub cause: StorageError,
    /// What could not be undone; empty if everything is as it was before.
    pub undo: Vec<StorageError>,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed to clone the disks, ")?;
        match self.undo.as_slice() {
            [] => f.write_str("everything is as it was before"),
            errors => write!(f, "and could not undo all of it: {}", join(errors)),
        }
    }
}

impl std::error::Error for Failed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// Several errors in one line, each with its causes: this is where they are shown.
fn join(errors: &[StorageError]) -> String {
    let line = |error: &StorageError| {
        let mut text = error.to_string();
        let mut next = std::error::Error::source(error);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    };
    errors.iter().map(line).collect::<Vec<_>>().join("; ")
}
