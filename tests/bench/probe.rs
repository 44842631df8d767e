//! Probes at a steady rate, whose answers are written down with their times: datagrams of one flow, 10,000 a second, and
//! a byte on one TCP connection, 1,000 times a second, which is opened anew when it breaks.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use patchswitch_load::clock::now_ns;
use patchswitch_tests::netlab::{Ns, SERVICE};
use rustix::thread::{ClockId, Timespec, clock_nanosleep_absolute, set_current_timer_slack};

use crate::peers::{Peer, Side};

/// Where the TCP probe is answered.
pub(crate) const TCP_PROBE: u16 = 82;
const UDP_PROBE: u16 = 7009;
/// Datagrams a second.
pub(crate) const UDP_RATE: u64 = 10_000;
/// Bytes a second.
pub(crate) const TCP_RATE: u64 = 1_000;
/// How long a new connection is waited for.
const DIAL: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_millis(20);

/// An answer: when it came, and from which side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heard {
    pub(crate) at_ns: u64,
    pub(crate) side: u8,
}

/// What a probe heard.
#[derive(Debug, Default)]
pub(crate) struct Answers(pub(crate) Vec<Heard>);

impl Answers {
    /// The longest time without an answer that has a part in a window, in microseconds.
    pub(crate) fn longest_gap_us(&self, from_ns: u64, to_ns: u64) -> f64 {
        let heard = &self.0;
        let first = heard.partition_point(|one| one.at_ns <= from_ns).saturating_sub(1);
        let last = (heard.partition_point(|one| one.at_ns < to_ns) + 1).min(heard.len());
        let times = || heard[first..last].iter().map(|one| one.at_ns);
        // Nothing before or after: the window itself is all that is known.
        let before = times().next().filter(|at| *at <= from_ns).is_none().then_some(from_ns);
        let after = times().next_back().filter(|at| *at >= to_ns).is_none().then_some(to_ns);
        let moments = || before.into_iter().chain(times()).chain(after);
        let longest = moments().zip(moments().skip(1)).map(|(a, b)| b.saturating_sub(a)).max();
        longest.unwrap_or(0) as f64 / 1e3
    }

    /// Answers in a window that another side gave than the one that answered first of all.
    pub(crate) fn misrouted(&self, from_ns: u64, to_ns: u64) -> usize {
        let Some(owner) = self.0.first().map(|one| one.side) else { return 0 };
        let inside = self.0.iter().filter(|one| (from_ns..to_ns).contains(&one.at_ns));
        inside.filter(|one| one.side != owner).count()
    }
}

/// Threads that end together.
#[derive(Debug, Default)]
struct Threads {
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn spawn(&mut self, work: impl FnOnce(&AtomicBool) + Send + 'static) {
        let ending = Arc::clone(&self.ending);
        self.threads.push(std::thread::spawn(move || work(&ending)));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// Both probes and who answers them.
#[derive(Debug)]
pub(crate) struct Probes {
    udp: Arc<Mutex<Answers>>,
    tcp: Arc<Mutex<Answers>>,
    // Asking ends before answering does: a service that goes away would be a broken connection.
    asking: Threads,
    _answering: Threads,
}

impl Probes {
    /// Starts them.
    pub(crate) fn start(peer: &dyn Peer) -> Result<Self> {
        let mut answering = Threads::default();
        for side in [Side::A, Side::B] {
            answer(peer.ns(side), side, &mut answering)?;
        }
        let mut probes = Self {
            udp: Arc::default(),
            tcp: Arc::default(),
            asking: Threads::default(),
            _answering: answering,
        };
        let client = peer.lab().client.clone();
        if peer.has_udp() {
            let service = SocketAddr::new(SERVICE[0].parse()?, UDP_PROBE);
            let socket = client.enter(|| {
                let socket = UdpSocket::bind(("0.0.0.0", 0))?;
                socket.connect(service)?;
                Ok(socket)
            })?;
            socket.set_read_timeout(Some(PAUSE))?;
            let (reader, heard) = (socket.try_clone()?, Arc::clone(&probes.udp));
            probes.asking.spawn(move |ending| hear_datagrams(&reader, &heard, ending));
            probes.asking.spawn(move |ending| {
                at_rate(UDP_RATE, ending, || drop(socket.send(b"probe")));
            });
        }
        let heard = Arc::clone(&probes.tcp);
        probes.asking.spawn(move |ending| {
            let work = || {
                ask_bytes(&heard, ending);
                Ok(())
            };
            // Nothing heard is what a failure looks like in the figures.
            drop(client.enter(work));
        });
        Ok(probes)
    }

    /// Ends them: what was heard by datagrams and on the connection.
    pub(crate) fn stop(self) -> [Answers; 2] {
        drop(self.asking);
        [self.udp, self.tcp].map(|answers| {
            answers.lock().map(|mut answers| std::mem::take(&mut *answers)).unwrap_or_default()
        })
    }
}

fn note(heard: &Mutex<Answers>, byte: u8) {
    if let Ok(mut heard) = heard.lock() {
        heard.0.push(Heard { at_ns: now_ns(), side: byte });
    }
}

/// Does something at a rate, whatever became of the times before.
fn at_rate(rate: u64, ending: &AtomicBool, mut work: impl FnMut()) {
    // Without it a sleep may take 50 µs longer than asked.
    let _ = set_current_timer_slack(NonZeroU64::new(1));
    let start = rustix::time::clock_gettime(ClockId::Monotonic);
    let step = 1_000_000_000 / rate;
    for number in 1.. {
        if ending.load(Ordering::Relaxed) {
            break;
        }
        work();
        let ns = start.tv_nsec as u64 + number * step;
        let tv_sec = start.tv_sec + (ns / 1_000_000_000) as i64;
        // Late: it does not sleep at all.
        let until = Timespec { tv_sec, tv_nsec: (ns % 1_000_000_000) as i64 };
        let _ = clock_nanosleep_absolute(ClockId::Monotonic, &until);
    }
}

fn hear_datagrams(socket: &UdpSocket, heard: &Mutex<Answers>, ending: &AtomicBool) {
    let mut bytes = [0; 16];
    while !ending.load(Ordering::Relaxed) {
        if socket.recv(&mut bytes).is_ok() {
            note(heard, bytes[0]);
        }
    }
}

/// A connection, its reader on a thread of its own; another one when it breaks.
fn ask_bytes(heard: &Arc<Mutex<Answers>>, ending: &AtomicBool) {
    let Ok(address) = SERVICE[0].parse::<IpAddr>() else { return };
    while !ending.load(Ordering::Relaxed) {
        let dialled = TcpStream::connect_timeout(&SocketAddr::new(address, TCP_PROBE), DIAL);
        let Ok(mut stream) = dialled else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        let broken = AtomicBool::new(false);
        let Ok(reader) = stream.set_nodelay(true).and_then(|()| stream.try_clone()) else { continue };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                hear_bytes(reader, heard, &broken, ending);
                broken.store(true, Ordering::Relaxed);
            });
            at_rate(TCP_RATE, &broken, || {
                if ending.load(Ordering::Relaxed) || stream.write_all(b"?").is_err() {
                    broken.store(true, Ordering::Relaxed);
                }
            });
        });
    }
}

/// Until the connection is broken. One that is silent for long is as good as broken.
fn hear_bytes(mut stream: TcpStream, heard: &Mutex<Answers>, broken: &AtomicBool, ending: &AtomicBool) {
    const SILENT: u32 = 25;
    let (mut byte, mut silent) = ([0; 1], 0);
    drop(stream.set_read_timeout(Some(PAUSE)));
    while !broken.load(Ordering::Relaxed) && !ending.load(Ordering::Relaxed) && silent < SILENT {
        match stream.read(&mut byte) {
            Ok(1) => {
                note(heard, byte[0]);
                silent = 0;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => silent += 1,
            _ => return,
        }
    }
}

/// Answers both probes in a namespace, each answer one byte: who.
fn answer(ns: &Ns, side: Side, threads: &mut Threads) -> Result<()> {
    let tag = [side as u8];
    let (socket, listener) = ns.enter(|| {
        Ok((UdpSocket::bind(("0.0.0.0", UDP_PROBE))?, TcpListener::bind(("0.0.0.0", TCP_PROBE))?))
    })?;
    socket.set_read_timeout(Some(PAUSE))?;
    listener.set_nonblocking(true)?;
    threads.spawn(move |ending| {
        let mut bytes = [0; 16];
        while !ending.load(Ordering::Relaxed) {
            if let Ok((_, from)) = socket.recv_from(&mut bytes) {
                drop(socket.send_to(&tag, from));
            }
        }
    });
    threads.spawn(move |ending| {
        std::thread::scope(|scope| {
            while !ending.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => drop(scope.spawn(move || answer_bytes(stream, tag, ending))),
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
    });
    Ok(())
}

fn answer_bytes(mut stream: TcpStream, tag: [u8; 1], ending: &AtomicBool) {
    drop(stream.set_nodelay(true));
    drop(stream.set_read_timeout(Some(PAUSE)));
    while !ending.load(Ordering::Relaxed) {
        match stream.read(&mut [0; 1]) {
            Ok(1) if stream.write_all(&tag).is_ok() => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(at_us: &[(u64, u8)]) -> Answers {
        Answers(at_us.iter().map(|(at, side)| Heard { at_ns: at * 1000, side: *side }).collect())
    }

    #[test]
    fn a_gap_counts_whole_where_it_has_a_part_in_the_window() {
        let heard = answers(&[(0, 0), (100, 0), (200, 0), (700, 0), (800, 0), (900, 0)]);
        let gap = |from: u64, to: u64| heard.longest_gap_us(from * 1000, to * 1000);
        assert_eq!(gap(0, 900), 500.0);
        assert_eq!(gap(150, 250), 500.0, "begins in it");
        assert_eq!(gap(300, 400), 500.0, "reaches across it");
        assert_eq!((gap(0, 150), gap(750, 850)), (100.0, 100.0));
        assert_eq!(gap(800, 1900), 1000.0, "nothing more was heard");
        assert_eq!(answers(&[]).longest_gap_us(0, 5000), 5.0);
    }

    #[test]
    fn what_another_side_answered_is_counted() {
        let heard = answers(&[(0, 1), (100, 1), (200, 0), (300, 0), (400, 1)]);
        assert_eq!(heard.misrouted(0, 1_000_000), 2);
        assert_eq!(heard.misrouted(250_000, 1_000_000), 1);
        assert_eq!(answers(&[]).misrouted(0, 1), 0);
    }
}
