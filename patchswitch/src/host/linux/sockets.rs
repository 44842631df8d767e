//! The kernel's list of TCP and UDP sockets (`sock_diag(7)`), and the end of one by force.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use patchswitch_common::decide::tcp_state;

use super::netns::{Netns, NetnsError};

/// `SOCK_DESTROY` of `linux/sock_diag.h`.
const SOCK_DESTROY: u16 = 21;
/// The kernel answers at once. One datagram that does not come is an error, not a wait for ever.
const ANSWER: Duration = Duration::from_secs(5);
/// A dump's answers come in datagrams of at most this size.
const DATAGRAM: usize = 64 * 1024;

/// Why sockets could not be listed or ended.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused.
    #[error("failed to {action} sockets by sock_diag")]
    Io {
        /// `list` or `end`.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel's answer was not understood.
    #[error("failed to read the kernel's answer on sockets: {0}")]
    Answer(String),
}

/// The protocols whose sockets are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    const fn number(self) -> u8 {
        match self {
            Self::Tcp => IPPROTO_TCP,
            Self::Udp => IPPROTO_UDP,
        }
    }
}

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Its protocol.
    pub protocol: Protocol,
    /// Its own end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// State as the kernel numbers it.
    pub state: u8,
    /// Of a listener: connections that nobody has accepted yet. Else bytes received and not read.
    pub receive_queue: u32,
    /// Bytes that were sent and not acknowledged; of a listener: how many connections may wait to be accepted.
    pub send_queue: u32,
    id: SocketId,
}

impl Socket {
    /// Whether it is a TCP listener.
    pub fn is_listener(&self) -> bool {
        u32::from(self.state) == tcp_state::LISTEN
    }

    /// Whether it has a peer: no listener and no unconnected UDP socket.
    pub fn is_connected(&self) -> bool {
        !matches!(u32::from(self.state), tcp_state::LISTEN | tcp_state::CLOSE)
    }

    /// The index of the device that it is bound to (`SO_BINDTODEVICE`), 0 if it is to none.
    pub fn device(&self) -> u32 {
        self.id.interface_id
    }

    /// A listener as the kernel would list it.
    #[cfg(test)]
    pub(crate) fn listening(protocol: Protocol, local: SocketAddr, device: u32) -> Self {
        let mut id = if local.is_ipv4() { SocketId::new_v4() } else { SocketId::new_v6() };
        (id.source_address, id.source_port, id.interface_id) = (local.ip(), local.port(), device);
        let remote = SocketAddr::new(id.destination_address, 0);
        Self { protocol, local, remote, state: 10, receive_queue: 0, send_queue: 0, id }
    }

    fn new(protocol: Protocol, header: InetResponseHeader) -> Self {
        let id = header.socket_id;
        Self {
            protocol,
            local: SocketAddr::new(id.source_address.to_canonical(), id.source_port),
            remote: SocketAddr::new(id.destination_address.to_canonical(), id.destination_port),
            state: header.state,
            receive_queue: header.recv_queue,
            send_queue: header.send_queue,
            id,
        }
    }
}

/// Every TCP and UDP socket of a namespace but TCP ones in `TIME_WAIT` and `CLOSE`, which carry no flow any more.
///
/// # Errors
/// [`SocketsError`].
pub fn all(netns: &Netns) -> Result<Vec<Socket>, SocketsError> {
    netns.run(|| {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            found.extend(dump(family, Protocol::Tcp)?);
            found.extend(dump(family, Protocol::Udp)?);
        }
        Ok(found)
    })?
}

/// Ends connections with a reset to both ends. Those that are gone already are not counted.
///
/// # Errors
/// [`SocketsError`]; the kernel must be built with `CONFIG_INET_DIAG_DESTROY`.
pub fn reset(netns: &Netns, sockets: &[Socket]) -> Result<usize, SocketsError> {
    netns.run(|| sockets.iter().map(destroy).sum())?
}

fn request(family: u8, protocol: Protocol, states: StateFlags, socket_id: SocketId) -> SockDiagMessage {
    let (protocol, extensions) = (protocol.number(), ExtensionFlags::empty());
    SockDiagMessage::InetRequest(InetRequest { family, protocol, extensions, states, socket_id })
}

fn dump(family: u8, protocol: Protocol) -> Result<Vec<Socket>, SocketsError> {
    let io = |source| SocketsError::Io { action: "list", source };
    let states = match protocol {
        Protocol::Tcp => StateFlags::all() & !(StateFlags::TIME_WAIT | StateFlags::CLOSE),
        Protocol::Udp => StateFlags::all(),
    };
    let id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let socket = send(header, request(family, protocol, states, id), None).map_err(io)?;
    let mut found = Vec::new();
    loop {
        let mut datagram = Vec::with_capacity(DATAGRAM);
        socket.recv(&mut datagram, 0).map_err(io)?;
        if parse(&datagram, protocol, &mut found)? {
            return Ok(found);
        }
    }
}

/// Reads one datagram of a dump; true if it was the last one.
fn parse(mut bytes: &[u8], protocol: Protocol, found: &mut Vec<Socket>) -> Result<bool, SocketsError> {
    let bad = |error: &dyn std::fmt::Display| SocketsError::Answer(error.to_string());
    while !bytes.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(bytes).map_err(|e| bad(&e))?;
        let length = (message.header.length as usize).next_multiple_of(4);
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                found.push(Socket::new(protocol, response.header));
            }
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) => return Err(bad(&error)),
            _ => {}
        }
        bytes = bytes.get(length.max(1)..).unwrap_or_default();
    }
    Ok(false)
}

fn destroy(target: &Socket) -> Result<usize, SocketsError> {
    let io = |source| SocketsError::Io { action: "end", source };
    let family = if target.id.source_address.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let message = request(family, target.protocol, StateFlags::all(), target.id.clone());
    let socket = send(header, message, Some(SOCK_DESTROY)).map_err(io)?;
    let mut answer = Vec::with_capacity(DATAGRAM);
    socket.recv(&mut answer, 0).map_err(io)?;
    let message = NetlinkMessage::<SockDiagMessage>::deserialize(&answer)
        .map_err(|error| SocketsError::Answer(error.to_string()))?;
    match message.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => match error.to_io() {
            gone if gone.raw_os_error() == Some(libc::ENOENT) => Ok(0),
            refused => Err(io(refused)),
        },
        _ => Ok(1),
    }
}

/// Sends one request on a socket of the calling thread's namespace.
fn send(
    header: NetlinkHeader,
    message: SockDiagMessage,
    kind: Option<u16>,
) -> io::Result<netlink_sys::Socket> {
    let mut packet = NetlinkMessage::new(header, message.into());
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    if let Some(kind) = kind {
        // The library knows the message only as a query; the type is bytes 4 and 5 of the header.
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
    }
    let mut socket = netlink_sys::Socket::new(NETLINK_SOCK_DIAG)?;
    rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(ANSWER))?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn connected_and_unconnected_datagram_sockets_are_told_apart() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let found = all(&Netns::own().unwrap()).unwrap();
        let find = |local| found.iter().find(|s| s.protocol == Protocol::Udp && s.local == local).unwrap();
        assert!(!find(server.local_addr().unwrap()).is_connected());
        let connected = find(client.local_addr().unwrap());
        assert!(connected.is_connected());
        assert_eq!(connected.remote, server.local_addr().unwrap());
    }

    #[test]
    fn a_listener_and_both_ends_of_a_connection_are_listed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let found = all(&Netns::own().unwrap()).unwrap();
        let service = listener.local_addr().unwrap();
        let waiting = found.iter().find(|s| s.is_listener() && s.local == service).unwrap();
        assert_eq!(waiting.receive_queue, 1, "one connection waits for accept");
        let (near, far) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        assert!(found.iter().any(|s| (s.local, s.remote) == (near, far)));
        assert!(found.iter().any(|s| (s.local, s.remote) == (far, near)));
    }

    #[test]
    fn garbage_is_an_error_and_not_a_panic() {
        for length in 1..40 {
            let mut found = Vec::new();
            let bytes = vec![0xa5; length];
            assert!(parse(&bytes, Protocol::Tcp, &mut found).is_err() || found.is_empty());
        }
    }
}
