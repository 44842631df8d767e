//! Sends packets through the loaded programs before anything depends on them.
//!
//! A wrong namespace id makes every lookup find nothing: the switch would look fine and reset every old connection.
//! So there is a twin of the object that is attached to nothing. Before a partition counts as attached, the twin is
//! told the same partitions. A connected socket is opened in each of them, the twin's word is set as if the other one served,
//! and a packet of that flow must still go to the socket's owner, and a packet of an unknown flow must not. The packets
//! run through the program in the kernel (`BPF_PROG_TEST_RUN`) and touch no wire.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use patchswitch_common::Slot;
use patchswitch_common::maps::SlotEntry;
use patchswitch_common::verdict::{Hook, Verdict};
use patchswitch_common::word::Word;
use pnet::packet::ethernet::{EtherTypes, MutableEthernetPacket};
use pnet::packet::ip::IpNextHeaderProtocols;
use pnet::packet::ipv4::{self, MutableIpv4Packet};
use pnet::packet::ipv6::MutableIpv6Packet;
use pnet::packet::udp::{self, MutableUdpPacket};

use super::DataplaneError;
use super::attach::Point;
use super::counters;
use super::load::{self, refused};
use super::maps;
use crate::host::linux::netns::{Netns, NetnsError};

const ETHERNET: usize = 14;
const UDP: usize = 8;
/// A peer that exists nowhere: documentation addresses (RFC 5737, RFC 3849), never sent to.
const PEER_PORT: u16 = 9;

/// A partition and an address that it holds.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Its slot.
    pub slot: Slot,
    /// Its network namespace.
    pub netns: &'a Netns,
    /// A service address that it has.
    pub address: IpAddr,
}

/// The programs would deliver to the wrong place.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No socket in the partition.
    #[error("failed to open a test socket on {address} in network namespace {netns}")]
    Socket {
        /// The service address.
        address: IpAddr,
        /// The namespace.
        netns: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A packet would go to the wrong partition.
    #[error("self-test failed: a packet of {what} to {address} would go {got} instead of {wanted}")]
    Wrong {
        /// Which flow.
        what: &'static str,
        /// The service address.
        address: IpAddr,
        /// The verdict that was counted.
        got: String,
        /// The verdict that is right.
        wanted: &'static str,
    },
    /// What XDP redirected did not arrive.
    #[error(
        "self-test failed: a frame that XDP redirected to {address} did not arrive in network namespace {netns}; that \
         takes generic receive offload on the service's link inside (`ethtool -k`), an MTU of that link that is no \
         smaller than the uplink's, and a firewall inside that lets a datagram from {peer} pass; or use --hook tc"
    )]
    Lost {
        /// The service address.
        address: IpAddr,
        /// The namespace.
        netns: String,
        /// From where the frame came.
        peer: IpAddr,
    },
}

/// The pins of a loaded object that is attached to nothing.
struct Twin<'a> {
    directory: &'a Path,
    program: SchedClassifier,
}

impl<'a> Twin<'a> {
    fn open(directory: &'a Path, slots: &[SlotEntry; 2]) -> Result<Self, DataplaneError> {
        for (slot, entry) in [Slot::A, Slot::B].into_iter().zip(slots) {
            maps::write_slot(directory, slot, entry)?;
        }
        Ok(Self { directory, program: load::open(directory, Point::Uplink)? })
    }

    fn send(&self, frame: &[u8]) -> Result<(), DataplaneError> {
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        let sent = self.program.test_run(options);
        sent.map(drop).map_err(|error| refused("test", Point::Uplink.program(), &error))
    }
}

/// Makes the twin of programs that are being pinned.
pub(super) fn prepare(directory: &Path, addresses: &[IpAddr], xdp: bool) -> Result<(), DataplaneError> {
    load::load_and_pin_twin(directory, xdp)?;
    maps::write_addresses(directory, &super::on_wire(addresses))
}

pub(super) fn run(directory: &Path, slots: &[SlotEntry; 2], ends: &[End<'_>]) -> Result<(), DataplaneError> {
    let twin = Twin::open(directory, slots)?;
    ends.iter().try_for_each(|end| check(&twin, end))
}

fn check(twin: &Twin<'_>, end: &End<'_>) -> Result<(), DataplaneError> {
    let peer = peer(end.address);
    let socket = open_socket(end)?;
    let port = socket.local_addr().map_err(failed(end))?.port();
    let other = end.slot.other();
    maps::write_word(twin.directory, Word::steady(end.slot, 0).taken_over_by(other))?;
    expect(twin, end.address, "a flow with a socket", &packet(peer, end.address, port), verdict(end.slot))?;
    // Port 1 is privileged and was not given to the socket above.
    expect(twin, end.address, "an unknown flow", &packet(peer, end.address, 1), verdict(other))
}

/// Who a packet to an address says that it is from.
pub(super) fn peer(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => IpAddr::from([192, 0, 2, 9]),
        IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9]),
    }
}

fn failed(end: &End<'_>) -> impl Fn(io::Error) -> SelfTestError {
    let (address, netns) = (end.address, end.netns.to_string());
    move |source| SelfTestError::Socket { address, netns: netns.clone(), source }
}

/// A socket of the partition that is connected to the peer.
pub(super) fn open_socket(end: &End<'_>) -> Result<UdpSocket, SelfTestError> {
    let open = || -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind(SocketAddr::new(end.address, 0))?;
        socket.connect(SocketAddr::new(peer(end.address), PEER_PORT))?;
        Ok(socket)
    };
    end.netns.run(open)?.map_err(failed(end))
}

pub(super) const fn verdict(slot: Slot) -> Verdict {
    match slot {
        Slot::A => Verdict::ToA,
        Slot::B => Verdict::ToB,
    }
}

fn expect(
    twin: &Twin<'_>,
    address: IpAddr,
    what: &'static str,
    frame: &[u8],
    wanted: Verdict,
) -> Result<(), DataplaneError> {
    expect_at(Hook::Uplink, twin.directory, address, what, wanted, || twin.send(frame))
}

/// Sends a packet, of which the twin's program at a hook has to count what is right.
pub(super) fn expect_at(
    hook: Hook,
    directory: &Path,
    address: IpAddr,
    what: &'static str,
    wanted: Verdict,
    send: impl FnOnce() -> Result<(), DataplaneError>,
) -> Result<(), DataplaneError> {
    let before = counters::read(directory)?;
    send()?;
    let after = counters::read(directory)?;
    let count = |verdict| after.packets(hook, verdict) - before.packets(hook, verdict);
    if count(wanted) == 1 {
        return Ok(());
    }
    let got = patchswitch_common::verdict::VERDICTS.into_iter().filter(|v| count(*v) > 0).map(Verdict::name);
    let got = got.collect::<Vec<_>>().join(", ");
    Err(SelfTestError::Wrong { what, address, got, wanted: wanted.name() }.into())
}

/// A UDP datagram without payload, addressed to the loopback device's MAC (all zeroes), on which the kernel runs tests.
pub(super) fn packet(peer: IpAddr, service: IpAddr, port: u16) -> Vec<u8> {
    let header = if service.is_ipv4() { 20 } else { 40 };
    let mut frame = vec![0; ETHERNET + header + UDP];
    if let Some(mut ethernet) = MutableEthernetPacket::new(&mut frame) {
        ethernet.set_ethertype(if service.is_ipv4() { EtherTypes::Ipv4 } else { EtherTypes::Ipv6 });
    }
    network(&mut frame[ETHERNET..], peer, service);
    if let Some(mut udp) = MutableUdpPacket::new(&mut frame[ETHERNET + header..]) {
        udp.set_source(PEER_PORT);
        udp.set_destination(port);
        udp.set_length(UDP as u16);
        // Over IPv4 a datagram may be without a sum; over IPv6 it is thrown away, and a sum of zero is sent as its
        // other form (RFC 8200, 8.1).
        if let (IpAddr::V6(from), IpAddr::V6(to)) = (peer, service) {
            let sum = udp::ipv6_checksum(&udp.to_immutable(), &from, &to);
            udp.set_checksum(if sum == 0 { u16::MAX } else { sum });
        }
    }
    frame
}

fn network(bytes: &mut [u8], peer: IpAddr, service: IpAddr) {
    let length = bytes.len();
    match (peer, service) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            if let Some(mut ip) = MutableIpv4Packet::new(bytes) {
                ip.set_version(4);
                ip.set_header_length(5);
                ip.set_total_length(length as u16);
                ip.set_ttl(64);
                ip.set_next_level_protocol(IpNextHeaderProtocols::Udp);
                ip.set_source(from);
                ip.set_destination(to);
                let sum = ipv4::checksum(&ip.to_immutable());
                ip.set_checksum(sum);
            }
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            if let Some(mut ip) = MutableIpv6Packet::new(bytes) {
                ip.set_version(6);
                ip.set_payload_length(UDP as u16);
                ip.set_next_header(IpNextHeaderProtocols::Udp);
                ip.set_hop_limit(64);
                ip.set_source(from);
                ip.set_destination(to);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use pnet::packet::udp::UdpPacket;

    use super::*;

    #[test]
    fn no_port_makes_a_datagram_without_a_sum() {
        let service: Ipv6Addr = "fd77::10".parse().unwrap();
        let IpAddr::V6(from) = peer(service.into()) else { panic!("another family") };
        let mut zeros = 0;
        for port in 0..=u16::MAX {
            let frame = packet(from.into(), service.into(), port);
            let udp = UdpPacket::new(&frame[ETHERNET + 40..]).unwrap();
            let right = udp::ipv6_checksum(&udp, &from, &service);
            zeros += u32::from(right == 0);
            assert_eq!(udp.get_checksum(), if right == 0 { 0xffff } else { right }, "port {port}");
        }
        assert_eq!(zeros, 1, "the test has to meet it");
    }
}
