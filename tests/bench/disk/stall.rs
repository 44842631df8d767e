//! Row 14: how long a writer waits at the cut, over what a bare suspend and resume of the same device costs him.

use std::time::{Duration, Instant};

use anyhow::Result;
use patchswitch::host::linux::dm::Suspend;
use patchswitch::storage::copy::{CopyOf, abandon};
use patchswitch::storage::disk::{Disk, Room};
use patchswitch::storage::mirror;
use patchswitch::storage::snapshot::clone_disks;
use patchswitch::storage::write_log::{self, Limits, LogOf};

use super::Scale;
use super::ground::{Ground, LIMIT, MIB};
use super::peers::{self, Peer};
use super::writer::{Writer, within};
use crate::plan::Selection;
use crate::report::{Figure, Found, Target};
use crate::stats::quantile;

/// No copy: the table is exchanged for the same one, which is the least that any engine does.
const EXCHANGE: &str = "a bare exchange of tables";
const QUIET: Duration = Duration::from_millis(400);
/// What the issue of the wait is: the writer's own 99th percentile, and so many bare suspends.
const BARE: f64 = 1.3;

/// What a writer waited for something, and what he waits when nothing is done, in milliseconds.
struct Waits {
    longest: f64,
    usual: f64,
}

/// Lets somebody write, does something, and looks how long he waited for it.
fn under(folder: &std::path::Path, deed: &mut dyn FnMut() -> Result<()>) -> Result<Waits> {
    let writer = Writer::start(folder)?;
    let quiet = Instant::now();
    std::thread::sleep(QUIET);
    let begun = Instant::now();
    let done = deed();
    let ended = Instant::now();
    std::thread::sleep(Duration::from_millis(50));
    let all = writer.stop()?;
    done?;
    let longest = within(&all, begun, ended).last().copied().unwrap_or(f64::NAN);
    Ok(Waits { longest, usual: quantile(&within(&all, quiet, begun), 0.99) })
}

pub(super) fn measure(ground: &Ground, scale: Scale, selection: &Selection, found: &mut Found) -> Result<()> {
    let (disk, active) = ground.disk("stall", peers::SIZE, Room::Allocated)?;
    let at = ground.mount(&active.path, "stall")?;
    let bare = || {
        let mut times = Vec::new();
        for _ in 0..3 {
            let waits = under(&at, &mut || {
                ground.dm.suspend(&disk.name, Suspend::LockFs)?;
                Ok(ground.dm.resume(&disk.name)?)
            })?;
            times.push(waits.longest - waits.usual);
        }
        Ok::<f64, anyhow::Error>(crate::stats::median(&times))
    };
    let mut engines: [(&str, Vec<f64>, Vec<f64>); 4] =
        [EXCHANGE, "snapshot", "log", "mirror"].map(|name| (name, Vec::new(), Vec::new()));
    for round in 0..=scale.rounds() {
        let usual = bare()?;
        for (name, ratios, waited) in &mut engines {
            let waits = cut(ground, &disk, &at, name)?;
            // What is measured first does not count.
            if round > 0 {
                ratios.push((waits.longest - waits.usual) / usual);
                waited.push(waits.longest);
            }
        }
    }
    for (name, ratios, waited) in &engines {
        let metric = format!("a writer's wait at the cut, {name}");
        let figure = Figure::values(14, &metric, "suspend", "ratio of bare suspends", ratios);
        let figure = if *name == EXCHANGE { figure } else { figure.must(Target::AtMost(BARE)) };
        found.add(figure.note("beyond his own 99th percentile"));
        found.add(Figure::values(14, &metric, "-", "ms", waited));
    }
    ground.unmount(&at)?;
    ground.remove(&disk)?;
    for peer in [Peer::Thick, Peer::Thin, Peer::Btrfs].into_iter().filter(|peer| selection.peer(peer.key())) {
        other(ground, scale, peer, found)?;
    }
    Ok(())
}

/// What a writer waits for the cut of an engine.
fn cut(ground: &Ground, disk: &Disk, at: &std::path::Path, engine: &str) -> Result<Waits> {
    if engine == EXCHANGE {
        return under(at, &mut || {
            let same = ground.dm.table(&disk.name)?;
            ground.dm.load(&disk.name, &same)?;
            ground.dm.suspend(&disk.name, Suspend::LockFs)?;
            Ok(ground.dm.resume(&disk.name)?)
        });
    }
    if engine == "snapshot" {
        let of = ground.clone_of(disk, "stall", 64 * MIB)?;
        let waits = under(at, &mut || Ok(clone_disks(&ground.dm, std::slice::from_ref(&of)).map(drop)?))?;
        ground.discard(&of)?;
        return Ok(waits);
    }
    let copy = CopyOf {
        active: disk.name.clone(),
        copy: format!("{}-copy", disk.name),
        origin: disk.backing.clone(),
        target: ground.image("stall-copy", peers::SIZE, Room::Allocated)?,
        sectors: disk.sectors,
    };
    let waits = if engine == "log" {
        let image = |name| ground.image(name, 512 * MIB, Room::Sparse);
        let logs = [image("stall-log-0")?, image("stall-log-1")?];
        let log = LogOf { copy: copy.clone(), logs };
        let mut logs = write_log::begin(&ground.dm, std::slice::from_ref(&log), |_, _| Ok(()))?;
        logs.converge(Limits { rest: Duration::from_secs(5), rounds: 20 }, |_, _| Ok(()))?;
        let mut logs = Some(logs);
        let waits = under(at, &mut || {
            if let Some(logs) = logs.take() {
                logs.cut()?;
            }
            Ok(())
        });
        for image in &log.logs {
            let _ = image.detach()?;
        }
        waits?
    } else {
        let mirrors = mirror::begin(&ground.dm, std::slice::from_ref(&copy))?;
        mirrors.wait(Duration::from_secs(600), |_| Ok(()))?;
        let mut mirrors = Some(mirrors);
        under(at, &mut || {
            if let Some(mirrors) = mirrors.take() {
                mirrors.split()?;
            }
            Ok(())
        })?
    };
    abandon(&ground.dm, &copy, LIMIT)?;
    Ok(waits)
}

fn other(ground: &Ground, scale: Scale, peer: Peer, found: &mut Found) -> Result<()> {
    let volume = match peers::Volume::new(ground, peer) {
        Ok(volume) => volume,
        Err(error) => {
            found.not_run("a writer's wait at the cut", peer.key(), format!("{error:#}"));
            return Ok(());
        }
    };
    let folder = volume.folder();
    let mut waited = Vec::new();
    let rounds = (0..=scale.rounds()).try_for_each(|round| {
        let waits = under(&folder, &mut || volume.clone())?;
        volume.discard()?;
        if round > 0 {
            waited.push(waits.longest);
        }
        Ok::<(), anyhow::Error>(())
    });
    volume.remove()?;
    rounds?;
    found.add(Figure::values(14, "a writer's wait at the cut", peer.key(), "ms", &waited));
    Ok(())
}
