//! The ingress of an uplink before the kernel has made anything of a frame: XDP.
//!
//! What it can tell it delivers or drops, as the program behind it would, which sees the rest: each frame that is passed
//! on is decided there as if there were no XDP. The same functions decide in both.

use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::generated::{bpf_check_mtu, bpf_redirect};
use aya_ebpf::programs::XdpContext;
use patchswitch_common::parse::{Network, Packet};
use patchswitch_common::verdict::{Hook, Verdict};

use crate::maps;
use crate::packet::{Frame, judge, read_inbound, read_network};
use crate::report::exit;
use crate::steer::{choose, find_owner, held, to};

const PASS: i32 = xdp_action::XDP_PASS as i32;
const DROP: i32 = xdp_action::XDP_DROP as i32;

/// A client's frame: through the partition's veth, to the link address inside. There it is classified as any frame is
/// that a link brings, unlike one of `bpf_redirect_peer`.
#[inline(always)]
pub fn from_uplink(ctx: &XdpContext) -> i32 {
    let frame = Frame(ctx);
    if !is_for_host(ctx) {
        return exit(Hook::Xdp, Verdict::NotOurs, PASS);
    }
    let owner = match choose(&frame) {
        Err(verdict) => return exit(Hook::Xdp, verdict, if verdict.drops() { DROP } else { PASS }),
        Ok(owner) => owner,
    };
    if owner.both {
        // There is no second one to send. Nothing was noted on the way.
        return exit(Hook::Xdp, Verdict::ToBoth, PASS);
    }
    let Some(entry) = maps::slot(owner.slot) else {
        return exit(Hook::Xdp, Verdict::Unsteered, PASS);
    };
    // SAFETY: a field of the context, which is valid while the program runs.
    if held(entry, unsafe { (*ctx.ctx).ingress_ifindex }).is_some() {
        return exit(Hook::Xdp, Verdict::Held, PASS);
    }
    if is_too_long(ctx, entry.ifindex) {
        return exit(Hook::Xdp, Verdict::TooLong, PASS);
    }
    if !address(ctx, maps::settings().inner_mac) {
        return exit(Hook::Xdp, Verdict::Malformed, PASS);
    }
    // SAFETY: a helper on plain numbers.
    exit(Hook::Xdp, to(owner.slot, false), unsafe { bpf_redirect(entry.ifindex, 0) as i32 })
}

/// Whether a frame is addressed to its uplink. The kernel has not looked at it yet.
#[inline(always)]
fn is_for_host(ctx: &XdpContext) -> bool {
    // SAFETY: a field of the context, which is valid while the program runs.
    let Some(mac) = maps::uplink_mac(unsafe { (*ctx.ctx).ingress_ifindex }) else { return false };
    let Some(head) = Frame(ctx).head::<6>() else { return false };
    let [a, b, c, d, e, f] = mac;
    head.word::<0>() == u32::from_ne_bytes([a, b, c, d]) && head.short::<4>() == u16::from_ne_bytes([e, f])
}

/// Whether a link would drop a frame for its length (`bpf_check_mtu`). A link that is gone is not asked: redirecting to it
/// says so.
#[inline(always)]
fn is_too_long(ctx: &XdpContext, link: u32) -> bool {
    /// `BPF_MTU_CHK_RET_FRAG_NEEDED`.
    const FRAGMENT: i64 = 1;
    let mut mtu = 0;
    // SAFETY: the context is valid while the program runs, `mtu` is written only during the call.
    unsafe { bpf_check_mtu(ctx.ctx.cast(), link, &raw mut mtu, 0, 0) == FRAGMENT }
}

/// Addresses a frame to a link address; whether that was possible.
#[inline(always)]
fn address(ctx: &XdpContext, mac: [u8; 6]) -> bool {
    let data = ctx.data();
    if data + 6 > ctx.data_end() {
        return false;
    }
    // SAFETY: the bytes lie inside the frame, as just checked, and nobody else has it.
    unsafe { *(data as *mut [u8; 6]) = mac };
    true
}

/// As [`network`](crate::packet::network).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_xdp_network(frame: *mut xdp_md, ethertype: u32, network: *mut Network) -> i32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value that nobody else has.
    let Some(network) = (unsafe { network.as_mut() }) else { return 0 };
    read_network(&XdpContext::new(frame), ethertype, network)
}

/// As [`inbound`](crate::packet::inbound).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_xdp_inbound(frame: *mut xdp_md, network: *const Network, packet: *mut Packet) -> i32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value.
    let Some(network) = (unsafe { network.as_ref() }) else { return 0 };
    // SAFETY: as above, and nobody else has it.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return 0 };
    read_inbound(&XdpContext::new(frame), network, packet)
}

/// As [`ps_owner`](crate::steer::ps_owner).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_xdp_owner(frame: *mut xdp_md, word: u64, packet: *const Packet, how: u32) -> u32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value.
    let Some(packet) = (unsafe { packet.as_ref() }) else { return 0 };
    find_owner(&XdpContext::new(frame), word, packet, how)
}

/// As [`refused`](crate::packet::refused); a negative number is none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_xdp_refused(frame: *mut xdp_md, network: *const Network) -> i32 {
    // SAFETY: null or, as the verifier makes sure of each caller, a whole value.
    let Some(network) = (unsafe { network.as_ref() }) else { return -1 };
    judge(&XdpContext::new(frame), network)
}
