//! The short way of nearly all packets: in one piece, without options, extension headers and fragments, TCP or UDP.
//!
//! It decides nothing of its own. What it cannot tell by a look at a few fields takes the long way, which looks at
//! everything; what it can tell, the long way would tell as well, only later: the calls that copy bytes and the question
//! in the table of all addresses take several times as long as the rest.

use core::hint::cold_path;

use aya_ebpf::programs::TcContext;
use patchswitch_common::Slot;
use patchswitch_common::decide::{ACK, Owner, SYN, at_once, tcp_state};
use patchswitch_common::maps::{Address, Quick, mapped};
use patchswitch_common::parse::protocol::{TCP, UDP};
use patchswitch_common::parse::{ETH_IPV4, LINK_HEADER, Network, Octets as _, Packet, Transport};
use patchswitch_common::verdict::{Event, Hook, Verdict};
use patchswitch_common::word::{Phase, Word};

use crate::context::Context;
use crate::maps;
use crate::owner::{TUPLE4, TUPLE6, state_at};
use crate::packet::{Frame, Head};
use crate::reply::{count_side, next_hop};
use crate::report::{event, exit};
use crate::steer::{Plain, owner_of};

/// Offset of the payload behind a header without options.
const PAYLOAD4: usize = LINK_HEADER as usize + 20;
/// The same of IPv6.
const PAYLOAD6: usize = LINK_HEADER as usize + 40;
/// Length of a TCP header without options.
const TCP_HEADER: usize = 20;
/// Length of a UDP header.
const UDP_HEADER: usize = 8;

/// Who gets a packet to the service, or that it is left to others; nothing if that takes the long way.
#[inline(always)]
pub fn choose<C: Context>(frame: &Frame<'_, C>, ethertype: u16) -> Option<Result<Owner, Verdict>> {
    let quick = maps::quick()?;
    if ethertype == ETH_IPV4 { choose4(frame, quick) } else { choose6(frame, quick) }
}

#[inline(always)]
fn choose4<C: Context>(frame: &Frame<'_, C>, quick: &Quick) -> Option<Result<Owner, Verdict>> {
    let head = frame.head::<PAYLOAD4>()?;
    if !has4(quick, head.word::<30>()) {
        return others(quick);
    }
    let end = end4(frame, head)?;
    // As `refuse::is_martian`.
    if matches!(head.byte::<26>(), 0 | 127 | 224..) {
        return None;
    }
    let word = maps::word();
    if word.inward() == Phase::Steady {
        return Some(Ok(Owner { slot: word.active(), both: false }));
    }
    if word.inward() == Phase::Draining
        && head.byte::<23>() == TCP
        && let Some(slot) = kept4(frame, end, word.active())
    {
        return Some(Ok(Owner { slot, both: false }));
    }
    let mut packet = Packet::EMPTY;
    packet.flow.remote = address4(head.word::<26>());
    packet.flow.local = address4(head.word::<30>());
    match head.byte::<23>() {
        TCP => tcp4(frame, end, &mut packet)?,
        _ => udp4(frame, end, &mut packet)?,
    }
    Some(Ok(owner_of(frame.0, word, &packet, Plain { v6: false, plain: true, payload: PAYLOAD4 as u32 })))
}

#[inline(always)]
fn choose6<C: Context>(frame: &Frame<'_, C>, quick: &Quick) -> Option<Result<Owner, Verdict>> {
    let head = frame.head::<PAYLOAD6>()?;
    if !has6(quick, [head.long::<38>(), head.long::<46>()]) {
        return others(quick);
    }
    let end = end6(frame, head)?;
    // As `refuse::is_plain`.
    if matches!(head.byte::<22>(), 0 | 0xfe | 0xff) {
        return None;
    }
    let word = maps::word();
    if word.inward() == Phase::Steady {
        return Some(Ok(Owner { slot: word.active(), both: false }));
    }
    if word.inward() == Phase::Draining
        && head.byte::<20>() == TCP
        && let Some(slot) = kept6(frame, end, word.active())
    {
        return Some(Ok(Owner { slot, both: false }));
    }
    let mut packet = Packet::EMPTY;
    packet.flow.remote = address6(head.long::<22>(), head.long::<30>());
    packet.flow.local = address6(head.long::<38>(), head.long::<46>());
    match head.byte::<20>() {
        TCP => tcp6(frame, end, &mut packet)?,
        _ => udp6(frame, end, &mut packet)?,
    }
    Some(Ok(owner_of(frame.0, word, &packet, Plain { v6: true, plain: true, payload: PAYLOAD6 as u32 })))
}

/// A packet that goes to none of the quick table's addresses.
#[inline(always)]
fn others(quick: &Quick) -> Option<Result<Owner, Verdict>> {
    if quick.all != 0 { Some(Err(Verdict::NotOurs)) } else { None }
}

/// The end of a plain IPv4 packet of TCP or UDP; nothing if it is not plain.
#[inline(always)]
fn end4<C: Context>(frame: &Frame<'_, C>, head: Head<PAYLOAD4>) -> Option<u32> {
    let end = LINK_HEADER + u32::from(u16::from_be(head.short::<16>()));
    // More fragments, or not the first one.
    let is_whole = head.short::<20>() & 0x3fff_u16.to_be() == 0;
    let fits = end >= PAYLOAD4 as u32 && end <= frame.length();
    let plain = head.byte::<14>() == 0x45 && is_whole && fits && matches!(head.byte::<23>(), TCP | UDP);
    if plain {
        return Some(end);
    }
    cold_path();
    None
}

/// The same of IPv6.
#[inline(always)]
fn end6<C: Context>(frame: &Frame<'_, C>, head: Head<PAYLOAD6>) -> Option<u32> {
    let length = u32::from(u16::from_be(head.short::<18>()));
    let end = PAYLOAD6 as u32 + length;
    let fits = length != 0 && end <= frame.length();
    let plain = head.byte::<14>() >> 4 == 6 && fits && matches!(head.byte::<20>(), TCP | UDP);
    if plain {
        return Some(end);
    }
    cold_path();
    None
}

/// Makes the readers of the two transport headers behind one of the two network headers.
macro_rules! transport {
    ($tcp:ident, $udp:ident, $at:ident, $kept:ident, $source:literal, $tuple:ident) => {
        /// Who gets a TCP segment while somebody retires, if one look at the retiring side's socket tells.
        #[inline(always)]
        fn $kept<C: Context>(frame: &Frame<'_, C>, end: u32, active: Slot) -> Option<Slot> {
            let head = frame.head::<{ $at + TCP_HEADER }>()?;
            let length = u32::from(head.byte::<{ $at + 12 }>() >> 4) * 4;
            let ports = head.short::<$at>() != 0 && head.short::<{ $at + 2 }>() != 0;
            if !ports || length < TCP_HEADER as u32 || $at as u32 + length > end {
                cold_path();
                return None;
            }
            let flags = head.byte::<{ $at + 13 }>();
            let tuple = head.address::<$source, $tuple>();
            let state = state_at::<$tuple>(frame.0, active.other(), tuple);
            let kept = at_once(state, flags)?;
            Some(told(active, state, flags, kept))
        }

        #[inline(always)]
        fn $tcp<C: Context>(frame: &Frame<'_, C>, end: u32, packet: &mut Packet) -> Option<()> {
            let head = frame.head::<{ $at + TCP_HEADER }>()?;
            let (source, destination) = (head.short::<$at>(), head.short::<{ $at + 2 }>());
            let length = u32::from(head.byte::<{ $at + 12 }>() >> 4) * 4;
            if source == 0 || destination == 0 || length < TCP_HEADER as u32 || $at as u32 + length > end {
                return None;
            }
            (packet.flow.remote_port, packet.flow.local_port) = (source, destination);
            packet.flow.protocol = TCP;
            packet.transport = Transport::Tcp;
            packet.flags = head.byte::<{ $at + 13 }>();
            Some(())
        }

        #[inline(always)]
        fn $udp<C: Context>(frame: &Frame<'_, C>, end: u32, packet: &mut Packet) -> Option<()> {
            let head = frame.head::<{ $at + UDP_HEADER }>()?;
            if ($at + UDP_HEADER) as u32 > end {
                return None;
            }
            (packet.flow.remote_port, packet.flow.local_port) =
                (head.short::<$at>(), head.short::<{ $at + 2 }>());
            packet.flow.protocol = UDP;
            packet.transport = Transport::Udp;
            Some(())
        }
    };
}

transport!(tcp4, udp4, PAYLOAD4, kept4, 26, TUPLE4);
transport!(tcp6, udp6, PAYLOAD6, kept6, 22, TUPLE6);

/// Counts what was told at once, as the long way does.
#[inline(always)]
fn told(active: Slot, state: Option<u32>, flags: u8, kept: bool) -> Slot {
    let slot = if kept { active.other() } else { active };
    if matches!(state, None | Some(tcp_state::CLOSE)) {
        cold_path();
        event(Event::NothingInRetiring);
    }
    if kept {
        event(Event::KeptByRetiring);
    }
    if flags & (SYN | ACK) == SYN {
        event(Event::asked(slot));
    }
    slot
}

/// Sends on what a partition answers from a service address; nothing if that takes the long way.
#[inline(always)]
pub fn answer(ctx: &TcContext, slot: Slot, ethertype: u16) -> Option<i32> {
    let frame = Frame(ctx);
    let quick = maps::quick()?;
    let word = maps::word();
    if frame.has_tag() || (word.is_steady() && slot != word.active()) {
        return None;
    }
    let (mut network, mut packet) = (Network::EMPTY, Packet::EMPTY);
    if ethertype == ETH_IPV4 {
        answer4(&frame, slot, quick, (&mut network, &mut packet))?;
    } else {
        answer6(&frame, slot, quick, (&mut network, &mut packet))?;
    }
    if !is_all(slot, word, &packet) {
        return None;
    }
    let action = next_hop(ctx, &network)?;
    count_side(slot, word, &packet);
    Some(exit(Hook::FromPartition, Verdict::Out, action))
}

#[inline(always)]
fn answer4(
    frame: &Frame<'_>,
    slot: Slot,
    quick: &Quick,
    (network, packet): (&mut Network, &mut Packet),
) -> Option<()> {
    let head = frame.head::<PAYLOAD4>()?;
    let end = end4(frame, head)?;
    // What governs the host is there: see `refuse::outbound`.
    let to_control = matches!(head.byte::<30>(), 127 | 169);
    if to_control || !has4(quick, head.word::<26>()) || !is_inner(head.word::<6>(), head.short::<10>()) {
        return None;
    }
    network.source = address4(head.word::<26>());
    network.destination = address4(head.word::<30>());
    network.protocol = head.byte::<23>();
    if maps::slot(slot.other()).is_some_and(|other| other.own4 == network.destination) {
        return None;
    }
    match network.protocol {
        TCP => tcp4(frame, end, packet),
        _ => udp4(frame, end, packet),
    }
}

#[inline(always)]
fn answer6(
    frame: &Frame<'_>,
    slot: Slot,
    quick: &Quick,
    (network, packet): (&mut Network, &mut Packet),
) -> Option<()> {
    let head = frame.head::<PAYLOAD6>()?;
    let end = end6(frame, head)?;
    let is_service = has6(quick, [head.long::<22>(), head.long::<30>()]);
    // The loopback's first byte is 0.
    if head.byte::<38>() == 0 || !is_service || !is_inner(head.word::<6>(), head.short::<10>()) {
        return None;
    }
    network.source = address6(head.long::<22>(), head.long::<30>());
    network.destination = address6(head.long::<38>(), head.long::<46>());
    network.protocol = head.byte::<20>();
    network.v6 = true;
    if maps::slot(slot.other()).is_some_and(|other| other.own6 == network.destination) {
        return None;
    }
    match network.protocol {
        TCP => tcp6(frame, end, packet),
        _ => udp6(frame, end, packet),
    }
}

/// Whether nothing more is to be asked of what a partition sends from a service address. A connection that the retiring
/// side opens may be in the way of another one; flows of datagrams are remembered or rewritten; and what a server of
/// addresses says is not for a partition to say. The ports are those of the packet, the source first.
#[inline(always)]
fn is_all(slot: Slot, word: Word, packet: &Packet) -> bool {
    if packet.transport == Transport::Tcp {
        let retires = !word.is_steady() && slot != word.active();
        !(retires && packet.flags & (SYN | ACK) == SYN)
    } else {
        !word.learns() && !word.notice() && !matches!(u16::from_be(packet.flow.remote_port), 67 | 547)
    }
}

/// Whether a source's link address is that of the partitions.
#[inline(always)]
fn is_inner(first: u32, last: u16) -> bool {
    let [a, b, c, d, e, f] = maps::settings().inner_mac;
    first == u32::from_ne_bytes([a, b, c, d]) && last == u16::from_ne_bytes([e, f])
}

#[inline(always)]
fn has4(quick: &Quick, address: u32) -> bool {
    let [a, b, c, d] = quick.v4;
    if address == a {
        return quick.has_v4 != 0;
    }
    // Nearly every service has one address of a family: without this the compiler compares with all of them each time.
    cold_path();
    (address == b || address == c || address == d) && quick.has_v4 != 0
}

#[inline(always)]
fn has6(quick: &Quick, address: [u64; 2]) -> bool {
    let [a, b, c, d] = quick.v6;
    if address == a {
        return quick.has_v6 != 0;
    }
    cold_path();
    (address == b || address == c || address == d) && quick.has_v6 != 0
}

/// The mapped form of an IPv4 address, as a packet has it.
#[inline(always)]
fn address4(number: u32) -> Address {
    mapped(number.to_ne_bytes())
}

/// An IPv6 address of its two halves, as a packet has them.
#[inline(always)]
fn address6(high: u64, low: u64) -> Address {
    let mut address = [0; 16];
    address[..8].copy_from_slice(&high.to_ne_bytes());
    address[8..].copy_from_slice(&low.to_ne_bytes());
    address
}
