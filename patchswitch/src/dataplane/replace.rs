//! The programs of a newer version in the place of those that are attached, without a packet lost.
//!
//! ```text
//!  new twin ─► maps alike? ─► new programs on the maps in use ─► same as before? nothing to do
//!                                └─► self-test by the twin ─► each hook: one update ─► pins
//! ```
//!
//! An update exchanges the program of a link at once (`BPF_LINK_UPDATE`; of a filter: a change under its handle): each
//! packet meets the old program or the new one. Both read the same word, so the order among the hooks does not matter,
//! and whoever is killed in between leaves what works; the next one goes on.

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

/// Where the new twin is until it is used.
pub(super) fn next_dir(directory: &Path) -> PathBuf {
    directory.join("next")
}

/// Where the old twin is until it is gone.
fn past_dir(directory: &Path) -> PathBuf {
    directory.join("past")
}

/// What a replacement that was killed may have left.
pub(super) fn remove_remains(directory: &Path) -> Result<(), DataplaneError> {
    load::remove_all(&next_dir(directory)).and(load::remove_all(&past_dir(directory)))
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
    let mut alike = super::twin_dir(directory).exists();
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
        for hook in what.hooks.iter().filter(|hook| hook.point == point) {
            attach::update(directory, hook, program)?;
        }
        adopt(directory, point, program)?;
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

/// Gives a program the pin of its predecessor.
fn adopt(directory: &Path, point: Point, program: &mut Program) -> Result<(), DataplaneError> {
    let pin = directory.join("programs").join(point.program());
    // The BPF file system keeps names with a dot for itself.
    let fresh = directory.join("programs").join(format!("{}-new", point.program()));
    load::remove_file(&fresh)?;
    program.pin(&fresh).map_err(|error| DataplaneError::Program {
        action: "pin",
        program: point.program().to_owned(),
        reason: error.to_string(),
    })?;
    rename(&fresh, &pin)
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
