//! Which programs packets meet on the links of an attachment, whoever they belong to.

use super::{AttachError, Record, here};
use crate::dataplane::{Dataplane, OnLink};
use crate::host::linux::netlink::Netlink;

impl Record {
    /// The programs on the uplinks and on the host-side links, those of others included, in the order in which packets
    /// meet them. Root only, in the network namespace in which it was attached.
    ///
    /// # Errors
    /// [`AttachError::Refused`] from another namespace, [`AttachError::Dataplane`].
    pub async fn programs(&self) -> Result<Vec<OnLink>, AttachError> {
        let host = Netlink::open(&here(self)?)?;
        let slots = self.slots.iter().flatten().map(|slot| slot.link.as_str());
        let links: Vec<&str> = self.uplinks.iter().map(String::as_str).chain(slots).collect();
        Ok(Dataplane::beside(&host, &links).await?)
    }
}
