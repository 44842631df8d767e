//! Who says of himself on a link that he has an address: ARP (RFC 826, RFC 5227), neighbour discovery (RFC 4861,
//! RFC 4862).
//!
//! Whoever sends as an address claims it; whoever probes for one is about to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use pnet::packet::Packet as _;
use pnet::packet::arp::{ArpHardwareTypes, ArpOperations, ArpPacket};
use pnet::packet::ethernet::{EtherTypes, EthernetPacket};
use pnet::packet::icmpv6::ndp::{NdpOptionType, NdpOptionTypes, NeighborAdvertPacket, NeighborSolicitPacket};
use pnet::packet::icmpv6::{Icmpv6Packet, Icmpv6Types, checksum};
use pnet::packet::ip::IpNextHeaderProtocols;
use pnet::packet::ipv6::Ipv6Packet;
use serde::Serialize;

/// Both messages have their options behind so many bytes (RFC 4861, sections 4.3 and 4.4).
const FIXED: usize = 24;
/// The length of an option counts these (RFC 4861, section 4.6).
const UNIT: usize = 8;

/// What a frame says about who has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// The link-layer address of who has it, or wants to.
    pub mac: [u8; 6],
    /// How it is said.
    pub kind: Kind,
}

/// How somebody says that he has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// By a request or a reply of ARP from it; a gratuitous one is one of these.
    Arp,
    /// By an ARP probe: he asks whether it is free.
    ArpProbe,
    /// By a neighbour advertisement for it.
    Advertisement,
    /// By a neighbour solicitation from it.
    Solicitation,
    /// By the solicitation of duplicate address detection: he asks whether it is free.
    DadProbe,
}

impl Kind {
    /// Its name on the screen.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Arp => "ARP",
            Self::ArpProbe => "an ARP probe",
            Self::Advertisement => "a neighbour advertisement",
            Self::Solicitation => "a neighbour solicitation",
            Self::DadProbe => "duplicate address detection",
        }
    }
}

/// Reads a frame. `None`: it claims nothing, or is none that anybody would listen to.
pub fn read(frame: &[u8]) -> Option<Claim> {
    let ethernet = EthernetPacket::new(frame)?;
    match ethernet.get_ethertype() {
        EtherTypes::Arp => arp(ethernet.payload()),
        EtherTypes::Ipv6 => discovery(ethernet.payload(), ethernet.get_source().octets()),
        _ => None,
    }
}

fn arp(bytes: &[u8]) -> Option<Claim> {
    let arp = ArpPacket::new(bytes)?;
    let is_ours = arp.get_hardware_type() == ArpHardwareTypes::Ethernet
        && arp.get_protocol_type() == EtherTypes::Ipv4
        && (arp.get_hw_addr_len(), arp.get_proto_addr_len()) == (6, 4);
    let asks = arp.get_operation() == ArpOperations::Request;
    if !is_ours || !(asks || arp.get_operation() == ArpOperations::Reply) {
        return None;
    }
    let mac = arp.get_sender_hw_addr().octets();
    match (arp.get_sender_proto_addr(), asks) {
        (Ipv4Addr::UNSPECIFIED, true) => {
            Some(Claim { address: arp.get_target_proto_addr().into(), mac, kind: Kind::ArpProbe })
        }
        (Ipv4Addr::UNSPECIFIED, false) => None,
        (sender, _) => Some(Claim { address: sender.into(), mac, kind: Kind::Arp }),
    }
}

/// A message of neighbour discovery that passes the checks of RFC 4861, section 7.1.
fn discovery(bytes: &[u8], from: [u8; 6]) -> Option<Claim> {
    let ip = Ipv6Packet::new(bytes)?;
    if ip.get_next_header() != IpNextHeaderProtocols::Icmpv6 || ip.get_hop_limit() != 255 {
        return None;
    }
    // What follows the packet in the frame is padding.
    let message = ip.payload();
    let icmp = Icmpv6Packet::new(message)?;
    let (source, destination) = (ip.get_source(), ip.get_destination());
    if icmp.get_icmpv6_code().0 != 0 || icmp.get_checksum() != checksum(&icmp, &source, &destination) {
        return None;
    }
    match icmp.get_icmpv6_type() {
        Icmpv6Types::NeighborAdvert => {
            let advertisement = NeighborAdvertPacket::new(message)?;
            let mac = link_address(message.get(FIXED..)?, NdpOptionTypes::TargetLLAddr, from)?;
            Some(Claim { address: advertisement.get_target_addr().into(), mac, kind: Kind::Advertisement })
        }
        Icmpv6Types::NeighborSolicit => {
            let solicitation = NeighborSolicitPacket::new(message)?;
            let mac = link_address(message.get(FIXED..)?, NdpOptionTypes::SourceLLAddr, from)?;
            Some(match source {
                Ipv6Addr::UNSPECIFIED => {
                    Claim { address: solicitation.get_target_addr().into(), mac, kind: Kind::DadProbe }
                }
                source => Claim { address: source.into(), mac, kind: Kind::Solicitation },
            })
        }
        _ => None,
    }
}

/// The link-layer address that an option of this type names, else the one from which the message came. `None`: the
/// options are none, and nobody listens to such a message.
///
/// Read by hand: the library's own reader panics at lengths that it does not expect.
fn link_address(mut options: &[u8], wanted: NdpOptionType, from: [u8; 6]) -> Option<[u8; 6]> {
    let mut mac = from;
    while let [kind, units @ 1..=u8::MAX, ..] = *options {
        let (option, rest) = options.split_at_checked(UNIT * usize::from(units))?;
        if kind == wanted.0 {
            mac = option.get(2..8)?.try_into().ok()?;
        }
        options = rest;
    }
    options.is_empty().then_some(mac)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::announce;
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x17];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 0x99];

    fn v4() -> IpAddr {
        "192.0.2.80".parse().unwrap()
    }

    fn v6() -> IpAddr {
        "2001:db8::80".parse().unwrap()
    }

    fn claim(address: IpAddr, mac: [u8; 6], kind: Kind) -> Option<Claim> {
        Some(Claim { address, mac, kind })
    }

    #[test]
    fn what_is_announced_is_a_claim() {
        let frame = announce::frame(v4(), MAC).unwrap();
        assert_eq!(read(&frame), claim(v4(), MAC, Kind::Arp));
        let frame = announce::frame(v6(), MAC).unwrap();
        assert_eq!(read(&frame), claim(v6(), MAC, Kind::Advertisement));
        // Padding of a short frame changes nothing.
        assert_eq!(read(&[frame, vec![0; 20]].concat()), claim(v6(), MAC, Kind::Advertisement));
    }

    /// An ARP message from `OTHER`'s frame: what is asked, who asks, about whom.
    fn arp(operation: u8, sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let head = [&[0xff; 6][..], &OTHER, &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation], &MAC].concat();
        [&head[..], &sender, &[0; 6], &target].concat()
    }

    #[test]
    fn every_arp_message_claims_its_sender_and_a_probe_its_target() {
        let (ours, theirs) = ([192, 0, 2, 80], [192, 0, 2, 9]);
        // It is the sender in the message that counts, not that of the frame.
        assert_eq!(read(&arp(1, ours, theirs)), claim(v4(), MAC, Kind::Arp));
        assert_eq!(read(&arp(2, ours, theirs)), claim(v4(), MAC, Kind::Arp));
        assert_eq!(read(&arp(1, [0; 4], ours)), claim(v4(), MAC, Kind::ArpProbe));
        assert_eq!(read(&arp(1, theirs, ours)).unwrap().address, IpAddr::from(theirs), "he asks for ours");
        // A reply of nobody, an operation of another protocol, other sizes.
        assert_eq!(read(&arp(2, [0; 4], ours)), None);
        assert_eq!(read(&arp(3, ours, ours)), None);
        for (at, value) in [(15, 6), (16, 0x86), (18, 8), (19, 16)] {
            let mut other = arp(1, ours, theirs);
            other[at] = value;
            assert_eq!(read(&other), None, "byte {at}");
        }
    }

    /// A message of neighbour discovery about `v6()` in a frame from `OTHER`.
    fn message(kind: u8, source: Ipv6Addr, options: &[u8]) -> Vec<u8> {
        let IpAddr::V6(target) = v6() else { unreachable!() };
        let to: Ipv6Addr = "ff02::1:ff00:80".parse().unwrap();
        let mut icmp = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), options].concat();
        let sum = checksum(&Icmpv6Packet::new(&icmp).unwrap(), &source, &to);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let length = u8::try_from(icmp.len()).unwrap();
        let head =
            [&[0x33, 0x33, 0xff, 0, 0, 0x80][..], &OTHER, &[0x86, 0xdd, 0x60, 0, 0, 0, 0, length, 58, 255]];
        [head.concat(), source.octets().to_vec(), to.octets().to_vec(), icmp].concat()
    }

    const TARGET_OPTION: [u8; 8] = [2, 1, 2, 0, 0, 0, 0, 0x17];
    const SOURCE_OPTION: [u8; 8] = [1, 1, 2, 0, 0, 0, 0, 0x17];

    #[test]
    fn discovery_claims_by_its_kind_and_source() {
        let IpAddr::V6(ours) = v6() else { unreachable!() };
        let theirs: Ipv6Addr = "fe80::9".parse().unwrap();
        let nobody = Ipv6Addr::UNSPECIFIED;
        for (kind, source, options, expected) in [
            (136, theirs, &TARGET_OPTION[..], claim(v6(), MAC, Kind::Advertisement)),
            (136, theirs, &[], claim(v6(), OTHER, Kind::Advertisement)),
            // Another option before it (a nonce), as long as it says.
            (
                136,
                theirs,
                &[&[14, 1, 1, 2, 3, 4, 5, 6], &TARGET_OPTION[..]].concat(),
                claim(v6(), MAC, Kind::Advertisement),
            ),
            (135, nobody, &[], claim(v6(), OTHER, Kind::DadProbe)),
            (135, ours, &SOURCE_OPTION, claim(v6(), MAC, Kind::Solicitation)),
            (135, theirs, &SOURCE_OPTION, claim(theirs.into(), MAC, Kind::Solicitation)),
            (134, ours, &[], None),
            // Options of no length, longer than the message, or cut off.
            (136, theirs, &[2, 0, 0, 0, 0, 0, 0, 0], None),
            (136, theirs, &[14, 255, 0, 0, 0, 0, 0, 0], None),
            (136, theirs, &[14], None),
        ] {
            assert_eq!(read(&message(kind, source, options)), expected, "{kind} from {source} {options:?}");
        }
    }

    #[test]
    fn what_has_crossed_a_router_or_was_damaged_claims_nothing() {
        let IpAddr::V6(ours) = v6() else { unreachable!() };
        let good = message(136, ours, &TARGET_OPTION);
        assert!(read(&good).is_some());
        // The hop limit, the protocol, the code, the sum, the target.
        for at in [21, 20, 55, 56, 70] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(read(&bad), None, "byte {at}");
        }
        for length in 0..good.len() {
            assert_eq!(read(&good[..length]), None, "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn no_frame_makes_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..160), v6: bool) {
            if bytes.len() > 21 {
                let kind = if v6 { [0x86, 0xdd] } else { [8, 6] };
                bytes[12..14].copy_from_slice(&kind);
                (bytes[20], bytes[21]) = (58, 255);
            }
            let _ = read(&bytes);
        }

        #[test]
        fn no_options_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..160)) {
            let mac = link_address(&bytes, NdpOptionTypes::SourceLLAddr, MAC);
            prop_assert!(mac.is_none() || bytes.len() % UNIT == 0);
        }
    }
}
