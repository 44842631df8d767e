//! One job per service: a lock that ends with its process, whatever becomes of it.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::values::now;
use crate::exit::ExitCode;
use crate::names::Name;

/// How often a wait for the lock tries again.
const STEP: Duration = Duration::from_millis(20);
/// More than a holder ever writes, in bytes.
const HOLDER_MAX: u64 = 4096;

/// The lock of a service, held until this is dropped or the process ends.
///
/// Its file is removed with it. A process that has opened the file meanwhile sees that it is not the one of that name any
/// more, and begins again.
#[derive(Debug)]
#[must_use]
pub struct JobLock {
    path: PathBuf,
    _file: File,
}

/// Who holds a lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The process.
    pub pid: u32,
    /// Since when.
    pub since: Timestamp,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} since {:.0}", self.pid, self.since)
    }
}

/// Why the lock was not got.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody has it.
    #[error("service {service} is busy: {} has its lock; try again when it has ended", held_by(.holder.as_ref()))]
    Busy {
        /// The service.
        service: Name,
        /// Who has it, unless that one has only just taken it.
        holder: Option<Holder>,
    },
    /// The file or its directory cannot be made or locked.
    #[error("failed to lock {path:?}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn held_by(holder: Option<&Holder>) -> String {
    holder.map_or_else(|| "another process".to_owned(), ToString::to_string)
}

impl LockError {
    /// The code for this end of a command.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Busy { .. } => ExitCode::Busy,
            Self::Io { source, .. } => ExitCode::of_io(source),
        }
    }
}

impl JobLock {
    /// Takes the lock of a service, in `lock/` of the run directory, or says at once who has it.
    ///
    /// # Errors
    /// [`LockError::Busy`] or [`LockError::Io`].
    pub fn acquire(run_dir: &Path, service: &Name) -> Result<Self, LockError> {
        let dir = run_dir.join("lock");
        let path = dir.join(file_name(service));
        let failed = |source: io::Error| LockError::Io { path: path.clone(), source };
        make_dir(run_dir).and_then(|()| make_dir(&dir)).map_err(failed)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR) {
            // The last holder of another lock has just removed the directory.
            Err(Errno::NOENT) => return Self::acquire(run_dir, service),
            fd => fd.map_err(|errno| failed(errno.into()))?,
        };
        let mut file = File::from(fd);
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(LockError::Busy { service: service.clone(), holder: read(&mut file) });
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        if !is_at(&file, &path) {
            // Removed by another process between the opening and the locking.
            return Self::acquire(run_dir, service);
        }
        write(&mut file).map_err(failed)?;
        Ok(Self { path, _file: file })
    }

    /// Who holds the lock of a service now; nobody is told of the question, and nobody is in its way.
    ///
    /// The kernel is asked who has locked the file (`proc_locks(5)`), and the file what that one wrote.
    ///
    /// # Errors
    /// [`LockError::Io`] if `/proc/locks` cannot be read.
    pub fn holder(run_dir: &Path, service: &Name) -> Result<Option<Holder>, LockError> {
        const LOCKS: &str = "/proc/locks";
        let path = run_dir.join("lock").join(file_name(service));
        let Ok(mut file) = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&path) else {
            return Ok(None);
        };
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| LockError::Io { path, source }
        };
        let inode = file.metadata().map_err(failed(&path))?.ino();
        let locks = std::fs::read_to_string(LOCKS).map_err(failed(Path::new(LOCKS)))?;
        Ok(read(&mut file).filter(|holder| has_locked(&locks, holder.pid, inode)))
    }

    /// Takes the lock, waiting for it at most for the given time.
    ///
    /// # Errors
    /// [`LockError::Busy`] at the end of the time, or [`LockError::Io`].
    pub fn acquire_within(run_dir: &Path, service: &Name, limit: Duration) -> Result<Self, LockError> {
        let end = Instant::now() + limit;
        loop {
            match Self::acquire(run_dir, service) {
                Err(LockError::Busy { .. }) if Instant::now() < end => std::thread::sleep(STEP),
                result => return result,
            }
        }
    }
}

impl Drop for JobLock {
    fn drop(&mut self) {
        // While the lock is still held. What fails leaves a file that harms nobody; the directory is every service's.
        let _ = std::fs::remove_file(&self.path);
        let _ = self.path.parent().map(std::fs::remove_dir);
    }
}

fn make_dir(path: &Path) -> io::Result<()> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Attachments have their locks in the same directory, under other names.
fn file_name(service: &Name) -> String {
    format!("job-{service}")
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

fn write(file: &mut File) -> io::Result<()> {
    let holder = Holder { pid: std::process::id(), since: now() };
    let text = serde_json::to_vec(&holder)?;
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(&text)
}

/// Whether a process has an exclusive lock of `flock(2)` on the file with this inode number. Lines are like
/// `1: FLOCK  ADVISORY  WRITE 2345 fe:00:10117 0 EOF`; those of waiting processes have `->` before the kind.
fn has_locked(locks: &str, pid: u32, inode: u64) -> bool {
    locks.lines().any(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", owner, file, ..] = fields.as_slice() else { return false };
        let file = file.rsplit(':').next().and_then(|number| number.parse().ok());
        owner.parse() == Ok(pid) && file == Some(inode)
    })
}

/// The holder writes after it has locked, so there may be nothing yet, or the name of the holder before.
fn read(file: &mut File) -> Option<Holder> {
    let mut text = Vec::new();
    file.rewind().ok()?;
    file.take(HOLDER_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_that_has_the_lock_is_taken_for_its_holder() {
        let locks = "1: OFDLCK ADVISORY  READ -1 fe:00:77 201 201\n2: FLOCK  ADVISORY  WRITE 2345 fe:00:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 999 fe:00:77 0 EOF\n3: POSIX  ADVISORY  WRITE 11 00:1a:88 0 EOF\n";
        assert!(has_locked(locks, 2345, 77));
        for (pid, inode) in [(999, 77), (2345, 88), (11, 88), (2345, 7), (0, 77)] {
            assert!(!has_locked(locks, pid, inode), "{pid} {inode}");
        }
        assert!(!has_locked("", 1, 1) && !has_locked("1: FLOCK ADVISORY WRITE", 1, 1));
    }
}
