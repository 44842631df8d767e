//! What a command in a partition needs beside the partition.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use super::super::cgroup::Cgroup;
use super::{RuntimeError, error};
use crate::names;

/// The beginning of the name of a command's cgroup below the partition's.
const EXEC_CGROUP: &str = "exec-";
/// How long a killed command may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What belongs to one `exec`, removed with it.
pub(super) struct Scratch {
    dir: PathBuf,
    /// Where the runtime says what it could not do.
    pub(super) log: PathBuf,
    /// What the command runs in.
    pub(super) cgroup: Cgroup,
}

impl Scratch {
    pub(super) fn new(root: &Path, name: &str) -> Result<Self, RuntimeError> {
        let partition = Cgroup::new(&format!("{}/{name}", names::CGROUP_ROOT))?;
        // Those of commands whose left-over children have ended meanwhile.
        for old in partition.children()?.iter().filter(|child| child.name().starts_with(EXEC_CGROUP)) {
            old.remove_if_unused()?;
        }
        let id = crate::control::random_id()
            .map_err(error("make an identifier for a command in", Path::new(name)))?;
        let cgroup = partition.child(&format!("{EXEC_CGROUP}{id}"));
        // Beside the runtime's directory: in it, a directory would be taken for a partition.
        let dir = root.with_extension("exec").join(id);
        fs::create_dir_all(&dir).map_err(error("make", &dir))?;
        let scratch = Self { log: dir.join("log"), dir, cgroup };
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

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing depends on it: what is left goes with the next command, or with the partition.
        let _ = self.cgroup.remove_if_unused();
        let _ = fs::remove_dir_all(&self.dir);
        let _ = self.dir.parent().map(fs::remove_dir);
    }
}
