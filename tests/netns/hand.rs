//! TCP by hand: a client that is at two places of a handshake at once, from an address that no kernel owns.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use patchswitch_tests::netlab::{CLIENT_LINK, SwitchLab, UPLINK};
use pnet::datalink::{self, Channel, Config, DataLinkReceiver, DataLinkSender};
use pnet::packet::ethernet::{EtherType, EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet::packet::ip::{IpNextHeaderProtocol, IpNextHeaderProtocols};
use pnet::packet::ipv4::{Ipv4Packet, MutableIpv4Packet};
use pnet::packet::ipv6::{Ipv6Packet, MutableIpv6Packet};
use pnet::packet::tcp::{MutableTcpPacket, TcpPacket};
use pnet::packet::{Packet as _, ipv4, tcp};
use pnet::util::MacAddr;

/// Flags of a TCP header.
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

const ETHERNET: usize = 14;
const TCP: usize = 20;
/// Addresses that the client's kernel does not have: it answers nothing that comes for them.
const NOBODY: [&str; 2] = ["10.77.0.99", "fd77::99"];
const PATIENCE: Duration = Duration::from_secs(5);

/// A TCP segment between the client and the service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) flags: u8,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) payload: Vec<u8>,
}

impl Segment {
    /// One without data.
    pub(crate) fn new(flags: u8, seq: u32, ack: u32) -> Self {
        Self { flags, seq, ack, payload: Vec::new() }
    }
}

/// One end of a connection, played by hand.
pub(crate) struct Hand {
    sender: Box<dyn DataLinkSender>,
    receiver: Box<dyn DataLinkReceiver>,
    macs: [MacAddr; 2],
    me: SocketAddr,
    service: SocketAddr,
}

/// Makes the host know where the address is that nobody has.
pub(crate) fn furnish(lab: &SwitchLab) -> anyhow::Result<()> {
    let mac = mac(lab, CLIENT_LINK)?;
    let line = |address| format!("neigh replace {address} lladdr {mac} dev {UPLINK} nud permanent\n");
    lab.host.ip_batch(&NOBODY.map(line).concat()).map(drop)
}

fn mac(lab: &SwitchLab, link: &str) -> anyhow::Result<MacAddr> {
    let ns = if link == CLIENT_LINK { &lab.client } else { &lab.host };
    let text = ns.ip(&format!("-j link show dev {link}"))?;
    let value: serde_json::Value = serde_json::from_str(&text)?;
    value[0]["address"].as_str().and_then(|mac| mac.parse().ok()).context("a link without address")
}

impl Hand {
    /// A connection from a port to one of the service's addresses.
    pub(crate) fn new(lab: &SwitchLab, service: SocketAddr, port: u16) -> anyhow::Result<Self> {
        let macs = [mac(lab, CLIENT_LINK)?, mac(lab, UPLINK)?];
        let me = SocketAddr::new(NOBODY[usize::from(service.is_ipv6())].parse()?, port);
        let channel = lab.client.enter(|| {
            let links = datalink::interfaces();
            let link = links.iter().find(|link| link.name == CLIENT_LINK).context("no link")?;
            let config = Config { read_timeout: Some(Duration::from_millis(20)), ..Config::default() };
            Ok(datalink::channel(link, config)?)
        })?;
        let Channel::Ethernet(sender, receiver) = channel else { bail!("not an Ethernet link") };
        Ok(Self { sender, receiver, macs, me, service })
    }

    /// Sends a segment.
    pub(crate) fn send(&mut self, segment: &Segment) -> anyhow::Result<()> {
        let frame = self.frame(segment)?;
        self.sender.send_to(&frame, None).context("no buffer")??;
        Ok(())
    }

    /// The next segment of the service to this connection.
    pub(crate) fn receive(&mut self) -> anyhow::Result<Segment> {
        self.next(PATIENCE)?.context("the service does not answer")
    }

    /// The next segment, if there is one in a while.
    pub(crate) fn next(&mut self, patience: Duration) -> anyhow::Result<Option<Segment>> {
        let end = Instant::now() + patience;
        while Instant::now() < end {
            let frame = match self.receiver.next() {
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => continue,
                other => other?,
            };
            let found = read(frame).filter(|(from, to, _)| *from == self.service && *to == self.me);
            if let Some((_, _, segment)) = found {
                return Ok(Some(segment));
            }
        }
        Ok(None)
    }

    fn frame(&self, segment: &Segment) -> anyhow::Result<Vec<u8>> {
        let (header, kind): (usize, EtherType) =
            if self.me.is_ipv4() { (20, EtherTypes::Ipv4) } else { (40, EtherTypes::Ipv6) };
        let mut frame = vec![0; ETHERNET + header + TCP + segment.payload.len()];
        let small = "the buffer is too small";
        let mut ethernet = MutableEthernetPacket::new(&mut frame).context(small)?;
        ethernet.set_source(self.macs[0]);
        ethernet.set_destination(self.macs[1]);
        ethernet.set_ethertype(kind);
        let length = u16::try_from(TCP + segment.payload.len())?;
        match (self.me.ip(), self.service.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut ip = MutableIpv4Packet::new(&mut frame[ETHERNET..]).context(small)?;
                ip.set_version(4);
                ip.set_header_length(5);
                ip.set_total_length(length + 20);
                ip.set_ttl(64);
                ip.set_next_level_protocol(IpNextHeaderProtocols::Tcp);
                ip.set_source(from);
                ip.set_destination(to);
                ip.set_checksum(ipv4::checksum(&ip.to_immutable()));
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut ip = MutableIpv6Packet::new(&mut frame[ETHERNET..]).context(small)?;
                ip.set_version(6);
                ip.set_payload_length(length);
                ip.set_next_header(IpNextHeaderProtocols::Tcp);
                ip.set_hop_limit(64);
                ip.set_source(from);
                ip.set_destination(to);
            }
            _ => bail!("two families in one connection"),
        }
        let mut tcp = MutableTcpPacket::new(&mut frame[ETHERNET + header..]).context(small)?;
        tcp.set_source(self.me.port());
        tcp.set_destination(self.service.port());
        tcp.set_sequence(segment.seq);
        tcp.set_acknowledgement(segment.ack);
        tcp.set_data_offset(5);
        tcp.set_flags(segment.flags);
        tcp.set_window(65_000);
        tcp.set_payload(&segment.payload);
        let sum = match (self.me.ip(), self.service.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => tcp::ipv4_checksum(&tcp.to_immutable(), &from, &to),
            (IpAddr::V6(from), IpAddr::V6(to)) => tcp::ipv6_checksum(&tcp.to_immutable(), &from, &to),
            _ => 0,
        };
        tcp.set_checksum(sum);
        Ok(frame)
    }
}

fn read(frame: &[u8]) -> Option<(SocketAddr, SocketAddr, Segment)> {
    let ethernet = EthernetPacket::new(frame)?;
    let is_tcp = |protocol: IpNextHeaderProtocol| protocol == IpNextHeaderProtocols::Tcp;
    let (from, to, bytes) = match ethernet.get_ethertype() {
        EtherTypes::Ipv4 => {
            let ip = Ipv4Packet::new(ethernet.payload()).filter(|ip| is_tcp(ip.get_next_level_protocol()))?;
            let end = usize::from(ip.get_total_length());
            (
                IpAddr::V4(ip.get_source()),
                IpAddr::V4(ip.get_destination()),
                ethernet.payload().get(20..end)?.to_vec(),
            )
        }
        EtherTypes::Ipv6 => {
            let ip = Ipv6Packet::new(ethernet.payload()).filter(|ip| is_tcp(ip.get_next_header()))?;
            let end = 40 + usize::from(ip.get_payload_length());
            (
                IpAddr::V6(ip.get_source()),
                IpAddr::V6(ip.get_destination()),
                ethernet.payload().get(40..end)?.to_vec(),
            )
        }
        _ => return None,
    };
    let tcp = TcpPacket::new(&bytes)?;
    let segment = Segment {
        flags: tcp.get_flags() & 0x3f,
        seq: tcp.get_sequence(),
        ack: tcp.get_acknowledgement(),
        payload: tcp.payload().to_vec(),
    };
    Some((SocketAddr::new(from, tcp.get_source()), SocketAddr::new(to, tcp.get_destination()), segment))
}
