//! Row 13: how long a clone takes, by the size of the disk, and what others take for theirs.

use std::time::Instant;

use anyhow::Result;
use patchswitch::storage::disk::{Disk, Room};
use patchswitch::storage::snapshot::{CloneOf, clone_disks};

use super::Scale;
use super::ground::{Ground, MIB};
use super::peers::{self, Peer};
use crate::plan::Selection;
use crate::report::{Figure, Found, Target};
use crate::stats::abba;

/// Sizes of sparse disks, in GiB.
const SIZES: [u64; 4] = [1, 4, 16, 64];
const STORE: u64 = 64 * MIB;
const LIMIT_MS: f64 = 50.0;

pub(super) fn measure(ground: &Ground, scale: Scale, selection: &Selection, found: &mut Found) -> Result<()> {
    by_size(ground, scale, found)?;
    for peer in Peer::ALL.into_iter().filter(|peer| selection.peer(peer.key())) {
        against(ground, scale, peer, found)?;
    }
    Ok(())
}

/// How long one takes, and how long the disk stands still for it, in milliseconds.
fn clone(ground: &Ground, clone: &CloneOf) -> Result<(f64, f64)> {
    let begun = Instant::now();
    let cut = clone_disks(&ground.dm, std::slice::from_ref(clone))?;
    let took = begun.elapsed().as_secs_f64() * 1e3;
    ground.discard(clone)?;
    Ok((took, cut.freeze.as_secs_f64() * 1e3))
}

fn by_size(ground: &Ground, scale: Scale, found: &mut Found) -> Result<()> {
    let mut disks: Vec<(Disk, std::path::PathBuf, CloneOf)> = Vec::new();
    for size in SIZES {
        let name = format!("{size}g");
        let (disk, active) = ground.disk(&name, size << 30, Room::Sparse)?;
        let at = ground.mount(&active.path, &name)?;
        let of = ground.clone_of(&disk, &name, STORE)?;
        disks.push((disk, at, of));
    }
    let (mut times, mut still) = (vec![Vec::new(); SIZES.len()], Vec::new());
    for round in 0..=scale.rounds() {
        for step in 0..SIZES.len() {
            // Each size comes first as often as another.
            let index = (round + step) % SIZES.len();
            let (took, stood) = clone(ground, &disks[index].2)?;
            // What is measured first does not count.
            if round > 0 {
                times[index].push(took);
                still.push(stood);
            }
        }
    }
    let slopes: Vec<f64> = (0..scale.rounds())
        .map(|round| {
            slope(&SIZES.map(|size| size as f64), &times.iter().map(|of| of[round]).collect::<Vec<_>>())
        })
        .collect();
    let mut figure = Figure::values(13, "time to clone, by GiB of the disk", "size", "ms/GiB", &slopes);
    let flat = figure.row.ratio_low <= 0.0 && figure.row.ratio_high >= 0.0;
    figure.reached = Some(flat);
    found.add(figure.note("wanted: an interval that contains 0"));
    for (size, of) in SIZES.iter().zip(&times) {
        let metric = format!("time to clone {size} GiB");
        found.add(Figure::values(13, &metric, "-", "ms", of).must(Target::AtMost(LIMIT_MS)));
    }
    found.add(Figure::values(13, "of that, the disk stands still", "-", "ms", &still));
    for (disk, at, of) in disks {
        ground.unmount(&at)?;
        ground.remove(&disk)?;
        std::fs::remove_file(of.cow.path())?;
    }
    Ok(())
}

/// By how much the second grows with the first: least squares.
fn slope(x: &[f64], y: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (mx, my) = (mean(x), mean(y));
    let both: f64 = x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum();
    both / x.iter().map(|x| (x - mx) * (x - mx)).sum::<f64>()
}

fn against(ground: &Ground, scale: Scale, peer: Peer, found: &mut Found) -> Result<()> {
    let other = match peers::Volume::new(ground, peer) {
        Ok(other) => other,
        Err(error) => {
            found.not_run("time to clone", peer.key(), format!("{error:#}"));
            return Ok(());
        }
    };
    let (disk, active) = ground.disk("ours", peers::SIZE, Room::Allocated)?;
    let at = ground.mount(&active.path, "ours")?;
    let of = ground.clone_of(&disk, "ours", STORE)?;
    let blocks = abba(
        scale.rounds(),
        &mut || {
            let begun = Instant::now();
            other.clone()?;
            let took = begun.elapsed().as_secs_f64() * 1e3;
            other.discard()?;
            Ok([took])
        },
        &mut || Ok([clone(ground, &of)?.0]),
    );
    ground.unmount(&at)?;
    ground.remove(&disk)?;
    std::fs::remove_file(of.cow.path())?;
    other.remove()?;
    let [blocks] = blocks?;
    found.add(Figure::ratio(13, "time to clone", peer.key(), "ms", &blocks).note(peer.note()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_that_of_the_line() {
        assert!((slope(&[1.0, 2.0, 4.0], &[5.0, 7.0, 11.0]) - 2.0).abs() < 1e-9);
        assert!(slope(&[1.0, 4.0, 16.0], &[3.0, 3.0, 3.0]).abs() < 1e-9);
    }
}
