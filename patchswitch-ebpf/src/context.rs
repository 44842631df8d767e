//! What a program is called with: the same questions about a packet, whichever kind of hook it is at.
//!
//! Parsing, judging and the question whose a packet is are one source for both kinds. What differs is here: how bytes are
//! read, what the kernel says beside them, and the global functions, which the verifier knows by the type of their context.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{bpf_skb_load_bytes, bpf_xdp_load_bytes};
use aya_ebpf::programs::{TcContext, XdpContext};
use patchswitch_common::parse::{Network, Packet};

use crate::packet::{Frame, ps_inbound, ps_network, ps_refused};
use crate::steer::ps_owner;
use crate::xdp::{ps_xdp_inbound, ps_xdp_network, ps_xdp_owner, ps_xdp_refused};

/// The context of a hook.
pub trait Context {
    /// Whether a copy of a packet can be sent to a second partition.
    const COPIES: bool;

    /// As helpers take it.
    fn pointer(&self) -> *mut c_void;

    /// Where the bytes that lie in one piece begin.
    fn data(&self) -> usize;

    /// Where these end.
    fn data_end(&self) -> usize;

    /// Length of the frame.
    fn length(&self) -> u32;

    /// Copies bytes of the frame, wherever they lie; 0 if all were copied.
    ///
    /// # Safety
    /// `to` has room for `length` bytes.
    unsafe fn load(&self, offset: u32, to: *mut c_void, length: u32) -> i64;

    /// EtherType in host byte order; 0 if the kernel keeps the tag of a VLAN beside the frame.
    fn ethertype(&self) -> u16;

    /// As [`packet::network`](crate::packet::network), a global function.
    fn network(&self, ethertype: u32, network: &mut Network) -> i32;

    /// As [`packet::inbound`](crate::packet::inbound), a global function.
    fn inbound(&self, network: &Network, packet: &mut Packet) -> i32;

    /// As [`packet::refused`](crate::packet::refused), a global function.
    fn refused(&self, network: &Network) -> i32;

    /// As [`ps_owner`], a global function.
    fn owner(&self, word: u64, packet: &Packet, how: u32) -> u32;
}

/// `VLAN_VID_MASK` of `linux/if_vlan.h`.
const VLAN_NUMBER: u32 = 0xfff;

impl Context for TcContext {
    const COPIES: bool = true;

    #[inline(always)]
    fn pointer(&self) -> *mut c_void {
        self.skb.skb.cast()
    }

    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: a field of the context, which is valid while the program runs.
        unsafe { (*self.skb.skb).data as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.skb.skb).data_end as usize }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb.skb).len }
    }

    #[inline(always)]
    unsafe fn load(&self, offset: u32, to: *mut c_void, length: u32) -> i64 {
        // SAFETY: the caller vouches for the room.
        unsafe { bpf_skb_load_bytes(self.pointer(), offset, to, length) }
    }

    /// A tag with number 0 names no VLAN, only a priority (IEEE 802.1Q 9.6), and the kernel takes it off behind this hook.
    /// Before Linux 6.2 the number of a tag that was taken off stays in the packet: on the device of a VLAN it means nothing.
    #[inline(always)]
    fn ethertype(&self) -> u16 {
        // SAFETY: fields of the context, which is valid while the program runs.
        let (protocol, tag) = unsafe { ((*self.skb.skb).protocol, (*self.skb.skb).vlan_tci) };
        // SAFETY: as above.
        let is_tagged = tag & VLAN_NUMBER != 0 && unsafe { (*self.skb.skb).vlan_present } != 0;
        if is_tagged { 0 } else { u16::from_be(protocol as u16) }
    }

    #[inline(always)]
    fn network(&self, ethertype: u32, network: &mut Network) -> i32 {
        ps_network(self.skb.skb, ethertype, network)
    }

    #[inline(always)]
    fn inbound(&self, network: &Network, packet: &mut Packet) -> i32 {
        ps_inbound(self.skb.skb, network, packet)
    }

    #[inline(always)]
    fn refused(&self, network: &Network) -> i32 {
        ps_refused(self.skb.skb, network)
    }

    #[inline(always)]
    fn owner(&self, word: u64, packet: &Packet, how: u32) -> u32 {
        ps_owner(self.skb.skb, word, packet, how)
    }
}

impl Context for XdpContext {
    const COPIES: bool = false;

    #[inline(always)]
    fn pointer(&self) -> *mut c_void {
        self.ctx.cast()
    }

    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: a field of the context, which is valid while the program runs.
        unsafe { (*self.ctx).data as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.ctx).data_end as usize }
    }

    /// The program is loaded without support for frames in several pieces, so the first piece is all.
    #[inline(always)]
    fn length(&self) -> u32 {
        (Context::data_end(self) - Context::data(self)) as u32
    }

    #[inline(always)]
    unsafe fn load(&self, offset: u32, to: *mut c_void, length: u32) -> i64 {
        // SAFETY: the caller vouches for the room.
        unsafe { bpf_xdp_load_bytes(self.ctx, offset, to, length) }
    }

    /// A tag is in the bytes and is no EtherType of ours; the kernel's own hook behind this one sees to it.
    #[inline(always)]
    fn ethertype(&self) -> u16 {
        match Frame(self).head::<14>() {
            Some(head) => u16::from_be(head.short::<12>()),
            None => 0,
        }
    }

    #[inline(always)]
    fn network(&self, ethertype: u32, network: &mut Network) -> i32 {
        ps_xdp_network(self.ctx, ethertype, network)
    }

    #[inline(always)]
    fn inbound(&self, network: &Network, packet: &mut Packet) -> i32 {
        ps_xdp_inbound(self.ctx, network, packet)
    }

    #[inline(always)]
    fn refused(&self, network: &Network) -> i32 {
        ps_xdp_refused(self.ctx, network)
    }

    #[inline(always)]
    fn owner(&self, word: u64, packet: &Packet, how: u32) -> u32 {
        ps_xdp_owner(self.ctx, word, packet, how)
    }
}
