//! Servers that behave, and servers that misbehave in a chosen way.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use patchswitch_load::client::{self, Settings};
use patchswitch_load::control::{self, Response};
use patchswitch_load::report::Run;
use patchswitch_load::serve::{self, ServeSettings};
use patchswitch_load::{echo, record::Failure};
use tokio::runtime::LocalOptions;
use tokio::sync::mpsc::unbounded_channel;

/// The loopback addresses.
pub(crate) const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// A short run against a port: 100 requests a second for half a second.
pub(crate) fn settings(port: u16) -> Settings {
    Settings {
        rate: 100.0,
        duration: Some(Duration::from_millis(500)),
        connections: 4,
        ..Settings::new(LOOPBACK.to_vec(), port)
    }
}

/// Runs to the end without orders.
pub(crate) fn run(settings: Settings) -> Run {
    client::run(settings, unbounded_channel().1).unwrap()
}

/// Runs, and gives orders at the same time; the last of them ends the run.
pub(crate) fn run_with(settings: Settings, orders: impl FnOnce(&dyn Fn(&str) -> Response) + Send) -> Run {
    let (sender, receiver) = unbounded_channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let sender = sender;
            orders(&|line| control::obey(line, &sender));
            control::obey("stop", &sender);
        });
        client::run(settings, receiver).unwrap()
    })
}

/// The failures of a run as words, without repetition.
pub(crate) fn kinds(failures: &[Failure]) -> Vec<String> {
    let mut kinds: Vec<_> = failures.iter().map(|failure| failure.error.to_string()).collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

/// The crate's own server; gone with the handle.
pub(crate) struct Good {
    pub(crate) port: u16,
    end: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Good {
    pub(crate) fn start(tag: &str, close_after: Option<u32>) -> Self {
        let (port_sender, port) = std::sync::mpsc::channel();
        let (end, ended) = tokio::sync::oneshot::channel();
        let tag = tag.to_owned();
        let thread = std::thread::spawn(move || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_all().build_local(LocalOptions::default()).unwrap();
            runtime.block_on(async {
                let listeners = serve::listen(0).unwrap();
                let port = listeners[0].local_addr().unwrap().port();
                port_sender.send(port).unwrap();
                let settings = ServeSettings { port, tag, close_after };
                serve::serve_until(settings, listeners, async { drop(ended.await) }).await;
            });
        });
        Self { port: port.recv().unwrap(), end: Some(end), thread: Some(thread) }
    }

    /// Ends in order: returns when all connections have ended.
    pub(crate) fn end(mut self) {
        drop(self.end.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

/// An echo service of the crate; it lives as long as the test's process.
pub(crate) fn good_echo(tag: &'static str) -> u16 {
    let sockets = echo::bind(0).unwrap();
    let port = sockets[0].local_addr().unwrap().port();
    std::thread::spawn(move || echo::serve(sockets, tag));
    port
}

/// Listeners of both families on one port, each connection given to a function on a thread of its own. They live as
/// long as the test's process.
pub(crate) fn bad(conversation: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    let conversation = Arc::new(conversation);
    let (v4, v6) = listeners();
    let port = v4.local_addr().unwrap().port();
    for listener in [v4, v6] {
        let conversation = Arc::clone(&conversation);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let conversation = Arc::clone(&conversation);
                std::thread::spawn(move || conversation(stream.unwrap()));
            }
        });
    }
    port
}

fn listeners() -> (TcpListener, TcpListener) {
    loop {
        let v4 = TcpListener::bind((LOOPBACK[0], 0)).unwrap();
        // The port may be taken in the other family.
        if let Ok(v6) = TcpListener::bind((LOOPBACK[1], v4.local_addr().unwrap().port())) {
            return (v4, v6);
        }
    }
}

/// A port on which nobody listens.
pub(crate) fn nobody() -> u16 {
    listeners().0.local_addr().unwrap().port()
}

/// Reads a question up to its empty line; false at the end of the connection.
pub(crate) fn read_question(stream: &mut TcpStream) -> bool {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => bytes.extend(byte),
            _ => return false,
        }
    }
    true
}

/// Reads questions and gives each the same answer, then closes.
pub(crate) fn answering(answer: &'static str, times: usize) -> u16 {
    bad(move |mut stream| {
        for _ in 0..times {
            if !read_question(&mut stream) || stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    })
}

/// A datagram service of both families: what it received, from whom, and its socket are given to a function.
pub(crate) fn bad_echo(answer: impl Fn(&UdpSocket, &[u8], SocketAddr) + Send + Sync + 'static) -> u16 {
    let answer = Arc::new(answer);
    let sockets = loop {
        let v4 = UdpSocket::bind((LOOPBACK[0], 0)).unwrap();
        if let Ok(v6) = UdpSocket::bind((LOOPBACK[1], v4.local_addr().unwrap().port())) {
            break [v4, v6];
        }
    };
    let port = sockets[0].local_addr().unwrap().port();
    for socket in sockets {
        let answer = Arc::clone(&answer);
        std::thread::spawn(move || {
            let mut bytes = [0; 512];
            loop {
                let (length, client) = socket.recv_from(&mut bytes).unwrap();
                answer(&socket, &bytes[..length], client);
            }
        });
    }
    port
}
