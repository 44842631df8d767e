//! A log replayed onto the copy of its disk.

use std::os::unix::fs::FileExt;

use super::format::{self, END, What};
use super::latest::{Latest, Part};
use super::{Logged, Reader, Round};
use crate::host::linux::block::{self, SECTOR};
use crate::storage::StorageError;
use crate::storage::copy::{self, Buffer, Extent, Parts};
use crate::storage::disk::Backing;

impl Logged {
    /// Replays a log that nobody writes any more, and says where it does not tell which of two writes was the later one. Piece by
    /// piece of the log, the last record of each place, in the order of the places.
    pub(super) fn replay(&self, log: usize) -> Result<(Round, Parts), StorageError> {
        let (attached, backing) = &self.logs[log];
        let mut reader = Reader::open(attached.device())?;
        let (mut round, mut at_once, mut doubtful) = (Round::default(), Parts::default(), Parts::default());
        let size = self.disk.of.sectors.saturating_mul(SECTOR);
        let (mut latest, mut buffer) = (Latest::default(), Buffer::new());
        loop {
            if !reader.is_near() {
                self.write_latest(&mut buffer, (&reader, backing), &mut latest)?;
            }
            let Some(entry) = reader.next_entry().map_err(|error| error.of(backing))? else { break };
            round.records += 1;
            let (at, part, is_at_once) = match entry.what {
                What::Mark { text } if text == END => {
                    self.write_latest(&mut buffer, (&reader, backing), &mut latest)?;
                    return Ok((round, doubtful));
                }
                What::Mark { .. } | What::Flush => continue,
                What::Write { at, bytes, at_once } => (at, Part { bytes, data: Some(entry.data) }, at_once),
                What::Discard { at, bytes } => {
                    (at, Part { bytes: bytes.min(size.saturating_sub(at)), data: None }, false)
                }
            };
            if at.saturating_add(part.bytes) > size {
                let source = format::BadLog::Entry(reader.read().saturating_sub(1));
                return Err(StorageError::Log { log: backing.to_string(), source });
            }
            if is_at_once {
                at_once.add(at, part.bytes);
            } else if at_once.touch(at, part.bytes) {
                doubtful.add(at, part.bytes);
            }
            latest.add(at, part);
            round.bytes += part.bytes;
        }
        // The kernel had no room for its own mark at the end.
        let used = attached.device().sectors()?.saturating_mul(SECTOR);
        Err(StorageError::LogFull { name: self.disk.of.active.clone(), used })
    }

    /// Writes what was read of a log: neighbours in one piece.
    fn write_latest(
        &self,
        buffer: &mut Buffer,
        (reader, log): (&Reader, &Backing),
        latest: &mut Latest,
    ) -> Result<(), StorageError> {
        let (mut begins, mut filled) = (0, 0);
        for (at, Part { bytes, data }) in latest.take() {
            let Some(from) = data else {
                let zeroed = copy::zero(&self.target, at, bytes);
                zeroed.map_err(StorageError::io("clear", self.disk.of.target.path()))?;
                continue;
            };
            let mut done = 0;
            while done < bytes {
                if filled > 0 && begins + filled as u64 != at + done {
                    self.write(buffer.filled(filled), begins)?;
                    filled = 0;
                }
                if filled == 0 {
                    begins = at + done;
                }
                let piece = &mut buffer.piece(u64::MAX)[filled..];
                let length = piece.len().min(usize::try_from(bytes - done).unwrap_or(usize::MAX));
                let read = reader.read_data(&mut piece[..length], from + done);
                read.map_err(StorageError::io("read", log.path()))?;
                (filled, done) = (filled + length, done + length as u64);
                if filled == buffer.piece(u64::MAX).len() {
                    self.write(buffer.filled(filled), begins)?;
                    filled = 0;
                }
            }
        }
        self.write(buffer.filled(filled), begins)
    }

    fn write(&self, piece: &[u8], at: u64) -> Result<(), StorageError> {
        let written = self.target.write_all_at(piece, at);
        written.map_err(StorageError::io("write", self.disk.of.target.path()))
    }

    /// Copies a part as the bulk copy does: what is written there from now on is recorded.
    pub(super) fn read_again(&self, part: Extent) -> Result<(), StorageError> {
        let (from, mut buffer, mut done) = (block::open_direct(self.disk.origin.device())?, Buffer::new(), 0);
        while done < part.bytes {
            let piece = buffer.piece(part.bytes - done);
            let read = from.read_exact_at(piece, part.at + done);
            read.map_err(StorageError::io("read", self.disk.of.origin.path()))?;
            let written = self.target.write_all_at(piece, part.at + done);
            written.map_err(StorageError::io("write", self.disk.of.target.path()))?;
            done += piece.len() as u64;
        }
        Ok(())
    }
}
