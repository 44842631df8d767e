//! What can go wrong with device-mapper.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::Malformed;

/// Why device-mapper did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DmError {
    /// The kernel has no device-mapper, or its module is not loaded.
    #[error(
        "failed to open /dev/mapper/control (is device-mapper there? try: modprobe -a dm_mod dm_snapshot)"
    )]
    NoDeviceMapper(#[source] io::Error),
    /// The name is taken by a device that is not ours.
    #[error("device-mapper device {0} exists and was not made by patchswitch")]
    NotOurs(String),
    /// There is no such device of ours.
    #[error("there is no device-mapper device {0} of patchswitch")]
    NoDevice(String),
    /// Somebody has the device open.
    #[error(
        "device-mapper device {name} is still open {open_count} times after {waited:?} (a mount, perhaps in another mount namespace)"
    )]
    Busy {
        /// The device.
        name: String,
        /// How many have it open.
        open_count: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// The kernel refused.
    #[error("failed to {verb} device-mapper device {name} (the kernel log may say more)")]
    Call {
        /// What was asked for.
        verb: &'static str,
        /// Of which device.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A name or a table that cannot be put into a call, or an answer that cannot be read.
    #[error("failed to {verb} device-mapper device {name}")]
    Malformed {
        /// What was asked for.
        verb: &'static str,
        /// Of which device.
        name: String,
        /// What is wrong with it.
        #[source]
        source: Malformed,
    },
    /// The device's node in `/dev/mapper` could not be made or removed.
    #[error("failed to {verb} {}", path.display())]
    Node {
        /// What was tried.
        verb: &'static str,
        /// The node.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
