//! What the programs have to say: rare events only, as lines of the log.
//!
//! The programs write into a ring in the kernel, which belongs to them and is read by whoever looks: here, whenever a
//! command has the attachment open for a while. One at a time: two readers of one ring would trip each other up. A line
//! is written the first, second, fourth … time that something happens, so that nobody can fill the ring by sending
//! packets. The counters tell how often it was.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::DataplaneError;
use super::attach::Point;
use super::load::{open, refused};

/// The program by which the ring is found. All of them write into the same one.
const POINT: Point = Point::FromPartition;

/// What a program said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// How bad it is.
    pub level: Level,
    /// What it is.
    pub text: String,
}

impl Line {
    /// Passes it on to this process's log. The programs' own file and line would be of no use to a reader.
    pub(super) fn log(&self) {
        let text = &self.text;
        match self.level {
            Level::Error => tracing::error!(target: "patchswitch::programs", "{text}"),
            Level::Warn => tracing::warn!(target: "patchswitch::programs", "{text}"),
            Level::Info => tracing::info!(target: "patchswitch::programs", "{text}"),
            Level::Debug | Level::Trace => tracing::debug!(target: "patchswitch::programs", "{text}"),
        }
    }
}

/// Reads the ring of one attachment, as the only one.
pub(super) struct EventLog {
    logger: EbpfLogger<Collected>,
    lines: Collected,
    /// The program by which the ring was found: another version of it has another ring.
    program: u32,
    _alone: File,
}

impl std::fmt::Debug for EventLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EventLog")
    }
}

impl EventLog {
    /// Opens the ring of the programs that are pinned below `directory`; nothing if somebody else reads it.
    pub(super) fn open(directory: &Path) -> Result<Option<Self>, DataplaneError> {
        let file = |source| DataplaneError::File { action: "lock", path: directory.to_owned(), source };
        // The directory of the pins lives exactly as long as the ring.
        let alone = File::open(directory).map_err(file)?;
        match flock(&alone, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(file(error.into())),
        }
        let program = ring_of(directory)?;
        let lines = Collected::default();
        let logger = EbpfLogger::init_from_id_with_logger(program, lines.clone());
        let logger = logger.map_err(|error| DataplaneError::Program {
            action: "read the log of",
            program: POINT.program().to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Some(Self { logger, lines, program, _alone: alone }))
    }

    /// Whether it is still the ring of the programs that are pinned below `directory`.
    pub(super) fn is_current(&self, directory: &Path) -> bool {
        ring_of(directory).is_ok_and(|program| program == self.program)
    }

    /// What was said since the last time.
    pub(super) fn take(&mut self) -> Vec<Line> {
        self.logger.flush();
        std::mem::take(&mut *self.lines.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The number of the program by which the ring is found.
fn ring_of(directory: &Path) -> Result<u32, DataplaneError> {
    let info = open(directory, POINT)?.info();
    Ok(info.map_err(|error| refused("look at", POINT.program(), &error))?.id())
}

/// Keeps lines until they are taken.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<Line>>>);

impl Log for Collected {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = Line { level: record.level(), text: readable(&record.args().to_string()) };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    fn flush(&self) {}
}

/// The programs have all addresses as IPv6 ones; a reader knows those of IPv4 by their own form.
fn readable(text: &str) -> String {
    text.replace(" ::ffff:", " ")
}

#[cfg(test)]
mod tests {
    use super::readable;

    #[test]
    fn addresses_of_ipv4_are_shown_as_such() {
        assert_eq!(readable("from ::ffff:10.1.2.3, which"), "from 10.1.2.3, which");
        assert_eq!(readable("from fd77::ffff:1:2, which"), "from fd77::ffff:1:2, which");
    }
}
