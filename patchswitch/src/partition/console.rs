//! The console log of a partition, seen from the host. `patchswitch-init console` keeps it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::program::{self, ProgramFileError};
use crate::host::linux::programs::{Program, ProgramError, Run};
use crate::init;
use crate::names::{Name, RUN_ROOT};

/// How long the keeper may need to write what a partition wrote at its end.
const FLUSH: Duration = Duration::from_secs(2);

/// The console log could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The keeper is not installed.
    #[error(transparent)]
    Keeper(#[from] ProgramFileError),
    /// The keeper could not be started.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file could not be read or written.
    #[error("failed to {action} {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The console log of one partition. It outlives the partition, so that one that did not come up can be explained.
#[derive(Clone, Debug)]
pub struct Console {
    file: PathBuf,
}

impl Console {
    /// The log of this partition.
    pub fn of(partition: &Name) -> Self {
        Self { file: Path::new(RUN_ROOT).join("console").join(format!("{partition}.log")) }
    }

    /// Starts a keeper and returns the end of the pipe that the partition writes to. The keeper ends when the last
    /// process that has it is gone.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn open(&self) -> Result<File, ConsoleError> {
        let dir = self.file.parent().unwrap_or(Path::new(RUN_ROOT));
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(error("make", dir))?;
        let (reader, writer) = io::pipe().map_err(error("make a pipe for", &self.file))?;
        // The keeper inherits the lock as its output, and so has it as long as it lives.
        let lock = self.lock()?;
        rustix::fs::flock(&lock, FlockOperation::LockShared).map_err(error("lock", &self.lock_file()))?;
        let run = Run::new(Program::Init).located(program::find()?).args(["console", "--detach", "--file"]);
        let run = run.arg(&self.file).stdin(File::from(std::os::fd::OwnedFd::from(reader)));
        let output = run.output_to(lock).status()?;
        if !output.status.success() {
            let text = fs::read_to_string(self.lock_file()).unwrap_or_default();
            let source =
                io::Error::other(format!("the keeper ended with {}: {}", output.status, text.trim()));
            return Err(error("keep", &self.file)(source));
        }
        Ok(File::from(std::os::fd::OwnedFd::from(writer)))
    }

    /// The last bytes of the log, at most so many. Empty if there is none.
    ///
    /// Where the partition has ended, waits a little until its last words are in the file.
    ///
    /// # Errors
    /// [`ConsoleError::Io`].
    pub fn tail(&self, ended: bool, limit: u64) -> Result<String, ConsoleError> {
        if ended {
            self.wait_for_keeper()?;
        }
        let current = tail_of(&self.file, limit).map_err(error("read", &self.file))?;
        let older = init::older_console(&self.file);
        let room = limit - current.len() as u64;
        let mut bytes = tail_of(&older, room).map_err(error("read", &older))?;
        bytes.extend(current);
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Removes the log. Whether there was one.
    ///
    /// # Errors
    /// [`ConsoleError::Io`].
    pub fn remove(&self) -> Result<bool, ConsoleError> {
        let mut removed = false;
        for file in [&self.file, &init::older_console(&self.file), &self.lock_file()] {
            match fs::remove_file(file) {
                Ok(()) => removed = true,
                Err(source) if source.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(error("remove", file)(source)),
            }
        }
        // The directory is every partition's.
        let _ = self.file.parent().map(fs::remove_dir);
        Ok(removed)
    }

    fn lock_file(&self) -> PathBuf {
        self.file.with_extension("lock")
    }

    fn lock(&self) -> Result<File, ConsoleError> {
        let mut options = OpenOptions::new();
        let opened = options.append(true).create(true).mode(0o600).open(self.lock_file());
        opened.map_err(error("open", &self.lock_file()))
    }

    fn wait_for_keeper(&self) -> Result<(), ConsoleError> {
        let lock = match File::open(self.lock_file()) {
            Ok(lock) => lock,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(error("open", &self.lock_file())(source)),
        };
        let end = Instant::now() + FLUSH;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Ok(()) | Err(Errno::WOULDBLOCK) => return Ok(()),
                Err(errno) => return Err(error("lock", &self.lock_file())(errno)),
            }
        }
    }
}

fn tail_of(file: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut file = match File::open(file) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn error<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl Fn(E) -> ConsoleError {
    let path = path.to_owned();
    move |source| ConsoleError::Io { action, path: path.clone(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_goes_back_into_the_older_file() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console { file: dir.path().join("web.log") };
        assert_eq!(console.tail(true, 10).unwrap(), "");
        fs::write(init::older_console(&console.file), "0123456789").unwrap();
        fs::write(&console.file, "abc").unwrap();
        assert_eq!(console.tail(false, 5).unwrap(), "89abc");
        assert_eq!(console.tail(false, 2).unwrap(), "bc");
        assert_eq!(console.tail(false, 100).unwrap(), "0123456789abc");
        assert!(console.remove().unwrap() && !console.remove().unwrap());
    }
}
