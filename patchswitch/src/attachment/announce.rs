//! An address that has come to this host's uplinks is announced, so that neighbours who knew it elsewhere find it.

use std::net::IpAddr;
use std::time::Duration;

use super::{AttachError, Record};
use crate::host::linux::frames;
use crate::host::linux::netlink::Netlink;
use crate::network::announce as wire;

/// After this time it is announced once more: on a busy link the first announcements may be lost.
pub const AGAIN: Duration = Duration::from_secs(1);

/// While somebody watches it is announced as often as this: who has lost what he knew finds it again.
pub const EVERY: Duration = Duration::from_secs(60);

/// How often each address is announced at once when it has come.
pub(super) const VOLLEY: usize = 5;

/// Announces the service's addresses on uplinks so many times, as [`frames::send`] has to be called: in
/// the uplinks' namespace.
///
/// That neighbours cannot be told is no reason not to serve: the others find the address all the same. It is logged.
pub(super) async fn announce(record: &Record, uplinks: &[String], host: &Netlink, times: usize) {
    for uplink in uplinks {
        if let Err(error) = on(uplink, &record.addresses, host, times).await {
            tracing::warn!("the service addresses could not be announced: {}", super::remove::text(&error));
        }
    }
}

/// Announces addresses on one uplink.
pub(super) async fn on(
    uplink: &str,
    addresses: &[IpAddr],
    host: &Netlink,
    times: usize,
) -> Result<(), AttachError> {
    let link = host.link(uplink).await?;
    if link.mac == [0; 6] {
        // A link without link-layer addresses has no neighbours who could be wrong.
        return Ok(());
    }
    let frames = addresses.iter().filter_map(|address| wire::frame(*address, link.mac));
    let volley: Vec<_> = frames.flat_map(|frame| std::iter::repeat_n(frame, times)).collect();
    frames::send(&link, &volley).map_err(|source| AttachError::Announce { link: uplink.to_owned(), source })
}
