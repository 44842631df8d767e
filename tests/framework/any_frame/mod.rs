//! What must hold of any frame, whatever its bytes are. The fuzz targets ask for it, and so do the tests: of frames that
//! are generated, and of each one that they send through the programs.

pub mod decide;
pub mod parse;
pub mod refuse;
#[cfg(test)]
mod tests;

use std::cell::Cell;

use patchswitch_common::parse::{
    ETH_IPV4, ETH_IPV6, LINK_HEADER, Malformed, Network, Octets, Packet, inbound, ipv4, ipv6, outbound,
};

/// All of it.
pub fn check(frame: &[u8]) {
    parse::check(frame);
    refuse::check(frame);
    decide::check(frame);
}

/// A frame that says how far it was read with success.
pub struct Watched<'a> {
    bytes: &'a [u8],
    furthest: Cell<usize>,
}

impl<'a> Watched<'a> {
    /// Nothing of it is read yet.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, furthest: Cell::new(0) }
    }

    /// How far it was read.
    pub fn furthest(&self) -> usize {
        self.furthest.get()
    }
}

impl Octets for Watched<'_> {
    fn length(&self) -> u32 {
        self.bytes.length()
    }

    fn at<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let found = self.bytes.at(offset)?;
        self.furthest.set(self.furthest.get().max(offset as usize + N));
        Some(found)
    }
}

/// Whether a frame says that it is IPv6; nothing if it is none of IP.
pub fn is_v6(frame: &[u8]) -> Option<bool> {
    match u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]) {
        ETH_IPV4 => Some(false),
        ETH_IPV6 => Some(true),
        _ => None,
    }
}

/// Reads the network header of a frame.
pub fn network<O: Octets + ?Sized>(frame: &O, v6: bool) -> Result<Network, Malformed> {
    let mut network = Network::EMPTY;
    if v6 {
        ipv6(frame, LINK_HEADER, &mut network)?;
    } else {
        ipv4(frame, LINK_HEADER, &mut network)?;
    }
    Ok(network)
}

/// Reads what follows it.
pub fn packet<O: Octets + ?Sized>(frame: &O, network: &Network, out: bool) -> Result<Packet, Malformed> {
    let mut packet = Packet::EMPTY;
    if out {
        outbound(frame, network, &mut packet)?;
    } else {
        inbound(frame, network, &mut packet)?;
    }
    Ok(packet)
}
