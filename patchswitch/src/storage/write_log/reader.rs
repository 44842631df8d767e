//! Reads a log while it is being written, record by record.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use serde::Serialize;

use super::format::{BadLog, Entry, Super, What};
use crate::host::linux::block::{self, DeviceNumber};
use crate::storage::StorageError;
use crate::storage::copy::Buffer;
use crate::storage::disk::Backing;

/// What a sector of a log may have at most, in bytes.
const SECTOR_MAX: u64 = 65536;
/// So much of a log is in memory at once, in bytes.
const WINDOW: usize = 8 << 20;

/// Reads a log from its beginning to where it is at the moment. The kernel does not wait for what it writes there before it says how
/// many records there are: only a log that nobody writes any more is to be believed to its last record.
#[derive(Debug)]
pub struct Reader {
    device: File,
    sector: u32,
    /// Where the next entry is, in bytes; nothing before the beginning was read.
    next: Option<u64>,
    read: u64,
    known: u64,
    window: Window,
}

/// A part of the log in memory: entries are small, and there are many.
#[derive(Debug)]
struct Window {
    buffer: Buffer,
    at: u64,
    bytes: usize,
}

impl Window {
    /// Bytes of the log, if all of them are in it.
    fn get(&self, at: u64, bytes: usize) -> Option<&[u8]> {
        let from = usize::try_from(at.checked_sub(self.at)?).ok()?;
        self.buffer.filled(self.bytes).get(from..from.checked_add(bytes)?)
    }

    fn fill(&mut self, device: &File, at: u64) -> std::io::Result<()> {
        (self.at, self.bytes) = (at, 0);
        let piece = self.buffer.piece(u64::MAX);
        // Less at the end of the device, and it may take several reads.
        while self.bytes < piece.len() {
            match device.read_at(&mut piece[self.bytes..], at + self.bytes as u64)? {
                0 => break,
                read => self.bytes += read,
            }
        }
        Ok(())
    }
}

/// Why a log cannot be read.
#[derive(Debug)]
pub(super) enum ReadError {
    Bad(BadLog),
    Io(std::io::Error),
}

impl ReadError {
    pub(super) fn of(self, log: &Backing) -> StorageError {
        match self {
            Self::Bad(source) => StorageError::Log { log: log.to_string(), source },
            Self::Io(source) => StorageError::io("read", log.path())(source),
        }
    }
}

/// A record with the time in which it was on disk, as far as the marks tell: both ends in nanoseconds since the boot. It may have been
/// written a moment before: what was not flushed is not recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Its number.
    pub number: u64,
    /// What was recorded.
    #[serde(flatten)]
    pub what: What,
    /// Where what was written is in the log, in bytes.
    pub data: u64,
    /// The last mark before it.
    pub after_ns: Option<u64>,
    /// The first mark behind it.
    pub before_ns: Option<u64>,
}

impl Reader {
    pub(super) fn open(log: DeviceNumber) -> Result<Self, StorageError> {
        let window = Window { buffer: Buffer::of(WINDOW), at: 0, bytes: 0 };
        Ok(Self { device: block::open_direct(log)?, sector: 512, next: None, read: 0, known: 0, window })
    }

    /// How many entries have been read.
    pub fn read(&self) -> u64 {
        self.read
    }

    /// The next entry, if there is one already.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, ReadError> {
        if self.read >= self.known {
            self.look()?;
        }
        let Some(at) = self.next.filter(|_| self.read < self.known) else { return Ok(None) };
        let bytes = usize::try_from(self.sector).unwrap_or(usize::MAX);
        if self.window.get(at, bytes).is_none() {
            self.window.fill(&self.device, at).map_err(ReadError::Io)?;
        }
        let sector = self.window.get(at, bytes).ok_or(ReadError::Bad(BadLog::Short(self.read)))?;
        let entry = Entry::parse(sector, self.sector, (self.read, at)).map_err(ReadError::Bad)?;
        self.next = Some(entry.next);
        self.read += 1;
        Ok(Some(entry))
    }

    /// Whether the next entry is in memory, as those before it are.
    pub(super) fn is_near(&self) -> bool {
        let bytes = usize::try_from(self.sector).unwrap_or(usize::MAX);
        self.next.is_some_and(|at| self.window.get(at, bytes).is_some())
    }

    /// Reads data that an entry names.
    pub(super) fn read_data(&self, piece: &mut [u8], at: u64) -> std::io::Result<()> {
        match self.window.get(at, piece.len()) {
            Some(bytes) => piece.copy_from_slice(bytes),
            None => self.device.read_exact_at(piece, at)?,
        }
        Ok(())
    }

    /// How many entries there are now. Before the first mark or barrier the log has no beginning.
    fn look(&mut self) -> Result<(), ReadError> {
        let mut buffer = Buffer::new();
        let first = buffer.piece(SECTOR_MAX.min(4096));
        self.device.read_exact_at(first, 0).map_err(ReadError::Io)?;
        if self.next.is_none() && first.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let Super { entries, sector } = Super::parse(first).map_err(ReadError::Bad)?;
        if self.next.is_none() {
            self.sector = sector;
            self.next = Some(u64::from(sector));
        }
        if self.known != entries {
            // What is in memory may be from before they were written.
            self.window.bytes = 0;
        }
        self.known = entries;
        Ok(())
    }
}

impl Reader {
    /// All records of a log that nobody writes any more, or of one that somebody does as far as it is, each with its time.
    ///
    /// # Errors
    /// [`StorageError::Log`] if it is none or ends before its end, [`StorageError::Io`].
    pub fn all(log: &Backing) -> Result<Vec<Record>, StorageError> {
        let attached = log.attach()?;
        let mut reader = Self::open(attached.device())?;
        let mut records = Vec::new();
        while let Some(entry) = reader.next_entry().map_err(|error| error.of(log))? {
            let number = reader.read - 1;
            let Entry { what, data, .. } = entry;
            records.push(Record { number, what, data, after_ns: None, before_ns: None });
        }
        if reader.next.is_none() {
            return Err(StorageError::Log { log: log.to_string(), source: BadLog::NotALog });
        }
        date(&mut records);
        Ok(records)
    }

    /// Writes to `to` what a record says was written to the disk; nothing for one that is no write.
    ///
    /// # Errors
    /// [`StorageError::Io`] of the log, or of `to`.
    pub fn data(log: &Backing, record: &Record, to: &mut dyn Write) -> Result<(), StorageError> {
        let What::Write { bytes, .. } = record.what else { return Ok(()) };
        let attached = log.attach()?;
        let reader = Self::open(attached.device())?;
        let mut buffer = Buffer::new();
        let mut done = 0;
        while done < bytes {
            let piece = buffer.piece(bytes - done);
            reader.read_data(piece, record.data + done).map_err(StorageError::io("read", log.path()))?;
            to.write_all(piece).map_err(StorageError::io("write what was read of", log.path()))?;
            done += piece.len() as u64;
        }
        Ok(())
    }
}

/// Gives each record the marks around it.
fn date(records: &mut [Record]) {
    let mut last = None;
    for record in records.iter_mut() {
        record.after_ns = last;
        last = record.what.time_ns().or(last);
    }
    let mut next = None;
    for record in records.iter_mut().rev() {
        record.before_ns = next;
        next = record.what.time_ns().or(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_have_the_time_of_the_marks_around_them() {
        let write = || What::Write { at: 0, bytes: 512, at_once: false };
        let mark = |text: &str| What::Mark { text: text.to_owned() };
        let all = [
            write(),
            mark("patchswitch:10"),
            write(),
            mark("other"),
            mark("patchswitch:round:1:30"),
            write(),
        ];
        let mut records: Vec<_> = (0..)
            .zip(all)
            .map(|(number, what)| Record { number, what, data: 0, after_ns: None, before_ns: None })
            .collect();
        date(&mut records);
        let times: Vec<_> = records.iter().map(|record| (record.after_ns, record.before_ns)).collect();
        assert_eq!(times[0], (None, Some(10)));
        assert_eq!(times[2], (Some(10), Some(30)));
        assert_eq!(times[5], (Some(30), None));
    }
}
