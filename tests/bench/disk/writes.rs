//! Row 15: how fast a disk is written while there is a clone of it, the first time and again, over the same disk without one.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use patchswitch::storage::disk::Room;
use patchswitch::storage::snapshot::clone_disks;

use super::Scale;
use super::ground::{Ground, MIB, sh};
use super::peers::{self, Peer};
use crate::plan::Selection;
use crate::report::{Figure, Found, Target};
use crate::stats::{Block, Random};

/// What is written in one go.
const AREA: u64 = 32 * MIB;
/// Single blocks.
const BLOCKS: u64 = 200;
const BLOCK: usize = 4096;

/// How blocks are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// A MiB after the other, past the page cache.
    Sequential,
    /// 4 KiB here and there, each on disk before the next.
    Random,
}

impl How {
    const ALL: [Self; 2] = [Self::Sequential, Self::Random];

    const fn name(self) -> &'static str {
        match self {
            Self::Sequential => "1 MiB after the other",
            Self::Random => "4 KiB here and there, synced",
        }
    }
}

/// A buffer for what goes past the page cache.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new() -> Self {
        let bytes = vec![7; MIB as usize + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK).min(BLOCK);
        Self { bytes, start }
    }

    fn get(&self, length: usize) -> &[u8] {
        &self.bytes[self.start..self.start + length]
    }
}

/// Bytes a second.
fn write(device: &Path, how: How, seed: u64) -> Result<f64> {
    let flags = libc::O_DIRECT | if how == How::Random { libc::O_DSYNC } else { 0 };
    let file = File::options().write(true).custom_flags(flags).open(device)?;
    let (buffer, mut random) = (Aligned::new(), Random(seed | 1));
    let begun = Instant::now();
    let bytes = match how {
        How::Sequential => {
            for at in (0..AREA).step_by(MIB as usize) {
                file.write_all_at(buffer.get(MIB as usize), at)?;
            }
            file.sync_data()?;
            AREA
        }
        How::Random => {
            for _ in 0..BLOCKS {
                let place = random.next() % (AREA / BLOCK as u64);
                file.write_all_at(buffer.get(BLOCK), AREA + place * BLOCK as u64)?;
            }
            BLOCKS * BLOCK as u64
        }
    };
    Ok(bytes as f64 / begun.elapsed().as_secs_f64())
}

/// Rates without a clone, the first time beside one, and again.
struct Rates {
    plain: [f64; 2],
    first: f64,
    again: f64,
}

/// Measures one way to write, around a clone that is made and given up meanwhile.
fn around(device: &Path, how: How, seed: u64, clone: &mut dyn FnMut(bool) -> Result<()>) -> Result<Rates> {
    let before = write(device, how, seed)?;
    clone(true)?;
    // The same places: the second time none of them has to be kept any more.
    let rates = write(device, how, seed).and_then(|first| Ok((first, write(device, how, seed)?)));
    clone(false)?;
    let (first, again) = rates?;
    Ok(Rates { plain: [before, write(device, how, seed)?], first, again })
}

pub(super) fn measure(ground: &Ground, scale: Scale, selection: &Selection, found: &mut Found) -> Result<()> {
    let (disk, active) = ground.disk("writes", peers::SIZE, Room::Allocated)?;
    let of = ground.clone_of(&disk, "writes", 128 * MIB)?;
    let mut clone = |made: bool| match made {
        true => Ok(clone_disks(&ground.dm, std::slice::from_ref(&of)).map(drop)?),
        false => ground.discard(&of),
    };
    report(&active.path, scale, "patchswitch", true, &mut clone, found)?;
    ground.remove(&disk)?;
    std::fs::remove_file(of.cow.path())?;
    for peer in [Peer::Thick, Peer::Thin, Peer::Btrfs].into_iter().filter(|peer| selection.peer(peer.key())) {
        let volume = match peers::Volume::new(ground, peer) {
            Ok(volume) => volume,
            Err(error) => {
                found.not_run("writing beside a clone", peer.key(), format!("{error:#}"));
                continue;
            }
        };
        let done = area(&volume).and_then(|area| {
            let mut clone = |made: bool| if made { volume.clone() } else { volume.discard() };
            report(&area, scale, peer.key(), false, &mut clone, found)
        });
        volume.remove()?;
        done?;
    }
    Ok(())
}

/// What is written of a peer: its device, or a file where it has none for one subvolume.
fn area(volume: &peers::Volume) -> Result<PathBuf> {
    if let Some(device) = &volume.device {
        peers::there(device)?;
        sh(&format!("umount -n {}", volume.at.display()))?;
        return Ok(device.clone());
    }
    let file = volume.folder().join("area");
    sh(&format!(
        "dd if=/dev/zero of={} bs=1M count={} conv=fsync status=none",
        file.display(),
        2 * AREA / MIB
    ))?;
    Ok(file)
}

fn report(
    device: &Path,
    scale: Scale,
    who: &str,
    ours: bool,
    clone: &mut dyn FnMut(bool) -> Result<()>,
    found: &mut Found,
) -> Result<()> {
    for how in How::ALL {
        let (mut first, mut again) = (Vec::new(), Vec::new());
        for round in 0..=scale.rounds() as u64 {
            let rates = around(device, how, round * 7919 + 3, clone)?;
            // What is measured first does not count.
            if round > 0 {
                first.push(Block { a: rates.plain, b: [rates.first; 2] });
                again.push(Block { a: rates.plain, b: [rates.again; 2] });
            }
        }
        for (blocks, what, limit) in [(first, "first time", 0.35), (again, "again", 0.9)] {
            let metric = format!("{}, {what}", how.name());
            let figure = Figure::ratio(15, &metric, who, "bytes/s to itself without a clone", &blocks);
            found.add(if ours { figure.must(Target::AtLeast(limit)) } else { figure });
        }
    }
    Ok(())
}
