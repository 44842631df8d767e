//! Whether anything was lost, and what had to be repaired: TCP hides both from who uses it.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use patchswitch_load::report::Window;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::Counters;
use patchswitch_tests::standstill::Witness;

use crate::rig::{Rig, service};

/// How long what is under way may take to arrive.
const SETTLE: Duration = Duration::from_secs(10);
/// A processor that was away for so long makes retransmission timers fire: their least is 200 ms (`TCP_RTO_MIN`).
const LONG_NS: u64 = 100_000_000;

/// Packets by their marks of congestion: the only counters that count what a kernel has joined by its parts (GRO, and
/// segments of one write that were never cut). Without those that count a joined one once they are what was joined.
const BY_PARTS: [&str; 4] = ["InNoECTPkts", "InECT0Pkts", "InECT1Pkts", "InCEPkts"];

fn joined(counters: &Counters) -> anyhow::Result<i64> {
    let mut more = -counters.get("Ip.InReceives")? - counters.get("Ip6.InReceives")?;
    for name in BY_PARTS {
        more += counters.get(&format!("IpExt.{name}"))? + counters.get(&format!("Ip6.{name}"))?;
    }
    Ok(more)
}

/// What the kernels of all namespaces counted, together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Segments of TCP that left a socket for the first time: the kernel counts data that it sends again apart from it
    /// (`__tcp_transmit_skb`, `net/ipv4/tcp_output.c`; RFC 1213, `tcpOutSegs`).
    pub(crate) sent: i64,
    /// Segments that came to where the sockets are. With nothing lost: all of these, and all that were sent again.
    pub(crate) arrived: i64,
    /// Segments sent again.
    pub(crate) again: i64,
    /// Of these, or new data instead of them: probes for a late acknowledgement (TLP, RFC 8985 7). Their timer is two
    /// round trips, which between namespaces is less than a processor is busy with something else.
    pub(crate) probes: i64,
    /// Retransmission timers that fired.
    pub(crate) time_outs: i64,
    /// Segments with RST sent.
    pub(crate) resets: i64,
    /// Established connections that were reset.
    pub(crate) broken: i64,
    /// Connections that did not come to be.
    pub(crate) failed: i64,
}

impl Counted {
    fn of(spaces: &[Ns]) -> anyhow::Result<Self> {
        let mut sum = Self::default();
        for ns in spaces {
            let counters = Counters::of(ns)?;
            for (field, name) in [
                (&mut sum.sent, "Tcp.OutSegs"),
                (&mut sum.arrived, "Tcp.InSegs"),
                (&mut sum.again, "Tcp.RetransSegs"),
                (&mut sum.probes, "TcpExt.TCPLossProbes"),
                (&mut sum.time_outs, "TcpExt.TCPTimeouts"),
                (&mut sum.resets, "Tcp.OutRsts"),
                (&mut sum.broken, "Tcp.EstabResets"),
                (&mut sum.failed, "Tcp.AttemptFails"),
            ] {
                *field += counters.get(name)?;
            }
            sum.arrived += joined(&counters)?;
        }
        Ok(sum)
    }

    /// Whether as many came as were sent, be it for the first time or again.
    fn all_arrived(&self) -> bool {
        self.arrived == self.sent + self.again
    }

    fn since(self, before: Self) -> Self {
        Self {
            sent: self.sent - before.sent,
            arrived: self.arrived - before.arrived,
            again: self.again - before.again,
            probes: self.probes - before.probes,
            time_outs: self.time_outs - before.time_outs,
            resets: self.resets - before.resets,
            broken: self.broken - before.broken,
            failed: self.failed - before.failed,
        }
    }
}

/// Looks at the kernels of a laboratory while something happens to it.
pub(crate) struct Repairs {
    spaces: Vec<Ns>,
    before: Counted,
    witness: Witness,
}

impl Repairs {
    /// To be begun before the load, whose every segment counts.
    pub(crate) fn begin(rig: &Rig, others: &[&Ns]) -> anyhow::Result<Self> {
        let of_the_rig = [&rig.lab.client, &rig.lab.host, &rig.lab.a, &rig.lab.b];
        let spaces: Vec<Ns> = of_the_rig.into_iter().chain(others.iter().copied()).cloned().collect();
        Ok(Self { before: Counted::of(&spaces)?, spaces, witness: Witness::start() })
    }

    fn so_far(&self) -> anyhow::Result<Counted> {
        Ok(Counted::of(&self.spaces)?.since(self.before))
    }

    /// What was counted until it was all there; to be asked when the load has ended.
    fn end(&self) -> anyhow::Result<Counted> {
        let limit = Instant::now() + SETTLE;
        loop {
            let counted = self.so_far()?;
            if counted.all_arrived() || Instant::now() >= limit {
                return Ok(counted);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Proves that every segment arrived, that none was refused, and that nothing was sent again but by probes. Where
    /// the machine itself stood still for long, timers fire for what was not lost.
    pub(crate) fn nothing_was_lost(self) -> anyhow::Result<Counted> {
        let counted = self.end()?;
        let stood_still = longest(&self.witness.stop()?);
        eprintln!("{counted:?}; the machine stood still for at most {} ms", stood_still / 1_000_000);
        anyhow::ensure!(counted.sent > 1000, "too little to tell: {counted:?}");
        anyhow::ensure!(counted.all_arrived(), "segments were lost: {counted:?}");
        let Counted { again, probes, time_outs, resets, broken, failed, .. } = counted;
        anyhow::ensure!((resets, broken, failed) == (0, 0, 0), "reset or refused: {counted:?}");
        let is_repaired = time_outs > 0 || again > probes;
        anyhow::ensure!(
            !is_repaired || stood_still >= LONG_NS,
            "sent again, and not as a probe: {counted:?}"
        );
        Ok(counted)
    }
}

fn longest(standstills: &[Window]) -> u64 {
    standstills.iter().map(|one| one.to_ns - one.from_ns).max().unwrap_or(0)
}

/// A port that takes datagrams and says nothing.
const SINK: u16 = 7011;

/// Datagrams to the service that nobody answers, some in each millisecond, counted at both ends.
pub(crate) struct Flood {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<anyhow::Result<i64>>,
    /// Of each partition: its sockets, and what they had no room for before.
    sinks: Vec<(Ns, [UdpSocket; 2], i64)>,
}

impl Flood {
    /// Begins, to both addresses of the service.
    pub(crate) fn start(rig: &Rig) -> anyhow::Result<Self> {
        let mut sinks = Vec::new();
        for ns in [&rig.lab.a, &rig.lab.b] {
            let sockets = ns.enter(|| Ok([sink([0; 4].into())?, sink([0; 16].into())?]))?;
            sinks.push((ns.clone(), sockets, no_room(ns)?));
        }
        let (stop, client) = (Arc::new(AtomicBool::new(false)), rig.lab.client.clone());
        let stopped = Arc::clone(&stop);
        let sender = std::thread::spawn(move || client.enter(|| send(&stopped)));
        Ok(Self { stop, sender, sinks })
    }

    /// Ends it: how many were sent, and how many came to one of the partitions.
    pub(crate) fn stop(self) -> anyhow::Result<(i64, i64)> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let limit = Instant::now() + SETTLE;
        let (mut read, mut arrived) = (0, 0);
        while arrived < sent && Instant::now() < limit {
            let mut overflown = 0;
            for (ns, sockets, before) in &self.sinks {
                let found =
                    sockets.iter().flat_map(|socket| std::iter::from_fn(|| socket.recv(&mut [0; 64]).ok()));
                read += i64::try_from(found.count())?;
                overflown += no_room(ns)? - before;
            }
            arrived = read + overflown;
        }
        Ok((sent, arrived))
    }
}

/// IPv6 sockets are for IPv6 alone here, as the library has them where another one has the port already.
fn sink(any: IpAddr) -> anyhow::Result<UdpSocket> {
    let at = SocketAddr::new(any, SINK);
    let socket = socket2::Socket::new(socket2::Domain::for_address(at), socket2::Type::DGRAM, None)?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&at.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn no_room(ns: &Ns) -> anyhow::Result<i64> {
    Ok(Counters::of(ns)?.trouble()?.udp_full)
}

fn send(stop: &AtomicBool) -> anyhow::Result<i64> {
    let mut sockets = Vec::new();
    for address in service() {
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((address, SINK))?;
        sockets.push(socket);
    }
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        for socket in sockets.iter().cycle().take(10) {
            socket.send(&[0; 22])?;
            sent += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(sent)
}

/// What was lost and repaired is lost all the same.
#[test]
fn a_segment_that_had_to_be_sent_again_counts_as_lost() {
    let rig = Rig::new("repairs").unwrap();
    rig.attach().unwrap();
    let end = SocketAddr::new(service()[0], SINK);
    let listener = rig.lab.a.enter(|| Ok(TcpListener::bind(end)?)).unwrap();
    let mut client = rig.lab.client.enter(|| Ok(TcpStream::connect_timeout(&end, SETTLE)?)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(SETTLE)).unwrap();
    // One that arrives, to know that all is well before.
    client.write_all(b"?").unwrap();
    server.read_exact(&mut [0]).unwrap();

    let repairs = Repairs::begin(&rig, &[]).unwrap();
    let table = "add table ip lost; add chain ip lost in { type filter hook prerouting priority -300; }; \
                 add rule ip lost in meta length > 500 drop";
    rig.lab.a.run(&["nft", table]).unwrap();
    client.write_all(&[0; 800]).unwrap();
    while repairs.so_far().unwrap().again == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.lab.a.run(&["nft", "delete table ip lost"]).unwrap();
    server.read_exact(&mut [0; 800]).unwrap();
    let counted = repairs.so_far().unwrap();
    assert!(!counted.all_arrived() && counted.arrived < counted.sent + counted.again, "{counted:?}");
    drop((client, server, listener));
    rig.finish().unwrap();
}
