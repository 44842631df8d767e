//! A disk copied to another device while its writes are recorded, and what was recorded replayed onto the copy (figures 8, 9 and 10
//! of the patent).
//!
//! ```text
//!               begin: 801, 802           rounds: 804, 805               cut
//!  a: linear ───────────────► a: log-writes ───────────────► a: log-writes ─────► a: linear
//!                             │ bulk copy, while it serves   │ each shorter       │ the rest is replayed, nobody waits for it
//!                             └ the log: address, length,    └ than the one       ▼
//!                               data, and a mark with the      before             b: linear, what a was at that instant
//!                               time ten times a second
//! ```
//!
//! The log takes what has been flushed (`dm-log-writes` records a write when the flush after it has come), so each round
//! begins with a flush. The cut is a change of tables like any other: what was written before it is in the log to the last record
//! when the device is plain again, so the last round is replayed after it, and writers do not wait for that.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::copy::{self, Buffer, Bulk, Checked, CopyOf, Instantly};
use super::disk::{Attached, Backing, other_table};
use super::table::{LogStatus, Table};
use super::{Failed, StorageError};
use crate::host::linux::block::{self, SECTOR};
use crate::host::linux::clock::boot_ns;
use crate::host::linux::dm::Dm;

pub mod format;
mod reader;

pub use reader::{Reader, Record};

use format::{END, OURS, What};

/// How often the time is recorded.
const EVERY: Duration = Duration::from_millis(100);
/// How long a mark may take to be in the log.
const MARKED: Duration = Duration::from_secs(30);
/// How often the log is looked at for it.
const POLL: Duration = Duration::from_millis(2);
/// A round that is not shorter than so many hundredths of the one before does not lead anywhere.
const SHRINKS: u64 = 90;
/// And so many of them are no accident.
const STUBBORN: u32 = 3;

/// A disk to be copied by a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOf {
    /// What is copied, and whereto.
    pub copy: CopyOf,
    /// Where its writes are recorded: as large as what is written meanwhile, with a sector for each write, and nobody else's.
    pub log: Backing,
}

/// When rounds are over.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The rest may take so long to be replayed.
    pub rest: Duration,
    /// And no more rounds than this are tried.
    pub rounds: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { rest: Duration::from_millis(200), rounds: 20 }
    }
}

/// What was replayed in a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Round {
    /// Records.
    pub records: u64,
    /// Bytes that were written or given up.
    pub bytes: u64,
    /// How long they had been recorded for, in seconds: since the round before.
    pub recorded_s: f64,
    /// How long the replay took, in seconds.
    pub replayed_s: f64,
}

impl Round {
    /// How much was written a second.
    pub fn dirty_rate(&self) -> f64 {
        rate(self.bytes, self.recorded_s)
    }

    /// How much can be replayed a second.
    pub fn replay_rate(&self) -> f64 {
        rate(self.bytes, self.replayed_s)
    }

    /// How long the replay of what is written during this one will take, in seconds, if it goes on like that.
    pub fn predicted_s(&self) -> f64 {
        if self.recorded_s <= 0.0 {
            return self.replayed_s;
        }
        self.replayed_s * self.replayed_s / self.recorded_s
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn rate(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 }
}

/// A disk whose writes are recorded.
#[derive(Debug)]
struct Logged {
    disk: Checked,
    _log: Attached,
    backing: Backing,
    reader: Reader,
    target: File,
    bulk: Bulk,
    rounds: Vec<Round>,
    last: Instant,
}

/// Disks whose writes are recorded, with their copies as far as they are.
#[derive(Debug)]
pub struct WriteLogs<'dm> {
    dm: &'dm Dm,
    disks: Vec<Logged>,
    _clock: Clock,
}

/// Records writes of disks, and copies them. `go_on` is told the bytes copied of each disk, and may end it.
///
/// # Errors
/// [`Failed`] with the reason; everything that was done has been undone.
pub fn begin<'dm>(
    dm: &'dm Dm,
    logs: &[LogOf],
    mut go_on: impl FnMut(&CopyOf, u64) -> Result<(), StorageError>,
) -> Result<WriteLogs<'dm>, Failed> {
    let clean = |cause| Failed { cause, undo: Vec::new() };
    if logs.is_empty() {
        return Err(clean(StorageError::NoDisks));
    }
    let mut checked = Vec::new();
    for of in logs {
        checked.push((of, check(dm, of).map_err(clean)?));
    }
    let undo = |cause| Failed { cause, undo: copy::undo(dm, logs_of(&checked)) };
    let clock = record(dm, &checked).map_err(undo)?;
    let last = Instant::now();
    let mut bulks = Vec::new();
    for (_, (disk, _)) in &checked {
        bulks.push(copy::bulk(disk, &mut |bytes| go_on(&disk.of, bytes)).map_err(undo)?);
    }
    let mut disks = Vec::new();
    for ((of, (disk, log)), bulk) in checked.into_iter().zip(bulks) {
        let opened = Reader::open(log.device())
            .and_then(|reader| Ok((reader, block::open_direct(disk.target.device())?)));
        let (reader, target) =
            opened.map_err(|cause| Failed { cause, undo: copy::undo(dm, std::iter::once(&disk)) })?;
        let (backing, rounds) = (of.log.clone(), Vec::new());
        disks.push(Logged { disk, _log: log, backing, reader, target, bulk, rounds, last });
    }
    Ok(WriteLogs { dm, disks, _clock: clock })
}

fn logs_of<'c>(checked: &'c [(&LogOf, (Checked, Attached))]) -> impl DoubleEndedIterator<Item = &'c Checked> {
    checked.iter().map(|(_, (disk, _))| disk)
}

fn check(dm: &Dm, of: &LogOf) -> Result<(Checked, Attached), StorageError> {
    let disk = copy::check(dm, &of.copy)?;
    let log = of.log.attach()?;
    if [disk.origin.device(), disk.target.device()].contains(&log.device()) {
        return Err(StorageError::Twice(of.log.to_string()));
    }
    copy::refuse_on_itself(dm, &of.copy, &of.log)?;
    block::open_exclusive(log.device())?;
    Ok((disk, log))
}

/// From now on every write is recorded.
fn record(dm: &Dm, checked: &[(&LogOf, (Checked, Attached))]) -> Result<Clock, StorageError> {
    let mut names = Vec::new();
    for (of, (disk, log)) in checked {
        // An older log must not be taken for this one.
        let device = block::open_direct(log.device())?;
        let wiped = device.write_all_at(Buffer::new().piece(8 * SECTOR), 0).and_then(|()| device.sync_all());
        wiped.map_err(StorageError::io("clear", of.log.path()))?;
        drop(device);
        let table = Table::LogWrites { device: disk.origin.device(), log: log.device() };
        dm.load(&disk.of.active, &table.lines(disk.of.sectors))?;
        dm.swap(&disk.of.active)?;
        names.push(disk.of.active.clone());
    }
    Ok(Clock::start(names))
}

impl WriteLogs<'_> {
    /// How the bulk copies went.
    pub fn bulks(&self) -> Vec<Bulk> {
        self.disks.iter().map(|disk| disk.bulk).collect()
    }

    /// Replays rounds until the rest is small. `progress` is told of each, and may end it.
    ///
    /// # Errors
    /// [`StorageError::DoesNotConverge`] if more is written than can be replayed, [`StorageError::LogFull`]; whoever gives up
    /// calls [`WriteLogs::abandon`].
    pub fn converge(
        &mut self,
        limits: Limits,
        mut progress: impl FnMut(&CopyOf, &Round) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        for disk in &mut self.disks {
            let mut stubborn = 0;
            loop {
                let before = disk.rounds.last().copied();
                let round = disk.round(self.dm)?;
                progress(&disk.disk.of, &round)?;
                if round.replayed_s.min(round.predicted_s()) <= limits.rest.as_secs_f64() {
                    break;
                }
                let shrinks = before.is_none_or(|before| {
                    round.bytes.saturating_mul(100) < before.bytes.saturating_mul(SHRINKS)
                });
                stubborn = if shrinks { 0 } else { stubborn + 1 };
                if stubborn >= STUBBORN
                    || disk.rounds.len() >= usize::try_from(limits.rounds).unwrap_or(usize::MAX)
                {
                    return Err(StorageError::DoesNotConverge {
                        name: disk.disk.of.active.clone(),
                        dirty: round.dirty_rate(),
                        replayed: round.replay_rate(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Cuts: the disks are plain again, and each copy becomes what its disk was at that instant. The rounds of each, the rest the
    /// last of them.
    ///
    /// # Errors
    /// [`Failed`]; the disks are plain, and there is no copy.
    pub fn cut(mut self) -> Result<(Instantly, Vec<Vec<Round>>), Failed> {
        let dm = self.dm;
        let done = self.cut_all();
        done.map_err(|cause| Failed { cause, undo: copy::undo(dm, self.disks.iter().map(|disk| &disk.disk)) })
    }

    fn cut_all(&mut self) -> Result<(Instantly, Vec<Vec<Round>>), StorageError> {
        for disk in &mut self.disks {
            let _ = disk.round(self.dm)?;
        }
        let disks: Vec<&Checked> = self.disks.iter().map(|disk| &disk.disk).collect();
        let (freeze, before, marks) = copy::cut(self.dm, &disks, &[])?;
        let (mut copies, mut rounds) = (Vec::new(), Vec::new());
        for disk in &mut self.disks {
            disk.rest()?;
            copy::make_waiting(self.dm, &disk.disk)?;
            self.dm.resume(&disk.disk.of.copy)?;
            copies.push(copy::made(self.dm, &disk.disk)?);
            rounds.push(std::mem::take(&mut disk.rounds));
        }
        Ok((Instantly { freeze, before, copies, marks }, rounds))
    }

    /// Ends it: the disks are plain, and there is no copy.
    ///
    /// # Errors
    /// [`StorageError`] of the first that could not be; the others are.
    pub fn abandon(self) -> Result<(), StorageError> {
        let errors = copy::undo(self.dm, self.disks.iter().map(|disk| &disk.disk));
        errors.into_iter().next().map_or(Ok(()), Err)
    }
}

impl Logged {
    /// Replays what has been written until now.
    fn round(&mut self, dm: &Dm) -> Result<Round, StorageError> {
        let name = self.disk.of.active.clone();
        let node = dm.node(&name)?;
        // What was not flushed is not in the log.
        let flushed = File::open(&node).and_then(|device| device.sync_all());
        flushed.map_err(StorageError::io("flush", node))?;
        let text = format!("{OURS}round:{}:{}", self.rounds.len(), boot_ns());
        dm.message(&name, 0, &format!("mark {text}"))?;
        let recorded = self.last.elapsed();
        self.last = Instant::now();
        let round = self.replay(&text, || records(dm, &name))?;
        let round = Round {
            recorded_s: recorded.as_secs_f64(),
            replayed_s: self.last.elapsed().as_secs_f64(),
            ..round
        };
        self.rounds.push(round);
        Ok(round)
    }

    /// Replays what was written before the cut: the log is at its end.
    fn rest(&mut self) -> Result<(), StorageError> {
        let (recorded, begun) = (self.last.elapsed(), Instant::now());
        let round = self.replay(END, || Ok(()))?;
        self.target.sync_all().map_err(StorageError::io("write", self.disk.of.target.path()))?;
        self.rounds.push(Round {
            recorded_s: recorded.as_secs_f64(),
            replayed_s: begun.elapsed().as_secs_f64(),
            ..round
        });
        Ok(())
    }

    /// Replays up to a mark, which may still have to come.
    fn replay(
        &mut self,
        mark: &str,
        alive: impl Fn() -> Result<(), StorageError>,
    ) -> Result<Round, StorageError> {
        let (begun, mut round) = (Instant::now(), Round::default());
        let size = self.disk.of.sectors.saturating_mul(SECTOR);
        let mut buffer = Buffer::new();
        loop {
            while let Some(entry) = self.reader.next_entry().map_err(|error| error.of(&self.backing))? {
                round.records += 1;
                match entry.what {
                    What::Mark { text } if text == mark => return Ok(round),
                    What::Write { at, bytes } | What::Discard { at, bytes }
                        if at.saturating_add(bytes) > size =>
                    {
                        let entry = self.reader.read().saturating_sub(1);
                        return Err(StorageError::Log {
                            log: self.backing.to_string(),
                            source: format::BadLog::Entry(entry),
                        });
                    }
                    What::Write { at, bytes } => {
                        self.write(&mut buffer, entry.data, at, bytes)?;
                        round.bytes += bytes;
                    }
                    What::Discard { at, bytes } => {
                        let zeroed = copy::zero(&self.target, at, bytes);
                        zeroed.map_err(StorageError::io("clear", self.disk.of.target.path()))?;
                        round.bytes += bytes;
                    }
                    What::Mark { .. } | What::Flush => {}
                }
            }
            alive()?;
            if begun.elapsed() >= MARKED {
                return Err(StorageError::NotInTime { what: "the log of writes has no end", waited: MARKED });
            }
            std::thread::sleep(POLL);
        }
    }

    fn write(&self, buffer: &mut Buffer, from: u64, to: u64, bytes: u64) -> Result<(), StorageError> {
        let mut done = 0;
        while done < bytes {
            let piece = buffer.piece(bytes - done);
            self.reader
                .read_data(piece, from + done)
                .map_err(StorageError::io("read", self.backing.path()))?;
            let written = self.target.write_all_at(piece, to + done);
            written.map_err(StorageError::io("write", self.disk.of.target.path()))?;
            done += piece.len() as u64;
        }
        Ok(())
    }
}

/// Whether writes are still recorded.
fn records(dm: &Dm, name: &str) -> Result<(), StorageError> {
    let lines = dm.status(name)?;
    match lines.as_slice() {
        [line] if line.kind == "log-writes" => match LogStatus::parse(&line.params)? {
            LogStatus { records: true, .. } => Ok(()),
            LogStatus { used, .. } => {
                Err(StorageError::LogFull { name: name.to_owned(), used: used.saturating_mul(SECTOR) })
            }
        },
        lines => Err(other_table(name, lines, "a disk whose writes are recorded")),
    }
}

/// Records the time, on a thread of its own, until it is dropped.
#[derive(Debug)]
struct Clock {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Clock {
    fn start(names: Vec<String>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            // That a mark is missing makes an interval longer, and nothing wrong.
            let Ok(dm) = Dm::open() else { return };
            while !stopped.load(Ordering::Relaxed) {
                for name in &names {
                    let _ = dm.message(name, 0, &format!("mark {OURS}{}", boot_ns()));
                }
                std::thread::sleep(EVERY);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_the_rest_follow_from_a_round() {
        let round = Round { records: 3, bytes: 1000, recorded_s: 2.0, replayed_s: 0.5 };
        assert!((round.dirty_rate() - 500.0).abs() < 1e-9 && (round.replay_rate() - 2000.0).abs() < 1e-9);
        // In half a second 250 bytes are written, which take an eighth of one.
        assert!((round.predicted_s() - 0.125).abs() < 1e-9);
        assert!((Round::default().dirty_rate()).abs() < 1e-9 && Round::default().predicted_s().abs() < 1e-9);
    }
}
