//! Block devices as sysfs shows them: numbers, sizes, and what lies beneath what.
//!
//! Everything here reads `/sys/dev/block` (kernel `Documentation/admin-guide/sysfs-rules.rst`); nothing is changed.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The unit of every size and offset of the block layer, in bytes, whatever the device's own blocks are.
pub const SECTOR: u64 = 512;
/// Devices that one device can stand on, directly or not. A guard against a loop in what sysfs says.
const STACK_LIMIT: usize = 256;

/// The number of a block device, as the kernel's tables write it: `major:minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u32,
    /// Which of the driver's devices.
    pub minor: u32,
}

/// Why a block device could not be read or opened.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The text is not `major:minor`.
    #[error("{0:?} is not a device number (major:minor)")]
    BadNumber(String),
    /// The path leads to something else.
    #[error("{} is not a block device", .0.display())]
    NotBlock(PathBuf),
    /// Mounted, or claimed by a driver such as device-mapper.
    #[error("{} is in use (mounted or held by another device; see lsblk)", .0.display())]
    Busy(PathBuf),
    /// sysfs names no device node, or the node is another device.
    #[error("no device node leads to block device {0}")]
    NoNode(DeviceNumber),
    /// What sysfs said is not what it should say.
    #[error("{} reads {text:?}", path.display())]
    Malformed {
        /// The file that was read.
        path: PathBuf,
        /// Its content.
        text: String,
    },
    /// The kernel refused.
    #[error("failed to read {}", path.display())]
    Io {
        /// The file or device.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl BlockError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

impl DeviceNumber {
    /// The number in a `dev_t` of `stat`.
    pub fn from_stat(dev: u64) -> Self {
        Self { major: rustix::fs::major(dev), minor: rustix::fs::minor(dev) }
    }

    /// The number as `stat` has it.
    pub fn to_stat(self) -> u64 {
        rustix::fs::makedev(self.major, self.minor)
    }

    /// Reads the kernel's 64-bit form (`huge_encode_dev`, `include/linux/kdev_t.h`): 12 bits of major between the
    /// low 8 and the high bits of minor.
    pub fn from_kernel(dev: u64) -> Self {
        let low = u32::try_from(dev & 0xffff_ffff).unwrap_or_default();
        Self { major: (low >> 8) & 0xfff, minor: (low & 0xff) | ((low >> 12) & 0xf_ff00) }
    }

    /// The number in the kernel's 64-bit form, the reverse of [`Self::from_kernel`].
    pub fn to_kernel(self) -> u64 {
        u64::from((self.minor & 0xff) | ((self.major & 0xfff) << 8) | ((self.minor & 0xf_ff00) << 12))
    }

    /// The device that a path leads to, through symlinks (`/dev/mapper` and `/dev/disk` are full of them).
    ///
    /// # Errors
    /// [`BlockError::NotBlock`], or [`BlockError::Io`] if the path cannot be looked up.
    pub fn of_path(path: &Path) -> Result<Self, BlockError> {
        let data = std::fs::metadata(path).map_err(BlockError::io(path))?;
        if !data.file_type().is_block_device() {
            return Err(BlockError::NotBlock(path.to_owned()));
        }
        Ok(Self::from_stat(data.rdev()))
    }

    /// The size in sectors of 512 bytes.
    ///
    /// # Errors
    /// [`BlockError`] if there is no such device.
    pub fn sectors(self) -> Result<u64, BlockError> {
        let path = self.sysfs().join("size");
        let text = std::fs::read_to_string(&path).map_err(BlockError::io(&path))?;
        text.trim()
            .parse()
            .map_err(|_not_a_number: std::num::ParseIntError| BlockError::Malformed { path, text })
    }

    /// The device's directory in sysfs (a symlink).
    pub fn sysfs(self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/block/{self}"))
    }

    /// Whether it is a device that its maker keeps to himself, as ours and the inner ones of LVM and Stratis are. The system's
    /// own tools show nothing of what is on such a device (`sysfs_devno_is_dm_private` of util-linux), so that from "nothing"
    /// nothing follows.
    pub fn is_private(self) -> bool {
        let uuid = std::fs::read_to_string(self.sysfs().join("dm/uuid")).unwrap_or_default();
        let layer = uuid.trim().strip_prefix("LVM-").and_then(|rest| rest.rsplit_once('-'));
        uuid.starts_with("stratis-1-private") || layer.is_some_and(|(_, layer)| !layer.is_empty())
    }

    /// The node that devtmpfs keeps for the device; needs no udev.
    ///
    /// # Errors
    /// [`BlockError::NoNode`] if there is none or it is another device's.
    pub fn node(self) -> Result<PathBuf, BlockError> {
        let path = self.sysfs().join("uevent");
        let text = std::fs::read_to_string(&path).map_err(BlockError::io(&path))?;
        let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let node = name.map(|name| Path::new("/dev").join(name)).ok_or(BlockError::NoNode(self))?;
        match Self::of_path(&node) {
            Ok(number) if number == self => Ok(node),
            _ => Err(BlockError::NoNode(self)),
        }
    }

    /// Every device that this one stands on: partitions on their disk, device-mapper and md on their parts, a loop
    /// device on the file system of its file. The device itself is in the set.
    ///
    /// # Errors
    /// [`BlockError`] if sysfs cannot be read.
    pub fn stack(self) -> Result<BTreeSet<Self>, BlockError> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![self];
        while let Some(device) = todo.pop() {
            if seen.len() < STACK_LIMIT && seen.insert(device) {
                todo.extend(device.directly_below()?);
            }
        }
        Ok(seen)
    }

    fn directly_below(self) -> Result<Vec<Self>, BlockError> {
        let sysfs = self.sysfs();
        let mut below = Vec::new();
        let slaves = sysfs.join("slaves");
        if slaves.is_dir() {
            for entry in std::fs::read_dir(&slaves).map_err(BlockError::io(&slaves))? {
                let path = entry.map_err(BlockError::io(&slaves))?.path().join("dev");
                below.push(read_number(&path)?);
            }
        }
        if sysfs.join("partition").exists() {
            below.push(read_number(&sysfs.join("../dev"))?);
        }
        let backing = sysfs.join("loop/backing_file");
        if let Ok(text) = std::fs::read_to_string(&backing) {
            // A file that was deleted, or lies in another mount namespace, cannot be followed from here.
            below.extend(file_system_of(Path::new(text.trim_end_matches('\n'))).ok().flatten());
        }
        Ok(below)
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl std::str::FromStr for DeviceNumber {
    type Err = BlockError;

    fn from_str(text: &str) -> Result<Self, BlockError> {
        let parse = || {
            let (major, minor) = text.split_once(':')?;
            Some(Self { major: number(major)?, minor: number(minor)? })
        };
        parse().ok_or_else(|| BlockError::BadNumber(text.to_owned()))
    }
}

/// Digits only: `parse` alone would take a sign as well.
fn number(text: &str) -> Option<u32> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn read_number(path: &Path) -> Result<DeviceNumber, BlockError> {
    std::fs::read_to_string(path).map_err(BlockError::io(path))?.trim().parse()
}

/// What has been written to a device since it was made, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Sectors written.
    pub sectors: u64,
    /// Sectors given up by discard.
    pub discarded: u64,
}

impl Written {
    /// Reads the content of a device's `stat` file (kernel `Documentation/block/stat.rst`). Allocates nothing.
    pub fn parse(stat: &[u8]) -> Option<Self> {
        let mut fields = stat.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
        let mut next = |skip| std::str::from_utf8(fields.nth(skip)?).ok()?.parse().ok();
        Some(Self { sectors: next(6)?, discarded: next(6)? })
    }
}

/// The block device that holds the file system of a file, if one does.
///
/// Most file systems have their device's number in `st_dev`; btrfs and overlayfs have an anonymous one, so the mount
/// table is asked for their source.
///
/// # Errors
/// [`BlockError::Io`] if the file or the mount table cannot be read.
pub fn file_system_of(file: &Path) -> Result<Option<DeviceNumber>, BlockError> {
    let data = std::fs::metadata(file).map_err(BlockError::io(file))?;
    let device = DeviceNumber::from_stat(data.dev());
    if device.sysfs().exists() {
        return Ok(Some(device));
    }
    let path = Path::new("/proc/self/mountinfo");
    let text = std::fs::read_to_string(path).map_err(BlockError::io(path))?;
    Ok(mount_source(&text, device).and_then(|source| DeviceNumber::of_path(&source).ok()))
}

/// Finds the source of the mount with this device number in the text of a `mountinfo` (`proc_pid_mountinfo(5)`).
fn mount_source(mountinfo: &str, device: DeviceNumber) -> Option<PathBuf> {
    let wanted = device.to_string();
    mountinfo.lines().find_map(|line| {
        let (fields, rest) = line.split_once(" - ")?;
        (fields.split(' ').nth(2)? == wanted).then_some(())?;
        Some(PathBuf::from(rest.split(' ').nth(1)?))
    })
}

/// A block device, opened so that nobody else can mount or claim it while the file is open.
///
/// # Errors
/// [`BlockError::Busy`] if it is mounted or claimed already, [`BlockError::NoNode`], [`BlockError::Io`].
pub fn open_exclusive(device: DeviceNumber) -> Result<File, BlockError> {
    open(device, libc::O_EXCL)
}

/// A block device, opened past the page cache: what is read is on the device, and what was written is there when the
/// file has been synced. Buffers must be aligned to 4096 bytes.
///
/// # Errors
/// [`BlockError::NoNode`], [`BlockError::Io`].
pub fn open_direct(device: DeviceNumber) -> Result<File, BlockError> {
    open(device, libc::O_DIRECT)
}

fn open(device: DeviceNumber, flags: i32) -> Result<File, BlockError> {
    let node = device.node()?;
    let opened = File::options().read(true).write(true).custom_flags(flags).open(&node);
    let file = opened.map_err(|source| match source.kind() {
        io::ErrorKind::ResourceBusy => BlockError::Busy(node.clone()),
        _ => BlockError::Io { path: node.clone(), source },
    })?;
    let data = file.metadata().map_err(BlockError::io(&node))?;
    // The node may have been replaced since it was looked up.
    if !data.file_type().is_block_device() || DeviceNumber::from_stat(data.rdev()) != device {
        return Err(BlockError::NoNode(device));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_digits_and_one_colon() {
        assert_eq!("254:3".parse::<DeviceNumber>().unwrap(), DeviceNumber { major: 254, minor: 3 });
        for bad in ["", ":", "1", "1:", ":1", "+1:2", "1:-2", "1:2:3", "1:99999999999", " 1:2", "a:b"] {
            assert!(bad.parse::<DeviceNumber>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn kernel_and_stat_forms_are_reversible(major in 0u32..4096, minor in 0u32..(1 << 20)) {
            let number = DeviceNumber { major, minor };
            prop_assert_eq!(DeviceNumber::from_kernel(number.to_kernel()), number);
            prop_assert_eq!(DeviceNumber::from_stat(number.to_stat()), number);
            prop_assert_eq!(number.to_string().parse::<DeviceNumber>().unwrap(), number);
        }
    }

    #[test]
    fn written_sectors_are_the_seventh_field_and_discarded_ones_the_fourteenth() {
        let stat = b"     446    0    14214   12  5 6 77 8 0 9 10 11 12 1300 14 15 16\n";
        assert_eq!(Written::parse(stat), Some(Written { sectors: 77, discarded: 1300 }));
        for bad in
            [&b""[..], b"1 2 3 4 5 6 7 8 9 10 11 12 13", b"1 2 3 4 5 6 x 8 9 10 11 12 13 14", &[0xff; 40]]
        {
            assert_eq!(Written::parse(bad), None);
        }
    }

    #[test]
    fn a_mount_is_found_by_its_number() {
        let text = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                    37 35 0:45 / /data rw - btrfs /dev/mapper/ps-a-data rw\nbroken line\n";
        let at = |major, minor| mount_source(text, DeviceNumber { major, minor });
        assert_eq!(at(0, 45), Some(PathBuf::from("/dev/mapper/ps-a-data")));
        assert_eq!(at(98, 0), Some(PathBuf::from("/dev/root")));
        assert_eq!(at(1, 1), None);
    }

    #[test]
    fn a_file_is_no_block_device() {
        let error = DeviceNumber::of_path(Path::new("/proc/self/exe")).unwrap_err();
        assert!(matches!(error, BlockError::NotBlock(_)), "{error}");
    }
}
