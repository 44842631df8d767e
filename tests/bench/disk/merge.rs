//! Row 17: how fast a clone becomes the disk, over a plain copy of as much, and how long a writer waits meanwhile.

use std::time::{Duration, Instant};

use anyhow::Result;
use patchswitch::storage::disk::{Disk, Room, deactivate};
use patchswitch::storage::merge::{Patience, commit};
use patchswitch::storage::snapshot::{WhenBusy, clone_disks};

use super::Scale;
use super::ground::{Ground, LIMIT, MIB, sh};
use super::peers;
use super::writer::{Writer, within};
use crate::report::{Figure, Found, Target};
use crate::stats::Block;

/// By how much the clone differs.
const CHANGED: u64 = 192 * MIB;
const PATIENCE: Patience = Patience { close: LIMIT, busy: WhenBusy::Refuse, merge: Duration::from_secs(600) };

pub(super) fn measure(ground: &Ground, scale: Scale, found: &mut Found) -> Result<()> {
    let (mut blocks, mut waits) = (Vec::new(), Vec::new());
    for round in 0..=scale.rounds() {
        let (disk, _active) = ground.disk("merge", peers::SIZE, Room::Allocated)?;
        let of = ground.clone_of(&disk, "merge", 240 * MIB)?;
        let before = copied(ground, &disk, &of)?;
        let cut = clone_disks(&ground.dm, std::slice::from_ref(&of))?;
        let clone = cut.clones.into_iter().next().map(|clone| clone.path).unwrap_or_default();
        let at = ground.mount(&clone, "merge")?;
        sh(&format!(
            "dd if=/dev/zero of={}/changed bs=1M count={} oflag=direct conv=fsync status=none",
            at.display(),
            CHANGED / MIB
        ))?;
        let writer = Writer::start(&at)?;
        std::thread::sleep(Duration::from_millis(100));
        let mut sectors = 0;
        let begun = Instant::now();
        let merged = commit(&ground.dm, std::slice::from_ref(&of), PATIENCE, &mut |progress| {
            sectors = sectors.max(progress.left);
        });
        let ended = Instant::now();
        let all = writer.stop()?;
        merged?;
        let rate = (sectors * 512) as f64 / (ended - begun).as_secs_f64();
        ground.unmount(&at)?;
        let disk = Disk { name: of.clone.clone(), ..disk };
        let after = copied(ground, &disk, &of)?;
        deactivate(&ground.dm, &disk, LIMIT)?;
        if round > 0 {
            blocks.push(Block { a: [before, after], b: [rate; 2] });
            waits.push(within(&all, begun, ended).last().copied().unwrap_or(f64::NAN));
        }
        std::fs::remove_file(disk.backing.path())?;
        std::fs::remove_file(of.cow.path())?;
    }
    let figure = Figure::ratio(17, "bytes merged a second, beside a writer", "copy", "bytes/s", &blocks);
    found.add(
        figure.must(Target::AtLeast(0.8)).note("dd of 192 MiB from the store to the disk, beside nobody"),
    );
    found.add(Figure::values(17, "a writer's longest wait in a merge", "-", "ms", &waits));
    Ok(())
}

/// Bytes a second of a plain copy from the store to the disk, when nobody uses either.
fn copied(ground: &Ground, disk: &Disk, of: &patchswitch::storage::snapshot::CloneOf) -> Result<f64> {
    deactivate(&ground.dm, disk, LIMIT)?;
    let (from, to) = (of.cow.attach()?, of.origin.attach()?);
    let [from_node, to_node] =
        [from.device().node()?, to.device().node()?].map(|node| node.display().to_string());
    let begun = Instant::now();
    sh(&format!(
        "dd if={from_node} of={to_node} bs=1M count={} iflag=direct oflag=direct conv=fsync status=none",
        CHANGED / MIB
    ))?;
    let rate = CHANGED as f64 / begun.elapsed().as_secs_f64();
    // It may have copied something that looks like a clone.
    sh(&format!("dd if=/dev/zero of={from_node} bs=64K count=1 oflag=direct conv=fsync status=none"))?;
    drop((from, to));
    of.cow.detach()?;
    of.origin.detach()?;
    patchswitch::storage::disk::activate(&ground.dm, disk)?;
    Ok(rate)
}
