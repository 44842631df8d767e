//! Disks of which a partition gets whole copies on other devices, each by the engine that was chosen for it, and the cut that
//! they have in common with the clones of its other disks (steps 801 to 805 of the patent by a log, its two mirrored disks by a mirror).
//!
//! ```text
//!            begin: engine after engine, while the disks are in use             cut: all in one instant
//!  root      ───────────────────────────────────────────────────────────► snapshot      (a clone)
//!  data      log: bulk copy, rounds until the rest is small ────────────► linear        (a copy, after the rest)
//!  archive   mirror: until both are the same ───────────────────────────► linear        (a copy)
//! ```

use std::time::{Duration, Instant};

use serde::Serialize;

use super::copy::{self, Bulk, Copy, CopyOf, Pristine};
use super::cut::{self, Moment};
use super::disk::Backing;
use super::mirror::{self, Mirrors};
use super::snapshot::{self, CloneOf, Cut, Loaded};
use super::table::{MirrorStatus, REGION};
use super::write_log::{self, Limits, LogOf, Round, WriteLogs, Writers};
use super::{Failed, StorageError};
use crate::host::linux::block::SECTOR;
use crate::host::linux::cutter::Mounts;
use crate::host::linux::dm::Dm;

/// How a disk is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// By a bulk copy and a log of what is written meanwhile ([`write_log`]): where that is recorded, in turn.
    Log([Backing; 2]),
    /// By a mirror ([`mirror`]).
    Mirror,
}

/// A copy that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Of which disk, and whereto.
    pub of: CopyOf,
    /// How.
    pub by: Engine,
}

/// How far one of the copies is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress<'a> {
    /// So many bytes of a disk are copied.
    Copied {
        /// The disk.
        of: &'a CopyOf,
        /// Bytes.
        bytes: u64,
    },
    /// A round of its log was replayed.
    Replayed {
        /// The disk.
        of: &'a CopyOf,
        /// The round.
        round: &'a Round,
    },
}

/// How a disk was copied.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "engine", rename_all = "lowercase")]
pub enum Account {
    /// By a log.
    Log {
        /// The copy's device-mapper name.
        copy: String,
        /// The bulk copy.
        bulk: Bulk,
        /// The rounds; the last one is the rest after the cut.
        rounds: Vec<Round>,
    },
    /// By a mirror.
    Mirror {
        /// The copy's device-mapper name.
        copy: String,
        /// Bytes of the disk.
        bytes: u64,
        /// Until both were the same, in seconds.
        seconds: f64,
    },
}

/// Clones and copies as their disks were at one instant.
#[derive(Debug)]
pub struct Together {
    /// The instant, and the clones.
    pub cut: Cut,
    /// The copies: nobody has had them open yet.
    pub copies: Vec<Copy<Pristine>>,
    /// How each was made.
    pub accounts: Vec<Account>,
    /// What was wanted of each.
    pub wanted: Vec<Wanted>,
}

/// Copies that follow their disks, ready to be cut.
#[derive(Debug)]
pub struct Copies<'dm> {
    dm: &'dm Dm,
    wanted: Vec<Wanted>,
    logs: Option<WriteLogs<'dm>>,
    mirrors: Option<Mirrors<'dm>>,
    seconds: f64,
}

/// Makes copies of disks that are in use, and has them follow. `progress` is told how far each is, and may end it. `mounts` as for
/// [`snapshot::clone_mounted`].
///
/// # Errors
/// [`Failed`] with the reason, [`StorageError::NotInTime`] and [`StorageError::DoesNotConverge`] among them; everything that was
/// done has been undone.
pub fn begin<'dm>(
    dm: &'dm Dm,
    wanted: Vec<Wanted>,
    mounts: &Mounts,
    limit: Duration,
    progress: &mut dyn FnMut(Progress<'_>) -> Result<(), StorageError>,
) -> Result<Copies<'dm>, Failed> {
    let end = Instant::now() + limit;
    let (mut logged, mut mirrored) = (Vec::new(), Vec::new());
    for Wanted { of, by } in &wanted {
        match by {
            Engine::Log(logs) => logged.push(LogOf { copy: of.clone(), logs: logs.clone() }),
            Engine::Mirror => mirrored.push(of.clone()),
        }
    }
    let mut copies = Copies { dm, wanted, logs: None, mirrors: None, seconds: 0.0 };
    let begun = copies.follow((&logged, &mirrored), mounts, end, &mut |what| {
        if Instant::now() >= end {
            return Err(StorageError::NotInTime { what: "the copy is not ready", waited: limit });
        }
        progress(what)
    });
    match begun {
        Ok(()) => Ok(copies),
        Err(Failed { cause, mut undo }) => {
            undo.extend(copies.undo());
            Err(Failed { cause, undo })
        }
    }
}

impl<'dm> Copies<'dm> {
    /// The mirrors last: nobody writes two of them longer than needed.
    fn follow(
        &mut self,
        (logged, mirrored): (&[LogOf], &[CopyOf]),
        mounts: &Mounts,
        end: Instant,
        progress: &mut dyn FnMut(Progress<'_>) -> Result<(), StorageError>,
    ) -> Result<(), Failed> {
        let alone = |cause| Failed { cause, undo: Vec::new() };
        if !logged.is_empty() {
            let copied = |of: &CopyOf, bytes| progress(Progress::Copied { of, bytes });
            let logs = write_log::begin_mounted(self.dm, logged, mounts, copied)?;
            self.logs.insert(logs).catch_up(progress).map_err(alone)?;
        }
        if !mirrored.is_empty() {
            let begun = Instant::now();
            let mirrors = mirror::begin_mounted(self.dm, mirrored, mounts)?;
            let told = |status: &[MirrorStatus]| {
                mirrored.iter().zip(status).try_for_each(|(of, status)| {
                    let sectors = status.synced.saturating_mul(REGION).min(of.sectors);
                    progress(Progress::Copied { of, bytes: sectors.saturating_mul(SECTOR) })
                })
            };
            self.mirrors.insert(mirrors).wait(end.saturating_duration_since(begun), told).map_err(alone)?;
            self.seconds = begun.elapsed().as_secs_f64();
            // That took its time, in which the others were written.
            self.catch_up(progress).map_err(alone)?;
        }
        Ok(())
    }

    /// Replays what the logs have, so that little is left for the time in which somebody waits.
    ///
    /// # Errors
    /// As [`begin`]; the copies go on all the same.
    pub fn catch_up(
        &mut self,
        progress: &mut dyn FnMut(Progress<'_>) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        self.logs.as_mut().map_or(Ok(()), |logs| logs.catch_up(progress))
    }

    /// Cuts, together with clones of other disks.
    ///
    /// # Errors
    /// [`Failed`]; there are neither copies nor clones, and the disks are plain.
    pub fn cut(self, clones: &[CloneOf], mounts: &Mounts) -> Result<Together, Failed> {
        self.cut_with(clones, mounts, Writers::GoOn)
    }

    /// Cuts disks whose last users have ended, or do within this time.
    ///
    /// # Errors
    /// As [`Copies::cut`]; [`DmError::Busy`](crate::host::linux::dm::DmError::Busy) if somebody still has one open.
    pub fn cut_closed(self, limit: Duration) -> Result<Together, Failed> {
        // It opens the disks as well.
        self.logs.iter().for_each(WriteLogs::stop_clock);
        let end = Instant::now() + limit;
        let names = self.logs.iter().flat_map(WriteLogs::names);
        let mut names = names.chain(self.mirrors.iter().flat_map(Mirrors::names));
        if let Err(cause) = names
            .try_for_each(|name| self.dm.wait_closed(name, end.saturating_duration_since(Instant::now())))
        {
            drop(names);
            return Err(Failed { cause: cause.into(), undo: self.undo() });
        }
        drop(names);
        self.cut_with(&[], &Mounts::new(), Writers::HaveEnded)
    }

    fn cut_with(mut self, clones: &[CloneOf], mounts: &Mounts, writers: Writers) -> Result<Together, Failed> {
        let checked = match clones {
            [] => Ok(Vec::new()),
            clones => snapshot::check(self.dm, clones, mounts),
        };
        let checked = match checked.and_then(|checked| self.refuse_twice(&checked).map(|()| checked)) {
            Ok(checked) => checked,
            Err(cause) => return Err(Failed { cause, undo: self.undo() }),
        };
        self.cut_all(&checked, mounts, writers).map_err(|cause| {
            let mut undone = snapshot::undo(self.dm, &checked);
            undone.extend(self.undo());
            Failed { cause, undo: undone }
        })
    }

    fn refuse_twice(&self, clones: &[snapshot::Checked<'_>]) -> Result<(), StorageError> {
        let (mut names, mut devices) = self.logs.as_ref().map(WriteLogs::parts).unwrap_or_default();
        let mirrored = self.mirrors.iter().flat_map(Mirrors::parts);
        for (pair, behind) in mirrored.chain(clones.iter().map(snapshot::Checked::parts)) {
            names.extend(pair);
            devices.extend(behind);
        }
        copy::refuse_twice(names.into_iter(), devices.into_iter())
    }

    /// The last rounds of the logs come late: what is written after them is replayed after the cut. Later still mirrors get ready: from
    /// then on nobody gives a disk back what its mirror holds.
    fn cut_all(
        &mut self,
        clones: &[snapshot::Checked<'_>],
        mounts: &Mounts,
        writers: Writers,
    ) -> Result<Together, StorageError> {
        let loaded = Loaded::load(self.dm, clones)?;
        let logged = self.logs.as_mut().map(WriteLogs::prepare).transpose()?;
        let split = self.mirrors.as_ref().map(Mirrors::prepare).transpose()?;
        let mut turns = loaded.turns();
        turns.extend(split.iter().flat_map(|waiting| waiting.turns.clone()));
        turns.extend(logged.into_iter().flatten());
        let Moment { freeze, before, marks } = cut::cut(self.dm, &turns, mounts)?;
        let cut = Cut { freeze, before, clones: loaded.finish(self.dm)?, marks };
        let (mut copies, mut accounts) = (Vec::new(), Vec::new());
        if let (Some(mirrors), Some(waiting)) = (&self.mirrors, &split) {
            copies = mirrors.finish(waiting)?;
            let account = |copy: &Copy<Pristine>| Account::Mirror {
                copy: copy.of().copy.clone(),
                bytes: copy.of().sectors.saturating_mul(SECTOR),
                seconds: self.seconds,
            };
            accounts.extend(copies.iter().map(account));
        }
        if let Some(logs) = &mut self.logs {
            let bulks = logs.bulks();
            let (made, rounds) = logs.finish(writers)?;
            let account = |((copy, bulk), rounds): ((&Copy<Pristine>, Bulk), Vec<Round>)| Account::Log {
                copy: copy.of().copy.clone(),
                bulk,
                rounds,
            };
            accounts.extend(made.iter().zip(bulks).zip(rounds).map(account));
            copies.extend(made);
        }
        Ok(Together { cut, copies, accounts, wanted: std::mem::take(&mut self.wanted) })
    }

    /// Undoes whatever has been done, and goes on after errors.
    fn undo(&self) -> Vec<StorageError> {
        let logs = self.logs.iter().flat_map(WriteLogs::undo);
        logs.chain(self.mirrors.iter().flat_map(Mirrors::undo)).collect()
    }
}

impl WriteLogs<'_> {
    fn catch_up(
        &mut self,
        progress: &mut dyn FnMut(Progress<'_>) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        self.converge(Limits::default(), |of, round| progress(Progress::Replayed { of, round }))
    }
}
