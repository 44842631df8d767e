//! What a command in a partition needs beside the partition.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::super::cgroup::Cgroup;
use super::{RuntimeError, error};
use crate::names;

/// The beginning of the name of a command's cgroup below the partition's.
const EXEC_CGROUP: &str = "exec-";
/// How long a killed command may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What belongs to one `exec`, removed with it.
#[derive(Debug)]
pub(super) struct Scratch {
    dir: PathBuf,
    /// Where the runtime says what it could not do.
    pub(super) log: PathBuf,
    /// What the command runs in.
    pub(super) cgroup: Cgroup,
    /// Locked as long as somebody waits for the command.
    _lock: File,
}

/// Where the directories of all commands are. Beside the runtime's directory: in it, one would be taken for a partition.
fn parent(root: &Path) -> PathBuf {
    root.with_extension("exec")
}

/// A command that goes on although who waited for it was killed.
#[derive(Debug)]
pub(super) struct Orphan {
    /// Of the partition in which it runs.
    pub(super) partition: String,
    /// Its control group there.
    pub(super) cgroup: String,
}

impl Orphan {
    /// Reads it from the arguments of an `exec` of ours, from the verb on; nothing if somebody waits for it.
    pub(super) fn of<'a>(root: &Path, arguments: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let mut words = arguments.skip_while(|word| *word != b"--cgroup").skip(1);
        let mut word = || Some(std::str::from_utf8(words.next()?).ok()?.to_owned());
        let (cgroup, partition) = (word()?, word()?);
        let dir = parent(root).join(cgroup.strip_prefix(EXEC_CGROUP)?);
        is_free(&dir).then_some(Self { partition, cgroup })
    }

    /// Kills it with all that it has started.
    pub(super) fn kill(&self) -> Result<(), RuntimeError> {
        let partition = Cgroup::new(&format!("{}/{}", names::CGROUP_ROOT, self.partition))?;
        Ok(partition.child(&self.cgroup).kill_all(KILL_LIMIT)?)
    }
}

/// Whether nobody holds a directory's lock; one that is not there is nobody's.
fn is_free(dir: &Path) -> bool {
    match File::open(dir) {
        Ok(file) => rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok(),
        Err(_) => true,
    }
}

/// Removes the directories of commands for which nobody waits any more.
pub(super) fn sweep(root: &Path) {
    let parent = parent(root);
    let Ok(entries) = fs::read_dir(&parent) else { return };
    let Ok(_making) = making(&parent) else { return };
    for dir in entries.flatten().map(|entry| entry.path()).filter(|dir| is_free(dir)) {
        let _ = fs::remove_dir_all(dir);
    }
    let _ = fs::remove_dir(&parent);
}

/// Removes the cgroups of commands whose left-over children have ended meanwhile. One that somebody waits for may be empty as well:
/// nothing has been put into it yet.
fn remove_unused(root: &Path, partition: &Cgroup) -> Result<(), RuntimeError> {
    let parent = parent(root);
    let _making = match making(&parent) {
        Ok(making) => Some(making),
        // Nobody waits for any.
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => None,
        Err(source) => return Err(error("lock", &parent)(source)),
    };
    for child in partition.children()? {
        if child.name().strip_prefix(EXEC_CGROUP).is_some_and(|id| is_free(&parent.join(id))) {
            child.remove_if_unused()?;
        }
    }
    Ok(())
}

/// Held while a directory is made and not locked yet.
fn making(parent: &Path) -> std::io::Result<File> {
    let file = File::open(parent)?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

impl Scratch {
    pub(super) fn new(root: &Path, name: &str) -> Result<Self, RuntimeError> {
        let partition = Cgroup::new(&format!("{}/{name}", names::CGROUP_ROOT))?;
        remove_unused(root, &partition)?;
        let id = crate::control::random_id()
            .map_err(error("make an identifier for a command in", Path::new(name)))?;
        let cgroup = partition.child(&format!("{EXEC_CGROUP}{id}"));
        let (dir, lock) = make(&parent(root), &id)?;
        let scratch = Self { log: dir.join("log"), dir, cgroup, _lock: lock };
        scratch.cgroup.make()?;
        Ok(scratch)
    }

    /// The runtime first: what it has forked and not yet put into the cgroup ends without it.
    pub(super) fn kill(&self, child: &mut Child) -> Result<(), RuntimeError> {
        let failed = error("kill a command of", &self.dir);
        child.kill().and_then(|()| child.wait()).map_err(failed)?;
        Ok(self.cgroup.kill_all(KILL_LIMIT)?)
    }
}

/// Makes a directory, and locks it. The last one that goes may take away where it is to be.
fn make(parent: &Path, id: &str) -> Result<(PathBuf, File), RuntimeError> {
    let dir = parent.join(id);
    loop {
        fs::create_dir_all(parent).map_err(error("make", parent))?;
        let made = making(parent).and_then(|_making| {
            fs::create_dir(&dir)?;
            let lock = File::open(&dir)?;
            // Who looks whether it is free holds it for a moment.
            rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
            Ok(lock)
        });
        match made {
            Ok(lock) => return Ok((dir, lock)),
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(error("make", &dir)(source)),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing depends on it: what is left goes with the next command, or with the partition.
        let _ = self.cgroup.remove_if_unused();
        let _ = fs::remove_dir_all(&self.dir);
        let _ = self.dir.parent().map(fs::remove_dir);
    }
}
