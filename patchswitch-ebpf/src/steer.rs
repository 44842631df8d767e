//! Which partition gets a packet that is addressed to the service, and how it gets there.

use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_peer};
use aya_ebpf::programs::TcContext;
use patchswitch_common::Slot;
use patchswitch_common::decide::owner;
use patchswitch_common::maps::{FragmentKey, FragmentRecord};
use patchswitch_common::parse::{Fragment, LINK_HEADER, Network, Packet, is_neighbour_discovery};
use patchswitch_common::verdict::{Event, Hook, Verdict};
use patchswitch_common::word::{Phase, Word};

use crate::maps;
use crate::owner::Sockets;
use crate::packet::{self, Frame, is_ip};
use crate::report::{DROP, NEXT, event, exit};

/// A client's packet: into the namespace of its owner, byte for byte as it came. The frame is addressed to the host
/// already, and IP does not look at the MAC, so nothing has to be stored.
#[inline(always)]
pub fn from_uplink(ctx: &TcContext) -> i32 {
    let frame = Frame(ctx);
    if !frame.is_for_host() {
        return exit(Hook::Uplink, Verdict::NotOurs, NEXT);
    }
    match choose(&frame) {
        Err(verdict) => exit(Hook::Uplink, verdict, NEXT),
        Ok(slot) => match maps::slot(slot) {
            None => exit(Hook::Uplink, Verdict::Unsteered, NEXT),
            // SAFETY: a helper on plain numbers.
            Some(entry) => {
                exit(Hook::Uplink, to(slot), unsafe { bpf_redirect_peer(entry.ifindex, 0) as i32 })
            }
        },
    }
}

/// A packet of the host or of another partition, on its way out of one partition's veth: the kernel's route knows one
/// of the two, the owner may be the other. Both veths give the same inner MAC, so the frame fits either.
#[inline(always)]
pub fn from_host(ctx: &TcContext) -> i32 {
    let frame = Frame(ctx);
    let probe = maps::settings().probe_mark;
    if probe != 0 && frame.mark() & !1 == probe {
        // A dead standby must not look healthy because the active one answered.
        return exit(Hook::ToPartition, Verdict::Probe, NEXT);
    }
    match choose(&frame) {
        Err(Verdict::NotOurs) if is_ip(frame.ethertype()) && is_quarantined(frame.ifindex()) => {
            exit(Hook::ToPartition, Verdict::Quarantined, DROP)
        }
        Err(verdict) => exit(Hook::ToPartition, verdict, NEXT),
        Ok(slot) => match maps::slot(slot) {
            Some(entry) if entry.ifindex != frame.ifindex() => {
                // SAFETY: a helper on plain numbers.
                exit(Hook::ToPartition, to(slot), unsafe { bpf_redirect(entry.ifindex, 0) as i32 })
            }
            Some(_) => exit(Hook::ToPartition, to(slot), NEXT),
            None => exit(Hook::ToPartition, Verdict::Unsteered, NEXT),
        },
    }
}

/// Whether a link leads to a partition that does not serve.
#[inline(always)]
fn is_quarantined(ifindex: u32) -> bool {
    let word = maps::word();
    word.phase() == Phase::Steady && maps::slot_of(ifindex).is_some_and(|slot| slot != word.active())
}

#[inline(always)]
fn to(slot: Slot) -> Verdict {
    match slot {
        Slot::A => Verdict::ToA,
        Slot::B => Verdict::ToB,
    }
}

/// The partition that owns the packet, or why it is left to others.
#[inline(always)]
fn choose(frame: &Frame<'_>) -> Result<Slot, Verdict> {
    let ethertype = frame.ethertype();
    if !is_ip(ethertype) {
        return Err(Verdict::NotOurs);
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
    if is_neighbour_discovery(frame, &network) {
        return Err(Verdict::Neighbour);
    }
    if word.phase() == Phase::Steady && network.fragment == Fragment::Whole {
        return Ok(word.active());
    }
    let mut packet = Packet::EMPTY;
    if !packet::inbound(frame.0, &network, &mut packet) {
        return Err(Verdict::Malformed);
    }
    let slot = ask(frame.0, word, &packet, Plain::of(&network));
    note(word.active(), slot, &network);
    Ok(slot)
}

#[inline(never)]
fn ask(ctx: &TcContext, word: Word, packet: &Packet, plain: Plain) -> Slot {
    owner(word, packet, &mut Sockets { ctx, v6: plain.v6, plain: plain.plain })
}

/// Remembers where a first fragment went, and counts what is worth knowing.
#[inline(never)]
fn note(active: Slot, slot: Slot, network: &Network) {
    if slot != active {
        event(Event::KeptByRetiring);
    }
    if network.fragment == Fragment::First {
        let key = FragmentKey {
            source: network.source,
            destination: network.destination,
            id: network.fragment_id,
            protocol: network.protocol,
            pad: [0; 3],
        };
        maps::remember_fragment(&key, &FragmentRecord { slot: slot.index(), rewritten: 0, local: [0; 16] });
    } else if network.fragment == Fragment::Later && slot == active {
        event(Event::FragmentUnknown);
    }
}

/// What the socket lookups want to know of the network header.
#[derive(Clone, Copy)]
struct Plain {
    v6: bool,
    /// Whether the transport header follows an option-less network header.
    plain: bool,
}

impl Plain {
    #[inline(always)]
    fn of(network: &Network) -> Self {
        let length = if network.v6 { 40 } else { 20 };
        let plain = network.payload == LINK_HEADER + length && network.fragment == Fragment::Whole;
        Self { v6: network.v6, plain }
    }
}
