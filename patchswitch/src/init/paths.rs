//! Where things are in a partition; below another directory for tests.

use std::path::{Path, PathBuf};

use crate::control;
use crate::patch::wire;

/// Every path that `patchswitch-init` uses.
#[derive(Clone, Debug)]
pub(super) struct Paths {
    root: PathBuf,
}

impl Paths {
    /// Below this directory; the root if there is none.
    pub(super) fn below(root: Option<&Path>) -> Self {
        Self { root: root.unwrap_or(Path::new("/")).to_owned() }
    }

    /// A path as it is written for the partition, found below the root.
    pub(super) fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The root, if it is not `/`.
    pub(super) fn root(&self) -> Option<&Path> {
        (self.root != Path::new("/")).then_some(&self.root)
    }

    pub(super) fn table(&self) -> PathBuf {
        self.at(wire::TABLE_FILE)
    }

    pub(super) fn results(&self) -> PathBuf {
        self.at(wire::RESULT_FILE)
    }

    pub(super) fn scripts(&self) -> PathBuf {
        self.at(wire::START_DIR)
    }

    pub(super) fn control(&self, file: &str) -> PathBuf {
        self.at(control::DIRECTORY).join(file)
    }

    /// A program by its possible places.
    pub(super) fn program(&self, name: &str) -> Option<PathBuf> {
        let places = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
        places.iter().map(|place| self.at(place).join(name)).find(|path| path.is_file())
    }
}
