//! Why access to a file of a clone did not happen.

use std::io;

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::exit::ExitCode;

/// Why access to a file of a clone did not happen. Paths are relative to the clone's root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The clone has something there that the host does not touch.
    #[error("refused {path:?} in the clone: {reason}")]
    Refused {
        /// The path up to and including the component that was refused.
        path: String,
        /// What is wrong with it.
        reason: Refusal,
    },
    /// It is not there.
    #[error("{path:?} is not in the clone")]
    Missing {
        /// The path up to and including the component that is missing.
        path: String,
    },
    /// The kernel failed.
    #[error("failed to {action} {path:?} in the clone")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What it was done to.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What is wrong with an entry of a clone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A symbolic link where a directory or a file is expected.
    Symlink,
    /// Not a directory.
    NotADirectory,
    /// A directory where a file is expected.
    IsADirectory,
    /// A mount point: another file system begins here.
    OtherFileSystem,
    /// Not a regular file.
    NotAFile(FileType),
    /// Larger than the given number of bytes.
    TooLarge {
        /// The most that is read.
        limit: u64,
    },
    /// Empty, too long, `.`, `..`, or with a slash or a control character.
    BadName,
    /// A directory that another user may write to.
    Writable {
        /// The owner's user id.
        owner: u32,
        /// The permission bits.
        mode: u32,
    },
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Symlink => f.write_str("it is a symbolic link"),
            Self::NotADirectory => f.write_str("it is not a directory"),
            Self::IsADirectory => f.write_str("it is a directory"),
            Self::OtherFileSystem => f.write_str("another file system is mounted there"),
            Self::NotAFile(kind) => write!(f, "it is not a regular file but {}", describe(*kind)),
            Self::TooLarge { limit } => write!(f, "it is larger than {limit} bytes"),
            Self::BadName => f.write_str("it is not the name of a single file"),
            Self::Writable { owner, mode } => {
                write!(f, "others may write to it (owner {owner}, mode {mode:04o})")
            }
        }
    }
}

impl RootError {
    pub(super) fn refused(path: &str, reason: Refusal) -> Self {
        Self::Refused { path: path.to_owned(), reason }
    }

    pub(super) fn io(action: &'static str, path: &str, errno: Errno) -> Self {
        Self::from_io(action, path, errno.into())
    }

    pub(super) fn from_io(action: &'static str, path: &str, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    /// What `openat2(2)` says about a component.
    pub(super) fn of_lookup(action: &'static str, path: &str, errno: Errno) -> Self {
        match errno {
            Errno::LOOP => Self::refused(path, Refusal::Symlink),
            Errno::NOTDIR => Self::refused(path, Refusal::NotADirectory),
            Errno::XDEV => Self::refused(path, Refusal::OtherFileSystem),
            // What an open of a device on a `nodev` mount, a socket or a FIFO without a reader gives.
            Errno::NXIO => Self::refused(path, Refusal::NotAFile(FileType::Unknown)),
            Errno::NOENT => Self::Missing { path: path.to_owned() },
            _ => Self::io(action, path, errno),
        }
    }

    /// What `unlinkat(2)` and `renameat(2)` say about an entry.
    pub(super) fn of_entry(action: &'static str, path: &str, errno: Errno) -> Self {
        match errno {
            Errno::ISDIR | Errno::NOTEMPTY => Self::refused(path, Refusal::IsADirectory),
            Errno::XDEV | Errno::BUSY => Self::refused(path, Refusal::OtherFileSystem),
            _ => Self::io(action, path, errno),
        }
    }

    /// A clone that puts traps is bad data; everything else is the host's trouble.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Refused { .. } | Self::Missing { .. } => ExitCode::BadData,
            Self::Io { source, .. } => ExitCode::of_io(source),
        }
    }
}

fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "something else",
    }
}
