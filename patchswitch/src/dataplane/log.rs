//! What the programs have to say: rare events only, as lines of the log.
//!
//! The programs write into a ring in the kernel, which belongs to them and is read by whoever looks: here, whenever a
//! command has the attachment open for a while. A line is written the first, second, fourth … time that something
//! happens, so that nobody can fill the ring by sending packets. The counters tell how often it was.

use std::path::Path;

use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};

use super::DataplaneError;
use super::attach::Point;
use super::load::open;

/// Reads the ring of one attachment.
pub(super) struct EventLog(EbpfLogger<ToTracing>);

impl std::fmt::Debug for EventLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EventLog")
    }
}

impl EventLog {
    /// Opens the ring of the programs that are pinned below `directory`. All of them write into the same one.
    pub(super) fn open(directory: &Path) -> Result<Self, DataplaneError> {
        let name = Point::FromPartition.program();
        let failed = |reason: String| DataplaneError::Program {
            action: "read the log of",
            program: name.to_owned(),
            reason,
        };
        let program = open(directory, Point::FromPartition)?;
        let id = program.info().map_err(|error| failed(error.to_string()))?.id();
        let logger = EbpfLogger::init_from_id_with_logger(id, ToTracing);
        logger.map(Self).map_err(|error| failed(error.to_string()))
    }

    /// Writes down what was said since the last time.
    pub(super) fn flush(&mut self) {
        self.0.flush();
    }
}

/// Passes lines on to this process's log.
struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let text = readable(&record.args().to_string());
        // The target of the programs' own file and line would be of no use to a reader.
        match record.level() {
            Level::Error => tracing::error!(target: "patchswitch::programs", "{text}"),
            Level::Warn => tracing::warn!(target: "patchswitch::programs", "{text}"),
            Level::Info => tracing::info!(target: "patchswitch::programs", "{text}"),
            Level::Debug | Level::Trace => tracing::debug!(target: "patchswitch::programs", "{text}"),
        }
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
