//! A store that becomes larger while its clone is in use.
//!
//! The kernel looks at the size of the store's device each time that it needs another chunk (`persistent_prepare_exception`,
//! `drivers/md/dm-snap-persistent.c`), so a device that has become larger is all that it takes: no table changes, nothing is
//! suspended, nobody waits. That can be done with an image; a device belongs to somebody else.

use std::fs::File;
use std::path::Path;

use super::StorageError;
use super::cow::{self, HIGH_WATER, Watch, cow_sectors};
use super::disk::{Backing, image_bytes};
use super::snapshot::CloneOf;
use super::table::{CHUNK, SnapshotStatus};
use crate::host::linux::block::SECTOR;
use crate::host::linux::dm::Dm;
use crate::host::linux::loopdev;

/// Percent of a store at which it is extended: so far below [`HIGH_WATER`] that a fast writer does not pass both between two looks.
pub const EXTEND_AT: u8 = 60;
/// A store becomes larger by half of itself, and at least by so many bytes.
const LEAST: u64 = 16 << 20;
/// What the host's file system must keep free, as a part of what it has.
const RESERVE: u64 = 20;

/// How full the store of a clone is, after it was extended if that was needed and could be done.
///
/// # Errors
/// As [`cow::status`]. That it could not be extended is no error, and in the log once it matters.
pub fn keep_room(dm: &Dm, of: &CloneOf, extend: bool) -> Result<Watch, StorageError> {
    let level = |status: SnapshotStatus| cow::watch(status, of.sectors, HIGH_WATER);
    let watch = level(cow::status(dm, &of.clone)?);
    let percent = match watch {
        Watch::Below { percent } | Watch::TurnBack { percent } => percent,
        Watch::Ample | Watch::Full | Watch::Lost => return Ok(watch),
    };
    if !extend || percent < EXTEND_AT {
        return Ok(watch);
    }
    match self::extend(of) {
        Ok(Some(bytes)) => {
            tracing::info!(clone = %of.clone, percent, "the store was extended to {} MiB", bytes >> 20);
            Ok(level(cow::status(dm, &of.clone)?))
        }
        Ok(None) => Ok(watch),
        // Asked again and again: it is told when it matters.
        Err(_) if matches!(watch, Watch::Below { .. }) => Ok(watch),
        Err(error) => {
            tracing::warn!(clone = %of.clone, percent, "the store could not be extended: {error}");
            Ok(watch)
        }
    }
}

/// Extends the store of a clone that is in use; its size in bytes then. Nothing if it cannot be extended: it is a device, or
/// the host's file system has no room for more.
///
/// # Errors
/// [`StorageError::Io`], [`StorageError::Loop`]. What has been set aside by then is used the next time.
pub fn extend(of: &CloneOf) -> Result<Option<u64>, StorageError> {
    enlarge(of, |has| has.saturating_add(LEAST.max(has / 2)))
}

/// Makes the store of a clone that is to be made so large that it takes so many chunks; its size in bytes then. Nothing if it is, or
/// cannot be.
///
/// # Errors
/// As [`extend`].
pub fn extend_for(of: &CloneOf, chunks: u64) -> Result<Option<u64>, StorageError> {
    let taken = cow_sectors(chunks.saturating_mul(CHUNK)).saturating_mul(SECTOR);
    enlarge(of, |has| has.max(taken))
}

/// Extends the store of a clone to where it can never fill up, or not at all; its size in bytes then.
///
/// # Errors
/// As [`extend`].
pub fn extend_to_the_end(of: &CloneOf) -> Result<Option<u64>, StorageError> {
    enlarge(of, |_| u64::MAX)
}

fn enlarge(of: &CloneOf, wanted: impl FnOnce(u64) -> u64) -> Result<Option<u64>, StorageError> {
    let Backing::Image(path) = &of.cow else { return Ok(None) };
    let has = image_bytes(path)?;
    let chunk = CHUNK * SECTOR;
    let ample = cow_sectors(of.sectors).saturating_mul(SECTOR);
    let file = loopdev::open_image(path, has)?;
    let device = loopdev::find(&file)?;
    // Whoever extended it the last time was killed before the device followed.
    let mut followed = None;
    if let Some(device) = &device
        && device.device().sectors()?.saturating_mul(SECTOR) < has
    {
        device.grow()?;
        followed = Some(has);
    }
    let wanted = wanted(has).div_ceil(chunk).saturating_mul(chunk).min(ample);
    if wanted <= has || !has_room(path, wanted - has)? {
        return Ok(followed);
    }
    grow(&file, wanted).map_err(StorageError::io("extend", path))?;
    if let Some(device) = device {
        device.grow()?;
    }
    Ok(Some(wanted))
}

fn grow(file: &File, bytes: u64) -> std::io::Result<()> {
    rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
    file.sync_all()
}

/// Whether the file system of an image has so many bytes, and a part of itself beside.
///
/// # Errors
/// [`StorageError::Io`].
pub fn has_room(image: &Path, bytes: u64) -> Result<bool, StorageError> {
    let all = rustix::fs::statvfs(image).map_err(std::io::Error::from);
    let all = all.map_err(StorageError::io("look at the file system of", image))?;
    let [size, free] = [all.f_blocks, all.f_bavail].map(|blocks| blocks.saturating_mul(all.f_frsize));
    Ok(free.saturating_sub(bytes) >= size / RESERVE && free >= bytes)
}
