//! The write-loss meter: what is lost when a switch leaves one side's disk behind, in sectors and in files.
//!
//! It runs both ways. A switch loses what the old side wrote since the cut; a rollback loses what the new side wrote
//! since the flip. Sectors are the kernel's own count of a device and exact. Files are what a person can judge: those
//! below a declared `may_lose` pattern are expected, the others are not.

use serde::{Deserialize, Serialize};

use super::StorageError;
use crate::host::linux::block::{DeviceNumber, Written};

mod files;
mod pattern;

pub use files::{ChangedFile, Changes, Kind, Limits, changed_since};
pub use pattern::{BadPattern, MayLose};

/// What had been written to a device at some moment. Can be kept on disk: it is only good for the same device of the
/// same boot, and knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    device: DeviceNumber,
    boot: String,
    sequence: u64,
    written: Written,
}

impl Mark {
    /// Whether it is of this device.
    pub fn is_of(&self, device: DeviceNumber) -> bool {
        self.device == device
    }

    /// What has been written to a device by now.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn now(device: DeviceNumber) -> Result<Self, StorageError> {
        let stat = device.sysfs().join("stat");
        let bytes = std::fs::read(&stat).map_err(StorageError::io("read", &stat))?;
        let written = Written::parse(&bytes)
            .ok_or_else(|| StorageError::io("read", stat)(std::io::ErrorKind::InvalidData.into()))?;
        Self::at(device, written)
    }

    /// A mark with a count that was taken at a better moment than now.
    pub(super) fn at(device: DeviceNumber, written: Written) -> Result<Self, StorageError> {
        let read = |path: std::path::PathBuf| {
            std::fs::read_to_string(&path)
                .map(|text| text.trim().to_owned())
                .map_err(StorageError::io("read", path))
        };
        let boot = read("/proc/sys/kernel/random/boot_id".into())?;
        let sequence = read(device.sysfs().join("diskseq"))?;
        let sequence = sequence.parse().map_err(|_not_a_number: std::num::ParseIntError| {
            StorageError::io("read", device.sysfs())(std::io::ErrorKind::InvalidData.into())
        })?;
        Ok(Self { device, boot, sequence, written })
    }

    /// What has been written since, given another mark of the same device.
    ///
    /// # Errors
    /// [`StorageError::AnotherDevice`].
    pub fn until(&self, later: &Self) -> Result<Written, StorageError> {
        let same = self.device == later.device && self.boot == later.boot && self.sequence == later.sequence;
        let difference = || {
            Some(Written {
                sectors: later.written.sectors.checked_sub(self.written.sectors)?,
                discarded: later.written.discarded.checked_sub(self.written.discarded)?,
            })
        };
        same.then(difference).flatten().ok_or(StorageError::AnotherDevice(self.device))
    }
}

/// What has been written to a device since it was marked.
///
/// # Errors
/// [`StorageError::AnotherDevice`] if the host has been booted or the device made anew since, [`StorageError::Io`].
pub fn since(mark: &Mark) -> Result<Written, StorageError> {
    mark.until(&Mark::now(mark.device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(minor: u32, boot: &str, sequence: u64, sectors: u64) -> Mark {
        let device = DeviceNumber { major: 254, minor };
        Mark { device, boot: boot.to_owned(), sequence, written: Written { sectors, discarded: 8 } }
    }

    #[test]
    fn only_marks_of_the_same_device_and_boot_are_compared() {
        let then = mark(1, "a", 7, 100);
        let written = then.until(&mark(1, "a", 7, 164)).unwrap();
        assert_eq!(written, Written { sectors: 64, discarded: 0 });
        for other in [mark(2, "a", 7, 164), mark(1, "b", 7, 164), mark(1, "a", 8, 164), mark(1, "a", 7, 99)] {
            let error = then.until(&other).unwrap_err();
            assert!(matches!(error, StorageError::AnotherDevice(device) if device.minor == 1), "{error}");
        }
    }

    #[test]
    fn a_mark_is_kept_on_disk() {
        let then = mark(1, "a", 7, 100);
        let text = serde_json::to_string(&then).unwrap();
        assert_eq!(serde_json::from_str::<Mark>(&text).unwrap(), then);
    }
}
