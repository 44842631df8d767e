//! The sums of a frame whose source address is exchanged, from scratch: remainders of whole packets, not differences.
//! For a packet whose sums were wrong they are as wrong as before, so that whoever gets it still sees that.

use patchswitch_common::maps::{Address, unmapped};
use patchswitch_common::parse::{Fragment, LINK_HEADER, Network};

/// A checksum is the remainder that is missing to a multiple of this (RFC 1071).
const MODULUS: u64 = 0xffff;

/// Where a transport's checksum covers the addresses: the offset in its header, and whether 0 means that there is none.
fn covering(network: &Network) -> Option<(usize, bool)> {
    if network.fragment == Fragment::Later {
        return None;
    }
    Some(match (network.protocol, network.v6) {
        (6, _) => (16, false),
        (17 | 136, _) => (6, true),
        (33, _) => (6, false),
        (58, true) => (2, false),
        _ => return None,
    })
}

/// The remainder of bytes, as numbers of two bytes each.
fn remainder(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u64::from(*high) << 8 | u64::from(*low),
        [high] => u64::from(*high) << 8,
        _ => 0,
    });
    words.sum::<u64>() % MODULUS
}

/// Sets the sum at an offset so that all of it has a remainder.
fn complete(bytes: &mut [u8], at: usize, others: u64, wanted: u64) {
    bytes[at..at + 2].fill(0);
    let missing = (wanted + 2 * MODULUS - others - remainder(bytes)) % MODULUS;
    bytes[at..at + 2].copy_from_slice(&(missing as u16).to_be_bytes());
}

/// The frame with another source address: that, and the sums that cover it.
pub fn with_source(frame: &[u8], network: &Network, source: &Address) -> Vec<u8> {
    let mut now = frame.to_vec();
    let header = LINK_HEADER as usize;
    let (payload, end) = (network.payload as usize, network.end as usize);
    let before = remainder(&frame[header..payload]);
    let (place, source) = if network.v6 {
        (header + 8..header + 24, source.to_vec())
    } else {
        (header + 12..header + 16, unmapped(source).to_vec())
    };
    let old = remainder(&frame[place.clone()]);
    now[place.clone()].copy_from_slice(&source);
    if !network.v6 {
        complete(&mut now[header..payload], 10, 0, before);
    }
    let Some((at, may_lack)) = covering(network) else { return now };
    let lacks = frame[payload + at..payload + at + 2] == [0, 0];
    if may_lack && lacks {
        return now;
    }
    // Of what goes before the transport for its sum, the source alone has changed.
    let whole = remainder(&frame[payload..end]) + old;
    complete(&mut now[payload..end], at, remainder(&source), whole);
    if may_lack && now[payload + at..payload + at + 2] == [0, 0] {
        now[payload + at..payload + at + 2].fill(0xff);
    }
    now
}
