//! Which of the frames that wait in a queue are there twice: a client that hears nothing sends its SYN again (RFC 6298 2).
//!
//! One that is delivered after its connection has come and gone would begin another one, which nobody wants and which ends
//! with a reset.

use std::collections::HashSet;
use std::net::IpAddr;

use pnet::packet::Packet as _;
use pnet::packet::ethernet::{EtherTypes, EthernetPacket};
use pnet::packet::ip::IpNextHeaderProtocols;
use pnet::packet::ipv4::Ipv4Packet;
use pnet::packet::ipv6::Ipv6Packet;
use pnet::packet::tcp::{TcpFlags, TcpPacket};

/// What makes two SYNs one: the ends and the sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Syn {
    ends: [(IpAddr, u16); 2],
    sequence: u32,
}

impl Syn {
    /// The one that a frame is, if it is one that begins a connection. With extension headers of IPv6 it is none here.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let ethernet = EthernetPacket::new(frame)?;
        match ethernet.get_ethertype() {
            EtherTypes::Ipv4 => {
                let packet = Ipv4Packet::new(ethernet.payload())?;
                let is_tcp = packet.get_next_level_protocol() == IpNextHeaderProtocols::Tcp;
                let addresses = [packet.get_source().into(), packet.get_destination().into()];
                if is_tcp && packet.get_fragment_offset() == 0 {
                    Self::of(addresses, packet.payload())
                } else {
                    None
                }
            }
            EtherTypes::Ipv6 => {
                let packet = Ipv6Packet::new(ethernet.payload())?;
                let is_tcp = packet.get_next_header() == IpNextHeaderProtocols::Tcp;
                let addresses = [packet.get_source().into(), packet.get_destination().into()];
                if is_tcp { Self::of(addresses, packet.payload()) } else { None }
            }
            _ => None,
        }
    }

    fn of([source, destination]: [IpAddr; 2], segment: &[u8]) -> Option<Self> {
        let segment = TcpPacket::new(segment)?;
        let begins = segment.get_flags() & (TcpFlags::SYN | TcpFlags::ACK | TcpFlags::RST) == TcpFlags::SYN;
        let ends = [(source, segment.get_source()), (destination, segment.get_destination())];
        begins.then(|| Self { ends, sequence: segment.get_sequence() })
    }
}

/// Those that came already.
#[derive(Debug, Default)]
pub struct Repeats(HashSet<Syn>);

impl Repeats {
    /// Whether the same came before.
    pub fn has_seen(&mut self, syn: Syn) -> bool {
        !self.0.insert(syn)
    }

    /// How many different ones came.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none came.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A segment in an IPv4 or IPv6 packet without options.
    fn frame(v6: bool, port: u16, sequence: u32, flags: u8) -> Vec<u8> {
        let mut frame = vec![0; 12];
        if v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, 6, 64]);
            frame.extend([0x20; 32]);
        } else {
            frame.extend([0x08, 0, 0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0]);
            frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        }
        frame.extend(port.to_be_bytes());
        frame.extend([0, 80]);
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        frame
    }

    #[test]
    fn a_syn_that_was_sent_again_is_one() {
        for v6 in [false, true] {
            let syn = |port, sequence| Syn::parse(&frame(v6, port, sequence, 0x02)).unwrap();
            let mut repeats = Repeats::default();
            assert!(!repeats.has_seen(syn(1000, 7)));
            assert!(repeats.has_seen(syn(1000, 7)), "v6: {v6}");
            // Another connection by the same ends, and by other ones.
            assert!(!repeats.has_seen(syn(1000, 8)) && !repeats.has_seen(syn(1001, 7)));
            assert_eq!(repeats.len(), 3);
        }
    }

    #[test]
    fn nothing_else_is_a_syn() {
        for flags in [0x10, 0x12, 0x18, 0x04, 0x06, 0x11, 0] {
            assert_eq!(Syn::parse(&frame(false, 1, 1, flags)), None, "{flags:#x}");
        }
        assert!(Syn::parse(&frame(false, 1, 1, 0xc2)).is_some(), "with congestion notification");
        let mut later = frame(false, 1, 1, 0x02);
        later[21] = 1;
        assert_eq!(Syn::parse(&later), None, "a later fragment");
        let mut datagram = frame(true, 1, 1, 0x02);
        datagram[20] = 17;
        assert_eq!(Syn::parse(&datagram), None);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Syn::parse(&bytes);
            for length in 0..54 {
                prop_assert_eq!(Syn::parse(&frame(false, 1, 1, 2)[..length]), None);
            }
        }
    }
}
