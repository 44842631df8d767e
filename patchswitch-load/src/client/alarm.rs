//! The alarm clock of the schedule.
//!
//! The runtime's own timers round to milliseconds, and setting one that is earlier than all others costs a system
//! call to wake a runtime that is awake. A timer of the kernel is exact, and costs one call.

use std::io;
use std::os::fd::OwnedFd;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// A timer on `CLOCK_BOOTTIME`.
#[derive(Debug)]
pub(super) struct Alarm {
    timer: AsyncFd<OwnedFd>,
}

impl Alarm {
    /// A timer that is not set.
    #[expect(
        deprecated,
        reason = "its successor is unsafe for types that lend a wrong descriptor; this one does not"
    )]
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
        Ok(Self { timer: AsyncFd::new(timer)? })
    }

    /// Waits until a moment; at once if it has passed.
    pub(super) async fn wait_until(&self, at_ns: u64) -> io::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Zero would unset the timer.
        let at_ns = i64::try_from(at_ns.max(1)).unwrap_or(i64::MAX);
        let it_value = Timespec { tv_sec: at_ns / 1_000_000_000, tv_nsec: at_ns % 1_000_000_000 };
        // Setting it takes back an expiry that was not waited for.
        timerfd_settime(
            self.timer.get_ref(),
            TimerfdTimerFlags::ABSTIME,
            &Itimerspec { it_interval: zero, it_value },
        )?;
        loop {
            let mut ready = self.timer.readable().await?;
            ready.clear_ready();
            // The runtime may still remember an earlier expiry.
            if crate::clock::now_ns() >= u64::try_from(at_ns).unwrap_or(0) {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::now_ns;

    #[test]
    fn it_wakes_at_the_moment_again_and_again_and_at_once_for_the_past() {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap().block_on(async {
            let alarm = Alarm::new().unwrap();
            let begin = now_ns();
            for ms in [3, 6, 7, 7, 2, 0] {
                let at = begin + ms * 1_000_000;
                alarm.wait_until(at).await.unwrap();
                assert!(now_ns() >= at, "{ms}");
            }
            let taken = now_ns() - begin;
            assert!((7_000_000..500_000_000).contains(&taken), "{taken}");
            alarm.wait_until(0).await.unwrap();
            // A wait that is given up does not disturb the next one.
            let given_up = alarm.wait_until(now_ns() + 3_600_000_000_000);
            let limit = std::time::Duration::from_millis(1);
            assert!(tokio::time::timeout(limit, given_up).await.is_err());
            let at = now_ns() + 20_000_000;
            alarm.wait_until(at).await.unwrap();
            assert!(now_ns() >= at);
        });
    }
}
