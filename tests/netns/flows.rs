//! What becomes of a single flow, state by state (packet cases D-01 to D-14).

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use patchswitch_common::Slot;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::{self, Counters};
use rustix::net::sockopt;

use crate::hand::{self, ACK, FIN, Hand, RST, SYN, Segment};
use crate::rig::{PORT, Rig, Server, ends};
use crate::xdp;

/// Listens on both families, and accepts when asked.
struct Waiting(TcpListener);

impl Waiting {
    fn on(ns: &Ns) -> anyhow::Result<Self> {
        let listener = ns.enter(|| Ok(TcpListener::bind(("::", PORT))?))?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// The connection that waits, if there is one within a while.
    fn accept(&self, patience: Duration) -> anyhow::Result<Option<TcpStream>> {
        let end = Instant::now() + patience;
        loop {
            match self.0.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                    return Ok(Some(stream));
                }
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error.into()),
                Err(_) if Instant::now() >= end => return Ok(None),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

const SOON: Duration = Duration::from_secs(5);
const NEVER: Duration = Duration::from_millis(300);

fn connect(ns: &Ns, to: SocketAddr) -> anyhow::Result<TcpStream> {
    ns.enter(|| {
        let stream = TcpStream::connect_timeout(&to, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(stream)
    })
}

fn exchange(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) -> anyhow::Result<()> {
    from.write_all(text)?;
    let mut got = vec![0; text.len()];
    to.read_exact(&mut got)?;
    anyhow::ensure!(got == text, "{got:?}");
    Ok(())
}

#[test]
fn a_connection_in_the_accept_queue_is_served_by_who_has_it() {
    let rig = Rig::new("queue").unwrap();
    let waiting = Waiting::on(&rig.lab.a).unwrap();
    let other = Waiting::on(&rig.lab.b).unwrap();
    rig.attach().unwrap();
    let clients = ends().map(|end| connect(&rig.lab.client, end).unwrap());
    rig.switch_to(&rig.lab.b).unwrap();
    let flows = rig.ok(&["flows", "web"]).unwrap();
    let retiring = &flows["partitions"][1];
    assert_eq!((&retiring["active"], &retiring["flows"]["queued"]), (&false.into(), &2.into()), "{flows}");
    // Nobody has accepted them: the drain must not be over.
    let ended = rig.run(&["drain", "web", "--deadline", "0.6"]).unwrap();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for mut client in clients {
        let mut server = waiting.accept(SOON).unwrap().expect("it waits in the retiring partition");
        exchange(&mut client, &mut server, b"question").unwrap();
        exchange(&mut server, &mut client, b"answer").unwrap();
    }
    assert!(other.accept(NEVER).unwrap().is_none());
    rig.finish().unwrap();
}

#[test]
fn a_handshake_under_way_is_finished_by_who_began_it() {
    let mut rig = Rig::new("shake").unwrap();
    hand::furnish(&rig.lab).unwrap();
    rig.furnished().unwrap();
    let sides = [&rig.lab.a, &rig.lab.b].map(|ns| (ns, Waiting::on(ns).unwrap()));
    rig.attach().unwrap();
    // There and back: a rollback is the same with the roles exchanged.
    for (number, (from, to)) in [(0, 1), (1, 0), (0, 1), (1, 0)].into_iter().enumerate() {
        let end = ends()[number / 2];
        let [(_, has_begun), (new, has_not)] = [&sides[from], &sides[to]];
        let mut hand = Hand::new(&rig.lab, end, 5000 + u16::try_from(number).unwrap()).unwrap();
        hand.send(&Segment::new(SYN, 1000, 0)).unwrap();
        let first = hand.receive().unwrap();
        assert_eq!((first.flags, first.ack), (SYN | ACK, 1001));
        rig.switch_to(new).unwrap();
        // The SYN once more: the same answer, so it is the same request.
        hand.send(&Segment::new(SYN, 1000, 0)).unwrap();
        let again = hand.receive().unwrap();
        assert_eq!((again.flags, again.seq), (SYN | ACK, first.seq), "{end}");
        hand.send(&Segment {
            payload: b"hello".to_vec(),
            ..Segment::new(ACK, 1001, first.seq.wrapping_add(1))
        })
        .unwrap();
        let mut stream = has_begun.accept(SOON).unwrap().expect("the one that began it accepts it");
        let mut got = [0; 5];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        assert!(has_not.accept(NEVER).unwrap().is_none());
    }
    rig.finish().unwrap();
}

#[test]
fn a_syn_to_an_established_connection_is_challenged_by_its_owner() {
    let mut rig = Rig::new("challenge").unwrap();
    hand::furnish(&rig.lab).unwrap();
    rig.furnished().unwrap();
    let (a, b) = (Waiting::on(&rig.lab.a).unwrap(), Waiting::on(&rig.lab.b).unwrap());
    rig.attach().unwrap();
    for (number, end) in (0..).zip(ends()) {
        let mut hand = Hand::new(&rig.lab, end, 5100 + number).unwrap();
        hand.send(&Segment::new(SYN, 1000, 0)).unwrap();
        let answer = hand.receive().unwrap();
        let next = answer.seq.wrapping_add(1);
        hand.send(&Segment::new(ACK, 1001, next)).unwrap();
        let owned = a.accept(SOON).unwrap().expect("accepted before the switch");
        rig.switch_to(&rig.lab.b).unwrap();
        // The client was restarted and has forgotten the connection (RFC 5961, section 4).
        hand.send(&Segment::new(SYN, 900_000, 0)).unwrap();
        let challenge = hand.receive().unwrap();
        assert_eq!((challenge.flags, challenge.seq, challenge.ack), (ACK, next, 1001), "{end}");
        hand.send(&Segment::new(RST, challenge.ack, 0)).unwrap();
        let mut rest = Vec::new();
        (&owned).read_to_end(&mut rest).unwrap_err();
        hand.send(&Segment::new(SYN, 900_000, 0)).unwrap();
        let fresh = hand.receive().unwrap();
        assert_eq!((fresh.flags, fresh.ack), (SYN | ACK, 900_001));
        hand.send(&Segment::new(ACK, 900_001, fresh.seq.wrapping_add(1))).unwrap();
        assert!(b.accept(SOON).unwrap().is_some(), "the new partition has the new connection");
        rig.switch_to(&rig.lab.a).unwrap();
    }
    rig.finish().unwrap();
}

#[test]
fn a_segment_that_nobody_knows_is_refused_by_the_active_one() {
    let mut rig = Rig::new("unknown").unwrap();
    hand::furnish(&rig.lab).unwrap();
    rig.furnished().unwrap();
    let _both = (Waiting::on(&rig.lab.a).unwrap(), Waiting::on(&rig.lab.b).unwrap());
    rig.attach().unwrap();
    rig.switch_to(&rig.lab.b).unwrap();
    let resets = |ns: &Ns| Counters::of(ns).unwrap().get("Tcp.OutRsts").unwrap();
    for (number, end) in (0..).zip(ends()) {
        let before = (resets(&rig.lab.a), resets(&rig.lab.b));
        let mut hand = Hand::new(&rig.lab, end, 5200 + number).unwrap();
        hand.send(&Segment::new(ACK, 1000, 7777)).unwrap();
        let answer = hand.receive().unwrap();
        assert_eq!((answer.flags & RST, answer.seq), (RST, 7777));
        assert_eq!((resets(&rig.lab.a), resets(&rig.lab.b)), (before.0, before.1 + 1));
    }
    rig.finish().unwrap();
}

/// Begins a connection with a SYN cookie, switches, and ends the handshake; true if the old partition accepts it.
fn cookie_across(
    rig: &Rig,
    end: SocketAddr,
    port: u16,
    sides: &[Ns; 2],
    waiting: [&Waiting; 2],
) -> anyhow::Result<bool> {
    let mut hand = Hand::new(&rig.lab, end, port)?;
    hand.send(&Segment::new(SYN, 1000, 0))?;
    let answer = hand.receive()?;
    anyhow::ensure!(answer.flags == SYN | ACK, "{answer:?}");
    let requests = observe::tcp_sockets_in(&sides[0])?.iter().filter(|s| s.state == "SYN-RECV").count();
    anyhow::ensure!(requests == 0, "with a cookie no request is kept");
    rig.switch_to(&sides[1])?;
    let segment = Segment { payload: b"x".to_vec(), ..Segment::new(ACK, 1001, answer.seq.wrapping_add(1)) };
    hand.send(&segment)?;
    let by_old = waiting[0].accept(Duration::from_millis(700))?.is_some();
    let by_new = waiting[1].accept(NEVER)?.is_some();
    anyhow::ensure!(by_old != by_new, "accepted by {} partitions", u8::from(by_old) + u8::from(by_new));
    hand.send(&Segment::new(RST, 1002, 0))?;
    rig.switch_to(&sides[0])?;
    Ok(by_old)
}

#[test]
fn a_syn_cookie_is_honoured_by_who_can() {
    for first in [Slot::A, Slot::B] {
        cookies(Rig::new("cookie").unwrap(), Rig::attach, first);
    }
}

#[test]
fn a_syn_cookie_is_honoured_by_xdp() {
    for first in [Slot::A, Slot::B] {
        cookies(xdp::rig("xdpcookie").unwrap(), xdp::attach, first);
    }
}

/// The side in a slot is the old one: of a switch, or of a rollback.
fn cookies(mut rig: Rig, attach: impl FnOnce(&Rig) -> anyhow::Result<serde_json::Value>, first: Slot) {
    hand::furnish(&rig.lab).unwrap();
    rig.furnished().unwrap();
    for ns in [&rig.lab.a, &rig.lab.b] {
        ns.sysctl("net/ipv4/tcp_syncookies", "2").unwrap();
    }
    let mut sides = [rig.lab.a.clone(), rig.lab.b.clone()];
    if first == Slot::B {
        sides.reverse();
    }
    let [a, b] = sides.each_ref().map(|ns| Waiting::on(ns).unwrap());
    rig.furnished().unwrap();
    attach(&rig).unwrap();
    if first == Slot::B {
        rig.switch_to(&sides[0]).unwrap();
    }
    // Only the old one has given out cookies.
    for (port, end) in (5300..).zip(ends()) {
        assert!(
            cookie_across(&rig, end, port, &sides, [&a, &b]).unwrap(),
            "{end}: the old one's cookie, the old one's flow"
        );
    }
    // Now the new one gives some out as well: then it takes the old one's, for the secret is the kernel's.
    rig.switch_to(&sides[1]).unwrap();
    for (port, end) in (5310..).zip(ends()) {
        let mut hand = Hand::new(&rig.lab, end, port).unwrap();
        hand.send(&Segment::new(SYN, 1000, 0)).unwrap();
        let answer = hand.receive().unwrap();
        // A flow of the new one must not fall to the old one, though its listener would accept the cookie.
        hand.send(&Segment::new(ACK, 1001, answer.seq.wrapping_add(1))).unwrap();
        assert!(b.accept(SOON).unwrap().is_some());
        assert!(a.accept(NEVER).unwrap().is_none());
    }
    rig.switch_to(&sides[0]).unwrap();
    for (port, end) in (5320..).zip(ends()) {
        assert!(
            !cookie_across(&rig, end, port, &sides, [&a, &b]).unwrap(),
            "{end}: a drain that is not prolonged"
        );
    }
    rig.finish().unwrap();
}

/// Connects from a port that was used just before.
fn connect_from(ns: &Ns, port: u16, to: SocketAddr) -> anyhow::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with};
    ns.enter(|| {
        let (family, any) =
            if to.is_ipv4() { (AddressFamily::INET, "0.0.0.0") } else { (AddressFamily::INET6, "::") };
        let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &SocketAddr::new(any.parse()?, port))?;
        connect(&socket, &to)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(SOON))?;
        Ok(stream)
    })
}

#[test]
fn a_tuple_in_time_wait_is_used_again_by_the_new_partition() {
    tuple_used_again(Rig::new("timewait").unwrap(), Rig::attach, "0");
}

/// The new partition keeps nothing of a SYN that it answers by a cookie; what is left of the old connection must not get
/// the client's ACK.
#[test]
fn a_tuple_in_time_wait_is_used_again_by_a_cookie() {
    tuple_used_again(Rig::new("timewaitcookie").unwrap(), Rig::attach, "2");
    tuple_used_again(xdp::rig("xdptimewait").unwrap(), xdp::attach, "2");
}

fn tuple_used_again(
    mut rig: Rig,
    attach: impl FnOnce(&Rig) -> anyhow::Result<serde_json::Value>,
    cookies: &str,
) {
    for ns in [&rig.lab.a, &rig.lab.b] {
        ns.sysctl("net/ipv4/tcp_syncookies", cookies).unwrap();
    }
    rig.furnished().unwrap();
    let (a, b) = (Waiting::on(&rig.lab.a).unwrap(), Waiting::on(&rig.lab.b).unwrap());
    attach(&rig).unwrap();
    for (port, end) in (6000..).zip(ends()) {
        let mut client = connect_from(&rig.lab.client, port, end).unwrap();
        // The server closes first, so the remains are on its side.
        drop(a.accept(SOON).unwrap().expect("accepted before the switch"));
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        drop(client);
        becomes(&rig.lab.a, port, "TIME-WAIT");
        rig.switch_to(&rig.lab.b).unwrap();
        let mut client = connect_from(&rig.lab.client, port, end).unwrap();
        let mut server = b.accept(SOON).unwrap().expect("the handshake is with the new partition");
        assert!(is(&rig.lab.a, port, "TIME-WAIT"), "else the next lines prove nothing");
        for _ in 0..5 {
            exchange(&mut client, &mut server, b"question").unwrap();
            exchange(&mut server, &mut client, b"answer").unwrap();
        }
        assert!(a.accept(NEVER).unwrap().is_none());
        rig.switch_to(&rig.lab.a).unwrap();
    }
    rig.finish().unwrap();
}

/// Whether a partition has a socket in a state for a client's port.
fn is(ns: &Ns, port: u16, state: &str) -> bool {
    observe::tcp_sockets_in(ns).unwrap().iter().any(|s| s.state == state && s.peer.port() == port)
}

fn becomes(ns: &Ns, port: u16, state: &str) {
    let limit = Instant::now() + SOON;
    while !is(ns, port, state) {
        assert!(Instant::now() < limit, "port {port} is not in {state}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The end of a connection passes for a cookie if it began by one and both sides sent about as much; without a process the
/// kernel shows it as if it were in `TIME_WAIT` already.
#[test]
fn a_late_end_is_no_cookie() {
    ended_late(Rig::new("lateend").unwrap(), Rig::attach);
    ended_late(xdp::rig("xdplateend").unwrap(), xdp::attach);
}

fn ended_late(mut rig: Rig, attach: impl FnOnce(&Rig) -> anyhow::Result<serde_json::Value>) {
    for ns in [&rig.lab.a, &rig.lab.b] {
        ns.sysctl("net/ipv4/tcp_syncookies", "2").unwrap();
    }
    rig.furnished().unwrap();
    let (a, b) = (Waiting::on(&rig.lab.a).unwrap(), Waiting::on(&rig.lab.b).unwrap());
    attach(&rig).unwrap();
    for (port, end) in (6100..).zip(ends()) {
        let mut client = connect_from(&rig.lab.client, port, end).unwrap();
        let mut server = a.accept(SOON).unwrap().expect("accepted before the switch");
        exchange(&mut client, &mut server, b"?").unwrap();
        drop(server);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        becomes(&rig.lab.a, port, "FIN-WAIT-2");
        rig.switch_to(&rig.lab.b).unwrap();
        // From its first cookie on, the new one has an opinion on cookies.
        let other = connect(&rig.lab.client, end).unwrap();
        drop(b.accept(SOON).unwrap().expect("new flows go to the new partition"));
        drop((other, client));
        becomes(&rig.lab.a, port, "TIME-WAIT");
        assert!(b.accept(NEVER).unwrap().is_none(), "a connection that nobody began");
        rig.switch_to(&rig.lab.a).unwrap();
    }
    rig.finish().unwrap();
}

/// A handshake begins at the new side, by a cookie and over what is in `TIME_WAIT` at the old one, and is given back from
/// before it has ended.
#[test]
fn a_cookie_of_the_retiring_one_comes_before_remains_in_the_active_one() {
    given_back_from(Rig::new("cookieback").unwrap(), Rig::attach);
    given_back_from(xdp::rig("xdpcookieback").unwrap(), xdp::attach);
}

/// Sends a SYN; the number that acknowledges the answer.
fn begun(hand: &mut Hand, seq: u32) -> u32 {
    hand.send(&Segment::new(SYN, seq, 0)).unwrap();
    let answer = hand.receive().unwrap();
    assert_eq!(answer.flags, SYN | ACK, "{answer:?}");
    answer.seq.wrapping_add(1)
}

fn given_back_from(mut rig: Rig, attach: impl FnOnce(&Rig) -> anyhow::Result<serde_json::Value>) {
    hand::furnish(&rig.lab).unwrap();
    for ns in [&rig.lab.a, &rig.lab.b] {
        ns.sysctl("net/ipv4/tcp_syncookies", "2").unwrap();
    }
    rig.furnished().unwrap();
    let (a, b) = (Waiting::on(&rig.lab.a).unwrap(), Waiting::on(&rig.lab.b).unwrap());
    attach(&rig).unwrap();
    for (port, end) in (5500..).zip(ends()) {
        let mut hand = Hand::new(&rig.lab, end, port).unwrap();
        let theirs = begun(&mut hand, 1000);
        hand.send(&Segment::new(ACK, 1001, theirs)).unwrap();
        drop(a.accept(SOON).unwrap().expect("accepted before the switch"));
        assert_eq!(hand.receive().unwrap().flags & FIN, FIN);
        hand.send(&Segment::new(FIN | ACK, 1001, theirs.wrapping_add(1))).unwrap();
        becomes(&rig.lab.a, port, "TIME-WAIT");
        rig.switch_to(&rig.lab.b).unwrap();
        let mut hand = Hand::new(&rig.lab, end, port).unwrap();
        let theirs = begun(&mut hand, 500_000);
        rig.switch_to(&rig.lab.a).unwrap();
        assert!(is(&rig.lab.a, port, "TIME-WAIT"), "else the next lines prove nothing");
        let ended = Segment::new(ACK, 500_001, theirs);
        hand.send(&Segment { payload: b"x".to_vec(), ..ended }).unwrap();
        assert!(b.accept(SOON).unwrap().is_some(), "{end}: who gave the cookie has the flow");
        assert!(a.accept(NEVER).unwrap().is_none());
        hand.send(&Segment::new(RST, 500_002, 0)).unwrap();
    }
    rig.finish().unwrap();
}

/// The bytes of an upload: as many different ones as a prime number, over and over.
struct Pattern(Vec<u8>);

impl Pattern {
    const PERIOD: usize = 65_521;

    fn new() -> Self {
        let byte = |at: usize| (at.wrapping_mul(2_654_435_761) >> 13) as u8;
        Self((0..2 * Self::PERIOD).map(|at| byte(at % Self::PERIOD)).collect())
    }

    /// So many of them from a place on, at most a period.
    fn at(&self, place: usize, length: usize) -> &[u8] {
        let begin = place % Self::PERIOD;
        &self.0[begin..begin + length]
    }
}

/// Reads an upload, slowly until there is reason to hurry; how much it was.
fn read_upload(mut server: TcpStream, hurry: &AtomicBool) -> usize {
    let (pattern, mut block, mut place) = (Pattern::new(), vec![0; Pattern::PERIOD], 0);
    loop {
        if !hurry.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let length = server.read(&mut block).unwrap();
        if length == 0 {
            return place;
        }
        assert!(block[..length] == *pattern.at(place, length), "wrong bytes after {place}");
        place += length;
    }
}

/// Resets that were sent or had in some namespaces.
fn resets(spaces: [&Ns; 3]) -> i64 {
    let trouble = spaces.map(|ns| Counters::of(ns).unwrap().trouble().unwrap());
    trouble.iter().map(|trouble| trouble.resets_sent + trouble.established_reset).sum()
}

#[test]
fn an_upload_goes_on_across_the_switch() {
    const LENGTHS: [usize; 2] = [1 << 30, 1 << 26];
    let rig = Rig::new("upload").unwrap();
    let a = Waiting::on(&rig.lab.a).unwrap();
    let _b = Server::start(&rig.lab.b, "b").unwrap();
    rig.attach().unwrap();
    let spaces = [&rig.lab.client, &rig.lab.a, &rig.lab.b];
    for (end, length) in ends().into_iter().zip(LENGTHS) {
        let before = resets(spaces);
        let mut client = connect(&rig.lab.client, end).unwrap();
        let server = a.accept(SOON).unwrap().expect("accepted before the switch");
        let hurry = Arc::new(AtomicBool::new(false));
        let slow = Arc::clone(&hurry);
        let reading = std::thread::spawn(move || read_upload(server, &slow));
        let writing = std::thread::spawn(move || {
            let (pattern, mut place) = (Pattern::new(), 0);
            while place < length {
                let block = pattern.at(place, Pattern::PERIOD.min(length - place));
                client.write_all(block).unwrap();
                place += block.len();
            }
        });
        for to in [&rig.lab.b, &rig.lab.a] {
            rig.switch_to(to).unwrap();
        }
        assert!(!writing.is_finished(), "the upload was over before the switches were");
        hurry.store(true, Ordering::Relaxed);
        writing.join().unwrap();
        assert_eq!(reading.join().unwrap(), length);
        assert_eq!(resets(spaces), before, "{end}");
    }
    rig.finish().unwrap();
}
