//! Kernel settings below `/proc/sys/net`, each changed with its old value returned, so that it can be put back.
//!
//! What is read and written is that of the calling thread's network namespace.

use std::io;
use std::path::PathBuf;

/// Why a setting could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("failed to {action} kernel setting net.{key}")]
pub struct SysctlError {
    /// `read` or `write`.
    pub action: &'static str,
    /// The setting, without the leading `net.`, with slashes.
    pub key: String,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

fn path(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(key)
}

/// Reads a setting, e.g. `ipv4/conf/all/rp_filter`.
///
/// # Errors
/// [`SysctlError`] if there is no such setting.
pub fn read(key: &str) -> Result<String, SysctlError> {
    std::fs::read_to_string(path(key)).map(|text| text.trim_end().to_owned()).map_err(|source| SysctlError {
        action: "read",
        key: key.to_owned(),
        source,
    })
}

/// Writes a setting.
///
/// # Errors
/// [`SysctlError`].
pub fn write(key: &str, value: &str) -> Result<(), SysctlError> {
    std::fs::write(path(key), value).map_err(|source| SysctlError {
        action: "write",
        key: key.to_owned(),
        source,
    })
}
