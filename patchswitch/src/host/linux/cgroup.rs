//! The cgroup (version 2) of a partition. Its limits are set by the OCI runtime; here it is watched, emptied and
//! removed.
//!
//! Kernel: `Documentation/admin-guide/cgroup-v2.rst`; `cgroup.kill` needs Linux 5.14.

use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::pidfd::gone;
use super::poll;

/// Where cgroup v2 is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";

/// The file that says whether a cgroup gets only the processor time that nobody else wants; since Linux 5.15.
pub const CPU_IDLE: &str = "cpu.idle";

/// Why a cgroup could not be watched, emptied or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has cgroup v1, a mixture of both, or none.
    #[error(
        "cgroup version 2 is not mounted at {0}; boot with systemd.unified_cgroup_hierarchy=1 or mount it there"
    )]
    NotVersion2(PathBuf),
    /// Processes were still in it at the end of the time.
    #[error("cgroup {path} still has processes {limit:?} after they were killed")]
    StillPopulated {
        /// The cgroup.
        path: PathBuf,
        /// The time they had.
        limit: Duration,
    },
    /// The kernel refused.
    #[error("failed to {action} cgroup {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The cgroup.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What the processes of a cgroup use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time, in microseconds, since the cgroup was made.
    pub cpu_us: u64,
    /// How long they were held back by their processor limit, in microseconds.
    pub throttled_us: u64,
    /// Memory, in bytes.
    pub memory: u64,
    /// Processes and threads.
    pub pids: u64,
    /// How many processes the kernel killed because the memory limit was reached.
    pub oom_kills: u64,
}

/// A cgroup, whether it exists or not.
#[derive(Clone, Debug)]
pub struct Cgroup {
    root: PathBuf,
    /// As the kernel prints it in `/proc/PID/cgroup`: begins with a slash.
    relative: String,
}

impl Cgroup {
    /// The cgroup of this path below [`MOUNT`], e.g. `/patchswitch/web`.
    ///
    /// # Errors
    /// [`CgroupError::NotVersion2`].
    pub fn new(relative: &str) -> Result<Self, CgroupError> {
        Self::below(Path::new(MOUNT), relative)
    }

    fn below(root: &Path, relative: &str) -> Result<Self, CgroupError> {
        if !root.join("cgroup.controllers").is_file() {
            return Err(CgroupError::NotVersion2(root.to_owned()));
        }
        let relative = format!("/{}", relative.trim_matches('/'));
        Ok(Self { root: root.to_owned(), relative })
    }

    /// A cgroup directly below it.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self { root: self.root.clone(), relative: format!("{}/{name}", self.relative) }
    }

    /// The cgroups directly below it; none if it does not exist.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn children(&self) -> Result<Vec<Self>, CgroupError> {
        let entries = match fs::read_dir(self.path()) {
            Ok(entries) => entries,
            Err(error) if gone(&error) => return Ok(Vec::new()),
            Err(source) => return Err(self.error("list what is below")(source)),
        };
        let mut children = Vec::new();
        for entry in entries {
            let entry = entry.map_err(self.error("list what is below"))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                children.push(self.child(&entry.file_name().to_string_lossy()));
            }
        }
        Ok(children)
    }

    /// Makes it, without limits of its own.
    ///
    /// # Errors
    /// [`CgroupError::Io`], also if its parent does not exist.
    pub fn make(&self) -> Result<(), CgroupError> {
        match fs::create_dir(self.path()) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(self.error("make")(source)),
            _ => Ok(()),
        }
    }

    /// Its own name, without its parents'.
    pub fn name(&self) -> &str {
        self.relative.rsplit('/').next().unwrap_or_default()
    }

    /// Where it is, or would be.
    pub fn path(&self) -> PathBuf {
        self.root.join(self.relative.trim_start_matches('/'))
    }

    /// Whether there is one.
    pub fn exists(&self) -> bool {
        self.path().is_dir()
    }

    /// Sets whether its processes get only the processor time that nobody else wants, or their full share again.
    ///
    /// # Errors
    /// [`CgroupError::Io`], also if it does not exist.
    pub fn set_idle(&self, idle: bool) -> Result<(), CgroupError> {
        let value = if idle { "1" } else { "0" };
        fs::write(self.path().join(CPU_IDLE), value).map_err(self.error("set the share of"))
    }

    /// Whether no process is in it or below it. One that does not exist is empty.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn is_empty(&self) -> Result<bool, CgroupError> {
        Ok(self.read("cgroup.events")?.is_none_or(|events| parse_field(&events, "populated") == Some(0)))
    }

    /// Whether the process with this number, in the agent's process namespace, is in it or below it.
    ///
    /// # Errors
    /// [`CgroupError::Io`] if the kernel does not say. A process that has ended is in no cgroup.
    pub fn contains(&self, pid: u32) -> Result<bool, CgroupError> {
        match fs::read_to_string(format!("/proc/{pid}/cgroup")) {
            Ok(text) => Ok(parse_membership(&text).is_some_and(|path| is_below(path, &self.relative))),
            Err(error) if gone(&error) => Ok(false),
            Err(source) => Err(self.error("ask for members of")(source)),
        }
    }

    /// Kills every process in it and below it, children that ignore signals or left their session included, and
    /// waits until they are gone. One that does not exist is fine.
    ///
    /// # Errors
    /// [`CgroupError::StillPopulated`] (a process in uninterruptible sleep) or [`CgroupError::Io`].
    pub fn kill_all(&self, limit: Duration) -> Result<(), CgroupError> {
        match fs::write(self.path().join("cgroup.kill"), "1") {
            Ok(()) => {}
            Err(error) if gone(&error) => return Ok(()),
            Err(source) => return Err(self.error("kill all processes of")(source)),
        }
        if self.wait_empty(Instant::now() + limit)? {
            return Ok(());
        }
        Err(CgroupError::StillPopulated { path: self.path(), limit })
    }

    /// Waits until no process is left; `false` if some are at the deadline.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn wait_empty(&self, deadline: Instant) -> Result<bool, CgroupError> {
        let path = self.path().join("cgroup.events");
        let mut file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if gone(&error) => return Ok(true),
            Err(source) => return Err(self.error("watch")(source)),
        };
        loop {
            let mut events = String::new();
            match file.rewind().and_then(|()| file.read_to_string(&mut events)) {
                Ok(_) if parse_field(&events, "populated") == Some(0) => return Ok(true),
                Ok(_) => {}
                // Removed while we watched.
                Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => return Ok(true),
                Err(source) => return Err(self.error("watch")(source)),
            }
            // The kernel announces a change of the file as a priority event.
            let mut polled = [PollFd::from_borrowed_fd(file.as_fd(), PollFlags::PRI)];
            if poll::poll(&mut polled, deadline).map_err(self.error("watch"))? == 0 {
                return self.is_empty();
            }
        }
    }

    /// What its processes use. A controller that is not enabled counts as 0.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn usage(&self) -> Result<Usage, CgroupError> {
        let number = |file: &'static str| -> Result<u64, CgroupError> {
            Ok(self.read(file)?.and_then(|text| text.trim().parse().ok()).unwrap_or(0))
        };
        let cpu = self.read("cpu.stat")?.unwrap_or_default();
        let memory = self.read("memory.events")?.unwrap_or_default();
        Ok(Usage {
            cpu_us: parse_field(&cpu, "usage_usec").unwrap_or(0),
            throttled_us: parse_field(&cpu, "throttled_usec").unwrap_or(0),
            memory: number("memory.current")?,
            pids: number("pids.current")?,
            oom_kills: parse_field(&memory, "oom_kill").unwrap_or(0),
        })
    }

    /// Removes it and everything below it; the kernel refuses while a process is in it. That it does not exist is
    /// fine. Whether there was one.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn remove(&self) -> Result<bool, CgroupError> {
        remove_tree(&self.path()).map_err(self.error("remove"))
    }

    /// Removes it if nothing is in or below it, e.g. the common parent of all partitions after the last one.
    /// Whether it was removed.
    ///
    /// # Errors
    /// [`CgroupError::Io`], other than that it is in use.
    pub fn remove_if_unused(&self) -> Result<bool, CgroupError> {
        match fs::remove_dir(self.path()) {
            Ok(()) => Ok(true),
            Err(error) if gone(&error) || error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
            Err(source) => Err(self.error("remove")(source)),
        }
    }

    fn read(&self, file: &'static str) -> Result<Option<String>, CgroupError> {
        match fs::read_to_string(self.path().join(file)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if gone(&error) || error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => {
                Ok(None)
            }
            Err(source) => Err(self.error("read")(source)),
        }
    }

    fn error(&self, action: &'static str) -> impl Fn(io::Error) -> CgroupError {
        let path = self.path();
        move |source| CgroupError::Io { action, path: path.clone(), source }
    }
}

/// Depth first: an init like systemd makes cgroups of its own below the partition's.
fn remove_tree(path: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if gone(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The value of a key in a file of `key value` lines.
fn parse_field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The version 2 line of `/proc/PID/cgroup`: `0::/path`.
fn parse_membership(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

fn is_below(path: &str, ancestor: &str) -> bool {
    path.strip_prefix(ancestor).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_key() {
        let text = "populated_x 7\npopulated 0\nfrozen 1\n";
        assert_eq!(parse_field(text, "populated"), Some(0));
        assert_eq!(parse_field(text, "frozen"), Some(1));
        assert_eq!(parse_field(text, "froz"), None);
        assert_eq!(parse_field("", "populated"), None);
    }

    #[test]
    fn membership_is_judged_by_whole_components() {
        let own = "12:pids:/x\n0::/patchswitch/web/init.scope\n";
        assert_eq!(parse_membership(own), Some("/patchswitch/web/init.scope"));
        assert!(is_below("/patchswitch/web/init.scope", "/patchswitch/web"));
        assert!(is_below("/patchswitch/web", "/patchswitch/web"));
        assert!(!is_below("/patchswitch/web-2", "/patchswitch/web"), "a neighbour with a longer name");
        assert!(!is_below("/", "/patchswitch/web"));
        let cgroup = Cgroup { root: MOUNT.into(), relative: "/patchswitch/web".to_owned() };
        assert_eq!(cgroup.child("exec-1").path(), Path::new("/sys/fs/cgroup/patchswitch/web/exec-1"));
        assert_eq!(cgroup.child("exec-1").name(), "exec-1");
        assert_eq!(parse_membership("3:cpu:/x\n"), None);
    }

    #[test]
    fn version_1_is_said_so_and_absence_is_not_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = Cgroup::below(dir.path(), "/patchswitch/web").unwrap_err();
        assert!(matches!(error, CgroupError::NotVersion2(_)));
        fs::write(dir.path().join("cgroup.controllers"), "").unwrap();
        let absent = Cgroup::below(dir.path(), "/patchswitch/web").unwrap();
        assert!(!absent.exists() && absent.is_empty().unwrap());
        absent.kill_all(Duration::from_secs(1)).unwrap();
        assert!(absent.wait_empty(Instant::now()).unwrap());
        assert!(!absent.remove().unwrap() && !absent.remove_if_unused().unwrap());
        assert_eq!(absent.usage().unwrap(), Usage::default());
    }
}
