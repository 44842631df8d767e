//! What partitions and the host send, generated around the addresses and ports that matter.

use std::net::IpAddr;

use proptest::prelude::*;

use super::packets::{Made, arrived, body, made};
use super::{LEARNED, OF_A, OF_B};
use crate::bench::{Family, PORT};
use crate::frame::{self, Ip, ethernet, icmp};

/// The host's ports of its probes of both partitions.
pub(super) const PROBES: [u16; 2] = [6000, 6001];
/// A port whose datagrams stand for themselves.
pub(super) const STATELESS: u16 = 5353;
/// How many places a table of addresses has, and how many phases there are.
pub(super) const ENDS: usize = 24;
pub(super) const PHASES: usize = 8;
/// Where in these tables of what a partition sends are its own address and the service's, as sources, and the client and
/// the host, as destinations.
pub(super) const OWN: usize = 7;
pub(super) const SERVICE: usize = ENDS - 1;
pub(super) const CLIENT: usize = ENDS - 1;
pub(super) const HOST: usize = 8;
/// Whom frames are for; nobody here looks at it, but for the address of bridges.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 8];
const BRIDGES: [u8; 6] = [1, 0x80, 0xc2, 0, 0, 0x0e];

/// A packet of a partition or of the host, before it is damaged.
#[derive(Clone, Debug)]
pub(super) struct Sent {
    pub(super) made: Made,
    /// Which addresses it has, as places in tables of those that matter.
    pub(super) ends: (usize, usize),
    /// What the frame says that it is.
    pub(super) link: Link,
    /// What its mark is.
    pub(super) mark: u8,
    /// Where it is met, and in which phase.
    pub(super) on: u8,
    pub(super) phase: usize,
    /// The type of a message of ICMP that is no error.
    message: u8,
    /// Whether a message of neighbour discovery speaks of the service's address.
    claims: bool,
}

/// What a frame is by its link header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// IP from the partitions' link address.
    Ip,
    /// IP from another one.
    Forged,
    /// ARP: whose address the sender says to have, and whom it asks for.
    Arp(usize, usize),
    /// Of another type, to an ordinary address.
    Other(u16),
    /// Of another type, to where bridges are spoken to.
    Control(u16),
}

/// Ports that make a difference to who may send what: of servers of addresses, of names, of time.
const SOURCES: [u16; 5] = [67, 547, STATELESS, 0, 4444];
const DESTINATIONS: [u16; 10] = [OF_A, OF_B, PROBES[0], PROBES[1], 68, 546, 53, 123, 80, 0];

pub(super) fn sent() -> impl Strategy<Value = Sent> {
    let protocol = prop_oneof![
        5 => Just(frame::TCP),
        5 => Just(frame::UDP),
        4 => Just(frame::ICMP),
        1 => Just(frame::IGMP),
        1 => Just(frame::SCTP),
        1 => Just(frame::DCCP),
        1 => Just(frame::UDP_LITE),
        1 => any::<u8>(),
    ];
    let client =
        prop_oneof![4 => Just(LEARNED), 4 => prop::sample::select(&DESTINATIONS[..]), 1 => any::<u16>()];
    let server = prop_oneof![6 => Just(PORT), 1 => prop::sample::select(&SOURCES[..])];
    let message = prop_oneof![
        4 => Just(0_u8), 4 => Just(129), 1 => Just(8), 1 => Just(128), 1 => Just(5), 1 => Just(9),
        2 => Just(3), 6 => 130..138_u8, 1 => any::<u8>(),
    ];
    let ends = (0..ENDS, 0..ENDS);
    let rest = (ends, link(), any::<u8>(), 0..30_u8, 0..PHASES);
    (made(), rest, (protocol, client, server), (message, any::<bool>(), 0..10_u8)).prop_map(
        |(made, (ends, link, mark, on, phase), (protocol, client, server), (message, claims, role))| {
            let made = Made { protocol, ports: (client, server), ..made };
            Sent { made, ends, link, mark, on, phase, message, claims }.in_role(role)
        },
    )
}

fn link() -> impl Strategy<Value = Link> {
    let kinds = [0x8100, 0x88a8, 0x88cc, 0x88b5];
    prop_oneof![
        40 => Just(Link::Ip),
        2 => Just(Link::Forged),
        2 => (0..ENDS, 0..ENDS).prop_map(|(sender, target)| Link::Arp(sender, target)),
        1 => prop::sample::select(kinds.to_vec()).prop_map(Link::Other),
        1 => prop::sample::select(kinds.to_vec()).prop_map(Link::Control),
    ]
}

impl Sent {
    /// Makes some of them what chance alone seldom makes: all of a reply to a flow in flight, of an answer to a probe, of
    /// a connection under ends that are in use.
    fn in_role(self, role: u8) -> Self {
        let Self { made, on, phase, .. } = self.clone();
        let number = usize::from(on & 1);
        let (ends, ports, protocol, phase, flags) = match role {
            0..3 => ((OWN, CLIENT), (LEARNED, PORT), made.protocol, phase.max(5), made.flags),
            3 => (
                (SERVICE, CLIENT),
                ([OF_A, OF_B][1 - number], PORT),
                frame::TCP,
                phase.max(4),
                2 | made.flags & 1,
            ),
            4 => ((SERVICE, HOST), (PROBES[number], PORT), frame::TCP, phase & 4, made.flags),
            _ => return self,
        };
        let extensions = made.extensions.iter().copied().take(2).collect();
        let made = Made { ports, protocol, flags, extensions, ..made };
        Self { made, ends, phase, link: Link::Ip, mark: u8::MAX, ..self }
    }

    /// The frame, given the addresses that its ends are places of; `asked` are the ends of what an error is about.
    pub(super) fn frame(
        &self,
        family: Family,
        ends: &[[IpAddr; ENDS]; 2],
        ports: (u16, u16),
        asked: (IpAddr, IpAddr),
    ) -> Vec<u8> {
        let (from, to) = (ends[0][self.ends.0], ends[1][self.ends.1]);
        let v4 = from.is_ipv4();
        let packet = match self.made.error {
            Some(kind) => {
                let inner = match self.made.protocol {
                    frame::ICMP => self.message(family, asked.0, asked.1),
                    _ => body(&self.made, family, asked.0, asked.1, (ports.1, ports.0)),
                };
                icmp(from, to, kind, [0; 4], &inner.bytes())
            }
            None if self.made.protocol == frame::ICMP => self.message(family, from, to),
            None => body(&self.made, family, from, to, ports),
        };
        let mac = if matches!(self.link, Link::Control(_)) { BRIDGES } else { MAC };
        let frame = match self.link {
            Link::Ip | Link::Forged => packet.frame(mac),
            Link::Arp(sender, target) if v4 => ethernet(mac, 0x0806, &arp(ends[0][sender], ends[0][target])),
            Link::Arp(..) => ethernet(mac, 0x0806, &[0; 46]),
            Link::Other(kind) | Link::Control(kind) => ethernet(mac, kind, &packet.bytes()),
        };
        let mut frame = arrived(&self.made, frame);
        if self.link == Link::Forged {
            frame[11] ^= 1 << (self.mark & 7);
        }
        frame
    }

    fn message(&self, family: Family, from: IpAddr, to: IpAddr) -> Ip {
        let address = match (family.service, self.claims) {
            (IpAddr::V6(service), true) => service.octets().to_vec(),
            _ => Vec::new(),
        };
        let [high, low] = self.made.ports.0.to_be_bytes();
        let message =
            icmp(from, to, self.message, [high, low, 0, 1], &[&address, &self.made.payload[..]].concat());
        let plain = body(&self.made, family, from, to, (0, 0));
        Ip { payload: message.payload, ..plain }
    }
}

/// An ARP question.
fn arp(sender: IpAddr, target: IpAddr) -> Vec<u8> {
    let octets = |address| match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(_) => [0; 4],
    };
    let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, 1];
    bytes.extend(frame::SENDER);
    bytes.extend(octets(sender));
    bytes.extend([0; 6]);
    bytes.extend(octets(target));
    bytes
}
