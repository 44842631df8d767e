//! Copies of whole disks, made while the service runs: what is said of them, and what ends them.

use std::collections::BTreeMap;

use super::context::at;
use super::{Context, Failure, Phase};
use crate::exit::ExitCode;
use crate::host::linux::cutter::Mounts;
use crate::host::linux::dm::Dm;
use crate::manager::{Machine, ManagerError};
use crate::storage::copies::{self, Copies, Engine, Progress};
use crate::storage::copy::CopyOf;
use crate::storage::write_log::Round;
use crate::storage::{Failed, StorageError};

/// So many steps of a copy are told.
const STEPS: u64 = 5;

/// Begins the copies that a partition is to get, and has them follow their disks; none if there is nothing to copy.
pub(super) fn begin<'dm>(
    job: &Context<'_>,
    phase: Phase,
    (dm, mounts): (&'dm Dm, &Mounts),
    (active, standby): (&Machine, &Machine),
) -> Result<Option<Copies<'dm>>, Failure> {
    let wanted = job.manager.wanted_copies(active, standby);
    if wanted.is_empty() {
        return Ok(None);
    }
    job.manager.make_logs(&wanted).map_err(at(phase))?;
    let has_logs = wanted.iter().any(|wanted| matches!(wanted.by, Engine::Log(_)));
    let (mut stopped, mut told) = (None, BTreeMap::new());
    let begun = copies::begin(dm, wanted, mounts, job.manager.config.job.copy, &mut |progress| {
        if let Some(text) = words(progress, &mut told) {
            (job.say)(&format!("{phase}: {text}"));
        }
        go_on(job, phase, has_logs).map_err(|failure| {
            stopped = Some(failure);
            StorageError::CalledOff
        })
    });
    match (begun, stopped) {
        (Ok(copies), _) => Ok(Some(copies)),
        (Err(Failed { undo, .. }), Some(failure)) if undo.is_empty() => Err(failure),
        (Err(failed), _) => Err(at(phase)(ManagerError::from(failed))),
    }
}

/// Has them catch up once more: nobody waits yet.
pub(super) fn catch_up(job: &Context<'_>, phase: Phase, copies: &mut Copies<'_>) -> Result<(), Failure> {
    let mut stopped = None;
    let caught = copies.catch_up(&mut |_| {
        // Only logs have anything to catch up with.
        go_on(job, phase, true).map_err(|failure| {
            stopped = Some(failure);
            StorageError::CalledOff
        })
    });
    match (caught, stopped) {
        (Err(_), Some(failure)) => Err(failure),
        (caught, _) => caught.map_err(|error| at(phase)(ManagerError::from(error))),
    }
}

fn go_on(job: &Context<'_>, phase: Phase, has_logs: bool) -> Result<(), Failure> {
    job.go_on(phase)?;
    if !has_logs || job.manager.has_room_for_logs() {
        return Ok(());
    }
    let reason = format!(
        "the file system of {} is nearly full, and what is written to a disk while it is copied is kept there",
        job.manager.state().display()
    );
    Err(Failure { phase, reason, code: ExitCode::Unavailable })
}

/// What is worth a line.
fn words(progress: Progress<'_>, told: &mut BTreeMap<String, u64>) -> Option<String> {
    match progress {
        Progress::Copied { of: CopyOf { active, sectors, .. }, bytes } => {
            let all = sectors.saturating_mul(512).max(1);
            let step = bytes.saturating_mul(STEPS) / all;
            let last = told.entry(active.clone()).or_insert(0);
            if step <= *last {
                return None;
            }
            *last = step;
            Some(format!("{} % of {active} copied, {} MiB in all", step * 100 / STEPS, all >> 20))
        }
        Progress::Replayed { of, round } => Some(format!("{}: {}", of.active, of_round(round))),
    }
}

fn of_round(round: &Round) -> String {
    format!(
        "{:.1} MiB written meanwhile ({:.2} MiB/s) were replayed in {:.2} s; the rest would take {:.2} s",
        mib(round.bytes),
        round.dirty_rate() / f64::from(1 << 20),
        round.replayed_s,
        round.predicted_s()
    )
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::storage::disk::Backing;

    #[test]
    fn steps_are_told_once() {
        let image = |name: &str| Backing::Image(PathBuf::from(name));
        let of = CopyOf {
            active: "ps-a-data".to_owned(),
            copy: "ps-b-data".to_owned(),
            origin: image("/a"),
            target: image("/b"),
            sectors: 10 << 11,
        };
        let mut told = BTreeMap::new();
        let mut said = Vec::new();
        for mib in 0..=10 {
            said.extend(words(Progress::Copied { of: &of, bytes: mib << 20 }, &mut told));
        }
        let expected = [20, 40, 60, 80, 100].map(|p| format!("{p} % of ps-a-data copied, 10 MiB in all"));
        assert_eq!(said, expected);
        let round = Round { records: 9, bytes: 3 << 20, recorded_s: 2.0, replayed_s: 0.5 };
        assert_eq!(
            words(Progress::Replayed { of: &of, round: &round }, &mut told).unwrap(),
            "ps-a-data: 3.0 MiB written meanwhile (1.50 MiB/s) were replayed in 0.50 s; the rest would take 0.12 s"
        );
    }
}
