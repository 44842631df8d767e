//! Waiting for descriptors with a deadline.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

/// Waits until one of the descriptors has something to say (input, priority, end or error) or the deadline has
/// passed. Says for each whether it has; all `false` is the deadline.
///
/// # Errors
/// What `poll` says; an interruption by a signal is not an error and does not move the deadline.
pub fn readable<const N: usize>(fds: [BorrowedFd<'_>; N], deadline: Instant) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    poll(&mut polled, deadline)?;
    Ok(polled.map(|fd| !fd.revents().is_empty()))
}

/// `poll` with a deadline instead of a duration.
///
/// # Errors
/// What `poll` says, without `EINTR`.
pub fn poll(fds: &mut [PollFd<'_>], deadline: Instant) -> io::Result<usize> {
    loop {
        let left = timespec(deadline.saturating_duration_since(Instant::now()));
        match rustix::event::poll(fds, Some(&left)) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

fn timespec(left: Duration) -> Timespec {
    // A wait of some 70 years is as good as any longer one.
    let tv_sec = i64::try_from(left.as_secs()).unwrap_or(i64::MAX).min(i64::from(i32::MAX));
    Timespec { tv_sec, tv_nsec: i64::from(left.subsec_nanos()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn says_which_descriptor_has_input_and_keeps_the_deadline() {
        let (silent, _writer) = io::pipe().unwrap();
        let (full, mut writer) = io::pipe().unwrap();
        writer.write_all(b"x").unwrap();
        let soon = || Instant::now() + Duration::from_millis(30);
        assert_eq!(readable([silent.as_fd(), full.as_fd()], soon()).unwrap(), [false, true]);
        let start = Instant::now();
        assert_eq!(readable([silent.as_fd()], soon()).unwrap(), [false]);
        assert!(start.elapsed() >= Duration::from_millis(29));
        drop(_writer);
        assert_eq!(readable([silent.as_fd()], soon()).unwrap(), [true], "the end is something to say");
    }
}
