//! A file system that is mounted in one namespace goes into another one, and out of it again, while processes run there.
//!
//! The namespace may be a partition's, in which somebody else says what a path means. A mount point is reached without
//! following symbolic links, and what is done is done to what was reached: nothing that is renamed meanwhile changes it.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::{Inside, MountNsError, error};

/// A mount that is in no namespace: it goes with its descriptor unless it is [put somewhere](Inside::graft).
#[derive(Debug)]
pub struct Tree {
    fd: OwnedFd,
}

impl Inside {
    /// A second mount of what is mounted there, with the same flags.
    ///
    /// # Errors
    /// [`MountNsError::Io`].
    pub fn tree(&self, at: &Path) -> Result<Tree, MountNsError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let fd =
            rustix::mount::open_tree(rustix::fs::CWD, at, flags).map_err(error("copy the mount of", at))?;
        Ok(Tree { fd })
    }

    /// Mounts it on a directory of this namespace. That it is there already is fine; whether it was not.
    ///
    /// # Errors
    /// [`MountNsError::Io`], also if a component of the path is a symbolic link.
    pub fn graft(&self, tree: Tree, target: &Path) -> Result<bool, MountNsError> {
        let place = reach(target)?;
        if device_of(&place, target)? == device_of(&tree.fd, target)? {
            return Ok(false);
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&tree.fd, "", &place, "", flags).map_err(error("mount on", target))?;
        Ok(true)
    }

    /// Takes the mount of a file system, by its [number](Inside::number_at), away from a directory of this namespace.
    /// Whoever still uses it keeps the device open until he ends. Something else there, or nothing: nothing to do.
    ///
    /// # Errors
    /// As [`Inside::graft`].
    pub fn prune(&self, number: u64, target: &Path) -> Result<bool, MountNsError> {
        let place = reach(target)?;
        if device_of(&place, target)? != number {
            return Ok(false);
        }
        // A name could come to mean another mount; this directory is the mount itself.
        rustix::process::fchdir(&place).map_err(error("enter", target))?;
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        rustix::mount::unmount(".", flags).map_err(error("unmount", target))?;
        rustix::process::chdir("/").map_err(error("leave", target))?;
        Ok(true)
    }
}

fn reach(target: &Path) -> Result<OwnedFd, MountNsError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(rustix::fs::CWD, target, flags, Mode::empty(), resolve)
        .map_err(error("reach", target))
}

/// The device whose file system is there.
fn device_of(place: &OwnedFd, target: &Path) -> Result<u64, MountNsError> {
    Ok(rustix::fs::fstat(place).map_err(error("look at", target))?.st_dev)
}
