//! A disk copied to another device while it is in use: what the engines [`write_log`](super::write_log) and
//! [`mirror`](super::mirror) have in common.
//!
//! A copy is [`Pristine`] until somebody has had it open to write: only then may blocks of its source be written over it.
//! Whatever boots from it makes it [`Booted`], and there is no way back: a file system that was mounted is destroyed by blocks
//! from another time. So the kind of a copy is a type: the engines give pristine ones away and write to none afterwards, and only a
//! booted one has a path to mount it by.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::FallocateFlags;
use serde::{Deserialize, Serialize};

use super::StorageError;
use super::cut::Turn;
use super::disk::{Attached, Backing, Disk, other_table, remove_half_made};
use super::meter::Mark;
use super::snapshot::{self, WhenBusy};
use super::table::Table;
use crate::host::linux::block::{self, DeviceNumber, SECTOR};
use crate::host::linux::cutter::Mounts;
use crate::host::linux::dm::{Dm, Done};
use crate::host::linux::filesystem::{FileSystem, Kind};

/// So much is read and written at once.
const PIECE: usize = 1 << 20;
/// Where buffers begin, for what goes past the page cache.
const ALIGNED: usize = 4096;
/// How long undo waits for somebody, e.g. udev, to close a device that has just been made.
const CLOSE: Duration = Duration::from_secs(5);

/// A disk to be copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOf {
    /// The device-mapper name of the disk that is in use.
    pub active: String,
    /// The device-mapper name that the copy gets.
    pub copy: String,
    /// What is behind the disk.
    pub origin: Backing,
    /// What is to be behind the copy: as large as the disk, and nobody else's.
    pub target: Backing,
    /// Size of the disk in sectors of 512 bytes.
    pub sectors: u64,
}

/// Nobody has had it open to write.
#[derive(Debug)]
pub enum Pristine {}

/// Somebody has.
#[derive(Debug)]
pub enum Booted {}

/// A copy of a disk as it was at one instant, as a device of its own.
#[derive(Debug)]
pub struct Copy<Kind> {
    of: CopyOf,
    path: PathBuf,
    device: DeviceNumber,
    kind: PhantomData<Kind>,
}

impl<Kind> Copy<Kind> {
    /// What it is a copy of.
    pub fn of(&self) -> &CopyOf {
        &self.of
    }

    /// Its number.
    pub fn device(&self) -> DeviceNumber {
        self.device
    }
}

impl Copy<Pristine> {
    /// Gives it to whoever is to write to it. The path to mount it by is [`Copy::path`].
    pub fn boot(self) -> Copy<Booted> {
        let Self { of, path, device, .. } = self;
        Copy { of, path, device, kind: PhantomData }
    }
}

impl Copy<Booted> {
    /// The path to mount it by.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

/// The instant at which copies were made.
#[derive(Debug)]
pub struct Instantly {
    /// How long writers to the first disk waited.
    pub freeze: Duration,
    /// A moment just before.
    pub before: SystemTime,
    /// The copies, in the order of the request.
    pub copies: Vec<Copy<Pristine>>,
    /// What had been written to each disk, for [`meter::since`](super::meter::since).
    pub marks: Vec<Mark>,
}

/// A disk with what is behind it and behind its copy, all of it checked.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) of: CopyOf,
    pub(super) origin: Attached,
    pub(super) target: Attached,
}

/// Checks a disk and what is to become its copy, before anything is changed.
pub(super) fn check(dm: &Dm, of: &CopyOf, mounts: &Mounts) -> Result<Checked, StorageError> {
    let (origin, target) = (of.origin.attach()?, of.target.attach()?);
    let devices = [(origin.device(), &of.origin), (target.device(), &of.target)];
    refuse_twice([&of.active, &of.copy].into_iter(), devices.into_iter())?;
    let lines = dm.table(&of.active)?;
    if Table::recognise(&lines, of.sectors) != Some(Table::Linear { device: origin.device() }) {
        return Err(other_table(&of.active, &lines, "a linear disk over the origin"));
    }
    if dm.info(&of.copy)?.is_some() {
        return Err(other_table(&of.copy, &dm.table(&of.copy)?, "nothing"));
    }
    let found = target.device().sectors()?;
    if found < of.sectors {
        return Err(StorageError::TooSmall {
            what: of.target.to_string(),
            wanted: of.sectors.saturating_mul(SECTOR),
            short_by: (of.sectors - found).saturating_mul(SECTOR),
        });
    }
    refuse_on_itself(dm, of, &of.target)?;
    can_be_frozen(dm, &of.active, mounts)?;
    block::open_exclusive(target.device())?;
    Ok(Checked { of: of.clone(), origin, target })
}

/// Checks that no disk and no device has two parts in what is to be done.
pub(super) fn refuse_twice<'c>(
    names: impl Iterator<Item = &'c String>,
    devices: impl Iterator<Item = (DeviceNumber, &'c Backing)>,
) -> Result<(), StorageError> {
    let (mut known, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for name in names {
        if !known.insert(name) {
            return Err(StorageError::Twice(name.clone()));
        }
    }
    for (device, backing) in devices {
        if !seen.insert(device) {
            return Err(StorageError::Twice(backing.to_string()));
        }
    }
    Ok(())
}

impl Checked {
    /// Has its table of peace wait for the cut. `wake`: the copy comes alive in the same instant.
    pub(super) fn load(&self, dm: &Dm, wake: bool) -> Result<Turn, StorageError> {
        let table = Table::Linear { device: self.origin.device() };
        dm.load(&self.of.active, &table.lines(self.of.sectors))?;
        let wake = wake.then(|| self.of.copy.clone());
        Ok(Turn { active: self.of.active.clone(), sectors: self.of.sectors, table, wake })
    }

    /// Its names, and its devices with what they are.
    pub(super) fn parts(&self) -> ([&String; 2], [(DeviceNumber, &Backing); 2]) {
        let devices = [(self.origin.device(), &self.of.origin), (self.target.device(), &self.of.target)];
        ([&self.of.active, &self.of.copy], devices)
    }
}

/// What is written because a disk is written must not lie on that disk.
pub(super) fn refuse_on_itself(dm: &Dm, of: &CopyOf, backing: &Backing) -> Result<(), StorageError> {
    let (Backing::Image(path), Some(info)) = (backing, dm.info(&of.active)?) else { return Ok(()) };
    let Some(file_system) = block::file_system_of(path)? else { return Ok(()) };
    if file_system.stack()?.contains(&info.device) {
        return Err(StorageError::OnItself { file: backing.to_string(), device: of.active.clone() });
    }
    Ok(())
}

/// Refuses a disk whose file system would go on writing while the disk is suspended: a btrfs in use of which no mount is given.
pub(super) fn can_be_frozen(dm: &Dm, disk: &str, mounts: &Mounts) -> Result<(), StorageError> {
    let is_used = dm.info(disk)?.is_some_and(|info| info.open_count > 0);
    if !is_used || mounts.contains_key(disk) {
        return Ok(());
    }
    let path = dm.node(disk)?;
    match FileSystem::read(&path).map_err(StorageError::io("read", &path))? {
        Some(FileSystem { kind: Kind::Btrfs, .. }) => Err(StorageError::NotFrozen(disk.to_owned())),
        _ => Ok(()),
    }
}

/// Makes the device of a copy, not in use yet.
pub(super) fn make_waiting(dm: &Dm, disk: &Checked) -> Result<(), StorageError> {
    dm.create(&disk.of.copy)?;
    Ok(dm.load(&disk.of.copy, &Table::Linear { device: disk.target.device() }.lines(disk.of.sectors))?)
}

/// The copy whose device is in use now.
pub(super) fn made(dm: &Dm, disk: &Checked) -> Result<Copy<Pristine>, StorageError> {
    let path = dm.node(&disk.of.copy)?;
    let device = DeviceNumber::of_path(&path)?;
    Ok(Copy { of: disk.of.clone(), path, device, kind: PhantomData })
}

/// Takes everything of a copy away, whatever of it is there: the disk is plain again, the copy's device is gone, and what it had
/// is worth nothing. Right also after a crash. The disk stays in use.
///
/// # Errors
/// [`StorageError`]; the rest is done.
pub fn abandon(dm: &Dm, of: &CopyOf, limit: Duration) -> Result<Done, StorageError> {
    let gone = dm.remove_when_closed(&of.copy, limit).map_err(StorageError::from);
    let plain = without_copy(dm, of);
    let (gone, plain) = (gone?, plain?);
    of.target.detach()?;
    Ok(if [gone, plain].contains(&Done::Changed) { Done::Changed } else { Done::AlreadySo })
}

/// As [`abandon`], also where somebody does not close the copy: it is cut off then, and goes when he does.
///
/// # Errors
/// As [`abandon`].
pub fn cut_off(dm: &Dm, of: &CopyOf, limit: Duration) -> Result<(), StorageError> {
    let mut removed = snapshot::Removed::default();
    let gone = snapshot::remove(dm, &of.copy, of.sectors, limit, WhenBusy::CutOff, &mut removed);
    let plain = without_copy(dm, of);
    gone?;
    let _ = plain?;
    of.target.detach().map(|_| ())
}

/// Takes away a disk that others have a copy of, and that is given up: who has it open is cut off.
///
/// # Errors
/// [`StorageError::Dm`], [`StorageError::Loop`].
pub fn give_up(dm: &Dm, disk: &Disk, limit: Duration) -> Result<(), StorageError> {
    let mut removed = snapshot::Removed::default();
    snapshot::remove(dm, &disk.name, disk.sectors, limit, WhenBusy::CutOff, &mut removed)?;
    disk.backing.detach().map(|_| ())
}

fn without_copy(dm: &Dm, of: &CopyOf) -> Result<Done, StorageError> {
    let origin = of.origin.attach()?;
    plain(dm, &of.active, of.sectors, origin.device())
}

/// Undoes whatever has been done, in reverse, and goes on after errors.
pub(super) fn undo<'c>(dm: &Dm, disks: impl DoubleEndedIterator<Item = &'c Checked>) -> Vec<StorageError> {
    disks.rev().filter_map(|disk| abandon(dm, &disk.of, CLOSE).err()).collect()
}

/// Gives a disk its table of peace again, from that of any engine. Right also if there is no such disk.
pub(super) fn plain(dm: &Dm, name: &str, sectors: u64, origin: DeviceNumber) -> Result<Done, StorageError> {
    remove_half_made(dm, name)?;
    let Some(info) = dm.info(name)? else { return Ok(Done::AlreadySo) };
    if info.inactive {
        dm.clear(name)?;
    }
    if info.suspended {
        dm.resume(name)?;
    }
    let (lines, linear) = (dm.table(name)?, Table::Linear { device: origin });
    match Table::recognise(&lines, sectors) {
        Some(table) if table == linear => Ok(Done::AlreadySo),
        Some(Table::LogWrites { device, .. }) if device == origin => {
            dm.load(name, &linear.lines(sectors))?;
            dm.swap(name)?;
            Ok(Done::Changed)
        }
        Some(Table::Mirror { first: device, .. }) if device == origin => {
            dm.load(name, &linear.lines(sectors))?;
            dm.swap_held(name)?;
            Ok(Done::Changed)
        }
        _ => Err(other_table(name, &lines, "a disk that is being copied")),
    }
}

/// A buffer for what goes past the page cache.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    size: usize,
}

impl Buffer {
    pub(super) fn new() -> Self {
        Self::of(PIECE)
    }

    /// One of so many bytes.
    pub(super) fn of(size: usize) -> Self {
        let bytes = vec![0; size + ALIGNED];
        let start = bytes.as_ptr().align_offset(ALIGNED).min(ALIGNED);
        Self { bytes, start, size }
    }

    /// So many bytes of it, and no more than there are.
    pub(super) fn piece(&mut self, length: u64) -> &mut [u8] {
        let length = usize::try_from(length).unwrap_or(self.size).min(self.size);
        &mut self.bytes[self.start..self.start + length]
    }

    /// The first so many bytes, to be read.
    pub(super) fn filled(&self, length: usize) -> &[u8] {
        &self.bytes[self.start..self.start + length.min(self.size)]
    }
}

/// How a bulk copy went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Bulk {
    /// Bytes of the disk.
    pub bytes: u64,
    /// Of these, zeros, which were made instead of being written.
    pub zeros: u64,
    /// How long it took, in seconds.
    pub seconds: f64,
}

/// Copies a device to another one, past the page cache. `go_on` is asked after each piece with the bytes so far, and may end it.
pub(super) fn bulk(
    disk: &Checked,
    go_on: &mut dyn FnMut(u64) -> Result<(), StorageError>,
) -> Result<Bulk, StorageError> {
    let (from, to) = (block::open_direct(disk.origin.device())?, block::open_direct(disk.target.device())?);
    let (begun, mut buffer) = (Instant::now(), Buffer::new());
    let mut done = Bulk { bytes: 0, zeros: 0, seconds: 0.0 };
    let all = disk.of.sectors.saturating_mul(SECTOR);
    while done.bytes < all {
        let piece = buffer.piece(all - done.bytes);
        let read = from.read_exact_at(piece, done.bytes);
        read.map_err(StorageError::io("read", disk.of.origin.path()))?;
        if piece.iter().all(|byte| *byte == 0) {
            zero(&to, done.bytes, piece.len() as u64)
                .map_err(StorageError::io("clear", disk.of.target.path()))?;
            done.zeros += piece.len() as u64;
        } else {
            let written = to.write_all_at(piece, done.bytes);
            written.map_err(StorageError::io("write", disk.of.target.path()))?;
        }
        done.bytes += piece.len() as u64;
        go_on(done.bytes)?;
    }
    to.sync_all().map_err(StorageError::io("write", disk.of.target.path()))?;
    done.seconds = begun.elapsed().as_secs_f64();
    Ok(done)
}

/// Makes bytes of a device read as zeros, without writing them where the device can do that. It keeps its room: a copy must not
/// find out when it is written that there is none.
pub(super) fn zero(device: &File, at: u64, bytes: u64) -> std::io::Result<()> {
    Ok(rustix::fs::fallocate(device, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, at, bytes)?)
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub at: u64,
    /// How long it is, in bytes.
    pub bytes: u64,
}

/// Where two devices differ, in pieces of 4096 bytes, those that touch joined. Both are read whole, past the page cache.
///
/// # Errors
/// [`StorageError::Io`], [`StorageError::Block`].
pub fn differences(
    one: DeviceNumber,
    other: DeviceNumber,
    sectors: u64,
) -> Result<Vec<Extent>, StorageError> {
    let files = [block::open_direct(one)?, block::open_direct(other)?];
    let mut buffers = [Buffer::new(), Buffer::new()];
    let (all, mut at, mut found) = (sectors.saturating_mul(SECTOR), 0, Vec::new());
    while at < all {
        for ((file, buffer), device) in files.iter().zip(&mut buffers).zip([one, other]) {
            let read = file.read_exact_at(buffer.piece(all - at), at);
            read.map_err(StorageError::io("read", device.sysfs()))?;
        }
        let [one, other] = &mut buffers;
        let (one, other) = (one.piece(all - at), other.piece(all - at));
        for (place, (one, other)) in one.chunks(ALIGNED).zip(other.chunks(ALIGNED)).enumerate() {
            if one != other {
                join(&mut found, Extent { at: at + (place * ALIGNED) as u64, bytes: one.len() as u64 });
            }
        }
        at += one.len() as u64;
    }
    Ok(found)
}

/// Parts of a disk, those that overlap or touch joined: where they begin, and where they end.
#[derive(Debug, Default)]
pub(super) struct Parts(BTreeMap<u64, u64>);

impl Parts {
    pub(super) fn add(&mut self, at: u64, bytes: u64) {
        let (mut from, mut to) = (at, at.saturating_add(bytes));
        while let Some((&begin, &end)) = self.0.range(..=to).next_back()
            && end >= from
        {
            (from, to) = (from.min(begin), to.max(end));
            self.0.remove(&begin);
        }
        self.0.insert(from, to);
    }

    /// Whether one of them has a byte of this.
    pub(super) fn touch(&self, at: u64, bytes: u64) -> bool {
        self.0.range(..at.saturating_add(bytes)).next_back().is_some_and(|(_, end)| *end > at)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Extent> {
        self.0.iter().map(|(at, end)| Extent { at: *at, bytes: end - at })
    }
}

/// Adds a part behind others.
fn join(found: &mut Vec<Extent>, next: Extent) {
    match found.last_mut() {
        Some(last) if last.at + last.bytes == next.at => last.bytes += next.bytes,
        _ => found.push(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_begin_where_they_must() {
        let mut buffer = Buffer::new();
        assert_eq!(buffer.piece(u64::MAX).len(), PIECE);
        assert_eq!(buffer.piece(512).len(), 512);
        assert_eq!(buffer.piece(512).as_ptr() as usize % ALIGNED, 0);
    }

    #[test]
    fn parts_that_overlap_or_touch_are_joined() {
        let mut parts = Parts::default();
        for (at, bytes) in [(100, 10), (120, 10), (110, 5), (300, 1), (90, 45)] {
            parts.add(at, bytes);
        }
        let found: Vec<_> = parts.iter().map(|part| (part.at, part.bytes)).collect();
        assert_eq!(found, [(90, 45), (300, 1)]);
        assert!(
            parts.touch(134, 1) && !parts.touch(135, 165) && parts.touch(135, 166) && parts.touch(0, 1000)
        );
        assert!(!parts.touch(0, 90) && !Parts::default().touch(0, u64::MAX));
    }

    #[test]
    fn parts_that_touch_are_one() {
        let part = |at, bytes| Extent { at, bytes };
        let mut found = Vec::new();
        for next in [part(0, 4096), part(4096, 4096), part(12288, 512)] {
            join(&mut found, next);
        }
        assert_eq!(found, [part(0, 8192), part(12288, 512)]);
    }
}
