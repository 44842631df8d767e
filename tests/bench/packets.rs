//! Rows 8, 9 and 11: how many datagrams of 64 bytes a second get from the client to a service's socket.
//!
//! The sender is kept on one processor, where the kernel does all work on its packets up to the socket; the receiver
//! reads them on the other one. It does not sleep while they come: else what is measured is how long the hypervisor takes
//! to be told to wake a processor.

use std::io::IoSlice;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use patchswitch_tests::netlab::SERVICE;
use rustix::net::sockopt::set_socket_recv_buffer_size;
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg};

use crate::peers::{Peer, Side};
use crate::plan::pin_to;

const PORT: u16 = 7008;
/// Headers of Ethernet, IPv4 and UDP and the frame's checksum make it 64 bytes.
const PAYLOAD: usize = 64 - 14 - 20 - 8 - 4;
/// Datagrams of one system call.
const BATCH: usize = 64;
/// After this time without a datagram the reader sleeps.
const AWAKE: Duration = Duration::from_millis(2);
/// A datagram that begins so is answered.
const QUESTION: u8 = b'?';

/// Reads what comes on a wildcard socket, and counts it.
#[derive(Debug)]
pub(crate) struct Sink {
    count: Arc<AtomicU64>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    pub(crate) fn start(peer: &dyn Peer, side: Side) -> Result<Self> {
        let socket = peer.ns(side).enter(|| Ok(UdpSocket::bind(("0.0.0.0", PORT))?))?;
        set_socket_recv_buffer_size(&socket, 8 << 20)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let (count, ending) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (count, ending) = (Arc::clone(&count), Arc::clone(&ending));
            move || drain(&socket, &count, &ending)
        });
        Ok(Self { count, ending, thread: Some(thread) })
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

fn drain(socket: &UdpSocket, count: &AtomicU64, ending: &AtomicBool) {
    let mut bytes = [0; 128];
    // Where it cannot be kept there, it is measured wherever it runs.
    drop(pin_to(1));
    let (mut last, mut awake) = (Instant::now(), false);
    while !ending.load(Ordering::Relaxed) {
        match socket.recv_from(&mut bytes) {
            Ok((length, from)) => {
                count.fetch_add(1, Ordering::Relaxed);
                last = Instant::now();
                if !awake {
                    awake = socket.set_nonblocking(true).is_ok();
                }
                if bytes[0] == QUESTION {
                    drop(socket.send_to(&bytes[..length], from));
                }
            }
            Err(_) if awake && last.elapsed() > AWAKE => awake = socket.set_nonblocking(false).is_err(),
            Err(_) => std::hint::spin_loop(),
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// A flow of datagrams.
#[derive(Debug)]
pub(crate) struct Sender(UdpSocket);

impl Sender {
    /// A new one, which the service has answered once.
    pub(crate) fn open(peer: &dyn Peer) -> Result<Self> {
        let socket = peer.lab().client.enter(|| {
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            socket.connect((SERVICE[0], PORT))?;
            Ok(socket)
        })?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        let sender = Self(socket);
        sender.ask()?;
        Ok(sender)
    }

    /// Asks for an answer: the address of the neighbour is known then, and the flow is remembered where that is done.
    pub(crate) fn ask(&self) -> Result<()> {
        for _ in 0..4 {
            self.0.send(&[QUESTION; PAYLOAD])?;
            if self.0.recv(&mut [0; 64]).is_ok() {
                return Ok(());
            }
        }
        bail!("the service answers no datagram");
    }

    fn flood(&self, duration: Duration) -> Result<u64> {
        let payload = [0; PAYLOAD];
        let slices = [IoSlice::new(&payload)];
        let mut controls: Vec<_> = (0..BATCH).map(|_| SendAncillaryBuffer::default()).collect();
        let mut messages: Vec<_> =
            controls.iter_mut().map(|control| MMsgHdr::new(&slices, control)).collect();
        let (end, mut sent) = (Instant::now() + duration, 0);
        while Instant::now() < end {
            sent += sendmmsg(&self.0, &mut messages, SendFlags::empty())? as u64;
        }
        Ok(sent)
    }
}

/// What a flood came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flooded {
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) seconds: f64,
}

impl Flooded {
    /// Datagrams a second that came to the socket's reader.
    pub(crate) fn rate(&self) -> f64 {
        self.received as f64 / self.seconds
    }
}

/// Sends as fast as it goes for a time.
pub(crate) fn flood(sender: &Sender, sink: &Sink, duration: Duration) -> Result<Flooded> {
    let before = sink.count();
    let begun = Instant::now();
    let sent = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin_to(0)?;
            sender.flood(duration)
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    // What is in the socket's buffer has arrived.
    let mut last = sink.count();
    loop {
        std::thread::sleep(Duration::from_millis(5));
        let now = sink.count();
        if now == last {
            return Ok(Flooded { sent, received: now - before, seconds });
        }
        last = now;
    }
}
