//! What is judged by its headers alone, before anybody asks whose it is.
//!
//! ```text
//!  to the service    ─► [inbound]  ─► Martian, SourceRoute, Redirect, NestedError, SplitDiscovery: dropped
//!                                 └─► ForHost: router and neighbour discovery, group membership: the host's own
//!  from a partition  ─► [outbound] ─► ForgedControl: what only a router or a server of addresses may say
//!                   │             └─► HostControl: to addresses by which the host itself is governed
//!                   └─► [arp]      ─► ForgedControl: a claim of addresses, or of somebody else's
//! ```
//!
//! What is merely malformed is not judged here: see [`Verdict::Malformed`].

use crate::maps::{Address, mapped, unmapped};
use crate::parse::{Fragment, LINK_HEADER, Network, Octets, is_error, protocol, quoted};
use crate::verdict::Verdict;

/// Whether an address cannot be anybody's source beyond its link (RFC 1122 3.2.1.3, RFC 4291 2.5).
///
/// IPv4 addresses are given in mapped form; in a packet of IPv6 that form is a forgery of its own.
#[inline(always)]
pub fn is_martian(source: &Address, v6: bool) -> bool {
    if v6 {
        let number = u128::from_be_bytes(*source);
        number <= 1 || is_mapped(source) || number >> 120 == 0xff
    } else {
        matches!(unmapped(source)[0], 0 | 127 | 224..)
    }
}

/// Whether an IPv6 address is one of IPv4, as sockets have them and no packet does (RFC 4291 2.5.5.2, RFC 4942 2.2).
#[inline(always)]
const fn is_mapped(address: &Address) -> bool {
    u128::from_be_bytes(*address) >> 32 == 0xffff
}

/// Whether an IPv6 address is valid on its link only.
#[inline(always)]
pub const fn is_link_local(address: &Address) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80
}

/// Whether [`inbound`] has nothing to say, as of nearly all packets: nothing of ICMP or IGMP, no options, and a source
/// that any client may have.
#[inline(always)]
pub fn is_plain(network: &Network) -> bool {
    let first = network.source[0];
    if network.v6 {
        network.protocol != protocol::ICMPV6 && !matches!(first, 0 | 0xfe | 0xff)
    } else {
        !matches!(network.protocol, protocol::ICMP | protocol::IGMP)
            && network.payload == LINK_HEADER + 20
            && !is_martian(&network.source, false)
    }
}

/// Why a packet to the service goes to no partition; nothing if it may.
#[inline(always)]
pub fn inbound<O: Octets + ?Sized>(octets: &O, network: &Network) -> Option<Verdict> {
    let discovery = network.v6 && network.protocol == protocol::ICMPV6;
    if discovery && let Some(verdict) = icmpv6(octets, network) {
        return Some(verdict);
    }
    if network.v6 && is_link_local(&network.source) {
        return Some(Verdict::ForHost);
    }
    if is_martian(&network.source, network.v6) {
        return Some(Verdict::Martian);
    }
    if network.v6 {
        return None;
    }
    if network.payload > LINK_HEADER + 20 && has_source_route(octets, network.payload) {
        return Some(Verdict::SourceRoute);
    }
    match network.protocol {
        protocol::ICMP => icmpv4(octets, network),
        // Who is in which group is the link's own business, to whichever address it is said.
        protocol::IGMP => Some(Verdict::ForHost),
        _ => None,
    }
}

/// Bytes of the payload. What pads the frame behind the packet is none of it.
#[inline(always)]
fn of_packet<const N: usize, O: Octets + ?Sized>(octets: &O, network: &Network, at: u32) -> Option<[u8; N]> {
    let offset = network.payload + at;
    if offset + N as u32 > network.end { None } else { octets.at(offset) }
}

/// Options of IPv4 that say which way a packet takes (RFC 791 3.1, RFC 7126 4.3, 4.4).
#[inline(never)]
fn has_source_route<O: Octets + ?Sized>(octets: &O, end: u32) -> bool {
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    const LOOSE: u8 = 131;
    const STRICT: u8 = 137;
    let mut at = LINK_HEADER + 20;
    for _ in 0..40 {
        if at >= end {
            return false;
        }
        let Some([kind]) = octets.at(at) else { return false };
        match kind {
            END => return false,
            LOOSE | STRICT => return true,
            NOTHING => at += 1,
            // Without its length: what follows is no option.
            _ if at + 1 == end => return false,
            _ => match octets.at(at + 1) {
                Some([length]) if length >= 2 => at += u32::from(length),
                _ => return false,
            },
        }
    }
    false
}

/// Messages of ICMP for IPv4 (IANA's list of types).
#[inline(always)]
fn icmpv4<O: Octets + ?Sized>(octets: &O, network: &Network) -> Option<Verdict> {
    if matches!(network.fragment, Fragment::Later) {
        return None;
    }
    let [kind] = of_packet(octets, network, 0)?;
    match kind {
        5 => Some(Verdict::Redirect),
        // Routers' advertisements and what asks for them; time, information and masks.
        9 | 10 | 13..=18 => Some(Verdict::ForHost),
        _ if is_error(kind, false) => about_an_error(octets, network),
        _ => None,
    }
}

/// Whether the packet that an error quotes is an error itself, behind whatever options and extension headers (RFC 1122
/// 3.2.2, RFC 4443 2.4). What cannot be read is left to the rules.
#[inline(always)]
fn about_an_error<O: Octets + ?Sized>(octets: &O, network: &Network) -> Option<Verdict> {
    let mut inner = Network::EMPTY;
    quoted(octets, network, &mut inner).ok()?;
    let icmp = if network.v6 { protocol::ICMPV6 } else { protocol::ICMP };
    // What a later fragment begins with is data.
    if inner.protocol != icmp || matches!(inner.fragment, Fragment::Later) {
        return None;
    }
    let [kind] = of_packet(octets, &inner, 0)?;
    is_error(kind, network.v6).then_some(Verdict::NestedError)
}

/// Messages of ICMP for IPv6.
#[inline(always)]
fn icmpv6<O: Octets + ?Sized>(octets: &O, network: &Network) -> Option<Verdict> {
    if matches!(network.fragment, Fragment::Later) {
        return None;
    }
    let [kind] = of_packet(octets, network, 0)?;
    match kind {
        // RFC 6980: nobody may take neighbour discovery out of fragments.
        133..=137 if matches!(network.fragment, Fragment::First) => Some(Verdict::SplitDiscovery),
        137 => Some(Verdict::Redirect),
        // Neighbour and router discovery; membership in groups (RFC 2710, RFC 3810).
        130..=136 | 143 => Some(Verdict::ForHost),
        _ if is_error(kind, true) => about_an_error(octets, network),
        _ => None,
    }
}

/// Whether a partition says what only a router, a server of addresses or the host may say: that it is a router, that
/// there is a better way, who has which address, or that a service address is on a link of its own (RFC 6104, RFC 7610);
/// or speaks to an address by which the host is governed.
#[inline(always)]
pub fn outbound<O: Octets + ?Sized>(
    octets: &O,
    network: &Network,
    is_service: impl Fn(&Address) -> bool,
) -> Option<Verdict> {
    // The flow of such a packet could not be told from one of IPv4.
    if network.v6 && (is_mapped(&network.source) || is_mapped(&network.destination)) {
        return Some(Verdict::Martian);
    }
    if is_control(&network.destination, network.v6)
        && !is_control(&network.source, network.v6)
        && !asks_for_name_or_time(octets, network)
    {
        return Some(Verdict::HostControl);
    }
    if matches!(network.fragment, Fragment::Later) {
        return None;
    }
    let forged = match (network.v6, network.protocol) {
        (true, protocol::ICMPV6) => match of_packet(octets, network, 0) {
            // Who asks for members of groups is a router, too.
            Some([130 | 134 | 137]) => true,
            Some([136]) => of_packet(octets, network, 8).is_some_and(|target| is_service(&target)),
            _ => false,
        },
        (false, protocol::ICMP) => matches!(of_packet(octets, network, 0), Some([5 | 9])),
        // A report goes to a group, which no router passes on (RFC 3376 4.2.14); a question only a router asks.
        (false, protocol::IGMP) => {
            !matches!(unmapped(&network.destination)[0], 224..=239)
                || matches!(of_packet(octets, network, 0), Some([0x11]))
        }
        (v6, protocol::UDP) => {
            let [high, low, to_high, to_low] = of_packet(octets, network, 0)?;
            let ports = (u16::from_be_bytes([high, low]), u16::from_be_bytes([to_high, to_low]));
            ports == if v6 { (547, 546) } else { (67, 68) }
        }
        _ => false,
    };
    forged.then_some(Verdict::ForgedControl)
}

/// Whether an address means the host itself, or what governs it, to whoever it forwards for: the loopback, which a host
/// with `route_localnet` would take, and the IPv4 addresses of links, which nobody may forward (RFC 3927 7) and Linux
/// does. Clouds answer there for the credentials of the machine. Linux itself keeps IPv6's where they belong.
#[inline(always)]
fn is_control(address: &Address, v6: bool) -> bool {
    if v6 {
        u128::from_be_bytes(*address) == 1
    } else {
        matches!(unmapped(address), [127, ..] | [169, 254, ..])
    }
}

/// Clouds answer there for names and time as well, and these are no secrets.
#[inline(always)]
fn asks_for_name_or_time<O: Octets + ?Sized>(octets: &O, network: &Network) -> bool {
    const NAMES: u16 = 53;
    const TIME: u16 = 123;
    if network.v6
        || unmapped(&network.destination)[0] == 127
        || !matches!(network.fragment, Fragment::Whole)
        || !matches!(network.protocol, protocol::TCP | protocol::UDP)
    {
        return false;
    }
    of_packet(octets, network, 2).is_some_and(|port| match u16::from_be_bytes(port) {
        NAMES => true,
        TIME => network.protocol == protocol::UDP,
        _ => false,
    })
}

/// Whether a partition's ARP packet (RFC 826) may pass: it asks for somebody with an address of its own, or with none
/// (RFC 5227), and claims nothing.
#[inline(always)]
pub fn arp<O: Octets + ?Sized>(octets: &O, is_its_own: impl Fn(&Address) -> bool) -> Option<Verdict> {
    const SENDER: u32 = LINK_HEADER + 14;
    const TARGET: u32 = LINK_HEADER + 24;
    let (Some(sender), Some(target)) = (octets.at::<4>(SENDER), octets.at::<4>(TARGET)) else {
        return Some(Verdict::Malformed);
    };
    let its_own = sender == [0; 4] || is_its_own(&mapped(sender));
    if its_own && sender != target { None } else { Some(Verdict::ForgedControl) }
}

#[cfg(test)]
mod tests;
