//! Everything that depends on the phase word, brought to what the word says.
//!
//! The store of the word is the switch; routes and addresses follow it. Whoever is killed in between leaves them as they
//! were, and whoever comes next puts them right here, as often as he likes.
//!
//! | depends on the word | serves | retires | neither |
//! |---|---|---|---|
//! | the host's route for the service addresses | to it | – | – |
//! | source of what a partition of ours begins itself | the service's | its own | as it was: it reaches nothing |
//! | of two uplinks the one that answers, where each has its own | its | – | – |
//! | notice, learning | – | – | off, as nobody retires |
//! | learned flows | – | – | none |
//!
//! Packets that somebody had wait who was killed are delivered to whoever serves.
//!
//! An uplink that is gone is told of here as well; one whose MTU is another now gives it to the partitions' links.

use patchswitch_common::Slot;
use patchswitch_common::word::Phase;

use super::{AttachError, Attachment, build, remove, wiring};
use crate::host::linux::netlink::Netlink;

impl Attachment {
    /// Brings the host's routes, the partitions' sources and the flags of the word to what the word says, and returns
    /// what had to be mended: nothing, if all was well. Calling it again goes on after an error.
    ///
    /// Not to be called while flows are learned for a switch that is to come: it ends that.
    ///
    /// # Errors
    /// [`AttachError::Unmended`] with everything that could not be put right; the rest is right.
    pub async fn reassert(&mut self) -> Result<Vec<String>, AttachError> {
        let mut mended = self.reassert_own().await?;
        for other in &mut self.others {
            mended.extend(other.reassert_own().await?);
        }
        Ok(mended)
    }

    pub(super) async fn reassert_own(&mut self) -> Result<Vec<String>, AttachError> {
        let (mut mended, mut errors) = (Vec::new(), Vec::new());
        match self.end_hold().await {
            Ok(true) => mended.push("packets that waited go on".to_owned()),
            Ok(false) => {}
            Err(error) => errors.push(error),
        }
        match self.settle_devices().await {
            Ok(true) => mended.push("a network device is where it belongs again".to_owned()),
            Ok(false) => {}
            Err(error) => errors.push(error),
        }
        let word = self.plane.word();
        let sharing = (word.phase() == Phase::Sharing).then(|| word.active().other());
        let retiring = (word.phase() == Phase::Draining).then(|| word.active().other());
        match self.reassert_route(word.active()).await {
            Ok(what) => mended.extend(what),
            Err(error) => errors.push(error),
        }
        errors.extend(self.reassert_addresses(word.active()).await.err());
        for (slot, serving) in [(Some(word.active()), true), (sharing, true), (retiring, false)] {
            match self.reassert_source(slot, serving).await {
                Ok(what) => mended.extend(what),
                Err(error) => errors.push(error),
            }
        }
        match self.reassert_mtu().await {
            Ok(what) => mended.extend(what),
            Err(error) => errors.push(error),
        }
        for uplink in &self.record.uplinks {
            // Nothing can be done about one that is gone, but somebody has to know.
            errors.extend(self.host.link(uplink).await.err().map(AttachError::from));
        }
        if word.phase() == Phase::Steady && (word.notice() || word.learns()) {
            match self.settle() {
                Ok(()) => mended.push("a switch that did not come was called off".to_owned()),
                Err(error) => errors.push(error),
            }
        }
        match self.reassert_forgotten() {
            Ok(what) => mended.extend(what),
            Err(error) => errors.push(error),
        }
        for what in &mended {
            tracing::info!(name = %self.record.name, "{what}");
        }
        if errors.is_empty() {
            return Ok(mended);
        }
        let name = self.record.name.clone();
        Err(AttachError::Unmended { name, causes: errors.iter().map(remove::text).collect() })
    }

    /// Once a switch is over no flow is remembered. Who was killed after the word said so, and before he forgot them, has left
    /// them, and the next switch would take them for its own.
    fn reassert_forgotten(&self) -> Result<Option<String>, AttachError> {
        let word = self.plane.word();
        let is_over = word.phase() == Phase::Steady && !word.notice() && !word.learns();
        if !is_over || self.plane.learned(Slot::A)? + self.plane.learned(Slot::B)? == 0 {
            return Ok(None);
        }
        self.plane.fence()?;
        self.plane.forget_learned()?;
        Ok(Some("flows of a switch that is over were forgotten".to_owned()))
    }

    /// Partitions must not send what no uplink can: frames that the card is to divide are measured by nobody else. A
    /// link inside that somebody made smaller still stays so.
    async fn reassert_mtu(&self) -> Result<Option<String>, AttachError> {
        // That one is gone is told below.
        let Ok(mtu) = build::mtu(&self.host, &self.record.uplinks).await else { return Ok(None) };
        let mut is_other = false;
        for slot in [Slot::A, Slot::B] {
            let Some(entry) = self.record.slots[slot as usize].as_ref() else { continue };
            if self.record.gone(slot).is_some() {
                continue;
            }
            let outer = self.host.link(&entry.link).await?;
            if outer.mtu == mtu {
                continue;
            }
            let inside = Netlink::open(&self.netns(slot)?)?;
            let inner = inside.link(&entry.inner_link).await?;
            if inner.mtu == outer.mtu || inner.mtu > mtu {
                inside.set_mtu(&inner, mtu).await?;
            }
            self.host.set_mtu(&outer, mtu).await?;
            is_other = true;
        }
        Ok(is_other.then(|| format!("partitions send packets of at most {mtu} bytes, as the uplinks do")))
    }

    /// Where each side has an uplink of its own: who serves has the addresses, and his uplink answers for them.
    async fn reassert_addresses(&self, active: Slot) -> Result<(), AttachError> {
        if !self.record.own_uplinks {
            return Ok(());
        }
        if self.record.gone(active).is_none() {
            wiring::inside(&self.record, active, self.slot(active)?, &self.netns(active)?).await?;
        }
        self.answer(active).await
    }

    async fn reassert_route(&self, active: Slot) -> Result<Option<String>, AttachError> {
        let entry = self.slot(active)?;
        if wiring::is_slow_path(&self.host, &self.record, entry).await? {
            return Ok(None);
        }
        wiring::slow_path(&self.host, &self.record, entry).await?;
        Ok(Some(format!("the host's route leads to {} again", entry.netns)))
    }

    async fn reassert_source(
        &self,
        slot: Option<Slot>,
        serving: bool,
    ) -> Result<Option<String>, AttachError> {
        let Some((slot, entry)) =
            slot.and_then(|slot| Some((slot, self.record.slots[slot as usize].as_ref()?)))
        else {
            return Ok(None);
        };
        if !serving && self.record.gone(slot).is_some() {
            // It begins nothing any more.
            return Ok(None);
        }
        let netns = self.netns(slot)?;
        if wiring::prefers_source(&self.record, entry, &netns, serving).await? {
            return Ok(None);
        }
        wiring::prefer_source(&self.record, entry, &netns, serving).await?;
        let address = if serving { "the service's address" } else { "an address of its own" };
        Ok(Some(format!("{} begins new connections with {address} again", entry.netns)))
    }
}
