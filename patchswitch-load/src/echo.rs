//! A datagram echo service on **wildcard** sockets, and the datagrams themselves.
//!
//! It answers by a plain send on the unconnected socket it received on, so the kernel chooses the source address.
//! This is what many real servers do, and what the rewrite is for: after the switch the retiring partition's
//! answers would leave with its own address.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

/// Bytes of a question; an answer repeats them and adds the instance's tag.
pub const QUESTION_LEN: usize = 16;
/// The longest datagram that is understood.
pub const DATAGRAM_MAX: usize = 512;
const MAGIC: [u8; 4] = *b"PSL1";

/// A question: whose it is, and its number.
pub fn question(session: u32, number: u64) -> [u8; QUESTION_LEN] {
    let mut bytes = [0; QUESTION_LEN];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&session.to_be_bytes());
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// Reads a question or an answer: session, number, tag (empty in a question). None if it is neither.
pub fn parse(bytes: &[u8]) -> Option<(u32, u64, &[u8])> {
    let (magic, rest) = bytes.split_first_chunk::<4>()?;
    let (session, rest) = rest.split_first_chunk::<4>()?;
    let (number, tag) = rest.split_first_chunk::<8>()?;
    (*magic == MAGIC).then(|| (u32::from_be_bytes(*session), u64::from_be_bytes(*number), tag))
}

/// A wildcard socket of each family on one port. With port 0 the kernel chooses one for IPv4, and IPv6 follows.
///
/// # Errors
/// If a port is taken.
pub fn bind(port: u16) -> io::Result<[UdpSocket; 2]> {
    let v4 = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    let port = v4.local_addr()?.port();
    let v6 = rustix::net::socket_with(
        AddressFamily::INET6,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(ipproto::UDP),
    )?;
    // Else it would want the IPv4 port as well.
    sockopt::set_ipv6_v6only(&v6, true)?;
    rustix::net::bind(&v6, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
    Ok([v4, UdpSocket::from(v6)])
}

/// Answers on both sockets until one of them fails for good.
///
/// # Errors
/// What ended it.
pub fn serve(sockets: [UdpSocket; 2], tag: &str) -> io::Result<()> {
    let (sender, receiver) = std::sync::mpsc::channel();
    for socket in sockets {
        let (sender, tag) = (sender.clone(), tag.as_bytes().to_owned());
        std::thread::Builder::new().name("echo".into()).stack_size(64 * 1024).spawn(move || {
            // If nobody listens any more, the other socket has ended it already.
            drop(sender.send(answer_all(&socket, &tag)));
        })?;
    }
    receiver.recv().map_err(io::Error::other)?
}

fn answer_all(socket: &UdpSocket, tag: &[u8]) -> io::Result<()> {
    let mut bytes = [0; DATAGRAM_MAX];
    loop {
        let (length, client) = socket.recv_from(&mut bytes)?;
        // Only questions: a tag would make two echo services talk to each other for ever.
        let question = &bytes[..length];
        if parse(question).is_none_or(|(_, _, tag)| !tag.is_empty()) {
            continue;
        }
        let answer = [question, tag].concat();
        // A client that cannot be reached, or a full queue, is that client's loss and not the service's end.
        drop(socket.send_to(&answer, client));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_are_read_as_they_were_written() {
        let asked = question(7, u64::MAX - 1);
        assert_eq!(parse(&asked), Some((7, u64::MAX - 1, &[][..])));
        assert_eq!(parse(&[&asked[..], b"blue"].concat()), Some((7, u64::MAX - 1, &b"blue"[..])));
        for cut in 0..QUESTION_LEN {
            assert_eq!(parse(&asked[..cut]), None, "{cut}");
        }
        assert_eq!(parse(b"0123456789abcdef"), None);
    }
}
