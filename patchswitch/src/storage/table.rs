//! Device-mapper tables and status lines, typed. Pure: nothing here touches a device.
//!
//! Only tables that cover a whole device with one target occur. The lines are those of the kernel's
//! `Documentation/admin-guide/device-mapper/{linear,snapshot}.rst`.

use crate::host::linux::block::DeviceNumber;
use crate::host::linux::dm::Target;

/// Sectors that a snapshot copies at a time. Every first write costs a copy of so much and takes so much of the store; but
/// every write to a disk that has a clone is split at this boundary, so that smaller ones make big writes slow
/// (`docs/adr/0013`, with the figures).
pub const CHUNK: u64 = 64;

/// What a device is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// In peace: the device is another one, from its first sector.
    Linear {
        /// The other one.
        device: DeviceNumber,
    },
    /// The same, but whatever is overwritten is kept first for the snapshots of the device.
    Origin {
        /// The device that the snapshots are of.
        device: DeviceNumber,
    },
    /// A clone: its own chunks from the COW store, the rest from the origin. Persistent: the store survives a reboot.
    Snapshot {
        /// Where unchanged chunks are read from.
        origin: DeviceNumber,
        /// Where changed chunks are.
        cow: DeviceNumber,
    },
    /// A clone whose chunks are being written to the origin while it is used.
    Merge {
        /// What is becoming the clone.
        origin: DeviceNumber,
        /// What is becoming empty.
        cow: DeviceNumber,
    },
    /// The same as `Linear`, and every write is recorded in another device, when it has been flushed.
    LogWrites {
        /// The device that is written.
        device: DeviceNumber,
        /// Where it is recorded.
        log: DeviceNumber,
    },
    /// Two devices with the same content, once the second has been brought to that: it is read from the first.
    Mirror {
        /// What the content is taken from.
        first: DeviceNumber,
        /// What becomes the same.
        second: DeviceNumber,
    },
    /// Every read and write fails.
    Error,
}

/// Sectors of a mirror that are brought to the same content at once.
pub const REGION: u64 = 1024;

impl Table {
    /// The table of a device of so many sectors.
    pub fn lines(self, sectors: u64) -> Vec<Target> {
        let (kind, params) = match self {
            Self::Linear { device } => ("linear", format!("{device} 0")),
            Self::Origin { device } => ("snapshot-origin", device.to_string()),
            Self::Snapshot { origin, cow } => ("snapshot", format!("{origin} {cow} PO {CHUNK}")),
            Self::Merge { origin, cow } => ("snapshot-merge", format!("{origin} {cow} PO {CHUNK}")),
            Self::LogWrites { device, log } => ("log-writes", format!("{device} {log}")),
            Self::Mirror { first, second } => {
                ("mirror", format!("core 1 {REGION} 2 {first} 0 {second} 0 1 handle_errors"))
            }
            Self::Error => ("error", String::new()),
        };
        vec![Target { start: 0, sectors, kind: kind.to_owned(), params }]
    }

    /// Recognises the table of a device of so many sectors; `None` if it is not one that [`Self::lines`] makes.
    pub fn recognise(lines: &[Target], sectors: u64) -> Option<Self> {
        let [line] = lines else { return None };
        if line.start != 0 || line.sectors != sectors {
            return None;
        }
        let words: Vec<&str> = line.params.split_ascii_whitespace().collect();
        let number = |text: &str| text.parse::<DeviceNumber>().ok();
        let both = |origin, cow, chunk: &str| {
            (chunk == CHUNK.to_string()).then_some(())?;
            Some((number(origin)?, number(cow)?))
        };
        match (line.kind.as_str(), words.as_slice()) {
            ("linear", [device, "0"]) => Some(Self::Linear { device: number(device)? }),
            ("snapshot-origin", [device]) => Some(Self::Origin { device: number(device)? }),
            ("snapshot", [origin, cow, "P" | "PO", chunk]) => {
                both(origin, cow, chunk).map(|(origin, cow)| Self::Snapshot { origin, cow })
            }
            ("snapshot-merge", [origin, cow, "P" | "PO", chunk]) => {
                both(origin, cow, chunk).map(|(origin, cow)| Self::Merge { origin, cow })
            }
            ("log-writes", [device, log]) => {
                Some(Self::LogWrites { device: number(device)?, log: number(log)? })
            }
            ("mirror", ["core", "1", region, "2", first, "0", second, "0", "1", "handle_errors"])
                if *region == REGION.to_string() =>
            {
                Some(Self::Mirror { first: number(first)?, second: number(second)? })
            }
            ("error", []) => Some(Self::Error),
            _ => None,
        }
    }
}

/// How full a COW store is, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// In use, the store's own metadata among it.
    pub allocated: u64,
    /// Size of the store.
    pub total: u64,
    /// Used by the store itself.
    pub metadata: u64,
}

impl Level {
    /// What a merge has still to write to the origin, in sectors.
    pub fn changed(self) -> u64 {
        self.allocated.saturating_sub(self.metadata)
    }
}

/// What a `snapshot` or `snapshot-merge` says of itself (`snapshot_status`, `drivers/md/dm-snap.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotStatus {
    /// It works.
    Valid(Level),
    /// It is lost: the store was full when the origin had to keep a chunk, or could not be written. Every read and
    /// write fails, now and after a reboot. The origin is untouched.
    Invalid,
    /// The store was full when the clone itself wrote. Reads still work. (Stores of the kind `PO` say this, as ours are.)
    Overflow,
    /// The merge could not read the store or write the origin.
    MergeFailed,
}

/// A status that is none of those.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a status of a snapshot")]
pub struct BadStatus(pub String);

impl SnapshotStatus {
    /// Reads a status text.
    ///
    /// # Errors
    /// [`BadStatus`].
    pub fn parse(text: &str) -> Result<Self, BadStatus> {
        match text {
            "Invalid" => return Ok(Self::Invalid),
            "Overflow" => return Ok(Self::Overflow),
            "Merge failed" => return Ok(Self::MergeFailed),
            _ => {}
        }
        let level = || {
            let (usage, metadata) = text.split_once(' ')?;
            let (allocated, total) = usage.split_once('/')?;
            Some(Level { allocated: digits(allocated)?, total: digits(total)?, metadata: digits(metadata)? })
        };
        level().map(Self::Valid).ok_or_else(|| BadStatus(text.to_owned()))
    }
}

/// What a `log-writes` says of itself (`log_writes_status`, `drivers/md/dm-log-writes.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogStatus {
    /// Entries recorded.
    pub entries: u64,
    /// Sectors of the log in use.
    pub used: u64,
    /// Whether it records: no longer, once the log was full.
    pub records: bool,
}

impl LogStatus {
    /// Reads a status text.
    ///
    /// # Errors
    /// [`BadStatus`].
    pub fn parse(text: &str) -> Result<Self, BadStatus> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let read = |entries: &str, last: &str, records| {
            Some(Self { entries: digits(entries)?, used: digits(last)?.checked_add(1)?, records })
        };
        match words.as_slice() {
            [entries, last] => read(entries, last, true),
            [entries, last, "logging_disabled"] => read(entries, last, false),
            _ => None,
        }
        .ok_or_else(|| BadStatus(text.to_owned()))
    }
}

/// What a `mirror` of two says of itself (`mirror_status`, `drivers/md/dm-raid1.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorStatus {
    /// Regions that are the same.
    pub synced: u64,
    /// All of them.
    pub regions: u64,
    /// Whether both devices work.
    pub healthy: bool,
}

impl MirrorStatus {
    /// Reads a status text.
    ///
    /// # Errors
    /// [`BadStatus`].
    pub fn parse(text: &str) -> Result<Self, BadStatus> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let read = || match words.as_slice() {
            ["2", _, _, synced, "1", health, ..] => {
                let (synced, regions) = synced.split_once('/')?;
                Some(Self { synced: digits(synced)?, regions: digits(regions)?, healthy: *health == "AA" })
            }
            _ => None,
        };
        read().ok_or_else(|| BadStatus(text.to_owned()))
    }

    /// Whether both are the same all over.
    pub fn is_synced(self) -> bool {
        self.healthy && self.synced >= self.regions
    }
}

fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: DeviceNumber = DeviceNumber { major: 254, minor: 16 };
    const B: DeviceNumber = DeviceNumber { major: 7, minor: 300 };

    #[test]
    fn tables_are_the_lines_of_the_kernel() {
        let all = [
            (Table::Linear { device: A }, "linear", "254:16 0"),
            (Table::Origin { device: A }, "snapshot-origin", "254:16"),
            (Table::Snapshot { origin: A, cow: B }, "snapshot", "254:16 7:300 PO 64"),
            (Table::Merge { origin: A, cow: B }, "snapshot-merge", "254:16 7:300 PO 64"),
            (Table::LogWrites { device: A, log: B }, "log-writes", "254:16 7:300"),
            (
                Table::Mirror { first: A, second: B },
                "mirror",
                "core 1 1024 2 254:16 0 7:300 0 1 handle_errors",
            ),
            (Table::Error, "error", ""),
        ];
        for (table, kind, params) in all {
            let lines = table.lines(2048);
            let expected =
                Target { start: 0, sectors: 2048, kind: kind.to_owned(), params: params.to_owned() };
            assert_eq!(lines, [expected]);
            assert_eq!(Table::recognise(&lines, 2048), Some(table));
            assert_eq!(Table::recognise(&lines, 2047), None, "another size is another device");
        }
    }

    /// Clones that were made before stores were of the kind `PO`.
    #[test]
    fn stores_of_the_older_kind_are_recognised() {
        for table in [Table::Snapshot { origin: A, cow: B }, Table::Merge { origin: A, cow: B }] {
            let mut lines = table.lines(2048);
            lines[0].params = lines[0].params.replace("PO", "P");
            assert_eq!(Table::recognise(&lines, 2048), Some(table));
        }
    }

    #[test]
    fn tables_of_others_are_not_recognised() {
        let others = [
            ("linear", "254:16 8"),
            ("linear", "254:16"),
            ("snapshot-origin", "254:16 0"),
            ("snapshot", "254:16 7:300 PO 16"),
            ("snapshot", "254:16 7:300 N 64"),
            ("snapshot", "254:16 7:300 PO 32"),
            ("snapshot", "254:16 7:300 PO 64 1 discard_zeroes_cow"),
            ("snapshot-merge", "254:16 7:300 N 16"),
            ("thin", "254:16 1"),
            ("log-writes", "254:16"),
            ("mirror", "core 1 1024 2 254:16 0 7:300 0"),
            ("mirror", "core 2 1024 nosync 2 254:16 0 7:300 0 1 handle_errors"),
            ("mirror", "core 1 512 2 254:16 0 7:300 0 1 handle_errors"),
            ("error", "0"),
        ];
        for (kind, params) in others {
            let line = Target { start: 0, sectors: 8, kind: kind.to_owned(), params: params.to_owned() };
            assert_eq!(Table::recognise(std::slice::from_ref(&line), 8), None, "{kind} {params}");
            assert_eq!(Table::recognise(&[line.clone(), line], 8), None);
        }
        assert_eq!(Table::recognise(&[], 8), None);
    }

    #[test]
    fn statuses_are_read() {
        let valid =
            |allocated, total, metadata| Ok(SnapshotStatus::Valid(Level { allocated, total, metadata }));
        let bad = |text: &str| Err(BadStatus(text.to_owned()));
        for (text, expected) in [
            ("32/16384 32", valid(32, 16384, 32)),
            ("8320/18446744073709551615 48", valid(8320, u64::MAX, 48)),
            ("Invalid", Ok(SnapshotStatus::Invalid)),
            ("Overflow", Ok(SnapshotStatus::Overflow)),
            ("Merge failed", Ok(SnapshotStatus::MergeFailed)),
            ("Unknown", bad("Unknown")),
            ("", bad("")),
            ("32/16384", bad("32/16384")),
            ("-1/2 3", bad("-1/2 3")),
            ("1/2 3 4", bad("1/2 3 4")),
            ("1/18446744073709551616 3", bad("1/18446744073709551616 3")),
        ] {
            assert_eq!(SnapshotStatus::parse(text), expected, "{text:?}");
        }
    }

    #[test]
    fn statuses_of_copies_are_read() {
        let log = |entries, used, records| Ok(LogStatus { entries, used, records });
        assert_eq!(LogStatus::parse("15 40959"), log(15, 40960, true));
        assert_eq!(LogStatus::parse("15 40959 logging_disabled"), log(15, 40960, false));
        for bad in ["", "15", "15 -1", "15 18446744073709551615", "15 1 other", "15 1 logging_disabled x"] {
            assert!(LogStatus::parse(bad).is_err(), "{bad:?}");
        }
        let mirror = MirrorStatus::parse("2 254:16 254:80 44/512 1 AA 1 core").unwrap();
        assert_eq!(mirror, MirrorStatus { synced: 44, regions: 512, healthy: true });
        assert!(!mirror.is_synced());
        assert!(MirrorStatus::parse("2 254:16 254:80 512/512 1 AA 1 core").unwrap().is_synced());
        assert!(!MirrorStatus::parse("2 254:16 254:80 512/512 1 AD 1 core").unwrap().is_synced());
        for bad in ["", "3 a b c 1/1 1 AAA 1 core", "2 a b 1 1 AA 1 core", "2 a b x/1 1 AA 1 core"] {
            assert!(MirrorStatus::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_status_is_read_or_refused(text in ".{0,40}") {
            match SnapshotStatus::parse(&text) {
                Ok(SnapshotStatus::Valid(level)) => {
                    prop_assert!(level.changed() <= level.allocated);
                }
                Ok(known) => prop_assert!(["Invalid", "Overflow", "Merge failed"].contains(&text.as_str()), "{known:?}"),
                Err(BadStatus(kept)) => prop_assert_eq!(kept, text),
            }
        }
    }
}
