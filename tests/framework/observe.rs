//! Looking at traffic with the kernel's own eyes.
//!
//! A load client that saw no failure proves little, because TCP repeats what was lost. What it repeated, and what
//! was reset, is in the kernel's counters and on the wire.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use rustix::process::Signal;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::netlab::Ns;
use crate::programs::{self, Running};

/// The counters of a network namespace: `Tcp.RetransSegs`, `TcpExt.ListenDrops`, `Ip6.InReceives`, …
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters(BTreeMap<String, i64>);

impl Counters {
    /// Of the namespace that the calling thread is in.
    ///
    /// # Errors
    /// If `/proc` cannot be read or has another format.
    pub fn here() -> anyhow::Result<Self> {
        Self::read("/proc/thread-self")
    }

    /// Of the namespace of a laboratory.
    ///
    /// # Errors
    /// As [`Counters::here`].
    pub fn of(ns: &Ns) -> anyhow::Result<Self> {
        ns.enter(Self::here)
    }

    /// Of the namespace of a process.
    ///
    /// # Errors
    /// As [`Counters::here`].
    pub fn of_process(pid: u32) -> anyhow::Result<Self> {
        Self::read(&format!("/proc/{pid}"))
    }

    fn read(process: &str) -> anyhow::Result<Self> {
        let file = |name: &str| {
            let path = format!("{process}/net/{name}");
            std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))
        };
        Self::parse(&file("snmp")?, &file("netstat")?, &file("snmp6")?)
    }

    /// Reads the texts of `snmp`, `netstat` and `snmp6`.
    ///
    /// # Errors
    /// If a line of names is not followed by its line of values.
    pub fn parse(snmp: &str, netstat: &str, snmp6: &str) -> anyhow::Result<Self> {
        let mut counters = BTreeMap::new();
        for text in [snmp, netstat] {
            let lines: Vec<&str> = text.lines().collect();
            for pair in lines.chunks(2) {
                let [names, values] = pair else { bail!("a line of names without values: {pair:?}") };
                let (group, names) = names.split_once(':').context("no group in a line of names")?;
                let (other, values) = values.split_once(':').context("no group in a line of values")?;
                let (names, values) = (words(names), words(values));
                if group != other || names.len() != values.len() {
                    bail!("the values of {group} do not fit their names");
                }
                for (name, value) in names.iter().zip(values) {
                    counters.insert(format!("{group}.{name}"), number(value)?);
                }
            }
        }
        for line in snmp6.lines() {
            let [name, value] = words(line)[..] else { bail!("not a name and a value: {line}") };
            // `Ip6InReceives` is `Ip6.InReceives` here.
            let group =
                ["UdpLite6", "Icmp6", "Udp6", "Ip6"].into_iter().find(|group| name.starts_with(group));
            let key = group.map_or_else(|| name.to_owned(), |g| format!("{g}.{}", &name[g.len()..]));
            counters.insert(key, number(value)?);
        }
        Ok(Self(counters))
    }

    /// One counter. Counters that this kernel does not have are an error: a name that is spelt wrongly must not
    /// pass for "nothing happened".
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn get(&self, name: &str) -> anyhow::Result<i64> {
        self.0.get(name).copied().with_context(|| format!("the kernel has no counter {name}"))
    }

    /// What was counted since an earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |name: &String| earlier.0.get(name).copied().unwrap_or(0);
        Self(self.0.iter().map(|(name, value)| (name.clone(), value - before(name))).collect())
    }

    /// What a switch must not make more of than a quiet time has.
    ///
    /// # Errors
    /// If the kernel lacks one of the counters.
    pub fn trouble(&self) -> anyhow::Result<Trouble> {
        Ok(Trouble {
            retransmitted: self.get("Tcp.RetransSegs")?,
            resets_sent: self.get("Tcp.OutRsts")?,
            established_reset: self.get("Tcp.EstabResets")?,
            attempts_failed: self.get("Tcp.AttemptFails")?,
            time_outs: self.get("TcpExt.TCPTimeouts")?,
            syn_retransmitted: self.get("TcpExt.TCPSynRetrans")?,
            listen_overflows: self.get("TcpExt.ListenOverflows")?,
            listen_drops: self.get("TcpExt.ListenDrops")?,
            udp_no_ports: self.get("Udp.NoPorts")? + self.get("Udp6.NoPorts")?,
            udp_full: self.get("Udp.RcvbufErrors")? + self.get("Udp6.RcvbufErrors")?,
        })
    }
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn number(text: &str) -> anyhow::Result<i64> {
    // Most are unsigned, `Tcp.MaxConn` is -1; none comes near the difference.
    text.parse().with_context(|| format!("{text} is no number"))
}

/// Counters that show what TCP and UDP had to repair. TCP's are of both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Segments sent again.
    pub retransmitted: i64,
    /// Segments with RST sent.
    pub resets_sent: i64,
    /// Established connections that were reset.
    pub established_reset: i64,
    /// Connections that did not come to be.
    pub attempts_failed: i64,
    /// Retransmission timers that fired.
    pub time_outs: i64,
    /// SYN and SYN-ACK sent again.
    pub syn_retransmitted: i64,
    /// Connections refused for a full accept queue.
    pub listen_overflows: i64,
    /// Connections refused by a listener for any reason.
    pub listen_drops: i64,
    /// Datagrams to a port that nobody has.
    pub udp_no_ports: i64,
    /// Datagrams lost for a full socket buffer.
    pub udp_full: i64,
}

/// Packets with RST in both families. `tcp[13]` does not work on IPv6: the offset into its header has to be given,
/// and packets with extension headers are not seen.
pub const RESETS: &str = "(tcp[tcpflags] & tcp-rst != 0) or (ip6[6] == 6 and ip6[53] & 4 != 0)";

/// A packet as tcpdump tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packet {
    /// When it was seen, by `CLOCK_BOOTTIME`.
    pub at_ns: u64,
    /// What tcpdump said of it, without the time.
    pub text: String,
    /// Its source, if it has ports.
    pub from: Option<SocketAddr>,
    /// Its destination, if it has ports.
    pub to: Option<SocketAddr>,
}

/// A running tcpdump.
#[derive(Debug)]
pub struct Capture {
    running: Running,
    directory: tempfile::TempDir,
}

/// What a capture saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// The packets that tcpdump printed, in order.
    pub packets: Vec<Packet>,
    /// How many the kernel had for it. More than were printed if some came in the very moment of the end.
    pub received: u64,
}

/// How long tcpdump gets to read what the kernel has for it: at the signal it ends at once.
const SETTLE: Duration = Duration::from_millis(250);
const START_LIMIT: Duration = Duration::from_secs(20);

impl Capture {
    /// Starts to capture on a link of the namespace that the calling thread is in; returns when it does capture.
    ///
    /// # Errors
    /// If tcpdump is not installed, or refuses the link or the filter.
    pub fn start(link: &str, filter: &str) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir().context("failed to make a directory for a capture")?;
        let argv = ["tcpdump", "-i", link, "-nn", "-tt", "-l", "--immediate-mode", "-p", filter];
        let mut running = programs::spawn(&argv, Some(&directory.path().join("output")))?;
        let end = Instant::now() + START_LIMIT;
        while !running.output().contains("listening on") {
            if running.has_ended() || Instant::now() >= end {
                bail!("tcpdump on {link} does not listen: {}", running.output());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { running, directory })
    }

    /// The same on a link of a laboratory's namespace.
    ///
    /// # Errors
    /// As [`Capture::start`].
    pub fn start_in(ns: &Ns, link: &str, filter: &str) -> anyhow::Result<Self> {
        ns.enter(|| Self::start(link, filter))
    }

    /// Ends it and returns what was seen.
    ///
    /// # Errors
    /// If packets were lost on the way to tcpdump (then nobody knows what was seen), or its output is not
    /// understood.
    pub fn stop(self) -> anyhow::Result<Captured> {
        std::thread::sleep(SETTLE);
        self.running.signal(Signal::INT)?;
        let path = self.directory.path().join("output");
        self.running.wait(Duration::from_secs(20))?;
        let text = std::fs::read_to_string(&path).context("failed to read a capture")?;
        Captured::parse(&text, wall_minus_boot())
    }
}

/// How far the wall clock is ahead of `CLOCK_BOOTTIME`, in nanoseconds. It is asked at the end of a capture: a wall
/// clock that is set meanwhile makes the times wrong, but not the packets.
fn wall_minus_boot() -> i128 {
    let ns = |clock| {
        let time = clock_gettime(clock);
        i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
    };
    ns(ClockId::Realtime) - ns(ClockId::Boottime)
}

impl Captured {
    /// Reads tcpdump's two outputs, in one text, of `-nn -tt`.
    ///
    /// # Errors
    /// If it has no summary, or that says that packets were lost.
    pub fn parse(text: &str, wall_minus_boot: i128) -> anyhow::Result<Self> {
        let count = |what: &str| {
            // "1 packet", "2 packets".
            let counted = |line: &str| line.strip_suffix(what)?.split(' ').next()?.parse::<u64>().ok();
            let found = text.lines().find_map(counted);
            found.with_context(|| format!("tcpdump did not end in order: {text}"))
        };
        let (received, lost) = (count(" received by filter")?, count(" dropped by kernel")?);
        if lost > 0 {
            bail!("tcpdump lost {lost} packets");
        }
        let packets = text.lines().filter_map(|line| packet(line, wall_minus_boot)).collect();
        Ok(Self { packets, received })
    }

    /// How many were seen in a time.
    pub fn count(&self, from_ns: u64, to_ns: u64) -> usize {
        self.packets.iter().filter(|packet| (from_ns..to_ns).contains(&packet.at_ns)).count()
    }
}

fn packet(line: &str, wall_minus_boot: i128) -> Option<Packet> {
    let (time, text) = line.split_once(' ')?;
    let (seconds, fraction) = time.split_once('.')?;
    if fraction.len() != 6 {
        return None;
    }
    let wall = seconds.parse::<i128>().ok()? * 1_000_000_000 + fraction.parse::<i128>().ok()? * 1000;
    let at_ns = u64::try_from(wall - wall_minus_boot).unwrap_or(0);
    let ends = text.strip_prefix("IP6 ").or_else(|| text.strip_prefix("IP ")).and_then(|rest| {
        let (from, rest) = rest.split_once(" > ")?;
        let (to, _) = rest.split_once(": ")?;
        Some((dotted(from), dotted(to)))
    });
    let (from, to) = ends.unwrap_or((None, None));
    Some(Packet { at_ns, text: text.to_owned(), from, to })
}

/// `10.0.0.1.80` and `fd00::1.80`, as tcpdump writes them.
fn dotted(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.rsplit_once('.')?;
    Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
}

/// A TCP socket as `ss` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpSocket {
    /// `ESTAB`, `TIME-WAIT`, …
    pub state: String,
    /// Its own end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// Bytes that its owner has not read.
    pub unread: u64,
    /// Bytes that the other end has not acknowledged.
    pub unacknowledged: u64,
}

/// All TCP sockets with two ends in the namespace that the calling thread is in; no listeners.
///
/// # Errors
/// If `ss` fails or writes something else.
pub fn tcp_sockets() -> anyhow::Result<Vec<TcpSocket>> {
    parse_ss(&programs::run(&["ss", "-Htan"])?)
}

/// The same in a laboratory's namespace.
///
/// # Errors
/// As [`tcp_sockets`].
pub fn tcp_sockets_in(ns: &Ns) -> anyhow::Result<Vec<TcpSocket>> {
    ns.enter(tcp_sockets)
}

/// Reads the output of `ss -Htan`.
///
/// # Errors
/// If a line has another form.
pub fn parse_ss(text: &str) -> anyhow::Result<Vec<TcpSocket>> {
    let lines = text.lines().map(words).filter(|line| !line.is_empty() && line[0] != "LISTEN");
    let socket = |line: Vec<&str>| {
        let [state, unread, unacknowledged, local, peer, ..] = line[..] else {
            bail!("not a line of ss: {line:?}");
        };
        Ok(TcpSocket {
            state: state.to_owned(),
            local: end(local)?,
            peer: end(peer)?,
            unread: unread.parse()?,
            unacknowledged: unacknowledged.parse()?,
        })
    };
    lines.map(socket).collect()
}

/// `10.0.0.1:80`, `[fd00::1]:80`, and `[fe80::1]%eth0:80` without its link.
fn end(text: &str) -> anyhow::Result<SocketAddr> {
    let (address, port) = text.rsplit_once(':').ok_or_else(|| anyhow!("{text} has no port"))?;
    let address = address.split('%').next().unwrap_or(address);
    let address: IpAddr = address.trim_matches(['[', ']']).parse()?;
    // A socket of both families shows an IPv4 peer as a mapped address.
    Ok(SocketAddr::new(address.to_canonical(), port.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNMP: &str = "Tcp: MaxConn RetransSegs OutRsts\nTcp: -1 5 7\nUdp: NoPorts\nUdp: 2\n";
    const NETSTAT: &str = "TcpExt: ListenDrops TCPTimeouts\nTcpExt: 3 4\n";
    const SNMP6: &str = "Ip6InReceives     \t9\nUdp6NoPorts  1\nIcmp6OutType133 2\n";

    #[test]
    fn counters_are_read_by_group_and_name() {
        let counters = Counters::parse(SNMP, NETSTAT, SNMP6).unwrap();
        for (name, value) in [
            ("Tcp.MaxConn", -1),
            ("Tcp.RetransSegs", 5),
            ("TcpExt.TCPTimeouts", 4),
            ("Ip6.InReceives", 9),
            ("Udp6.NoPorts", 1),
            ("Icmp6.OutType133", 2),
        ] {
            assert_eq!(counters.get(name).unwrap(), value, "{name}");
        }
        assert!(counters.get("Tcp.retranssegs").is_err());
        let later = Counters::parse(&SNMP.replace("5 7", "8 7"), NETSTAT, SNMP6).unwrap();
        assert_eq!(later.since(&counters).get("Tcp.RetransSegs").unwrap(), 3);
    }

    #[test]
    fn counters_that_do_not_fit_are_refused() {
        for snmp in
            ["Tcp: A B\nTcp: 1\n", "Tcp: A\nUdp: 1\n", "Tcp: A\n", "Tcp A\nTcp 1\n", "Tcp: A\nTcp: x\n"]
        {
            assert!(Counters::parse(snmp, "", "").is_err(), "{snmp}");
        }
        assert!(Counters::parse("", "", "Ip6InReceives\n").is_err());
    }

    #[test]
    fn the_kernel_has_all_the_counters_of_trouble() {
        let before = Counters::here().unwrap().trouble().unwrap();
        assert!(before.retransmitted >= 0);
    }

    const DUMP: &str = "tcpdump: verbose output suppressed, use -v[v]... for full protocol decode\n\
        listening on uplink0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n\
        1700000000.000001 IP 10.77.0.10.80 > 10.77.0.2.40000: Flags [R.], seq 0, ack 1, win 0, length 0\n\
        1700000001.500000 IP6 fd77::10.80 > fd77::2.40001: Flags [R], seq 1, win 0, length 0\n\
        1700000002.000000 ARP, Request who-has 10.77.0.1 tell 10.77.0.2, length 28\n\
        \n3 packets captured\n3 packets received by filter\n0 packets dropped by kernel\n";

    #[test]
    fn packets_are_read_with_their_ends_and_times() {
        let captured = Captured::parse(DUMP, 1_699_999_990_000_000_000).unwrap();
        assert_eq!((captured.packets.len(), captured.received), (3, 3));
        assert_eq!(captured.packets[0].from, Some("10.77.0.10:80".parse().unwrap()));
        assert_eq!(captured.packets[1].to, Some("[fd77::2]:40001".parse().unwrap()));
        assert_eq!((captured.packets[2].from, captured.packets[2].text.starts_with("ARP")), (None, true));
        assert_eq!(captured.packets[0].at_ns, 10_000_001_000);
        assert_eq!(captured.count(11_000_000_000, 12_000_000_000), 1);
    }

    #[test]
    fn a_capture_that_lost_something_or_was_cut_off_is_none() {
        for dropped in ["7 packets", "1 packet"] {
            let text = DUMP.replace("0 packets dropped", &format!("{dropped} dropped"));
            assert!(Captured::parse(&text, 0).unwrap_err().to_string().contains("lost"));
        }
        assert!(Captured::parse(&DUMP[..300], 0).is_err());
    }

    #[test]
    fn sockets_are_read_in_both_families() {
        let text = "LISTEN 0 511 0.0.0.0:80 0.0.0.0:*\n\
            ESTAB     3      4      10.77.0.10:80   10.77.0.2:40000\n\
            TIME-WAIT 0      0      [fd77::10]:80   [fd77::2]:40001\n\
            ESTAB     0      0      [::ffff:10.77.0.10]:80   [::ffff:10.77.0.2]:40002\n\
            ESTAB     0      0      [fe80::1]%eth0:80   [fe80::2]%eth0:40003\n";
        let sockets = parse_ss(text).unwrap();
        assert_eq!(sockets.len(), 4);
        assert_eq!((sockets[0].unread, sockets[0].unacknowledged), (3, 4));
        assert_eq!(sockets[1].state, "TIME-WAIT");
        assert_eq!(sockets[2].peer, "10.77.0.2:40002".parse().unwrap());
        assert_eq!(sockets[3].local, "[fe80::1]:80".parse().unwrap());
        assert!(parse_ss("ESTAB 0 0 nonsense 1.2.3.4:5").is_err());
        assert!(parse_ss("ESTAB 0").is_err());
    }
}
