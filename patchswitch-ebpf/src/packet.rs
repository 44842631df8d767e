//! The only place that touches a packet's bytes.

use core::arch::asm;
use core::ffi::c_void;
use core::mem::MaybeUninit;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::programs::TcContext;
use patchswitch_common::maps::Address;
use patchswitch_common::parse::{self, ETH_IPV4, ETH_IPV6, LINK_HEADER, Network, Octets, Packet, ipv4, ipv6};
use patchswitch_common::refuse;
use patchswitch_common::verdict::Verdict;

use crate::maps;

/// `VLAN_VID_MASK` of `linux/if_vlan.h`.
const VLAN_NUMBER: u32 = 0xfff;
/// `PACKET_HOST` of `linux/if_packet.h`.
const PACKET_HOST: u32 = 0;

/// The bytes of a frame, wherever in the skb they lie.
pub struct Frame<'a>(pub &'a TcContext);

impl Octets for Frame<'_> {
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: a field of the context, which is valid while the program runs.
        unsafe { (*self.0.skb.skb).len }
    }

    #[inline(always)]
    fn at<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // An initialised buffer would cost a loop of byte stores.
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        let to = bytes.as_mut_ptr().cast::<c_void>();
        // SAFETY: `to` has room for N bytes, and the helper fills all of them or fails.
        let failed = unsafe { bpf_skb_load_bytes(self.0.skb.skb.cast(), offset, to, N as u32) };
        // SAFETY: filled, as the helper did not fail.
        if failed == 0 { Some(unsafe { bytes.assume_init() }) } else { None }
    }
}

/// The first `N` bytes of a frame, in the packet itself.
#[derive(Clone, Copy)]
pub struct Head<const N: usize>(usize);

/// Reads a number as it lies in a packet, at any address. The compiler would take it for aligned, or read it byte by byte;
/// the kernel allows the former only where the processor does not care, or where packets lie as it wants them
/// (`NET_IP_ALIGN`).
macro_rules! load {
    ($width:literal, $base:expr, $at:ident) => {{
        let value: u64;
        // SAFETY: reads memory of the packet, which `Frame::head` has checked, and nothing else.
        unsafe {
            asm!(
                concat!("{value} = *(", $width, " *)({base} + {at})"),
                value = out(reg) value, base = in(reg) $base, at = const $at,
                options(pure, readonly, nostack),
            );
        }
        value
    }};
}

impl<const N: usize> Head<N> {
    /// Where `LENGTH` bytes from `AT` on are.
    #[inline(always)]
    pub fn address<const AT: usize, const LENGTH: usize>(self) -> usize {
        const { assert!(AT + LENGTH <= N) };
        self.0 + AT
    }

    #[inline(always)]
    pub fn byte<const AT: usize>(self) -> u8 {
        const { assert!(AT < N) };
        load!("u8", self.0, AT) as u8
    }

    #[inline(always)]
    pub fn short<const AT: usize>(self) -> u16 {
        const { assert!(AT + 2 <= N) };
        load!("u16", self.0, AT) as u16
    }

    #[inline(always)]
    pub fn word<const AT: usize>(self) -> u32 {
        const { assert!(AT + 4 <= N) };
        load!("u32", self.0, AT) as u32
    }

    #[inline(always)]
    pub fn long<const AT: usize>(self) -> u64 {
        const { assert!(AT + 8 <= N) };
        load!("u64", self.0, AT)
    }
}

/// What the kernel keeps beside a packet.
impl Frame<'_> {
    /// EtherType in host byte order; 0 if there is the tag of a VLAN, which no service of ours has. One with number 0
    /// names no VLAN, only a priority (IEEE 802.1Q 9.6), and the kernel takes it off behind this hook.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        // SAFETY: fields of the context, which is valid while the program runs.
        let (protocol, tag) = unsafe { ((*self.0.skb.skb).protocol, (*self.0.skb.skb).vlan_tci) };
        if tag & VLAN_NUMBER == 0 { u16::from_be(protocol as u16) } else { 0 }
    }

    /// The first `N` bytes where they lie, if they lie in one piece: without a call, which costs as much as all that is
    /// done with them.
    #[inline(always)]
    pub fn head<const N: usize>(&self) -> Option<Head<N>> {
        let (data, end) = (self.0.data(), self.0.data_end());
        if data + N > end { None } else { Some(Head(data)) }
    }

    /// The link address that the frame comes from, as the last bytes of an address.
    #[inline(always)]
    pub fn sender(&self) -> Address {
        let mut address = [0; 16];
        if let Some(mac) = self.at::<6>(6) {
            address[10..].copy_from_slice(&mac);
        }
        address
    }

    /// Whether there is a tag of any kind beside the frame.
    #[inline(always)]
    pub fn has_tag(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).vlan_present != 0 }
    }

    /// Whether the frame is addressed to this host, and not seen because the device is promiscuous.
    #[inline(always)]
    pub fn is_for_host(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).pkt_type == PACKET_HOST }
    }

    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    pub fn mark(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).mark }
    }

    /// The destination address alone: most packets need no more.
    #[inline(always)]
    pub fn destination(&self, ethertype: u16) -> Option<Address> {
        if ethertype == ETH_IPV4 {
            self.at(LINK_HEADER + 16).map(patchswitch_common::maps::mapped)
        } else {
            self.at(LINK_HEADER + 24)
        }
    }
}

// The steps of reading are global functions to the verifier, as their C signature makes them: it reads each once, and
// not again on every path that calls it, and knows nothing of what it wrote. Within the paths there would be five times
// as much to read. They are also too large for one stack: inlined, the buffers of all steps exceed its 512 bytes.

/// Reads the network header and what lies between it and the payload; whether that was possible.
#[inline(always)]
pub fn network(ctx: &TcContext, ethertype: u16, network: &mut Network) -> bool {
    ps_network(ctx.skb.skb, u32::from(ethertype), network) != 0
}

/// Reads a packet that goes to the service; whether that was possible.
#[inline(always)]
pub fn inbound(ctx: &TcContext, network: &Network, packet: &mut Packet) -> bool {
    ps_inbound(ctx.skb.skb, network, packet) != 0
}

/// Reads a packet that comes from the service; whether that was possible.
#[inline(always)]
pub fn outbound(ctx: &TcContext, network: &Network, packet: &mut Packet) -> bool {
    ps_outbound(ctx.skb.skb, network, packet) != 0
}

/// Why a packet to the service goes to no partition, by its headers alone; nothing if it may.
#[inline(always)]
pub fn refused(ctx: &TcContext, network: &Network) -> Option<Verdict> {
    if refuse::is_plain(network) {
        return None;
    }
    Verdict::of_refusal(ps_refused(ctx.skb.skb, network))
}

/// Why what a partition sent may not leave it, by its headers alone; nothing if it may.
#[inline(always)]
pub fn refused_of_partition(ctx: &TcContext, network: &Network) -> Option<Verdict> {
    Verdict::of_refusal(ps_refused_out(ctx.skb.skb, network))
}

/// As [`refused_of_partition`]; a negative number is none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_refused_out(skb: *mut __sk_buff, network: *const Network) -> i32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value.
    let Some(network) = (unsafe { network.as_ref() }) else { return -1 };
    refuse::outbound(&Frame(&TcContext::new(skb)), network, maps::is_service)
        .map_or(-1, |verdict| verdict as i32)
}

/// As [`refused`]; a negative number is none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_refused(skb: *mut __sk_buff, network: *const Network) -> i32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value.
    let Some(network) = (unsafe { network.as_ref() }) else { return -1 };
    refuse::inbound(&Frame(&TcContext::new(skb)), network).map_or(-1, |verdict| verdict as i32)
}

/// As [`network`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_network(skb: *mut __sk_buff, ethertype: u32, network: *mut Network) -> i32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value that nobody else has.
    let Some(network) = (unsafe { network.as_mut() }) else { return 0 };
    let ctx = TcContext::new(skb);
    let frame = Frame(&ctx);
    let read = if ethertype == u32::from(ETH_IPV4) {
        ipv4(&frame, LINK_HEADER, network)
    } else {
        ipv6(&frame, LINK_HEADER, network)
    };
    i32::from(read.is_ok())
}

/// As [`inbound`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_inbound(skb: *mut __sk_buff, network: *const Network, packet: *mut Packet) -> i32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value.
    let Some(network) = (unsafe { network.as_ref() }) else { return 0 };
    // SAFETY: as above, and nobody else has it.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return 0 };
    i32::from(parse::inbound(&Frame(&TcContext::new(skb)), network, packet).is_ok())
}

/// As [`outbound`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_outbound(skb: *mut __sk_buff, network: *const Network, packet: *mut Packet) -> i32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value.
    let Some(network) = (unsafe { network.as_ref() }) else { return 0 };
    // SAFETY: as above, and nobody else has it.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return 0 };
    i32::from(parse::outbound(&Frame(&TcContext::new(skb)), network, packet).is_ok())
}

#[inline(always)]
pub fn is_ip(ethertype: u16) -> bool {
    ethertype == ETH_IPV4 || ethertype == ETH_IPV6
}
