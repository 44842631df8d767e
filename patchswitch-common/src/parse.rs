//! From bytes to a flow, as the service sees it.
//!
//! ```text
//!  ipv4, ipv6 ─► Network { source, destination, protocol, payload, fragment }
//!     └─ inbound  ─► Packet: remote = source,      local = destination
//!     └─ outbound ─► Packet: remote = destination, local = source
//! ```
//!
//! The first step is enough to tell whether a packet is ours at all; the second is taken only when it matters.
//! Whatever does not fit is [`Malformed`]: the caller hands the packet to the kernel, which drops and counts it as it
//! would without us.

use crate::maps::{Address, mapped};

/// Length of an Ethernet header, and so the offset of the network header. A VLAN tag in the bytes is not ours.
pub const LINK_HEADER: u32 = 14;
/// As many IPv6 extension headers are skipped; one that has more is [`Malformed`].
pub const EXTENSION_HEADERS: u32 = 6;

/// `ETH_P_IP` in host byte order.
pub const ETH_IPV4: u16 = 0x0800;
/// `ETH_P_IPV6` in host byte order.
pub const ETH_IPV6: u16 = 0x86dd;

/// IP protocol numbers (IANA).
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// Membership in groups, IPv4 (RFC 3376).
    pub const IGMP: u8 = 2;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// DCCP (RFC 4340).
    pub const DCCP: u8 = 33;
    /// SCTP (RFC 9260).
    pub const SCTP: u8 = 132;
    /// UDP-Lite (RFC 3828).
    pub const UDP_LITE: u8 = 136;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const NONE: u8 = 59;
    pub(super) const DESTINATION: u8 = 60;
}

/// The bytes of a frame. In BPF: a helper call; in tests: a slice.
pub trait Octets {
    /// Length of the frame.
    fn length(&self) -> u32;

    /// `N` bytes from `offset` on, or nothing if the frame is shorter.
    fn at<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Octets for [u8] {
    fn length(&self) -> u32 {
        u32::try_from(self.len()).unwrap_or(u32::MAX)
    }

    fn at<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}

/// A packet that is too short, inconsistent, or has more extension headers than are skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Place of a packet in a fragmented datagram.
///
/// This enum and the ones below carry no values of their own: copied as a whole, the bytes of a variant without one
/// would be uninitialised, which the BPF verifier refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// Not fragmented.
    Whole,
    /// The first fragment: has the transport header.
    First,
    /// A later one: has none.
    Later,
}

/// What the network header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Protocol of the payload, behind all extension headers.
    pub protocol: u8,
    /// Offset of the payload in the frame.
    pub payload: u32,
    /// Offset of the packet's end: a short frame is padded, and the padding is none of the packet.
    pub end: u32,
    /// Whether it is a fragment.
    pub fragment: Fragment,
    /// Identification of a fragmented packet, network byte order; else 0.
    pub fragment_id: u32,
    /// Whether it is IPv6.
    pub v6: bool,
}

/// A flow as the service sees it. Ports are in network byte order; 0 where the protocol has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The client's address.
    pub remote: Address,
    /// The service's address.
    pub local: Address,
    /// The client's port, or the identifier of an echo request.
    pub remote_port: u16,
    /// The service's port.
    pub local_port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// How a flow's owner is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// By socket.
    Tcp,
    /// By connected socket, else by what was learned.
    Udp,
    /// By what was learned.
    Other,
}

/// Whether a packet belongs to its flow or speaks of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A packet of the flow.
    Direct,
    /// An ICMP error about a packet of the flow that the service sent.
    Error,
    /// An ICMP error about a fragment that has no ports.
    ErrorOfFragment,
    /// A fragment without a transport header.
    LaterFragment,
}

/// A packet as the rules see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The flow it belongs to.
    pub flow: Flow,
    /// How it belongs to it.
    pub kind: Kind,
    /// How the flow's owner is found.
    pub transport: Transport,
    /// Byte 13 of the TCP header; 0 where there is none, or only quoted in an error.
    pub flags: u8,
    /// Identification of a fragment, network byte order; else 0.
    pub fragment_id: u32,
}

impl Network {
    /// Nothing read yet.
    pub const EMPTY: Self = Self {
        source: [0; 16],
        destination: [0; 16],
        protocol: 0,
        payload: 0,
        end: 0,
        fragment: Fragment::Whole,
        fragment_id: 0,
        v6: false,
    };
}

impl Packet {
    /// Nothing read yet.
    pub const EMPTY: Self = Self {
        flow: Flow { remote: [0; 16], local: [0; 16], remote_port: 0, local_port: 0, protocol: 0 },
        kind: Kind::Direct,
        transport: Transport::Other,
        flags: 0,
        fragment_id: 0,
    };
}

// Results are written through a reference, and not returned: returned values are copied from stack to stack, and a
// BPF program has 512 bytes of it.

/// Reads the IPv4 header at `offset` (RFC 791 3.1).
///
/// # Errors
/// [`Malformed`] if it is short, of another version, has an impossible header length, or says that the packet is longer
/// than its frame.
#[inline(always)]
pub fn ipv4<O: Octets + ?Sized>(octets: &O, offset: u32, network: &mut Network) -> Result<(), Malformed> {
    let total = fixed_ipv4(octets, offset, network)?;
    // Packets that the kernel has joined may be longer than the field can say; it says 0 then.
    network.end = end(octets, offset, total)?;
    if network.payload > network.end { Err(Malformed) } else { Ok(()) }
}

/// The end of a packet that says how long it is.
#[inline(always)]
fn end<O: Octets + ?Sized>(octets: &O, offset: u32, length: u32) -> Result<u32, Malformed> {
    let all = octets.length();
    match length {
        0 if all > 0xffff => Ok(all),
        0 => Err(Malformed),
        _ if offset + length > all => Err(Malformed),
        _ => Ok(offset + length),
    }
}

/// Reads the header itself; gives the total length that it states.
#[inline(always)]
fn fixed_ipv4<O: Octets + ?Sized>(octets: &O, offset: u32, network: &mut Network) -> Result<u32, Malformed> {
    let h: [u8; 20] = octets.at(offset).ok_or(Malformed)?;
    let length = u32::from(h[0] & 0xf) * 4;
    if h[0] >> 4 != 4 || length < 20 {
        return Err(Malformed);
    }
    let place = u16::from_be_bytes([h[6], h[7]]);
    if place & 0x3fff != 0 {
        network.fragment = if place & 0x1fff == 0 { Fragment::First } else { Fragment::Later };
        network.fragment_id = u32::from(u16::from_ne_bytes([h[4], h[5]]));
    }
    network.source = mapped([h[12], h[13], h[14], h[15]]);
    network.destination = mapped([h[16], h[17], h[18], h[19]]);
    network.protocol = h[9];
    network.payload = offset + length;
    network.end = octets.length();
    Ok(u32::from(u16::from_be_bytes([h[2], h[3]])))
}

/// Reads the IPv6 header at `offset` and skips its extension headers (RFC 8200 4).
///
/// # Errors
/// [`Malformed`] if it is short, of another version, has more than [`EXTENSION_HEADERS`], or says that the packet is
/// longer than its frame.
#[inline(always)]
pub fn ipv6<O: Octets + ?Sized>(octets: &O, offset: u32, network: &mut Network) -> Result<(), Malformed> {
    let payload = fixed_ipv6(octets, offset, network)?;
    // A header without payload is a packet; without a length it is one that the kernel has joined, or a jumbogram
    // (RFC 2675), which no link here carries.
    if payload != 0 || network.protocol != protocol::NONE {
        network.end = end(octets, network.payload, payload)?;
    }
    skip_extensions(octets, network)
}

#[inline(always)]
fn skip_extensions<O: Octets + ?Sized>(octets: &O, network: &mut Network) -> Result<(), Malformed> {
    for _ in 0..EXTENSION_HEADERS {
        match skip_extension(octets, network) {
            Step::Skipped => {}
            Step::None if network.payload > network.end => return Err(Malformed),
            Step::None => return Ok(()),
            Step::Short => return Err(Malformed),
        }
    }
    if is_extension(network.protocol) || network.payload > network.end { Err(Malformed) } else { Ok(()) }
}

#[inline(always)]
fn fixed_ipv6<O: Octets + ?Sized>(octets: &O, offset: u32, network: &mut Network) -> Result<u32, Malformed> {
    let h: [u8; 8] = octets.at(offset).ok_or(Malformed)?;
    if h[0] >> 4 != 6 {
        return Err(Malformed);
    }
    network.source = octets.at(offset + 8).ok_or(Malformed)?;
    network.destination = octets.at(offset + 24).ok_or(Malformed)?;
    network.protocol = h[6];
    network.payload = offset + 40;
    network.end = octets.length();
    network.v6 = true;
    Ok(u32::from(u16::from_be_bytes([h[4], h[5]])))
}

#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(
        next,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::AUTHENTICATION
            | protocol::DESTINATION
    )
}

/// What a look at the next header brought.
#[derive(Clone, Copy)]
enum Step {
    /// It was an extension header, and is skipped.
    Skipped,
    /// It is none, or cannot be read in a later fragment.
    None,
    /// It runs past the end.
    Short,
}

/// Skips one extension header. A function of its own: in the loop it would be unrolled.
#[inline(never)]
fn skip_extension<O: Octets + ?Sized>(octets: &O, network: &mut Network) -> Step {
    if !is_extension(network.protocol) || matches!(network.fragment, Fragment::Later) {
        return Step::None;
    }
    if network.payload + 8 > network.end {
        return Step::Short;
    }
    let Some(h) = octets.at::<8>(network.payload) else { return Step::Short };
    let length = match network.protocol {
        protocol::FRAGMENT => {
            let place = u16::from_be_bytes([h[2], h[3]]);
            // An "atomic" fragment (RFC 6946) is a whole packet.
            if place & 0xfff9 != 0 {
                network.fragment = if place & 0xfff8 == 0 { Fragment::First } else { Fragment::Later };
                network.fragment_id = u32::from_ne_bytes([h[4], h[5], h[6], h[7]]);
            }
            8
        }
        protocol::AUTHENTICATION => (u32::from(h[1]) + 2) * 4,
        _ => (u32::from(h[1]) + 1) * 8,
    };
    network.protocol = h[0];
    network.payload += length;
    Step::Skipped
}

/// A packet that goes to the service.
///
/// # Errors
/// [`Malformed`] if the transport header is short.
#[inline(always)]
pub fn inbound<O: Octets + ?Sized>(
    octets: &O,
    network: &Network,
    packet: &mut Packet,
) -> Result<(), Malformed> {
    packet.flow.remote = network.source;
    packet.flow.local = network.destination;
    transport(octets, network, packet, false)
}

/// A packet that comes from the service.
///
/// # Errors
/// As [`inbound`].
#[inline(always)]
pub fn outbound<O: Octets + ?Sized>(
    octets: &O,
    network: &Network,
    packet: &mut Packet,
) -> Result<(), Malformed> {
    packet.flow.remote = network.destination;
    packet.flow.local = network.source;
    transport(octets, network, packet, true)
}

#[inline(always)]
fn transport<O: Octets + ?Sized>(
    octets: &O,
    network: &Network,
    packet: &mut Packet,
    out: bool,
) -> Result<(), Malformed> {
    packet.flow.protocol = network.protocol;
    packet.fragment_id = network.fragment_id;
    if matches!(network.fragment, Fragment::Later) {
        packet.kind = Kind::LaterFragment;
        Ok(())
    } else if matches!(network.protocol, protocol::ICMP | protocol::ICMPV6) {
        icmp(octets, network, packet, out)
    } else {
        ports(octets, network, packet, out)
    }
}

/// Reads the ports; `from_service` if the packet at hand was sent by the service.
#[inline(always)]
fn ports<O: Octets + ?Sized>(
    octets: &O,
    network: &Network,
    packet: &mut Packet,
    from_service: bool,
) -> Result<(), Malformed> {
    let (number, offset) = (packet.flow.protocol, network.payload);
    if !has_ports(number) {
        return Ok(());
    }
    // Of what an error quotes, the ports are sure to be there and are enough.
    let least = if matches!(packet.kind, Kind::Direct) { 8 } else { 4 };
    if offset + least > network.end {
        return Err(Malformed);
    }
    let p: [u8; 4] = octets.at(offset).ok_or(Malformed)?;
    let (source, destination) = (u16::from_ne_bytes([p[0], p[1]]), u16::from_ne_bytes([p[2], p[3]]));
    if from_service {
        (packet.flow.local_port, packet.flow.remote_port) = (source, destination);
    } else {
        (packet.flow.local_port, packet.flow.remote_port) = (destination, source);
    }
    match number {
        protocol::TCP => packet.transport = Transport::Tcp,
        protocol::UDP => packet.transport = Transport::Udp,
        _ => {}
    }
    if number != protocol::TCP {
        return Ok(());
    }
    // Of a segment that an error quotes only eight bytes are sure to be there (RFC 792), and its flags say nothing.
    if matches!(packet.kind, Kind::Direct) {
        let [length, flags] = octets.at(offset + 12).ok_or(Malformed)?;
        let header = u32::from(length >> 4) * 4;
        // Also the fragment of RFC 1858 and 3128 that is too small for the header it hides.
        if source == 0 || destination == 0 || header < 20 || offset + header > network.end {
            return Err(Malformed);
        }
        packet.flags = flags;
    }
    Ok(())
}

/// Whether a protocol's header begins with the ports of its two ends.
#[inline(always)]
const fn has_ports(number: u8) -> bool {
    matches!(number, protocol::TCP | protocol::UDP | protocol::DCCP | protocol::SCTP | protocol::UDP_LITE)
}

/// Reads the network header that an ICMP error quotes. It may be cut off behind that: how long the packet was is of no
/// interest.
#[inline(always)]
pub(crate) fn quoted<O: Octets + ?Sized>(
    octets: &O,
    network: &Network,
    inner: &mut Network,
) -> Result<(), Malformed> {
    let offset = network.payload + 8;
    let header = if network.v6 { 40 } else { 20 };
    // What pads the frame behind the packet is no quotation.
    if offset + header > network.end {
        return Err(Malformed);
    }
    if network.v6 {
        fixed_ipv6(octets, offset, inner)?;
        inner.end = network.end;
        skip_extensions(octets, inner)
    } else {
        fixed_ipv4(octets, offset, inner)?;
        inner.end = network.end;
        if inner.payload > inner.end { Err(Malformed) } else { Ok(()) }
    }
}

#[inline(always)]
fn icmp<O: Octets + ?Sized>(
    octets: &O,
    network: &Network,
    packet: &mut Packet,
    out: bool,
) -> Result<(), Malformed> {
    if network.payload + 8 > network.end {
        return Err(Malformed);
    }
    let h: [u8; 8] = octets.at(network.payload).ok_or(Malformed)?;
    if !is_error(h[0], network.v6) {
        // The identifier of an echo stands where a client's port would: it tells two pings of one client apart.
        packet.flow.remote_port = u16::from_ne_bytes([h[4], h[5]]);
        return Ok(());
    }
    packet.kind = Kind::Error;
    let mut inner = Network::EMPTY;
    quoted(octets, network, &mut inner)?;
    // An inbound error quotes what the service sent; an outbound one quotes what the client sent.
    if out {
        (packet.flow.local, packet.flow.remote) = (inner.destination, inner.source);
    } else {
        (packet.flow.local, packet.flow.remote) = (inner.source, inner.destination);
    }
    packet.flow.protocol = inner.protocol;
    if matches!(inner.fragment, Fragment::Later) {
        packet.kind = Kind::ErrorOfFragment;
        return Ok(());
    }
    if matches!(inner.protocol, protocol::ICMP | protocol::ICMPV6) {
        if inner.payload + 8 > inner.end {
            return Err(Malformed);
        }
        let e: [u8; 8] = octets.at(inner.payload).ok_or(Malformed)?;
        packet.flow.remote_port = u16::from_ne_bytes([e[4], e[5]]);
        return Ok(());
    }
    ports(octets, &inner, packet, !out)
}

/// Whether a type of ICMP is that of an error, which quotes what it is about (RFC 792, RFC 4443 2.1).
#[inline(always)]
pub(crate) const fn is_error(kind: u8, v6: bool) -> bool {
    if v6 { kind < 128 } else { matches!(kind, 3 | 11 | 12) }
}

#[cfg(test)]
mod tests;
