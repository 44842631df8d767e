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

/// Makes the node under another name and renames it, so that the path never leads to a wrong device.
fn create(path: &Path, device: DeviceNumber) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    let kind = rustix::fs::FileType::BlockDevice;
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    match rustix::fs::mknodat(rustix::fs::CWD, &temporary, kind, mode, device.to_stat()) {
        Err(rustix::io::Errno::EXIST) => {
            std::fs::remove_file(&temporary)?;
            rustix::fs::mknodat(rustix::fs::CWD, &temporary, kind, mode, device.to_stat())?;
        }
        done => done?,
    }
    std::fs::rename(&temporary, path)
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
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error)),
        _ => Ok(()),
    }
}
