//! The store of a clone: where the chunks are kept in which clone and origin differ.
//!
//! Layout and sizes are the kernel's (`drivers/md/dm-snap-persistent.c`). A store is a row of chunks of
//! [`CHUNK`] sectors: one header, then again and again one metadata chunk and as many data chunks as it has entries.

use std::os::unix::fs::FileExt;

use super::StorageError;
use super::disk::Backing;
use super::table::{CHUNK, Level, SnapshotStatus};
use crate::host::linux::block::{DeviceNumber, SECTOR, open_direct};
use crate::host::linux::dm::Dm;

/// Bytes of an entry of the store's metadata (`struct disk_exception`: two chunk numbers).
const ENTRY: u64 = 16;
/// Entries of a metadata chunk (`exceptions_per_area`).
const ENTRIES: u64 = CHUNK * SECTOR / ENTRY;
/// "SnAp", little-endian (`SNAP_MAGIC`).
const MAGIC: u32 = 0x7041_6e53;
const CHUNK_BYTES: usize = (CHUNK * SECTOR) as usize;

/// Percent of a finite store at which a job turns back. What is left has to last until the clone is discarded.
pub const HIGH_WATER: u8 = 80;

/// The size, in sectors, at which the store of a clone can never fill up.
///
/// With n chunks in the disk, at most n are ever kept, and a metadata chunk has e entries ([`CHUNK`] sectors of 16 bytes each). Data
/// chunk i lies at chunk 2 + i + i/e: after the header and
/// the first metadata chunk, with one more metadata chunk after every e (`area_location`, `skip_metadata`). When
/// entry e·k is written, the metadata chunk that follows it is cleared at once, needed or not
/// (`persistent_commit_exception`); if it lies beyond the end the whole clone becomes invalid. So the store must have
/// 1 header + n data chunks + (n/e rounded down + 1) metadata chunks.
pub const fn cow_sectors(disk_sectors: u64) -> u64 {
    let chunks = disk_sectors.div_ceil(CHUNK);
    (1 + chunks + chunks / ENTRIES + 1).saturating_mul(CHUNK)
}

/// What the first bytes of a store say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// No clone: the kernel makes a new one of it.
    Free,
    /// A clone.
    Valid,
    /// A clone that is lost.
    Invalid,
    /// Neither: something else has been written there, or a clone with other chunks.
    Foreign,
}

impl Header {
    /// Reads a header (`struct disk_header`): magic, valid, version, sectors in a chunk.
    pub fn parse(bytes: &[u8; 16]) -> Self {
        let mut words = [0u32; 4];
        for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*chunk);
        }
        match words {
            [0, ..] => Self::Free,
            [MAGIC, 0, 1, chunk] if u64::from(chunk) == CHUNK => Self::Invalid,
            [MAGIC, _, 1, chunk] if u64::from(chunk) == CHUNK => Self::Valid,
            _ => Self::Foreign,
        }
    }
}

/// One chunk, where direct I/O can use it.
#[repr(align(4096))]
struct Chunk([u8; CHUNK_BYTES]);

impl Chunk {
    fn zeroed() -> Box<Self> {
        Box::new(Self([0; CHUNK_BYTES]))
    }
}

/// Reads the header of a store.
///
/// # Errors
/// [`StorageError`] if the device cannot be read.
pub fn header(cow: DeviceNumber) -> Result<Header, StorageError> {
    let mut chunk = Chunk::zeroed();
    let read = open_direct(cow)?.read_exact_at(&mut chunk.0, 0);
    read.map_err(StorageError::io("read the header of", cow.sysfs()))?;
    let [bytes, ..] = chunk.0.as_chunks::<16>().0 else { return Ok(Header::Foreign) };
    Ok(Header::parse(bytes))
}

/// Makes a store free: the clone in it, if there is one, is gone for good.
///
/// Only for a store that no table refers to.
///
/// # Errors
/// [`StorageError`] if the device is in use or cannot be written.
pub fn wipe(cow: DeviceNumber) -> Result<(), StorageError> {
    // Held for the whole write: no table can take the device meanwhile.
    let _claim = crate::host::linux::block::open_exclusive(cow)?;
    let file = open_direct(cow)?;
    let written = file.write_all_at(&Chunk::zeroed().0, 0).and_then(|()| file.sync_all());
    written.map_err(StorageError::io("clear the header of", cow.sysfs()))
}

/// Checks that a store can never fill up: large enough for everything, and allocated to the last byte.
///
/// # Errors
/// [`StorageError::CowTooSmall`] and [`StorageError::CowNotAllocated`] say by how many bytes it falls short.
pub fn check_room(cow: &Backing, cow_size: u64, disk_sectors: u64) -> Result<(), StorageError> {
    let wanted = cow_sectors(disk_sectors).saturating_mul(SECTOR);
    let found = cow_size.saturating_mul(SECTOR);
    if found < wanted {
        return Err(StorageError::CowTooSmall { cow: cow.to_string(), wanted, short_by: wanted - found });
    }
    let short_by = cow.missing()?;
    if short_by > 0 {
        return Err(StorageError::CowNotAllocated { cow: cow.to_string(), short_by });
    }
    Ok(())
}

/// How full the store of a clone is, by the kernel's account; also of a clone that is being merged.
///
/// # Errors
/// [`StorageError::OtherTable`] if the device is no clone, [`StorageError::Dm`].
pub fn status(dm: &Dm, clone: &str) -> Result<SnapshotStatus, StorageError> {
    let lines = dm.status(clone)?;
    match lines.as_slice() {
        [line] if ["snapshot", "snapshot-merge"].contains(&line.kind.as_str()) => {
            Ok(SnapshotStatus::parse(&line.params)?)
        }
        _ => Err(StorageError::OtherTable {
            name: clone.to_owned(),
            found: lines.iter().map(|line| line.kind.as_str()).collect::<Vec<_>>().join(" "),
            wanted: "a snapshot",
        }),
    }
}

/// How full the store of a clone is.
///
/// # Errors
/// [`StorageError::CloneLost`] if the clone cannot be read or written any more, and as [`status`].
pub fn cow_level(dm: &Dm, clone: &str) -> Result<Level, StorageError> {
    match status(dm, clone)? {
        SnapshotStatus::Valid(level) => Ok(level),
        lost => Err(StorageError::CloneLost { name: clone.to_owned(), status: format!("{lost:?}") }),
    }
}

/// What to do about the store of a clone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// It can never fill up.
    Ample,
    /// It can, and is below the mark.
    Below {
        /// How full it is, in percent, rounded down.
        percent: u8,
    },
    /// It has reached the mark: turn back now.
    TurnBack {
        /// How full it is, in percent, rounded down.
        percent: u8,
    },
    /// It is too late: what the clone has can be read, but it takes no more writes. The old side is untouched.
    Full,
    /// It is too late: the clone can neither be read nor written. The old side is untouched.
    Lost,
}

/// Judges the store of a clone of a disk of so many sectors, with a mark in percent (normally [`HIGH_WATER`]).
pub fn watch(status: SnapshotStatus, disk_sectors: u64, high_water: u8) -> Watch {
    let level = match status {
        SnapshotStatus::Valid(level) => level,
        SnapshotStatus::Overflow => return Watch::Full,
        SnapshotStatus::Invalid | SnapshotStatus::MergeFailed => return Watch::Lost,
    };
    if level.total >= cow_sectors(disk_sectors) {
        return Watch::Ample;
    }
    let percent = match level.total {
        0 => 100,
        total => u128::from(level.allocated) * 100 / u128::from(total),
    };
    let percent = u8::try_from(percent).unwrap_or(u8::MAX);
    if percent >= high_water { Watch::TurnBack { percent } } else { Watch::Below { percent } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The kernel's own bookkeeping, step by step: the last chunk that is touched when a store takes n exceptions.
    fn last_touched(exceptions: u64) -> u64 {
        let area_location = |area: u64| 1 + (ENTRIES + 1) * area;
        let (mut next_free, mut area, mut committed) = (2, 0, 0);
        let mut last = 1; // the header and the first area are written when the store is made
        for _ in 0..exceptions {
            last = last.max(next_free);
            next_free += 1;
            if next_free % (ENTRIES + 1) == 1 {
                next_free += 1;
            }
            committed += 1;
            if committed == ENTRIES {
                last = last.max(area_location(area + 1));
                (area, committed) = (area + 1, 0);
            }
        }
        last
    }

    #[test]
    fn the_formula_is_the_kernels_bookkeeping() {
        for chunks in (0..2100).chain([2 * ENTRIES - 1, 2 * ENTRIES, 2 * ENTRIES + 1]) {
            assert_eq!(cow_sectors(chunks * CHUNK), (last_touched(chunks) + 1) * CHUNK, "{chunks} chunks");
        }
        // A disk that does not end with a chunk has one more, not full.
        assert_eq!(cow_sectors(CHUNK + 1), cow_sectors(2 * CHUNK));
        assert_eq!(cow_sectors(1), 3 * CHUNK);
        // 20 GiB: 0.2 % of metadata.
        assert_eq!(cow_sectors(20 << 21), (20 << 21) + (320 + 2) * CHUNK);
        assert_eq!(cow_sectors(u64::MAX), u64::MAX);
    }

    #[test]
    fn headers_are_told_apart() {
        let bytes = |words: [u32; 4]| {
            let mut bytes = [0; 16];
            for (place, byte) in bytes.iter_mut().zip(words.iter().flat_map(|word| word.to_le_bytes())) {
                *place = byte;
            }
            bytes
        };
        for (words, expected) in [
            ([0, 0, 0, 0], Header::Free),
            ([0, 7, 7, 7], Header::Free), // what the kernel takes for free as well
            ([MAGIC, 1, 1, 64], Header::Valid),
            ([MAGIC, 0, 1, 64], Header::Invalid),
            ([MAGIC, 1, 2, 64], Header::Foreign),
            ([MAGIC, 1, 1, 32], Header::Foreign),
            ([0xdead_beef, 1, 1, 64], Header::Foreign),
        ] {
            assert_eq!(Header::parse(&bytes(words)), expected, "{words:x?}");
        }
        assert_eq!(&MAGIC.to_le_bytes(), b"SnAp");
    }

    #[test]
    fn the_mark_is_reached_exactly() {
        let at = |allocated, total| {
            watch(SnapshotStatus::Valid(Level { allocated, total, metadata: 32 }), 1 << 20, HIGH_WATER)
        };
        assert_eq!(at(799, 1000), Watch::Below { percent: 79 });
        assert_eq!(at(800, 1000), Watch::TurnBack { percent: 80 });
        assert_eq!(at(0, 0), Watch::TurnBack { percent: 100 });
        assert_eq!(at(u64::MAX, 1), Watch::TurnBack { percent: 255 });
        let ample = cow_sectors(1 << 20);
        assert_eq!(at(ample, ample), Watch::Ample);
        assert_eq!(at(ample - 16, ample - 1), Watch::TurnBack { percent: 99 });
        assert_eq!(watch(SnapshotStatus::Overflow, 1 << 20, HIGH_WATER), Watch::Full);
        for lost in [SnapshotStatus::Invalid, SnapshotStatus::MergeFailed] {
            assert_eq!(watch(lost, 1 << 20, HIGH_WATER), Watch::Lost);
        }
    }

    proptest! {
        #[test]
        fn more_in_use_never_looks_better(total in 1u64..1_000_000, a: u32, b: u32, mark in 1u8..=100) {
            let judge = |allocated: u32| {
                let level = Level { allocated: allocated.into(), total, metadata: 0 };
                matches!(watch(SnapshotStatus::Valid(level), u64::MAX / 4096, mark), Watch::TurnBack { .. })
            };
            let (less, more) = (a.min(b), a.max(b));
            prop_assert!(!judge(less) || judge(more));
            prop_assert_eq!(judge(more), u128::from(more) * 100 >= u128::from(total) * u128::from(mark));
        }
    }
}
