//! Access to files below the root of a clone, without ever trusting a path inside it.
//!
//! Whoever was root in the partition made every directory entry of the clone, so an entry may be a symbolic link to
//! the host's `/etc`, a mount, a FIFO that blocks its reader, or a hard link to something dear. Three rules follow:
//!
//! * a directory is reached **one component at a time** with `openat2(2)` (`RESOLVE_IN_ROOT`,
//!   `RESOLVE_NO_SYMLINKS`, `RESOLVE_NO_MAGICLINKS`, `RESOLVE_NO_XDEV`), so that a refusal can name the component,
//!   and only below the four places of [`Place`], which a Debian root reaches without symbolic links;
//! * nothing is ever opened for writing that was there before: a file is made under a name of its own (`O_EXCL`) and
//!   renamed, which replaces the entry and not what the entry leads to;
//! * a file is read only if it is a regular one and not larger than the caller expects.
//!
//! The root is a mount that only the agent sees (`nosuid,nodev`); see [`Root::is_guarded`].

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, StatVfsMountFlags};
use rustix::io::Errno;

mod error;
#[cfg(test)]
mod tests;

pub use error::{Refusal, RootError};

/// Every look-up inside a clone is made with these.
const RESOLVE: ResolveFlags = ResolveFlags::IN_ROOT
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);
/// The longest name of a directory entry that Linux knows (`NAME_MAX`), less what [`temporary`] adds.
const ENTRY_MAX: usize = 255 - TEMPORARY_SUFFIX.len() - 1;
/// Ends the name of a file that is not complete. The name is fixed, so that what a killed agent left is replaced.
const TEMPORARY_SUFFIX: &str = ".patchswitch-new";

/// The only directories of a clone that the host touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// `usr/lib/patchswitch`: programs.
    Programs,
    /// `etc/patchswitch`: start scripts.
    Settings,
    /// `var/lib/patchswitch`: patch table, patch files, results.
    State,
    /// `etc/systemd/system`: the unit that runs the start script where systemd is the init.
    Units,
}

impl Place {
    const fn components(self) -> &'static [&'static str] {
        match self {
            Self::Programs => &["usr", "lib", "patchswitch"],
            Self::Settings => &["etc", "patchswitch"],
            Self::State => &["var", "lib", "patchswitch"],
            Self::Units => &["etc", "systemd", "system"],
        }
    }

    /// The path inside the clone, without a leading slash.
    pub fn path(self) -> String {
        self.components().join("/")
    }
}

/// What to do about a directory that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// Make it: mode 0755, owned by the agent's user.
    Create,
    /// Report [`RootError::Missing`].
    Fail,
}

/// The root directory of a clone, held by a descriptor.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

/// A directory below one of the four places, held by a descriptor.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: String,
}

/// A file that is being written and has no name to be found by yet. Dropped without [`NewFile::finish`], it is gone.
#[derive(Debug)]
pub struct NewFile<'a> {
    folder: &'a Folder,
    name: String,
    file: File,
    finished: bool,
}

impl Root {
    /// Opens the root at the place where the agent mounted it. This path is the host's own and is trusted.
    ///
    /// # Errors
    /// [`RootError::Io`] if it is not there or is not a directory.
    pub fn open(path: &Path) -> Result<Self, RootError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
            .map(|fd| Self { fd })
            .map_err(|errno| RootError::io("open the root", &path.to_string_lossy(), errno))
    }

    /// Whether the root is mounted `nosuid,nodev`: the guard of the host's own view of a clone.
    ///
    /// # Errors
    /// [`RootError::Io`] if the kernel does not say.
    pub fn is_guarded(&self) -> Result<bool, RootError> {
        let wanted = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
        rustix::fs::fstatvfs(&self.fd)
            .map(|stat| stat.f_flag.contains(wanted))
            .map_err(|errno| RootError::io("examine", "/", errno))
    }

    /// Opens the directory `place/below[0]/below[1]…`.
    ///
    /// # Errors
    /// [`RootError::Refused`] naming the component that is not a plain directory of the clone's own file system, or
    /// that somebody else than the agent's user may write to; [`RootError::Missing`]; [`RootError::Io`].
    pub fn folder(&self, place: Place, below: &[&str], absent: Absent) -> Result<Folder, RootError> {
        let own = place.components().len() - 1;
        let mut at: Option<Folder> = None;
        for (depth, name) in place.components().iter().chain(below).enumerate() {
            let (parent, path) = match &at {
                Some(folder) => (folder.fd.as_fd(), format!("{}/{name}", folder.path)),
                None => (self.fd.as_fd(), (*name).to_owned()),
            };
            check_component(name, &path)?;
            let fd = enter(parent, name, &path, absent)?;
            let folder = Folder { fd, path };
            if depth >= own {
                folder.check_owner()?;
            }
            at = Some(folder);
        }
        at.ok_or_else(|| RootError::refused("", Refusal::BadName))
    }
}

/// What a path of a clone is, for those who read a whole clone and write nothing.
#[derive(Debug)]
pub enum Look {
    /// A regular file, open for reading, and its size in bytes.
    File(File, u64),
    /// Something else; it was not opened.
    Other(FileType),
    /// Nothing.
    Missing,
}

impl Root {
    /// Opens any file of the clone for reading. Links on the way are followed *inside the clone* (`RESOLVE_IN_ROOT`),
    /// as its own programs would follow them; a link at the end is not. Nothing but a regular file is opened.
    ///
    /// # Errors
    /// [`RootError::Refused`] if the path leads through `/proc`-like links or another file system; [`RootError::Io`].
    pub fn look(&self, path: &str) -> Result<Look, RootError> {
        if path.contains('\0') {
            return Err(RootError::refused(path, Refusal::BadName));
        }
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let open = |flags| {
            rustix::fs::openat2(
                &self.fd,
                path,
                flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            )
        };
        let failed = |errno| RootError::of_lookup("open", path, errno);
        let found = match open(OFlags::PATH) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Look::Missing),
            Err(errno) => return Err(failed(errno)),
        };
        let stat =
            |fd: &OwnedFd| rustix::fs::fstat(fd).map_err(|errno| RootError::io("examine", path, errno));
        let kind = file_type(&stat(&found)?);
        if kind != FileType::RegularFile {
            return Ok(Look::Other(kind));
        }
        let fd = open(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY).map_err(failed)?;
        let stat = stat(&fd)?;
        match file_type(&stat) {
            FileType::RegularFile => {
                Ok(Look::File(File::from(fd), u64::try_from(stat.st_size).unwrap_or_default()))
            }
            kind => Ok(Look::Other(kind)),
        }
    }
}

impl Folder {
    /// The path inside the clone, without a leading slash.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Begins a new file that will have this name. What has the name now stays until [`NewFile::finish`].
    ///
    /// # Errors
    /// [`RootError::Refused`] if the name is not a single component; [`RootError::Io`].
    pub fn create(&self, name: &str) -> Result<NewFile<'_>, RootError> {
        let path = self.inside(name)?;
        let temporary = temporary(name);
        self.unlink(&temporary, &path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat2(&self.fd, temporary.as_str(), flags, Mode::from_raw_mode(0o600), RESOLVE)
                .map_err(|errno| RootError::of_lookup("create", &path, errno))?;
        Ok(NewFile { folder: self, name: name.to_owned(), file: File::from(fd), finished: false })
    }

    /// Writes a whole file, durably, under a temporary name first.
    ///
    /// # Errors
    /// As [`Folder::create`] and [`NewFile::finish`].
    pub fn write(&self, name: &str, mode: u32, content: &[u8]) -> Result<(), RootError> {
        let mut file = self.create(name)?;
        file.write_all(content).map_err(|source| RootError::from_io("write", &self.child(name), source))?;
        file.finish(mode)
    }

    /// Makes (never follows) a symbolic link, replacing a file or a link of that name.
    ///
    /// # Errors
    /// [`RootError::Refused`] if a directory has the name; [`RootError::Io`].
    pub fn symlink(&self, name: &str, target: &str) -> Result<(), RootError> {
        let path = self.inside(name)?;
        let temporary = temporary(name);
        self.unlink(&temporary, &path)?;
        rustix::fs::symlinkat(target, &self.fd, temporary.as_str())
            .map_err(|errno| RootError::io("create the link", &path, errno))?;
        self.put(&temporary, name, &path)
    }

    /// Reads a regular file of at most `limit` bytes.
    ///
    /// It is looked at before it is opened: to open a FIFO or a device is an act of its own.
    ///
    /// # Errors
    /// [`RootError::Missing`], [`RootError::Refused`] (not a regular file, too large) or [`RootError::Io`].
    pub fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, RootError> {
        let path = self.inside(name)?;
        // Without O_NOFOLLOW, which would open a link itself: RESOLVE_NO_SYMLINKS refuses it.
        let look = OFlags::PATH | OFlags::CLOEXEC;
        self.regular(&self.open(name, &path, look)?, &path, limit)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = self.open(name, &path, flags)?;
        // A clone that runs may have put something else there meanwhile.
        self.regular(&fd, &path, limit)?;
        let mut bytes = Vec::new();
        let mut limited = File::from(fd).take(limit + 1);
        limited.read_to_end(&mut bytes).map_err(|source| RootError::from_io("read", &path, source))?;
        if bytes.len() as u64 > limit {
            return Err(RootError::refused(&path, Refusal::TooLarge { limit }));
        }
        Ok(bytes)
    }

    /// Removes an entry that is not a directory. That it is not there is fine.
    ///
    /// # Errors
    /// [`RootError::Refused`] if it is a directory; [`RootError::Io`].
    pub fn remove(&self, name: &str) -> Result<(), RootError> {
        let path = self.inside(name)?;
        self.unlink(name, &path)
    }

    /// Removes every entry; a directory among them is refused, since nothing of ours is nested.
    ///
    /// # Errors
    /// [`RootError::Refused`] naming the directory; [`RootError::Io`].
    pub fn clear(&self) -> Result<(), RootError> {
        let failed = |errno| RootError::io("list", &self.path, errno);
        for entry in rustix::fs::Dir::read_from(&self.fd).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if name.to_bytes() == b"." || name.to_bytes() == b".." {
                continue;
            }
            let path = self.child(&name.to_string_lossy());
            rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())
                .map_err(|errno| RootError::of_entry("remove", &path, errno))?;
        }
        Ok(())
    }

    fn open(&self, name: &str, path: &str, flags: OFlags) -> Result<OwnedFd, RootError> {
        rustix::fs::openat2(&self.fd, name, flags, Mode::empty(), RESOLVE)
            .map_err(|errno| RootError::of_lookup("open", path, errno))
    }

    fn regular(&self, fd: &OwnedFd, path: &str, limit: u64) -> Result<(), RootError> {
        let stat = rustix::fs::fstat(fd).map_err(|errno| RootError::io("examine", path, errno))?;
        let kind = file_type(&stat);
        if kind != FileType::RegularFile {
            return Err(RootError::refused(path, Refusal::NotAFile(kind)));
        }
        if u64::try_from(stat.st_size).unwrap_or(u64::MAX) > limit {
            return Err(RootError::refused(path, Refusal::TooLarge { limit }));
        }
        Ok(())
    }

    /// In a directory that a user of the partition may write to, what the host writes could be exchanged before the
    /// partition's root runs it.
    fn check_owner(&self) -> Result<(), RootError> {
        let stat =
            rustix::fs::fstat(&self.fd).map_err(|errno| RootError::io("examine", &self.path, errno))?;
        let us = rustix::process::geteuid().as_raw();
        if stat.st_uid == us && stat.st_mode & 0o022 == 0 {
            return Ok(());
        }
        let mode = stat.st_mode & 0o7777;
        Err(RootError::refused(&self.path, Refusal::Writable { owner: stat.st_uid, mode }))
    }

    fn inside(&self, name: &str) -> Result<String, RootError> {
        let path = self.child(name);
        check_component(name, &path)?;
        Ok(path)
    }

    fn child(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }

    fn unlink(&self, name: &str, path: &str) -> Result<(), RootError> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(RootError::of_entry("remove", path, errno)),
        }
    }

    /// Gives a finished temporary entry its name, durably.
    fn put(&self, temporary: &str, name: &str, path: &str) -> Result<(), RootError> {
        rustix::fs::renameat(&self.fd, temporary, &self.fd, name).map_err(|errno| {
            // The reason the caller gets is the failed rename, and the next attempt removes the rest.
            let _ = rustix::fs::unlinkat(&self.fd, temporary, AtFlags::empty());
            RootError::of_entry("replace", path, errno)
        })?;
        rustix::fs::fsync(&self.fd).map_err(|errno| RootError::io("write", &self.path, errno))
    }
}

impl NewFile<'_> {
    /// Ends the writing: owner and mode are set, the content is on the disk, then the file takes its name.
    ///
    /// # Errors
    /// [`RootError::Refused`] if a directory has the name; [`RootError::Io`]. Nothing is left behind then.
    pub fn finish(mut self, mode: u32) -> Result<(), RootError> {
        let path = self.folder.child(&self.name);
        let failed = |errno| RootError::io("write", &path, errno);
        // A directory with the set-group-id bit would hand its group down.
        let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
        rustix::fs::fchown(&self.file, Some(user), Some(group)).map_err(failed)?;
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(mode)).map_err(failed)?;
        rustix::fs::fsync(&self.file).map_err(failed)?;
        self.finished = true;
        self.folder.put(&temporary(&self.name), &self.name, &path)
    }
}

impl Write for NewFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if !self.finished {
            // Nobody is left to hear of a failure, and the next attempt removes the file first.
            let _ = rustix::fs::unlinkat(&self.folder.fd, temporary(&self.name), AtFlags::empty());
        }
    }
}

fn temporary(name: &str) -> String {
    format!(".{name}{TEMPORARY_SUFFIX}")
}

fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// `RESOLVE_IN_ROOT` turns `..` at the root into the root itself, so such names are refused here.
fn check_component(name: &str, path: &str) -> Result<(), RootError> {
    let good = !name.is_empty()
        && name.len() <= ENTRY_MAX
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c == '/' || c.is_control());
    if good { Ok(()) } else { Err(RootError::refused(path, Refusal::BadName)) }
}

/// Opens one directory below another, making it if asked to.
fn enter(parent: BorrowedFd<'_>, name: &str, path: &str, absent: Absent) -> Result<OwnedFd, RootError> {
    // Without O_NOFOLLOW, which would call a link "not a directory": RESOLVE_NO_SYMLINKS refuses it as what it is.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = || rustix::fs::openat2(parent, name, flags, Mode::empty(), RESOLVE);
    let errno = match open() {
        Ok(fd) => return Ok(fd),
        Err(errno) => errno,
    };
    if errno != Errno::NOENT || absent == Absent::Fail {
        return Err(RootError::of_lookup("open", path, errno));
    }
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(RootError::io("create the directory", path, errno)),
    }
    let fd = open().map_err(|errno| RootError::of_lookup("open", path, errno))?;
    let failed = |errno| RootError::io("create the directory", path, errno);
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    rustix::fs::fchown(&fd, Some(user), Some(group)).map_err(failed)?;
    // Not what the agent's umask leaves of it.
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).map_err(failed)?;
    rustix::fs::fsync(parent).map_err(failed)?;
    Ok(fd)
}
