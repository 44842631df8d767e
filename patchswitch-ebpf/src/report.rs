//! Counts each packet's exit, once, and turns it into the kernel's action.

use aya_log_ebpf::warn;
use patchswitch_common::maps::Address;
use patchswitch_common::verdict::{Event, Hook, Verdict, counter};

use crate::maps;

/// `TC_ACT_UNSPEC`: go on with the next program on the hook.
pub const NEXT: i32 = -1;

/// `TC_ACT_SHOT`.
pub const DROP: i32 = 2;

/// The exit of a program.
#[inline(always)]
pub fn exit(hook: Hook, verdict: Verdict, action: i32) -> i32 {
    maps::count(counter(hook, verdict));
    action
}

/// The exit of a packet that goes to nobody here: it is dropped, or left to others.
#[inline(always)]
pub fn turned_away(hook: Hook, verdict: Verdict) -> i32 {
    exit(hook, verdict, if verdict.drops() { DROP } else { NEXT })
}

/// Something that happened on the way.
#[inline(always)]
pub fn event(event: Event) {
    maps::count(event.counter());
}

/// Something that should not have happened: counted, and worth a line in the log the first time, the second, the fourth
/// and so on, so that a flood of it is none of lines.
#[inline(always)]
pub fn trouble(event: Event, address: &Address) {
    say(maps::count(event.counter()), event.counter(), address);
}

/// The exit of a packet that should not have been sent, told as [`trouble`] is.
#[inline(always)]
pub fn exit_told(hook: Hook, verdict: Verdict, action: i32, address: &Address) -> i32 {
    let index = counter(hook, verdict);
    say(maps::count(index), index, address);
    action
}

#[inline(always)]
fn say(times: u64, index: u32, address: &Address) {
    if times.is_power_of_two() {
        let address = u128::from_be_bytes(*address);
        ps_say(index, (address >> 64) as u64, address as u64);
    }
}

const SPOOFED_MAC: u32 = counter(Hook::FromPartition, Verdict::SpoofedMac);
const LEARN_FULL: u32 = Event::LearnFull.counter();
const REWRITE_FAILED: u32 = Event::RewriteFailed.counter();

/// Writes a line: which one, by the counter, and the address that it names, as two numbers.
///
/// With its C signature it is a global function to the verifier, which reads it once and not again at each call:
/// within the paths that call it, it would treble what there is to read.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn ps_say(index: u32, high: u64, low: u64) -> i32 {
    let address = (u128::from(high) << 64 | u128::from(low)).to_be_bytes();
    match index {
        SPOOFED_MAC => {
            let [.., a, b, c, d, e, f] = address;
            let link = [a, b, c, d, e, f];
            warn!((), "a partition sent a frame from {:mac}, which is not its link address: dropped", link)
        }
        LEARN_FULL => {
            warn!((), "the table of learned flows is full: {:i} would be lost by a switch", address)
        }
        REWRITE_FAILED => warn!((), "an answer to {:i} was not rewritten and is lost", address),
        _ => warn!(
            (),
            "a partition sent a packet from {:i}, which is not its address, or not yet: dropped", address
        ),
    }
    0
}
