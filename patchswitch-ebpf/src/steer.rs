//! Which partition gets a packet that is addressed to the service, and how it gets there.

use core::hint::cold_path;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_peer};
use aya_ebpf::programs::TcContext;
use patchswitch_common::Slot;
use patchswitch_common::decide::{ACK, Owner, SYN, by_share, owner};
use patchswitch_common::maps::{FragmentKey, FragmentRecord, SlotEntry};
use patchswitch_common::parse::{Fragment, Kind, LINK_HEADER, Network, Octets as _, Packet, Transport};
use patchswitch_common::quic::is_stateless;
use patchswitch_common::verdict::{AGAIN_MARK, Event, Hook, Verdict};
use patchswitch_common::word::{Phase, Word};

use crate::context::Context;
use crate::maps;
use crate::owner::Sockets;
use crate::packet::{self, Frame, is_ip};
use crate::quick;
use crate::report::{DROP, NEXT, event, exit, turned_away};

/// A client's packet: into the namespace of its owner, byte for byte as it came. The frame is addressed to the host
/// already, and IP does not look at the MAC, so nothing has to be stored.
#[inline(always)]
pub fn from_uplink(ctx: &TcContext) -> i32 {
    let frame = Frame(ctx);
    if !frame.is_for_host() {
        return exit(Hook::Uplink, Verdict::NotOurs, NEXT);
    }
    let owner = match choose(&frame) {
        Err(verdict) => return turned_away(Hook::Uplink, verdict),
        Ok(owner) => owner,
    };
    let Some(entry) = maps::slot(owner.slot) else {
        return exit(Hook::Uplink, Verdict::Unsteered, NEXT);
    };
    let copied = owner.both && copy_to(ctx, owner.slot.other());
    if let Some(queue) = held(entry, frame.ifindex()) {
        // SAFETY: a helper on plain numbers.
        return exit(Hook::Uplink, Verdict::Held, unsafe { bpf_redirect(queue, 0) as i32 });
    }
    // SAFETY: a helper on plain numbers.
    exit(Hook::Uplink, to(owner.slot, copied), unsafe { bpf_redirect_peer(entry.ifindex, 0) as i32 })
}

/// A packet of the host or of another partition, on its way out of one partition's veth: the kernel's route knows one
/// of the two, the owner may be the other. Both veths give the same inner MAC, so the frame fits either.
#[inline(always)]
pub fn from_host(ctx: &TcContext) -> i32 {
    let frame = Frame(ctx);
    let (mark, probe) = (frame.mark(), maps::settings().probe_mark);
    if mark == AGAIN_MARK {
        ctx.set_mark(0);
        return exit(Hook::ToPartition, Verdict::Again, NEXT);
    }
    if probe != 0 && mark & !1 == probe {
        // A dead standby must not look healthy because the active one answered.
        return exit(Hook::ToPartition, Verdict::Probe, NEXT);
    }
    let owner = match choose(&frame) {
        Err(Verdict::NotOurs) if is_ip(frame.ethertype()) && is_quarantined(frame.ifindex()) => {
            return exit(Hook::ToPartition, Verdict::Quarantined, DROP);
        }
        Err(verdict) => return turned_away(Hook::ToPartition, verdict),
        Ok(owner) => owner,
    };
    let Some(entry) = maps::slot(owner.slot) else {
        return exit(Hook::ToPartition, Verdict::Unsteered, NEXT);
    };
    let copied = owner.both && copy_to(ctx, owner.slot.other());
    if let Some(queue) = held(entry, frame.ifindex()) {
        // SAFETY: a helper on plain numbers.
        return exit(Hook::ToPartition, Verdict::Held, unsafe { bpf_redirect(queue, 0) as i32 });
    }
    let verdict = to(owner.slot, copied);
    if entry.ifindex == frame.ifindex() {
        exit(Hook::ToPartition, verdict, NEXT)
    } else {
        if copied {
            // The hook of the other link would copy it once more.
            ctx.set_mark(AGAIN_MARK);
        }
        // SAFETY: a helper on plain numbers.
        exit(Hook::ToPartition, verdict, unsafe { bpf_redirect(entry.ifindex, 0) as i32 })
    }
}

/// The link in whose queue a packet for a partition waits; nothing if it does not. What comes out of that queue does not go
/// into it again.
#[inline(always)]
pub fn held(entry: &SlotEntry, from: u32) -> Option<u32> {
    // SAFETY: a reference is valid to read. Once: user space may change it meanwhile.
    let queue = unsafe { core::ptr::read_volatile(&raw const entry.hold) };
    if queue == 0 {
        return None;
    }
    cold_path();
    if queue != from && maps::now() < entry.hold_until_ns { Some(queue) } else { None }
}

/// Sends a copy through a partition's veth; whether that was possible.
///
/// It goes the way of the host's own packets: past the hook of that veth, which knows it by its mark, and to the link
/// address of the partition. The packet itself gets back what it had.
#[inline(never)]
fn copy_to(ctx: &TcContext, slot: Slot) -> bool {
    let (Some(entry), Some(before)) = (maps::slot(slot), Frame(ctx).at::<6>(0)) else { return false };
    let mark = Frame(ctx).mark();
    if ctx.store(0, &maps::settings().inner_mac, 0).is_err() {
        return false;
    }
    ctx.set_mark(AGAIN_MARK);
    let copied = ctx.clone_redirect(entry.ifindex, 0).is_ok();
    ctx.set_mark(mark);
    let _ = ctx.store(0, &before, 0);
    copied
}

/// Whether a link leads to a partition that does not serve.
#[inline(always)]
fn is_quarantined(ifindex: u32) -> bool {
    let word = maps::word();
    word.phase() == Phase::Steady && maps::slot_of(ifindex).is_some_and(|slot| slot != word.active())
}

#[inline(always)]
pub fn to(slot: Slot, copied: bool) -> Verdict {
    match (slot, copied) {
        (_, true) => Verdict::ToBoth,
        (Slot::A, false) => Verdict::ToA,
        (Slot::B, false) => Verdict::ToB,
    }
}

/// The partition that owns the packet, or why it is dropped or left to others.
#[inline(always)]
pub fn choose<C: Context>(frame: &Frame<'_, C>) -> Result<Owner, Verdict> {
    let ethertype = frame.ethertype();
    if !is_ip(ethertype) {
        return Err(Verdict::NotOurs);
    }
    if let Some(chosen) = quick::choose(frame, ethertype) {
        return chosen;
    }
    let destination = frame.destination(ethertype).ok_or(Verdict::Malformed)?;
    if !maps::is_service(&destination) {
        return Err(Verdict::NotOurs);
    }
    let word = maps::word();
    let mut network = Network::EMPTY;
    if !packet::network(frame.0, ethertype, &mut network) {
        return Err(Verdict::Malformed);
    }
    if let Some(verdict) = packet::refused(frame.0, &network) {
        return Err(verdict);
    }
    if word.inward() == Phase::Steady && network.fragment == Fragment::Whole {
        return Ok(Owner { slot: word.active(), both: false });
    }
    let mut packet = Packet::EMPTY;
    if !packet::inbound(frame.0, &network, &mut packet) {
        return Err(Verdict::Malformed);
    }
    let owner = owner_of(frame.0, word, &packet, Plain::of(&network, &packet));
    if C::COPIES || !owner.both {
        note(owner, &network);
    }
    Ok(owner)
}

/// The owner of a packet while there are two to choose from.
#[inline(always)]
pub fn owner_of<C: Context>(ctx: &C, word: Word, packet: &Packet, plain: Plain) -> Owner {
    let answer = ask(ctx, word, packet, plain);
    let owner = Owner { slot: Slot::from_bit(answer as u8), both: answer & BOTH != 0 };
    if word.inward() == Phase::Draining && owner.slot != word.active() {
        event(Event::KeptByRetiring);
    }
    if word.inward() != Phase::Steady {
        count_asked(owner.slot, packet);
    }
    owner
}

#[inline(always)]
fn count_asked(slot: Slot, packet: &Packet) {
    if packet.kind == Kind::Direct && packet.transport == Transport::Tcp && packet.flags & (SYN | ACK) == SYN
    {
        event(Event::asked(slot));
    }
}

/// In the answer of [`ps_owner`], beside the slot.
const BOTH: u32 = 2;
/// In its question: see [`Plain`].
const V6: u32 = 1;
/// The same.
const PLAIN: u32 = 2;
/// The place of [`Plain::payload`] in it.
const PAYLOAD: u32 = 8;

#[inline(always)]
fn ask<C: Context>(ctx: &C, word: Word, packet: &Packet, plain: Plain) -> u32 {
    let how = if plain.v6 { V6 } else { 0 } | if plain.plain { PLAIN } else { 0 };
    ctx.owner(word.0, packet, how | plain.payload << PAYLOAD)
}

/// The owner as a number: a value of two fields would be returned through a pointer, for which there is no register.
///
/// Global, so that the verifier reads it once and not on each of the ways that lead here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_owner(skb: *mut __sk_buff, word: u64, packet: *const Packet, how: u32) -> u32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value.
    let Some(packet) = (unsafe { packet.as_ref() }) else { return 0 };
    find_owner(&TcContext::new(skb), word, packet, how)
}

/// What [`ps_owner`] does, at either kind of hook.
#[inline(always)]
pub fn find_owner<C: Context>(ctx: &C, word: u64, packet: &Packet, how: u32) -> u32 {
    let word = Word(word);
    let retiring = if word.inward() == Phase::Draining { Some(word.active().other()) } else { None };
    if packet.transport == Transport::Udp && is_stateless(maps::settings(), &packet.flow) {
        let shares = word.inward() == Phase::Sharing;
        return if shares { by_share(word, &packet.flow).index() } else { word.active().index() };
    }
    let payload = how >> PAYLOAD;
    let mut sockets = Sockets { ctx, retiring, v6: how & V6 != 0, plain: how & PLAIN != 0, payload };
    let owner = owner(word, packet, &mut sockets);
    owner.slot.index() | if owner.both { BOTH } else { 0 }
}

/// Remembers where a first fragment went, and counts a later one whose first nobody saw.
#[inline(never)]
fn note(owner: Owner, network: &Network) {
    let slot = owner.slot;
    if network.fragment == Fragment::First {
        let Network { source, destination, fragment_id, protocol, v6, .. } = network;
        let key = FragmentKey::new(source, destination, *fragment_id, *protocol, *v6);
        let (slot, seen_ns) = (slot.index(), maps::now());
        maps::remember_fragment(&key, &FragmentRecord { slot, rewritten: 0, seen_ns, local: [0; 16] });
    } else if owner.both && network.fragment == Fragment::Later {
        event(Event::FragmentUnknown);
    }
}

/// What the socket lookups want to know of the network header.
#[derive(Clone, Copy)]
pub struct Plain {
    pub v6: bool,
    /// Whether the transport header follows an option-less network header.
    pub plain: bool,
    /// Where the transport header of the packet itself is; 0 if it has none, or speaks of another packet.
    pub payload: u32,
}

impl Plain {
    #[inline(always)]
    fn of(network: &Network, packet: &Packet) -> Self {
        let length = if network.v6 { 40 } else { 20 };
        let plain = network.payload == LINK_HEADER + length && network.fragment == Fragment::Whole;
        let payload = if packet.kind == Kind::Direct { network.payload } else { 0 };
        Self { v6: network.v6, plain, payload }
    }
}
