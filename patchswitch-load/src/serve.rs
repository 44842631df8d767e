//! A small HTTP/1.1 server for tests of the switch: what it says tells which instance answered.
//!
//! | target | answer |
//! |---|---|
//! | `/`, `/id` | the tag, on a line |
//! | `/bytes?n=N&rate=R` | N bytes, the same from every instance, at most R a second |
//! | `/slow?ms=T` | the tag after T milliseconds: a request that is under way for that long |
//!
//! Every answer names the instance in a header. `SIGTERM` ends it in order: nothing new is accepted, every answer
//! from then on closes its connection, idle connections are closed, and it returns when none is left.

use std::cell::Cell;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::LocalOptions;
use tokio::sync::Notify;

use crate::http::{self, QuestionHead};

/// Idle connections are closed after this time, as nginx does.
const IDLE: Duration = Duration::from_secs(75);
const BLOCK: usize = 16 * 1024;

/// What to serve.
#[derive(Clone, Debug)]
pub struct ServeSettings {
    /// The port, on wildcard sockets of both families.
    pub port: u16,
    /// The instance's tag.
    pub tag: String,
    /// After so many answers a connection is closed, and the last one says so; none: never.
    pub close_after: Option<u32>,
}

#[derive(Debug)]
struct Server {
    settings: ServeSettings,
    /// Open connections.
    open: Cell<usize>,
    ending: Cell<bool>,
    changed: Notify,
}

/// Serves until `SIGTERM` or `SIGINT`, and then until all connections have ended. Blocks; makes its own runtime.
///
/// # Errors
/// If a socket cannot be made.
pub fn serve(settings: ServeSettings) -> io::Result<()> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build_local(LocalOptions::default())?.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let listeners = listen(settings.port)?;
        serve_until(settings, listeners, async {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        })
        .await;
        Ok(())
    })
}

/// Wildcard listeners of both families on one port; with port 0 the kernel chooses one for IPv4, and IPv6 follows.
///
/// # Errors
/// If a port is taken.
pub fn listen(port: u16) -> io::Result<[TcpListener; 2]> {
    let v4 = bind(TcpSocket::new_v4()?, (Ipv4Addr::UNSPECIFIED, port).into())?;
    let v6 = TcpSocket::new_v6()?;
    // Else it would want the IPv4 port as well.
    sockopt::set_ipv6_v6only(&v6, true)?;
    let port = v4.local_addr()?.port();
    Ok([v4, bind(v6, (Ipv6Addr::UNSPECIFIED, port).into())?])
}

fn bind(socket: TcpSocket, address: SocketAddr) -> io::Result<TcpListener> {
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(511)
}

/// Serves on given listeners until `end` completes, and then until all connections have ended. Must run where
/// [`tokio::task::spawn_local`] may be called.
pub async fn serve_until(
    settings: ServeSettings,
    listeners: [TcpListener; 2],
    end: impl Future<Output = ()>,
) {
    let server =
        Rc::new(Server { settings, open: Cell::new(0), ending: Cell::new(false), changed: Notify::new() });
    let accepting = listeners.map(|listener| tokio::task::spawn_local(accept(Rc::clone(&server), listener)));
    end.await;
    server.ending.set(true);
    for task in &accepting {
        task.abort();
    }
    for task in accepting {
        // Cancelled, as it was told.
        drop(task.await);
    }
    server.changed.notify_waiters();
    while server.open.get() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn accept(server: Rc<Server>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                server.open.set(server.open.get() + 1);
                let server = Rc::clone(&server);
                tokio::task::spawn_local(async move {
                    // A connection's error is its client's to notice.
                    drop(converse(&server, stream).await);
                    server.open.set(server.open.get() - 1);
                });
            }
            // Out of descriptors, say: they come back when connections end.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn converse(server: &Server, mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = Vec::new();
    let mut answers = 0;
    loop {
        let head = match http::parse_question(&buffer) {
            Ok(Some(head)) => head,
            Ok(None) => {
                if server.ending.get() && buffer.is_empty() {
                    return Ok(());
                }
                let read = tokio::time::timeout(IDLE, stream.read_buf(&mut buffer));
                let length = tokio::select! {
                    length = read => length??,
                    () = server.changed.notified() => continue,
                };
                if length == 0 {
                    return Ok(());
                }
                continue;
            }
            Err(_) => {
                let answer = http::answer_head(400, &server.settings.tag, 0, true);
                return stream.write_all(answer.as_bytes()).await;
            }
        };
        buffer.drain(..head.length);
        answers += 1;
        let last = server.settings.close_after.is_some_and(|limit| answers >= limit);
        let close = head.close || last || server.ending.get();
        answer(server, &mut stream, &head, close).await?;
        if close {
            return stream.shutdown().await;
        }
    }
}

async fn answer(server: &Server, stream: &mut TcpStream, head: &QuestionHead, close: bool) -> io::Result<()> {
    let tag = &server.settings.tag;
    let number = |key| http::query_value(&head.query, key).and_then(|value| value.parse::<u64>().ok());
    match (head.method.as_str(), head.path.as_str()) {
        ("GET", "/" | "/id") => {}
        ("GET", "/slow") => tokio::time::sleep(Duration::from_millis(number("ms").unwrap_or(0))).await,
        ("GET", "/bytes") => {
            let length = number("n").unwrap_or(0);
            stream.write_all(http::answer_head(200, tag, length, close).as_bytes()).await?;
            return write_bytes(stream, length, number("rate")).await;
        }
        (method, _) => {
            let status = if method == "GET" { 404 } else { 405 };
            return stream.write_all(http::answer_head(status, tag, 0, close).as_bytes()).await;
        }
    }
    let body = format!("{tag}\n");
    let text = http::answer_head(200, tag, body.len() as u64, close) + &body;
    stream.write_all(text.as_bytes()).await
}

async fn write_bytes(stream: &mut TcpStream, length: u64, rate: Option<u64>) -> io::Result<()> {
    let begin = tokio::time::Instant::now();
    let mut block = vec![0; BLOCK];
    let mut sent = 0;
    while sent < length {
        let size = usize::try_from(length - sent).unwrap_or(BLOCK).min(BLOCK);
        fill(sent, &mut block[..size]);
        stream.write_all(&block[..size]).await?;
        sent += size as u64;
        if let Some(rate) = rate.filter(|rate| *rate > 0) {
            tokio::time::sleep_until(begin + Duration::from_millis(sent * 1000 / rate)).await;
        }
    }
    Ok(())
}

/// Bytes that depend on their place alone, so that every instance sends the same, and a shifted, repeated or lost
/// piece changes the digest.
fn fill(offset: u64, bytes: &mut [u8]) {
    for (place, byte) in (offset..).zip(bytes) {
        let mixed = (place / 7).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
        *byte = u8::try_from(mixed).unwrap_or(0) ^ u8::try_from(place % 251).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_depend_on_their_place_alone() {
        let mut whole = vec![0; 5000];
        fill(0, &mut whole);
        for (from, to) in [(0, 1), (999, 2500), (2500, 5000)] {
            let mut part = vec![0; to - from];
            fill(from as u64, &mut part);
            assert_eq!(part, whole[from..to]);
        }
        assert_ne!(whole[..1000], whole[1000..2000]);
    }
}
