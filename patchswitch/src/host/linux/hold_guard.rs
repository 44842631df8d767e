#![expect(unsafe_code, reason = "what may run between a fork and its end in a process with threads")]
//! The process that lets held packets go if whoever holds them is gone.
//!
//! It is forked before the first packet is held and has the queue open as well. Whatever happens to its parent, at the end
//! of the time that was agreed it delivers what is in the queue. From then on the BPF programs put nothing into it.
//!
//! As in the cutter's child: from the fork to the end there are only async-signal-safe calls here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags};

use super::cutter::reap;
use super::cutter_child::{close_all_but, fork, receive, wait_readable};
use super::tap::Tap;

/// Larger than any frame that the kernel sends without offloads.
pub const FRAME: usize = 65_536 + 64;
/// Much more than a queue can have in it.
const MOST: u32 = 1 << 20;
/// Longer than a packet is on its way through a program, on a slow machine.
const LATE_NS: u64 = 50_000_000;
const DONE: u8 = b'd';
const REAP_LIMIT: Duration = Duration::from_secs(3);

/// The process, from its parent's side. Dropped without a word it stays until the time is over.
#[derive(Debug)]
pub struct HoldGuard {
    lease: Option<OwnedFd>,
    handle: OwnedFd,
}

impl HoldGuard {
    /// Starts it: for a queue whose link has this address, until a moment of the boot clock in nanoseconds.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn start(tap: &Tap, mac: [u8; 6], until_ns: u64) -> io::Result<Self> {
        let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (tap, lease) = (tap.as_fd().as_raw_fd(), theirs.as_raw_fd());
        let pid: Pid = fork(|| guard(tap, lease, mac, until_ns))?;
        let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self { lease: Some(ours), handle })
    }

    /// Ends it: there is nothing left to guard.
    pub fn dismiss(mut self) {
        // One that has done its work already hears nothing, and is reaped all the same.
        if let Some(lease) = self.lease.take() {
            rustix::io::write(&lease, &[DONE]).ok();
        }
        reap(&self.handle, REAP_LIMIT);
    }
}

fn guard(tap: RawFd, lease: RawFd, mac: [u8; 6], until_ns: u64) -> i32 {
    close_all_but([tap, lease]);
    while let Some(left) = until_ns.checked_sub(boot_ns()).filter(|left| *left > 0) {
        // Rounded up: a little late is right, a little early is not.
        let millis = i64::try_from(left / 1_000_000 + 1).unwrap_or(i64::MAX);
        if !wait_readable(lease, millis) {
            continue;
        }
        if receive(lease) == Some(DONE) {
            return 0;
        }
        // Its parent is gone. Who takes over is not ready before the time is over, as far as is known here.
        sleep_until(until_ns);
    }
    pump(tap, mac);
    // What was on its way into the queue in the last moment.
    sleep_until(boot_ns().wrapping_add(LATE_NS));
    pump(tap, mac);
    0
}

/// Lets everything in that waits, in its order.
fn pump(tap: RawFd, mac: [u8; 6]) {
    let mut frame = [0_u8; FRAME];
    for _ in 0..MOST {
        // SAFETY: the kernel writes at most the length that is given to a live array.
        let length = unsafe { libc::read(tap, frame.as_mut_ptr().cast::<libc::c_void>(), FRAME) };
        let Some(length) = usize::try_from(length).ok().filter(|length| *length > mac.len()) else { return };
        for (to, from) in frame.iter_mut().zip(mac) {
            *to = from;
        }
        // A frame that the kernel does not take is one that it drops.
        // SAFETY: so many bytes of a live array, as the kernel just wrote them.
        unsafe { libc::write(tap, frame.as_ptr().cast::<libc::c_void>(), length) };
    }
}

fn sleep_until(until_ns: u64) {
    let time = libc::timespec {
        tv_sec: (until_ns / 1_000_000_000).cast_signed(),
        tv_nsec: (until_ns % 1_000_000_000).cast_signed(),
    };
    // SAFETY: a live structure, and none for what is left: all signals are blocked.
    unsafe {
        libc::clock_nanosleep(
            libc::CLOCK_BOOTTIME,
            libc::TIMER_ABSTIME,
            &raw const time,
            std::ptr::null_mut(),
        )
    };
}

fn boot_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one live `timespec`.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    now.tv_sec.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.cast_unsigned())
}
