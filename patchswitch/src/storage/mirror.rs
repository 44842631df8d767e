//! A disk copied by being mirrored to another device, and split from it at one instant (the patent's variant with two disks
//! that are mirrored, and separated for the time of a correction).
//!
//! ```text
//!               begin                     in sync                 split
//!  a: linear ───────────► a: mirror ─────────────────► a: mirror ───────► a: linear     on its own device
//!                         │ region by region, while it serves             b: linear     on the other one, the same at that instant
//! ```
//!
//! To mirror again is to say whose content stays: both may have changed since. What only the other one had is listed before it is
//! written over.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::copy::{self, Checked, Copy, CopyOf, Extent, Instantly, Pristine};
use super::cut::{self, Moment, Turn};
use super::disk::{Backing, other_table};
use super::table::{MirrorStatus, Table};
use super::ticker::Ticker;
use super::{Failed, StorageError};
use crate::host::linux::block::{self, DeviceNumber};
use crate::host::linux::cutter::Mounts;
use crate::host::linux::dm::{Dm, DmError};

/// How often the kernel is asked how far it is.
const POLL: Duration = Duration::from_millis(20);

/// How often it is asked whether a mirror has lost one of its devices.
const LOOK: Duration = Duration::from_millis(100);

/// Disks that are mirrored.
#[derive(Debug)]
pub struct Mirrors<'dm> {
    dm: &'dm Dm,
    disks: Vec<Checked>,
    keeper: Keeper,
}

/// Gives the writers of a disk back what its mirror holds when one of the devices fails, whatever else is being waited for: until
/// then whoever writes waits, and that may be the agent.
#[derive(Debug)]
struct Keeper {
    ticker: Ticker,
    /// The first that was found broken: a mirror no more, and so nothing to be asked.
    broken: Arc<Mutex<Option<Broken>>>,
}

/// A mirror's name, and its status when it was one.
type Broken = (String, String);

/// What waits for the cut.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) turns: Vec<Turn>,
    events: Vec<u32>,
}

/// Begins to mirror disks; nobody waits for it. What the other devices had is lost.
///
/// # Errors
/// [`Failed`] with the reason; everything that was done has been undone.
pub fn begin<'dm>(dm: &'dm Dm, copies: &[CopyOf]) -> Result<Mirrors<'dm>, Failed> {
    begin_mounted(dm, copies, &Mounts::new())
}

/// As [`begin`], where some disks have file systems that must be frozen by their own means.
pub(super) fn begin_mounted<'dm>(
    dm: &'dm Dm,
    copies: &[CopyOf],
    mounts: &Mounts,
) -> Result<Mirrors<'dm>, Failed> {
    let clean = |cause| Failed { cause, undo: Vec::new() };
    if copies.is_empty() {
        return Err(clean(StorageError::NoDisks));
    }
    let check = |of| copy::check(dm, of, mounts);
    let disks = copies.iter().map(check).collect::<Result<Vec<_>, _>>().map_err(clean)?;
    let names = disks.iter().flat_map(|disk| disk.parts().0);
    copy::refuse_twice(names, disks.iter().flat_map(|disk| disk.parts().1)).map_err(clean)?;
    let begun = disks.iter().try_for_each(|disk| {
        let table = Table::Mirror { first: disk.origin.device(), second: disk.target.device() };
        dm.load(&disk.of.active, &table.lines(disk.of.sectors))?;
        Ok(dm.swap(&disk.of.active)?)
    });
    match begun {
        Ok(()) => Ok(Mirrors { dm, keeper: Keeper::start(&disks), disks }),
        Err(cause) => Err(Failed { cause, undo: copy::undo(dm, disks.iter()) }),
    }
}

impl Mirrors<'_> {
    /// How far each is.
    ///
    /// # Errors
    /// [`StorageError::MirrorBroken`] if one of the devices fails, [`StorageError::OtherTable`].
    pub fn status(&self) -> Result<Vec<MirrorStatus>, StorageError> {
        let all: Result<_, _> = self.disks.iter().map(|disk| status(self.dm, &disk.of.active)).collect();
        all.map_err(|error| self.keeper.broken().unwrap_or(error))
    }

    /// Waits until all are the same as their disks. `progress` is told how far they are, again and again, and may end it.
    ///
    /// # Errors
    /// As [`Mirrors::status`]; [`StorageError::NotInTime`] at the end of the time.
    pub fn wait(
        &self,
        limit: Duration,
        mut progress: impl FnMut(&[MirrorStatus]) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let begun = Instant::now();
        loop {
            let now = self.status()?;
            progress(&now)?;
            if now.iter().all(|status| status.is_synced()) {
                return Ok(());
            }
            if begun.elapsed() >= limit {
                return Err(StorageError::NotInTime { what: "the mirror is not in sync", waited: limit });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Splits all of them at one instant: from then on each disk is on its own device, and each copy is what it was.
    ///
    /// # Errors
    /// [`Failed`]; the disks are plain, and there is no copy.
    pub fn split(self) -> Result<Instantly, Failed> {
        let done = self.prepare().and_then(|waiting| {
            let Moment { freeze, before, marks } = cut::cut(self.dm, &waiting.turns, &Mounts::new())?;
            Ok(Instantly { freeze, before, copies: self.finish(&waiting)?, marks })
        });
        done.map_err(|cause| Failed { cause, undo: self.undo() })
    }

    /// Has everything wait for the cut.
    pub(super) fn prepare(&self) -> Result<Waiting, StorageError> {
        // The tables are the cut's from here on.
        self.keeper.ticker.stop();
        // A device that fails from here on is told by an event: afterwards there is no mirror that could be asked.
        let events = self.events()?;
        let mut turns = Vec::new();
        for (disk, status) in self.disks.iter().zip(self.status()?) {
            if !status.is_synced() {
                return Err(StorageError::NotInSync { name: disk.of.active.clone() });
            }
            copy::make_waiting(self.dm, disk)?;
            turns.push(disk.load(self.dm, true)?);
        }
        Ok(Waiting { turns, events })
    }

    /// The copies, after the cut.
    pub(super) fn finish(&self, waiting: &Waiting) -> Result<Vec<Copy<Pristine>>, StorageError> {
        for ((disk, before), now) in self.disks.iter().zip(&waiting.events).zip(self.events()?) {
            if *before != now {
                let status = "an event while it was split".to_owned();
                return Err(StorageError::MirrorBroken { name: disk.of.active.clone(), status });
            }
        }
        let made = |disk: &Checked| {
            // What was copied may still be in the device's own memory, and the next thing that is written down relies on it.
            let target = block::open_direct(disk.target.device())?;
            target.sync_all().map_err(StorageError::io("write", disk.of.target.path()))?;
            copy::made(self.dm, disk)
        };
        self.disks.iter().map(made).collect()
    }

    /// Undoes whatever has been done, and goes on after errors.
    pub(super) fn undo(&self) -> Vec<StorageError> {
        self.keeper.ticker.stop();
        copy::undo(self.dm, self.disks.iter())
    }

    /// The disks.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.of.active.as_str())
    }

    /// Their names, and their devices with what they are.
    pub(super) fn parts(&self) -> impl Iterator<Item = ([&String; 2], [(DeviceNumber, &Backing); 2])> {
        self.disks.iter().map(Checked::parts)
    }

    /// How many events each disk's targets have raised.
    fn events(&self) -> Result<Vec<u32>, StorageError> {
        let event = |disk: &Checked| -> Result<u32, StorageError> {
            let info = self.dm.info(&disk.of.active)?;
            Ok(info.ok_or_else(|| DmError::NoDevice(disk.of.active.clone()))?.event_nr)
        };
        self.disks.iter().map(event).collect()
    }

    /// Ends it: the disks are plain, and there is no copy.
    ///
    /// # Errors
    /// [`StorageError`] of the first that could not be; the others are.
    pub fn abandon(self) -> Result<(), StorageError> {
        self.undo().into_iter().next().map_or(Ok(()), Err)
    }
}

impl Keeper {
    fn start(disks: &[Checked]) -> Self {
        let broken = Arc::new(Mutex::new(None));
        let told = Arc::clone(&broken);
        let disks: Vec<_> = disks
            .iter()
            .map(|disk| (disk.of.active.clone(), disk.of.sectors, disk.origin.device()))
            .collect();
        let dm = Dm::open().ok();
        let ticker = Ticker::start(LOOK, move || {
            for (dm, (name, sectors, origin)) in
                dm.iter().flat_map(|dm| disks.iter().map(move |disk| (dm, disk)))
            {
                let Err(StorageError::MirrorBroken { name: _, status }) = status(dm, name) else { continue };
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = told.get_or_insert_with(|| (name.clone(), status));
                // If it cannot be done now, it is tried again.
                if let Err(error) = copy::plain(dm, name, *sectors, *origin) {
                    tracing::warn!("what the broken mirror of {name} holds back: {error}");
                }
            }
        });
        Self { ticker, broken }
    }

    fn broken(&self) -> Option<StorageError> {
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
        broken.map(|(name, status)| StorageError::MirrorBroken { name, status })
    }
}

fn status(dm: &Dm, name: &str) -> Result<MirrorStatus, StorageError> {
    let lines = dm.status(name)?;
    match lines.as_slice() {
        [line] if line.kind == "mirror" => {
            let status = MirrorStatus::parse(&line.params)?;
            if status.healthy {
                return Ok(status);
            }
            Err(StorageError::MirrorBroken { name: name.to_owned(), status: line.params.clone() })
        }
        lines => Err(other_table(name, lines, "a mirror")),
    }
}

/// Whose content stays when two that were split are mirrored again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Winner {
    /// The disk's.
    Active,
    /// The copy's: the disk and the copy change their devices first.
    Copy,
}

/// What is lost when the copy of a disk is brought to the content of the winner, and the request by which [`begin`] does it. Nobody
/// may have the copy open; with [`Winner::Copy`] nobody the disk either, which is to be made anew over the winner's device.
///
/// # Errors
/// [`StorageError`] if the devices cannot be read.
pub fn again(of: &CopyOf, winner: Winner) -> Result<(CopyOf, Vec<Extent>), StorageError> {
    let (origin, target) = (of.origin.attach()?, of.target.attach()?);
    let lost = copy::differences(origin.device(), target.device(), of.sectors)?;
    let (origin, target) = match winner {
        Winner::Active => (of.origin.clone(), of.target.clone()),
        Winner::Copy => (of.target.clone(), of.origin.clone()),
    };
    Ok((CopyOf { origin, target, ..of.clone() }, lost))
}
