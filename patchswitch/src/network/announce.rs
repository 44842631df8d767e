//! Who has an address, told to everybody on a link: a gratuitous ARP (RFC 5227, section 3), an unsolicited neighbour
//! advertisement (RFC 4861, section 7.2.6).
//!
//! A switch moves no address, so it needs none of this. An address that comes to another host or link does: until its
//! neighbours hear of it, they send to where it was.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use pnet::datalink::MacAddr;
use pnet::packet::arp::{ArpHardwareTypes, ArpOperations, MutableArpPacket};
use pnet::packet::ethernet::{EtherType, EtherTypes, MutableEthernetPacket};
use pnet::packet::icmpv6::ndp::{
    MutableNdpOptionPacket, MutableNeighborAdvertPacket, NdpOptionTypes, NeighborAdvertFlags,
};
use pnet::packet::icmpv6::{Icmpv6Packet, Icmpv6Types, checksum};
use pnet::packet::ip::IpNextHeaderProtocols;
use pnet::packet::ipv6::MutableIpv6Packet;

const ETHERNET: usize = 14;
const ARP: usize = 28;
const IPV6: usize = 40;
/// An advertisement with one option.
const ADVERTISEMENT: usize = 24 + OPTION;
/// A link-layer address option, in bytes; its own length is in units of 8 (RFC 4861, section 4.6.1).
const OPTION: usize = 8;

/// All nodes of a link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Their link-layer address (RFC 2464, section 7).
const ALL_NODES_MAC: MacAddr = MacAddr(0x33, 0x33, 0, 0, 0, 1);

/// The frame that says that a link-layer address has an address. `None` only if the library refuses its own sizes.
pub fn frame(address: IpAddr, mac: [u8; 6]) -> Option<Vec<u8>> {
    let mac = MacAddr::from(mac);
    match address {
        IpAddr::V4(address) => gratuitous_arp(address, mac),
        IpAddr::V6(address) => unsolicited_advertisement(address, mac),
    }
}

fn ethernet(frame: &mut [u8], mac: MacAddr, to: MacAddr, kind: EtherType) -> Option<()> {
    let mut ethernet = MutableEthernetPacket::new(frame)?;
    ethernet.set_destination(to);
    ethernet.set_source(mac);
    ethernet.set_ethertype(kind);
    Some(())
}

/// A request for its own address: the form that every implementation takes notice of.
fn gratuitous_arp(address: Ipv4Addr, mac: MacAddr) -> Option<Vec<u8>> {
    let mut frame = vec![0; ETHERNET + ARP];
    ethernet(&mut frame, mac, MacAddr::broadcast(), EtherTypes::Arp)?;
    let mut arp = MutableArpPacket::new(frame.get_mut(ETHERNET..)?)?;
    arp.set_hardware_type(ArpHardwareTypes::Ethernet);
    arp.set_protocol_type(EtherTypes::Ipv4);
    arp.set_hw_addr_len(6);
    arp.set_proto_addr_len(4);
    arp.set_operation(ArpOperations::Request);
    arp.set_sender_hw_addr(mac);
    arp.set_sender_proto_addr(address);
    arp.set_target_proto_addr(address);
    Some(frame)
}

/// With the override flag: who has another entry takes this one.
fn unsolicited_advertisement(address: Ipv6Addr, mac: MacAddr) -> Option<Vec<u8>> {
    let mut frame = vec![0; ETHERNET + IPV6 + ADVERTISEMENT];
    ethernet(&mut frame, mac, ALL_NODES_MAC, EtherTypes::Ipv6)?;
    let mut ip = MutableIpv6Packet::new(frame.get_mut(ETHERNET..)?)?;
    ip.set_version(6);
    ip.set_payload_length(u16::try_from(ADVERTISEMENT).ok()?);
    ip.set_next_header(IpNextHeaderProtocols::Icmpv6);
    // What has crossed a router is ignored (RFC 4861, section 7.1.2).
    ip.set_hop_limit(255);
    ip.set_source(address);
    ip.set_destination(ALL_NODES);
    let bytes = frame.get_mut(ETHERNET + IPV6..)?;
    let mut advertisement = MutableNeighborAdvertPacket::new(bytes)?;
    advertisement.set_icmpv6_type(Icmpv6Types::NeighborAdvert);
    advertisement.set_flags(NeighborAdvertFlags::Override);
    advertisement.set_target_addr(address);
    let mut option = MutableNdpOptionPacket::new(advertisement.get_options_raw_mut())?;
    option.set_option_type(NdpOptionTypes::TargetLLAddr);
    option.set_length(1);
    option.set_data(&[mac.0, mac.1, mac.2, mac.3, mac.4, mac.5]);
    let sum = checksum(&Icmpv6Packet::new(bytes)?, &address, &ALL_NODES);
    MutableNeighborAdvertPacket::new(bytes)?.set_checksum(sum);
    Some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x17];

    #[test]
    fn a_gratuitous_arp_is_what_rfc_5227_says() {
        let frame = frame("192.0.2.80".parse().unwrap(), MAC).unwrap();
        let expected = [
            &[0xff; 6][..],
            &MAC,
            &[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1],
            &MAC,
            &[192, 0, 2, 80],
            &[0; 6],
            &[192, 0, 2, 80],
        ];
        assert_eq!(frame, expected.concat());
    }

    #[test]
    fn an_unsolicited_advertisement_is_what_rfc_4861_says() {
        let address: Ipv6Addr = "2001:db8::80".parse().unwrap();
        let frame = frame(address.into(), MAC).unwrap();
        let head = [
            &[0x33, 0x33, 0, 0, 0, 1][..],
            &MAC,
            &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255],
            &address.octets(),
            &ALL_NODES.octets(),
            &[136, 0],
        ];
        let head = head.concat();
        assert_eq!(frame[..head.len()], head);
        let tail = [&[0x20, 0, 0, 0][..], &address.octets(), &[2, 1], &MAC].concat();
        assert_eq!(frame[head.len() + 2..], tail);
        // The sum over the message and its pseudo header is all ones.
        let pseudo = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], &frame[54..]].concat();
        let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
