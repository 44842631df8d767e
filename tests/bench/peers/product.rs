//! patchswitch itself, as the library attaches it to two partitions of its own.

use std::future::Future;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;
use patchswitch::attachment::{Attachment, Inside, Partition, Spec, SwitchOptions, Switched};
use patchswitch::config::Datagrams;
use patchswitch::dataplane::Hook;
use patchswitch::host::linux::netns::NetnsRef;
use patchswitch::host::linux::priority::Priority;
use patchswitch::names::{self, Name};
use patchswitch_common::Slot;
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{Ns, OWN_A, OWN_B, SERVICE, SwitchLab, UPLINK};

use super::{Peer, Side};

/// No flow of the measurement is idle for that long.
const UDP_IDLE: Duration = Duration::from_secs(125);

/// An attachment in a laboratory; detached when it is dropped.
#[derive(Debug)]
pub(crate) struct Product {
    lab: SwitchLab,
    name: Name,
    /// Whether nothing is steered to the old side.
    letter: bool,
}

impl Product {
    /// Attaches; the first partition serves. The attachment is named after the label.
    pub(crate) fn new(label: &str) -> Result<Self> {
        let lab = SwitchLab::new(label)?;
        let name = Name::new(&format!("bench-{label}"))?;
        let spec = Spec {
            name: name.clone(),
            addresses: SERVICE.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
            uplinks: vec![UPLINK.to_owned()],
            udp_idle: UDP_IDLE,
            datagrams: Datagrams::default(),
            hook: None,
            of_service: false,
            own_uplinks: false,
            with: None,
        };
        let (first, second) = (partition(&lab.a, OWN_A)?, partition(&lab.b, OWN_B)?);
        let product = Self { lab, name, letter: false };
        product.library(|| async move {
            Attachment::create(&spec, &first, Some(&second)).await?;
            Ok(())
        })?;
        Ok(product)
    }

    /// As [`Product::new`]; its switches are to the letter of the patent.
    pub(crate) fn to_the_letter(label: &str) -> Result<Self> {
        let mut product = Self::new(label)?;
        product.letter = true;
        Ok(product)
    }

    fn library<T: Send, F: Future<Output = Result<T>>>(&self, call: impl FnOnce() -> F + Send) -> Result<T> {
        self.lab.host.enter(|| {
            // As the program does around a switch.
            let _gives_way = Priority::give_way();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(call())
        })
    }

    /// Opens the attachment and does something with it.
    pub(crate) fn with<T: Send>(
        &self,
        call: impl AsyncFnOnce(&mut Attachment) -> Result<T> + Send,
    ) -> Result<T> {
        let name = self.name.clone();
        self.library(|| async move {
            let mut attachment = Attachment::open(&name)?;
            call(&mut attachment).await
        })
    }

    /// Begins to remember flows without a socket, as a job does before its switch.
    pub(crate) fn learn(&self) -> Result<()> {
        self.with(async |attachment| Ok(attachment.learn()?))
    }

    /// A whole switch.
    pub(crate) fn take_over(&self, to: Side) -> Result<Switched> {
        self.with(async |attachment| {
            attachment.learn()?;
            let options = SwitchOptions { letter: self.letter, ..SwitchOptions::default() };
            Ok(attachment.switch_with(slot(to), options).await?)
        })
    }

    /// The store alone, with a moment before and one after it; what follows the word is brought up afterwards.
    pub(crate) fn store(&self, to: Side) -> Result<[u64; 2]> {
        self.with(async |attachment| {
            let word = attachment.plane().word();
            let ready = word.with_notice(true);
            attachment.plane().store(word, ready)?;
            let before = now_ns();
            let next = if self.letter { ready.moved_to(slot(to)) } else { ready.taken_over_by(slot(to)) };
            attachment.plane().store(ready, next)?;
            let after = now_ns();
            attachment.plane().fence()?;
            attachment.reassert().await?;
            Ok([before, after])
        })
    }

    /// Ends a switch.
    pub(crate) fn settle(&self) -> Result<()> {
        self.with(async |attachment| Ok(attachment.settle()?))
    }

    /// Where its maps and programs are pinned.
    pub(crate) fn pins(&self) -> std::path::PathBuf {
        names::pin_dir(&self.name)
    }

    /// The programs' places.
    pub(crate) fn hooks(&self) -> Result<Vec<Hook>> {
        self.with(async |attachment| Ok(attachment.record().hooks.clone()))
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        let name = self.name.clone();
        if let Err(error) = self.library(|| async move { Ok(Attachment::detach(&name).await?) }) {
            crate::report::say(&format!("{error:#}"));
        }
    }
}

impl Peer for Product {
    fn lab(&self) -> &SwitchLab {
        &self.lab
    }

    fn prepare(&mut self) -> Result<()> {
        self.learn()
    }

    fn switch(&mut self, to: Side) -> Result<u64> {
        let begun = now_ns();
        self.take_over(to)?;
        Ok(begun)
    }

    fn flip(&mut self, to: Side) -> Result<u64> {
        Ok(self.store(to)?[0])
    }
}

/// The slot of a side.
pub(crate) fn slot(side: Side) -> Slot {
    match side {
        Side::A => Slot::A,
        Side::B => Slot::B,
    }
}

fn partition(ns: &Ns, own: [&str; 2]) -> Result<Partition> {
    let own = own.iter().map(|text| text.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
    Ok(Partition {
        netns: NetnsRef::Path(ns.path()),
        inner_link: "eth0".to_owned(),
        inside: Inside::Owned { own },
    })
}
