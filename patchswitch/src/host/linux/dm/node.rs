//! The nodes in `/dev/mapper`, where no udev makes them.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::DmError;
use crate::host::linux::block::DeviceNumber;

const NODES: &str = "/dev/mapper";

/// Makes a node.
pub(super) fn make(path: &Path, device: DeviceNumber) -> Result<(), DmError> {
    create(path, device).map_err(failed("make", path))
}

fn failed<'p>(verb: &'static str, path: &'p Path) -> impl Fn(io::Error) -> DmError + 'p {
    move |source| DmError::Node { verb, path: path.to_owned(), source }
}

pub(super) fn path_of(name: &str) -> PathBuf {
    Path::new(NODES).join(name)
}

pub(super) fn leads_to(path: &Path, device: DeviceNumber) -> bool {
    std::fs::metadata(path)
        .is_ok_and(|data| data.file_type().is_block_device() && data.rdev() == device.to_stat())
}

/// Makes the node at its path, in one step: whoever is killed leaves none under a name that nobody would look for. A wrong
/// one goes first, so that the path leads nowhere for a moment, and never again to a wrong device.
fn create(path: &Path, device: DeviceNumber) -> io::Result<()> {
    let kind = rustix::fs::FileType::BlockDevice;
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let make = || match rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, device.to_stat()) {
        // udev, or another command, was faster.
        Err(rustix::io::Errno::EXIST) if leads_to(path, device) => Ok(()),
        done => done,
    };
    match make() {
        Err(rustix::io::Errno::EXIST) => {
            unlink(path)?;
            Ok(make()?)
        }
        done => Ok(done?),
    }
}

fn unlink(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether the node of a name leads to a device that somebody else has under this name. One that leads to nothing, or to
/// a device of another name that has got the number since, was left by a kill after its device had gone.
pub(super) fn is_of_others(name: &str) -> bool {
    let Ok(device) = DeviceNumber::of_path(&path_of(name)) else { return false };
    match std::fs::read_to_string(device.sysfs().join("dm/name")) {
        Ok(found) => found.trim_end() == name,
        Err(_not_of_device_mapper) => device.sysfs().exists(),
    }
}

pub(super) fn remove(name: &str) -> Result<(), DmError> {
    let path = path_of(name);
    unlink(&path).map_err(failed("remove", &path))
}
