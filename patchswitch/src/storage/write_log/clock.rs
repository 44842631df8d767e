//! What tells a log the time.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::format::OURS;
use crate::host::linux::clock::boot_ns;
use crate::host::linux::dm::Dm;
use crate::storage::StorageError;

/// How often the time is recorded.
const EVERY: Duration = Duration::from_millis(100);

/// Has everything that was written to a disk on disk, and so in its log.
pub(super) fn flush(dm: &Dm, name: &str) -> Result<(), StorageError> {
    let node = dm.node(name)?;
    File::open(&node).and_then(|device| device.sync_all()).map_err(StorageError::io("flush", node))
}

/// Flushes disks and records the time, on a thread of its own, until it is dropped. The flush gives a record its time, and keeps what
/// waits for it small: the kernel has a copy of each write in memory until then.
#[derive(Debug)]
pub(super) struct Clock {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Clock {
    /// Begins; a disk that is gone is left out.
    pub(super) fn start(names: Vec<String>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            // That a mark is missing makes an interval longer, and nothing wrong.
            let Ok(dm) = Dm::open() else { return };
            while !stopped.load(Ordering::Relaxed) {
                for name in &names {
                    let _ = flush(&dm, name);
                    let _ = dm.message(name, 0, &format!("mark {OURS}{}", boot_ns()));
                }
                // Whoever ends it does not wait for that.
                std::thread::park_timeout(EVERY);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
