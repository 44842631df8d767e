//! Patch files of the host: adding them, and getting at them again.
//!
//! A patch is known by the digest of its file (patent Fig. 6, column 601). The file is copied into the state directory
//! when it is added, so that what is approved is what is applied, whatever becomes of the original; whoever reads the
//! copy checks the digest of what it has read.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::deb;
use super::digest::{self, Copied};
use super::name::{BadFileName, FileName};
use crate::exit::ExitCode;
use crate::host::linux::programs::ProgramError;
use crate::patch::wire::Driver;
use crate::store::{Change, Decision, NewPatch, Patch, Store, StoreError, Types, Who};

/// The largest patch file, in bytes.
pub const PATCH_MAX: u64 = 4 << 30;
/// Where the files are, below the state directory.
const FOLDER: &str = "patches";
/// How the name of a file begins that is not complete; no patch's name does.
const UNFINISHED: &str = ".new-";

/// Why a patch could not be added or read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// Its name is not one for a patch.
    #[error(transparent)]
    Name(#[from] BadFileName),
    /// It is not a regular file, or too large.
    #[error("refused {path:?}: {reason}")]
    NotAPatch {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It cannot be read or copied.
    #[error("failed to {action} {path:?}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It says it is a Debian package, and is none.
    #[error("refused {path:?}: it begins like a Debian package, but dpkg-deb cannot read it")]
    Package {
        /// The file.
        path: PathBuf,
        /// What `dpkg-deb` said.
        #[source]
        source: ProgramError,
    },
    /// The stored file is no longer the one that was added.
    #[error("patch {id} ({file}) has changed since it was added: {detail}; add it again")]
    Changed {
        /// The patch's number.
        id: String,
        /// Its file's name.
        file: FileName,
        /// What is different.
        detail: String,
    },
    /// It was asked for by name, but nobody has approved it.
    #[error("patch {id} ({file}) is {decision}; run `patchswitch patch approve {id}` first")]
    NotApproved {
        /// The patch's number.
        id: String,
        /// Its file's name.
        file: FileName,
        /// What was decided.
        decision: Decision,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl TableError {
    /// The code for this end of a command.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Name(_) | Self::NotAPatch { .. } | Self::Package { .. } | Self::Changed { .. } => {
                ExitCode::BadData
            }
            Self::Io { source, .. } => ExitCode::of_io(source),
            Self::NotApproved { .. } => ExitCode::Failed,
            Self::Store(error) => error.exit_code(),
        }
    }

    fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { action, path: path.to_owned(), source: source.into() }
    }

    fn not_a_patch(path: &Path, reason: impl Into<String>) -> Self {
        Self::NotAPatch { path: path.to_owned(), reason: reason.into() }
    }

    fn changed(patch: &Patch, detail: impl Into<String>) -> Self {
        Self::Changed { id: patch.id.to_string(), file: patch.file.clone(), detail: detail.into() }
    }
}

/// What is said about patches that are added.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    /// What they are for.
    pub types: Types,
    /// When they were published; the time of the file's last change if none.
    pub issued_at: Option<Timestamp>,
    /// Whether they are approved at once.
    pub approve: bool,
    /// Who adds them.
    pub who: &'a Who,
}

/// A patch that was added.
#[derive(Clone, Debug)]
pub struct Added {
    /// Its row. Its name may be another one: the same content is the same patch.
    pub patch: Patch,
    /// Whether anything is new about it.
    pub change: Change,
}

/// Adds files to the patch table. All names are checked before the first file is touched.
///
/// # Errors
/// [`TableError`]; files before the one that failed are added.
pub fn add(
    store: &mut Store,
    state_dir: &Path,
    files: &[PathBuf],
    wish: &Wish<'_>,
) -> Result<Vec<Added>, TableError> {
    let named: Vec<_> =
        files.iter().map(|path| Ok((path, file_name(path)?))).collect::<Result<_, TableError>>()?;
    named.into_iter().map(|(path, name)| add_one(store, state_dir, path, name, wish)).collect()
}

fn file_name(path: &Path) -> Result<FileName, TableError> {
    // A path that ends in `..` has a last component, but no file name.
    let last = path.components().next_back().map(|component| component.as_os_str());
    let name = path.file_name().or(last).unwrap_or_default();
    Ok(FileName::new(&name.to_string_lossy())?)
}

fn add_one(
    store: &mut Store,
    state_dir: &Path,
    path: &Path,
    name: FileName,
    wish: &Wish<'_>,
) -> Result<Added, TableError> {
    let mut source = Source::open(path)?;
    let folder = prepare(state_dir)?;
    let unfinished = Unfinished::create(&folder)?;
    let copied = source.copy_to(&unfinished)?;
    let package = match source.driver {
        Driver::Deb => deb::package(&unfinished.path)
            .map_err(|source| TableError::Package { path: path.to_owned(), source })?,
        Driver::Script => None,
    };
    // The same content by another name keeps its first name, in the table and in the folder.
    let known = store.patches()?.into_iter().find(|patch| patch.sha256 == copied.sha256);
    let kept = known.map_or_else(|| name.clone(), |patch| patch.file);
    unfinished.finish(&folder, &stored_name(&copied.sha256, &kept))?;
    let new = NewPatch {
        file: name,
        types: wish.types,
        issued_at: wish.issued_at.unwrap_or(source.changed_at),
        sha256: copied.sha256,
        size: copied.size,
        source: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).to_string_lossy().into_owned(),
        driver: source.driver,
        package,
    };
    let (id, mut change) = store.add_patch(&new, wish.who)?;
    if wish.approve && store.decide(id, Decision::Approved, wish.who)? == Change::Changed {
        change = Change::Changed;
    }
    Ok(Added { patch: store.find_patch(&id.to_string())?, change })
}

/// The patches for a job of a service: those that are named, or all that are approved and do not run there yet.
///
/// # Errors
/// [`TableError::NotApproved`]: nothing is run that nobody has approved.
pub fn select(
    store: &Store,
    service: &crate::names::Name,
    named: &[String],
) -> Result<Vec<Patch>, TableError> {
    if named.is_empty() {
        let applied = store.applied(service)?;
        let due = |patch: &Patch| patch.decision == Decision::Approved && !applied.contains(&patch.id);
        return Ok(store.patches()?.into_iter().filter(due).collect());
    }
    let mut patches: Vec<Patch> = Vec::new();
    for text in named {
        let patch = store.find_patch(text)?;
        if patch.decision != Decision::Approved {
            let (id, file, decision) = (patch.id.to_string(), patch.file, patch.decision);
            return Err(TableError::NotApproved { id, file, decision });
        }
        if !patches.iter().any(|other| other.id == patch.id) {
            patches.push(patch);
        }
    }
    Ok(patches)
}

/// Checks that the stored file of a patch is there and is the one that was added.
///
/// # Errors
/// [`TableError::Changed`] or [`TableError::Io`].
pub fn verify(state_dir: &Path, patch: &Patch) -> Result<(), TableError> {
    copy_stored(state_dir, patch, &mut io::sink())
}

/// Copies the stored file of a patch, checking what was copied; at an error the copy is not to be used.
///
/// # Errors
/// [`TableError::Changed`] or [`TableError::Io`].
pub fn copy_stored(state_dir: &Path, patch: &Patch, to: &mut impl io::Write) -> Result<(), TableError> {
    let path = state_dir.join(FOLDER).join(stored_name(&patch.sha256, &patch.file));
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(&path, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Err(TableError::changed(patch, format!("{path:?} is gone"))),
        Err(Errno::LOOP) => return Err(TableError::changed(patch, format!("{path:?} is a link"))),
        Err(errno) => return Err(TableError::io("open", &path, errno)),
    };
    let stat = rustix::fs::fstat(&fd).map_err(|errno| TableError::io("examine", &path, errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(TableError::changed(patch, format!("{path:?} is not a regular file")));
    }
    let copied = match digest::copy(&mut File::from(fd), to, patch.size) {
        Ok(copied) => copied,
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
            return Err(TableError::changed(patch, format!("{path:?} is larger than {} bytes", patch.size)));
        }
        Err(error) => return Err(TableError::io("copy", &path, error)),
    };
    if copied.sha256 == patch.sha256 {
        return Ok(());
    }
    let detail = format!("{path:?} has the SHA-256 {}, not {}", copied.sha256, patch.sha256);
    Err(TableError::changed(patch, detail))
}

/// Removes what a killed process left half copied, and leaves alone what a living one copies now; `up` calls it.
///
/// # Errors
/// [`TableError::Io`].
pub fn sweep(state_dir: &Path) -> Result<Change, TableError> {
    let folder = state_dir.join(FOLDER);
    let failed = |source: io::Error| TableError::io("clean", &folder, source);
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Change::AlreadySo),
        entries => entries.map_err(failed)?,
    };
    let mut change = Change::AlreadySo;
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) && is_abandoned(&entry.path())? {
            std::fs::remove_file(entry.path()).map_err(failed)?;
            change = Change::Changed;
        }
    }
    Ok(change)
}

/// Whether nobody works on an unfinished copy: whoever does has it locked, and the kernel unlocks it when he dies.
fn is_abandoned(path: &Path) -> Result<bool, TableError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let locked = rustix::fs::open(path, flags, Mode::empty())
        .and_then(|fd| rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive));
    match locked {
        Ok(()) => Ok(true),
        // Finished or given up just now.
        Err(Errno::WOULDBLOCK | Errno::NOENT) => Ok(false),
        Err(errno) => Err(TableError::io("clean", path, errno)),
    }
}

fn stored_name(sha256: &str, file: &FileName) -> String {
    format!("{sha256}-{file}")
}

fn prepare(state_dir: &Path) -> Result<PathBuf, TableError> {
    let folder = state_dir.join(FOLDER);
    match rustix::fs::mkdir(&folder, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(folder),
        Err(errno) => Err(TableError::io("create", &folder, errno)),
    }
}

/// The operator's file.
struct Source {
    path: PathBuf,
    file: File,
    driver: Driver,
    changed_at: Timestamp,
}

impl Source {
    fn open(path: &Path) -> Result<Self, TableError> {
        // A FIFO must not block, a link may point to something that was not meant.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::LOOP) => return Err(TableError::not_a_patch(path, "it is a symbolic link")),
            Err(errno) => return Err(TableError::io("open", path, errno)),
        };
        let failed = |error: io::Error| TableError::io("read", path, error);
        let stat = rustix::fs::fstat(&fd).map_err(|errno| failed(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(TableError::not_a_patch(path, "it is not a regular file"));
        }
        let mut file = File::from(fd);
        let mut head = Vec::new();
        file.by_ref().take(deb::HEAD as u64).read_to_end(&mut head).map_err(failed)?;
        file.rewind().map_err(failed)?;
        let Some(driver) = deb::driver(&head) else {
            let reason = "it is neither a Debian package nor a script that begins with #!";
            return Err(TableError::not_a_patch(path, reason));
        };
        let changed_at = Timestamp::from_second(stat.st_mtime).unwrap_or_else(|_| Timestamp::now());
        Ok(Self { path: path.to_owned(), file, driver, changed_at })
    }

    fn copy_to(&mut self, unfinished: &Unfinished) -> Result<Copied, TableError> {
        let mut to = &unfinished.file;
        match digest::copy(&mut self.file, &mut to, PATCH_MAX) {
            Ok(copied) => Ok(copied),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                Err(TableError::not_a_patch(&self.path, format!("it is larger than {PATCH_MAX} bytes")))
            }
            Err(error) => Err(TableError::io("copy", &self.path, error)),
        }
    }
}

/// A copy that is not complete; dropped, it is gone.
struct Unfinished {
    file: File,
    path: PathBuf,
    finished: bool,
}

impl Unfinished {
    fn create(folder: &Path) -> Result<Self, TableError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut number = 0_u32;
        loop {
            let path = folder.join(format!("{UNFINISHED}{}-{number}", std::process::id()));
            match rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR) {
                Ok(fd) => {
                    let new = Self { file: File::from(fd), path, finished: false };
                    if new.is_ours()? {
                        return Ok(new);
                    }
                }
                // Another thread's, or left by a killed process of the same number.
                Err(Errno::EXIST) if number < 1000 => number += 1,
                Err(errno) => return Err(TableError::io("create", &path, errno)),
            }
        }
    }

    /// Locks the copy against [`sweep`], which may have come by since it was made.
    fn is_ours(&self) -> Result<bool, TableError> {
        let failed = |errno: Errno| TableError::io("lock", &self.path, errno);
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(rustix::fs::fstat(&self.file).map_err(failed)?.st_nlink == 1),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Gives the copy its name, durably. A copy of that name, perhaps a damaged one, is replaced.
    fn finish(mut self, folder: &Path, name: &str) -> Result<(), TableError> {
        let failed = |error: io::Error| TableError::io("store", &self.path, error);
        self.file.sync_all().map_err(failed)?;
        std::fs::rename(&self.path, folder.join(name)).map_err(failed)?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            // Nobody is left to hear of a failure; `sweep` comes by again.
            let _ = rustix::fs::unlinkat(CWD, &self.path, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests;
