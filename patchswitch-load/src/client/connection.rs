//! One HTTP connection of the client.

use std::net::{IpAddr, SocketAddr};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::clock;
use crate::http::{self, AnswerHead};
use crate::record::ErrorKind;

/// How much of a small answer's body is looked at for the instance's marker.
const MARKER_MAX: usize = 256;
const READ_SIZE: usize = 4096;

/// An open connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    /// When its first segment was sent.
    pub(super) opened_ns: u64,
    /// Bytes that were read and belong to the next answer's head or the present body.
    buffer: Vec<u8>,
}

/// A complete small answer.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) head: AnswerHead,
    /// The beginning of its body.
    pub(super) body: Vec<u8>,
}

impl Connection {
    /// Connects. The caller notes the time before, for the case that it does not come to be.
    pub(super) async fn open(target: SocketAddr, receive_buffer: Option<u32>) -> Result<Self, ErrorKind> {
        let socket = match target.ip() {
            IpAddr::V4(_) => TcpSocket::new_v4()?,
            IpAddr::V6(_) => TcpSocket::new_v6()?,
        };
        if let Some(size) = receive_buffer {
            socket.set_recv_buffer_size(size)?;
        }
        let opened_ns = clock::now_ns();
        let stream = socket.connect(target).await?;
        Ok(Self { stream, opened_ns, buffer: Vec::new() })
    }

    /// The client's end.
    pub(super) fn local(&self) -> Option<SocketAddr> {
        self.stream.local_addr().ok()
    }

    /// Asks, and reads the whole answer.
    pub(super) async fn get(&mut self, question: &str) -> Result<Answered, ErrorKind> {
        let head = self.ask(question).await?;
        let mut body = std::mem::take(&mut self.buffer);
        let mut got = body.len() as u64;
        body.truncate(MARKER_MAX);
        let mut bytes = [0; READ_SIZE];
        while head.body.is_none_or(|wanted| got < wanted) {
            let length = self.stream.read(&mut bytes).await?;
            match (length, head.body) {
                (0, None) => break,
                (0, Some(wanted)) => return Err(ErrorKind::Short { got, wanted }),
                _ => {}
            }
            got += length as u64;
            body.extend_from_slice(&bytes[..length.min(MARKER_MAX - body.len())]);
        }
        if let Some(wanted) = head.body.filter(|wanted| got > *wanted) {
            return Err(ErrorKind::BadAnswer(format!("{got} bytes of {wanted}")));
        }
        Ok(Answered { head, body })
    }

    /// Asks, and reads the head of the answer.
    pub(super) async fn ask(&mut self, question: &str) -> Result<AnswerHead, ErrorKind> {
        self.stream.write_all(question.as_bytes()).await?;
        loop {
            if self.buffer.capacity() == self.buffer.len() {
                self.buffer.reserve(1024);
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(match self.buffer.is_empty() {
                    true => ErrorKind::Closed,
                    false => ErrorKind::BadAnswer("closed within the head".into()),
                });
            }
            let parsed = http::parse_answer(&self.buffer);
            if let Some(head) = parsed.map_err(|error| ErrorKind::BadAnswer(error.to_string()))? {
                self.buffer.drain(..head.length);
                return Ok(head);
            }
        }
    }

    /// Reads some of a body, at most `limit` bytes; empty at the end of the connection.
    pub(super) async fn read_some(&mut self, limit: usize) -> Result<Vec<u8>, ErrorKind> {
        if !self.buffer.is_empty() {
            let rest = self.buffer.split_off(limit.min(self.buffer.len()));
            return Ok(std::mem::replace(&mut self.buffer, rest));
        }
        let mut bytes = vec![0; limit.min(64 * 1024)];
        let length = self.stream.read(&mut bytes).await?;
        bytes.truncate(length);
        Ok(bytes)
    }

    /// Whether the server has closed an unused connection already, or said something unasked. Asked of the kernel:
    /// the runtime learns of it a little later.
    pub(super) fn is_stale(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        !matches!(recv(&self.stream, &mut [0; 1], flags), Err(Errno::AGAIN))
    }

    /// Waits until the server has closed an unused connection (or said something unasked).
    pub(super) async fn ended(&self) {
        loop {
            if self.stream.readable().await.is_err() {
                return;
            }
            match self.stream.try_read(&mut [0]) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                _ => return,
            }
        }
    }

    /// Waits for the server's end of the connection after its last answer, so that it is the server that closes.
    pub(super) async fn close_after_server(mut self, limit: std::time::Duration) {
        let mut bytes = [0; 64];
        // All was answered: how the connection ends is no failure of a request.
        drop(tokio::time::timeout(limit, self.stream.read(&mut bytes)).await);
    }
}
