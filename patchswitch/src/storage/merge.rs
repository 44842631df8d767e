//! Makes a clone the disk: its chunks are written into the origin while it is mounted and serving.
//!
//! ```text
//! before   a: snapshot-origin ORIGIN     b: snapshot ORIGIN COW          the old side is stopped and unmounted
//! 1        a: removed
//! 2                                      b: snapshot-merge ORIGIN COW    from here on the origin alone is worth nothing
//! 3                                      b: linear ORIGIN                all chunks are there
//! 4        COW: header cleared                                           the store is free
//! ```
//!
//! Every step is one call to the kernel, and each of them can be the last before a crash: [`resume_merge`] looks at
//! the tables, or after a reboot at nothing but the store's header, and goes on from there. The kernel itself can be
//! interrupted anywhere in step 2: it clears an entry only when its chunk is in the origin (`persistent_commit_merge`).
//!
//! Between 2 and 3 the disk is origin **and** store together. Whoever activates the origin alone then, destroys it;
//! so after a boot [`resume_merge`] comes before [`activate`](super::disk::activate) for a disk on record as merging.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::cow::{self, Header};
use super::disk::{Attached, Disk, other_table};
use super::snapshot::{CloneOf, Removed, WhenBusy, free_cow, live_table, remove};
use super::table::{SnapshotStatus, Table};
use super::{StorageError, Unfinished};
use crate::host::linux::dm::Dm;

/// How often the kernel is asked how far it is; it raises no event at the end.
const PAUSE: Duration = Duration::from_millis(50);

/// How far a merge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The clone.
    pub clone: &'a str,
    /// Sectors that are still to be written into the origin.
    pub left: u64,
    /// Sectors that were to be written when this call began.
    pub total: u64,
}

/// How a commit waits.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long the old side may take to close its devices.
    pub close: Duration,
    /// What happens to them then.
    pub busy: WhenBusy,
    /// How long the merges may take, all together.
    pub merge: Duration,
}

/// What a commit has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The disks of the new partition, over what was behind the old one's. Their stores are free.
    pub disks: Vec<Disk>,
    /// What is left of the old side's devices.
    pub removed: Removed,
}

/// Makes the clones the disks. They may be mounted and in use; the old side must have been stopped and unmounted.
///
/// # Errors
/// [`Unfinished`]: of [`prepare`], when nothing is merged, or of [`resume_merge`].
pub fn commit(
    dm: &Dm,
    clones: &[CloneOf],
    patience: Patience,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Committed, Unfinished> {
    prepare(dm, clones, patience)?;
    resume_merge(dm, clones, patience, progress)
}

/// All that can go wrong before a commit has no way back: nobody has the old side's devices any more, and each clone is
/// whole.
///
/// # Errors
/// [`Unfinished`], of a clone that is lost or an old side that does not let go: the clones are as before, and the old
/// side's devices may be gone (its disks are not touched).
pub fn prepare(dm: &Dm, clones: &[CloneOf], patience: Patience) -> Result<(), Unfinished> {
    let whole = || are_whole(dm, clones).map_err(|error| Unfinished(vec![error]));
    whole()?;
    let _ = close_old(dm, clones, patience)?;
    // That takes a while, and stores fill up.
    whole()
}

/// That each clone is there, whole, and not being merged yet.
///
/// # Errors
/// [`StorageError::CloneLost`] of the first that is lost, [`StorageError`] otherwise.
pub fn are_whole(dm: &Dm, clones: &[CloneOf]) -> Result<(), StorageError> {
    clones.iter().try_for_each(|of| check(dm, of))
}

fn check(dm: &Dm, of: &CloneOf) -> Result<(), StorageError> {
    let attached = Both::attach(of)?;
    let lines = live_table(dm, &of.clone)?;
    if Table::recognise(&lines, of.sectors) != Some(attached.snapshot()) {
        return Err(other_table(&of.clone, &lines, "the clone"));
    }
    cow::cow_level(dm, &of.clone).map(|_| ())
}

fn lost(of: &CloneOf, status: &str) -> StorageError {
    StorageError::CloneLost { name: of.clone.clone(), status: status.to_owned() }
}

/// Takes the old side's devices out of the kernel.
fn close_old(dm: &Dm, clones: &[CloneOf], patience: Patience) -> Result<Removed, Unfinished> {
    let mut removed = Removed::default();
    let mut errors = Vec::new();
    for of in clones {
        let gone = remove(dm, &of.active, of.sectors, patience.close, patience.busy, &mut removed);
        errors.extend(gone.err());
    }
    Unfinished::check(errors).map(|()| removed)
}

/// Goes on with a commit, wherever it was interrupted; also after a reboot.
///
/// Only for clones that are on record as being committed: a clone that is merely found is merged as well.
///
/// # Errors
/// [`Unfinished`], with [`StorageError::MergeGoesOn`] if the time was up first.
pub fn resume_merge(
    dm: &Dm,
    clones: &[CloneOf],
    patience: Patience,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Committed, Unfinished> {
    let removed = close_old(dm, clones, patience)?;
    let mut errors = Vec::new();
    // All of them before the first one is waited for: the store of one that merges does not fill up.
    let begun: Vec<_> = clones.iter().map(|of| begin(dm, of)).collect();
    let end = Instant::now() + patience.merge;
    let mut disks = Vec::new();
    for (of, begun) in clones.iter().zip(begun) {
        match begun.and_then(|begun| finish(dm, of, begun, (end, &mut *progress))) {
            Ok(disk) => disks.push(disk),
            Err(error) => errors.push(error),
        }
    }
    Unfinished::check(errors).map(|()| Committed { disks, removed })
}

/// The paths of disks that are being merged, or were, under their own names; none if one of them is not.
///
/// # Errors
/// [`StorageError`].
pub fn merging(dm: &Dm, clones: &[CloneOf]) -> Result<Option<Vec<PathBuf>>, StorageError> {
    let mut paths = Vec::new();
    for of in clones {
        let both = Both::attach(of)?;
        let found = Table::recognise(&live_table(dm, &of.clone)?, of.sectors);
        if found != Some(both.merge()) && found != Some(both.linear()) {
            return Ok(None);
        }
        paths.push(dm.node(&of.clone)?);
    }
    Ok(Some(paths))
}

struct Both {
    origin: Attached,
    cow: Attached,
}

impl Both {
    fn attach(of: &CloneOf) -> Result<Self, StorageError> {
        Ok(Self { origin: of.origin.attach()?, cow: of.cow.attach()? })
    }

    fn snapshot(&self) -> Table {
        Table::Snapshot { origin: self.origin.device(), cow: self.cow.device() }
    }

    fn merge(&self) -> Table {
        Table::Merge { origin: self.origin.device(), cow: self.cow.device() }
    }

    fn linear(&self) -> Table {
        Table::Linear { device: self.origin.device() }
    }
}

/// A disk that merges, or has.
struct Begun {
    both: Both,
    whole: bool,
}

/// One disk merges, from whatever state it is in.
fn begin(dm: &Dm, of: &CloneOf) -> Result<Begun, StorageError> {
    let both = Both::attach(of)?;
    let lines = live_table(dm, &of.clone)?;
    let found = Table::recognise(&lines, of.sectors);
    let whole = match found {
        Some(table) if table == both.snapshot() => {
            cow::cow_level(dm, &of.clone)?;
            start(dm, of, both.merge())?;
            false
        }
        Some(table) if table == both.merge() => {
            if cow::status(dm, &of.clone)? == SnapshotStatus::MergeFailed {
                begin_again(dm, of, &both)?;
            }
            false
        }
        Some(table) if table == both.linear() => true,
        _ if lines.is_empty() => reopen(dm, of, &both)?,
        _ => return Err(other_table(&of.clone, &lines, "the clone, merging or merged")),
    };
    Ok(Begun { both, whole })
}

/// Its store is free.
fn finish(
    dm: &Dm,
    of: &CloneOf,
    Begun { both, whole }: Begun,
    (end, progress): (Instant, &mut dyn FnMut(Progress<'_>)),
) -> Result<Disk, StorageError> {
    if !whole {
        wait(dm, of, end, progress)?;
        start(dm, of, both.linear())?;
    }
    dm.node(&of.clone)?;
    drop(both.cow);
    free_cow(&of.cow)?;
    Ok(Disk { name: of.clone.clone(), backing: of.origin.clone(), sectors: of.sectors })
}

fn start(dm: &Dm, of: &CloneOf, table: Table) -> Result<(), StorageError> {
    dm.load(&of.clone, &table.lines(of.sectors))?;
    Ok(dm.swap(&of.clone)?)
}

/// A merge that could not read or write once stays as it is, whatever becomes of the device (`merge_failed`,
/// `drivers/md/dm-snap.c`); a new table knows nothing of that. It cannot take over from another one that merges, so the
/// clone is one in between: what has been merged is the same on both sides.
fn begin_again(dm: &Dm, of: &CloneOf, both: &Both) -> Result<(), StorageError> {
    start(dm, of, both.snapshot())?;
    start(dm, of, both.merge())
}

/// After a reboot there are no tables. The header of the store is cleared last of all, so an empty one means that the
/// merge had come to its end.
fn reopen(dm: &Dm, of: &CloneOf, both: &Both) -> Result<bool, StorageError> {
    let (table, whole) = match cow::header(both.cow.device())? {
        Header::Valid => (both.merge(), false),
        Header::Free => (both.linear(), true),
        Header::Invalid => return Err(lost(of, "Invalid")),
        Header::Foreign => return Err(StorageError::CowEmpty { cow: of.cow.to_string() }),
    };
    dm.create(&of.clone)?;
    dm.load(&of.clone, &table.lines(of.sectors))?;
    dm.resume(&of.clone)?;
    Ok(whole)
}

/// Waits until the store holds nothing but its own metadata.
fn wait(
    dm: &Dm,
    of: &CloneOf,
    end: Instant,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), StorageError> {
    let mut total = None;
    loop {
        let level = match cow::status(dm, &of.clone)? {
            SnapshotStatus::Valid(level) => level,
            SnapshotStatus::MergeFailed => return Err(StorageError::MergeFailed { name: of.clone.clone() }),
            other => return Err(lost(of, &format!("{other:?}"))),
        };
        let left = level.changed();
        progress(Progress { clone: &of.clone, left, total: *total.get_or_insert(left) });
        if left == 0 {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(StorageError::MergeGoesOn { name: of.clone.clone(), sectors: left });
        }
        std::thread::sleep(PAUSE);
    }
}
