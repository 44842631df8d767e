//! What `dm-log-writes` has written to its log, and what of it is a record of what (`drivers/md/dm-log-writes.c`).
//!
//! ```text
//!  sector 0: magic, version, number of entries, size of a sector        all numbers little-endian
//!  sector n: entry: sector, sectors, flags, length of its data          a mark has its text behind that, in the same sector
//!  sector n + 1 …: what was written; nothing for a discard or a mark
//! ```
//!
//! Pure: it is read elsewhere. A log is the kernel's, on a device that may have been somebody else's before: nothing in it is
//! believed that would lead out of it.

use serde::Serialize;

/// `WRITE_LOG_MAGIC`.
const MAGIC: u64 = 0x006a_7366_7773_6872;
/// `WRITE_LOG_VERSION`.
const VERSION: u64 = 1;
/// Size of the structure at the beginning, in bytes.
pub const SUPER: usize = 28;
/// Size of the structure of an entry, in bytes.
pub const ENTRY: usize = 32;

const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
/// The text of the mark that the kernel makes when it has recorded everything (`log_writes_dtr`).
pub const END: &str = "dm-log-writes-end";
/// What the text of each of our marks begins with; behind the last colon is the time, in nanoseconds since the boot. It is one
/// word: the kernel takes no mark of two.
pub const OURS: &str = "patchswitch:";

/// Bytes that are no log, or a log that ends before its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLog {
    /// It does not begin like one.
    #[error("it is no log of dm-log-writes")]
    NotALog,
    /// Made by another version of the driver.
    #[error("its version is {0}, known is {VERSION}")]
    Version(u64),
    /// The size of its sectors is none.
    #[error("its sectors have {0} bytes")]
    SectorSize(u32),
    /// An entry that cannot be: what it says leads out of everything.
    #[error("entry {0} makes no sense")]
    Entry(u64),
    /// The device is at its end before the log is.
    #[error("it ends within entry {0}")]
    Short(u64),
}

/// The beginning of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Super {
    /// How many entries there are, of those that had been written when this was.
    pub entries: u64,
    /// Bytes of a sector, in which everything else is counted.
    pub sector: u32,
}

impl Super {
    /// Reads it.
    ///
    /// # Errors
    /// [`BadLog`].
    pub fn parse(bytes: &[u8]) -> Result<Self, BadLog> {
        let (magic, version) = (u64_at(bytes, 0), u64_at(bytes, 8));
        let sector =
            bytes.get(24..28).and_then(|field| field.first_chunk()).map(|field| u32::from_le_bytes(*field));
        let (Some(magic), Some(version), Some(entries), Some(sector)) =
            (magic, version, u64_at(bytes, 16), sector)
        else {
            return Err(BadLog::NotALog);
        };
        if magic != MAGIC {
            return Err(BadLog::NotALog);
        }
        if version != VERSION {
            return Err(BadLog::Version(version));
        }
        if !sector.is_power_of_two() || !(512..=65536).contains(&sector) {
            return Err(BadLog::SectorSize(sector));
        }
        Ok(Self { entries, sector })
    }
}

/// What was recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum What {
    /// Data was written.
    Write {
        /// Where, in bytes of the device that was written.
        at: u64,
        /// How many.
        bytes: u64,
        /// Whether it was on disk at once (`REQ_FUA`). Such a record does not wait for a flush as others do, and so comes before
        /// records of what was written before it.
        at_once: bool,
    },
    /// Data was given up.
    Discard {
        /// Where, in bytes of the device.
        at: u64,
        /// How many.
        bytes: u64,
    },
    /// Everything before was on disk.
    Flush,
    /// Somebody wanted it to be remembered that he was here.
    Mark {
        /// What he said.
        text: String,
    },
}

impl What {
    /// The time of a mark of ours, in nanoseconds since the boot.
    pub fn time_ns(&self) -> Option<u64> {
        match self {
            Self::Mark { text } => text.strip_prefix(OURS)?.split(':').next_back()?.parse().ok(),
            _ => None,
        }
    }
}

/// An entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What was recorded.
    pub what: What,
    /// Where its data are in the log, in bytes.
    pub data: u64,
    /// Where the next entry is.
    pub next: u64,
}

impl Entry {
    /// Reads the entry with a number, of which the sector at `at` was read; all in bytes of the log.
    ///
    /// # Errors
    /// [`BadLog::Entry`], [`BadLog::Short`].
    pub fn parse(bytes: &[u8], sector: u32, (number, at): (u64, u64)) -> Result<Self, BadLog> {
        let field = |index: usize| u64_at(bytes, index * 8).ok_or(BadLog::Short(number));
        let (start, sectors, flags, length) = (field(0)?, field(1)?, field(2)?, field(3)?);
        let wrong = || BadLog::Entry(number);
        let unit = u64::from(sector);
        let size = sectors.checked_mul(unit).ok_or_else(wrong)?;
        let place = start.checked_mul(unit).ok_or_else(wrong)?;
        let _ = place.checked_add(size).ok_or_else(wrong)?;
        let data = at.checked_add(unit).ok_or_else(wrong)?;
        if flags & MARK != 0 {
            let text = usize::try_from(length).ok().and_then(|length| bytes.get(ENTRY..)?.get(..length));
            let text = String::from_utf8_lossy(text.ok_or_else(wrong)?).trim_end_matches('\0').to_owned();
            return Ok(Self { what: What::Mark { text }, data, next: data });
        }
        if flags & DISCARD != 0 {
            return Ok(Self { what: What::Discard { at: place, bytes: size }, data, next: data });
        }
        let what = if size == 0 {
            What::Flush
        } else {
            What::Write { at: place, bytes: size, at_once: flags & FUA != 0 }
        };
        Ok(Self { what, data, next: data.checked_add(size).ok_or_else(wrong)? })
    }
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|field| u64::from_le_bytes(*field))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn entry(fields: [u64; 4], text: &[u8]) -> Result<Entry, BadLog> {
        Entry::parse(&[&words(&fields)[..], text, &[0; 64]].concat(), 512, (7, 4096))
    }

    #[test]
    fn the_beginning_tells_how_many_entries_there_are() {
        let bytes = |magic, version, sector: u32| {
            [words(&[magic, version, 43]), sector.to_le_bytes().to_vec()].concat()
        };
        assert_eq!(Super::parse(&bytes(MAGIC, 1, 512)), Ok(Super { entries: 43, sector: 512 }));
        assert_eq!(Super::parse(&bytes(0, 1, 512)), Err(BadLog::NotALog));
        assert_eq!(Super::parse(&bytes(MAGIC, 2, 512)), Err(BadLog::Version(2)));
        for bad in [0, 511, 1000, 1 << 17] {
            assert_eq!(Super::parse(&bytes(MAGIC, 1, bad)), Err(BadLog::SectorSize(bad)));
        }
        assert_eq!(Super::parse(&bytes(MAGIC, 1, 512)[..SUPER - 1]), Err(BadLog::NotALog));
        // Letters, from behind.
        assert_eq!(&MAGIC.to_le_bytes()[..7], b"rhswfsj");
    }

    #[test]
    fn entries_say_what_was_written_and_where_the_next_one_is() {
        for (flags, at_once) in [(0, false), (FUA, true)] {
            let write = What::Write { at: 8 * 512, bytes: 1024, at_once };
            assert_eq!(entry([8, 2, flags, 1024], &[]), Ok(Entry { what: write, data: 4608, next: 5632 }));
        }
        let discard = What::Discard { at: 8 * 512, bytes: 1024 };
        assert_eq!(entry([8, 2, DISCARD, 0], &[]), Ok(Entry { what: discard, data: 4608, next: 4608 }));
        assert_eq!(entry([0, 0, 1, 0], &[]).unwrap().what, What::Flush);
        let mark = entry([0, 0, MARK, 14], b"patchswitch:17").unwrap();
        assert_eq!((mark.what.time_ns(), mark.next), (Some(17), 4608));
        assert_eq!(entry([0, 0, MARK, 17], END.as_bytes()).unwrap().what.time_ns(), None);
        assert_eq!(entry([0, 0, MARK, 1 << 40], b""), Err(BadLog::Entry(7)));
        for fields in
            [[u64::MAX, 1, 0, 0], [1, u64::MAX, 0, 0], [u64::MAX / 512, 1, 0, 0], [0, u64::MAX / 512, 0, 0]]
        {
            assert_eq!(entry(fields, &[]), Err(BadLog::Entry(7)), "{fields:?}");
        }
        assert_eq!(Entry::parse(&[0; ENTRY - 1], 512, (7, 0)), Err(BadLog::Short(7)));
    }

    proptest! {
        #[test]
        fn no_bytes_lead_backwards_or_out(bytes in prop::collection::vec(any::<u8>(), 0..600), at in any::<u64>()) {
            let _ = Super::parse(&bytes);
            if let Ok(entry) = Entry::parse(&bytes, 512, (0, at)) {
                prop_assert!(entry.data > at && entry.next >= entry.data);
                if let What::Write { at, bytes, .. } | What::Discard { at, bytes } = entry.what {
                    prop_assert!(at.checked_add(bytes).is_some());
                }
            }
        }
    }
}
