//! Which files of a mounted root have changed since a moment.
//!
//! The root is a partition's and may be hostile: it is walked by descriptors from directory to directory, no symbolic
//! link is followed, nothing but directories is opened, no other file system is entered, and the number of entries,
//! their depth and the length of the list are bounded.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use serde::Serialize;

use super::pattern::MayLose;
use crate::storage::StorageError;

/// `BTRFS_SUPER_MAGIC` (`include/uapi/linux/magic.h`), and the inode that the root of each of its subvolumes has
/// (`BTRFS_FIRST_FREE_OBJECTID`).
const BTRFS: i64 = 0x9123_683e;
const SUBVOLUME: u64 = 256;
/// Time stamps of files are those of the last tick, up to 10 ms old; so much earlier is looked for as well.
const TICK: Duration = Duration::from_millis(20);

/// Bounds of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Files in each of the two lists.
    pub listed: usize,
    /// Entries looked at.
    pub visited: u64,
    /// Directories inside each other.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { listed: 1000, visited: 10_000_000, depth: 200 }
    }
}

/// What a changed entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory: something in it has been made, renamed or deleted.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, a FIFO or a socket.
    Other,
}

/// A file that has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChangedFile {
    /// Its path as seen inside the partition.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Its size in bytes.
    pub size: u64,
}

/// What has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// Files outside the `may_lose` list; the first ones, if there are very many.
    pub undeclared: Vec<ChangedFile>,
    /// How many there are.
    pub undeclared_total: u64,
    /// Files inside the `may_lose` list; the first ones, if there are very many.
    pub declared: Vec<ChangedFile>,
    /// How many there are.
    pub declared_total: u64,
    /// Places that were not looked into: too deep, too many, or not readable.
    pub skipped: u64,
}

/// A directory that is being read.
struct Level {
    dir: Dir,
    path: PathBuf,
    /// Its device's number; each subvolume of a btrfs has one of its own.
    device: u64,
}

struct Walk<'a> {
    since: Duration,
    may_lose: &'a MayLose,
    limits: Limits,
    is_btrfs: bool,
    visited: u64,
    changes: Changes,
}

/// Lists what has changed in a mounted root since a moment, by the inodes' change time, which no program in the
/// partition can set back (short of setting the host's clock). `at` is where the partition has that root: the paths in
/// the list, and those that may be lost, are the partition's.
///
/// # Errors
/// [`StorageError::Io`] if the root itself cannot be read.
pub fn changed_since(
    root: &Path,
    at: &Path,
    since: SystemTime,
    may_lose: &MayLose,
    limits: Limits,
) -> Result<Changes, StorageError> {
    let failed = |error: Errno| StorageError::io("read", root)(error.into());
    let fd = rustix::fs::open(root, folder_flags(), Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    let since = since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().saturating_sub(TICK);
    let is_btrfs = rustix::fs::fstatfs(&fd).map_err(failed)?.f_type == BTRFS;
    let mut walk = Walk { since, may_lose, limits, is_btrfs, visited: 0, changes: Changes::default() };
    let path = at.to_owned();
    if walk.is_changed(&stat) {
        walk.note(&path, &stat);
    }
    let mut stack = vec![Level { dir: Dir::new(fd).map_err(failed)?, path, device: stat.st_dev }];
    while let Some(level) = stack.last_mut() {
        match level.dir.read() {
            None => {
                stack.pop();
            }
            Some(Err(_)) => {
                walk.changes.skipped += 1;
                stack.pop();
            }
            Some(Ok(entry)) => {
                if walk.visited >= limits.visited {
                    walk.changes.skipped += 1;
                    break;
                }
                let below = walk.visit(level, entry.file_name().to_bytes());
                stack.extend(below);
                if stack.len() > limits.depth {
                    walk.changes.skipped += 1;
                    stack.pop();
                }
            }
        }
    }
    Ok(walk.changes)
}

fn folder_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOATIME
}

impl Walk<'_> {
    /// Looks at one entry; returns it as the next level if it is a directory to go into.
    fn visit(&mut self, level: &Level, name: &[u8]) -> Option<Level> {
        if name == b"." || name == b".." {
            return None;
        }
        self.visited += 1;
        let name = OsStr::from_bytes(name);
        let parent = level.dir.fd().ok()?;
        let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // Deleted a moment ago: then its directory has changed.
            Err(Errno::NOENT) => return None,
            Err(_) => {
                self.changes.skipped += 1;
                return None;
            }
        };
        let is_subvolume = self.is_btrfs && stat.st_ino == SUBVOLUME;
        if stat.st_dev != level.device && !is_subvolume {
            return None; // something is mounted there: not a part of this disk
        }
        let path = level.path.join(name);
        if self.is_changed(&stat) {
            self.note(&path, &stat);
        }
        if !FileType::from_raw_mode(stat.st_mode).is_dir() {
            return None;
        }
        let opened = rustix::fs::openat(parent, name, folder_flags(), Mode::empty());
        match opened.and_then(|fd| Self::enter(fd, &stat)) {
            Ok(dir) => Some(Level { dir, path, device: stat.st_dev }),
            Err(Errno::NOENT) => None,
            Err(_) => {
                self.changes.skipped += 1;
                None
            }
        }
    }

    /// Goes into a directory, if it is still the one that was looked at.
    fn enter(fd: OwnedFd, seen: &Stat) -> Result<Dir, Errno> {
        let stat = rustix::fs::fstat(&fd)?;
        if (stat.st_dev, stat.st_ino) != (seen.st_dev, seen.st_ino) {
            return Err(Errno::STALE);
        }
        Dir::new(fd)
    }

    fn is_changed(&self, stat: &Stat) -> bool {
        let nanos = u32::try_from(stat.st_ctime_nsec).unwrap_or_default();
        u64::try_from(stat.st_ctime).is_ok_and(|seconds| Duration::new(seconds, nanos) >= self.since)
    }

    fn note(&mut self, path: &Path, stat: &Stat) {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            _ => Kind::Other,
        };
        let declared = match kind {
            Kind::Directory => self.may_lose.covers_entries_of(path),
            _ => self.may_lose.covers(path),
        };
        let (list, total) = if declared {
            (&mut self.changes.declared, &mut self.changes.declared_total)
        } else {
            (&mut self.changes.undeclared, &mut self.changes.undeclared_total)
        };
        *total += 1;
        if list.len() < self.limits.listed {
            let size = u64::try_from(stat.st_size).unwrap_or_default();
            list.push(ChangedFile { path: path.to_owned(), kind, size });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn paths(files: &[ChangedFile]) -> Vec<&str> {
        let mut paths: Vec<_> = files.iter().map(|file| file.path.to_str().unwrap()).collect();
        paths.sort_unstable();
        paths
    }

    /// A root with old files, and the moment after them.
    fn root() -> (tempfile::TempDir, SystemTime) {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["etc", "var/log/nginx", "srv"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        for file in ["etc/passwd", "var/log/a.log", "srv/old", "srv/gone"] {
            fs::write(dir.path().join(file), "old").unwrap();
        }
        std::thread::sleep(TICK * 2);
        let now = SystemTime::now();
        std::thread::sleep(TICK);
        (dir, now)
    }

    #[test]
    fn files_that_changed_are_listed_by_declaration() {
        let (dir, since) = root();
        fs::write(dir.path().join("etc/passwd"), "new content").unwrap();
        fs::write(dir.path().join("var/log/a.log"), "new").unwrap();
        fs::write(dir.path().join("var/log/nginx/access.log"), "new").unwrap();
        fs::remove_file(dir.path().join("srv/gone")).unwrap();
        // Set back to long ago: the change time is not fooled.
        let old = fs::File::options().append(true).open(dir.path().join("srv/old")).unwrap();
        old.set_modified(SystemTime::UNIX_EPOCH).unwrap();

        let may_lose = MayLose::parse(["/var/log"]).unwrap();
        let changes = changed_since(dir.path(), Path::new("/"), since, &may_lose, Limits::default()).unwrap();
        assert_eq!(paths(&changes.undeclared), ["/etc/passwd", "/srv", "/srv/old"]);
        assert_eq!(
            paths(&changes.declared),
            ["/var/log/a.log", "/var/log/nginx", "/var/log/nginx/access.log"]
        );
        assert_eq!((changes.undeclared_total, changes.declared_total, changes.skipped), (3, 3, 0));
        let passwd = changes.undeclared.iter().find(|file| file.path.ends_with("passwd")).unwrap();
        assert_eq!((passwd.size, passwd.kind), (11, Kind::File));
    }

    #[test]
    fn an_untouched_root_has_no_changes() {
        let (dir, since) = root();
        let changes =
            changed_since(dir.path(), Path::new("/"), since, &MayLose::default(), Limits::default()).unwrap();
        assert_eq!(changes, Changes::default());
    }

    #[test]
    fn links_are_listed_and_not_followed() {
        let (dir, since) = root();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("srv/out")).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("srv/loop")).unwrap();
        let changes =
            changed_since(dir.path(), Path::new("/"), since, &MayLose::default(), Limits::default()).unwrap();
        assert_eq!(paths(&changes.undeclared), ["/srv", "/srv/loop", "/srv/out"]);
        assert!(changes.undeclared.iter().any(|file| file.kind == Kind::Symlink));
        let link = outside.path().join("root");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let error =
            changed_since(&link, Path::new("/"), since, &MayLose::default(), Limits::default()).unwrap_err();
        assert!(matches!(error, StorageError::Io { .. }), "{error}");
    }

    #[test]
    fn bounds_are_kept_and_counted() {
        let (dir, since) = root();
        let mut deep = dir.path().join("srv");
        for _ in 0..10 {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        for file in 0..20 {
            fs::write(dir.path().join(format!("etc/{file}")), "new").unwrap();
        }
        let none = MayLose::default();
        let limits = |listed, visited, depth| Limits { listed, visited, depth };
        let short = changed_since(dir.path(), Path::new("/"), since, &none, limits(5, 1000, 100)).unwrap();
        assert_eq!((short.undeclared.len(), short.undeclared_total), (5, 20 + 1 + 1 + 10));
        assert_eq!(short.skipped, 0);
        let shallow = changed_since(dir.path(), Path::new("/"), since, &none, limits(100, 1000, 4)).unwrap();
        assert_eq!(shallow.skipped, 1);
        assert_eq!(shallow.undeclared_total, 20 + 1 + 1 + 3);
        let few = changed_since(dir.path(), Path::new("/"), since, &none, limits(100, 3, 100)).unwrap();
        assert_eq!(few.skipped, 1);
        assert!(few.undeclared_total <= 3);
    }
}
