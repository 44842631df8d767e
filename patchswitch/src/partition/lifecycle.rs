//! Start, stop, exec, state: the life of a partition's processes.
//!
//! Everything is idempotent and leaves nothing behind when it fails. A start looks at everything it can before it
//! changes anything; what it has made until a failure is undone in reverse, and the error says both.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::bundle::{self, DataMount, Facts, Pid1};
use super::console::{Console, ConsoleError};
use super::control::{ControlError, ControlServer, Members};
use super::spec::{Disk, Init, PartitionSpec, SpecError};
use crate::control::Boot;
use crate::exit::ExitCode;
use crate::host::linux::cgroup::{Cgroup, CgroupError};
use crate::host::linux::mountns::{MountNamespace, MountNsError};
use crate::host::linux::netns::Netns;
use crate::host::linux::pidfd::{Process, ProcessId};
use crate::host::linux::root::RootError;
use crate::host::linux::runtime::{Runtime, RuntimeError};
use crate::names::{self, Name, RUN_ROOT};
use crate::patch::wire::WireError;

mod error;
mod inside;
mod pid1;

pub use error::LifecycleError;
pub use inside::{
    exec, full_speed, logs, mounts_of, read_results, unmask, wait_results, wait_results_while, wait_started,
};

/// How long a killed partition may take to be empty. A tenth of a second is usual; more means a process that waits
/// for a device.
const KILL: Duration = Duration::from_secs(10);
/// How much longer than its own limit a partition may take to stop, before it is killed.
const MARGIN: Duration = Duration::from_secs(5);

/// Where a partition's processes are to run.
#[derive(Debug)]
pub struct Site<'a> {
    /// What the partition is.
    pub spec: &'a PartitionSpec,
    /// Where its system disk is mounted, in the agent's mount namespace.
    pub root: &'a Path,
    /// Its network.
    pub netns: &'a Netns,
    /// Its application disks, mounted there as well.
    pub data: Vec<DataMount>,
    /// Whether another partition serves: its singletons stay masked, because that one runs them, and it gets only the
    /// processor time that nobody else wants.
    pub quiet: bool,
}

/// A partition whose init has been started, and the agent's end of its control channel.
#[derive(Debug)]
pub struct Started {
    /// Its init.
    pub process: Process,
    /// What it says.
    pub control: ControlServer,
    /// What kind of init it is.
    pub pid1: Pid1,
    /// `false` if it was running before.
    pub changed: bool,
}

/// How a partition was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// `false` if nothing of it was there.
    pub changed: bool,
    /// Whether it had to be killed.
    pub killed: bool,
}

/// How far a partition is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// No process of it runs.
    Stopped,
    /// Its init runs.
    Running {
        /// Its init, in the agent's process namespace.
        pid: u32,
        /// This boot of it.
        boot_id: String,
    },
    /// Its init has ended, but processes or files of it are left: [`stop`] clears them away.
    Remains,
}

/// What the agent writes down about a running partition, for the next agent.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    pid: u32,
    start: u64,
    pid1: Pid1,
    boot_id: String,
}

/// The run-time files of a partition.
struct Files {
    dir: PathBuf,
}

impl Files {
    fn of(name: &Name) -> Self {
        Self { dir: Path::new(RUN_ROOT).join("partitions").join(name.as_str()) }
    }

    fn record(&self) -> PathBuf {
        self.dir.join("record.json")
    }

    fn bundle(&self) -> PathBuf {
        self.dir.join("bundle")
    }

    fn control(&self) -> PathBuf {
        self.dir.join("control")
    }

    fn masks(&self) -> PathBuf {
        self.dir.join("masks")
    }
}

/// An application disk as the bundle has it: mounted on the host here, in the partition where its definition says.
pub fn data_mount(disk: &Disk, source: &Path) -> DataMount {
    DataMount { source: source.to_owned(), target: disk.mount.clone(), read_only: disk.read_only }
}

/// Starts a partition. If it runs already, takes hold of it.
///
/// # Errors
/// [`LifecycleError`]. Nothing of the partition is left then, unless the error says so
/// ([`LifecycleError::NotUndone`]).
pub fn start(runtime: &Runtime, mounts: &MountNamespace, site: &Site<'_>) -> Result<Started, LifecycleError> {
    let name = &site.spec.name;
    if let Some(running) = find(name)? {
        return Ok(running);
    }
    site.spec.check()?;
    let cgroup = cgroup(name)?;
    let pid1 = mounts.run(|_| pid1::choose(site.spec.init, site.root))??;
    // What an agent left that was killed half-way.
    let _ = stop(runtime, mounts, site.spec, Duration::ZERO)?;
    let started = bring_up(runtime, mounts, site, pid1, &cgroup);
    started.map_err(|cause| match stop(runtime, mounts, site.spec, Duration::ZERO) {
        Ok(_) => cause,
        Err(undo) => LifecycleError::NotUndone { cause: Box::new(cause), undo: Box::new(undo) },
    })
}

fn bring_up(
    runtime: &Runtime,
    mounts: &MountNamespace,
    site: &Site<'_>,
    pid1: Pid1,
    cgroup: &Cgroup,
) -> Result<Started, LifecycleError> {
    let name = site.spec.name.as_str();
    let files = Files::of(&site.spec.name);
    make_dir(&files.bundle())?;
    let boot = Boot::new().map_err(LifecycleError::io("make a boot of", name))?;
    let control = ControlServer::listen(&files.control(), boot, Members::Cgroup(cgroup.clone()))?;
    write_bundle(site, pid1, &files)?;
    let console = Console::of(&site.spec.name).open()?;
    let pid = mounts.run(|inside| runtime.create(inside, name, &files.bundle(), console))??;
    let early = || LifecycleError::EndedEarly { name: site.spec.name.clone() };
    let process = Process::open(pid).map_err(LifecycleError::io("take hold of", name))?.ok_or_else(early)?;
    // The number came from a file: it counts only if the process is the partition's.
    if !cgroup.contains(pid)? {
        return Err(early());
    }
    let id = process.id().map_err(LifecycleError::io("take hold of", name))?.ok_or_else(early)?;
    let record = Record { pid: id.pid, start: id.start, pid1, boot_id: control.boot().boot_id.clone() };
    write(
        &files.record(),
        &serde_json::to_vec(&record)
            .map_err(io::Error::from)
            .map_err(LifecycleError::io("write the record of", name))?,
    )?;
    mounts.run(|inside| runtime.start(inside, name))??;
    Ok(Started { process, control, pid1, changed: true })
}

fn write_bundle(site: &Site<'_>, pid1: Pid1, files: &Files) -> Result<(), LifecycleError> {
    let masks = files.masks();
    make_dir(&masks)?;
    if site.quiet && pid1 == Pid1::Systemd {
        for unit in &site.spec.singletons {
            let link = masks.join(unit_name(unit));
            symlink("/dev/null", &link).map_err(LifecycleError::io("make", &link))?;
        }
    }
    // By our own descriptor: whether a name below /run/netns leads anywhere depends on the mount namespace.
    let netns = format!("/proc/{}/fd/{}", std::process::id(), site.netns.as_fd().as_raw_fd());
    let facts = Facts {
        pid1,
        root: site.root,
        netns: Path::new(&netns),
        control: &files.control(),
        data: &site.data,
        quiet: site.quiet,
        masks: &masks,
    };
    let config = bundle::config(site.spec, &facts)?;
    let path = files.bundle().join("config.json");
    config.save(&path).map_err(LifecycleError::Bundle)
}

/// A singleton without a suffix is a service.
fn unit_name(singleton: &str) -> String {
    if singleton.contains('.') { singleton.to_owned() } else { format!("{singleton}.service") }
}

/// Takes hold of a partition that another agent started; `None` if it does not run.
///
/// # Errors
/// [`LifecycleError`] if it cannot be told, or its control socket cannot be made anew.
pub fn find(name: &Name) -> Result<Option<Started>, LifecycleError> {
    let files = Files::of(name);
    let Some((record, process)) = recorded(&files)? else { return Ok(None) };
    let Some(boot) = ControlServer::boot_of(&files.control())? else { return Ok(None) };
    let control = ControlServer::resume(&files.control(), boot, Members::Cgroup(cgroup(name)?))?;
    Ok(Some(Started { process, control, pid1: record.pid1, changed: false }))
}

/// How far a partition is. Asks the kernel, not the runtime.
///
/// # Errors
/// [`LifecycleError`].
pub fn state(name: &Name) -> Result<State, LifecycleError> {
    let files = Files::of(name);
    if let Some((record, process)) = recorded(&files)? {
        return Ok(State::Running { pid: process.pid(), boot_id: record.boot_id });
    }
    let remains = files.dir.exists() || cgroup(name)?.exists();
    Ok(if remains { State::Remains } else { State::Stopped })
}

/// The init that was written down, if it is alive.
fn recorded(files: &Files) -> Result<Option<(Record, Process)>, LifecycleError> {
    let path = files.record();
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LifecycleError::io("read", &path)(error)),
    };
    // One that was cut short belongs to a start that was cut short.
    let Ok(record) = serde_json::from_slice::<Record>(&bytes) else { return Ok(None) };
    let id = ProcessId { pid: record.pid, start: record.start };
    let process = Process::reopen(id).map_err(LifecycleError::io("look for the init of", &path))?;
    let alive = |process: &Process| process.has_ended().map(|ended| !ended);
    match process {
        Some(process) if alive(&process).map_err(LifecycleError::io("look at the init of", &path))? => {
            Ok(Some((record, process)))
        }
        _ => Ok(None),
    }
}

/// How long [`stop`] may take at most, by the same limit.
pub fn longest_stop(spec: &PartitionSpec, limit: Duration) -> Duration {
    let own = Duration::from_secs(spec.stop_limit_s) + MARGIN;
    limit.max(own) + KILL
}

/// Stops a partition: asks it, waits, kills what is left, and clears everything away. Nothing there: nothing to do.
///
/// `limit` is how long it may take to stop by itself; zero kills at once. It is not given less than its own limit,
/// [`PartitionSpec::stop_limit_s`], unless it is zero.
///
/// # Errors
/// [`LifecycleError::Remains`] with all that failed; the rest was done.
pub fn stop(
    runtime: &Runtime,
    mounts: &MountNamespace,
    spec: &PartitionSpec,
    limit: Duration,
) -> Result<Stopped, LifecycleError> {
    let (name, files) = (&spec.name, Files::of(&spec.name));
    let cgroup = cgroup(name)?;
    let mut failed = Vec::new();
    let mut killed = false;
    let found = recorded(&files).unwrap_or_else(|error| {
        failed.push(error);
        None
    });
    if let Some((record, process)) = &found {
        let own = Duration::from_secs(spec.stop_limit_s) + MARGIN;
        let limit = if limit.is_zero() { limit } else { limit.max(own) };
        // Why it could not be asked does not matter if killing works.
        killed = !ask(runtime, mounts, name, record.pid1, process, limit).unwrap_or(false);
    }
    // Also what is left when the init has ended by itself, or was never written down.
    let mut changed = found.is_some();
    let populated = note(&mut failed, cgroup.is_empty()).is_none_or(|empty| !empty);
    if populated {
        note(&mut failed, cgroup.kill_all(KILL));
        changed = true;
    }
    let deleted = mounts.run(|inside| runtime.delete(inside, name.as_str()));
    changed |= note(&mut failed, deleted).and_then(|deleted| note(&mut failed, deleted)).unwrap_or(false);
    changed |= note(&mut failed, cgroup.remove()).unwrap_or(false);
    changed |= note(&mut failed, remove_dir(&files.dir)).unwrap_or(false);
    // Common to all partitions, and gone with the last one.
    let parent = Cgroup::new(names::CGROUP_ROOT).and_then(|parent| parent.remove_if_unused());
    note(&mut failed, parent);
    let _ = files.dir.parent().map(fs::remove_dir);
    if failed.is_empty() {
        return Ok(Stopped { changed, killed });
    }
    Err(LifecycleError::Remains { name: name.clone(), failed })
}

/// Whether it ended by itself, in time.
fn ask(
    runtime: &Runtime,
    mounts: &MountNamespace,
    name: &Name,
    pid1: Pid1,
    process: &Process,
    limit: Duration,
) -> Result<bool, LifecycleError> {
    if limit.is_zero() {
        return Ok(false);
    }
    let deadline = Instant::now() + limit;
    mounts.run(|inside| runtime.kill(inside, name.as_str(), pid1.stop_signal()))??;
    process.wait(deadline).map_err(LifecycleError::io("wait for", name.as_str()))
}

fn note<T, E: Into<LifecycleError>>(failed: &mut Vec<LifecycleError>, result: Result<T, E>) -> Option<T> {
    result.map_err(|error| failed.push(error.into())).ok()
}

fn cgroup(name: &Name) -> Result<Cgroup, CgroupError> {
    Cgroup::new(&names::cgroup(name))
}

fn make_dir(dir: &Path) -> Result<(), LifecycleError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(LifecycleError::io("make", dir))
}

fn write(path: &Path, content: &[u8]) -> Result<(), LifecycleError> {
    let new = path.with_extension("new");
    let written = fs::write(&new, content).and_then(|()| fs::rename(&new, path));
    written.map_err(LifecycleError::io("write", path))
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn remove_dir(dir: &Path) -> Result<bool, LifecycleError> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(LifecycleError::io("remove", dir)(error)),
    }
}
