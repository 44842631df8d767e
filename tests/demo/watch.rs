//! What the kernel saw, apart from the client and from patchswitch: resets on the uplink, retransmissions.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use patchswitch_load::clock;
use patchswitch_load::report::Window;
use patchswitch_tests::netlab::{self, Ns};
use patchswitch_tests::programs::{self, Running};
use rustix::process::Signal;

/// Segments with RST in both families. An IPv6 header has 40 bytes and no extension here.
const FILTER: &str = "(tcp[tcpflags] & tcp-rst != 0) or (ip6 and ip6[6] = 6 and ip6[53] & 4 != 0)";
const START_LIMIT: Duration = Duration::from_secs(10);
const SAMPLE: Duration = Duration::from_millis(100);

/// A reset on the uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reset {
    pub(crate) at_ns: u64,
    /// tcpdump's words.
    pub(crate) text: String,
}

/// tcpdump on the uplink.
#[derive(Debug)]
pub(crate) struct Capture {
    process: Running,
    file: PathBuf,
}

impl Capture {
    /// Starts it and waits until it listens.
    pub(crate) fn start(directory: &Path) -> anyhow::Result<Self> {
        let file = directory.join("resets");
        let command = ["tcpdump", "-i", netlab::UPLINK, "-nn", "-tt", "-l", "--immediate-mode", FILTER];
        let mut process = programs::spawn(&command, Some(&file))?;
        let end = Instant::now() + START_LIMIT;
        while !process.output().contains("listening on") {
            if process.has_ended() || Instant::now() >= end {
                bail!("tcpdump did not start: {}", process.output());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { process, file })
    }

    /// Ends it and returns what it saw.
    pub(crate) fn stop(self) -> anyhow::Result<Vec<Reset>> {
        self.process.signal(Signal::INT)?;
        self.process.wait(START_LIMIT)?;
        let text = std::fs::read_to_string(&self.file).context("failed to read what tcpdump wrote")?;
        let since_boot = clock::wall_ms().saturating_sub(clock::now_ns() / 1_000_000);
        parse_resets(&text, since_boot * 1_000_000)
    }
}

/// tcpdump's lines begin with seconds since 1970; `boot_ns` is when the machine was started by that clock.
fn parse_resets(text: &str, boot_ns: u64) -> anyhow::Result<Vec<Reset>> {
    let dropped = text.lines().find_map(|line| line.strip_suffix(" packets dropped by kernel"));
    if dropped.is_none_or(|count| count != "0") {
        bail!("tcpdump missed packets or did not end: {}", dropped.unwrap_or(text));
    }
    let lines = text.lines().filter(|line| line.contains(" Flags ["));
    let parse = |line: &str| {
        let (time, rest) = line.split_once(' ')?;
        let (seconds, micros) = time.split_once('.')?;
        let seconds: u64 = seconds.parse().ok()?;
        let micros: u64 = micros.parse().ok().filter(|_| micros.len() == 6)?;
        let at_ns = (seconds * 1_000_000_000 + micros * 1000).saturating_sub(boot_ns);
        Some(Reset { at_ns, text: rest.to_owned() })
    };
    lines.map(|line| parse(line).with_context(|| format!("failed to parse tcpdump's {line:?}"))).collect()
}

/// Counts the segments that a namespace sent again, all the time.
#[derive(Debug)]
pub(crate) struct Retransmissions {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Samples>>,
}

/// A counter at some moments, in the order of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Samples(Vec<(u64, u64)>);

impl Retransmissions {
    pub(crate) fn start(client: &Ns) -> Self {
        let (client, stop) = (client.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let sample = move || {
            let mut samples = Samples::default();
            while !stopped.load(Ordering::Relaxed) {
                let text = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
                let count = tcp_counter(&text, "RetransSegs").context("there is no counter RetransSegs")?;
                samples.0.push((clock::now_ns(), count));
                std::thread::sleep(SAMPLE);
            }
            Ok(samples)
        };
        Self { stop, thread: std::thread::spawn(move || client.enter(sample)) }
    }

    pub(crate) fn stop(self) -> anyhow::Result<Samples> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_panic| anyhow!("the counting of retransmissions panicked"))?
    }
}

impl Samples {
    /// How many a second in a window, as exactly as the samples allow; none if they do not cover it.
    #[expect(clippy::cast_precision_loss, reason = "counts and times of one run stay far below 2^53")]
    pub(crate) fn per_second(&self, window: Window) -> Option<f64> {
        let before = |at: u64| self.0.iter().rev().find(|(time, _)| *time <= at);
        let (from, to) = (before(window.from_ns)?, before(window.to_ns)?);
        let seconds = (to.0 - from.0) as f64 / 1e9;
        (seconds > 0.0).then(|| (to.1 - from.1) as f64 / seconds)
    }
}

#[cfg(test)]
impl Samples {
    /// Of seconds and counts.
    pub(crate) fn of(samples: &[(u64, u64)]) -> Self {
        Self(samples.iter().map(|(seconds, count)| (seconds * 1_000_000_000, *count)).collect())
    }
}

/// A counter of `/proc/net/snmp`: a line of names, and one of values.
fn tcp_counter(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next()?, lines.next()?);
    let index = names.split(' ').position(|field| field == name)?;
    values.split(' ').nth(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_are_read_with_their_times() {
        let text = "listening on uplink0, link-type EN10MB (Ethernet)\n\
            1732298123.000250 IP 10.77.0.2.50612 > 10.77.0.10.80: Flags [R], seq 1, win 0, length 0\n\
            1732298124.500000 IP6 fd77::10.80 > fd77::2.40000: Flags [R.], seq 0, ack 1, win 0, length 0\n\
            2 packets captured\n2 packets received by filter\n0 packets dropped by kernel\n";
        let found = parse_resets(text, 1_732_298_000_000_000_000).unwrap();
        assert_eq!(
            found.iter().map(|reset| reset.at_ns).collect::<Vec<_>>(),
            [123_000_250_000, 124_500_000_000]
        );
        assert!(found[1].text.starts_with("IP6 fd77::10.80 >"));
    }

    #[test]
    fn a_capture_with_holes_is_no_evidence() {
        let end = |count| format!("1 packet captured\n{count} packets dropped by kernel\n");
        assert!(parse_resets(&end(0), 0).unwrap().is_empty());
        assert!(parse_resets(&end(1), 0).is_err());
        assert!(parse_resets("listening on uplink0\n", 0).is_err(), "it did not end");
        let odd = format!("yesterday IP 1.2.3.4.5 > 1.2.3.4.6: Flags [R]\n{}", end(0));
        assert!(parse_resets(&odd, 0).is_err());
    }

    #[test]
    fn the_counter_is_found_by_its_name() {
        let text = "Ip: Forwarding\nIp: 1\nTcp: RtoMin ActiveOpens RetransSegs InErrs\nTcp: 200 2910 17 0\n";
        assert_eq!(tcp_counter(text, "RetransSegs"), Some(17));
        assert_eq!(tcp_counter(text, "NoSuch"), None);
        assert_eq!(tcp_counter("Udp: A\nUdp: 1\n", "A"), None);
    }

    #[test]
    fn rates_are_those_of_the_window() {
        let samples =
            Samples((0..100).map(|n| (n * 100_000_000, if n < 50 { 3 } else { 3 + n - 49 })).collect());
        let rate = |from: u64, to: u64| {
            samples.per_second(Window { from_ns: from * 1_000_000_000, to_ns: to * 1_000_000_000 })
        };
        assert_eq!(rate(0, 4), Some(0.0));
        assert!((rate(5, 9).unwrap() - 10.0).abs() < 1e-9);
        assert_eq!(Samples::default().per_second(Window { from_ns: 0, to_ns: 1 }), None);
        assert_eq!(rate(3, 3), None);
    }
}
