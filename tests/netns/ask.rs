//! One request at a time, and who answered it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use patchswitch_tests::netlab::Ns;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

const LIMIT: Duration = Duration::from_secs(3);

/// A connection to the service.
#[derive(Debug)]
pub(crate) struct Asking(TcpStream);

impl Asking {
    /// Connects from a namespace.
    pub(crate) fn from(ns: &Ns, to: SocketAddr) -> anyhow::Result<Self> {
        ns.enter(|| {
            let stream = TcpStream::connect_timeout(&to, LIMIT).context("no connection")?;
            stream.set_read_timeout(Some(LIMIT))?;
            Ok(Self(stream))
        })
    }

    /// Connects by a socket that somebody made for it. The time limit is the kernel's own for a SYN.
    pub(crate) fn by(socket: OwnedFd, to: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::from(socket);
        // On Linux this bounds `connect` as well.
        stream.set_write_timeout(Some(LIMIT))?;
        stream.set_read_timeout(Some(LIMIT))?;
        rustix::net::connect(&stream, &to)?;
        Ok(Self(stream))
    }

    /// Who answers a request.
    pub(crate) fn who(&mut self) -> anyhow::Result<String> {
        let body = self.get("/")?;
        Ok(String::from_utf8(body)?.trim().to_owned())
    }

    /// The body of an answer.
    pub(crate) fn get(&mut self, path: &str) -> anyhow::Result<Vec<u8>> {
        self.0.write_all(format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes())?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).context("no answer")?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head)?.to_ascii_lowercase();
        ensure!(head.starts_with("http/1.1 200"), "{head}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length = length.context("an answer without length")?.trim().parse()?;
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).context("an answer that was cut off")?;
        Ok(body)
    }
}

/// Who answers a request that comes with the first segment of a connection (RFC 7413).
pub(crate) fn who_at_once(ns: &Ns, to: SocketAddr) -> anyhow::Result<String> {
    /// `MSG_FASTOPEN` of `linux/socket.h`.
    const FAST_OPEN: SendFlags = SendFlags::from_bits_retain(0x2000_0000);
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let stream = ns.enter(|| {
        let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
        sendto(&socket, b"GET / HTTP/1.1\r\nHost: test\r\n\r\n", FAST_OPEN, &to)?;
        Ok(TcpStream::from(socket))
    })?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(String::from_utf8(Asking(stream).answer()?)?.trim().to_owned())
}

/// Who answers a new connection from a namespace.
pub(crate) fn who(ns: &Ns, to: SocketAddr) -> anyhow::Result<String> {
    Asking::from(ns, to)?.who()
}
