//! What both partitions must have in common for a client not to notice which of them answers.
//!
//! Secrets of the kernel for sequence numbers, time stamps and SYN cookies are the host's, not a namespace's, so both
//! agree on them already (`net/core/secure_seq.c`, `net/ipv4/syncookies.c`). The key of TCP Fast Open is a
//! namespace's own (`net/ipv4/tcp_fastopen.c`): it is copied, or a client's first segment after the switch would lose
//! its data and be sent again. Settings that clients see are compared: what a partition is set to is for its owner to
//! say, not for a switch to change.

use crate::host::linux::netns::Netns;
use crate::host::linux::sysctl::{self, SysctlError};

use super::AttachError;

const FAST_OPEN_KEY: &str = "ipv4/tcp_fastopen_key";

/// What a client sees of a partition's kernel settings (`Documentation/networking/ip-sysctl.rst`).
const SEEN: [&str; 9] = [
    "ipv4/ip_default_ttl",
    "ipv4/ip_no_pmtu_disc",
    "ipv4/tcp_ecn",
    "ipv4/tcp_fastopen",
    "ipv4/tcp_mtu_probing",
    "ipv4/tcp_sack",
    "ipv4/tcp_syncookies",
    "ipv4/tcp_timestamps",
    "ipv4/tcp_window_scaling",
];

/// A setting in which two partitions differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    setting: &'static str,
    from: String,
    to: String,
}

/// Gives `to` the key of `from`, and tells in what the two differ. That they differ, or that the key cannot be copied,
/// is no reason not to switch: clients notice it at worst by one more round trip.
pub(super) fn prepare(from: &Netns, to: &Netns) {
    match copy_key(from, to) {
        Ok(true) => tracing::debug!("the key of TCP Fast Open was copied"),
        Ok(false) => {}
        Err(error) => tracing::warn!("{error}: clients with TCP Fast Open take one round trip more"),
    }
    match differences(from, to) {
        Ok(found) => found.iter().for_each(|one| {
            tracing::warn!(
                "net.{} is {} in the partition that serves and {} in the one that takes over",
                one.setting.replace('/', "."),
                one.from,
                one.to
            );
        }),
        Err(error) => tracing::debug!("{error}"),
    }
}

/// Whether the key had to be copied.
fn copy_key(from: &Netns, to: &Netns) -> Result<bool, AttachError> {
    let key = from.run(|| sysctl::read(FAST_OPEN_KEY))??;
    // Nobody has listened with it yet, so no client has a cookie.
    if !key.contains(|digit| matches!(digit, '1'..='9' | 'a'..='f')) {
        return Ok(false);
    }
    let put = || -> Result<bool, SysctlError> {
        if sysctl::read(FAST_OPEN_KEY)? == key {
            return Ok(false);
        }
        sysctl::write(FAST_OPEN_KEY, &key)?;
        Ok(true)
    };
    Ok(to.run(put)??)
}

fn differences(from: &Netns, to: &Netns) -> Result<Vec<Difference>, AttachError> {
    // One that a kernel does not have is not there on either side.
    let values = || SEEN.map(|key| sysctl::read(key).unwrap_or_default());
    let (from, to) = (from.run(values)?, to.run(values)?);
    let pairs = SEEN.into_iter().zip(from.into_iter().zip(to));
    Ok(pairs
        .filter(|(_, (from, to))| from != to)
        .map(|(setting, (from, to))| Difference { setting, from, to })
        .collect())
}
