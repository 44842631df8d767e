//! Somebody who writes a block at a time to a file, each on disk before the next, and knows how long each took.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// Blocks of the file, which is written round and round: nothing of it is allocated meanwhile.
const BLOCKS: u64 = 256;
const BLOCK: usize = 4096;

/// A write, and how long it took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    pub(super) at: Instant,
    pub(super) took: Duration,
}

#[derive(Debug)]
pub(super) struct Writer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Written>>>,
}

impl Writer {
    pub(super) fn start(folder: &Path) -> Result<Self> {
        let file = File::options().create(true).truncate(true).write(true).open(folder.join("writer"))?;
        file.write_all_at(&vec![1; BLOCK * BLOCKS as usize], 0)?;
        file.sync_all()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut all, block) = (Vec::new(), vec![2; BLOCK]);
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let at = Instant::now();
                file.write_all_at(&block, number % BLOCKS * BLOCK as u64)?;
                file.sync_data()?;
                all.push(Written { at, took: at.elapsed() });
            }
            Ok(all)
        });
        Ok(Self { stop, thread })
    }

    /// Ends it; all that it has written.
    pub(super) fn stop(self) -> Result<Vec<Written>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_panic| anyhow!("the writer panicked"))?
    }
}

/// How long the writes took that were under way in a time, in milliseconds, sorted.
pub(super) fn within(all: &[Written], from: Instant, to: Instant) -> Vec<f64> {
    let touching = all.iter().filter(|one| one.at < to && one.at + one.took > from);
    let mut times: Vec<f64> = touching.map(|one| one.took.as_secs_f64() * 1e3).collect();
    times.sort_by(f64::total_cmp);
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_that_touch_a_time_are_its() {
        let begin = Instant::now();
        let ms = Duration::from_millis;
        let all = [(0, 5), (4, 30), (40, 3)].map(|(at, took)| Written { at: begin + ms(at), took: ms(took) });
        assert_eq!(within(&all, begin + ms(10), begin + ms(20)), [30.0]);
        assert_eq!(within(&all, begin, begin + ms(100)), [3.0, 5.0, 30.0]);
    }
}
