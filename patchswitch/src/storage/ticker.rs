//! Something that is done again and again beside everything else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A thread that does something again and again, until this is stopped or dropped.
#[derive(Debug)]
pub(super) struct Ticker {
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Ticker {
    /// Begins at once; between the end of one time and the next lies this long.
    pub(super) fn start(every: Duration, mut tick: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                tick();
                // Whoever ends it does not wait for that.
                std::thread::park_timeout(every);
            }
        });
        Self { stop, thread: Mutex::new(Some(thread)) }
    }

    /// It is not being done any more when this returns. Stopped already: nothing to do.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn it_ticks_until_it_is_stopped() {
        let count = Arc::new(AtomicU32::new(0));
        let ticks = Arc::clone(&count);
        let ticker = Ticker::start(Duration::from_millis(1), move || {
            let _ = ticks.fetch_add(1, Ordering::Relaxed);
        });
        while count.load(Ordering::Relaxed) < 3 {
            std::thread::yield_now();
        }
        ticker.stop();
        let then = count.load(Ordering::Relaxed);
        ticker.stop();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(count.load(Ordering::Relaxed), then);
        // One that waits for an hour is stopped at once.
        drop(Ticker::start(Duration::from_secs(3600), || ()));
    }
}
