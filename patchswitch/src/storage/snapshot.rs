//! Clones all disks of a partition in one instant, and discards the clones again.
//!
//! This is the copying of system disk and application disk of the patent (Fig. 7, steps 703 and 704), in the time of
//! one suspend instead of one copy, whatever the size.
//!
//! The order of things is what keeps a clone right, so it is written in types: `Loaded` is what has its tables
//! waiting, and the only way to make a snapshot come alive is the cut of `Loaded::turns`, which does it while the origins stand
//! still, or [`reopen`], which does it before there is an origin device at all. See the module
//! [`cutter`](crate::host::linux::cutter) for what happens otherwise.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::copy;
use super::cow::{self, Header};
use super::cut::{self, Moment, Turn};
use super::disk::{Attached, Backing, other_table, remove_half_made};
use super::meter::Mark;
use super::table::{SnapshotStatus, Table};
use super::{Failed, StorageError, Unfinished};
use crate::host::linux::block::{self, DeviceNumber};
use crate::host::linux::cutter::Mounts;
use crate::host::linux::dm::{Dm, DmError, Done, Removal, Target};
use crate::host::linux::filesystem::{forget, signatures};

/// How long undo waits for somebody, e.g. udev, to close a device that has just been made.
const UNDO_LIMIT: Duration = Duration::from_secs(5);

/// One disk to be cloned, and later its clone. This is what the store of the agent keeps until commit or discard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneOf {
    /// The device-mapper name of the disk that is in use.
    pub active: String,
    /// The device-mapper name that the clone gets.
    pub clone: String,
    /// What is behind the disk.
    pub origin: Backing,
    /// Where the clone is stored.
    pub cow: Backing,
    /// Size of the disk in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether the store may be one that can fill up. Then somebody must watch it: [`cow::watch`].
    pub watched: bool,
}

/// A clone that can be mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cloned {
    /// Its device-mapper name.
    pub name: String,
    /// Its number.
    pub device: DeviceNumber,
    /// The path to mount it by.
    pub path: PathBuf,
}

/// The cut that was made.
#[derive(Clone, Debug)]
pub struct Cut {
    /// How long writers to the first disk waited.
    pub freeze: Duration,
    /// A moment just before the cut, for [`meter::changed_since`](super::meter::changed_since).
    pub before: SystemTime,
    /// The clones, in the order of the request.
    pub clones: Vec<Cloned>,
    /// What had been written to each disk at the cut, for [`meter::since`](super::meter::since).
    pub marks: Vec<Mark>,
}

/// What to do when somebody does not close a device in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenBusy {
    /// Leave it as it is, and say so.
    Refuse,
    /// Make every read and write of it fail, so that it holds nothing any more; it goes when it is closed. The last
    /// resort: the kernel logs the errors of whatever still uses it.
    CutOff,
}

/// What a removal has left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Devices that were cut off and go when their last user closes them.
    pub deferred: Vec<String>,
}

/// A clone with what is behind it, all of it checked.
#[derive(Debug)]
pub(super) struct Checked<'c> {
    of: &'c CloneOf,
    origin: Attached,
    cow: Attached,
}

impl Checked<'_> {
    /// Its names, and its devices with what they are.
    pub(super) fn parts(&self) -> ([&String; 2], [(DeviceNumber, &Backing); 2]) {
        let devices = [(self.origin.device(), &self.of.origin), (self.cow.device(), &self.of.cow)];
        ([&self.of.active, &self.of.clone], devices)
    }
}

/// Clones with both tables waiting: `snapshot-origin` in the disk, `snapshot` in the clone. Nothing is live yet.
pub(super) struct Loaded<'c>(&'c [Checked<'c>]);

/// Clones all disks in one instant. Nobody sees more of it than a pause of the length of [`Cut::freeze`].
///
/// # Errors
/// [`Failed`] with the reason; everything that was done has been undone, in reverse.
pub fn clone_disks(dm: &Dm, clones: &[CloneOf]) -> Result<Cut, Failed> {
    clone_mounted(dm, clones, &Mounts::new())
}

/// As [`clone_disks`], where some disks have file systems that must be frozen by their own means.
///
/// # Errors
/// As [`clone_disks`]; [`StorageError::NotFrozen`] if a disk has such a file system, is in use, and no mount of it is given.
pub fn clone_mounted(dm: &Dm, clones: &[CloneOf], mounts: &Mounts) -> Result<Cut, Failed> {
    let clean = |cause| Failed { cause, undo: Vec::new() };
    let checked = check(dm, clones, mounts).map_err(clean)?;
    let cut = Loaded::load(dm, &checked).and_then(|loaded| {
        let Moment { freeze, before, marks } = cut::cut(dm, &loaded.turns(), mounts)?;
        Ok(Cut { freeze, before, clones: loaded.finish(dm)?, marks })
    });
    cut.map_err(|cause| Failed { cause, undo: undo(dm, &checked) })
}

pub(super) fn check<'c>(
    dm: &Dm,
    clones: &'c [CloneOf],
    mounts: &Mounts,
) -> Result<Vec<Checked<'c>>, StorageError> {
    if clones.is_empty() {
        return Err(StorageError::NoDisks);
    }
    // Before their devices are looked at: of one that is named twice that would say something else.
    copy::refuse_twice(clones.iter().flat_map(|of| [&of.active, &of.clone]), std::iter::empty())?;
    let checked = clones.iter().map(|of| check_one(dm, of)).collect::<Result<Vec<_>, _>>()?;
    copy::refuse_twice(std::iter::empty(), checked.iter().flat_map(|one| one.parts().1))?;
    refuse_own_file_systems(dm, clones)?;
    for of in clones {
        copy::can_be_frozen(dm, &of.active, mounts)?;
    }
    Ok(checked)
}

fn check_one<'c>(dm: &Dm, of: &'c CloneOf) -> Result<Checked<'c>, StorageError> {
    let (origin, cow) = (of.origin.attach()?, of.cow.attach()?);
    let lines = dm.table(&of.active)?;
    if Table::recognise(&lines, of.sectors) != Some(Table::Linear { device: origin.device() }) {
        return Err(other_table(&of.active, &lines, "a linear disk over the origin"));
    }
    if dm.info(&of.clone)?.is_some() {
        let lines = dm.table(&of.clone)?;
        return Err(other_table(&of.clone, &lines, "nothing"));
    }
    if !of.watched {
        cow::check_room(&of.cow, cow.device().sectors()?, of.sectors)?;
    }
    block::open_exclusive(cow.device())?;
    must_be_free(of, cow.device())?;
    Ok(Checked { of, origin, cow })
}

/// A store has nothing in it that anybody wants: no clone, and on a device nothing of somebody who has come to use it since.
fn must_be_free(of: &CloneOf, cow: DeviceNumber) -> Result<(), StorageError> {
    if !matches!(cow::header(cow)?, Header::Free | Header::Foreign) {
        return Err(StorageError::CowNotFree { cow: of.cow.to_string() });
    }
    let Backing::Device(path) = &of.cow else { return Ok(()) };
    match signatures(path)?.as_slice() {
        [] => Ok(()),
        found => Err(StorageError::CowTaken { cow: of.cow.to_string(), found: found.join(", ") }),
    }
}

/// While a disk is frozen nothing may be written to its file system; an image that lies there would be.
fn refuse_own_file_systems(dm: &Dm, clones: &[CloneOf]) -> Result<(), StorageError> {
    let mut frozen = Vec::new();
    for of in clones {
        frozen.extend(dm.info(&of.active)?.map(|info| (info.device, &of.active)));
    }
    for backing in clones.iter().flat_map(|of| [&of.origin, &of.cow]) {
        let Backing::Image(path) = backing else { continue };
        let Some(file_system) = block::file_system_of(path)? else { continue };
        let below = file_system.stack()?;
        if let Some((_, name)) = frozen.iter().find(|(device, _)| below.contains(device)) {
            return Err(StorageError::OnItself { file: backing.to_string(), device: (*name).clone() });
        }
    }
    Ok(())
}

impl<'c> Loaded<'c> {
    pub(super) fn load(dm: &Dm, checked: &'c [Checked<'c>]) -> Result<Self, StorageError> {
        for one in checked {
            let (origin, cow) = (one.origin.device(), one.cow.device());
            cow::wipe(cow)?;
            dm.load(&one.of.active, &Table::Origin { device: origin }.lines(one.of.sectors))?;
            dm.create(&one.of.clone)?;
            dm.load(&one.of.clone, &Table::Snapshot { origin, cow }.lines(one.of.sectors))?;
        }
        Ok(Self(checked))
    }

    pub(super) fn turns(&self) -> Vec<Turn> {
        let turn = |one: &Checked<'_>| Turn {
            active: one.of.active.clone(),
            sectors: one.of.sectors,
            table: Table::Origin { device: one.origin.device() },
            wake: Some(one.of.clone.clone()),
        };
        self.0.iter().map(turn).collect()
    }

    /// The clones, after the cut.
    pub(super) fn finish(self, dm: &Dm) -> Result<Vec<Cloned>, StorageError> {
        self.0.iter().map(|one| cloned(dm, &one.of.clone)).collect()
    }
}

fn cloned(dm: &Dm, name: &str) -> Result<Cloned, StorageError> {
    match cow::status(dm, name)? {
        SnapshotStatus::Valid(_) => {}
        lost => {
            return Err(StorageError::CloneLost { name: name.to_owned(), status: format!("{lost:?}") });
        }
    }
    let path = dm.node(name)?;
    Ok(Cloned { name: name.to_owned(), device: DeviceNumber::of_path(&path)?, path })
}

/// Undoes whatever has been done of a clone, in reverse, and goes on after errors.
pub(super) fn undo(dm: &Dm, checked: &[Checked<'_>]) -> Vec<StorageError> {
    let mut errors = Vec::new();
    for one in checked.iter().rev() {
        let removed = dm.remove_when_closed(&one.of.clone, UNDO_LIMIT).map_err(StorageError::from);
        let linear = back_to_linear(dm, one.of, one.origin.device());
        let wiped = if removed.is_ok() { clear(&one.of.cow, one.cow.device()) } else { Ok(()) };
        errors.extend([removed.map(|_| ()), linear.map(|_| ()), wiped].into_iter().filter_map(Result::err));
    }
    errors
}

/// Gives a disk its table of peace again. Right also if there is no such disk or it has that table.
fn back_to_linear(dm: &Dm, of: &CloneOf, origin: DeviceNumber) -> Result<Done, StorageError> {
    remove_half_made(dm, &of.active)?;
    let Some(info) = dm.info(&of.active)? else { return Ok(Done::AlreadySo) };
    if info.inactive {
        dm.clear(&of.active)?;
    }
    if info.suspended {
        dm.resume(&of.active)?;
    }
    let lines = dm.table(&of.active)?;
    let linear = Table::Linear { device: origin };
    match Table::recognise(&lines, of.sectors) {
        Some(table) if table == linear => Ok(Done::AlreadySo),
        Some(Table::Origin { device }) if device == origin => {
            dm.load(&of.active, &linear.lines(of.sectors))?;
            dm.swap(&of.active)?;
            Ok(Done::Changed)
        }
        _ => Err(other_table(&of.active, &lines, "the origin of the clone")),
    }
}

/// Discards the clones: they are removed, the disks are plain again, the stores are free. Live: the disks stay in use.
///
/// The clones must have been unmounted. Right also if some or all of it has been done, and after a reboot.
///
/// # Errors
/// [`Unfinished`] with everything that could not be done; the rest has been.
pub fn discard(dm: &Dm, clones: &[CloneOf], limit: Duration, busy: WhenBusy) -> Result<Removed, Unfinished> {
    let mut errors = Vec::new();
    let mut removed = Removed::default();
    for of in clones.iter().rev() {
        let gone = remove(dm, &of.clone, of.sectors, limit, busy, &mut removed);
        let wipe = gone.is_ok();
        let freed = free(dm, of, wipe);
        errors.extend([gone, freed].into_iter().filter_map(Result::err));
    }
    Unfinished::check(errors).map(|()| removed)
}

/// The origin goes back to peace, the store is made free and taken away.
fn free(dm: &Dm, of: &CloneOf, wipe: bool) -> Result<(), StorageError> {
    let origin = of.origin.attach()?;
    back_to_linear(dm, of, origin.device())?;
    if wipe {
        free_cow(&of.cow)?;
    }
    Ok(())
}

/// Clears a store in which there is a clone. What a clone has kept may look like something of somebody's, which would be in the way
/// on a device the next time; so that goes first, as long as the header says whose it is.
fn clear(cow: &Backing, device: DeviceNumber) -> Result<(), StorageError> {
    if let Backing::Device(path) = cow {
        forget(path)?;
    }
    cow::wipe(device)
}

/// Makes a store free. The clone in it, if there is one, is gone for good. What is no clone on a device is somebody else's, and stays.
///
/// # Errors
/// [`StorageError`], e.g. if a clone is still using it.
pub fn free_cow(cow: &Backing) -> Result<(), StorageError> {
    if !cow.path().exists() {
        return Ok(());
    }
    let attached = cow.attach()?;
    match (cow::header(attached.device())?, cow) {
        (Header::Free, _) | (Header::Foreign, Backing::Device(_)) => {}
        (Header::Foreign, Backing::Image(_)) | (Header::Valid | Header::Invalid, _) => {
            clear(cow, attached.device())?;
        }
    }
    drop(attached);
    cow.detach().map(|_| ())
}

/// Removes a device when it is closed, or cuts it off if that is allowed.
pub(super) fn remove(
    dm: &Dm,
    name: &str,
    sectors: u64,
    limit: Duration,
    busy: WhenBusy,
    removed: &mut Removed,
) -> Result<(), StorageError> {
    if is_cut_off(dm, name)? {
        removed.deferred.push(name.to_owned());
        return Ok(());
    }
    match dm.remove_when_closed(name, limit) {
        Ok(_) => Ok(()),
        Err(DmError::Busy { .. }) if busy == WhenBusy::CutOff => {
            dm.load(name, &Table::Error.lines(sectors))?;
            dm.swap(name)?;
            if dm.remove_deferred(name)? == Removal::Deferred {
                removed.deferred.push(name.to_owned());
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether a device goes with its last user. He has nothing of the disk any more, and is not waited for a second time.
fn is_cut_off(dm: &Dm, name: &str) -> Result<bool, StorageError> {
    Ok(dm.info(name)?.is_some_and(|info| info.deferred))
}

/// Takes disks and clones out of the kernel and keeps both: [`reopen`] brings them back with everything in them. For
/// `down`, and before a reboot of the host. Both sides must have been stopped and unmounted.
///
/// The disk goes first: without its snapshot it would take writes that are not kept for the clone. So if the disk is
/// still open, its clone is not touched. If only the clone is still open, it goes on without the disk, which is safe:
/// it never writes to the origin.
///
/// Right also if some or all of it has been done.
///
/// # Errors
/// [`Unfinished`] with everything that is still open; the rest is closed.
pub fn close(dm: &Dm, clones: &[CloneOf], limit: Duration) -> Result<(), Unfinished> {
    let one = |of: &CloneOf| {
        if !is_cut_off(dm, &of.active)? {
            dm.remove_when_closed(&of.active, limit)?;
        }
        dm.remove_when_closed(&of.clone, limit)?;
        of.cow.detach()?;
        of.origin.detach()?;
        Ok::<_, StorageError>(())
    };
    Unfinished::check(clones.iter().rev().filter_map(|of| one(of).err()).collect())
}

/// Proof that no device writes to an origin through device-mapper, so that a snapshot of it may come alive.
struct NotMapped(());

impl NotMapped {
    fn of(dm: &Dm, of: &CloneOf) -> Result<Option<Self>, StorageError> {
        Ok(dm.info(&of.active)?.is_none().then_some(Self(())))
    }
}

/// Makes the clones of before a reboot usable again, with their disks: until commit or discard both sides are there.
///
/// Right also if they are usable already, or if only the disk's device is missing: it is made after its snapshot and
/// reads the chunk size from it. If only the **clone's** device is missing, what the disk took since is not kept for it,
/// and this is refused. Only for clones on record as existing: after a boot that goes back to the
/// old side, [`discard`] (or [`free_cow`]) comes **before** the old side writes; else a store is left that looks whole,
/// and is a clone of a disk that has changed under it.
///
/// # Errors
/// [`StorageError::CowEmpty`] if there is no clone in the store, [`StorageError::CloneLost`],
/// [`StorageError::OtherTable`] if the disk is in use without its clone: then what was written since is lost to it.
pub fn reopen(dm: &Dm, clones: &[CloneOf]) -> Result<Vec<Cloned>, StorageError> {
    clones.iter().map(|of| reopen_one(dm, of)).collect()
}

fn reopen_one(dm: &Dm, of: &CloneOf) -> Result<Cloned, StorageError> {
    remove_both_half_made(dm, of)?;
    let (origin, cow) = (of.origin.attach()?, of.cow.attach()?);
    let snapshot = Table::Snapshot { origin: origin.device(), cow: cow.device() };
    let lines = live_table(dm, &of.clone)?;
    if Table::recognise(&lines, of.sectors) != Some(snapshot) {
        let Some(quiet) = NotMapped::of(dm, of)? else {
            return Err(other_table(&of.active, &dm.table(&of.active)?, "nothing"));
        };
        if !lines.is_empty() {
            return Err(other_table(&of.clone, &lines, "nothing"));
        }
        match cow::header(cow.device())? {
            Header::Valid => open_snapshot(dm, of, snapshot, quiet)?,
            Header::Invalid => {
                return Err(StorageError::CloneLost { name: of.clone.clone(), status: "Invalid".to_owned() });
            }
            Header::Free | Header::Foreign => {
                return Err(StorageError::CowEmpty { cow: of.cow.to_string() });
            }
        }
    }
    open_origin(dm, of, origin.device())?;
    cloned(dm, &of.clone)
}

/// Whether there is no clone in these stores any more that is whole: they are free, or were too small.
///
/// # Errors
/// [`StorageError`] if that cannot be told.
pub fn are_spent(dm: &Dm, clones: &[CloneOf]) -> Result<bool, StorageError> {
    for of in clones {
        let cow = of.cow.attach()?;
        // Of one that took no more writes only the kernel knows.
        let is_open = !live_table(dm, &of.clone)?.is_empty();
        let is_lost = is_open && !matches!(cow::status(dm, &of.clone)?, SnapshotStatus::Valid(_));
        if !is_lost && cow::header(cow.device())? == Header::Valid {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Clones disks whose devices are not there, such as those that are about to go from one partition to another: nobody
/// writes, so nothing has to stand still. Disks and clones can be mounted then.
///
/// # Errors
/// [`Failed`] with the reason; everything that was done has been undone.
pub fn clone_closed(dm: &Dm, clones: &[CloneOf]) -> Result<(), Failed> {
    let made = clones.iter().try_for_each(|of| clone_one_closed(dm, of));
    made.map_err(|cause| {
        let undo =
            unclone_closed(dm, clones, UNDO_LIMIT).err().map_or_else(Vec::new, |Unfinished(errors)| errors);
        Failed { cause, undo }
    })
}

fn clone_one_closed(dm: &Dm, of: &CloneOf) -> Result<(), StorageError> {
    remove_both_half_made(dm, of)?;
    let (origin, cow) = (of.origin.attach()?, of.cow.attach()?);
    let Some(quiet) = NotMapped::of(dm, of)? else {
        return Err(other_table(&of.active, &dm.table(&of.active)?, "nothing"));
    };
    if dm.info(&of.clone)?.is_some() {
        return Err(other_table(&of.clone, &dm.table(&of.clone)?, "nothing"));
    }
    if !of.watched {
        cow::check_room(&of.cow, cow.device().sectors()?, of.sectors)?;
    }
    block::open_exclusive(origin.device())?;
    block::open_exclusive(cow.device())?;
    must_be_free(of, cow.device())?;
    cow::wipe(cow.device())?;
    open_snapshot(dm, of, Table::Snapshot { origin: origin.device(), cow: cow.device() }, quiet)?;
    open_origin(dm, of, origin.device())?;
    cloned(dm, &of.clone).map(drop)
}

/// Takes away what [`clone_closed`] has made: the disks are as they are, what the clones had kept is of no use any more.
/// Both sides must have been unmounted. Right also if some or all of it has been done; other devices of these names stay.
///
/// # Errors
/// [`Unfinished`] with everything that is still open.
pub fn unclone_closed(dm: &Dm, clones: &[CloneOf], limit: Duration) -> Result<(), Unfinished> {
    let one = |of: &CloneOf| {
        let (origin, cow) = (of.origin.attach()?, of.cow.attach()?);
        let of_disk = Table::Origin { device: origin.device() };
        let of_clone = Table::Snapshot { origin: origin.device(), cow: cow.device() };
        remove_both_half_made(dm, of)?;
        // The disk first: without its snapshot it would take writes that are not kept.
        for (name, table) in [(&of.active, of_disk), (&of.clone, of_clone)] {
            if Table::recognise(&live_table(dm, name)?, of.sectors) == Some(table) {
                dm.remove_when_closed(name, limit)?;
            }
        }
        Ok::<_, StorageError>(())
    };
    Unfinished::check(clones.iter().rev().filter_map(|of| one(of).err()).collect())
}

/// As [`remove_half_made`], of both sides.
fn remove_both_half_made(dm: &Dm, of: &CloneOf) -> Result<(), StorageError> {
    [&of.active, &of.clone].into_iter().try_for_each(|name| remove_half_made(dm, name))
}

fn open_snapshot(
    dm: &Dm,
    of: &CloneOf,
    snapshot: Table,
    NotMapped(()): NotMapped,
) -> Result<(), StorageError> {
    dm.create(&of.clone)?;
    dm.load(&of.clone, &snapshot.lines(of.sectors))?;
    Ok(dm.resume(&of.clone)?)
}

/// The origin comes after its snapshot.
fn open_origin(dm: &Dm, of: &CloneOf, device: DeviceNumber) -> Result<(), StorageError> {
    let table = Table::Origin { device };
    let lines = live_table(dm, &of.active)?;
    if lines.is_empty() {
        dm.create(&of.active)?;
        dm.load(&of.active, &table.lines(of.sectors))?;
        dm.resume(&of.active)?;
        dm.node(&of.active)?;
        return Ok(());
    }
    if Table::recognise(&lines, of.sectors) == Some(table) {
        return Ok(());
    }
    Err(other_table(&of.active, &lines, "the origin of the clone"))
}

/// The table in use; empty if there is no such device or it has none.
pub(super) fn live_table(dm: &Dm, name: &str) -> Result<Vec<Target>, StorageError> {
    match dm.table(name) {
        Err(DmError::NoDevice(_)) => Ok(Vec::new()),
        lines => Ok(lines?),
    }
}
