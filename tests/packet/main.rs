//! The programs by themselves: packets in, verdicts, counters and packets out (`BPF_PROG_TEST_RUN`). Needs root.

mod bench;
mod buffers;
#[cfg(test)]
mod burst;
#[cfg(test)]
mod closing;
mod cost;
#[cfg(test)]
mod datagrams;
mod direction;
#[cfg(test)]
mod empty;
#[cfg(test)]
mod fragments;
mod hold;
mod host;
#[cfg(test)]
mod letter;
#[cfg(test)]
mod metamorphic;
mod model;
mod paged;
#[cfg(test)]
mod prefixes;
#[cfg(test)]
mod programs;
#[cfg(test)]
mod references;
mod refuse;
mod reply;
#[cfg(test)]
mod seed;
#[cfg(test)]
mod sharing;
#[cfg(test)]
mod silent;
mod steer;
mod sums;
mod truncated;
#[cfg(test)]
mod unchanged;
mod wire;
mod xdp;

use patchswitch_tests::frame;
