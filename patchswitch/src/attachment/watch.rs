//! Neighbours while somebody looks: they are told again where the service is, and whoever else says that he has its
//! address is named and answered.
//!
//! | on an uplink | IPv4 | IPv6 |
//! |---|---|---|
//! | somebody asks who has the address | the kernel answers | the kernel answers |
//! | somebody asks whether it is free | this answers: the kernel does so for its own addresses only | the kernel answers, and this |
//! | somebody else says that he has it | this answers | this answers |
//!
//! To answer is to announce the address, for each address and uplink at most once in ten seconds (RFC 5227, section
//! 2.4, (c): the address is not given up). Nothing of it needs a process for the service to work; without one nobody
//! defends an IPv4 address.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::JoinHandle;

use super::{AttachError, Attachment, Record, announce, here, preflight, remove, wiring};
use crate::dataplane::{Dataplane, Line};
use crate::host::linux::neighbours::Listener;
use crate::host::linux::netlink::{Link, Netlink};
use crate::names::Name;
use crate::network::claim::{self, Claim, Kind};

/// Neighbours are listened to this often.
const POLL: Duration = Duration::from_millis(250);
/// An address is defended at most as often as this (`DEFEND_INTERVAL`), and one claim of it told.
const DEFEND: Duration = Duration::from_secs(10);
/// So many claims are told in that time: whoever makes up link-layer addresses fills no log.
const TOLD: usize = 32;

/// Somebody else says that he has a service address, or is about to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Foreign {
    /// The address.
    pub address: IpAddr,
    /// The uplink on which he was heard.
    pub link: String,
    /// His link-layer address.
    pub mac: String,
    /// How he says it.
    pub kind: Kind,
    /// Whether he was answered; not, if the address was defended less than ten seconds ago.
    pub answered: bool,
}

impl std::fmt::Display for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { address, link, mac, kind, answered } = self;
        let answer = if *answered { "; it was announced again" } else { "" };
        write!(f, "{address} is claimed by {mac} on {link}, by {}{answer}", kind.name())
    }
}

/// Hears the neighbours of an attachment and speaks to them.
#[derive(Debug)]
struct Neighbours {
    record: Record,
    host: Netlink,
    every: Duration,
    announced: Instant,
    listeners: Vec<(Link, Listener)>,
    defended: BTreeMap<(String, IpAddr), Instant>,
    told: BTreeMap<(IpAddr, [u8; 6]), Instant>,
}

impl Neighbours {
    /// Begins to listen. `every`: how often the addresses are announced; the first time after that time.
    async fn open(record: Record, host: Netlink, every: Duration) -> Result<Self, AttachError> {
        let (defended, told) = (BTreeMap::new(), BTreeMap::new());
        let announced = Instant::now();
        let mut neighbours = Self { record, host, every, announced, listeners: Vec::new(), defended, told };
        neighbours.listen().await?;
        Ok(neighbours)
    }

    /// Listens on the uplinks as they are now. One that is gone has no neighbours.
    async fn listen(&mut self) -> Result<(), AttachError> {
        let there = self.host.links().await?;
        self.listeners.retain(|(link, _)| there.iter().any(|one| one.index == link.index));
        for link in there.into_iter().filter(|link| self.record.uplinks.contains(&link.name)) {
            if !self.listeners.iter().any(|(known, _)| known.index == link.index) {
                let listener = Listener::open(&link)
                    .map_err(|source| AttachError::Listen { link: link.name.clone(), source })?;
                self.listeners.push((link, listener));
            }
        }
        Ok(())
    }

    /// Hears what was said since the last time and answers; announces if it is time to.
    async fn look(&mut self) -> Result<Vec<Foreign>, AttachError> {
        let heard = self.heard();
        let is_due = self.announced.elapsed() >= self.every;
        // What is not attached any more is somebody else's, who may say so.
        if (heard.is_empty() && !is_due) || !self.is_attached() {
            return Ok(Vec::new());
        }
        if is_due {
            self.announced = Instant::now();
            announce::announce(&self.record, &self.answering(), &self.host, 1).await;
            self.listen().await?;
        }
        let ours = self.ours().await?;
        let mut foreign = Vec::new();
        for (link, claim) in heard.into_iter().filter(|(_, claim)| !ours.contains(&claim.mac)) {
            let answered = self.defend(&link, claim.address).await?;
            if self.is_news(&claim) || answered {
                let mac = claim.mac.map(|byte| format!("{byte:02x}")).join(":");
                foreign.push(Foreign { address: claim.address, link, mac, kind: claim.kind, answered });
            }
        }
        Ok(foreign)
    }

    /// What was said of the service addresses on each uplink.
    fn heard(&self) -> Vec<(String, Claim)> {
        let mut heard = Vec::new();
        for (link, listener) in &self.listeners {
            match listener.read() {
                Ok(frames) => {
                    let claims = frames.iter().filter_map(|frame| claim::read(frame));
                    let claims = claims.filter(|claim| self.record.addresses.contains(&claim.address));
                    heard.extend(claims.map(|claim| (link.name.clone(), claim)));
                }
                Err(error) => tracing::debug!("nobody is heard on {}: {error}", link.name),
            }
        }
        heard
    }

    fn is_attached(&self) -> bool {
        Record::load(&self.record.name).is_ok_and(|now| {
            (&now.addresses, &now.uplinks, now.host)
                == (&self.record.addresses, &self.record.uplinks, self.record.host)
        })
    }

    /// The uplinks on which the host answers for the service. None: who serves is not to be told at this moment.
    fn answering(&self) -> Vec<String> {
        if !self.record.own_uplinks {
            return self.record.uplinks.clone();
        }
        let plane = Dataplane::open(&self.record.name);
        plane.map(|plane| self.record.uplinks_of(plane.word().active()).to_vec()).unwrap_or_default()
    }

    /// The link-layer addresses that are this host's or its partitions'.
    async fn ours(&self) -> Result<Vec<[u8; 6]>, AttachError> {
        let mut ours: Vec<_> = self.host.links().await?.into_iter().map(|link| link.mac).collect();
        ours.push(wiring::inner_mac(&self.record.name));
        Ok(ours)
    }

    /// Says once more whose an address is, unless that was said a moment ago.
    async fn defend(&mut self, link: &str, address: IpAddr) -> Result<bool, AttachError> {
        let key = (link.to_owned(), address);
        let is_silent = !self.answering().iter().any(|one| one == link);
        if is_silent || self.defended.get(&key).is_some_and(|last| last.elapsed() < DEFEND) {
            return Ok(false);
        }
        announce::on(link, &[address], &self.host, 1).await?;
        self.defended.insert(key, Instant::now());
        Ok(true)
    }

    /// Whether this is to be told: the first time, and after a while again.
    fn is_news(&mut self, claim: &Claim) -> bool {
        self.told.retain(|_, last| last.elapsed() < DEFEND);
        let key = (claim.address, claim.mac);
        if self.told.contains_key(&key) || self.told.len() >= TOLD {
            return false;
        }
        self.told.insert(key, Instant::now());
        true
    }
}

/// A connection to the kernel for who watches beside somebody that goes on with the attachment: on one connection there can be
/// one list under way at any time (`EBUSY`; `__netlink_dump_start`, `net/netlink/af_netlink.c`).
fn own_connection(record: &Record) -> Result<Netlink, AttachError> {
    Ok(Netlink::open(&here(record)?)?)
}

/// Neighbours are watched as long as this lives, beside whatever else is done.
#[derive(Debug)]
pub struct Watching(JoinHandle<()>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Attachment {
    /// Watches the neighbours until the result is dropped, as a task of the caller's runtime: announces the service
    /// addresses each time that `every` is over, and tells and answers foreign claims of them in the log. What fails is
    /// logged.
    pub fn watch_neighbours(&self, every: Duration) -> Watching {
        let record = self.record().clone();
        let host = own_connection(&record);
        Watching(tokio::spawn(async move {
            let failed = |error: &AttachError| {
                tracing::warn!("neighbours are not watched: {}", remove::text(error));
            };
            let opened = match host {
                Ok(host) => Neighbours::open(record, host, every).await,
                Err(error) => Err(error),
            };
            let mut neighbours = match opened {
                Ok(neighbours) => neighbours,
                Err(error) => return failed(&error),
            };
            loop {
                match neighbours.look().await {
                    Ok(foreign) => foreign.iter().for_each(|foreign| tracing::warn!("{foreign}")),
                    Err(error) => failed(&error),
                }
                tokio::time::sleep(POLL).await;
            }
        }))
    }
}

/// Something that whoever watches an attachment may want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Somebody else claims a service address.
    Foreign(Foreign),
    /// The programs say something.
    Programs(Line),
}

/// An attachment that is watched, without its lock: nobody is in the way of anybody.
#[derive(Debug)]
pub struct Watch {
    neighbours: Neighbours,
    plane: Dataplane,
}

impl Watch {
    /// Begins to watch. Root only, in the network namespace in which it was attached.
    ///
    /// # Errors
    /// As [`View::open`](super::View::open); [`AttachError::Listen`].
    pub async fn open(name: &Name, every: Duration) -> Result<Self, AttachError> {
        preflight::root()?;
        let record = Record::load(name)?;
        let host = own_connection(&record)?;
        let plane = Dataplane::open(name)?;
        Ok(Self { neighbours: Neighbours::open(record, host, every).await?, plane })
    }

    /// Waits a moment and says what was seen; nothing if it is not attached any more.
    ///
    /// What the programs say is not seen while a job or a drain has the attachment open, which log it themselves.
    ///
    /// # Errors
    /// [`AttachError`].
    pub async fn next(&mut self) -> Result<Option<Vec<Seen>>, AttachError> {
        tokio::time::sleep(POLL).await;
        if !self.neighbours.is_attached() {
            return Ok(None);
        }
        let foreign = self.neighbours.look().await?.into_iter().map(Seen::Foreign);
        let lines = self.plane.events()?.into_iter().flatten().map(Seen::Programs);
        Ok(Some(foreign.chain(lines).collect()))
    }
}
