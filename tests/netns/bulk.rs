//! Packets longer than the Internet's 1500 bytes: segments that the kernel will cut or has joined (packet cases H-01 and
//! H-02), and jumbo frames (H-16). That there were such is counted, and not taken for granted.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use patchswitch_common::Slot;
use patchswitch_tests::frame;
use patchswitch_tests::netlab::{CLIENT_LINK, Ns, UPLINK};
use patchswitch_tests::observe::Counters;
use socket2::{Domain, SockRef, Socket, Type};

use crate::offload::link;
use crate::rig::{Rig, service};
use crate::tap::tapped;
use crate::udp::{big_echo, clients, event, learn, switch};

/// The servers' port.
const BULK: u16 = 7500;
/// What is carried at once.
const LENGTH: usize = 6 << 20;
/// What a receiver has room for: much less than half of that, so that the rest is sent after what is done in between.
const ROOM: usize = 1 << 18;
/// What a link takes, mostly.
const MTU: u64 = 1500;
/// What a link of jumbo frames takes.
const JUMBO: u64 = 9000;
/// What a step of a transfer may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The two ends of a connection.
struct Ends {
    client: TcpStream,
    server: TcpStream,
}

impl Ends {
    fn connect(rig: &Rig, listener: &TcpListener, to: SocketAddr) -> anyhow::Result<Self> {
        let client: TcpStream = rig.lab.client.enter(|| {
            let client = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            client.set_recv_buffer_size(ROOM)?;
            client.connect_timeout(&to.into(), PATIENCE)?;
            Ok(client.into())
        })?;
        let server = listener.accept()?.0;
        for end in [&client, &server] {
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_write_timeout(Some(PATIENCE))?;
        }
        Ok(Self { client, server })
    }
}

/// What is said: over and over the same, with a length that no buffer has.
fn block() -> Vec<u8> {
    (0..100_003_usize).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn write(mut to: &TcpStream, block: &[u8]) -> std::io::Result<()> {
    let mut left = LENGTH;
    while left > 0 {
        let length = left.min(block.len());
        to.write_all(&block[..length])?;
        left -= length;
    }
    Ok(())
}

/// Carries [`LENGTH`] bytes from one end to the other, which must come as they went. When half of them are read, no more
/// are until something else is done.
fn carry(
    from: &TcpStream,
    mut to: &TcpStream,
    half: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let block = block();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| write(from, &block));
        let mut got = vec![0; LENGTH];
        let (first, second) = got.split_at_mut(LENGTH / 2);
        to.read_exact(first)?;
        half()?;
        to.read_exact(second)?;
        writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        ensure!(got.chunks(block.len()).all(|part| *part == block[..part.len()]), "other bytes came");
        Ok(())
    })
}

/// Packets that the programs have counted: of clients to either side, and of partitions.
#[derive(Clone, Copy, Debug)]
struct Counted {
    to_a: u64,
    to_b: u64,
    kept: u64,
    out: u64,
}

impl Counted {
    fn now(rig: &Rig) -> anyhow::Result<Self> {
        let status = rig.ok(&["status", "web"])?;
        let counters = &status["attachments"][0]["counters"];
        // A counter that is 0 is left out.
        let of = |kind: &str, point: &str| counters["packets"][kind][point].as_u64().unwrap_or(0);
        let kept = counters["events"]["kept_by_retiring"].as_u64().unwrap_or(0);
        let [to_a, to_b] = ["to_a", "to_b"].map(|verdict| of("uplink", verdict));
        Ok(Self { to_a, to_b, kept, out: of("from_partition", "out") })
    }

    fn since(self, before: Self) -> Self {
        let Self { to_a, to_b, kept, out } = before;
        Self { to_a: self.to_a - to_a, to_b: self.to_b - to_b, kept: self.kept - kept, out: self.out - out }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// From the client.
    Up,
    /// To it.
    Down,
}

/// What is carried one after the other, and who is switched to in the middle of it.
const STEPS: [(Way, Option<Slot>); 8] = [
    (Way::Up, None),
    (Way::Down, None),
    (Way::Up, Some(Slot::B)),
    (Way::Up, None),
    (Way::Down, None),
    (Way::Down, Some(Slot::A)),
    (Way::Down, Some(Slot::B)),
    (Way::Up, Some(Slot::A)),
];

/// Carries much on a connection of the first partition through all steps, and looks at what each was counted as: the
/// packets that had the bytes, and the frames of the links on which they came.
fn carried(rig: &Rig, ends: &Ends, check: impl Fn(&str, u64, u64)) -> anyhow::Result<()> {
    let mut serving = Slot::A;
    for (number, (way, to)) in STEPS.into_iter().enumerate() {
        let what = format!("step {number}: {way:?}, switching to {to:?}");
        let (before, frames) = (Counted::now(rig)?, sent(rig, way)?);
        let half = || to.map_or(Ok(()), |to| switch(rig, to));
        match way {
            Way::Up => carry(&ends.client, &ends.server, half),
            Way::Down => carry(&ends.server, &ends.client, half),
        }
        .with_context(|| what.clone())?;
        let counted = Counted::now(rig)?.since(before);
        ensure!(counted.to_b == 0, "{what}: to the other side: {counted:?}");
        let drains = serving == Slot::B || to == Some(Slot::B);
        ensure!((counted.kept > 0) == drains, "{what}: {counted:?}");
        let packets = if way == Way::Up { counted.to_a } else { counted.out };
        check(&what, packets, sent(rig, way)? - frames);
        serving = to.unwrap_or(serving);
    }
    Ok(())
}

/// The frames that the sending side's link has sent.
fn sent(rig: &Rig, way: Way) -> anyhow::Result<u64> {
    let ns = if way == Way::Up { &rig.lab.client } else { &rig.lab.a };
    let shown: serde_json::Value = serde_json::from_str(&ns.ip("-j -s link show dev eth0")?)?;
    shown[0]["stats64"]["tx"]["packets"].as_u64().context("no count of frames")
}

/// A laboratory with listeners in both partitions.
fn listening(rig: &Rig) -> anyhow::Result<[TcpListener; 2]> {
    let on = |ns: &Ns| {
        let listener = ns.enter(|| Ok(TcpListener::bind(("::", BULK))?))?;
        SockRef::from(&listener).set_recv_buffer_size(ROOM)?;
        anyhow::Ok(listener)
    };
    Ok([on(&rig.lab.a)?, on(&rig.lab.b)?])
}

fn ethtool(ns: &Ns, link: &str, options: &[&str]) -> anyhow::Result<()> {
    ns.run(&[&["ethtool", "-K", link], options].concat()).map(drop)
}

/// Whether a frame is of the connections here.
fn is_bulk(frame: &[u8]) -> bool {
    let (protocol, ports) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (frame.get(23), frame.get(34..38)),
        Some([0x86, 0xdd]) => (frame.get(20), frame.get(54..58)),
        _ => return false,
    };
    protocol == Some(&frame::TCP)
        && ports.is_some_and(|ports| ports.chunks(2).any(|port| port == BULK.to_be_bytes()))
}

/// Carries much on connections of both families; the longest packets that the two links of the host had.
fn longest(rig: &Rig, check: impl Fn(&str, u64, u64) + Copy) -> anyhow::Result<[usize; 2]> {
    let listeners = listening(rig)?;
    let inner = link(rig)?;
    let segments = |ns: &Ns| Counters::of(ns)?.get("Tcp.InSegs");
    let before = segments(&rig.lab.b)?;
    let all = || {
        for address in service() {
            let ends = Ends::connect(rig, &listeners[0], SocketAddr::new(address, BULK))?;
            carried(rig, &ends, check).with_context(|| address.to_string())?;
        }
        Ok(())
    };
    let (((), inside), outside) =
        tapped(&rig.lab.host, UPLINK, is_bulk, || tapped(&rig.lab.host, &inner, is_bulk, all))?;
    ensure!(segments(&rig.lab.b)? == before, "segments came to the other side");
    let longest = |frames: &[crate::tap::Frame]| frames.iter().map(|frame| frame.length).max().unwrap_or(0);
    Ok([longest(&outside), longest(&inside)])
}

#[test]
fn segments_that_are_not_cut_yet_go_whole_to_their_owner() {
    let rig = Rig::new("gso").unwrap();
    rig.attach_owned(PATIENCE).unwrap();
    let longest = longest(&rig, |what, packets, frames| {
        // Fewer packets than have room for the bytes: on the average they are longer than the MTU.
        assert!(packets > 0 && packets * MTU < LENGTH as u64, "{what}: {packets} packets");
        assert!(frames * MTU < LENGTH as u64, "{what}: {frames} frames were cut before the programs");
    });
    assert!(longest.unwrap().into_iter().all(|length| length > 2 * MTU as usize));
    rig.finish_owned().unwrap();
}

#[test]
fn segments_that_the_kernel_has_joined_go_whole_to_their_owner() {
    let rig = Rig::new("gro").unwrap();
    rig.attach_owned(PATIENCE).unwrap();
    let inner = link(&rig).unwrap();
    // Cut by the senders' kernels into what a link takes, all at once, and joined again by the host's.
    for (ns, link, option) in [
        (&rig.lab.client, CLIENT_LINK, "tso"),
        (&rig.lab.a, "eth0", "tso"),
        (&rig.lab.host, UPLINK, "gro"),
        (&rig.lab.host, inner.as_str(), "gro"),
    ] {
        ethtool(ns, link, &[option, if option == "gro" { "on" } else { "off" }]).unwrap();
    }
    let longest = longest(&rig, |what, packets, frames| {
        assert!(frames * MTU > LENGTH as u64, "{what}: only {frames} frames, which were not cut");
        assert!(
            packets > 0 && packets * MTU < LENGTH as u64,
            "{what}: {packets} packets, of {frames} frames"
        );
    });
    assert!(longest.unwrap().into_iter().all(|length| length > 2 * MTU as usize));
    rig.finish_owned().unwrap();
}

/// A laboratory whose links all take jumbo frames, and in which nobody cuts or joins anything.
fn jumbo(label: &str) -> anyhow::Result<Rig> {
    let mut rig = Rig::new(label)?;
    for (ns, link) in [(&rig.lab.client, CLIENT_LINK), (&rig.lab.host, UPLINK)] {
        ns.ip(&format!("link set {link} mtu {JUMBO}"))?;
    }
    rig.furnished()?;
    rig.attach_owned(PATIENCE)?;
    for (ns, link) in [(&rig.lab.client, CLIENT_LINK), (&rig.lab.a, "eth0"), (&rig.lab.b, "eth0")] {
        ethtool(ns, link, &["tso", "off", "gso", "off"])?;
    }
    Ok(rig)
}

#[test]
fn jumbo_frames_of_connections_are_as_any() {
    let rig = jumbo("jumbotcp").unwrap();
    let longest = longest(&rig, |what, packets, frames| {
        for count in [packets, frames] {
            assert!(count * JUMBO > LENGTH as u64, "{what}: {count} are too few");
        }
        assert!(packets * MTU < LENGTH as u64, "{what}: {packets} packets are no jumbo frames");
    });
    assert_eq!(longest.unwrap(), [JUMBO as usize + frame::ETHERNET; 2]);
    rig.finish_owned().unwrap();
}

/// Asks with a datagram that fills a jumbo frame; who answers with the same.
fn ask(socket: &UdpSocket) -> anyhow::Result<u8> {
    let header = if socket.peer_addr()?.is_ipv4() { 28 } else { 48 };
    let question: Vec<u8> = (0..JUMBO as usize - header).map(|n| (n % 251) as u8).collect();
    socket.send(&question)?;
    let mut answer = vec![0; 1 << 16];
    let length = socket.recv(&mut answer)?;
    ensure!(answer[1..length] == question[1..], "{length} bytes came, or others");
    Ok(answer[0])
}

/// How many datagrams were cut into fragments in a namespace.
fn cut(ns: &Ns) -> anyhow::Result<i64> {
    let counters = Counters::of(ns)?;
    Ok(counters.get("Ip.FragCreates")? + counters.get("Ip6.FragCreates")?)
}

#[test]
fn jumbo_frames_of_datagrams_are_as_any() {
    const ROUNDS: u64 = 10;
    let rig = jumbo("jumboudp").unwrap();
    big_echo(&rig.lab.a, BULK, b'a').unwrap();
    big_echo(&rig.lab.b, BULK, b'b').unwrap();
    let old = clients(&rig, BULK).unwrap();
    learn(&rig).unwrap();
    for socket in &old {
        assert_eq!(ask(socket).unwrap(), b'a', "in peace");
    }
    switch(&rig, Slot::B).unwrap();
    let new = clients(&rig, BULK).unwrap();
    for _ in 0..ROUNDS {
        for (sockets, who) in [(&old, b'a'), (&new, b'b')] {
            for socket in sockets {
                assert_eq!(ask(socket).unwrap(), who, "while it drains");
            }
        }
    }
    // Each of them was one frame.
    assert_eq!([event(&rig, "rewritten_v4"), event(&rig, "rewritten_v6")], [ROUNDS; 2]);
    for ns in [&rig.lab.client, &rig.lab.host, &rig.lab.a, &rig.lab.b] {
        assert_eq!(cut(ns).unwrap(), 0, "{}", ns.name());
    }
    rig.finish_owned().unwrap();
}
