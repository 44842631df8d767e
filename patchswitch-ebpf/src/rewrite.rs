//! The packet change program of the patent (Fig. 25, 26): a reply that the retiring partition sends with its own
//! address leaves with the service address as its source.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::bpf_csum_diff;
use aya_ebpf::programs::TcContext;
use patchswitch_common::Slot;
use patchswitch_common::maps::{Address, FragmentKey, FragmentRecord, unmapped};
use patchswitch_common::parse::{Fragment, Kind, LINK_HEADER, Network, Packet, protocol};
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
    let Some(local) = service_of(slot, network, packet) else { return false };
    let done = if network.v6 { rewrite6(ctx, network, &local) } else { rewrite4(ctx, network, &local) };
    if done.is_none() {
        trouble(Event::RewriteFailed, &network.destination);
        return false;
    }
    event(if network.v6 { Event::RewrittenV6 } else { Event::RewrittenV4 });
    *source = local;
    true
}

/// The service address that the client of this reply asked; nothing if the packet is not such a reply.
#[inline(never)]
fn service_of(slot: Slot, network: &Network, packet: &Packet) -> Option<Address> {
    let entry = maps::slot(slot)?;
    let own = if network.v6 { &entry.own6 } else { &entry.own4 };
    if maps::is_service(&network.source) {
        // Answered with the right address by itself: the flow lives on.
        if packet.kind != Kind::LaterFragment && known(slot, packet) {
            remember(slot, packet, &network.source);
        }
        return None;
    }
    if network.source != *own {
        return None;
    }
    if packet.kind == Kind::LaterFragment {
        let record = maps::fragment(&fragment_key(network))?;
        return (record.rewritten != 0).then_some(record.local);
    }
    let record = maps::learned(&flow_key(&packet.flow))?;
    if Slot::from_bit(record.slot as u8) != slot {
        return None;
    }
    if packet.kind == Kind::Direct {
        remember(slot, packet, &record.local);
    }
    if network.fragment == Fragment::First {
        let fragment = FragmentRecord { slot: slot.index(), rewritten: 1, local: record.local };
        maps::remember_fragment(&fragment_key(network), &fragment);
    }
    Some(record.local)
}

#[inline(never)]
fn known(slot: Slot, packet: &Packet) -> bool {
    maps::learned(&flow_key(&packet.flow)).is_some_and(|r| Slot::from_bit(r.slot as u8) == slot)
}

#[inline(always)]
fn fragment_key(network: &Network) -> FragmentKey {
    FragmentKey::new(&network.source, &network.destination, network.fragment_id, network.protocol, network.v6)
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

#[inline(never)]
fn rewrite6(ctx: &TcContext, network: &Network, to: &Address) -> Option<()> {
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
        ctx.l4_csum_replace(offset, 0, difference as u64, flags).ok()?;
    }
    ctx.store(LINK_HEADER as usize + 8, to, 0).ok()
}
