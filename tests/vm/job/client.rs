//! A client that asks all the time, each time on a new connection.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use patchswitch_tests::netlab::{Ns, SERVICE};

/// From the end of one request to the beginning of the next.
const PAUSE: Duration = Duration::from_millis(50);
/// After this time a request has failed.
const LIMIT: Duration = Duration::from_secs(2);
/// The port of the service.
pub(super) const PORT: u16 = 80;

/// One request and what came of it.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) at: Instant,
    /// The first line of the answer's body, or what went wrong.
    pub(super) answer: Result<String, String>,
}

/// Asks a service at one of its addresses, on a new connection. To be called in the client's namespace.
fn get(address: &str, limit: Duration) -> anyhow::Result<String> {
    let address = SocketAddr::new(address.parse::<IpAddr>()?, PORT);
    let mut stream = TcpStream::connect_timeout(&address, limit).context("connect")?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").context("write")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).context("read")?;
    let (head, body) = text.split_once("\r\n\r\n").context("no end of the head")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    Ok(body.trim().to_owned())
}

/// Who answers at this moment, at both addresses: they must be one and the same.
pub(super) fn who(client: &Ns) -> anyhow::Result<String> {
    who_at(client, SERVICE)
}

/// As [`who`], at other addresses.
pub(super) fn who_at(client: &Ns, addresses: [&str; 2]) -> anyhow::Result<String> {
    client.enter(|| {
        let [v4, v6] = addresses.map(|address| get(address, LIMIT));
        let (v4, v6) = (v4?, v6?);
        ensure!(v4 == v6, "{v4} answers in IPv4, {v6} in IPv6");
        Ok(v4)
    })
}

/// A connection that stays.
#[derive(Debug)]
pub(super) struct Kept(TcpStream);

impl Kept {
    /// Connects to the service.
    pub(super) fn begin(client: &Ns) -> Self {
        let address = SocketAddr::new(SERVICE[0].parse().unwrap(), PORT);
        let stream = client.enter(|| Ok(TcpStream::connect_timeout(&address, LIMIT)?)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    /// Who answers on it.
    pub(super) fn who(&mut self) -> anyhow::Result<String> {
        self.0.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).context("no answer")?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head)?.to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let mut body = vec![0; length.context("an answer without length")?.trim().parse()?];
        self.0.read_exact(&mut body).context("an answer that was cut off")?;
        Ok(String::from_utf8(body)?.trim().to_owned())
    }
}

/// A flow without a connection.
#[derive(Debug)]
pub(super) struct Datagrams {
    client: UdpSocket,
    server: UdpSocket,
}

impl Datagrams {
    /// With a partition that serves.
    pub(super) fn begin(client: &Ns, partition: &str) -> Self {
        let bind = |at: &str| -> anyhow::Result<UdpSocket> {
            let socket = UdpSocket::bind(at)?;
            socket.set_read_timeout(Some(LIMIT))?;
            Ok(socket)
        };
        // As a server that does not care for the address at which it is asked.
        let server = Ns::named(&format!("ps-{partition}")).unwrap().enter(|| bind("0.0.0.0:7007")).unwrap();
        let client = client.enter(|| bind("0.0.0.0:0")).unwrap();
        client.connect((SERVICE[0], 7007)).unwrap();
        let flow = Self { client, server };
        flow.ask();
        flow
    }

    /// The partition gets the question, and the client its answer.
    #[track_caller]
    pub(super) fn ask(&self) {
        self.client.send(b"question").unwrap();
        let (_, from) = self.server.recv_from(&mut [0; 16]).unwrap();
        self.server.send_to(b"answer", from).unwrap();
        self.client.recv(&mut [0; 16]).unwrap();
    }
}

/// Asks until it is stopped.
pub(super) struct Client {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Vec<Asked>>>,
}

impl Client {
    pub(super) fn start(client: &Ns) -> Self {
        Self::start_patient(client, LIMIT)
    }

    /// With another time after which a request has failed.
    pub(super) fn start_patient(client: &Ns, limit: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, client) = (stop.clone(), client.clone());
        let thread = std::thread::spawn(move || {
            client.enter(|| {
                let mut asked = Vec::new();
                for address in SERVICE.iter().cycle() {
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    let at = Instant::now();
                    asked.push(Asked {
                        at,
                        answer: get(address, limit).map_err(|error| format!("{error:#}")),
                    });
                    std::thread::sleep(PAUSE);
                }
                Ok(asked)
            })
        });
        Self { stop, thread }
    }

    /// Everything that was asked.
    pub(super) fn stop(self) -> Vec<Asked> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap()
    }

    /// Ends it. Every request must have been answered, and there must have been some; says who answered, in turn.
    #[track_caller]
    pub(super) fn all_answered(self) -> Vec<String> {
        let asked = self.stop();
        assert!(asked.len() > 10, "only {} requests: they prove nothing", asked.len());
        let first = asked[0].at;
        let failed: Vec<_> =
            asked.iter().filter(|one| one.answer.is_err()).map(|one| (one.at - first, &one.answer)).collect();
        assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), asked.len());
        let mut who: Vec<String> = asked.into_iter().filter_map(|one| one.answer.ok()).collect();
        who.dedup();
        who
    }
}
