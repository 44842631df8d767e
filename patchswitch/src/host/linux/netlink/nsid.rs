//! Ids of network namespaces, as the kernel names them to BPF programs.

use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::super::netns::Netns;
use super::{Netlink, NetlinkError, failed, unless};

/// So many numbers are tried.
const ATTEMPTS: i32 = 256;
/// The distance between two of them.
const STEP: i32 = 0x1_0000;

impl Netlink {
    /// Gives a namespace an id as seen from this one, or asks for the id that it has.
    ///
    /// To be called *before* a veth leads there: making one allocates an id by itself. Not to be read off the order
    /// of links.
    ///
    /// # Errors
    /// [`NetlinkError::Request`], [`NetlinkError::NoNsid`].
    pub async fn nsid(&self, netns: &Netns, wanted: i32) -> Result<i32, NetlinkError> {
        if let Some(id) = self.get_nsid(netns).await? {
            return Ok(id);
        }
        // An id cannot be taken away from a namespace that lives, so an earlier one may still have the number.
        for candidate in (0..ATTEMPTS).map(|n| wanted.saturating_add(n * STEP)) {
            let message = nsid_message(netns, Some(candidate));
            let done = self.request(RouteNetlinkMessage::NewNsId(message), 0).await;
            // Either the number is taken, or somebody else was quicker.
            let named = || format!("set an id for network namespace {netns}");
            done.map(drop).or_else(unless(libc::EEXIST, named))?;
            if let Some(id) = self.get_nsid(netns).await? {
                return Ok(id);
            }
        }
        Err(NetlinkError::NoNsid(netns.to_string()))
    }

    async fn get_nsid(&self, netns: &Netns) -> Result<Option<i32>, NetlinkError> {
        let message = RouteNetlinkMessage::GetNsId(nsid_message(netns, None));
        let answer = self.request(message, 0).await.map_err(failed("ask for a namespace's id"))?;
        let id = answer.into_iter().find_map(|message| match message {
            RouteNetlinkMessage::NewNsId(m) => m.attributes.into_iter().find_map(|a| match a {
                NsidAttribute::Id(id) => Some(id),
                _ => None,
            }),
            _ => None,
        });
        Ok(id.filter(|id| *id >= 0))
    }
}

fn nsid_message(netns: &Netns, id: Option<i32>) -> NsidMessage {
    let mut message = NsidMessage::default();
    message.header.family = AddressFamily::Unspec;
    message.attributes.push(NsidAttribute::Fd(netns.raw_fd().unsigned_abs()));
    message.attributes.extend(id.map(NsidAttribute::Id));
    message
}
