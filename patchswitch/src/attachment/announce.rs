//! An address that has come to this host's uplinks is announced, so that neighbours who knew it elsewhere find it.

use std::time::Duration;

use super::{AttachError, Record};
use crate::host::linux::frames;
use crate::host::linux::netlink::Netlink;
use crate::network::announce as wire;

/// After this time it is announced once more: on a busy link the first announcements may be lost.
pub const AGAIN: Duration = Duration::from_secs(1);

/// How often each address is announced at once.
const VOLLEY: usize = 5;

/// Announces all addresses on all uplinks, as [`frames::send`] has to be called: in the uplinks' namespace.
///
/// That neighbours cannot be told is no reason not to serve: the others find the address all the same. It is logged.
pub(super) async fn announce(record: &Record, host: &Netlink) {
    for uplink in &record.uplinks {
        if let Err(error) = on(uplink, record, host).await {
            tracing::warn!("the service addresses could not be announced: {}", super::remove::text(&error));
        }
    }
}

async fn on(uplink: &str, record: &Record, host: &Netlink) -> Result<(), AttachError> {
    let link = host.link(uplink).await?;
    if link.mac == [0; 6] {
        // A link without link-layer addresses has no neighbours who could be wrong.
        return Ok(());
    }
    let frames = record.addresses.iter().filter_map(|address| wire::frame(*address, link.mac));
    let volley: Vec<_> = frames.flat_map(|frame| std::iter::repeat_n(frame, VOLLEY)).collect();
    frames::send(&link, &volley).map_err(|source| AttachError::Announce { link: uplink.to_owned(), source })
}
