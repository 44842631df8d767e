//! Applies the patches of the table, once (patent Fig. 12).

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::log::{Log, hex};
use super::paths::Paths;
use super::results::{Recorded, failed};
use super::supervisor::{Ending, Supervisor, Task, program};
use super::{identity, policy, report, say};
use crate::control::Message;
use crate::patch::wire::{
    Driver, Identity, OnError, PatchFailure, PatchInput, PatchOutcome, PatchTableInput, WIRE_MAX,
};

/// How long the agent is looked for when the results are ready.
const PATIENCE: Duration = Duration::from_secs(5);
/// The exit status of `apply` if a patch failed.
const PATCH_FAILED: u8 = 20;

/// Whether there is a table whose patches have not been dealt with.
pub(super) fn is_wanted(paths: &Paths) -> bool {
    match table(paths) {
        Ok(Some(table)) => {
            let results = Recorded::open(&paths.results(), &table.job, &report::boot_id(paths));
            !results.get().finished
        }
        Ok(None) => false,
        // `apply` says what is wrong with it.
        Err(_) => true,
    }
}

/// Applies the patches and reports. The exit status: 0 if there is nothing to do or all went well.
pub(super) fn main(paths: &Paths) -> u8 {
    match apply(paths) {
        Ok(true) => 0,
        Ok(false) => PATCH_FAILED,
        Err(error) => {
            say(&format!("failed to apply patches: {error}"));
            74
        }
    }
}

fn apply(paths: &Paths) -> io::Result<bool> {
    policy::restore(paths)?;
    let Some(table) = table(paths)? else {
        say("there are no patches to apply");
        return Ok(true);
    };
    let mut recorded = Recorded::open(&paths.results(), &table.job, &report::boot_id(paths));
    if recorded.get().finished {
        say(&format!("the patches of job {} have been dealt with", table.job));
        return Ok(true);
    }
    // Orphans of patches become ours, so that a patch can be killed with everything that it started.
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))?;
    let mut supervisor = Supervisor::new()?;
    policy::set(paths)?;
    let ran = run(paths, &table, &mut recorded, &mut supervisor);
    policy::restore(paths)?;
    ran?;
    recorded.finish(&table)?;
    let results = recorded.get().clone();
    let success = results.outcomes.iter().all(PatchOutcome::success);
    let fits = results.encode().and_then(|bytes| crate::patch::wire::PatchResults::parse(&bytes));
    report::tell(paths, &Message::Results(fits.map_err(io::Error::other)?), PATIENCE);
    Ok(success)
}

fn table(paths: &Paths) -> io::Result<Option<PatchTableInput>> {
    let file = match File::open(paths.table()) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(WIRE_MAX as u64 + 1).read_to_end(&mut bytes)?;
    PatchTableInput::parse(&bytes).map(Some).map_err(io::Error::other)
}

fn run(
    paths: &Paths,
    table: &PatchTableInput,
    recorded: &mut Recorded,
    supervisor: &mut Supervisor,
) -> io::Result<()> {
    let boot_id = recorded.get().boot_id.clone();
    recorded.settle_interrupted()?;
    if recorded.get().outcomes.is_empty() && table.identity == Identity::Renew {
        identity::renew(paths, supervisor)?;
    }
    // Everything is verified before anything is run.
    for patch in &table.patches {
        if recorded.get().outcome(&patch.id).is_none()
            && let Err(failure) = verify(paths, patch)
        {
            say(&format!("patch {}: {}", patch.id, describe(failure)));
            recorded.end(vec![failed(&patch.id, failure, &boot_id)])?;
        }
    }
    for unit in units(&table.patches) {
        let bad = recorded.get().outcomes.iter().any(|outcome| !outcome.success());
        if supervisor.is_stopping() || (bad && table.on_error == OnError::Stop) {
            return Ok(());
        }
        let todo: Vec<&PatchInput> =
            unit.into_iter().filter(|patch| recorded.get().outcome(&patch.id).is_none()).collect();
        if todo.is_empty() {
            continue;
        }
        recorded.begin(&todo)?;
        let outcomes = run_unit(paths, table, &todo, &boot_id, supervisor)?;
        recorded.end(outcomes)?;
    }
    Ok(())
}

/// What is run together: all packages of a group, at the place of the first; every script alone.
fn units(patches: &[PatchInput]) -> Vec<Vec<&PatchInput>> {
    let mut units: Vec<Vec<&PatchInput>> = Vec::new();
    for patch in patches {
        let same = |unit: &&mut Vec<&PatchInput>| {
            let first = unit[0];
            patch.driver == Driver::Deb && first.driver == Driver::Deb && first.group == patch.group
        };
        match units.iter_mut().find(same) {
            Some(unit) => unit.push(patch),
            None => units.push(vec![patch]),
        }
    }
    units
}

/// The file has to be the one that the host's table names.
fn verify(paths: &Paths, patch: &PatchInput) -> Result<(), PatchFailure> {
    let options = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let opened = File::options().read(true).custom_flags(options).open(paths.at(&patch.path()));
    // Why it cannot be read makes no difference to what follows.
    let mut file = opened.ok().ok_or(PatchFailure::Missing)?;
    let found = file.metadata().ok().filter(fs::Metadata::is_file).ok_or(PatchFailure::Missing)?;
    if found.size() != patch.size {
        return Err(PatchFailure::Digest);
    }
    let mut digest = Sha256::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        match file.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => digest.update(&piece[..count]),
            Err(_) => return Err(PatchFailure::Missing),
        }
    }
    if hex(&digest.finalize()) == patch.sha256 { Ok(()) } else { Err(PatchFailure::Digest) }
}

fn run_unit(
    paths: &Paths,
    table: &PatchTableInput,
    patches: &[&PatchInput],
    boot_id: &str,
    supervisor: &mut Supervisor,
) -> io::Result<Vec<PatchOutcome>> {
    let names: Vec<&str> = patches.iter().map(|patch| patch.id.as_str()).collect();
    say(&format!("applying {}", names.join(", ")));
    let limit = patches.iter().fold(0_u64, |sum, patch| sum.saturating_add(patch.time_limit_s));
    let command = match patches[0].driver {
        Driver::Deb => dpkg(paths, patches),
        Driver::Script => script(paths, patches[0]).map(Some)?,
    };
    let Some(mut command) = command else {
        say("there is no dpkg here");
        return Ok(patches.iter().map(|patch| failed(&patch.id, PatchFailure::Driver, boot_id)).collect());
    };
    command.env("PATCHSWITCH_JOB", &table.job).env("PATCHSWITCH_BOOT_ID", boot_id);
    command.env("PATCHSWITCH_PATCHES", names.join(" "));
    let (mut log, start) = (Log::default(), Instant::now());
    let task = Task::new(command).limit(Duration::from_secs(limit.min(7 * 24 * 3600))).log(&mut log);
    let (exit_code, signal, failure) = match supervisor.run(task) {
        Ok(Ending::Exited(code)) => (Some(code), None, None),
        Ok(Ending::Signaled(signal)) => (None, Some(signal), None),
        Ok(Ending::TimeOut) => (None, None, Some(PatchFailure::TimeOut)),
        Ok(Ending::Stopped) => (None, None, Some(PatchFailure::Interrupted)),
        Err(error) => {
            log.push(format!("failed to start: {error}\n").as_bytes());
            (None, None, Some(PatchFailure::Driver))
        }
    };
    rustix::fs::syncfs(File::open(paths.root().unwrap_or("/".as_ref()))?)?;
    let duration_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (log_digest, log_tail) = log.finish();
    let outcome = |patch: &&PatchInput| PatchOutcome {
        id: patch.id.clone(),
        exit_code,
        signal,
        failure,
        duration_ms,
        log_digest: log_digest.clone(),
        log_tail: log_tail.clone(),
        boot_id: boot_id.to_owned(),
    };
    Ok(patches.iter().map(outcome).collect())
}

/// Asks nothing, keeps configuration files that the administrator changed.
///
/// It does not wait for the disk after each file: if the power fails now, the clone is discarded whatever is in it. All
/// is written out at once before the result is recorded.
fn dpkg(paths: &Paths, patches: &[&PatchInput]) -> Option<std::process::Command> {
    let mut command = program(&paths.program("dpkg")?);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command.args(["--force-confdef", "--force-confold", "--force-unsafe-io", "-i"]);
    command.args(patches.iter().map(|patch| paths.at(&patch.path())));
    Some(command)
}

fn script(paths: &Paths, patch: &PatchInput) -> io::Result<std::process::Command> {
    let path: PathBuf = paths.at(&patch.path());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o500))?;
    let mut command = program(&path);
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("PATCHSWITCH_ROOT", paths.root().unwrap_or("/".as_ref()));
    Ok(command)
}

fn describe(failure: PatchFailure) -> &'static str {
    match failure {
        PatchFailure::Missing => "its file is not there",
        PatchFailure::Digest => "its file is another one than the table names",
        _ => "failed",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn patch(id: usize, driver: Driver, group: u32) -> PatchInput {
        PatchInput {
            id: id.to_string(),
            file: "f".to_owned(),
            sha256: "0".repeat(64),
            size: 0,
            driver,
            time_limit_s: 1,
            group,
        }
    }

    #[test]
    fn packages_of_a_group_are_one_unit_at_the_place_of_the_first() {
        use Driver::{Deb, Script};
        let patches =
            [patch(0, Deb, 1), patch(1, Script, 1), patch(2, Deb, 1), patch(3, Deb, 2), patch(4, Script, 1)];
        let ids: Vec<String> = units(&patches)
            .iter()
            .map(|unit| unit.iter().map(|patch| patch.id.as_str()).collect::<Vec<_>>().join("+"))
            .collect();
        assert_eq!(ids, ["0+2", "1", "3", "4"]);
    }

    proptest! {
        #[test]
        fn every_patch_is_in_exactly_one_unit_and_scripts_are_alone(
            kinds in prop::collection::vec((any::<bool>(), 0..3_u32), 0..20),
        ) {
            let patches: Vec<PatchInput> = kinds
                .iter()
                .enumerate()
                .map(|(id, (deb, group))| patch(id, if *deb { Driver::Deb } else { Driver::Script }, *group))
                .collect();
            let units = units(&patches);
            let mut seen: Vec<&str> = units.iter().flatten().map(|patch| patch.id.as_str()).collect();
            seen.sort_by_key(|id| id.parse::<usize>().unwrap());
            let all: Vec<String> = (0..patches.len()).map(|id| id.to_string()).collect();
            prop_assert_eq!(seen, all);
            for unit in &units {
                prop_assert!(unit.len() == 1 || unit.iter().all(|p| p.driver == Driver::Deb && p.group == unit[0].group));
            }
        }
    }
}
