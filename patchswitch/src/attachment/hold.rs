//! New flows wait while something is done that only one partition can do at a time: what the patent's first embodiment
//! begins with (steps 1301 and 1501, no request from outside is accepted), without a request that is refused.
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
use std::net::IpAddr;
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_common::word::Phase;
use serde::Serialize;

use super::{AttachError, Attachment, SwitchOptions, Switched, build, remove};
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
/// And no less and no more than these, whatever it says.
const LEAST: u32 = 8;
const MOST: u32 = 500;
/// Between two of these: time to accept them.
const PAUSE: Duration = Duration::from_millis(4);
/// How long a guard may take to deliver what is in its queue.
const GRACE: Duration = Duration::from_secs(2);
/// The link address of every queue: no frame leaves it, and one that somebody else chooses may come too late.
const QUEUE_MAC: [u8; 6] = [2, b'p', b's', b'q', 0, 1];

/// Packets that wait, and what is needed to let them go. Dropped, they wait until their time is over.
#[derive(Debug)]
pub struct Hold {
    to: Slot,
    until_ns: u64,
    queue: Queue,
    guard: HoldGuard,
    /// When the first packet can have been held.
    begun: Instant,
    switched: Switched,
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
    /// Frames for which there was no room, and that the kernel did not take. Senders of TCP send them again.
    pub lost: u64,
    /// From the beginning of the hold to its end, in milliseconds.
    pub held_ms: f64,
    /// How long it took to deliver them, in milliseconds.
    pub pump_ms: f64,
}

impl Hold {
    /// The switch with which it began.
    pub fn switched(&self) -> Switched {
        self.switched
    }

    /// How much of its time is left.
    pub fn left(&self) -> Duration {
        Duration::from_nanos(self.until_ns.saturating_sub(boot_ns()))
    }
}

impl Queue {
    fn new(link: Link, tap: Tap) -> Self {
        Self { link, tap, seen: Repeats::default(), pumped: Pumped::default() }
    }

    /// Delivers what is there, until there is nothing, or as much as there is room for; so many connections at once.
    fn pump(&mut self, most: u32) -> io::Result<()> {
        let (mut frame, mut burst) = (vec![0; FRAME], 0);
        for _ in 0..ROOM {
            let Some(length) = self.tap.read(&mut frame)? else { break };
            let Some(frame) = frame.get_mut(..length).filter(|frame| frame.len() > 6) else { continue };
            let syn = Syn::parse(frame);
            if syn.is_some_and(|syn| self.seen.has_seen(syn)) {
                self.pumped.repeats += 1;
                continue;
            }
            // To this link, as the frame was to the one that brought it.
            frame.iter_mut().zip(self.link.mac).for_each(|(to, from)| *to = from);
            // One that the kernel does not take must not keep the others.
            if self.tap.write(frame).is_err() {
                self.pumped.lost += 1;
                continue;
            }
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
    /// What waits goes to the new side when the time is over, whether that is ready or not: whoever holds has to
    /// [release](Self::release) or to [call off](Self::call_off) before.
    ///
    /// # Errors
    /// [`AttachError`]; nothing waits, and new flows go where they went.
    pub async fn hold(
        &mut self,
        to: Slot,
        limit: Duration,
        options: SwitchOptions,
    ) -> Result<Hold, AttachError> {
        let refused = |why: &str| Err(AttachError::Refused(why.to_owned()));
        let word = self.plane.word();
        if !self.others.is_empty() {
            return refused("a group cannot hold packets");
        }
        if word.phase() != Phase::Steady {
            return Err(AttachError::Refused(format!(
                "a switch or a canary is under way, and nothing can be held before it has ended: `patchswitch drain {0}` \
                 waits for the end of a switch, `patchswitch switch {0}` ends a canary",
                self.record.name
            )));
        }
        if word.active() == to {
            return refused("it serves already: there is nothing to wait for");
        }
        self.end_hold().await?;
        let made = self.make_hold(to, limit).await;
        let mut hold = match made {
            Ok(hold) => hold,
            Err(error) => return Err(self.after(error, Self::drop_queue).await),
        };
        let called = Instant::now();
        match self.give_flows(to, options).await {
            Ok(switched) => {
                hold.begun = called + Duration::from_secs_f64(switched.prepare_us / 1e6);
                hold.switched = switched;
                Ok(hold)
            }
            // Something waits already.
            Err(error) if self.plane.word().active() == to => {
                Err(self.after(error, async |this| this.call_off(hold).await.map(drop)).await)
            }
            Err(error) => {
                hold.guard.dismiss();
                Err(self.after(error, Self::drop_queue).await)
            }
        }
    }

    /// An error after which something is put right; that this failed as well is logged.
    async fn after(
        &mut self,
        error: AttachError,
        undo: impl AsyncFnOnce(&mut Self) -> Result<(), AttachError>,
    ) -> AttachError {
        if let Err(error) = undo(self).await {
            tracing::warn!("{error}");
        }
        error
    }

    async fn make_hold(&mut self, to: Slot, limit: Duration) -> Result<Hold, AttachError> {
        let name = names::hold_link(&self.record.name);
        let tap = Tap::open(&name).map_err(failed)?;
        let queue = Queue::new(self.queue_link(&name).await?, tap);
        self.attach_queue(&name)?;
        let until_ns = end_of(limit);
        let guard = HoldGuard::start(&queue.tap, queue.link.mac, until_ns).map_err(failed)?;
        self.plane.hold(to, queue.link.index, until_ns)?;
        let (begun, switched) = (Instant::now(), Switched::default());
        Ok(Hold { to, until_ns, queue, guard, begun, switched })
    }

    /// Has what waits wait for so much longer from now on, if its time is not over before that is known everywhere. How much is
    /// [left](Hold::left) says whether it was.
    ///
    /// # Errors
    /// [`AttachError`]; its time is over when it would have been.
    pub fn hold_longer(&self, hold: &mut Hold, limit: Duration) -> Result<(), AttachError> {
        let (before, until_ns) = (hold.until_ns, end_of(limit));
        if hold.left().is_zero() || until_ns <= before {
            return Ok(());
        }
        let guard = HoldGuard::start(&hold.queue.tap, hold.queue.link.mac, until_ns).map_err(failed)?;
        if let Err(error) = self.plane.hold_until(hold.to, until_ns) {
            guard.dismiss();
            return Err(error.into());
        }
        std::mem::replace(&mut hold.guard, guard).dismiss();
        if boot_ns() < before {
            hold.until_ns = until_ns;
            return Ok(());
        }
        // It was over, and the other guard has begun to let go what waits.
        self.plane.hold_until(hold.to, before)?;
        let guard = HoldGuard::start(&hold.queue.tap, hold.queue.link.mac, before).map_err(failed)?;
        std::mem::replace(&mut hold.guard, guard).dismiss();
        Ok(())
    }

    async fn queue_link(&self, name: &str) -> Result<Link, AttachError> {
        let link = self.host.link(name).await?;
        let mtu = build::mtu(&self.host, &self.record.uplinks).await?;
        self.host.dress(&link, QUEUE_MAC, mtu, self.record.name.as_str()).await?;
        self.host.make_queue(&link, ROOM).await?;
        // It has nothing to say of its own.
        let key = format!("ipv6/conf/{name}/disable_ipv6");
        if sysctl::read(&key).is_ok() {
            sysctl::write(&key, "1")?;
        }
        self.host.set_up(&link, true).await?;
        Ok(Link { mac: QUEUE_MAC, ..link })
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
    pub async fn release(&mut self, hold: Hold) -> Result<Pumped, AttachError> {
        let to = hold.to;
        self.deliver(hold, to).await
    }

    /// Gives new flows back to whoever had them, and what waits as well. Flows that he has are not in its way.
    ///
    /// # Errors
    /// [`AttachError`]; what waits is delivered when its time is over, to whoever serves then.
    pub async fn call_off(&mut self, hold: Hold) -> Result<Pumped, AttachError> {
        let back = hold.to.other();
        let options = SwitchOptions { despite_losses: true, ..SwitchOptions::default() };
        let switched = self.give_flows(back, options).await;
        match switched {
            Err(error) if self.plane.word().active() != back => Err(error),
            switched => {
                let in_time = !hold.left().is_zero();
                let pumped = self.deliver(hold, back).await?;
                // Whoever was to take over has got nothing: there is nothing to drain.
                if in_time {
                    self.settle()?;
                }
                switched.map(|_| pumped)
            }
        }
    }

    /// Delivers what waits, which goes to whoever owns it by now, and opens the way of what comes.
    async fn deliver(&mut self, mut hold: Hold, receiver: Slot) -> Result<Pumped, AttachError> {
        // Whoever cannot be asked gets no more at once than is usual.
        let (begun, most) = (Instant::now(), self.burst(receiver).unwrap_or(BURST));
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
        if let Err(error) = self.answer(receiver).await {
            tracing::warn!(
                "the uplink of who serves may not answer for the service: {}",
                remove::text(&error)
            );
        }
        hold.guard.dismiss();
        queue.pumped.lost += self.host.dropped(&queue.link).await.unwrap_or_default();
        let pumped = queue.pumped;
        self.drop_queue().await?;
        Ok(pumped)
    }

    /// How many connections a partition takes at once: half of what the shortest queue of those of its listeners holds that
    /// the service can reach.
    fn burst(&self, slot: Slot) -> Result<u32, AttachError> {
        let sockets = sockets::all(&self.netns(slot)?)?;
        let serves = |at: IpAddr| at.is_unspecified() || self.record.addresses.contains(&at);
        let listeners = sockets.iter().filter(|socket| socket.is_listener() && serves(socket.local.ip()));
        let shortest = listeners.map(|socket| socket.send_queue).min();
        Ok(shortest.map_or(BURST, |room| (room / 2).clamp(LEAST, MOST)))
    }

    /// As soon as its time is over, ends a hold that somebody began who was killed; waits for that.
    ///
    /// # Errors
    /// [`AttachError`].
    pub async fn await_hold(&mut self) -> Result<(), AttachError> {
        loop {
            match self.end_hold().await {
                Err(AttachError::Waiting { left, .. }) => tokio::time::sleep(left).await,
                ended => return ended.map(drop),
            }
        }
    }

    /// Ends a hold that somebody began who was killed, as soon as its time is over. Nothing to do if there is none.
    ///
    /// # Errors
    /// [`AttachError::Waiting`] before.
    pub(super) async fn end_hold(&mut self) -> Result<bool, AttachError> {
        let name = names::hold_link(&self.record.name);
        let link = self.host.links().await?.into_iter().find(|link| link.name == name);
        if link.is_none() && self.record.hooks.iter().all(|hook| hook.link != name) {
            return Ok(false);
        }
        for slot in [Slot::A, Slot::B] {
            if let Some(left) = self.plane.held(slot)?.filter(|left| !left.is_zero()) {
                return Err(AttachError::Waiting { name: self.record.name.clone(), left });
            }
        }
        if let Some(link) = link {
            self.take_what_is_left(link).await?;
        }
        self.drop_queue().await?;
        Ok(true)
    }

    /// Delivers what a guard has left, which has the queue for itself until it ends.
    async fn take_what_is_left(&self, link: Link) -> Result<(), AttachError> {
        let end = Instant::now() + GRACE;
        while Instant::now() < end {
            if let Ok(tap) = Tap::open(&link.name) {
                return Queue::new(link, tap).pump(BURST).map_err(failed);
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
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

/// By the boot clock, in nanoseconds.
fn end_of(limit: Duration) -> u64 {
    boot_ns().saturating_add(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX))
}

fn failed(source: io::Error) -> AttachError {
    AttachError::Queue { source }
}
