//! What a partition sends: remembered while a switch is prepared, rewritten while the notice is on, and handed to the
//! next hop.

use core::ffi::c_void;

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, bpf_redir_neigh};
use aya_ebpf::helpers::generated::{bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh};
use aya_ebpf::programs::TcContext;
use patchswitch_common::Slot;
use patchswitch_common::decide::{ACK, RST, SYN, Socket};
use patchswitch_common::maps::{Address, FlowRecord, unmapped};
use patchswitch_common::parse::{Fragment, Kind, Network, Octets as _, Packet, Transport, protocol};
use patchswitch_common::quic::{self, is_quic, is_stateless};
use patchswitch_common::refuse;
use patchswitch_common::verdict::{AGAIN_MARK, Event, Hook, Verdict};
use patchswitch_common::word::{Phase, Word};

use crate::maps;
use crate::owner::{Ask, flow_key, is_bound_here, tcp};
use crate::packet::{self, Frame, is_ip};
use crate::quick;
use crate::report::{DROP, NEXT, event, exit, exit_told, trouble, turned_away};
use crate::rewrite;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `BPF_FIB_LOOKUP_SKIP_NEIGH`, since Linux 6.3. Where it is missing the lookup says `NO_NEIGH` instead.
const SKIP_NEIGH: u32 = 1 << 2;
/// `BPF_FIB_LKUP_RET_SUCCESS` and `BPF_FIB_LKUP_RET_NO_NEIGH`: both name the device and the next hop.
const FOUND: i64 = 0;
const FOUND_NO_NEIGHBOUR: i64 = 7;
/// `BPF_FIB_LKUP_RET_FRAG_NEEDED`: the device is named as well.
const FRAGMENTATION_NEEDED: i64 = 8;

/// Set by the loader where the kernel knows [`SKIP_NEIGH`].
#[unsafe(no_mangle)]
static HAS_SKIP_NEIGH: u32 = 0;

#[inline(always)]
pub fn from_partition(ctx: &TcContext) -> i32 {
    let frame = Frame(ctx);
    let ethertype = frame.ethertype();
    let Some(slot) = maps::slot_of(frame.ifindex()) else {
        return exit(Hook::FromPartition, Verdict::NotOurs, NEXT);
    };
    if frame.mark() == AGAIN_MARK {
        ctx.set_mark(0);
        return exit(Hook::FromPartition, Verdict::Again, NEXT);
    }
    if is_ip(ethertype)
        && let Some(action) = quick::answer(ctx, slot, ethertype)
    {
        return action;
    }
    match link_refused(&frame, slot, ethertype) {
        None => {}
        Some(Verdict::SpoofedMac) => {
            return exit_told(Hook::FromPartition, Verdict::SpoofedMac, DROP, &frame.sender());
        }
        Some(verdict) => return turned_away(Hook::FromPartition, verdict),
    }
    let mut network = Network::EMPTY;
    if !packet::network(ctx, ethertype, &mut network) {
        // The kernel forwards what it does not look into, a long chain of extension headers for instance; whose source
        // and what it is could not be judged here.
        return exit(Hook::FromPartition, Verdict::Malformed, DROP);
    }
    let word = maps::word();
    let serves = slot == word.active();
    if !serves && word.is_steady() {
        return quarantine(ctx, slot, &network);
    }
    if let Some(verdict) = packet::refused_of_partition(ctx, &network) {
        return turned_away(Hook::FromPartition, verdict);
    }
    let origin = origin(slot, &network);
    match origin {
        Origin::Forged => {
            return exit_told(Hook::FromPartition, Verdict::Spoofed, DROP, &network.source);
        }
        Origin::Link => return exit(Hook::FromPartition, Verdict::OutByStack, NEXT),
        Origin::Service | Origin::Own => {}
    }
    if is_lateral(slot, &network) {
        return exit(Hook::FromPartition, Verdict::Lateral, DROP);
    }
    let drains = word.phase() == Phase::Draining;
    let retires = drains && !serves;
    if retires && origin == Origin::Service && takes_a_tuple(ctx, word.active(), &network) {
        return exit(Hook::FromPartition, Verdict::TupleInUse, DROP);
    }
    let mut source = network.source;
    let mut from_service = origin == Origin::Service;
    let mut packet = Packet::EMPTY;
    if (!word.is_steady() || word.learns() || word.notice()) && packet::outbound(ctx, &network, &mut packet) {
        count_side(slot, word, &packet);
        if word.learns() && !retires {
            learn(ctx, slot, &packet, network.payload);
        } else if word.notice() && retires {
            from_service |= rewrite::reply(ctx, slot, &network, &packet, &mut source);
        }
    }
    if !from_service {
        return exit(Hook::FromPartition, Verdict::OutByStack, NEXT);
    }
    if drains && network.fragment == Fragment::First {
        rewrite::note_identification(slot, &network, &source);
    }
    network.source = source;
    match next_hop(ctx, &network) {
        Some(action) => exit(Hook::FromPartition, Verdict::Out, action),
        None => {
            let link = link_of_route(ctx, &network);
            // A probe's socket is bound to this link and would not know its answer on another one.
            let action =
                if link == 0 || answers_probe(ctx, slot, &network) { NEXT } else { again(ctx, link) };
            exit(Hook::FromPartition, Verdict::OutByStack, action)
        }
    }
}

/// Why a frame of a partition may not leave it, by what belongs to the link: it has another source than the partition's
/// link address, is none of IP and goes to bridges and the like, or is a claim of addresses. Nothing if it may.
#[inline(always)]
fn link_refused(frame: &Frame<'_>, slot: Slot, ethertype: u16) -> Option<Verdict> {
    let ends: [u8; 12] = frame.at(0)?;
    if ends[6..] != maps::settings().inner_mac {
        return Some(Verdict::SpoofedMac);
    }
    if is_ip(ethertype) && !frame.has_tag() {
        None
    } else if ethertype == ETH_ARP && !frame.has_tag() {
        Some(arp(frame, slot))
    } else if ends[..3] == LINK_CONTROL || is_tagged(frame, ethertype) {
        Some(Verdict::ForgedControl)
    } else {
        Some(Verdict::NotOurs)
    }
}

/// Whether a frame has a VLAN tag. The kernel takes off one with number 0 after this hook and goes on with what is
/// inside, which nobody would have judged then; a partition has no VLANs.
#[inline(always)]
fn is_tagged(frame: &Frame<'_>, ethertype: u16) -> bool {
    frame.has_tag() || matches!(ethertype, ETH_VLAN | ETH_SERVICE_VLAN)
}

/// `ETH_P_8021Q` of `linux/if_ether.h`.
const ETH_VLAN: u16 = 0x8100;
/// `ETH_P_8021AD` of `linux/if_ether.h`.
const ETH_SERVICE_VLAN: u16 = 0x88a8;
/// `ETH_P_ARP` of `linux/if_ether.h`.
const ETH_ARP: u16 = 0x0806;
/// Where bridges, ports and link neighbours are spoken to (IEEE 802.1D 7.12.6).
const LINK_CONTROL: [u8; 3] = [0x01, 0x80, 0xc2];

#[inline(never)]
fn arp(frame: &Frame<'_>, slot: Slot) -> Verdict {
    let is_its_own = |address: &Address| {
        maps::is_service(address) || maps::slot(slot).is_some_and(|entry| entry.own4 == *address)
    };
    refuse::arp(frame, is_its_own).unwrap_or(Verdict::NotOurs)
}

/// Whether a packet goes to the other partition's own address: each of the two is on its own.
#[inline(never)]
fn is_lateral(slot: Slot, network: &Network) -> bool {
    let Some(other) = maps::slot(slot.other()) else { return false };
    network.destination == if network.v6 { other.own6 } else { other.own4 }
}

/// Whether a segment of the retiring partition opens a connection under the service address whose two ends the serving
/// one has in use. Other connections it may open: what it still works on may need them.
#[inline(never)]
fn takes_a_tuple(ctx: &TcContext, active: Slot, network: &Network) -> bool {
    if network.protocol != protocol::TCP {
        return false;
    }
    let mut packet = Packet::EMPTY;
    packet::outbound(ctx, network, &mut packet)
        && packet.kind == Kind::Direct
        && packet.flags & (SYN | ACK) == SYN
        && tcp(ctx, active, &packet.flow, Ask { v6: network.v6, cookie: false }) == Socket::Connection
}

/// Whose address a packet of a partition has as its source.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// The service's.
    Service,
    /// Its own.
    Own,
    /// None that is valid beyond the link (neighbour discovery, listener reports); the kernel never forwards it.
    Link,
    /// Somebody else's.
    Forged,
}

#[inline(never)]
fn origin(slot: Slot, network: &Network) -> Origin {
    let source = &network.source;
    let Some(entry) = maps::slot(slot) else { return Origin::Forged };
    let own = if network.v6 { &entry.own6 } else { &entry.own4 };
    let (zero, first) = (*source == [0; 16], u16::from_be_bytes([source[0], source[1]]));
    if zero || first & 0xffc0 == 0xfe80 {
        Origin::Link
    } else if maps::is_service(source) {
        Origin::Service
    } else if source == own {
        Origin::Own
    } else {
        Origin::Forged
    }
}

/// A standby reaches nothing but the agent's probes.
#[inline(always)]
fn quarantine(ctx: &TcContext, slot: Slot, network: &Network) -> i32 {
    if answers_probe(ctx, slot, network) {
        exit(Hook::FromPartition, Verdict::Probe, NEXT)
    } else {
        if maps::is_service(&network.source) {
            // The rest of what a standby sends before it serves is to be expected.
            trouble(Event::TooEarly, &network.source);
        }
        exit(Hook::FromPartition, Verdict::Quarantined, DROP)
    }
}

/// Whether a segment answers a probe of the agent: the host has a connection for it that is bound to this very link.
///
/// It gets the probes' mark: with it the host's check of the way back (rp_filter) asks the table of the probes, which
/// names this link.
#[inline(never)]
fn answers_probe(ctx: &TcContext, slot: Slot, network: &Network) -> bool {
    let mut packet = Packet::EMPTY;
    let answers = packet::inbound(ctx, network, &mut packet)
        && packet.kind == Kind::Direct
        && packet.transport == Transport::Tcp
        && is_bound_here(ctx, &packet.flow, network.v6);
    if answers {
        ctx.set_mark(maps::settings().probe_mark | slot.index());
    }
    answers
}

/// Counts what tells how a side does, while there are two to compare.
#[inline(always)]
pub fn count_side(slot: Slot, word: Word, packet: &Packet) {
    if word.is_steady() || packet.kind != Kind::Direct || packet.transport != Transport::Tcp {
        return;
    }
    if packet.flags & RST != 0 {
        event(Event::reset(slot));
    } else if packet.flags & (SYN | ACK) == SYN | ACK {
        event(Event::answered(slot));
    }
}

/// Remembers a flow that the serving partition answered and that no socket will tell of.
#[inline(never)]
fn learn(ctx: &TcContext, slot: Slot, packet: &Packet, payload: u32) {
    if packet.kind != Kind::Direct
        || packet.transport == Transport::Tcp
        || is_stateless(maps::settings(), &packet.flow)
        || !maps::is_service(&packet.flow.local)
    {
        return;
    }
    remember(slot, packet, &packet.flow.local);
    if is_quic(maps::settings(), &packet.flow) {
        learn_id(ctx, slot, &packet.flow.local, payload);
    }
}

/// Remembers the connection id that the serving partition has given a client.
#[inline(never)]
fn learn_id(ctx: &TcContext, slot: Slot, local: &Address, payload: u32) {
    let Some(key) = quic::of_server(&Frame(ctx), payload, maps::settings()) else { return };
    let record = FlowRecord { seen_ns: maps::now(), local: *local, slot: slot.index(), pad: 0 };
    if !maps::learn(&key, &record) {
        event(Event::LearnFull);
    }
}

/// Writes or refreshes a learned flow.
#[inline(never)]
pub fn remember(slot: Slot, packet: &Packet, local: &Address) {
    let record = FlowRecord { seen_ns: maps::now(), local: *local, slot: slot.index(), pad: 0 };
    if maps::learn(&flow_key(&packet.flow), &record) {
        event(Event::Learned);
    } else {
        trouble(Event::LearnFull, &packet.flow.remote);
    }
}

/// `struct bpf_fib_lookup` of `linux/bpf.h`, as far as it is used.
#[repr(C)]
struct Fib {
    family: u8,
    l4_protocol: u8,
    source_port: u16,
    destination_port: u16,
    total_length: u16,
    ifindex: u32,
    flow_info: u32,
    source: Address,
    destination: Address,
    vlan: [u8; 4],
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
}
const _: () = assert!(size_of::<Fib>() == 64);

impl Fib {
    const EMPTY: Self = Self {
        family: 0,
        l4_protocol: 0,
        source_port: 0,
        destination_port: 0,
        total_length: 0,
        ifindex: 0,
        flow_info: 0,
        source: [0; 16],
        destination: [0; 16],
        vlan: [0; 4],
        source_mac: [0; 6],
        destination_mac: [0; 6],
    };
}

impl Fib {
    /// Filled in place: as a value it would be on the stack twice, and Linux 6.1 has room for it once only.
    #[inline(always)]
    fn fill(&mut self, ctx: &TcContext, network: &Network, source: &Address, destination: &Address) {
        self.l4_protocol = network.protocol;
        self.ifindex = Frame(ctx).ifindex();
        if network.v6 {
            self.family = AF_INET6;
            self.source = *source;
            self.destination = *destination;
        } else {
            self.family = AF_INET;
            lead(&mut self.source, source);
            lead(&mut self.destination, destination);
        }
    }

    /// Asks the kernel's routes; `ifindex` and `destination` are the link and the next hop then.
    #[inline(always)]
    fn look_up(&mut self, ctx: &TcContext) -> i64 {
        // SAFETY: a static that the loader writes before the program is loaded.
        let skip = unsafe { core::ptr::read_volatile(&raw const HAS_SKIP_NEIGH) };
        let flags = if skip != 0 { SKIP_NEIGH } else { 0 };
        let params = core::ptr::from_mut(self).cast();
        // SAFETY: `self` has the layout and size that the helper is told.
        unsafe { bpf_fib_lookup(ctx.skb.skb.cast::<c_void>(), params, size_of::<Self>() as i32, flags) }
    }
}

/// The way out, if the kernel's routes name an uplink; everything else is the kernel's own to do.
#[inline(always)]
pub fn next_hop(ctx: &TcContext, network: &Network) -> Option<i32> {
    let action = ps_next_hop(ctx.skb.skb, network);
    if action < 0 { None } else { Some(action) }
}

/// As [`next_hop`]; a negative number is none. Global, as what is called from several ways: see `packet`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_next_hop(skb: *mut __sk_buff, network: *const Network) -> i32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value.
    let Some(network) = (unsafe { network.as_ref() }) else { return -1 };
    let ctx = TcContext::new(skb);
    let mut fib = Fib::EMPTY;
    fib.fill(&ctx, network, &network.source, &network.destination);
    let found = fib.look_up(&ctx);
    if !matches!(found, FOUND | FOUND_NO_NEIGHBOUR) || !maps::is_uplink(fib.ifindex) {
        return -1;
    }
    let mut neighbour = Neighbour { family: u32::from(fib.family), address: fib.destination };
    let params = (&raw mut neighbour).cast::<bpf_redir_neigh>();
    // SAFETY: `neighbour` has the layout and size that the helper is told.
    unsafe { bpf_redirect_neigh(fib.ifindex, params, size_of::<Neighbour>() as i32, 0) as i32 }
}

/// The link to which the host's route for the service points, if it is the other partition's; else 0.
///
/// Both partitions have the service address, but only one of them can have the host's route to it. On the other's link
/// the kernel would drop what comes with that source (`rp_filter`; a firewall's check of the reverse path for IPv6).
#[inline(never)]
fn link_of_route(ctx: &TcContext, network: &Network) -> u32 {
    let mut fib = Fib::EMPTY;
    fib.fill(ctx, network, &network.destination, &network.source);
    let found = fib.look_up(ctx);
    let routed = matches!(found, FOUND | FOUND_NO_NEIGHBOUR | FRAGMENTATION_NEEDED);
    let elsewhere = fib.ifindex != Frame(ctx).ifindex() && maps::slot_of(fib.ifindex).is_some();
    if routed && elsewhere { fib.ifindex } else { 0 }
}

/// Hands a packet to the kernel as if it came from another link.
#[inline(always)]
fn again(ctx: &TcContext, link: u32) -> i32 {
    ctx.set_mark(AGAIN_MARK);
    // SAFETY: a helper on plain numbers.
    unsafe { bpf_redirect(link, u64::from(BPF_F_INGRESS)) as i32 }
}

/// `struct bpf_redir_neigh` of `linux/bpf.h`.
#[repr(C)]
struct Neighbour {
    family: u32,
    address: Address,
}

/// An IPv4 address where the kernel's unions expect it: first.
#[inline(always)]
fn lead(to: &mut Address, address: &Address) {
    let v4 = unmapped(address);
    (to[0], to[1], to[2], to[3]) = (v4[0], v4[1], v4[2], v4[3]);
}
