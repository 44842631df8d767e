#![expect(
    unsafe_code,
    reason = "fork, and what may run between a fork and its end in a process with threads"
)]
//! The two processes of the [cutter](super::cutter): what runs in them, and nothing else.
//!
//! The agent has threads, so a process forked from it may hold anybody's locks: from `fork` to `_exit` there are only
//! async-signal-safe calls here (`signal-safety(7)`) and plain arithmetic. No allocation, no `std::io`, no panic: no
//! index, no slice, no unwrap. Everything that is needed has been put together before.

use std::io;
use std::os::fd::RawFd;

use rustix::process::Pid;

use super::block::Written;
use super::dm_ioctl::CALL;
use super::ioctl::{FIFREEZE, FITHAW};

/// How long devices may be suspended before the cutter gives up by itself; the guard comes a little later.
const ALARM: libc::timeval = libc::timeval { tv_sec: 1, tv_usec: 300_000 };
const GUARD_MILLIS: i64 = 1_500;
/// For as long as it takes.
const FOR_EVER: i64 = -1;

const STARTED: u8 = b's';
const DONE: u8 = b'd';

/// A device-mapper call, ready to be made: the kernel writes its answer over a copy of it.
#[derive(Clone, Copy)]
pub(super) struct Ready {
    pub(super) request: u32,
    pub(super) bytes: [u8; CALL],
}

/// The calls for one origin.
#[derive(Clone, Copy)]
pub(super) struct Origin {
    pub(super) suspend: Ready,
    pub(super) clear: Ready,
    pub(super) resume: Ready,
    /// The device's `stat` file, open.
    pub(super) stat: RawFd,
    /// A directory of its file system, open, if that is one which a suspended device does not freeze.
    pub(super) mounted: Option<RawFd>,
}

/// Everything that the two processes do.
pub(super) struct Script {
    pub(super) control: RawFd,
    pub(super) origins: Vec<Origin>,
    pub(super) snapshots: Vec<Ready>,
}

/// The descriptors of the process that cuts.
#[derive(Clone, Copy)]
pub(super) struct CutterEnds {
    pub(super) go: RawFd,
    pub(super) report: RawFd,
    pub(super) lease: RawFd,
}

/// The descriptors of the process that guards it.
#[derive(Clone, Copy)]
pub(super) struct GuardEnds {
    pub(super) lease: RawFd,
    pub(super) report: RawFd,
    pub(super) cutter: RawFd,
}

/// How far a process has come, or where it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Stage {
    Ready = 1,
    Cut = 2,
    Rescued = 3,
    Lock = 4,
    Guard = 5,
    Suspend = 6,
    Activate = 7,
    Resume = 8,
    /// Not the end: what had been written to an origin at the cut.
    Counted = 9,
    Freeze = 10,
}

/// What a process tells the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) stage: Stage,
    /// Which device.
    pub(super) index: u32,
    /// What the kernel said, or 0.
    pub(super) errno: i32,
    /// From before the first suspend to after the last resume.
    pub(super) nanos: u64,
    /// Sectors written and discarded, of [`Stage::Counted`].
    pub(super) written: Written,
}

/// Length of a report on the pipe; less than `PIPE_BUF`, so it arrives whole.
pub(super) const REPORT: usize = size_of::<Words>();

/// Stage, index, errno, and three numbers of 64 bits.
type Words = [u64; 6];

impl Report {
    const fn of(stage: Stage) -> Self {
        Self::failed(stage, 0, 0)
    }

    const fn failed(stage: Stage, index: u32, errno: i32) -> Self {
        Self { stage, index, errno, nanos: 0, written: Written { sectors: 0, discarded: 0 } }
    }

    pub(super) fn to_bytes(self) -> [u8; REPORT] {
        let Written { sectors, discarded } = self.written;
        let errno = u64::from(self.errno.cast_unsigned());
        let words: Words = [self.stage as u64, self.index.into(), errno, self.nanos, sectors, discarded];
        let mut bytes = [0; REPORT];
        for (place, byte) in bytes.iter_mut().zip(words.iter().flat_map(|word| word.to_ne_bytes())) {
            *place = byte;
        }
        bytes
    }

    pub(super) fn parse(bytes: &[u8; REPORT]) -> Option<Self> {
        const STAGES: [Stage; 10] = [
            Stage::Ready,
            Stage::Cut,
            Stage::Rescued,
            Stage::Lock,
            Stage::Guard,
            Stage::Suspend,
            Stage::Activate,
            Stage::Resume,
            Stage::Counted,
            Stage::Freeze,
        ];
        let mut words: Words = [0; 6];
        for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_ne_bytes(*chunk);
        }
        let [stage, index, errno, nanos, sectors, discarded] = words;
        Some(Self {
            stage: STAGES.into_iter().find(|known| *known as u64 == stage)?,
            index: u32::try_from(index).ok()?,
            errno: u32::try_from(errno).ok()?.cast_signed(),
            nanos,
            written: Written { sectors, discarded },
        })
    }
}

/// Starts the process that cuts.
pub(super) fn fork_cutter(script: &Script, ends: CutterEnds) -> io::Result<Pid> {
    fork(|| cutter(script, ends))
}

/// Starts the process that guards it.
pub(super) fn fork_guard(script: &Script, ends: GuardEnds) -> io::Result<Pid> {
    fork(|| guard(script, ends))
}

/// Forks with all signals blocked, which they stay in the child: a handler of the agent's that ran in the child would
/// write into the agent's own wake-up pipe.
pub(super) fn fork(child: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: `sigset_t` is plain data, `sigfillset` fills it in, `pthread_sigmask` gets pointers to live values.
    // `fork` is sound in a process with threads because the child only runs `child`, which keeps to the rules at the
    // top of this file, and `_exit`, which runs no destructors and no `atexit` handlers of the agent's.
    let (pid, error) = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(child());
        }
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        (pid, error)
    };
    if pid > 0 { Pid::from_raw(pid).ok_or(error) } else { Err(error) }
}

fn cutter(script: &Script, ends: CutterEnds) -> i32 {
    let files = script.origins.iter().flat_map(|origin| [Some(origin.stat), origin.mounted]).flatten();
    let locked = settle([script.control, ends.go, ends.report, ends.lease], files);
    if locked != 0 {
        send(ends.report, Report::failed(Stage::Lock, 0, locked));
        return 1;
    }
    send(ends.report, Report::of(Stage::Ready));
    // The agent may think as long as it likes; if it dies, this is the end of the file.
    if receive(ends.go).is_none() {
        return 0;
    }
    alarm();
    if !write_all(ends.lease, &[STARTED]) {
        send(ends.report, Report::of(Stage::Guard));
        return 1;
    }
    let begin = nanos();
    let mut report = cut(script, ends.report);
    report.nanos = nanos().saturating_sub(begin);
    write_all(ends.lease, &[DONE]);
    send(ends.report, report);
    0
}

/// The cut. Whatever fails, every origin is resumed; after a failure through its old table.
fn cut(script: &Script, reports: RawFd) -> Report {
    let mut report = Report::of(Stage::Cut);
    for (index, origin) in (0..).zip(&script.origins) {
        if let Err(errno) = freeze(origin) {
            // Whoever else has frozen it lets it go.
            for mine in script.origins.iter().take(index as usize) {
                thaw(mine);
            }
            return Report::failed(Stage::Freeze, index, errno);
        }
    }
    for (index, origin) in (0..).zip(&script.origins) {
        if let Err(errno) = call(script.control, &origin.suspend) {
            report = Report::failed(Stage::Suspend, index, errno);
            break;
        }
    }
    // Nothing is under way any more, so these numbers are exact.
    for (index, origin) in (0..).zip(&script.origins) {
        if let Some(written) = count(origin.stat) {
            send(reports, Report { index, written, ..Report::of(Stage::Counted) });
        }
    }
    for (index, snapshot) in (0..).zip(&script.snapshots) {
        if report.stage != Stage::Cut {
            break;
        }
        if let Err(errno) = call(script.control, snapshot) {
            report = Report::failed(Stage::Activate, index, errno);
        }
    }
    for (index, origin) in (0..).zip(&script.origins) {
        if report.stage != Stage::Cut {
            restore(script.control, origin);
        } else if let Err(errno) = call(script.control, &origin.resume) {
            report = Report::failed(Stage::Resume, index, errno);
            restore(script.control, origin);
        } else {
            thaw(origin);
        }
    }
    report
}

/// Freezes a file system that device-mapper does not: clean on disk, and nobody writes.
fn freeze(origin: &Origin) -> Result<(), i32> {
    origin.mounted.map_or(Ok(()), |mounted| on_file_system(mounted, FIFREEZE))
}

/// Lets it go on; not frozen: nothing to do.
fn thaw(origin: &Origin) {
    if let Some(mounted) = origin.mounted {
        on_file_system(mounted, FITHAW).ok();
    }
}

/// `FIFREEZE` or `FITHAW`.
fn on_file_system(mounted: RawFd, request: u32) -> Result<(), i32> {
    let mut unused: libc::c_int = 0;
    // SAFETY: the kernel ignores the argument of both calls (`fs/ioctl.c`); it gets a live integer all the same.
    let result = unsafe { libc::ioctl(mounted, request.into(), &raw mut unused) };
    if result < 0 { Err(errno()) } else { Ok(()) }
}

/// Lets an origin go on through the table that it had. Right whatever state it is in.
fn restore(control: RawFd, origin: &Origin) {
    // An error here has nobody who could do better; the resume is tried in any case.
    call(control, &origin.clear).ok();
    call(control, &origin.resume).ok();
    thaw(origin);
}

fn guard(script: &Script, ends: GuardEnds) -> i32 {
    let mounted = script.origins.iter().filter_map(|origin| origin.mounted);
    let locked = settle([script.control, ends.lease, ends.report, ends.cutter], mounted);
    if locked != 0 {
        send(ends.report, Report::failed(Stage::Lock, 0, locked));
        return 1;
    }
    send(ends.report, Report::of(Stage::Ready));
    if receive(ends.lease).is_none() {
        return 0;
    }
    // Now devices may be suspended. The end of the file means that the cutter died before it was done.
    if wait_readable(ends.lease, GUARD_MILLIS) && receive(ends.lease) == Some(DONE) {
        return 0;
    }
    kill(ends.cutter);
    rescue(script);
    send(ends.report, Report::of(Stage::Rescued));
    // Freezing a file system cannot be interrupted. A cutter that was at it is dead only when its device has come to
    // rest, and then the device is suspended; until then resuming it does nothing (do_resume).
    wait_readable(ends.cutter, FOR_EVER);
    // Only resumed: much later a table may be waiting that somebody else has loaded, and he wants it.
    for origin in &script.origins {
        call(script.control, &origin.resume).ok();
        thaw(origin);
    }
    1
}

fn rescue(script: &Script) {
    for origin in &script.origins {
        restore(script.control, origin);
    }
}

/// Makes the process independent of its surroundings: not reached by Ctrl-C, no descriptors but its own (so that the
/// end of a pipe is seen), all its memory in memory (a page that had to be read or written on a suspended device would
/// wait for this very process). Returns what the kernel said to the last, or 0.
fn settle(keep: [RawFd; 4], more: impl Iterator<Item = RawFd> + Clone) -> i32 {
    close_all_but(keep.into_iter().chain(more));
    // SAFETY: takes no pointers.
    unsafe { if libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) < 0 { errno() } else { 0 } }
}

/// Makes the process one of its own session, which Ctrl-C does not reach, with these descriptors alone.
pub(super) fn close_all_but<I: IntoIterator<Item = RawFd, IntoIter: Clone>>(keep: I) {
    let keep = keep.into_iter();
    let mut next: RawFd = 0;
    // The lowest that is kept and not yet passed, again and again: sorting would need a place to sort in.
    while let Some(fd) = keep.clone().filter(|fd| *fd >= next).min() {
        close_between(next, fd - 1);
        next = fd + 1;
    }
    close_between(next, RawFd::MAX);
    // SAFETY: takes nothing.
    unsafe { libc::setsid() };
}

fn close_between(first: RawFd, last: RawFd) {
    if first <= last {
        // SAFETY: takes numbers only. The descriptors belong to this process alone, which has no objects that would
        // use or close them again.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Has every call that waits interrupted when the devices have been suspended for too long.
fn alarm() {
    extern "C" fn nothing(_signal: libc::c_int) {}
    let timer = libc::itimerval { it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 }, it_value: ALARM };
    // SAFETY: the structures are plain data, valid for the calls; the handler does nothing, and without SA_RESTART it
    // makes the interrupted call return. Only SIGALRM is let through.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
        let mut only: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut only);
        libc::sigaddset(&raw mut only, libc::SIGALRM);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const only, std::ptr::null_mut());
        libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut());
    }
}

/// Makes a call on a copy of it: the kernel's answer would spoil the next one.
fn call(control: RawFd, ready: &Ready) -> Result<(), i32> {
    let mut bytes = ready.bytes;
    // SAFETY: the buffer has the size that the call states, as `dm_ioctl::Call` made it without data.
    let result =
        unsafe { libc::ioctl(control, ready.request.into(), bytes.as_mut_ptr().cast::<libc::c_void>()) };
    if result < 0 { Err(errno()) } else { Ok(()) }
}

/// Reads a `stat` file of sysfs, which needs no disk.
fn count(stat: RawFd) -> Option<Written> {
    let mut bytes = [0u8; 512];
    // SAFETY: the kernel writes at most the length that is given to a live array.
    let length = unsafe { libc::pread(stat, bytes.as_mut_ptr().cast::<libc::c_void>(), bytes.len(), 0) };
    Written::parse(bytes.get(..usize::try_from(length).ok()?)?)
}

fn send(fd: RawFd, report: Report) {
    // If the agent is gone there is nobody to tell.
    write_all(fd, &report.to_bytes());
}

/// Writes at once or not at all, as pipes do with so little. SIGPIPE is blocked.
fn write_all(fd: RawFd, bytes: &[u8]) -> bool {
    // SAFETY: the pointer and the length are of one live slice.
    let written = unsafe { libc::write(fd, bytes.as_ptr().cast::<libc::c_void>(), bytes.len()) };
    usize::try_from(written) == Ok(bytes.len())
}

/// Waits for a byte; `None` at the end of the file.
pub(super) fn receive(fd: RawFd) -> Option<u8> {
    let mut byte = 0u8;
    // SAFETY: the kernel writes at most one byte to a live `u8`.
    let count = unsafe { libc::read(fd, (&raw mut byte).cast::<libc::c_void>(), 1) };
    (count == 1).then_some(byte)
}

/// Waits until there is something to read or the other end is gone; says whether that came before the time was up.
pub(super) fn wait_readable(fd: RawFd, millis: i64) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let limit = libc::timespec { tv_sec: millis / 1000, tv_nsec: (millis % 1000) * 1_000_000 };
    let limit = if millis == FOR_EVER { std::ptr::null() } else { &raw const limit };
    // SAFETY: one live `pollfd`, one live `timespec` or none, no signal mask. The guard has all signals blocked, so it
    // is not cut short.
    unsafe { libc::ppoll(&raw mut poll, 1, limit, std::ptr::null()) > 0 }
}

fn kill(pidfd: RawFd) {
    // SAFETY: takes numbers and a null pointer. A pidfd names one process for ever, also after its end.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd,
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
}

fn nanos() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one live `timespec`.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.cast_unsigned())
}

fn errno() -> i32 {
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reports_survive_the_pipe(stage in 0u64..13, index: u32, errno: i32, nanos: u64, sectors: u64) {
            let written = Written { sectors, discarded: !sectors };
            let mut sent = Report { stage: Stage::Cut, index, errno, nanos, written };
            let mut bytes = sent.to_bytes();
            bytes[..8].copy_from_slice(&stage.to_ne_bytes());
            let read = Report::parse(&bytes);
            prop_assert_eq!(read.is_some(), (1..=10).contains(&stage));
            if let Some(read) = read {
                sent.stage = read.stage;
                prop_assert_eq!(read, sent);
                prop_assert_eq!(read.stage as u64, stage);
            }
        }

        #[test]
        fn noise_is_a_report_or_not(bytes: [u8; REPORT]) {
            if let Some(report) = Report::parse(&bytes) {
                prop_assert_eq!(report.to_bytes(), bytes);
            }
        }
    }
}
