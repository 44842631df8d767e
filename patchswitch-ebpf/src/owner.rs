//! Asks the kernel whose a flow is.

use core::ffi::c_void;

use aya_ebpf::bindings::{bpf_sock, bpf_sock_tuple, tcphdr};
use aya_ebpf::helpers::generated::{
    bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp, bpf_tcp_check_syncookie,
};
use aya_ebpf::programs::TcContext;
use patchswitch_common::Slot;
use patchswitch_common::decide::{Kernel, Socket, tcp_state};
use patchswitch_common::maps::{Address, FlowKey, FlowRecord, FragmentKey, unmapped};
use patchswitch_common::parse::{ETH_IPV6, Flow, LINK_HEADER};
use patchswitch_common::quic::{self, is_quic};
use patchswitch_common::verdict::Event;

use crate::maps;
use crate::packet::Frame;
use crate::report::event;

/// `struct bpf_sock_tuple` of `linux/bpf.h`, IPv4. The lookup tells the families apart by the size.
#[repr(C)]
struct Tuple4 {
    source: [u8; 4],
    destination: [u8; 4],
    source_port: u16,
    destination_port: u16,
}

/// The same, IPv6.
#[repr(C)]
struct Tuple6 {
    source: Address,
    destination: Address,
    source_port: u16,
    destination_port: u16,
}

/// The kernel as one packet may ask it.
pub struct Sockets<'a> {
    pub ctx: &'a TcContext,
    /// The side that retires, if one does.
    pub retiring: Option<Slot>,
    pub v6: bool,
    /// Whether network and transport header lie next to each other, as the SYN cookie check wants them.
    pub plain: bool,
    /// Offset of the transport header; 0 if the packet has none of its own.
    pub payload: u32,
}

impl Kernel for Sockets<'_> {
    #[inline(always)]
    fn tcp(&mut self, slot: Slot, flow: &Flow, cookie: bool) -> Socket {
        let socket = tcp(self.ctx, slot, flow, Ask { v6: self.v6, cookie: cookie && self.plain });
        if socket == Socket::None && self.retiring == Some(slot) {
            // The kernel does not tell a namespace that is gone from one that has nothing.
            event(Event::NothingInRetiring);
        }
        socket
    }

    #[inline(always)]
    fn udp_connected(&mut self, slot: Slot, flow: &Flow) -> bool {
        udp_connected(self.ctx, slot, flow, self.v6)
    }

    #[inline(always)]
    fn learned(&mut self, flow: &Flow) -> Option<Slot> {
        if let Some(slot) = learned(flow) {
            return Some(slot);
        }
        if self.payload != 0 && is_quic(maps::settings(), flow) {
            by_id(self.ctx, self.payload, flow)
        } else {
            None
        }
    }

    #[inline(always)]
    fn fragment(&mut self, source: &Address, id: u32, protocol: u8) -> Option<Slot> {
        fragment(self.ctx, source, id, protocol)
    }
}

#[inline(never)]
fn learned(flow: &Flow) -> Option<Slot> {
    let record = maps::learned(&flow_key(flow))?;
    let age = maps::now().wrapping_sub(record.seen_ns);
    let fresh = age <= maps::settings().learned_idle_ns && record.local == flow.local;
    fresh.then(|| Slot::from_bit(record.slot as u8))
}

/// The side whose connection id a datagram of QUIC has, if its flow was not known: its client has moved. Both are fresh
/// from then on; the answers of the side are to be known by the flow.
#[inline(never)]
fn by_id(ctx: &TcContext, payload: u32, flow: &Flow) -> Option<Slot> {
    let settings = maps::settings();
    let key = quic::of_client(&Frame(ctx), payload, settings)?;
    let record = maps::learned(&key)?;
    let now = maps::now();
    if now.wrapping_sub(record.seen_ns) > settings.learned_idle_ns {
        return None;
    }
    let record = FlowRecord { seen_ns: now, local: flow.local, ..record };
    maps::learn(&key, &record);
    if !maps::learn(&flow_key(flow), &record) {
        event(Event::LearnFull);
    }
    event(Event::Moved);
    Some(Slot::from_bit(record.slot as u8))
}

#[inline(never)]
fn fragment(ctx: &TcContext, source: &Address, id: u32, protocol: u8) -> Option<Slot> {
    let frame = Frame(ctx);
    let ethertype = frame.ethertype();
    let destination = frame.destination(ethertype)?;
    let key = FragmentKey::new(source, &destination, id, protocol, ethertype == ETH_IPV6);
    maps::fragment(&key).map(|record| Slot::from_bit(record.slot as u8))
}

#[inline(always)]
pub fn flow_key(flow: &Flow) -> FlowKey {
    FlowKey {
        remote: flow.remote,
        remote_port: flow.remote_port,
        local_port: flow.local_port,
        protocol: flow.protocol,
        pad: [0; 3],
    }
}

/// The state of the socket that a partition has for a segment whose addresses and ports lie at `tuple` in the packet, next
/// to each other as the lookup wants them; nothing if it has none.
#[inline(always)]
pub fn state_at<const LENGTH: usize>(ctx: &TcContext, slot: Slot, tuple: usize) -> Option<u32> {
    let netns = namespace(slot)?;
    let skb = ctx.skb.skb.cast::<c_void>();
    // SAFETY: the caller has checked that the packet has LENGTH bytes there, and the helper only reads them.
    let sk = unsafe { bpf_skc_lookup_tcp(skb, tuple as *mut bpf_sock_tuple, LENGTH as u32, netns, 0) };
    if sk.is_null() {
        return None;
    }
    // SAFETY: not null, and referenced until released in the next line; `state` may be read of any socket.
    let state = unsafe { (*sk).state };
    // SAFETY: the reference taken by the lookup, released once.
    unsafe { bpf_sk_release(sk.cast()) };
    Some(state)
}

/// Length of the tuple of IPv4.
pub const TUPLE4: usize = size_of::<Tuple4>();
/// The same of IPv6.
pub const TUPLE6: usize = size_of::<Tuple6>();

#[derive(Clone, Copy)]
pub struct Ask {
    pub v6: bool,
    pub cookie: bool,
}

/// A subprogram of its own: it is called from several places, and inlined twice it makes LLVM compute the address of
/// a context field, which the verifier refuses.
#[inline(never)]
pub fn tcp(ctx: &TcContext, slot: Slot, flow: &Flow, ask: Ask) -> Socket {
    let Some(netns) = namespace(slot) else { return Socket::None };
    lookup_tcp(ctx, netns, flow, ask)
}

/// Whether the host has a connection for a flow (seen from its end) that is bound to the hook's own device, as the
/// agent's probes are. A connection of anybody else's on the host is none of a standby's business.
#[inline(never)]
pub fn is_bound_here(ctx: &TcContext, flow: &Flow, v6: bool) -> bool {
    let sk = find_tcp(ctx, OWN_NAMESPACE, flow, v6);
    if sk.is_null() {
        return false;
    }
    // SAFETY: not null, and referenced until released below; both fields may be read of any socket.
    let (state, device) = unsafe { ((*sk).state, (*sk).bound_dev_if) };
    // SAFETY: the reference taken by the lookup, released once.
    unsafe { bpf_sk_release(sk.cast()) };
    !matches!(state, tcp_state::LISTEN | tcp_state::CLOSE) && device == Frame(ctx).ifindex()
}

/// The id of a partition's namespace. A negative one is none: the kernel would look up its sockets in the host's.
#[inline(always)]
fn namespace(slot: Slot) -> Option<u64> {
    maps::slot(slot).and_then(|entry| u32::try_from(entry.nsid).ok()).map(u64::from)
}

/// Any negative id: the namespace of the packet's device.
const OWN_NAMESPACE: u64 = -1i64 as u64;

#[inline(always)]
fn find_tcp(ctx: &TcContext, netns: u64, flow: &Flow, v6: bool) -> *mut bpf_sock {
    let skb = ctx.skb.skb.cast::<c_void>();
    if v6 {
        let mut tuple = tuple6(flow);
        // SAFETY: the tuple is valid for the given size.
        unsafe { bpf_skc_lookup_tcp(skb, as_tuple(&mut tuple), size_of::<Tuple6>() as u32, netns, 0) }
    } else {
        let mut tuple = tuple4(flow);
        // SAFETY: as above.
        unsafe { bpf_skc_lookup_tcp(skb, as_tuple(&mut tuple), size_of::<Tuple4>() as u32, netns, 0) }
    }
}

#[inline(always)]
fn lookup_tcp(ctx: &TcContext, netns: u64, flow: &Flow, ask: Ask) -> Socket {
    let sk = find_tcp(ctx, netns, flow, ask.v6);
    if sk.is_null() {
        return Socket::None;
    }
    // SAFETY: not null, and referenced until released below; `state` may be read of any socket.
    let state = unsafe { (*sk).state };
    let socket = match state {
        tcp_state::LISTEN => Socket::Listener { cookie: ask.cookie && cookie_is_valid(ctx, sk, ask.v6) },
        tcp_state::CLOSE => Socket::None,
        tcp_state::TIME_WAIT => Socket::TimeWait,
        _ => Socket::Connection,
    };
    // SAFETY: the reference taken by the lookup, released once; every path from the null check comes here.
    unsafe { bpf_sk_release(sk.cast()) };
    socket
}

/// Whether a listener accepts the SYN cookie in an ACK. Its errors cannot be told apart and mean "no".
#[inline(always)]
fn cookie_is_valid(ctx: &TcContext, sk: *mut bpf_sock, v6: bool) -> bool {
    const TCP_HEADER: usize = 20;
    let (data, end) = (ctx.data(), ctx.data_end());
    let network = data + LINK_HEADER as usize;
    let check = |length: usize| {
        let transport = network + length;
        if transport + TCP_HEADER > end {
            return false;
        }
        // SAFETY: both headers lie inside the packet, as just checked.
        let result = unsafe {
            bpf_tcp_check_syncookie(
                sk.cast(),
                network as *mut c_void,
                length as u32,
                transport as *mut tcphdr,
                TCP_HEADER as u32,
            )
        };
        result == 0
    };
    if v6 { check(40) } else { check(20) }
}

/// An unconnected socket answers a lookup as well; its state tells them apart.
#[inline(never)]
fn udp_connected(ctx: &TcContext, slot: Slot, flow: &Flow, v6: bool) -> bool {
    let Some(netns) = namespace(slot) else { return false };
    let skb = ctx.skb.skb.cast::<c_void>();
    let sk = if v6 {
        let mut tuple = tuple6(flow);
        // SAFETY: the tuple is valid for the given size.
        unsafe { bpf_sk_lookup_udp(skb, as_tuple(&mut tuple), size_of::<Tuple6>() as u32, netns, 0) }
    } else {
        let mut tuple = tuple4(flow);
        // SAFETY: as above.
        unsafe { bpf_sk_lookup_udp(skb, as_tuple(&mut tuple), size_of::<Tuple4>() as u32, netns, 0) }
    };
    if sk.is_null() {
        return false;
    }
    // SAFETY: not null, and referenced until released in the next line.
    let connected = unsafe { (*sk).state } == tcp_state::ESTABLISHED;
    // SAFETY: the reference taken by the lookup, released once.
    unsafe { bpf_sk_release(sk.cast()) };
    connected
}

#[inline(always)]
fn tuple4(flow: &Flow) -> Tuple4 {
    Tuple4 {
        source: unmapped(&flow.remote),
        destination: unmapped(&flow.local),
        source_port: flow.remote_port,
        destination_port: flow.local_port,
    }
}

#[inline(always)]
fn tuple6(flow: &Flow) -> Tuple6 {
    Tuple6 {
        source: flow.remote,
        destination: flow.local,
        source_port: flow.remote_port,
        destination_port: flow.local_port,
    }
}

#[inline(always)]
fn as_tuple<T>(tuple: &mut T) -> *mut bpf_sock_tuple {
    core::ptr::from_mut(tuple).cast()
}
