//! Network namespaces: how a user names one, how code runs inside, how one is held.
//!
//! `setns` moves the calling *thread*. Whatever has to run inside a namespace runs on a thread made for it, which
//! ends afterwards: no async task can be moved onto it, and no failure can leave a thread of ours in the wrong place.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

/// Where `ip netns` keeps its names.
const NAMED: &str = "/run/netns";

/// How a user names a network namespace: by name (`ip netns`), by path, or by a process that is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NetnsRef {
    /// The caller's own.
    Own,
    /// A name below `/run/netns`.
    Named(String),
    /// An absolute path to a namespace file.
    Path(PathBuf),
    /// A process id.
    Pid(u32),
}

/// A text that names no namespace.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} names no network namespace: give a name of `ip netns`, an absolute path, or pid:NUMBER")]
pub struct BadNetnsRef(String);

impl FromStr for NetnsRef {
    type Err = BadNetnsRef;

    fn from_str(text: &str) -> Result<Self, BadNetnsRef> {
        let bad = || BadNetnsRef(text.to_owned());
        if let Some(pid) = text.strip_prefix("pid:") {
            return pid.parse().map(Self::Pid).map_err(|_not_a_number| bad());
        }
        if text.starts_with('/') {
            return Ok(Self::Path(text.into()));
        }
        if text == "self" {
            return Ok(Self::Own);
        }
        let plain = !text.is_empty() && text != "." && text != ".." && !text.contains(['/', '\0', ':']);
        if plain { Ok(Self::Named(text.to_owned())) } else { Err(bad()) }
    }
}

impl NetnsRef {
    /// Whether two references are of one file: a name is short for its path below `/run/netns`, or `/var/run/netns`, as it
    /// is also called.
    pub fn is_as(&self, other: &Self) -> bool {
        self == other || self.file().is_some_and(|file| Some(file) == other.file())
    }

    fn file(&self) -> Option<PathBuf> {
        match self {
            Self::Named(name) => Some(Path::new(NAMED).join(name)),
            Self::Path(path) => Some(match path.strip_prefix("/var/run") {
                Ok(rest) => Path::new("/run").join(rest),
                Err(_) => path.clone(),
            }),
            Self::Own | Self::Pid(_) => None,
        }
    }
}

impl TryFrom<String> for NetnsRef {
    type Error = BadNetnsRef;

    fn try_from(text: String) -> Result<Self, BadNetnsRef> {
        text.parse()
    }
}

impl From<NetnsRef> for String {
    fn from(reference: NetnsRef) -> Self {
        reference.to_string()
    }
}

impl fmt::Display for NetnsRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("self"),
            Self::Named(name) => f.write_str(name),
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Pid(pid) => write!(f, "pid:{pid}"),
        }
    }
}

/// Why a namespace could not be used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// There is no such file.
    #[error("failed to open network namespace {reference}")]
    Open {
        /// As the user named it.
        reference: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is something else.
    #[error("{0} is not a network namespace")]
    NotANamespace(String),
    /// A thread could not enter it.
    #[error("failed to enter network namespace {reference}")]
    Enter {
        /// As the user named it.
        reference: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused to hold or to release it.
    #[error("failed to {action} network namespace at {}", path.display())]
    Hold {
        /// `hold` or `release`.
        action: &'static str,
        /// The bind mount.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// An open network namespace: as long as this lives, so does the namespace.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    reference: String,
}

impl Netns {
    /// Opens the namespace that a user named.
    ///
    /// # Errors
    /// [`NetnsError::Open`] or [`NetnsError::NotANamespace`].
    pub fn open(reference: &NetnsRef) -> Result<Self, NetnsError> {
        let path = match reference {
            NetnsRef::Own => PathBuf::from("/proc/thread-self/ns/net"),
            NetnsRef::Named(name) => Path::new(NAMED).join(name),
            NetnsRef::Path(path) => path.clone(),
            NetnsRef::Pid(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
        };
        let reference = reference.to_string();
        let file =
            File::open(&path).map_err(|source| NetnsError::Open { reference: reference.clone(), source })?;
        let netns = Self { file: Arc::new(file), reference };
        // The file system of namespaces is not enough: there are other kinds. Only an attempt to enter tells.
        netns.run(|| ()).map_err(|error| match error {
            NetnsError::Enter { reference, source } if source.raw_os_error() == Some(libc::EINVAL) => {
                NetnsError::NotANamespace(reference)
            }
            other => other,
        })?;
        Ok(netns)
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetnsError::Open`] without `/proc`.
    pub fn own() -> Result<Self, NetnsError> {
        Self::open(&NetnsRef::Own)
    }

    /// Makes a namespace with a name that `ip netns` knows, or opens the one that has it.
    ///
    /// # Errors
    /// [`NetnsError::Hold`].
    pub fn make(name: &str) -> Result<Self, NetnsError> {
        let path = Path::new(NAMED).join(name);
        if let Ok(netns) = Self::open(&NetnsRef::Named(name.to_owned())) {
            return Ok(netns);
        }
        let new = || -> io::Result<File> {
            new_network_namespace()?;
            File::open("/proc/thread-self/ns/net")
        };
        let made = std::thread::scope(|scope| scope.spawn(new).join());
        let file = made
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .map_err(|source| NetnsError::Hold { action: "make", path: path.clone(), source })?;
        let netns = Self { file: Arc::new(file), reference: name.to_owned() };
        netns.hold(&path)?;
        Ok(netns)
    }

    /// Takes the name away again; the namespace goes with its last process. Not there: nothing to do.
    ///
    /// # Errors
    /// [`NetnsError::Hold`].
    pub fn unmake(name: &str) -> Result<(), NetnsError> {
        Self::release(&Path::new(NAMED).join(name))
    }

    /// Whether two descriptors are of one namespace.
    ///
    /// # Errors
    /// An error of `fstat`.
    pub fn is_same(&self, other: &Self) -> io::Result<bool> {
        let (a, b) = (self.file.metadata()?, other.file.metadata()?);
        Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
    }

    /// Runs a function inside the namespace, on a thread of its own, and waits for it.
    ///
    /// Sockets opened in it stay in the namespace wherever they are used afterwards.
    ///
    /// # Errors
    /// [`NetnsError::Enter`]; a panic of the function goes on in the caller.
    pub fn run<T: Send>(&self, function: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let inside = || -> io::Result<T> {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(function())
        };
        let result = std::thread::scope(|scope| scope.spawn(inside).join());
        match result {
            Ok(value) => {
                value.map_err(|source| NetnsError::Enter { reference: self.reference.clone(), source })
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Keeps the namespace alive beyond this process by a bind mount at `path`. Already held: nothing to do.
    ///
    /// # Errors
    /// [`NetnsError::Hold`].
    pub fn hold(&self, path: &Path) -> Result<(), NetnsError> {
        let hold = || -> io::Result<()> {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            if File::open(path).is_ok_and(|file| self.is_file(&file)) {
                return Ok(());
            }
            File::options().create(true).truncate(false).write(true).open(path)?;
            let from = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            rustix::mount::mount_bind(from.as_str(), path)?;
            Ok(())
        };
        hold().map_err(|source| NetnsError::Hold { action: "hold", path: path.to_owned(), source })
    }

    fn is_file(&self, file: &File) -> bool {
        match (self.file.metadata(), file.metadata()) {
            (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
            _ => false,
        }
    }

    /// Ends what [`Netns::hold`] began. Not held: nothing to do.
    ///
    /// # Errors
    /// [`NetnsError::Hold`].
    pub fn release(path: &Path) -> Result<(), NetnsError> {
        use rustix::mount::{UnmountFlags, unmount};
        let release = || -> io::Result<()> {
            match unmount(path, UnmountFlags::DETACH) {
                // Not a mount point, or nothing there.
                Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        };
        release().map_err(|source| NetnsError::Hold { action: "release", path: path.to_owned(), source })
    }

    /// The descriptor's number, for netlink messages that carry it.
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reference)
    }
}

/// Gives the calling thread, which must be one made for this, a network namespace of its own.
#[expect(unsafe_code, reason = "the safe function is deprecated in favour of this one")]
fn new_network_namespace() -> io::Result<()> {
    // SAFETY: only the network namespace is unshared; the danger is in unsharing the table of descriptors.
    Ok(unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?)
}

/// The index of a link of the calling thread's namespace, if there is one of that name.
pub fn link_index(name: &str) -> Option<u32> {
    use rustix::net::{AddressFamily, SocketType, netdevice, socket};
    // Any socket will do: it stands for its namespace.
    let any = socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    netdevice::name_to_index(&any, name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_told_apart_and_kept() {
        for text in ["web", "/proc/1/ns/net", "pid:12", "self"] {
            assert_eq!(text.parse::<NetnsRef>().unwrap().to_string(), text);
        }
        for bad in ["", "..", "a/b", "pid:", "pid:x", "a:b"] {
            assert!(bad.parse::<NetnsRef>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_name_is_short_for_its_path() {
        let is_as = |a: &str, b: &str| a.parse::<NetnsRef>().unwrap().is_as(&b.parse().unwrap());
        assert!(
            is_as("web", "/run/netns/web") && is_as("/var/run/netns/web", "web") && is_as("self", "self")
        );
        for (one, other) in [("web", "/run/netns/web-b"), ("self", "pid:1"), ("web", "/web"), ("/a", "/b")] {
            assert!(!is_as(one, other), "{one} {other}");
        }
    }
}
