//! Counts each packet's exit, once, and turns it into the kernel's action.

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

/// Something that happened on the way.
#[inline(always)]
pub fn event(event: Event) {
    maps::count(event.counter());
}
