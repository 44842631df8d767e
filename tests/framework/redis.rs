//! A Redis server that writes each change to its file before it answers, and a writer that remembers what it was promised.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::netlab::Ns;
use crate::programs;
use crate::written::{Noting, Written};

/// Where its clients come.
pub const PORT: u16 = 6379;
/// The server is another name of this program, which Debian has among the tools.
const PROGRAM: &str = "/usr/bin/redis-check-rdb";
/// How long a connection may take: longer than anybody has it wait.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory of a server, of its socket and its settings; gone, with the server, when it is dropped.
#[derive(Debug)]
pub struct Keys {
    directory: PathBuf,
}

impl Keys {
    /// Makes one.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new(label: &str) -> anyhow::Result<Self> {
        let directory = std::env::temp_dir().join(format!("patchswitch-{label}-{}", std::process::id()));
        std::fs::create_dir(&directory)?;
        let keys = Self { directory };
        std::os::unix::fs::symlink(PROGRAM, keys.path("redis-server"))?;
        let settings = format!(
            "bind * -::*\nprotected-mode no\nport {PORT}\nunixsocket {}\ndir {}\nlogfile {}\npidfile {}\n\
             daemonize yes\nsave \"\"\nappendonly yes\nappendfsync always\n",
            keys.path("socket"),
            keys.path(""),
            keys.path("log"),
            keys.path("pid"),
        );
        std::fs::write(keys.path("conf"), settings)?;
        Ok(keys)
    }

    /// One of its files.
    pub fn path(&self, name: &str) -> String {
        self.directory.join(name).to_string_lossy().into_owned()
    }

    /// Runs it in a namespace.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(&self, ns: &Ns) -> anyhow::Result<()> {
        ns.run(&[&self.path("redis-server"), &self.path("conf")])?;
        let end = Instant::now() + PATIENCE;
        while self.ask(&["PING"]).is_err() {
            ensure!(Instant::now() < end, "Redis did not start: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// What it answers, asked past the network.
    ///
    /// # Errors
    /// If it does not.
    pub fn ask(&self, command: &[&str]) -> anyhow::Result<String> {
        programs::run(&[&["redis-cli", "-e", "-s", &self.path("socket")], command].concat())
    }

    /// The numbers that a writer has put there, in their order.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn rows(&self, key: &str) -> anyhow::Result<Vec<i64>> {
        let rows = self.ask(&["ZRANGE", key, "0", "-1"])?;
        Ok(rows.lines().map(str::parse).collect::<Result<_, _>>()?)
    }

    /// What its server has written into its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        // Ended already: nothing to do.
        drop(self.ask(&["SHUTDOWN", "NOSAVE"]));
        drop(std::fs::remove_dir_all(&self.directory));
    }
}

/// Adds numbers to a sorted set, one after the other, until it is told to end.
#[derive(Debug)]
pub struct Writer {
    ending: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Written>>,
}

impl Writer {
    /// Starts in a namespace, with a connection for so many numbers.
    pub fn start(ns: &Ns, server: IpAddr, key: &'static str, each: usize) -> Self {
        Self::start_noting(ns, server, key, each, (1, Box::new(|_| ())))
    }

    /// As well as that, from a number on, and each one that was acknowledged is noted before the next.
    pub fn start_noting(
        ns: &Ns,
        server: IpAddr,
        key: &'static str,
        each: usize,
        (first, note): Noting,
    ) -> Self {
        let (ns, ending) = (ns.clone(), Arc::<AtomicBool>::default());
        let end = Arc::clone(&ending);
        let server = SocketAddr::new(server, PORT);
        let thread =
            std::thread::spawn(move || ns.enter(|| Ok(write(server, (key, each), (first, note), &end))));
        Self { ending, thread }
    }

    /// Ends it.
    ///
    /// # Errors
    /// If it could not even begin.
    pub fn stop(self) -> anyhow::Result<Written> {
        self.ending.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn write(
    server: SocketAddr,
    (key, each): (&str, usize),
    (first, mut note): Noting,
    ending: &AtomicBool,
) -> Written {
    let (mut written, mut last, mut number) = (Written::default(), Instant::now(), first - 1);
    while !ending.load(Ordering::Relaxed) {
        let stream = match TcpStream::connect_timeout(&server, PATIENCE) {
            Ok(stream) => stream,
            Err(error) => {
                written.refused.push(error.to_string());
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        written.sessions += 1;
        for _ in 0..each {
            number += 1;
            if add(&stream, key, number).is_err() {
                written.unknown.push(number);
                break;
            }
            written.acknowledged.push(number);
            note(number);
            written.longest = written.longest.max(last.elapsed());
            last = Instant::now();
            if ending.load(Ordering::Relaxed) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    written
}

/// By the protocol's form for people: a line, and a line as the answer.
fn add(mut stream: &TcpStream, key: &str, number: i64) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("ZADD {key} {number} {number}\r\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("no answer")?;
    ensure!(answer == ":1\r\n", "{answer:?}");
    Ok(())
}
