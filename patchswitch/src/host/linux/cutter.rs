//! Cuts all disks of a partition in one instant, and lets none of them stand still for more than two seconds.
//!
//! For the cut every origin is suspended, then every snapshot becomes live, then every origin goes on. While a device
//! is suspended whoever writes to it waits, so the process that resumes it must not be one that can be killed, paged
//! out, or wait for that very device. So it is done by a process of its own, forked, with its memory locked and its
//! calls ready, **before** anything is suspended; and a second one watches it.
//!
//! ```text
//!            go ──────────────►┌────────┐  freeze 1 … n              (file systems that a suspend does not freeze: btrfs)
//!                              │        │  suspend origin 1 … n      (all other file systems frozen, writes awaited)
//!  ┌───────┐                   │ cutter │  resume snapshot 1 … n     (they come alive on quiet origins)
//!  │ agent │◄──────── report ──└────────┘  resume origin 1 … n       (through snapshot-origin), thaw
//!  └───────┘                       │ lease: "started" … "done"
//!      ▲                       ┌────────┐  no "done" within 1.5 s, or the lease's other end gone:
//!      └────────────── report ─│ guard  │  kill the cutter, resume every origin through its old table
//!                              └────────┘
//! ```
//!
//! | who dies, or hangs | who resumes |
//! |---|---|
//! | agent, before `go` | nothing is suspended; the pipe ends, both processes leave |
//! | agent, after `go` | the cutter finishes as if nothing had happened |
//! | cutter | the guard at once (the lease's other end is gone), and the agent |
//! | cutter waits for a write that never ends | its own alarm after 1.3 s; the guard after 1.5 s |
//! | cutter waits for a file system to freeze | the guard, after 1.5 s, all disks but that one; that one when it comes to rest |
//! | guard, before `go` | the cutter refuses to begin |
//! | guard, after `go` | the cutter finishes; if it dies as well, the agent resumes |
//! | agent and cutter | the guard |
//! | all three at once | nobody: a restarted agent resumes what it finds suspended |
//!
//! The order matters. `snapshot-origin` reads the chunk size of its snapshots when it is resumed (`origin_resume`,
//! `drivers/md/dm-snap.c`); resumed before its snapshot it would split big writes at no boundary at all, copy only
//! the first chunk of each, and the clone would be silently wrong. Here the origin is always resumed last, and after
//! a failure through its old table.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use super::block::Written;
use super::cutter_child::{
    self as child, CutterEnds, GuardEnds, Origin, REPORT, Ready, Report, Script, Stage,
};
use super::dm::{self, Dm, DmError};
use super::dm_ioctl::{self as wire, Call, Command};
use super::ioctl;

/// How long the two processes have to lock their memory.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// How long the agent waits for a report after `go`. The processes give up after 1.5 s.
const REPORT_LIMIT: Duration = Duration::from_secs(4);
/// How long the agent waits for the end of a process.
const REAP_LIMIT: Duration = Duration::from_secs(3);

/// Why there was no cut. Every origin has been resumed, through its old table unless the text says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// The processes could not be started.
    #[error("failed to prepare the cut")]
    Prepare(#[source] io::Error),
    /// A call could not be put together.
    #[error(transparent)]
    Dm(#[from] DmError),
    /// A process could not lock its memory, so it might have waited for the device that it has to resume.
    #[error("failed to lock the cutter's memory (see RLIMIT_MEMLOCK and the cgroup's memory.max)")]
    NotLocked(#[source] io::Error),
    /// The process that resumes everything was gone before the cut began.
    #[error("the cutter's guard was gone before the cut began; nothing was suspended")]
    NoGuard,
    /// The kernel refused one of the calls.
    #[error("failed to {verb} {name} during the cut")]
    Refused {
        /// Which call.
        verb: &'static str,
        /// Of which device.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The process that cut died or did not end in time.
    #[error("the cutter died or did not end in time; every origin has been resumed")]
    Died,
    /// The process that cut was killed and cannot end, because a device does not come to rest: the kernel does not
    /// let go of a process that freezes a file system.
    #[error(
        "a disk does not come to rest (is its device very slow or gone?); it is resumed when it does, the others have been"
    )]
    Stuck,
}

/// A directory of the file system on a disk, open, by the disk's name: of those file systems that have to be frozen by their
/// own means. btrfs is one; it is on several devices at once, so a device does not lead to it (`bdev_freeze`, `block/bdev.c`).
pub type Mounts = BTreeMap<String, File>;

/// What a cut was like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// How long the first device stood still: from before the first suspend to after the last resume.
    pub length: Duration,
    /// What had been written to each origin at the cut, in the order of the origins.
    pub written: Vec<Written>,
}

/// Two processes that are ready to cut, and the agent's ends of the pipes to them.
#[derive(Debug)]
pub struct Cutter<'dm> {
    dm: &'dm Dm,
    origins: Vec<String>,
    snapshots: Vec<String>,
    mounts: &'dm Mounts,
    go: Option<File>,
    cutter: Child,
    guard: Child,
}

/// A process of the cutter's, and the reports it sends.
#[derive(Debug)]
struct Child {
    pid: Pid,
    handle: OwnedFd,
    reports: File,
}

impl<'dm> Cutter<'dm> {
    /// Prepares the cut of these devices. Nothing is suspended yet; dropping the cutter ends it.
    ///
    /// The tables must be loaded already: `snapshot-origin` waiting in every origin, `snapshot` in every snapshot.
    ///
    /// # Errors
    /// [`CutError::Prepare`], [`CutError::NotLocked`], [`CutError::Dm`].
    pub fn fork(
        dm: &'dm Dm,
        origins: &[&str],
        snapshots: &[&str],
        mounts: &'dm Mounts,
    ) -> Result<Self, CutError> {
        let stats = origins.iter().map(|&name| open_stat(dm, name)).collect::<Result<Vec<_>, _>>()?;
        Self::prepare(dm, (origins, &stats), snapshots, mounts)
    }

    fn prepare(
        dm: &'dm Dm,
        (origins, stats): (&[&str], &[File]),
        snapshots: &[&str],
        mounts: &'dm Mounts,
    ) -> Result<Self, CutError> {
        let script = script(dm, (origins, stats), snapshots, mounts)?;
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let prepare = |error: rustix::io::Errno| CutError::Prepare(error.into());
        let (go_read, go_write) = pipe().map_err(prepare)?;
        let (lease_read, lease_write) = pipe().map_err(prepare)?;
        let (report_read, report_write) = pipe().map_err(prepare)?;
        let (rescue_read, rescue_write) = pipe().map_err(prepare)?;

        let ends = CutterEnds {
            go: go_read.as_raw_fd(),
            report: report_write.as_raw_fd(),
            lease: lease_write.as_raw_fd(),
        };
        let pid = child::fork_cutter(&script, ends).map_err(CutError::Prepare)?;
        let cutter = Child::adopt(pid, report_read)?;
        let ends = GuardEnds {
            lease: lease_read.as_raw_fd(),
            report: rescue_write.as_raw_fd(),
            cutter: cutter.handle.as_raw_fd(),
        };
        let guard = child::fork_guard(&script, ends).map_err(CutError::Prepare);
        // From here on each end of a pipe is held by one process only, so that its end is seen: the children close
        // what is not theirs.
        drop((go_read, report_write, rescue_write, lease_read, lease_write));
        let guard = guard.and_then(|pid| Child::adopt(pid, rescue_read)).inspect_err(|_| cutter.kill())?;

        let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
        let (origins, snapshots) = (names(origins), names(snapshots));
        let mut prepared = Self { dm, origins, snapshots, mounts, go: Some(go_write.into()), cutter, guard };
        for process in [&mut prepared.cutter, &mut prepared.guard] {
            match process.report(READY_LIMIT).map_err(CutError::Prepare)? {
                Some(Report { stage: Stage::Ready, .. }) => {}
                Some(other) => return Err(CutError::NotLocked(io::Error::from_raw_os_error(other.errno))),
                None => return Err(CutError::Died),
            }
        }
        Ok(prepared)
    }

    /// The process ids of the cutter and of its guard, for logs.
    pub fn processes(&self) -> [i32; 2] {
        [self.cutter.pid, self.guard.pid].map(|pid| pid.as_raw_nonzero().get())
    }

    /// Cuts.
    ///
    /// # Errors
    /// [`CutError`]; the devices go on in every case.
    pub fn cut(mut self) -> Result<Window, CutError> {
        let go = self.go.as_mut().ok_or(CutError::Died)?;
        go.write_all(b"g").map_err(|_gone| CutError::Died)?;
        let mut written = vec![Written::default(); self.origins.len()];
        loop {
            match self.cutter.report(REPORT_LIMIT) {
                Ok(Some(Report { stage: Stage::Counted, index, written: count, .. })) => {
                    if let Some(place) = written.get_mut(index as usize) {
                        *place = count;
                    }
                }
                Ok(Some(report)) => {
                    return self.judge(report).map(|length| Window { length, written });
                }
                Ok(None) | Err(_) => {
                    return Err(if self.rescue() { CutError::Died } else { CutError::Stuck });
                }
            }
        }
    }

    fn judge(&self, report: Report) -> Result<Duration, CutError> {
        let (verb, list) = match report.stage {
            Stage::Cut => return Ok(Duration::from_nanos(report.nanos)),
            Stage::Guard => return Err(CutError::NoGuard),
            Stage::Freeze => {
                ("freeze (somebody else may have: `fsfreeze --unfreeze`) the file system of", &self.origins)
            }
            Stage::Suspend => ("suspend", &self.origins),
            Stage::Activate => ("activate", &self.snapshots),
            Stage::Resume => ("resume", &self.origins),
            Stage::Ready | Stage::Rescued | Stage::Lock | Stage::Counted => return Err(CutError::Died),
        };
        let name = list.get(report.index as usize).cloned().unwrap_or_default();
        Err(CutError::Refused { verb, name, source: io::Error::from_raw_os_error(report.errno) })
    }

    /// What the guard does as well: both may, in any order. Says whether the cutter has ended.
    fn rescue(&self) -> bool {
        self.cutter.kill();
        for origin in &self.origins {
            // Clearing may fail where there is no device any more; then so does resuming, and rightly.
            let cleared = self.dm.clear(origin);
            if let Err(error) = self.dm.resume(origin).and(cleared) {
                tracing::error!(%origin, %error, "failed to resume after a broken cut");
            }
        }
        thaw(self.mounts);
        let ended = self.cutter.wait(REAP_LIMIT);
        // What the cutter was at when it was killed.
        for origin in &self.origins {
            if let Err(error) = self.dm.resume(origin) {
                tracing::error!(%origin, %error, "failed to resume after a broken cut");
            }
        }
        thaw(self.mounts);
        ended
    }
}

/// Lets file systems go on that a broken cut may have left frozen; not frozen: nothing to do.
pub fn thaw(mounts: &Mounts) {
    for (disk, directory) in mounts {
        match ioctl::thaw(directory.as_fd()) {
            Ok(()) => tracing::warn!(%disk, "its file system was still frozen, and goes on"),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => tracing::error!(%disk, %error, "failed to thaw its file system"),
        }
    }
}

impl Drop for Cutter<'_> {
    fn drop(&mut self) {
        // The cutter leaves at the end of this pipe, the guard at the end of the lease; then they are reaped.
        self.go = None;
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.wait(REAP_LIMIT) {
            return;
        }
        tracing::error!(pid = %self.pid, "a process of the cutter does not end; the agent waits for it in the background");
        if let Ok(handle) = self.handle.try_clone() {
            std::thread::spawn(move || reap(&handle, Duration::MAX));
        }
    }
}

impl Child {
    fn adopt(pid: Pid, reports: OwnedFd) -> Result<Self, CutError> {
        let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty());
        let handle = handle.map_err(|error| CutError::Prepare(error.into()))?;
        Ok(Self { pid, handle, reports: reports.into() })
    }

    /// The next report; `None` if the process has left without one.
    fn report(&mut self, limit: Duration) -> io::Result<Option<Report>> {
        if !readable(&self.reports, limit)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut bytes = [0; REPORT];
        match self.reports.read_exact(&mut bytes) {
            Ok(()) => Ok(Report::parse(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn kill(&self) {
        // The only error is that it has ended already.
        rustix::process::pidfd_send_signal(&self.handle, Signal::KILL).ok();
    }

    /// Waits for the end of the process and reaps it.
    fn wait(&self, limit: Duration) -> bool {
        reap(&self.handle, limit)
    }
}

/// Waits for the end of a process and reaps it; whether it came in time.
pub(super) fn reap(handle: &OwnedFd, limit: Duration) -> bool {
    if !readable(handle, limit).unwrap_or(false) {
        return false;
    }
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let reaped = rustix::process::waitid(WaitId::PidFd(handle.as_fd()), options);
    matches!(reaped, Ok(_) | Err(rustix::io::Errno::CHILD))
}

fn readable(fd: &impl AsFd, limit: Duration) -> io::Result<bool> {
    // Without an end where the limit is beyond the clock.
    let end = Instant::now().checked_add(limit);
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map(TryInto::try_into).transpose().map_err(io::Error::other)?;
        match rustix::event::poll(&mut [PollFd::new(fd, PollFlags::IN)], left.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            count => return Ok(count? > 0),
        }
    }
}

fn open_stat(dm: &Dm, name: &str) -> Result<File, CutError> {
    let info = dm.info(name)?.ok_or_else(|| DmError::NoDevice(name.to_owned()))?;
    File::open(info.device.sysfs().join("stat")).map_err(CutError::Prepare)
}

fn script(
    dm: &Dm,
    (origins, stats): (&[&str], &[File]),
    snapshots: &[&str],
    mounts: &Mounts,
) -> Result<Script, DmError> {
    let ready = |verb, name: &str, command: Command, flags: u32| {
        let call: Call = dm::find(verb, name, command)?.flags(flags);
        let bytes = call.fixed().ok_or_else(|| DmError::NoDevice(name.to_owned()))?;
        Ok::<_, DmError>(Ready { request: command.request(), bytes })
    };
    let resume = |name: &str| ready("resume", name, Command::Suspend, 0);
    let origin = |(&name, stat): (&&str, &File)| {
        Ok::<_, DmError>(Origin {
            suspend: ready("suspend", name, Command::Suspend, wire::SUSPEND)?,
            clear: ready("clear", name, Command::TableClear, 0)?,
            resume: resume(name)?,
            stat: stat.as_raw_fd(),
            mounted: mounts.get(name).map(AsRawFd::as_raw_fd),
        })
    };
    Ok(Script {
        control: dm.control().as_raw_fd(),
        origins: origins.iter().zip(stats).map(origin).collect::<Result<_, _>>()?,
        snapshots: snapshots.iter().map(|&name| resume(name)).collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `/dev/null` knows none of the calls, so the first one fails; everything around it is real.
    fn null() -> Dm {
        Dm::over(File::options().read(true).write(true).open("/dev/null").unwrap())
    }

    /// A user who may not lock memory is refused, whatever else is tried; root gets a cutter.
    fn prepare<'dm>(dm: &'dm Dm, origins: &[&str], snapshots: &[&str]) -> Option<Cutter<'dm>> {
        let stats: Vec<_> = origins.iter().map(|_| File::open("/dev/null").unwrap()).collect();
        static NONE: Mounts = Mounts::new();
        match Cutter::prepare(dm, (origins, &stats), snapshots, &NONE) {
            Ok(cutter) => Some(cutter),
            Err(CutError::NotLocked(_)) if !rustix::process::geteuid().is_root() => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn alive(pid: i32) -> bool {
        std::path::Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn the_first_refused_call_ends_the_cut_and_is_named() {
        let dm = null();
        let Some(cutter) = prepare(&dm, &["ps-a-root", "ps-a-data"], &["ps-b-root"]) else { return };
        let pids = cutter.processes();
        assert!(pids.into_iter().all(alive));
        match cutter.cut() {
            Err(CutError::Refused { verb: "suspend", name, source }) => {
                assert_eq!(name, "ps-a-root");
                assert_eq!(source.raw_os_error(), Some(libc::ENOTTY));
            }
            other => panic!("{other:?}"),
        }
        assert!(!pids.into_iter().any(alive), "{pids:?} are left");
    }

    #[test]
    fn without_a_go_both_processes_leave() {
        let dm = null();
        let Some(cutter) = prepare(&dm, &["a"], &["b"]) else { return };
        let pids = cutter.processes();
        drop(cutter);
        assert!(!pids.into_iter().any(alive), "{pids:?} are left");
    }

    #[test]
    fn a_cutter_without_its_guard_does_not_begin() {
        let dm = null();
        let Some(cutter) = prepare(&dm, &["a"], &["b"]) else { return };
        cutter.guard.kill();
        assert!(readable(&cutter.guard.handle, REAP_LIMIT).unwrap());
        assert!(matches!(cutter.cut(), Err(CutError::NoGuard)));
    }

    #[test]
    fn a_dead_cutter_is_noticed() {
        let dm = null();
        let Some(cutter) = prepare(&dm, &["a"], &["b"]) else { return };
        cutter.cutter.kill();
        assert!(readable(&cutter.cutter.handle, REAP_LIMIT).unwrap());
        assert!(matches!(cutter.cut(), Err(CutError::Died)));
    }
}
