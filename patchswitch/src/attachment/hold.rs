//! New flows wait while something is done that only one partition can do at a time.
//!
//! ```text
//!             hold                    the deed                       release
//!  steady on A ──► word: B serves, A retires ──► A ends, B begins ──► the queue is pumped, then opened
//!                  │ A's flows stay with A                            │ in order: what comes meanwhile goes to its end
//!                  └ the rest waits in the queue of a TAP device      └ a SYN that came twice goes once
//!                                                 │
//!                                                 └─ call off: the same with the roles exchanged, to A
//! ```
//!
//! The end of the hold is in the map that BPF reads: when it has passed nothing is put into the queue any more, and a
//! process that was forked before delivers what is in it, whoever is dead by then.

use std::io;
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use serde::Serialize;

use super::{AttachError, Attachment, SwitchOptions, build};
use crate::dataplane::{Dataplane, Hook, Point};
use crate::host::linux::clock::boot_ns;
use crate::host::linux::hold_guard::{FRAME, HoldGuard};
use crate::host::linux::netlink::Link;
use crate::host::linux::sockets;
use crate::host::linux::sysctl;
use crate::host::linux::tap::Tap;
use crate::names;
use crate::network::repeat::{Repeats, Syn};

/// Frames for which there is room. The ring of a TAP device is made as long as its queue.
const ROOM: u32 = 20_000;
/// So many connections are let begin at once, if nobody listens whose queue says how many it takes.
const BURST: u32 = 50;
/// And no more than these, whatever it says.
const MOST: u32 = 500;
/// Between two of these: time to accept them.
const PAUSE: Duration = Duration::from_millis(4);
/// How long a guard may take to deliver what is in its queue.
const GRACE_NS: u64 = 2_000_000_000;

/// Packets that wait, and what is needed to let them go. Dropped, they wait until their time is over.
#[derive(Debug)]
pub struct Hold {
    to: Slot,
    until_ns: u64,
    queue: Queue,
    guard: HoldGuard,
    begun: Instant,
}

/// Where they wait.
#[derive(Debug)]
struct Queue {
    link: Link,
    tap: Tap,
    seen: Repeats,
    pumped: Pumped,
}

/// What waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Pumped {
    /// Frames that were delivered.
    pub frames: u64,
    /// Of these, connections that began.
    pub connections: u64,
    /// SYNs that were there twice, and were delivered once.
    pub repeats: u64,
    /// Frames for which there was no room. Their senders send them again.
    pub lost: u64,
    /// From the beginning of the hold to its end, in milliseconds.
    pub held_ms: f64,
    /// How long it took to deliver them, in milliseconds.
    pub pump_ms: f64,
}

impl Hold {
    /// How much of its time is left.
    pub fn left(&self) -> Duration {
        Duration::from_nanos(self.until_ns.saturating_sub(boot_ns()))
    }
}

impl Queue {
    fn new(link: Link, tap: Tap) -> Self {
        Self { link, tap, seen: Repeats::default(), pumped: Pumped::default() }
    }

    /// Delivers what is there, until there is nothing; so many connections at once.
    fn pump(&mut self, most: u32) -> io::Result<()> {
        let (mut frame, mut burst) = (vec![0; FRAME], 0);
        while let Some(length) = self.tap.read(&mut frame)? {
            let Some(frame) = frame.get_mut(..length).filter(|frame| frame.len() > 6) else { continue };
            let syn = Syn::parse(frame);
            if syn.is_some_and(|syn| self.seen.has_seen(syn)) {
                self.pumped.repeats += 1;
                continue;
            }
            // To this link, as the frame was to the one that brought it.
            frame.iter_mut().zip(self.link.mac).for_each(|(to, from)| *to = from);
            self.tap.write(frame)?;
            self.pumped.frames += 1;
            if syn.is_some() {
                self.pumped.connections += 1;
                burst += 1;
                if burst % most == 0 {
                    std::thread::sleep(PAUSE);
                }
            }
        }
        Ok(())
    }
}

impl Attachment {
    /// Takes over by a slot, but has what it would get wait: at most for so long. Flows of the other one go on.
    ///
    /// # Errors
    /// [`AttachError`]; nothing waits, and new flows go where they went.
    pub async fn hold(
        &mut self,
        to: Slot,
        limit: Duration,
        options: SwitchOptions,
    ) -> Result<Hold, AttachError> {
        if !self.others.is_empty() {
            return Err(AttachError::Refused("a group cannot hold packets".to_owned()));
        }
        if self.plane.word().active() == to {
            return Err(AttachError::Refused("it serves already: there is nothing to wait for".to_owned()));
        }
        self.end_hold().await?;
        let begun = self.begin_hold(to, limit, options).await;
        if begun.is_err() {
            self.undo_hold(to).await;
        }
        begun
    }

    /// What a hold leaves that could not be begun. What waited in these moments is sent again by its clients.
    async fn undo_hold(&mut self, to: Slot) {
        let is_switched = self.plane.word().active() == to;
        if is_switched && let Err(error) = self.switch_with(to.other(), SwitchOptions::default()).await {
            tracing::warn!("{error}");
        }
        if let Err(error) = self.drop_queue().await {
            tracing::warn!("{error}");
        }
    }

    async fn begin_hold(
        &mut self,
        to: Slot,
        limit: Duration,
        options: SwitchOptions,
    ) -> Result<Hold, AttachError> {
        let name = names::hold_link(&self.record.name);
        let tap = Tap::open(&name).map_err(failed)?;
        let queue = Queue::new(self.queue_link(&name).await?, tap);
        self.attach_queue(&name)?;
        let until_ns = boot_ns().saturating_add(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX));
        let guard = HoldGuard::start(&queue.tap, queue.link.mac, until_ns).map_err(failed)?;
        self.plane.hold(to, queue.link.index, until_ns)?;
        let begun = Instant::now();
        self.switch_with(to, options).await?;
        Ok(Hold { to, until_ns, queue, guard, begun })
    }

    async fn queue_link(&self, name: &str) -> Result<Link, AttachError> {
        let link = self.host.link(name).await?;
        let mtu = build::mtu(&self.host, &self.record.uplinks).await?;
        self.host.make_queue(&link, mtu, ROOM, self.record.name.as_str()).await?;
        // It has nothing to say of its own.
        let key = format!("net/ipv6/conf/{name}/disable_ipv6");
        if sysctl::read(&key).is_ok() {
            sysctl::write(&key, "1")?;
        }
        self.host.set_up(&link, true).await?;
        Ok(link)
    }

    fn attach_queue(&mut self, link: &str) -> Result<(), AttachError> {
        let hook = Hook { point: Point::Uplink, link: link.to_owned(), kind: self.record.hook_kind };
        self.record.hooks.push(hook.clone());
        self.record.save()?;
        Ok(self.plane.attach(&hook)?)
    }

    /// Lets what waits go to whom it waited for: first what is there, in its order, then whatever comes.
    ///
    /// # Errors
    /// [`AttachError`]; what waits is delivered when its time is over.
    pub async fn release(&mut self, mut hold: Hold) -> Result<Pumped, AttachError> {
        let (begun, most) = (Instant::now(), self.burst(hold.to)?);
        let queue = &mut hold.queue;
        queue.pump(most).map_err(failed)?;
        self.plane.release(hold.to)?;
        queue.pumped.held_ms = hold.begun.elapsed().as_secs_f64() * 1e3;
        // A packet that was on its way into the queue just now is overtaken only by what comes in these microseconds.
        queue.pump(most).map_err(failed)?;
        // Now all are there that will ever be.
        self.plane.fence()?;
        queue.pump(most).map_err(failed)?;
        queue.pumped.pump_ms = begun.elapsed().as_secs_f64() * 1e3;
        hold.guard.dismiss();
        queue.pumped.lost = self.host.dropped(&queue.link).await?;
        let pumped = queue.pumped;
        self.drop_queue().await?;
        Ok(pumped)
    }

    /// How many connections a partition takes at once: half of what the shortest queue of its listeners holds.
    fn burst(&self, slot: Slot) -> Result<u32, AttachError> {
        let sockets = sockets::all(&self.netns(slot)?)?;
        let shortest =
            sockets.iter().filter(|socket| socket.is_listener()).map(|socket| socket.send_queue).min();
        Ok(shortest.map_or(BURST, |room| (room / 2).clamp(1, MOST)))
    }

    /// Gives new flows back to whoever had them, those that wait first.
    ///
    /// # Errors
    /// [`AttachError`].
    pub async fn call_off(&mut self, hold: Hold) -> Result<Pumped, AttachError> {
        let (back, before) = (hold.to.other(), hold.to);
        // Behind those that wait already.
        self.plane.hold(back, hold.queue.link.index, hold.until_ns)?;
        self.switch_with(back, SwitchOptions::default()).await?;
        let pumped = self.release(Hold { to: back, ..hold }).await;
        self.plane.release(before)?;
        pumped
    }

    /// Ends a hold that somebody began who was killed: what waits goes to whoever serves. Nothing to do if there is none.
    pub(super) async fn end_hold(&mut self) -> Result<bool, AttachError> {
        let name = names::hold_link(&self.record.name);
        let Some(link) = self.host.links().await?.into_iter().find(|link| link.name == name) else {
            return Ok(false);
        };
        let mut until_ns = 0;
        for slot in [Slot::A, Slot::B] {
            until_ns = self.plane.slot(slot)?.hold_until_ns.max(until_ns);
            self.plane.release(slot)?;
        }
        self.plane.fence()?;
        // Until its time is over the queue is its guard's.
        while boot_ns() < until_ns.saturating_add(GRACE_NS) {
            if let Ok(tap) = Tap::open(&name) {
                Queue::new(link, tap).pump(BURST).map_err(failed)?;
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.drop_queue().await?;
        Ok(true)
    }

    async fn drop_queue(&mut self) -> Result<(), AttachError> {
        let name = names::hold_link(&self.record.name);
        for slot in [Slot::A, Slot::B] {
            if self.plane.slot(slot)?.hold != 0 {
                self.plane.release(slot)?;
            }
        }
        self.plane.fence()?;
        let hooks: Vec<Hook> = self.record.hooks.iter().filter(|hook| hook.link == name).cloned().collect();
        for hook in &hooks {
            Dataplane::detach(&self.record.name, hook)?;
        }
        self.host.delete_link(&name).await?;
        self.record.hooks.retain(|hook| hook.link != name);
        Ok(self.record.save()?)
    }
}

fn failed(source: io::Error) -> AttachError {
    AttachError::Queue { source }
}
