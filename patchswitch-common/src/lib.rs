//! What the BPF programs and user space have in common: the format of the maps, the parsing of packets, and the
//! decision which partition gets a packet.
//!
//! Everything here is pure: no I/O, no allocation, no `unsafe` but the `Pod` impls of feature `user`. The BPF
//! programs, the tests and the reference model run the same functions.
//!
//! ```text
//!  packet ─► parse ─► Packet { flow, kind } ─► decide(word, packet, kernel) ─► Owner
//!              │                                   │
//!              └ header bytes by `Octets`          └ sockets, learned flows, fragments by `Kernel`
//! ```
//!
//! * [`word`]: the one 8-byte word that says who serves.
//! * [`maps`]: every key and value of the BPF maps, with size and padding proved.
//! * [`parse`](mod@parse): from bytes to [`parse::Packet`].
//! * [`refuse`](mod@refuse): what is dropped, or left to the host, by its headers alone.
//! * [`quic`](mod@quic): flows that are known by a connection id, and ports without flows.
//! * [`decide`](mod@decide): the five rules.
//! * [`verdict`]: the exits of the programs and their counters.

#![no_std]

#[cfg(test)]
extern crate std;

pub mod decide;
pub mod maps;
pub mod parse;
pub mod quic;
pub mod refuse;
pub mod verdict;
pub mod word;

/// One of the two partitions that an attachment steers between: 0 or 1.
///
/// Which of them is active is said by [`word::Word`] alone; the two exchange roles with every switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Slot {
    /// The partition in the first entry of the slot table.
    A = 0,
    /// The partition in the second entry of the slot table.
    B = 1,
}

impl Slot {
    /// The slot with this number; only the lowest bit counts, so that no stored value is invalid.
    #[inline(always)]
    pub const fn from_bit(bit: u8) -> Self {
        if bit & 1 == 0 { Self::A } else { Self::B }
    }

    /// The other one.
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Its index in the slot table.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self as u32
    }
}
