//! When the machine itself stood still.
//!
//! A time without an answer has many causes, and some of them are nobody's inside: a virtual machine runs only while its
//! host gives it a processor. So there is a witness: a thread with real-time priority, which gets the processor before
//! everything else, looks at the clock every few milliseconds. When it is late, nothing else could run either: the host
//! gave no processor, or the kernel was at something that it does not interrupt. It explains, and excuses nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::anyhow;
use patchswitch_load::clock;
use patchswitch_load::report::Window;
use rustix::thread::{ClockId, clock_nanosleep_absolute};
use rustix::time::Timespec;

use crate::programs;

/// How often the witness looks at the clock, and how late it may be: what is shorter cannot be told from its own
/// start.
const TICK_NS: u64 = 5_000_000;
/// Its priority among real-time threads; any is more than everybody else has (`sched(7)`).
const PRIORITY: &str = "50";

/// The witness, at work.
#[derive(Debug)]
pub struct Witness {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Vec<Window>>>,
}

impl Witness {
    /// Begins to look.
    pub fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let watch = move || {
            let thread = rustix::thread::gettid().to_string();
            programs::run(&["chrt", "--fifo", "--pid", PRIORITY, &thread])?;
            let mut seen = Vec::new();
            let mut next = clock::now_ns();
            while !stopped.load(Ordering::Relaxed) {
                next += TICK_NS;
                sleep_until(next)?;
                let now = clock::now_ns();
                seen.extend(late(next, now));
                next = next.max(now);
            }
            Ok(seen)
        };
        Self { stop, thread: std::thread::spawn(watch) }
    }

    /// The times in which the machine stood still, in their order.
    ///
    /// # Errors
    /// If it could not have its priority, or there is no such clock.
    pub fn stop(self) -> anyhow::Result<Vec<Window>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_panic| anyhow!("the witness of standstills panicked"))?
    }
}

/// The standstill that a witness has slept through who was to wake at one time and woke at another.
fn late(next: u64, now: u64) -> Option<Window> {
    (now.saturating_sub(next) > TICK_NS).then_some(Window { from_ns: next, to_ns: now })
}

/// Sleeps until a moment of `CLOCK_BOOTTIME`.
fn sleep_until(at_ns: u64) -> anyhow::Result<()> {
    let at = i64::try_from(at_ns)?;
    let at = Timespec { tv_sec: at / 1_000_000_000, tv_nsec: at % 1_000_000_000 };
    loop {
        match clock_nanosleep_absolute(ClockId::Boottime, &at) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_late_saw_a_standstill() {
        assert_eq!(late(100, 90), None);
        assert_eq!(late(100, 100 + TICK_NS), None);
        let to_ns = 101 + TICK_NS;
        assert_eq!(late(100, to_ns), Some(Window { from_ns: 100, to_ns }));
    }

    #[test]
    fn it_sleeps_until_the_moment() {
        let at = clock::now_ns() + 20_000_000;
        sleep_until(at).unwrap();
        assert!(clock::now_ns() >= at);
        sleep_until(1).unwrap();
    }
}
