//! What tells a log the time.

use std::fs::File;
use std::time::Duration;

use super::format::OURS;
use crate::host::linux::clock::boot_ns;
use crate::host::linux::dm::Dm;
use crate::storage::StorageError;
use crate::storage::ticker::Ticker;

/// How often the time is recorded.
const EVERY: Duration = Duration::from_millis(100);

/// Has everything that was written to a disk on disk, and so in its log.
pub(super) fn flush(dm: &Dm, name: &str) -> Result<(), StorageError> {
    let node = dm.node(name)?;
    File::open(&node).and_then(|device| device.sync_all()).map_err(StorageError::io("flush", node))
}

/// Flushes disks and records the time, again and again. The flush gives a record its time, and keeps what waits for it small: the
/// kernel has a copy of each write in memory until then.
pub(super) fn start(names: Vec<String>) -> Ticker {
    // That a mark is missing makes an interval longer, and nothing wrong.
    let dm = Dm::open().ok();
    Ticker::start(EVERY, move || {
        for (dm, name) in dm.iter().flat_map(|dm| names.iter().map(move |name| (dm, name))) {
            let _ = flush(dm, name);
            let _ = dm.message(name, 0, &format!("mark {OURS}{}", boot_ns()));
        }
    })
}
