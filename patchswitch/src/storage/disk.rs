//! A disk of a partition: a device-mapper device over an image file or a block device.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::StorageError;
use super::copy;
use super::table::Table;
use crate::host::linux::block::{self, DeviceNumber, SECTOR};
use crate::host::linux::dm::{Dm, Done, Target};
use crate::host::linux::loopdev::{self, LoopDevice};

/// What is behind a disk, or what a clone is stored in. This is what the store of the agent keeps: paths outlive a
/// reboot, numbers do not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// A regular file that patchswitch made.
    Image(PathBuf),
    /// A block device of the administrator's.
    Device(PathBuf),
}

/// A disk of a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its device-mapper name, from [`names::dm_disk`](crate::names::dm_disk).
    pub name: String,
    /// What is behind it.
    pub backing: Backing,
    /// Its size in sectors of 512 bytes. What is behind it may be larger.
    pub sectors: u64,
}

/// Whether a new image takes its room from the host's file system at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// All of it: the image can always be written. A must for the store of a clone.
    Allocated,
    /// Only as it is written.
    Sparse,
}

/// What is behind a disk, as a block device. Held until a table refers to it: a loop device goes with its last user.
#[derive(Debug)]
pub struct Attached {
    device: DeviceNumber,
    _loop: Option<LoopDevice>,
}

impl Attached {
    /// Its number, for tables.
    pub fn device(&self) -> DeviceNumber {
        self.device
    }
}

/// A disk that can be opened and mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Active {
    /// Its number.
    pub device: DeviceNumber,
    /// The path to mount it by.
    pub path: PathBuf,
    /// Whether it was active before.
    pub done: Done,
}

impl Backing {
    /// Its path.
    pub fn path(&self) -> &Path {
        match self {
            Self::Image(path) | Self::Device(path) => path,
        }
    }

    /// Its size, in whole sectors of 512 bytes.
    ///
    /// # Errors
    /// [`StorageError::Io`] or [`StorageError::Block`].
    pub fn sectors(&self) -> Result<u64, StorageError> {
        match self {
            Self::Image(path) => Ok(image_bytes(path)? / SECTOR),
            Self::Device(path) => Ok(DeviceNumber::of_path(path)?.sectors()?),
        }
    }

    /// Makes a block device of it; a device is one already.
    ///
    /// # Errors
    /// [`StorageError::Loop`] if the image is not one of ours, [`StorageError::Block`].
    pub fn attach(&self) -> Result<Attached, StorageError> {
        match self {
            Self::Image(path) => {
                let found = loopdev::attach(path, image_bytes(path)?)?;
                Ok(Attached { device: found.device(), _loop: Some(found) })
            }
            Self::Device(path) => Ok(Attached { device: DeviceNumber::of_path(path)?, _loop: None }),
        }
    }

    /// Takes the loop device of an image away, at once or when its last user closes it.
    ///
    /// # Errors
    /// [`StorageError::Loop`].
    pub fn detach(&self) -> Result<Done, StorageError> {
        match self {
            Self::Image(path) if path.exists() => Ok(loopdev::detach(path, image_bytes(path)?)?),
            Self::Image(_) | Self::Device(_) => Ok(Done::AlreadySo),
        }
    }

    /// How many bytes of it the host's file system has not set aside; 0 for a device.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn missing(&self) -> Result<u64, StorageError> {
        match self {
            Self::Device(_) => Ok(0),
            Self::Image(path) => {
                let data = std::fs::metadata(path).map_err(StorageError::io("look at", path))?;
                Ok(missing(data.len(), data.blocks()))
            }
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path().display().fmt(f)
    }
}

/// The blocks are of 512 bytes, whatever the file system's are, and count what is set aside but not yet written. They
/// may include a few of the file system's own for a file in many pieces.
fn missing(bytes: u64, blocks: u64) -> u64 {
    bytes.saturating_sub(blocks.saturating_mul(512))
}

pub(super) fn image_bytes(path: &Path) -> Result<u64, StorageError> {
    let data = std::fs::symlink_metadata(path).map_err(StorageError::io("look at", path))?;
    Ok(data.len())
}

/// Makes an image of so many sectors, or finds it made.
///
/// It appears under its name only when it is complete and on disk.
///
/// # Errors
/// [`StorageError::Loop`] if something else has the name, [`StorageError::Io`], e.g. if the room is not there.
pub fn create_image(path: &Path, sectors: u64, room: Room) -> Result<Done, StorageError> {
    let bytes = sectors.saturating_mul(SECTOR);
    if std::fs::symlink_metadata(path).is_ok() {
        let file = loopdev::open_image(path, bytes)?;
        let data = file.metadata().map_err(StorageError::io("look at", path))?;
        if room == Room::Sparse || missing(bytes, data.blocks()) == 0 {
            return Ok(Done::AlreadySo);
        }
        allocate(&file, bytes, room).map_err(StorageError::io("allocate", path))?;
        return Ok(Done::Changed);
    }
    let (folder, Some(part)) = (path.parent().unwrap_or(Path::new("/")), part(path)) else {
        return Err(StorageError::io("create", path)(io::ErrorKind::InvalidInput.into()));
    };
    // One that was left behind by a crash.
    std::fs::remove_file(&part).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(StorageError::io("remove", &part)(error)),
    })?;
    let made = make(&part, bytes, room).and_then(|()| rename_new(&part, path)).and_then(|()| sync(folder));
    if made.is_err() {
        // The room of half an image is wanted back; the error that matters is the first.
        std::fs::remove_file(&part).ok();
    }
    made.map(|()| Done::Changed).map_err(StorageError::io("create", path))
}

/// Removes an image, and what a crash left of the making of it. Not there: nothing to do.
///
/// # Errors
/// [`StorageError::Io`].
pub fn remove_image(path: &Path) -> Result<(), StorageError> {
    for file in part(path).into_iter().chain([path.to_owned()]) {
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StorageError::io("remove", &file)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The name of an image while it is made.
fn part(path: &Path) -> Option<PathBuf> {
    let mut part = std::ffi::OsString::from(".");
    part.push(path.file_name()?);
    part.push(".part");
    Some(path.with_file_name(part))
}

fn make(path: &Path, bytes: u64, room: Room) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW;
    let file =
        File::options().read(true).write(true).create_new(true).mode(0o600).custom_flags(flags).open(path)?;
    allocate(&file, bytes, room)?;
    file.sync_all()
}

fn allocate(file: &File, bytes: u64, room: Room) -> io::Result<()> {
    match room {
        Room::Sparse => file.set_len(bytes),
        Room::Allocated => {
            rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
            file.sync_all()
        }
    }
}

/// Renames without ever replacing anything.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let (cwd, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::NOREPLACE);
    Ok(rustix::fs::renameat_with(cwd, from, cwd, to, flags)?)
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Activates a disk: a linear device over what is behind it. Right also if it is active, also while it has a clone.
///
/// A device that a broken cut has left suspended is resumed.
///
/// # Errors
/// [`StorageError::HostRoot`], [`StorageError::Block`] if what is behind it is mounted or held,
/// [`StorageError::TooSmall`], [`StorageError::OtherTable`] if the name belongs to something else.
pub fn activate(dm: &Dm, disk: &Disk) -> Result<Active, StorageError> {
    let attached = disk.backing.attach()?;
    check_size(disk, attached.device)?;
    let done = match dm.info(&disk.name)? {
        Some(info) if info.live => adopt(dm, disk, &attached)?,
        _ => {
            remove_half_made(dm, &disk.name)?;
            refuse_in_use(&disk.backing, attached.device)?;
            make_linear(dm, disk, attached.device)?
        }
    };
    let path = dm.node(&disk.name)?;
    Ok(Active { device: DeviceNumber::of_path(&path)?, path, done })
}

/// Deactivates a disk, when nobody has had it open for a moment. Right also if it is not active.
///
/// # Errors
/// [`StorageError::Dm`] with [`DmError::Busy`](crate::host::linux::dm::DmError::Busy) at the end of the time.
pub fn deactivate(dm: &Dm, disk: &Disk, limit: Duration) -> Result<Done, StorageError> {
    let done = dm.remove_when_closed(&disk.name, limit)?;
    disk.backing.detach()?;
    Ok(done)
}

fn check_size(disk: &Disk, device: DeviceNumber) -> Result<(), StorageError> {
    let found = device.sectors()?;
    if found >= disk.sectors {
        return Ok(());
    }
    let short_by = (disk.sectors - found).saturating_mul(SECTOR);
    let wanted = disk.sectors.saturating_mul(SECTOR);
    Err(StorageError::TooSmall { what: disk.backing.to_string(), wanted, short_by })
}

/// The number of a block device, by its path.
///
/// # Errors
/// [`StorageError::Block`] if it is none, or not there.
pub fn number(device: &Path) -> Result<DeviceNumber, StorageError> {
    Ok(DeviceNumber::of_path(device)?)
}

/// Checks what is to be behind a disk that is not there yet: large enough, and nobody's.
///
/// # Errors
/// [`StorageError::TooSmall`], [`StorageError::HostRoot`], [`StorageError::Block`] if it is in use.
pub fn check_free(disk: &Disk) -> Result<(), StorageError> {
    let attached = disk.backing.attach()?;
    check_size(disk, attached.device)?;
    refuse_in_use(&disk.backing, attached.device)
}

/// Refuses what belongs to the host or to anybody else.
fn refuse_in_use(backing: &Backing, device: DeviceNumber) -> Result<(), StorageError> {
    let root = block::file_system_of(Path::new("/"))?;
    let below_root = root.map(DeviceNumber::stack).transpose()?.unwrap_or_default();
    if below_root.contains(&device) {
        return Err(StorageError::HostRoot { what: backing.to_string() });
    }
    block::open_exclusive(device)?;
    Ok(())
}

/// Removes a device of which only the beginning is there: whoever made it was killed before its table was in use. Nobody can
/// have it open, but the table that waits holds what it names. Others stay.
pub(super) fn remove_half_made(dm: &Dm, name: &str) -> Result<(), StorageError> {
    if dm.info(name)?.is_some_and(|info| !info.live) {
        let _ = dm.remove(name)?;
    }
    Ok(())
}

/// Recognises the disk in a device of its name.
fn adopt(dm: &Dm, disk: &Disk, attached: &Attached) -> Result<Done, StorageError> {
    let lines = dm.table(&disk.name)?;
    match Table::recognise(&lines, disk.sectors) {
        Some(Table::Linear { device } | Table::Origin { device }) if device == attached.device => {}
        // Somebody who was killed was copying it: nobody will go on with that.
        Some(Table::LogWrites { device, .. } | Table::Mirror { first: device, .. })
            if device == attached.device =>
        {
            return copy::plain(dm, &disk.name, disk.sectors, device);
        }
        _ => return Err(other_table(&disk.name, &lines, "this disk")),
    }
    wake(dm, &disk.name)
}

/// Lets a device go on that whoever was killed has left suspended; the table that waits is not taken.
///
/// # Errors
/// [`StorageError::Dm`].
pub fn wake(dm: &Dm, name: &str) -> Result<Done, StorageError> {
    match dm.info(name)? {
        Some(info) if info.live && info.suspended => {
            dm.clear(name)?;
            dm.resume(name)?;
            Ok(Done::Changed)
        }
        _ => Ok(Done::AlreadySo),
    }
}

fn make_linear(dm: &Dm, disk: &Disk, device: DeviceNumber) -> Result<Done, StorageError> {
    dm.create(&disk.name)?;
    let table = Table::Linear { device }.lines(disk.sectors);
    let made = dm.load(&disk.name, &table).and_then(|()| dm.resume(&disk.name));
    if let Err(error) = made {
        // Without a table nobody can have it open.
        if let Err(left) = dm.remove(&disk.name) {
            tracing::warn!(name = %disk.name, error = %left, "failed to remove a device without a table");
        }
        return Err(error.into());
    }
    Ok(Done::Changed)
}

pub(super) fn other_table(name: &str, lines: &[Target], wanted: &'static str) -> StorageError {
    let text = |line: &Target| format!("{} {} {} {}", line.start, line.sectors, line.kind, line.params);
    let found = lines.iter().map(text).collect::<Vec<_>>().join(", ");
    StorageError::OtherTable { name: name.to_owned(), found, wanted }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::linux::loopdev::LoopError;

    #[test]
    fn an_image_is_made_once_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        assert_eq!(create_image(&path, 64, Room::Sparse).unwrap(), Done::Changed);
        assert_eq!(create_image(&path, 64, Room::Sparse).unwrap(), Done::AlreadySo);
        let data = std::fs::metadata(&path).unwrap();
        assert_eq!((data.len(), data.mode() & 0o7777), (32768, 0o600));
        let image = Backing::Image(path.clone());
        assert_eq!(image.missing().unwrap(), 32768);
        assert_eq!(create_image(&path, 64, Room::Allocated).unwrap(), Done::Changed);
        assert_eq!(image.missing().unwrap(), 0);
        assert_eq!(create_image(&path, 64, Room::Allocated).unwrap(), Done::AlreadySo);
        let error = create_image(&path, 65, Room::Sparse).unwrap_err();
        assert!(matches!(error, StorageError::Loop(LoopError::WrongSize { .. })), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left in the folder");
    }

    #[test]
    fn half_an_image_is_made_anew_and_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(dir.path().join(".disk.part"), "left by a crash").unwrap();
        create_image(&path, 8, Room::Allocated).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![0; 4096]);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/nowhere", &link).unwrap();
        let error = create_image(&link, 8, Room::Sparse).unwrap_err();
        assert!(matches!(error, StorageError::Loop(LoopError::NotOurs { .. })), "{error}");
    }

    #[test]
    fn an_image_without_room_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        // More than any file system here has.
        let error = create_image(&path, 1 << 42, Room::Allocated).unwrap_err();
        assert!(matches!(error, StorageError::Io { verb: "create", .. }), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_size_missing_is_exact() {
        for (bytes, blocks, expected) in [(4096, 8, 0), (4096, 7, 512), (4096, 0, 4096), (4096, 16, 0)] {
            assert_eq!(missing(bytes, blocks), expected);
        }
    }

    #[test]
    fn the_hosts_root_is_refused() {
        let Some(root) = block::file_system_of(Path::new("/")).unwrap() else { return };
        let backing = Backing::Device(root.sysfs());
        let error = refuse_in_use(&backing, root).unwrap_err();
        assert!(matches!(error, StorageError::HostRoot { .. }), "{error}");
    }
}
