//! A disk copied to another device while its writes are recorded, and what was recorded replayed onto the copy (figures 8, 9 and 10
//! of the patent).
//!
//! ```text
//!               begin: 801, 802           rounds: 804, 805               cut
//!  a: linear ───────────────► a: log-writes ───────────────► a: log-writes ─────► a: linear
//!                             │ bulk copy, while it serves   │ to the other log,  │ the rest is replayed
//!                             └ the log: address, length,    │ while this one is  ▼
//!                               data, and a mark with the    └ replayed           b: linear, what a was at that instant
//!                               time ten times a second
//! ```
//!
//! Two facts of `dm-log-writes` shape this. It does not wait for what it writes to its log before it counts it: a log is only
//! read when its table is gone, which waits for all of it; so there are two logs in turn, and a round is a change of tables. And a
//! write that is on disk at once (FUA) is recorded at once, others with the next flush: of two to the same place the older one may
//! come last. Such places are read from the disk itself, as the bulk copy is: what is written there later is in the log that is
//! being written. Only in the last round nobody can ask the disk any more, and such a copy is refused.
//!
//! A change of tables costs writers what a suspend without a freeze does. At the cut file systems are frozen as for any other
//! engine; what was written since the last round has to get into the log before the next of several disks goes on, so a round and
//! a flush come right before it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::copy::{self, Buffer, Bulk, Checked, Copy, CopyOf, Instantly, Pristine};
use super::cut::{self, Moment, Turn};
use super::disk::{Attached, Backing, other_table};
use super::table::{LogStatus, Table};
use super::ticker::Ticker;
use super::{Failed, StorageError};
use crate::host::linux::block::{self, DeviceNumber, SECTOR};
use crate::host::linux::cutter::Mounts;
use crate::host::linux::dm::{Dm, Done};

mod clock;
pub mod format;
mod latest;
mod reader;
mod replay;

pub use reader::{Reader, Record};

use clock::flush;

/// What is wiped of a log before it is used, in bytes: more than its beginning has.
const WIPED: u64 = 64 << 10;
/// A round that is not shorter than so many hundredths of the one before does not lead anywhere.
const SHRINKS: u64 = 90;
/// And so many of them are no accident.
const STUBBORN: u32 = 3;

/// A disk to be copied by a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOf {
    /// What is copied, and whereto.
    pub copy: CopyOf,
    /// Where its writes are recorded, in turn: each as large as what is written in the bulk copy, with a sector for each write, and
    /// nobody else's.
    pub logs: [Backing; 2],
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
    logs: [(Attached, Backing); 2],
    /// The log that is being written.
    current: usize,
    target: File,
    bulk: Bulk,
    rounds: Vec<Round>,
    last: Instant,
}

/// The rounds of each of several disks.
type Rounds = Vec<Vec<Round>>;

/// Whether somebody writes to the disks after the cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writers {
    /// What the disks hold then is not what they held at the cut.
    GoOn,
    /// They hold it, and can still be asked.
    HaveEnded,
}

/// Disks whose writes are recorded, with their copies as far as they are.
#[derive(Debug)]
pub struct WriteLogs<'dm> {
    dm: &'dm Dm,
    disks: Vec<Logged>,
    clock: Ticker,
}

/// Records writes of disks, and copies them. `go_on` is told the bytes copied of each disk, and may end it.
///
/// # Errors
/// [`Failed`] with the reason; everything that was done has been undone.
pub fn begin<'dm>(
    dm: &'dm Dm,
    logs: &[LogOf],
    go_on: impl FnMut(&CopyOf, u64) -> Result<(), StorageError>,
) -> Result<WriteLogs<'dm>, Failed> {
    begin_mounted(dm, logs, &Mounts::new(), go_on)
}

/// As [`begin`], where some disks have file systems that must be frozen by their own means.
pub(super) fn begin_mounted<'dm>(
    dm: &'dm Dm,
    logs: &[LogOf],
    mounts: &Mounts,
    mut go_on: impl FnMut(&CopyOf, u64) -> Result<(), StorageError>,
) -> Result<WriteLogs<'dm>, Failed> {
    let mut disks = check(dm, logs, mounts).map_err(|cause| Failed { cause, undo: Vec::new() })?;
    let begun = record(dm, &mut disks).and_then(|clock| {
        for disk in &mut disks {
            disk.bulk = copy::bulk(&disk.disk, &mut |bytes| go_on(&disk.disk.of, bytes))?;
        }
        Ok(clock)
    });
    match begun {
        Ok(clock) => Ok(WriteLogs { dm, disks, clock }),
        Err(cause) => Err(Failed { cause, undo: undo(dm, &disks) }),
    }
}

/// Checks everything before anything is changed.
fn check(dm: &Dm, all: &[LogOf], mounts: &Mounts) -> Result<Vec<Logged>, StorageError> {
    if all.is_empty() {
        return Err(StorageError::NoDisks);
    }
    let mut disks = Vec::new();
    for of in all {
        let disk = copy::check(dm, &of.copy, mounts)?;
        let attach = |log: &Backing| {
            copy::refuse_on_itself(dm, &of.copy, log)?;
            let attached = log.attach()?;
            block::open_exclusive(attached.device())?;
            Ok::<_, StorageError>((attached, log.clone()))
        };
        let [first, second] = &of.logs;
        let logs = [attach(first)?, attach(second)?];
        let target = block::open_direct(disk.target.device())?;
        let (current, bulk, rounds, last) = (0, Bulk::default(), Vec::new(), Instant::now());
        disks.push(Logged { disk, logs, current, target, bulk, rounds, last });
    }
    let devices = disks.iter().flat_map(Logged::devices);
    copy::refuse_twice(disks.iter().flat_map(|disk| disk.disk.parts().0), devices)?;
    Ok(disks)
}

/// From now on every write is recorded.
fn record(dm: &Dm, disks: &mut [Logged]) -> Result<Ticker, StorageError> {
    for disk in disks.iter_mut() {
        disk.record_in(dm, 0)?;
        disk.last = Instant::now();
    }
    Ok(clock::start(disks.iter().map(|disk| disk.disk.of.active.clone()).collect()))
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
            let (mut stubborn, mut before, mut rounds) = (0, None::<Round>, 0);
            loop {
                let round = disk.round(self.dm)?;
                progress(&disk.disk.of, &round)?;
                rounds += 1;
                if round.replayed_s.min(round.predicted_s()) <= limits.rest.as_secs_f64() {
                    break;
                }
                let shrinks = before.is_none_or(|before| {
                    round.bytes.saturating_mul(100) < before.bytes.saturating_mul(SHRINKS)
                });
                stubborn = if shrinks { 0 } else { stubborn + 1 };
                before = Some(round);
                if stubborn >= STUBBORN || rounds >= limits.rounds {
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
        let done = self.prepare().and_then(|turns| {
            let Moment { freeze, before, marks } = cut::cut(self.dm, &turns, &Mounts::new())?;
            let (copies, rounds) = self.finish(Writers::GoOn)?;
            Ok((Instantly { freeze, before, copies, marks }, rounds))
        });
        done.map_err(|cause| Failed { cause, undo: self.undo() })
    }

    /// One more round, and everything that was written since gets into the logs; then everything waits for the cut.
    pub(super) fn prepare(&mut self) -> Result<Vec<Turn>, StorageError> {
        for disk in &mut self.disks {
            let _ = disk.round(self.dm)?;
        }
        for disk in &self.disks {
            flush(self.dm, &disk.disk.of.active)?;
        }
        self.disks.iter().map(|disk| disk.disk.load(self.dm, false)).collect()
    }

    /// The copies, after the cut, and the rounds of each.
    pub(super) fn finish(&mut self, writers: Writers) -> Result<(Vec<Copy<Pristine>>, Rounds), StorageError> {
        let (mut copies, mut rounds) = (Vec::new(), Vec::new());
        for disk in &mut self.disks {
            disk.rest(writers)?;
            copy::make_waiting(self.dm, &disk.disk)?;
            self.dm.resume(&disk.disk.of.copy)?;
            copies.push(copy::made(self.dm, &disk.disk)?);
            rounds.push(std::mem::take(&mut disk.rounds));
            for (_, log) in &disk.logs {
                log.detach()?;
            }
        }
        Ok((copies, rounds))
    }

    /// Undoes whatever has been done, and goes on after errors.
    pub(super) fn undo(&self) -> Vec<StorageError> {
        undo(self.dm, &self.disks)
    }

    /// Nobody writes any more, and nobody has to be told when.
    pub(super) fn stop_clock(&self) {
        self.clock.stop();
    }

    /// The disks.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.disk.of.active.as_str())
    }

    /// Their names, and their devices with what they are.
    pub(super) fn parts(&self) -> (Vec<&String>, Vec<(DeviceNumber, &Backing)>) {
        let names = self.disks.iter().flat_map(|disk| disk.disk.parts().0);
        (names.collect(), self.disks.iter().flat_map(Logged::devices).collect())
    }

    /// Ends it: the disks are plain, and there is no copy.
    ///
    /// # Errors
    /// [`StorageError`] of the first that could not be; the others are.
    pub fn abandon(self) -> Result<(), StorageError> {
        self.undo().into_iter().next().map_or(Ok(()), Err)
    }
}

/// Undoes whatever has been done, and goes on after errors.
fn undo(dm: &Dm, disks: &[Logged]) -> Vec<StorageError> {
    let mut errors = copy::undo(dm, disks.iter().map(|disk| &disk.disk));
    errors.extend(disks.iter().flat_map(|disk| &disk.logs).filter_map(|(_, log)| log.detach().err()));
    errors
}

/// Takes everything of a copy away, whatever of it is there, as [`copy::abandon`] does, and the logs' devices. Right also after a
/// crash.
///
/// # Errors
/// [`StorageError`]; the rest is done.
pub fn abandon(dm: &Dm, of: &LogOf, limit: Duration) -> Result<Done, StorageError> {
    let done = copy::abandon(dm, &of.copy, limit);
    for log in &of.logs {
        log.detach()?;
    }
    done
}

impl Logged {
    /// Its devices, with what they are.
    fn devices(&self) -> impl Iterator<Item = (DeviceNumber, &Backing)> {
        let logs = self.logs.iter().map(|(log, backing)| (log.device(), backing));
        self.disk.parts().1.into_iter().chain(logs)
    }

    /// Records in a log from now on; the one before is complete when this returns.
    fn record_in(&mut self, dm: &Dm, log: usize) -> Result<(), StorageError> {
        let (attached, backing) = &self.logs[log];
        // An older log must not be taken for this one.
        let device = block::open_direct(attached.device())?;
        let wiped = device.write_all_at(Buffer::new().piece(WIPED), 0).and_then(|()| device.sync_all());
        wiped.map_err(StorageError::io("clear", backing.path()))?;
        drop(device);
        let table = Table::LogWrites { device: self.disk.origin.device(), log: attached.device() };
        dm.load(&self.disk.of.active, &table.lines(self.disk.of.sectors))?;
        dm.swap(&self.disk.of.active)?;
        self.current = log;
        Ok(())
    }

    /// Replays what has been written until now, while what is written from now on is recorded in the other log.
    fn round(&mut self, dm: &Dm) -> Result<Round, StorageError> {
        records(dm, &self.disk.of.active)?;
        let (full, recorded) = (self.current, self.last.elapsed());
        self.record_in(dm, 1 - full)?;
        self.last = Instant::now();
        let (round, doubtful) = self.replay(full)?;
        for part in doubtful.iter() {
            self.read_again(part)?;
        }
        Ok(self.note(round, recorded))
    }

    /// Replays what was written before the cut.
    fn rest(&mut self, writers: Writers) -> Result<(), StorageError> {
        let recorded = self.last.elapsed();
        self.last = Instant::now();
        let (round, doubtful) = self.replay(self.current)?;
        let bytes: u64 = doubtful.iter().map(|part| part.bytes).sum();
        if writers == Writers::GoOn && bytes > 0 {
            return Err(StorageError::OrderUnknown { name: self.disk.of.active.clone(), bytes });
        }
        for part in doubtful.iter() {
            self.read_again(part)?;
        }
        self.target.sync_all().map_err(StorageError::io("write", self.disk.of.target.path()))?;
        let _ = self.note(round, recorded);
        Ok(())
    }

    fn note(&mut self, round: Round, recorded: Duration) -> Round {
        let replayed_s = self.last.elapsed().as_secs_f64();
        let round = Round { recorded_s: recorded.as_secs_f64(), replayed_s, ..round };
        self.rounds.push(round);
        round
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
