//! Frames byte by byte, and checksums from scratch (RFC 1071), written apart from the code under test.

use std::net::IpAddr;

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// Of UDP.
pub const UDP: u8 = 17;
/// Of SCTP.
pub const SCTP: u8 = 132;
/// Of IGMP.
pub const IGMP: u8 = 2;
/// Of DCCP.
pub const DCCP: u8 = 33;
/// Of UDP-Lite.
pub const UDP_LITE: u8 = 136;
/// Of ICMP for IPv4.
pub const ICMP: u8 = 1;
/// Of ICMP for IPv6.
pub const ICMPV6: u8 = 58;

/// Where a fragment is in its datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// In units of eight bytes.
    pub offset: u16,
    /// Whether it is not the last one.
    pub more: bool,
    /// Which datagram.
    pub id: u32,
}

/// An IP packet.
#[derive(Clone, Debug)]
pub struct Ip {
    /// Source address.
    pub from: IpAddr,
    /// Destination address, of the same family.
    pub to: IpAddr,
    /// IP protocol number of the payload.
    pub protocol: u8,
    /// Where it is in a datagram, if it is a fragment.
    pub place: Option<Place>,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers before the payload, by number; each has eight bytes.
    pub extensions: Vec<u8>,
    /// What follows all headers of the network.
    pub payload: Vec<u8>,
}

impl Ip {
    /// A whole packet without options.
    pub fn new(from: IpAddr, to: IpAddr, protocol: u8, payload: Vec<u8>) -> Self {
        Self { from, to, protocol, place: None, options: Vec::new(), extensions: Vec::new(), payload }
    }

    /// The packet's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => self.v4(from.octets(), to.octets()),
            (IpAddr::V6(from), IpAddr::V6(to)) => self.v6(from.octets(), to.octets()),
            _ => Vec::new(),
        }
    }

    fn v4(&self, from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
        let header = 20 + self.options.len();
        let place = self.place.unwrap_or_default();
        let mut bytes = vec![0x40 | (header / 4) as u8, 0];
        bytes.extend(((header + self.payload.len()) as u16).to_be_bytes());
        bytes.extend((place.id as u16).to_be_bytes());
        bytes.extend((place.offset | if place.more { 0x2000 } else { 0 }).to_be_bytes());
        bytes.extend([64, self.protocol, 0, 0]);
        bytes.extend(from);
        bytes.extend(to);
        bytes.extend(&self.options);
        let sum = finish(sum(&bytes)).to_be_bytes();
        bytes[10..12].copy_from_slice(&sum);
        bytes.extend(&self.payload);
        bytes
    }

    fn v6(&self, from: [u8; 16], to: [u8; 16]) -> Vec<u8> {
        // The numbers of what follows each header.
        let mut chain: Vec<u8> = self.extensions.clone();
        chain.extend(self.place.map(|_| 44));
        chain.push(self.protocol);
        let length = 8 * (chain.len() - 1) + self.payload.len();
        let mut bytes = vec![0x60, 0, 0, 0];
        bytes.extend((length as u16).to_be_bytes());
        bytes.extend([chain[0], 64]);
        bytes.extend(from);
        bytes.extend(to);
        for pair in chain.windows(2) {
            match (pair[0], self.place) {
                (44, Some(place)) => {
                    bytes.extend([pair[1], 0]);
                    bytes.extend((place.offset << 3 | u16::from(place.more)).to_be_bytes());
                    bytes.extend(place.id.to_be_bytes());
                }
                // An authentication header counts in units of four bytes, minus two.
                (51, _) => bytes.extend([pair[1], 0, 0, 0, 0, 0, 0, 0]),
                _ => bytes.extend([pair[1], 0, 1, 4, 0, 0, 0, 0]),
            }
        }
        bytes.extend(&self.payload);
        bytes
    }

    /// A frame for a link.
    pub fn frame(&self, mac: [u8; 6]) -> Vec<u8> {
        let kind: u16 = if self.from.is_ipv4() { 0x0800 } else { 0x86dd };
        ethernet(mac, kind, &self.bytes())
    }
}

/// Who sends all frames: the partitions' link address.
pub const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A frame of any kind.
pub fn ethernet(mac: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&mac[..], &SENDER, &kind.to_be_bytes(), payload].concat()
}

/// A TCP segment, with its checksum.
pub fn tcp(from: (IpAddr, u16), to: (IpAddr, u16), flags: u8, payload: &[u8]) -> Ip {
    let mut bytes = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(payload);
    let mut ip = Ip::new(from.0, to.0, TCP, bytes);
    seal(&mut ip, 16);
    ip
}

/// A datagram, with its checksum.
pub fn udp(from: (IpAddr, u16), to: (IpAddr, u16), payload: &[u8]) -> Ip {
    let mut bytes = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    bytes.extend(((8 + payload.len()) as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    let mut ip = Ip::new(from.0, to.0, UDP, bytes);
    seal(&mut ip, 6);
    ip
}

/// A packet of an SCTP association. Its checksum sums up no address, so that any number will do that nobody may change.
pub fn sctp(from: (IpAddr, u16), to: (IpAddr, u16), chunk: &[u8]) -> Ip {
    let mut bytes = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    bytes.extend([0x12, 0x34, 0x56, 0x78, 0xca, 0xfe, 0xba, 0xbe]);
    bytes.extend(chunk);
    Ip::new(from.0, to.0, SCTP, bytes)
}

/// An ICMP message of the family of the addresses, with its checksum.
pub fn icmp(from: IpAddr, to: IpAddr, kind: u8, rest: [u8; 4], payload: &[u8]) -> Ip {
    let bytes = [&[kind, 0, 0, 0], &rest[..], payload].concat();
    let mut ip = Ip::new(from, to, if from.is_ipv4() { ICMP } else { ICMPV6 }, bytes);
    seal(&mut ip, 2);
    ip
}

/// Sets the checksum at an offset of the payload.
pub fn seal(ip: &mut Ip, at: usize) {
    ip.payload[at..at + 2].fill(0);
    let mut value = finish(payload_sum(ip));
    if matches!(ip.protocol, UDP | UDP_LITE) && value == 0 {
        value = 0xffff;
    }
    ip.payload[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// The sum that the checksum of the payload completes: with the pseudo header, but for ICMP of IPv4.
pub fn payload_sum(ip: &Ip) -> u32 {
    let length = ip.payload.len() as u16;
    let mut bytes = match (ip.from, ip.to) {
        _ if ip.protocol == ICMP => Vec::new(),
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => Vec::new(),
    };
    if ip.protocol != ICMP {
        bytes.extend(length.to_be_bytes());
        bytes.extend([0, ip.protocol]);
    }
    bytes.extend(&ip.payload);
    sum(&bytes)
}

/// Sum of 16-bit words.
pub fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(*high) << 8,
        _ => 0,
    });
    words.sum()
}

/// Folds a sum into a checksum.
pub fn finish(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
