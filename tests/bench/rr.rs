//! Row 10: one byte there and one byte back on a TCP connection, as fast as it goes.
//!
//! Both ends ask the kernel again and again instead of sleeping: else what is measured is how soon the hypervisor wakes
//! a processor. The service's end sleeps when nobody has asked for a while.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use patchswitch_tests::netlab::SERVICE;

use crate::peers::{Peer, Side};
use crate::plan::pin_to;
use crate::stats::quantile;

/// Where it is answered.
pub(crate) const PORT: u16 = 83;
/// After this time without a question the service's end sleeps.
const AWAKE: Duration = Duration::from_millis(2);
/// A question that is not answered within this time is an error.
const PATIENCE: Duration = Duration::from_secs(2);

/// Answers on every connection; one is in use at a time.
#[derive(Debug)]
pub(crate) struct Answerer {
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Answerer {
    pub(crate) fn start(peer: &dyn Peer, side: Side) -> Result<Self> {
        let listener = peer.ns(side).enter(|| Ok(TcpListener::bind(("0.0.0.0", PORT))?))?;
        listener.set_nonblocking(true)?;
        let ending = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let ending = Arc::clone(&ending);
            move || {
                // Where it cannot be kept there, it is measured wherever it runs. Threads that are made inherit it.
                drop(pin_to(1));
                std::thread::scope(|scope| {
                    while !ending.load(Ordering::Relaxed) {
                        match listener.accept() {
                            Ok((stream, _)) => drop(scope.spawn(|| answer(stream, &ending))),
                            Err(_) => std::thread::sleep(Duration::from_millis(2)),
                        }
                    }
                });
            }
        });
        Ok(Self { ending, thread: Some(thread) })
    }
}

impl Drop for Answerer {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn answer(mut stream: TcpStream, ending: &AtomicBool) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    let (mut byte, mut last, mut awake) = ([0; 1], Instant::now(), false);
    while !ending.load(Ordering::Relaxed) {
        match stream.read(&mut byte) {
            Ok(0) => return Ok(()),
            Ok(_) => {
                stream.write_all(&byte)?;
                last = Instant::now();
                if !awake {
                    stream.set_nonblocking(true)?;
                    awake = true;
                }
            }
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
            Err(_) if awake && last.elapsed() > AWAKE => {
                stream.set_nonblocking(false)?;
                awake = false;
            }
            Err(_) => std::hint::spin_loop(),
        }
    }
    Ok(())
}

/// The client's end.
#[derive(Debug)]
pub(crate) struct Asker(TcpStream);

impl Asker {
    pub(crate) fn open(peer: &dyn Peer) -> Result<Self> {
        let stream = peer.lab().client.enter(|| Ok(TcpStream::connect((SERVICE[0], PORT))?))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self(stream))
    }

    fn ask(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.0.write_all(b"?")?;
        loop {
            match self.0.read(&mut [0; 1]) {
                Ok(1) => return Ok(begun.elapsed()),
                Ok(_) => bail!("the connection was closed"),
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
                Err(_) if begun.elapsed() > PATIENCE => bail!("no answer within {PATIENCE:?}"),
                Err(_) => std::hint::spin_loop(),
            }
        }
    }

    /// Asks for a time: answers a second, the median time of one in microseconds, and the 99th percentile.
    pub(crate) fn converse(&mut self, duration: Duration) -> Result<[f64; 3]> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                pin_to(0)?;
                // The other end may be asleep.
                for _ in 0..20 {
                    self.ask()?;
                }
                let (begun, mut times) = (Instant::now(), Vec::new());
                while begun.elapsed() < duration {
                    times.push(self.ask()?.as_secs_f64() * 1e6);
                }
                let rate = times.len() as f64 / begun.elapsed().as_secs_f64();
                times.sort_by(f64::total_cmp);
                Ok([rate, quantile(&times, 0.5), quantile(&times, 0.99)])
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}
