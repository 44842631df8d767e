//! From bytes to a flow, as the service sees it.
//!
//! ```text
//!  network(bytes) ─► Network { source, destination, protocol, payload, fragment }
//!     └─ inbound(bytes, network)  ─► Packet: remote = source,      local = destination
//!     └─ outbound(bytes, network) ─► Packet: remote = destination, local = source
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
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION: u8 = 60;
}

/// The bytes of a frame. In BPF: a helper call; in tests: a slice.
pub trait Octets {
    /// `N` bytes from `offset` on, or nothing if the frame is shorter.
    fn at<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Octets for [u8] {
    fn at<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}

/// A packet that is too short, inconsistent, or has more extension headers than are skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Place of a packet in a fragmented datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// Not fragmented.
    Whole,
    /// The first fragment: has the transport header. Identification in network byte order.
    First(u32),
    /// A later one: has none.
    Later(u32),
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
    /// Whether it is a fragment.
    pub fragment: Fragment,
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
    /// By socket; the flags of the segment, 0 where they are not known (quoted in an error).
    Tcp {
        /// Byte 13 of the TCP header.
        flags: u8,
    },
    /// By connected socket, else by what was learned.
    Udp,
    /// By what was learned.
    Other,
}

/// Whether a packet belongs to its flow or speaks of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A packet of the flow.
    Direct(Transport),
    /// An ICMP error about a packet of the flow that the service sent.
    Error(Transport),
    /// A fragment without a transport header. Identification in network byte order.
    LaterFragment {
        /// Identification.
        id: u32,
    },
}

/// A packet as the rules see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The flow it belongs to.
    pub flow: Flow,
    /// How it belongs to it.
    pub kind: Kind,
}

/// Reads the IPv4 header at `offset` (RFC 791 3.1).
///
/// # Errors
/// [`Malformed`] if it is short, of another version, or has an impossible header length.
#[inline(always)]
pub fn ipv4<O: Octets + ?Sized>(octets: &O, offset: u32) -> Result<Network, Malformed> {
    let h: [u8; 20] = octets.at(offset).ok_or(Malformed)?;
    let length = u32::from(h[0] & 0xf) * 4;
    if h[0] >> 4 != 4 || length < 20 || u32::from(u16::from_be_bytes([h[2], h[3]])) < length {
        return Err(Malformed);
    }
    let place = u16::from_be_bytes([h[6], h[7]]);
    let id = u32::from(u16::from_ne_bytes([h[4], h[5]]));
    let fragment = match (place & 0x1fff, place & 0x2000) {
        (0, 0) => Fragment::Whole,
        (0, _) => Fragment::First(id),
        _ => Fragment::Later(id),
    };
    Ok(Network {
        source: mapped([h[12], h[13], h[14], h[15]]),
        destination: mapped([h[16], h[17], h[18], h[19]]),
        protocol: h[9],
        payload: offset + length,
        fragment,
        v6: false,
    })
}

/// Reads the IPv6 header at `offset` and skips its extension headers (RFC 8200 4).
///
/// # Errors
/// [`Malformed`] if it is short, of another version, or has more than [`EXTENSION_HEADERS`].
#[inline(always)]
pub fn ipv6<O: Octets + ?Sized>(octets: &O, offset: u32) -> Result<Network, Malformed> {
    let h: [u8; 40] = octets.at(offset).ok_or(Malformed)?;
    if h[0] >> 4 != 6 {
        return Err(Malformed);
    }
    let (mut source, mut destination) = ([0; 16], [0; 16]);
    source.copy_from_slice(&h[8..24]);
    destination.copy_from_slice(&h[24..40]);
    let mut network = Network {
        source,
        destination,
        protocol: h[6],
        payload: offset + 40,
        fragment: Fragment::Whole,
        v6: true,
    };
    for _ in 0..EXTENSION_HEADERS {
        if !skip_extension(octets, &mut network)? {
            return Ok(network);
        }
    }
    if is_extension(network.protocol) { Err(Malformed) } else { Ok(network) }
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

/// Skips one extension header. False if there is none, or if what follows cannot be read (a later fragment).
#[inline(always)]
fn skip_extension<O: Octets + ?Sized>(octets: &O, network: &mut Network) -> Result<bool, Malformed> {
    if !is_extension(network.protocol) || matches!(network.fragment, Fragment::Later(_)) {
        return Ok(false);
    }
    let h: [u8; 8] = octets.at(network.payload).ok_or(Malformed)?;
    let length = match network.protocol {
        protocol::FRAGMENT => {
            let id = u32::from_ne_bytes([h[4], h[5], h[6], h[7]]);
            let place = u16::from_be_bytes([h[2], h[3]]);
            network.fragment = match (place & 0xfff8, place & 1) {
                // An "atomic" fragment (RFC 6946) is a whole packet.
                (0, 0) => network.fragment,
                (0, _) => Fragment::First(id),
                _ => Fragment::Later(id),
            };
            8
        }
        protocol::AUTHENTICATION => (u32::from(h[1]) + 2) * 4,
        _ => (u32::from(h[1]) + 1) * 8,
    };
    network.protocol = h[0];
    network.payload += length;
    Ok(true)
}

/// Whether a packet to a service address is neighbour discovery, which the host answers (RFC 4861: types 133 to 137).
#[inline(always)]
pub fn is_neighbour_discovery<O: Octets + ?Sized>(octets: &O, network: &Network) -> bool {
    network.v6
        && network.protocol == protocol::ICMPV6
        && !matches!(network.fragment, Fragment::Later(_))
        && matches!(octets.at::<1>(network.payload), Some([133..=137]))
}

/// A packet that goes to the service.
///
/// # Errors
/// [`Malformed`] if the transport header is short.
#[inline(always)]
pub fn inbound<O: Octets + ?Sized>(octets: &O, network: &Network) -> Result<Packet, Malformed> {
    packet(octets, network, &network.source, &network.destination, false)
}

/// A packet that comes from the service.
///
/// # Errors
/// As [`inbound`].
#[inline(always)]
pub fn outbound<O: Octets + ?Sized>(octets: &O, network: &Network) -> Result<Packet, Malformed> {
    packet(octets, network, &network.destination, &network.source, true)
}

#[inline(always)]
fn packet<O: Octets + ?Sized>(
    octets: &O,
    network: &Network,
    remote: &Address,
    local: &Address,
    out: bool,
) -> Result<Packet, Malformed> {
    let mut flow =
        Flow { remote: *remote, local: *local, remote_port: 0, local_port: 0, protocol: network.protocol };
    if let Fragment::Later(id) = network.fragment {
        return Ok(Packet { flow, kind: Kind::LaterFragment { id } });
    }
    if matches!(network.protocol, protocol::ICMP | protocol::ICMPV6) {
        return icmp(octets, network, flow, out);
    }
    let kind = Kind::Direct(ports(octets, network.protocol, network.payload, &mut flow, out)?);
    Ok(Packet { flow, kind })
}

/// Reads the ports; `from_service` if the packet at hand was sent by the service.
#[inline(always)]
fn ports<O: Octets + ?Sized>(
    octets: &O,
    number: u8,
    offset: u32,
    flow: &mut Flow,
    from_service: bool,
) -> Result<Transport, Malformed> {
    if !matches!(number, protocol::TCP | protocol::UDP) {
        return Ok(Transport::Other);
    }
    let p: [u8; 4] = octets.at(offset).ok_or(Malformed)?;
    let (source, destination) = (u16::from_ne_bytes([p[0], p[1]]), u16::from_ne_bytes([p[2], p[3]]));
    (flow.local_port, flow.remote_port) =
        if from_service { (source, destination) } else { (destination, source) };
    if number == protocol::UDP {
        return Ok(Transport::Udp);
    }
    // Only the eight bytes of RFC 792 are sure to be there in an error, so its flags are not read; the caller drops
    // them.
    let [flags] = octets.at(offset + 13).unwrap_or([0]);
    Ok(Transport::Tcp { flags })
}

#[inline(always)]
fn icmp<O: Octets + ?Sized>(
    octets: &O,
    network: &Network,
    mut flow: Flow,
    out: bool,
) -> Result<Packet, Malformed> {
    let h: [u8; 8] = octets.at(network.payload).ok_or(Malformed)?;
    let error = if network.v6 { h[0] < 128 } else { matches!(h[0], 3 | 11 | 12) };
    if !error {
        // The identifier of an echo stands where a client's port would: it tells two pings of one client apart.
        flow.remote_port = u16::from_ne_bytes([h[4], h[5]]);
        return Ok(Packet { flow, kind: Kind::Direct(Transport::Other) });
    }
    let inner = quoted(octets, network)?;
    // An inbound error quotes what the service sent; an outbound one quotes what the client sent.
    (flow.local, flow.remote) =
        if out { (inner.destination, inner.source) } else { (inner.source, inner.destination) };
    flow.protocol = inner.protocol;
    if let Fragment::Later(id) = inner.fragment {
        return Ok(Packet { flow, kind: Kind::LaterFragment { id } });
    }
    if matches!(inner.protocol, protocol::ICMP | protocol::ICMPV6) {
        let e: [u8; 8] = octets.at(inner.payload).ok_or(Malformed)?;
        flow.remote_port = u16::from_ne_bytes([e[4], e[5]]);
        return Ok(Packet { flow, kind: Kind::Error(Transport::Other) });
    }
    let transport = ports(octets, inner.protocol, inner.payload, &mut flow, !out)?;
    Ok(Packet { flow, kind: Kind::Error(transport) })
}

/// The network header that an ICMP error quotes, eight bytes behind the ICMP header (RFC 792, RFC 4443 3).
///
/// Of IPv6 only the fixed header is read: a second loop over extension headers is not worth its instructions, and
/// such an error goes to the active partition.
#[inline(always)]
fn quoted<O: Octets + ?Sized>(octets: &O, network: &Network) -> Result<Network, Malformed> {
    let offset = network.payload + 8;
    if !network.v6 {
        return ipv4(octets, offset);
    }
    let h: [u8; 40] = octets.at(offset).ok_or(Malformed)?;
    if h[0] >> 4 != 6 {
        return Err(Malformed);
    }
    let (mut source, mut destination) = ([0; 16], [0; 16]);
    source.copy_from_slice(&h[8..24]);
    destination.copy_from_slice(&h[24..40]);
    Ok(Network {
        source,
        destination,
        protocol: h[6],
        payload: offset + 40,
        fragment: Fragment::Whole,
        v6: true,
    })
}
