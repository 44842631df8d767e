//! The one clock of a run.
//!
//! Times are nanoseconds of `CLOCK_BOOTTIME`: the clock that the switch's own timeline and the BPF programs use, so
//! that the two can be laid side by side without conversion. It never jumps.

use rustix::time::{ClockId, clock_gettime};

/// Now, in nanoseconds since the machine was started.
pub fn now_ns() -> u64 {
    nanoseconds(ClockId::Boottime)
}

/// The wall clock, in milliseconds since 1970; for readers only, nothing is computed from it.
pub fn wall_ms() -> u64 {
    nanoseconds(ClockId::Realtime) / 1_000_000
}

fn nanoseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    // Negative only for a wall clock before 1970.
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_passes_in_nanoseconds() {
        let before = now_ns();
        std::thread::sleep(std::time::Duration::from_millis(5));
        let passed = now_ns() - before;
        assert!((5_000_000..5_000_000_000).contains(&passed), "{passed}");
        // 2020 to 2100.
        assert!((1_577_836_800_000..4_102_444_800_000).contains(&wall_ms()));
    }
}
