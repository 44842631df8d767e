//! One process at a time changes an attachment.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::record::{RecordError, io};
use crate::names::{Name, RUN_ROOT};

/// An exclusive lock, released when dropped or when the process ends.
///
/// Its file is removed with it, so that nothing is left of an attachment that is gone. Another process may have opened
/// the file meanwhile: whoever gets the lock looks whether the file is still the one of that name.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the lock that protects settings which several attachments share. Waits for nobody.
    ///
    /// # Errors
    /// [`RecordError::Busy`].
    pub fn host() -> Result<Self, RecordError> {
        Self::take("attachments")
    }

    /// Takes the lock of one attachment. Waits for nobody.
    ///
    /// # Errors
    /// [`RecordError::Busy`].
    pub fn of(name: &Name) -> Result<Self, RecordError> {
        Self::take(&format!("attachment-{name}"))
    }

    fn take(name: &str) -> Result<Self, RecordError> {
        let path = directory().join(name);
        loop {
            fs::create_dir_all(directory()).map_err(io("make", &directory()))?;
            let file = match File::options().create(true).truncate(false).write(true).open(&path) {
                // The last holder of another lock has just removed the directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(io("open", &path))?,
            };
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(RecordError::Busy(name.to_owned())),
                Err(error) => return Err(io("lock", &path)(error.into())),
            }
            if is_at(&file, &path) {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While the lock is still held. What fails leaves an empty file, which harms nobody.
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_dir(directory());
        let _ = fs::remove_dir(RUN_ROOT);
    }
}

fn directory() -> PathBuf {
    Path::new(RUN_ROOT).join("lock")
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}
