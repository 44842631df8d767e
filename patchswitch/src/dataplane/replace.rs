//! The programs of a newer version in the place of those that are attached, without a packet lost.
//!
//! ```text
//!  new twin ─► maps alike? ─► new programs on the maps in use ─► same as before? nothing to do
//!                                └─► self-test by the twin ─► each hook: one update ─► pins
//! ```
//!
//! An update exchanges the program of a link at once (`BPF_LINK_UPDATE`; of a filter: a change under its handle): each
//! packet meets the old program or the new one. Both read the same word, so the order among the hooks does not matter,
//! and whoever is killed in between leaves what works. A new program has a pin of its own from before its first update
//! until it gets its predecessor's: while there is one, hooks may have another program than the pins, and the next one
//! goes on.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::programs::{Program, ProgramInfo};
use patchswitch_common::Slot;

use super::attach::{self, Hook, Point};
use super::self_test::{self, End};
use super::{DataplaneError, load, maps, xdp};

/// What the replacement needs to know of the attachment.
#[derive(Clone, Copy, Debug)]
pub struct Replacement<'a> {
    /// What is attached where.
    pub hooks: &'a [Hook],
    /// The service addresses.
    pub addresses: &'a [IpAddr],
    /// Whom the self-test asks.
    pub ends: &'a [End<'a>],
    /// Whom the self-test of XDP sends frames, also if there is but one.
    pub all_ends: &'a [End<'a>],
    /// Replace programs by equal ones as well.
    pub force: bool,
}

/// What is not used yet.
const NEXT: &str = "next";

/// Where the new twin is until it is used.
pub(super) fn next_dir(directory: &Path) -> PathBuf {
    directory.join(NEXT)
}

/// Where the old twin is until it is gone.
fn past_dir(directory: &Path) -> PathBuf {
    directory.join("past")
}

/// Where a new program is until its predecessor's pin is its own. The BPF file system keeps names with a dot for itself.
fn fresh(directory: &Path, point: Point) -> PathBuf {
    beside(directory, point, "new")
}

fn beside(directory: &Path, point: Point, what: &str) -> PathBuf {
    directory.join("programs").join(format!("{}-{what}", point.program()))
}

/// Whether a replacement was killed while it exchanged programs: what is attached may not be what is pinned.
pub(super) fn is_unfinished(directory: &Path) -> bool {
    Point::all(true).iter().any(|point| fresh(directory, *point).exists())
}

/// What a replacement that was killed may have left, but for what tells of it.
pub(super) fn remove_remains(directory: &Path) -> Result<(), DataplaneError> {
    let pins = Point::all(true).iter().map(|point| load::remove_file(&beside(directory, *point, NEXT)));
    let pins = pins.fold(Ok(()), Result::and);
    load::remove_all(&next_dir(directory)).and(load::remove_all(&past_dir(directory))).and(pins)
}

/// Whether there was something to replace. What fails before the first update leaves a twin that nobody uses, which the
/// next attempt and a detach take away.
pub(super) fn replace(directory: &Path, what: Replacement<'_>) -> Result<bool, DataplaneError> {
    remove_remains(directory)?;
    let next = next_dir(directory);
    let has_xdp = what.hooks.iter().any(|hook| hook.point == Point::Xdp);
    let points = Point::all(has_xdp);
    self_test::prepare(&next, what.addresses, has_xdp)?;
    maps::compare(directory, &next)?;
    let mut ebpf = load::load_onto(directory)?;
    let mut alike = !is_unfinished(directory) && has_twin_like(directory, &next, has_xdp)?;
    for point in points.iter().copied() {
        let program = load::program(&mut ebpf, point)?;
        alike &= tag(program, point)? == tag_of_pinned(directory, point)?;
    }
    if alike && !what.force {
        load::remove_all(&next)?;
        return Ok(false);
    }
    let slots = [maps::read_slot(directory, Slot::A)?, maps::read_slot(directory, Slot::B)?];
    self_test::run(&next, &slots, what.ends)?;
    if has_xdp {
        xdp::run(directory, &next, what.all_ends)?;
    }
    for point in points.iter().copied() {
        let program = load::in_object(&mut ebpf, point)?;
        announce(directory, point, program)?;
        for hook in what.hooks.iter().filter(|hook| hook.point == point) {
            attach::update(directory, hook, program)?;
        }
        rename(&fresh(directory, point), &directory.join("programs").join(point.program()))?;
    }
    swap_twin(directory)?;
    Ok(true)
}

/// What the kernel calls a program after its instructions.
fn tag(program: &Program, point: Point) -> Result<u64, DataplaneError> {
    let info = program.info().map_err(|error| load::refused("look at", point.program(), &error))?;
    Ok(info.tag())
}

fn tag_of_pinned(directory: &Path, point: Point) -> Result<u64, DataplaneError> {
    let info = ProgramInfo::from_pin(directory.join("programs").join(point.program()));
    Ok(info.map_err(|error| load::refused("look at", point.program(), &error))?.tag())
}

/// Whether the twin in use has the programs of the next one: whoever was killed before it was exchanged left an old one.
fn has_twin_like(directory: &Path, next: &Path, has_xdp: bool) -> Result<bool, DataplaneError> {
    let twin = super::twin_dir(directory);
    let mut alike = twin.exists();
    for point in load::points_of_twin(has_xdp) {
        // One that cannot be read is another one.
        alike = alike && tag_of_pinned(&twin, *point).ok() == Some(tag_of_pinned(next, *point)?);
    }
    Ok(alike)
}

/// Pins a new program beside its predecessor, before anything is done with it. The pin of one whose replacement was killed
/// tells of that until this one has its place.
fn announce(directory: &Path, point: Point, program: &mut Program) -> Result<(), DataplaneError> {
    let pin = beside(directory, point, NEXT);
    program.pin(&pin).map_err(|error| DataplaneError::Program {
        action: "pin",
        program: point.program().to_owned(),
        reason: error.to_string(),
    })?;
    rename(&pin, &fresh(directory, point))
}

fn swap_twin(directory: &Path) -> Result<(), DataplaneError> {
    let (twin, past) = (super::twin_dir(directory), past_dir(directory));
    if twin.exists() {
        rename(&twin, &past)?;
    }
    rename(&next_dir(directory), &twin)?;
    load::remove_all(&past)
}

fn rename(from: &Path, to: &Path) -> Result<(), DataplaneError> {
    let failed = |source| DataplaneError::File { action: "rename pin", path: from.to_owned(), source };
    fs::rename(from, to).map_err(failed)
}
