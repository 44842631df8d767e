//! How fast a disk is written: what the store of a clone has to take, as long as both go on.

use std::time::{Duration, Instant};

use super::StorageError;
use super::table::CHUNK;
use crate::host::linux::block::DeviceNumber;

/// What had been written to a device at some moment (`Documentation/block/stat.rst`).
#[derive(Clone, Copy, Debug)]
pub struct Count {
    at: Instant,
    writes: u64,
    sectors: u64,
}

/// How fast a device was written between two moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Bytes a second.
    pub bytes: f64,
    /// Chunks a second, at most: a write may begin in the middle of one, and none may be written twice.
    pub chunks: f64,
}

impl Count {
    /// What has been written to a device by now.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn now(device: DeviceNumber) -> Result<Self, StorageError> {
        let stat = device.sysfs().join("stat");
        let text = std::fs::read_to_string(&stat).map_err(StorageError::io("read", &stat))?;
        let (writes, sectors) = parse(&text)
            .ok_or_else(|| StorageError::io("read", stat)(std::io::ErrorKind::InvalidData.into()))?;
        Ok(Self { at: Instant::now(), writes, sectors })
    }

    /// The pace since.
    pub fn until(&self, later: &Self) -> Pace {
        let writes = later.writes.saturating_sub(self.writes);
        let sectors = later.sectors.saturating_sub(self.sectors);
        pace(writes, sectors, later.at.saturating_duration_since(self.at))
    }
}

/// Writes and sectors written.
fn parse(stat: &str) -> Option<(u64, u64)> {
    let fields: Vec<&str> = stat.split_ascii_whitespace().collect();
    Some((fields.get(4)?.parse().ok()?, fields.get(6)?.parse().ok()?))
}

#[expect(clippy::cast_precision_loss, reason = "a pace")]
fn pace(writes: u64, sectors: u64, time: Duration) -> Pace {
    let seconds = time.as_secs_f64();
    if seconds <= 0.0 {
        return Pace { bytes: 0.0, chunks: 0.0 };
    }
    // A write of two sectors may lie in two chunks; from there on each chunk that it is longer is one more.
    let chunks = writes.saturating_mul(2).saturating_add(sectors / CHUNK);
    Pace { bytes: sectors as f64 * 512.0 / seconds, chunks: chunks as f64 / seconds }
}

impl Pace {
    /// How many chunks that are in so much time, at most.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float is cut off at the ends"
    )]
    pub fn chunks_in(&self, time: Duration) -> u64 {
        (self.chunks * time.as_secs_f64()).ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_what_a_store_has_to_take_at_most() {
        let stat = "   1 2 3 4      50 6    6400 8 9 10 11 12 13 14 15 16 17\n";
        let (writes, sectors) = parse(stat).unwrap();
        assert_eq!((writes, sectors), (50, 6400));
        let found = pace(writes, sectors, Duration::from_secs(2));
        assert_eq!(found, Pace { bytes: 1_638_400.0, chunks: 100.0 });
        assert_eq!(found.chunks_in(Duration::from_secs(60)), 6000);
        assert_eq!(pace(0, 0, Duration::from_secs(2)).chunks_in(Duration::from_secs(60)), 0);
        assert_eq!(pace(5, 5, Duration::ZERO), Pace { bytes: 0.0, chunks: 0.0 });
        for bad in ["", "1 2 3 4 5 6", "1 2 3 4 x 6 7"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
