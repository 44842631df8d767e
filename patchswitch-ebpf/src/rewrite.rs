//! The packet change program of the patent (Fig. 25, 26): a reply that the retiring partition sends with its own
//! address leaves with the service address as its source.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::bpf_csum_diff;
use aya_ebpf::programs::TcContext;
use patchswitch_common::Slot;
use patchswitch_common::maps::{Address, FragmentKey, FragmentRecord, is_mapped, mapped, unmapped};
use patchswitch_common::parse::{Fragment, Kind, LINK_HEADER, Network, Packet, protocol};
use patchswitch_common::quic::is_stateless;
use patchswitch_common::verdict::Event;

use crate::maps;
use crate::owner::flow_key;
use crate::reply::remember;
use crate::report::{event, trouble};

/// `BPF_F_IPV6`: keeps a CHECKSUM_COMPLETE sum right when an IPv6 address changes.
const BPF_F_IPV6: u64 = 1 << 7;

/// Set by the loader where the kernel knows [`BPF_F_IPV6`]; without it only forwarded packets of that kind suffer,
/// and a partition's replies are not forwarded ones.
#[unsafe(no_mangle)]
static HAS_CSUM_IPV6: u32 = 0;

/// Rewrites the source of a reply if it belongs to a learned flow; then `source` is what it is now.
#[inline(never)]
pub fn reply(ctx: &TcContext, slot: Slot, network: &Network, packet: &Packet, source: &mut Address) -> bool {
    if maps::is_service(&network.source) {
        // Answered with the right address by itself: the flow lives on. An error is no answer.
        if packet.kind == Kind::Direct && lives(slot, packet) {
            remember(slot, packet, &network.source);
        }
        return false;
    }
    let mut local = [0; 16];
    if !is_own(slot, network) || !service_of(slot, network, packet, &mut local) {
        return false;
    }
    if packet.kind == Kind::Direct && !is_stateless(maps::settings(), &packet.flow) && lives(slot, packet) {
        remember(slot, packet, &local);
    }
    if network.fragment == Fragment::First {
        remember_rewritten(slot, network, &local);
    }
    let done = if network.v6 { rewrite6(ctx, network, &local) } else { rewrite4(ctx, network, &local) };
    if done.is_none() {
        trouble(Event::RewriteFailed, &network.destination);
        return false;
    }
    event(if network.v6 { Event::RewrittenV6 } else { Event::RewrittenV4 });
    *source = local;
    true
}

// Each step that needs room for keys and records is a subprogram of its own, so that Linux 6.1 counts the largest of them
// against the 512 bytes of stack that all of a path have, and not their sum.

/// Whether a packet has the partition's own address as its source.
#[inline(never)]
fn is_own(slot: Slot, network: &Network) -> bool {
    let Some(entry) = maps::slot(slot) else { return false };
    network.source == if network.v6 { entry.own6 } else { entry.own4 }
}

/// The service address that the client of a reply asked, into `local`; whether the packet is such a reply.
#[inline(always)]
fn service_of(slot: Slot, network: &Network, packet: &Packet, local: &mut Address) -> bool {
    if packet.kind == Kind::LaterFragment { became(network, local) } else { answered(slot, packet, local) }
}

/// Whether the first fragment of the same datagram was rewritten, and to what.
#[inline(never)]
fn became(network: &Network, local: &mut Address) -> bool {
    let Some(record) = maps::fragment(&fragment_key(network, &network.source)) else { return false };
    *local = record.local;
    record.rewritten != 0
}

/// Whether this partition has answered the flow, and for which address.
#[inline(never)]
fn answered(slot: Slot, packet: &Packet, local: &mut Address) -> bool {
    if is_stateless(maps::settings(), &packet.flow) {
        // Nobody has noted which address was asked: where there are several of a family, it is taken for the first.
        return first_address(&packet.flow.remote, local);
    }
    let Some(record) = maps::learned(&flow_key(&packet.flow)) else { return false };
    *local = record.local;
    Slot::from_bit(record.slot as u8) == slot && maps::is_service(local)
}

/// The service's first address of the family that a client has.
#[inline(never)]
fn first_address(remote: &Address, local: &mut Address) -> bool {
    let Some(quick) = maps::quick() else { return false };
    if is_mapped(remote) {
        *local = mapped(quick.v4[0].to_ne_bytes());
        quick.has_v4 != 0
    } else {
        let [high, low] = quick.v6[0];
        local[..8].copy_from_slice(&high.to_ne_bytes());
        local[8..].copy_from_slice(&low.to_ne_bytes());
        quick.has_v6 != 0
    }
}

#[inline(never)]
fn remember_rewritten(slot: Slot, network: &Network, local: &Address) {
    let record = FragmentRecord { slot: slot.index(), rewritten: 1, seen_ns: maps::now(), local: *local };
    maps::remember_fragment(&fragment_key(network, &network.source), &record);
}

/// Remembers under which identification a partition sends fragments to a client from a service address, and counts
/// if the other one has just done the same: each namespace counts identifications by itself.
#[inline(never)]
pub fn note_identification(slot: Slot, network: &Network, source: &Address) {
    let key = fragment_key(network, source);
    if maps::fragment(&key).is_some_and(|record| Slot::from_bit(record.slot as u8) != slot) {
        event(Event::FragmentIdShared);
    }
    let record = FragmentRecord { slot: slot.index(), rewritten: 0, seen_ns: maps::now(), local: [0; 16] };
    maps::remember_fragment(&key, &record);
}

/// Whether a partition has answered the flow within the idle time: after that the client's next packet goes to the serving one,
/// and nothing that the retiring one still sends brings the flow back.
#[inline(never)]
fn lives(slot: Slot, packet: &Packet) -> bool {
    let Some(record) = maps::learned(&flow_key(&packet.flow)) else { return false };
    let age = maps::now().wrapping_sub(record.seen_ns);
    Slot::from_bit(record.slot as u8) == slot && age <= maps::settings().learned_idle_ns
}

/// The key of a fragment to a client, under the source address that it has or had.
#[inline(always)]
fn fragment_key(network: &Network, source: &Address) -> FragmentKey {
    FragmentKey::new(source, &network.destination, network.fragment_id, network.protocol, network.v6)
}

/// Offset of the checksum that covers the addresses, and whether a result of 0 must be sent as 0xFFFF.
#[inline(always)]
fn transport_sum(network: &Network) -> Option<(usize, bool)> {
    if network.fragment == Fragment::Later {
        return None;
    }
    let payload = network.payload as usize;
    match network.protocol {
        protocol::TCP => Some((payload + 16, false)),
        // UDP-Lite sums the addresses whatever else it sums (RFC 3828 3.1).
        protocol::UDP | protocol::UDP_LITE => Some((payload + 6, true)),
        protocol::DCCP => Some((payload + 6, false)),
        // Only ICMP for IPv6 sums the addresses.
        protocol::ICMPV6 if network.v6 => Some((payload + 2, false)),
        _ => None,
    }
}

/// First the transport's sum, then the header's, then the bytes.
#[inline(never)]
fn rewrite4(ctx: &TcContext, network: &Network, to: &Address) -> Option<()> {
    let (from, to) = (unmapped(&network.source), unmapped(to));
    let (from_word, to_word) = (u64::from(u32::from_ne_bytes(from)), u64::from(u32::from_ne_bytes(to)));
    let header = LINK_HEADER as usize;
    if let Some((offset, udp)) = transport_sum(network) {
        let zero = if udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let flags = u64::from(BPF_F_PSEUDO_HDR) | zero | 4;
        ctx.l4_csum_replace(offset, from_word, to_word, flags).ok()?;
    }
    ctx.l3_csum_replace(header + 10, from_word, to_word, 4).ok()?;
    ctx.store(header + 12, &to, 0).ok()
}

/// Where the transport's sum makes up for the address, the sum of the whole packet stays what it is. Where there is none
/// (later fragments, SCTP, datagrams without a sum), one that a card has computed has to follow the address.
#[inline(never)]
fn rewrite6(ctx: &TcContext, network: &Network, to: &Address) -> Option<()> {
    let mut flags_of_store = u64::from(BPF_F_RECOMPUTE_CSUM);
    if let Some((offset, udp)) = transport_sum(network) {
        let (mut from, mut new) = (network.source, *to);
        // SAFETY: both buffers have 16 bytes, a multiple of four.
        let difference =
            unsafe { bpf_csum_diff(from.as_mut_ptr().cast(), 16, new.as_mut_ptr().cast(), 16, 0) };
        if difference < 0 {
            return None;
        }
        // SAFETY: a static that the loader writes before the program is loaded.
        let knows_ipv6 = unsafe { core::ptr::read_volatile(&raw const HAS_CSUM_IPV6) };
        let zero = if udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let ipv6 = if knows_ipv6 != 0 { BPF_F_IPV6 } else { 0 };
        let flags = u64::from(BPF_F_PSEUDO_HDR) | zero | ipv6;
        // Read before it is written: the helper leaves a datagram's sum that is none alone.
        let sum: u16 = ctx.load(offset).ok()?;
        if sum != 0 || !udp {
            flags_of_store = 0;
        }
        ctx.l4_csum_replace(offset, 0, difference as u64, flags).ok()?;
    }
    ctx.store(LINK_HEADER as usize + 8, to, flags_of_store).ok()
}
