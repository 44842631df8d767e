//! The `clsact` qdisc: where programs are attached on kernels without TCX.

use futures_util::TryStreamExt;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};

use super::{Link, Netlink, NetlinkError, failed, unless};

/// The number that a `clsact` qdisc always has.
const HANDLE: TcHandle = TcHandle { major: 0xffff, minor: 0 };

impl Netlink {
    /// Whether a link has a qdisc that programs can be attached to.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn has_clsact(&self, link: &Link) -> Result<bool, NetlinkError> {
        let index = i32::try_from(link.index).unwrap_or_default();
        let messages = self.handle.qdisc().get().index(index).execute();
        let found: Vec<TcMessage> = messages.try_collect().await.map_err(failed("list qdiscs"))?;
        let ours = |message: &TcMessage| message.header.index == index && message.header.handle == HANDLE;
        Ok(found.iter().any(ours))
    }

    /// Makes a `clsact` qdisc. There already: nothing to do.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn add_clsact(&self, link: &Link) -> Result<(), NetlinkError> {
        let index = i32::try_from(link.index).unwrap_or_default();
        let mut message = TcMessage::with_index(index);
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = HANDLE;
        message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        let done = self.request(message, NLM_F_CREATE | NLM_F_EXCL).await.map(drop);
        done.or_else(unless(libc::EEXIST, || format!("make a clsact qdisc on {}", link.name)))
    }

    /// Removes the `clsact` qdisc, unless somebody has a filter on it.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn remove_clsact(&self, link: &Link) -> Result<(), NetlinkError> {
        let index = i32::try_from(link.index).unwrap_or_default();
        let filters = || self.handle.traffic_filter(index).get();
        for hook in [filters().ingress(), filters().egress()] {
            let found: Vec<TcMessage> = hook.execute().try_collect().await.map_err(failed("list filters"))?;
            if !found.is_empty() {
                return Ok(());
            }
        }
        let mut request = self.handle.qdisc().del(index);
        let message = request.message_mut();
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = HANDLE;
        let done = request.execute().await;
        done.or_else(unless(libc::ENOENT, || format!("remove the clsact qdisc of {}", link.name)))
    }
}
