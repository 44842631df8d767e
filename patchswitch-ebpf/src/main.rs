//! The path of a packet. Entry points only; each is the same short list, read top to bottom:
//!
//! ```text
//!  clients ─► uplink ─► [ps_uplink] ─ ours? ─ owner ─► redirect_peer ─► partition
//!  host, other partitions ─► [ps_to_part] ─ ours? ─ owner ─► this veth, or the other one
//!  partition ─► [ps_from_part] ─ learn ─ rewrite ─► redirect_neigh ─► uplink, or the kernel's routes
//! ```
//!
//! Failure policy: what comes in and is not understood is left to the kernel (`TC_ACT_UNSPEC`, so that the programs of
//! others still run); no value of any map means "drop". What a partition sends and is not understood is dropped: nobody
//! could say whether it may.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(
    missing_docs,
    reason = "the attribute of an entry point makes a second function, without its comment"
)]

mod maps;
mod owner;
mod packet;
mod quick;
mod reply;
mod report;
mod rewrite;
mod steer;

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

/// Ingress of an uplink.
#[classifier]
pub fn ps_uplink(ctx: TcContext) -> i32 {
    steer::from_uplink(&ctx)
}

/// Egress of the host-side link of a partition's veth pair.
#[classifier]
pub fn ps_to_part(ctx: TcContext) -> i32 {
    steer::from_host(&ctx)
}

/// Ingress of the host-side link of a partition's veth pair.
#[classifier]
pub fn ps_from_part(ctx: TcContext) -> i32 {
    reply::from_partition(&ctx)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// The helpers that redirect and look up sockets are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
