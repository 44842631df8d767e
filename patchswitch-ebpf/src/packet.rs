//! The only place that touches a packet's bytes.

use core::ffi::c_void;
use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::programs::TcContext;
use patchswitch_common::maps::Address;
use patchswitch_common::parse::{self, ETH_IPV4, ETH_IPV6, LINK_HEADER, Network, Octets, Packet, ipv4, ipv6};

/// `PACKET_HOST` of `linux/if_packet.h`.
const PACKET_HOST: u32 = 0;

/// The bytes of a frame, wherever in the skb they lie.
pub struct Frame<'a>(pub &'a TcContext);

impl Octets for Frame<'_> {
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

/// What the kernel keeps beside a packet.
impl Frame<'_> {
    /// EtherType in host byte order; 0 if there is a VLAN tag, which no service of ours has.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        // SAFETY: fields of the context, which is valid while the program runs.
        let (protocol, tagged) = unsafe { ((*self.0.skb.skb).protocol, (*self.0.skb.skb).vlan_present) };
        if tagged == 0 { u16::from_be(protocol as u16) } else { 0 }
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

// Subprograms of their own: inlined into one, the buffers of all steps together exceed the 512 bytes of a BPF stack.

#[inline(never)]
pub fn network(ctx: &TcContext, ethertype: u16, network: &mut Network) -> bool {
    let frame = Frame(ctx);
    let read = if ethertype == ETH_IPV4 {
        ipv4(&frame, LINK_HEADER, network)
    } else {
        ipv6(&frame, LINK_HEADER, network)
    };
    read.is_ok()
}

#[inline(never)]
pub fn inbound(ctx: &TcContext, network: &Network, packet: &mut Packet) -> bool {
    parse::inbound(&Frame(ctx), network, packet).is_ok()
}

#[inline(never)]
pub fn outbound(ctx: &TcContext, network: &Network, packet: &mut Packet) -> bool {
    parse::outbound(&Frame(ctx), network, packet).is_ok()
}

#[inline(always)]
pub fn is_ip(ethertype: u16) -> bool {
    ethertype == ETH_IPV4 || ethertype == ETH_IPV6
}
