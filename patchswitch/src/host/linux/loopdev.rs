//! Loop devices: a disk image in a regular file, as a block device.
//!
//! Every device is made with `LO_FLAGS_AUTOCLEAR`: the kernel takes it away when its last user closes it. So nothing
//! stays behind when the agent is killed between attaching an image and putting it under device-mapper; once a table
//! refers to the device, the table is the user, and removing the table removes the device. The price is that the
//! [`LoopDevice`] must be held until the table is loaded.
//!
//! Direct I/O is asked for, so that a write is not kept twice in memory and a flush flushes; the kernel leaves it off
//! where the file's file system cannot do it.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::block::{BlockError, DeviceNumber};
use super::dm::Done;
use super::ioctl;

/// Another process may take the device that the kernel has just named as free.
const TRIES: usize = 64;

/// Why an image could not be put behind a loop device.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The file is not one that patchswitch made, or somebody has changed it since.
    #[error("{} {what}: it is not as patchswitch made it and is left alone", path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The file has not the size on record.
    #[error("{} has {found} bytes where {wanted} are on record", path.display())]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Its size by the record, in bytes.
        wanted: u64,
        /// Its size.
        found: u64,
    },
    /// The block device could not be looked at.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// Others were always faster.
    #[error("failed to find a free loop device in {TRIES} tries")]
    NoneFree,
    /// The kernel refused.
    #[error("failed to {verb} {}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A loop device, and one use of it: while this is held the device stays.
#[derive(Debug)]
pub struct LoopDevice {
    device: DeviceNumber,
    handle: File,
}

impl LoopDevice {
    /// Its number, for tables.
    pub fn device(&self) -> DeviceNumber {
        self.device
    }

    /// Follows its file, which has become larger; whoever uses the device goes on.
    ///
    /// # Errors
    /// [`LoopError::Io`].
    pub fn grow(&self) -> Result<(), LoopError> {
        let grown = ioctl::loop_set_capacity(self.handle.as_fd());
        grown.map_err(io_error("extend", &self.device.sysfs()))
    }

    /// Whether reads and writes go past the page cache of the file's file system.
    ///
    /// # Errors
    /// [`LoopError::Io`].
    pub fn is_direct(&self) -> Result<bool, LoopError> {
        let status = ioctl::loop_status(self.handle.as_fd());
        status
            .map(|info| info.flags & ioctl::LOOP_DIRECT_IO != 0)
            .map_err(io_error("look at", &self.device.sysfs()))
    }
}

/// Opens an image, if it is one of ours: a regular file, not a symlink, with one name, that belongs to us and that
/// nobody else may write or read.
///
/// # Errors
/// [`LoopError::NotOurs`], [`LoopError::WrongSize`], [`LoopError::Io`].
pub fn open_image(path: &Path, bytes: u64) -> Result<File, LoopError> {
    // Not blocking: a FIFO in the file's place would hold us for ever.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let opened = File::options().read(true).write(true).custom_flags(flags).open(path);
    let file = opened.map_err(|source| match source.raw_os_error() {
        Some(libc::ELOOP) => LoopError::NotOurs { path: path.to_owned(), what: "is a symbolic link" },
        _ => io_error("open", path)(source),
    })?;
    let data = file.metadata().map_err(io_error("look at", path))?;
    if let Some(what) = fault(&data, rustix::process::geteuid().as_raw()) {
        return Err(LoopError::NotOurs { path: path.to_owned(), what });
    }
    if data.len() != bytes {
        return Err(LoopError::WrongSize { path: path.to_owned(), wanted: bytes, found: data.len() });
    }
    Ok(file)
}

fn fault(data: &Metadata, owner: u32) -> Option<&'static str> {
    if !data.is_file() {
        return Some("is not a regular file");
    }
    if data.uid() != owner {
        return Some("belongs to another user");
    }
    if data.nlink() != 1 {
        return Some("has more than one name");
    }
    (data.mode() & 0o077 != 0).then_some("is open to other users")
}

/// Puts an image of so many bytes behind a loop device, or finds the one it is behind already.
///
/// # Errors
/// [`LoopError`]; the file is checked as in [`open_image`].
pub fn attach(path: &Path, bytes: u64) -> Result<LoopDevice, LoopError> {
    let file = open_image(path, bytes)?;
    if let Some(found) = find(&file)? {
        return Ok(found);
    }
    let control = Path::new("/dev/loop-control");
    let control_file =
        File::options().read(true).write(true).open(control).map_err(io_error("open", control))?;
    let flags = ioctl::LOOP_AUTOCLEAR | ioctl::LOOP_DIRECT_IO;
    for _ in 0..TRIES {
        let number = ioctl::loop_free(control_file.as_fd()).map_err(io_error("ask", control))?;
        let device = device_of(&format!("loop{number}"))?;
        let handle = open_loop(device)?;
        match ioctl::loop_configure(handle.as_fd(), &file, flags, path.as_os_str().as_encoded_bytes()) {
            Ok(()) => return Ok(LoopDevice { device, handle }),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            Err(error) => return Err(io_error("attach", path)(error)),
        }
    }
    Err(LoopError::NoneFree)
}

/// The loop device that shows a whole file, if one does.
///
/// # Errors
/// [`LoopError::Io`] if the file cannot be looked at.
pub fn find(file: &File) -> Result<Option<LoopDevice>, LoopError> {
    let sysfs = Path::new("/sys/block");
    let data = file.metadata().map_err(io_error("look at", Path::new("the image")))?;
    let file_system = DeviceNumber::from_stat(data.dev()).to_kernel();
    for entry in std::fs::read_dir(sysfs).map_err(io_error("read", sysfs))? {
        let entry = entry.map_err(io_error("read", sysfs))?;
        // This directory is there only while something is behind the device.
        if !entry.path().join("loop").is_dir() {
            continue;
        }
        // It may go away between any two of these steps, so an error means "not this one".
        let Ok(device) = device_of(&entry.file_name().to_string_lossy()) else { continue };
        let Ok(handle) = open_loop(device) else { continue };
        let Ok(info) = ioctl::loop_status(handle.as_fd()) else { continue };
        let whole = info.offset == 0 && info.size_limit == 0;
        if whole && info.device == file_system && info.inode == data.ino() {
            return Ok(Some(LoopDevice { device, handle }));
        }
    }
    Ok(None)
}

/// Takes the image away from its loop device: at once, or when the device's last user closes it.
///
/// # Errors
/// [`LoopError`].
pub fn detach(path: &Path, bytes: u64) -> Result<Done, LoopError> {
    let file = open_image(path, bytes)?;
    let Some(found) = find(&file)? else { return Ok(Done::AlreadySo) };
    match ioctl::loop_clear(found.handle.as_fd()) {
        Ok(()) => Ok(Done::Changed),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(Done::AlreadySo),
        Err(error) => Err(io_error("detach", path)(error)),
    }
}

fn device_of(name: &str) -> Result<DeviceNumber, LoopError> {
    let path = Path::new("/sys/block").join(name).join("dev");
    let text = std::fs::read_to_string(&path).map_err(io_error("read", &path))?;
    Ok(text.trim().parse()?)
}

fn open_loop(device: DeviceNumber) -> Result<File, LoopError> {
    let node = device.node()?;
    File::options().read(true).write(true).open(&node).map_err(io_error("open", &node))
}

fn io_error<'p>(verb: &'static str, path: &'p Path) -> impl Fn(io::Error) -> LoopError + 'p {
    move |source| LoopError::Io { verb, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn image(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        path
    }

    #[test]
    fn only_files_as_we_make_them_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let good = image(dir.path(), "good");
        open_image(&good, 1 << 20).unwrap();
        let wrong = open_image(&good, 4096).unwrap_err();
        assert!(matches!(wrong, LoopError::WrongSize { wanted: 4096, found: 1_048_576, .. }), "{wrong}");

        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&good, &link).unwrap();
        let open = image(dir.path(), "open");
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o644)).unwrap();
        let twice = image(dir.path(), "twice");
        std::fs::hard_link(&twice, dir.path().join("again")).unwrap();
        let fifo = dir.path().join("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for (path, expected) in [
            (&link, "is a symbolic link"),
            (&open, "is open to other users"),
            (&twice, "has more than one name"),
            (&fifo, "is not a regular file"),
        ] {
            match open_image(path, 1 << 20) {
                Err(LoopError::NotOurs { what, .. }) => assert_eq!(what, expected),
                other => panic!("{}: {other:?}", path.display()),
            }
        }
    }
}
