//! Signals that arrive as bytes in a pipe, for `patchswitch-init`.
//!
//! Handlers, unlike a blocked mask, are not inherited through `exec`: the programs that are started see every signal
//! as it was.
#![expect(unsafe_code, reason = "sigaction and kill by raw number have no safe wrapper")]

use std::io::{self, PipeReader, Read};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::OFlags;

/// The end of the pipe that the handler writes to; -1 before there is one. It is never closed.
static WRITE_END: AtomicI32 = AtomicI32::new(-1);

/// The signals of the process, one byte each, in the order of their arrival.
#[derive(Debug)]
pub struct SignalPipe(PipeReader);

impl SignalPipe {
    /// Catches these signals from now on, in the whole process. To be called once, by the program's own start.
    ///
    /// # Errors
    /// If the pipe cannot be made, or a signal cannot be caught; a second call has [`io::ErrorKind::AlreadyExists`].
    pub fn install(signals: &[i32]) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        for end in [reader.as_fd(), writer.as_fd()] {
            rustix::fs::fcntl_setfl(end, OFlags::NONBLOCK)?;
        }
        let exchanged =
            WRITE_END.compare_exchange(-1, writer.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst);
        if exchanged.is_err() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        // From here on the handler may use the number, so it must never be closed.
        let _open_for_ever = writer.into_raw_fd();
        signals.iter().try_for_each(|signal| catch(*signal))?;
        Ok(Self(reader))
    }

    /// Takes the signals that have arrived; empty if none has.
    ///
    /// # Errors
    /// What `read` says.
    pub fn take(&self) -> io::Result<Vec<i32>> {
        let mut bytes = [0; 64];
        match (&self.0).read(&mut bytes) {
            Ok(count) => Ok(bytes[..count].iter().copied().map(i32::from).collect()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for SignalPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn catch(signal: i32) -> io::Result<()> {
    // SAFETY: `sigaction` is a plain C structure for which zeroes are valid: no flags, an empty mask, no restorer.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = on_signal as extern "C" fn(i32) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the structure is initialised and lives through the call; the handler only calls functions that are
    // safe in a handler (signal-safety(7)) and touches no Rust state but an atomic.
    let result = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Writes the signal's number into the pipe. A full pipe loses it, which is harmless: what wakes up looks at every
/// child and every signal that is in the pipe.
extern "C" fn on_signal(signal: i32) {
    let byte = u8::try_from(signal).unwrap_or(0);
    // SAFETY: the location of errno is always valid for the thread that asks; it is put back because the interrupted
    // code may be about to read it.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: the descriptor is open for ever (see `install`), the buffer has the one byte that is announced.
    unsafe { libc::write(WRITE_END.load(Ordering::SeqCst), (&raw const byte).cast(), 1) };
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// Whom a signal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// One process.
    Process(u32),
    /// A process group, by its leader.
    Group(u32),
    /// Every process that the caller may signal, except itself and PID 1: all of a partition, if the caller is its
    /// PID 1.
    Everyone,
}

/// Sends a signal by number, real-time signals included. That nobody is there is fine.
///
/// # Errors
/// What `kill` says, other than `ESRCH`. Numbers that would mean somebody else (0, or too large) are `EINVAL`.
pub fn send(target: Target, signal: i32) -> io::Result<()> {
    let positive = |pid: u32| {
        i32::try_from(pid).ok().filter(|pid| *pid > 1).ok_or(io::Error::from(io::ErrorKind::InvalidInput))
    };
    let pid = match target {
        Target::Process(pid) => positive(pid)?,
        Target::Group(leader) => -positive(leader)?,
        Target::Everyone => -1,
    };
    // SAFETY: `kill` takes two numbers and touches no memory of ours.
    if unsafe { libc::kill(pid, signal) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::host::linux::poll;
    use crate::host::linux::programs::{Program, Run};

    #[test]
    fn signals_arrive_as_numbers_and_only_one_pipe_is_allowed() {
        let pipe = SignalPipe::install(&[libc::SIGUSR1, libc::SIGRTMIN() + 3]).unwrap();
        assert!(pipe.take().unwrap().is_empty());
        for signal in [libc::SIGUSR1, libc::SIGRTMIN() + 3] {
            send(Target::Process(std::process::id()), signal).unwrap();
            assert!(
                poll::readable([pipe.as_fd()], Instant::now() + Duration::from_secs(5)).unwrap()[0],
                "signal {signal} did not arrive"
            );
            assert_eq!(pipe.take().unwrap(), [signal]);
        }
        assert_eq!(SignalPipe::install(&[]).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn nobody_and_everybody_by_accident() {
        for target in [Target::Process(0), Target::Process(1), Target::Group(0), Target::Group(1)] {
            assert_eq!(send(target, libc::SIGKILL).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        let mut child = Run::new(Program::Shell).args(["-c", "exec sleep 60"]).spawn().unwrap();
        send(Target::Process(child.id()), libc::SIGKILL).unwrap();
        child.wait().unwrap();
        send(Target::Process(child.id()), libc::SIGKILL).unwrap();
    }
}
