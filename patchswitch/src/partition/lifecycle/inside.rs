//! What is asked of a partition that runs: commands, results, what it said.

use std::path::Path;
use std::time::{Duration, Instant};

use super::{Files, LifecycleError, Started, cgroup, recorded, remove_file, unit_name};
use crate::host::linux::mountns::MountNamespace;
use crate::host::linux::root::{Absent, Place, Root, RootError};
use crate::host::linux::runtime::{Executed, Runtime};
use crate::names::Name;
use crate::partition::bundle::Pid1;
use crate::partition::console::Console;
use crate::partition::control::{Event, Next};
use crate::partition::spec::PartitionSpec;
use crate::patch::wire::{self, INIT_FILE, PatchResults, PatchTableInput};

/// How long systemd has to be alive to count as started.
const MOMENT: Duration = Duration::from_millis(500);
/// How often a long wait looks whether it is to go on.
const PIECE: Duration = Duration::from_millis(200);
/// How long a command to unmask singletons may take.
const UNMASK: Duration = Duration::from_secs(60);

/// Runs a command in a running partition.
///
/// # Errors
/// [`LifecycleError::NotRunning`]; [`LifecycleError::Runtime`], also when the command did not end in time.
pub fn exec(
    runtime: &Runtime,
    mounts: &MountNamespace,
    name: &Name,
    command: &[&str],
    limit: Duration,
) -> Result<Executed, LifecycleError> {
    if recorded(&Files::of(name))?.is_none() {
        return Err(LifecycleError::NotRunning { name: name.clone() });
    }
    Ok(mounts.run(|inside| runtime.exec(inside, name.as_str(), command, limit))??)
}

/// The mounts of a running partition; nothing if it does not run.
///
/// # Errors
/// [`LifecycleError`].
pub fn mounts_of(name: &Name) -> Result<Option<MountNamespace>, LifecycleError> {
    let Some((_, process)) = recorded(&Files::of(name))? else { return Ok(None) };
    Ok(Some(MountNamespace::of(&process)?))
}

/// Gives a partition that was started quietly the share of the processor that its specification says.
///
/// # Errors
/// [`LifecycleError::Cgroup`], also if it does not run.
pub fn full_speed(name: &Name) -> Result<(), LifecycleError> {
    Ok(cgroup(name)?.set_idle(false)?)
}

/// Starts the singletons of a partition that was started quietly, because it is the one that serves now.
///
/// # Errors
/// [`LifecycleError`]; [`LifecycleError::Unmask`] if one of them does not start.
pub fn unmask(
    runtime: &Runtime,
    mounts: &MountNamespace,
    spec: &PartitionSpec,
) -> Result<(), LifecycleError> {
    let files = Files::of(&spec.name);
    let not_running = || LifecycleError::NotRunning { name: spec.name.clone() };
    let (record, _) = recorded(&files)?.ok_or_else(not_running)?;
    if spec.singletons.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = match record.pid1 {
        Pid1::Patchswitch => spec.singletons.clone(),
        Pid1::Systemd => spec.singletons.iter().map(|name| unit_name(name)).collect(),
    };
    let commands: Vec<Vec<&str>> = match record.pid1 {
        Pid1::Patchswitch => {
            vec![[INIT_FILE, "unmask"].into_iter().chain(names.iter().map(String::as_str)).collect()]
        }
        Pid1::Systemd => {
            for unit in &names {
                let link = files.masks().join(unit);
                remove_file(&link).map_err(LifecycleError::io("remove", &link))?;
            }
            let start = ["systemctl", "start", "--"].into_iter().chain(names.iter().map(String::as_str));
            vec![vec!["systemctl", "daemon-reload"], start.collect()]
        }
    };
    for command in commands {
        let done = exec(runtime, mounts, &spec.name, &command, UNMASK)?;
        if done.code != 0 {
            let text = wire::printable(wire::tail(done.stderr.trim(), 1000));
            return Err(LifecycleError::Unmask { name: spec.name.clone(), code: done.code, text });
        }
    }
    Ok(())
}

/// Waits until the partition says that its service was started. systemd says nothing: there it is enough that it is
/// still alive after a moment. Whether the service serves is for probes to find out in either case.
///
/// The inner error is why it did not come up, in words.
///
/// # Errors
/// [`LifecycleError::Control`].
pub fn wait_started(started: &mut Started, deadline: Instant) -> Result<Result<(), String>, LifecycleError> {
    if started.pid1 == Pid1::Systemd {
        let moment = deadline.min(Instant::now() + MOMENT);
        let ended = started.process.wait(moment).map_err(LifecycleError::io("wait for", "systemd"))?;
        return Ok(if ended {
            Err("systemd ended at once; its console log may say why".to_owned())
        } else {
            Ok(())
        });
    }
    wait(started, deadline, &|| true, |event| matches!(event, Event::ServiceStarted).then_some(()))
}

/// Waits for the results of the patches. Results of another job are passed over.
///
/// The inner error is why there are none, in words; then the file in the root may have them: [`read_results`].
///
/// # Errors
/// [`LifecycleError::Control`].
pub fn wait_results(
    started: &mut Started,
    table: &PatchTableInput,
    deadline: Instant,
) -> Result<Result<PatchResults, String>, LifecycleError> {
    wait_results_while(started, table, deadline, &|| true)
}

/// As [`wait_results`], and ends early when `go_on` says no.
///
/// # Errors
/// [`LifecycleError::Control`].
pub fn wait_results_while(
    started: &mut Started,
    table: &PatchTableInput,
    deadline: Instant,
    go_on: &dyn Fn() -> bool,
) -> Result<Result<PatchResults, String>, LifecycleError> {
    wait(started, deadline, go_on, |event| match event {
        Event::Results(results) if results.job == table.job => Some(results.clone()),
        _ => None,
    })
}

fn wait<T>(
    started: &mut Started,
    deadline: Instant,
    go_on: &dyn Fn() -> bool,
    mut wanted: impl FnMut(&Event) -> Option<T>,
) -> Result<Result<T, String>, LifecycleError> {
    let mut said = None;
    loop {
        let piece = deadline.min(Instant::now() + PIECE);
        let found = started.control.wait_for(piece, Some(&started.process), |event| {
            if let Event::Stopping { reason, code } = event {
                said = Some(format!("{reason} (status {code})"));
            }
            wanted(event)
        })?;
        match found {
            Ok(found) => return Ok(Ok(found)),
            Err(Next::TimeOut) if Instant::now() < deadline && go_on() => {}
            Err(end) => return Ok(Err(unheard(&end, said))),
        }
    }
}

fn unheard(end: &Next, said: Option<String>) -> String {
    said.unwrap_or_else(|| match end {
        Next::TimeOut => "it said nothing in its time".to_owned(),
        _ => "it ended without a word; its console log may say why".to_owned(),
    })
}

/// Reads the results from the mounted root of a partition that did not report them. They are as hostile as those from
/// the channel. `None` if there are none.
///
/// # Errors
/// [`LifecycleError::Root`] if the file is not a plain one, [`LifecycleError::Wire`] if it cannot be understood.
pub fn read_results(mounts: &MountNamespace, root: &Path) -> Result<Option<PatchResults>, LifecycleError> {
    let read = |root: &Path| {
        let file =
            Path::new(wire::RESULT_FILE).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        Root::open(root)?.folder(Place::State, &[], Absent::Fail)?.read(file, wire::WIRE_MAX as u64)
    };
    match mounts.run(|_| read(root))? {
        Ok(bytes) => Ok(Some(PatchResults::parse(&bytes)?)),
        Err(RootError::Missing { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The end of what a partition wrote, at most so many bytes.
///
/// # Errors
/// [`LifecycleError`].
pub fn logs(name: &Name, limit: u64) -> Result<String, LifecycleError> {
    let ended = recorded(&Files::of(name))?.is_none();
    Ok(Console::of(name).tail(ended, limit)?)
}
