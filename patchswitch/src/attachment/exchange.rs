//! What only one of two partitions can have goes over while new flows wait: the network device by which the service is
//! reached (figures 13 and 14 of the patent), or the service's address at an uplink (figures 15 to 17).
//!
//! ```text
//!  device:    host    psXXa ◄─ veth ─► eth0   in A        psXXa ◄──────┐ ┌──► eth0   in A
//!             host    psXXb ◄─ veth ─► eth0   in B        psXXb ◄─ veth ─┴─► eth0   in B      the pairs have changed places
//!
//!  address:   uplink1 answers for SERVICE, A has it       uplink2 answers for SERVICE, B has it
//! ```
//!
//! The record says first what is to be, then the kernel is brought to that: whoever is killed in between leaves a record that
//! [`Attachment::reassert`] goes by. Both ways are the same deed with the roles exchanged.

use std::net::TcpListener;

use patchswitch_common::Slot;
use patchswitch_common::maps::SlotEntry;
use patchswitch_common::word::Phase;
use serde::Serialize;

use super::{AttachError, Attachment, Inside, SlotRecord, announce, remove, wiring, xdp};
use crate::host::linux::netlink::{Link, Netlink};

/// What goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Exchange {
    /// The network devices of the two partitions change places.
    Device,
    /// The old side gives the service's addresses up, and the new side's uplink answers for them: see
    /// [`Spec::own_uplinks`](super::Spec::own_uplinks).
    Address,
}

impl Exchange {
    /// For people: "the … was exchanged".
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "network device",
            Self::Address => "address",
        }
    }
}

/// A device that is not where the record says.
struct Astray {
    slot: Slot,
    entry: SlotRecord,
    outer: Link,
}

impl Attachment {
    /// Whether that can go from one partition to the other.
    ///
    /// # Errors
    /// [`AttachError::Refused`].
    pub fn can_exchange(&self, what: Exchange) -> Result<(), AttachError> {
        for slot in [Slot::A, Slot::B] {
            self.reachable(slot)?;
        }
        if what == Exchange::Address && !self.record.own_uplinks {
            return Err(AttachError::Refused(format!(
                "the partitions of {} have no uplinks of their own, between which an address could go; `patchswitch attach \
                 --own-uplinks` gives them some",
                self.record.name
            )));
        }
        Ok(())
    }

    /// Has it go over: to the partition in a slot from the other one, or back again if that has failed.
    ///
    /// # Errors
    /// [`AttachError`]; some of it is done then: the same the other way puts it back.
    pub async fn exchange(&mut self, what: Exchange, to: Slot) -> Result<(), AttachError> {
        match what {
            Exchange::Device => self.exchange_devices().await,
            Exchange::Address => self.exchange_addresses(to).await,
        }
    }

    /// The steps of the patent's figures 15 to 17, whose numbers these are. What is said between the two goes by their own
    /// interfaces, never by the network on which the addresses are.
    async fn exchange_addresses(&self, to: Slot) -> Result<(), AttachError> {
        let (old, new) = (self.slot(to.other())?, self.slot(to)?);
        // 1503: the own address is altered. One that is gone has none.
        if self.record.gone(to.other()).is_none() {
            wiring::give_up_addresses(&self.record, old, &self.netns(to.other())?).await?;
        }
        // 1504, 1601, 1602: the other one's is.
        let netns = self.netns(to)?;
        wiring::inside(&self.record, to, new, &netns).await?;
        wiring::prefer_source(&self.record, new, &netns, true).await?;
        // 1604: it says whether that went well, by what its sockets can have.
        for address in &self.record.addresses {
            let bound = netns.run(|| TcpListener::bind((*address, 0)))?;
            let _ = bound.map_err(|source| AttachError::NotTaken { address: *address, source })?;
        }
        // 1603 and 1505: both tell the devices on the network.
        self.answer(to).await?;
        self.announce_own(to.other()).await;
        Ok(())
    }

    /// Where each side has an uplink of its own: the host answers for the service at the one of who serves, and says so.
    pub(super) async fn answer(&self, active: Slot) -> Result<(), AttachError> {
        if !self.record.own_uplinks {
            return Ok(());
        }
        let answers = wiring::answer(&self.host, &self.record, active).await;
        announce::announce(&self.record, self.record.uplinks_of(active), &self.host, announce::VOLLEY).await;
        answers
    }

    /// Tells everybody where a partition's own addresses are.
    async fn announce_own(&self, slot: Slot) {
        let Some(Inside::Owned { own }) =
            self.record.slots[slot as usize].as_ref().map(|entry| &entry.inside)
        else {
            return;
        };
        for uplink in self.record.uplinks_of(slot) {
            if let Err(error) = announce::on(uplink, own, &self.host, announce::VOLLEY).await {
                tracing::warn!("own addresses could not be announced: {}", remove::text(&error));
            }
        }
    }

    /// Exchanges the network devices of the two partitions: each gets the pair of which the other one had the end inside, with
    /// its link on the host, its counters and its settings. Addresses and routes inside are made anew, as a device loses
    /// them when it changes its namespace; sockets live on.
    ///
    /// For who holds the flows of the one and has seen those of the other end: packets on their way are lost.
    ///
    /// # Errors
    /// [`AttachError`]; some of it is done then: calling it again puts it back, [`Attachment::reassert`] does the rest.
    async fn exchange_devices(&mut self) -> Result<(), AttachError> {
        if let [Some(one), Some(other)] = &mut self.record.slots {
            std::mem::swap(&mut one.link, &mut other.link);
        }
        self.record.save()?;
        let _ = self.settle_devices().await?;
        Ok(())
    }

    /// Brings each device to the partition of which the record says that it is its, and returns whether one was elsewhere.
    pub(super) async fn settle_devices(&mut self) -> Result<bool, AttachError> {
        let (astray, mut errors) = (self.astray().await?, Vec::new());
        // One that cannot be brought home must not keep the other from it.
        for Astray { slot, entry, outer } in &astray {
            errors.extend(self.fetch(*slot, entry, outer).await.err());
        }
        for one in &astray {
            errors.extend(self.furnish(one).await.err());
        }
        if astray.is_empty() {
            return Ok(false);
        }
        wiring::slow_path(&self.host, &self.record, self.slot(self.plane.word().active())?).await?;
        errors.into_iter().next().map_or(Ok(true), Err)
    }

    /// The devices that are not where they belong, or still have the name of their way, or that the programs know as another's. One
    /// that somebody has given another name at its place is his.
    async fn astray(&self) -> Result<Vec<Astray>, AttachError> {
        let (links, mut astray) = (self.host.links().await?, Vec::new());
        for slot in [Slot::A, Slot::B] {
            let Some(entry) = self.record.slots[slot as usize].clone() else { continue };
            let Some(outer) = links.iter().find(|link| link.name == entry.link) else { continue };
            let known = self.plane.slot(slot)?;
            let Some(peer) = outer.peer else { continue };
            let is_home = peer.nsid == Some(known.nsid)
                && Netlink::open(&self.netns(slot)?)?
                    .links()
                    .await?
                    .iter()
                    .any(|inner| inner.index == peer.index && inner.name != passage(&entry));
            if !is_home || known.ifindex != outer.index {
                astray.push(Astray { slot, entry, outer: outer.clone() });
            }
        }
        Ok(astray)
    }

    /// Brings a device into its partition, by a name that nothing has there.
    async fn fetch(&self, slot: Slot, entry: &SlotRecord, outer: &Link) -> Result<(), AttachError> {
        let Some(peer) = outer.peer else { return Ok(()) };
        let home = self.netns(slot)?;
        let mut away = slot;
        if peer.nsid != Some(self.plane.slot(slot)?.nsid) {
            away = slot.other();
            if peer.nsid != Some(self.plane.slot(away)?.nsid) {
                return Err(AttachError::Refused(format!(
                    "the other end of {} is in neither partition: somebody else has moved it",
                    entry.link
                )));
            }
        }
        let there = Netlink::open(&self.netns(away)?)?;
        let inner = there.links().await?.into_iter().find(|link| link.index == peer.index);
        let Some(inner) = inner else { return Ok(()) };
        let passage = passage(entry);
        there.set_up(&inner, false).await?;
        if away == slot {
            return Ok(there.rename(&inner, &passage).await?);
        }
        Ok(there.move_link(inner.index, &home, &passage).await?)
    }

    /// Gives it its name, and all that the partition has by it.
    async fn furnish(&self, Astray { slot, entry, outer }: &Astray) -> Result<(), AttachError> {
        let netns = self.netns(*slot)?;
        let inside = Netlink::open(&netns)?;
        let inner = inside.link(&passage(entry)).await?;
        inside.rename(&inner, &entry.inner_link).await?;
        wiring::inside(&self.record, *slot, entry, &netns).await?;
        xdp::receive(&self.record, &netns, &entry.inner_link)?;
        if let Some(other) = &self.record.slots[slot.other() as usize] {
            // Behind this link it was until now.
            wiring::forget_own(&self.host, other, outer).await?;
        }
        wiring::host_side(&self.host, &self.record, *slot, entry).await?;
        wiring::own_addresses(&self.host, &self.record, *slot, entry).await?;
        let word = self.plane.word();
        let retires = word.phase() == Phase::Draining && word.active() != *slot;
        wiring::prefer_source(&self.record, entry, &netns, !retires).await?;
        // Last: a device that the programs know is one that is furnished.
        let known = self.plane.slot(*slot)?;
        Ok(self.plane.set_slot(*slot, &SlotEntry { ifindex: outer.index, ..known })?)
    }
}

/// The name of a device on its way: that of its link on the host, with an `i`, as when it was made.
fn passage(entry: &SlotRecord) -> String {
    format!("{}i", entry.link)
}
