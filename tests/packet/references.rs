//! With each look at a socket the kernel lends it to the program; all of them are given back.
//!
//! That a program gives back what it was lent on every path is what the verifier insists on; what it cannot know is
//! whether the helpers of the kernel at hand do what they say, in every state of a socket.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use patchswitch_common::Slot;
use patchswitch_common::maps::Settings;
use patchswitch_common::verdict::Hook;
use patchswitch_common::word::Word;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::tcp_sockets_in;
use patchswitch_tests::programs;
use rustix::net::connect;

use crate::bench::{Bench, Family, PORT, families, service};
use crate::frame;
use crate::steer::{ACK, DRAINING, FIN, SYN, connection, listener, tcp_socket, time_wait};

/// How often each packet is sent through each program under each word: a million for each state of a socket.
const TIMES: u32 = 350_000;
/// What the kernel itself does with sockets of which nobody wants anything is over by then.
const SETTLED: Duration = Duration::from_secs(10);
/// Where `/proc/net/tcp` and its like have the references to a socket (`get_tcp4_sock` and others of the kernel).
const REFERENCES: usize = 10;
/// A handshake under way is of one of these ports of the client.
const HALF_OPEN: Range<u16> = 3000..4000;
/// The programs that look at sockets.
const PROGRAMS: [Hook; 2] = [Hook::Uplink, Hook::Xdp];

/// How many references there are to each socket of a namespace, by its ends and state. Of a request (`SYN_RECV`) the
/// kernel says only that it is there.
fn references(ns: &Ns) -> anyhow::Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = ns.enter(|| Ok(std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))?))?;
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if let [_, local, remote, state, ..] = fields[..]
                && let Some(count) = fields.get(REFERENCES)
            {
                found.insert(format!("{table} {local} {remote} {state}"), (*count).to_owned());
            }
        }
    }
    Ok(found)
}

/// What is counted once it stays the same for longer than the kernel's own timers hold what has just begun or ended.
fn at_rest<T: PartialEq>(count: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let (mut before, end) = (count()?, Instant::now() + SETTLED);
    loop {
        std::thread::sleep(Duration::from_millis(1500));
        let now = count()?;
        if now == before || Instant::now() >= end {
            return Ok(now);
        }
        before = now;
    }
}

/// Lets answers to handshakes of [`HALF_OPEN`] reach nobody, and the service wait longer for the end of one than any test
/// takes. They are lost where they arrive: a request whose answer cannot be sent is given up.
fn never_finish(ns: &Ns) -> anyhow::Result<()> {
    let Range { start, end } = HALF_OPEN;
    let rules = format!(
        "add table inet half\nadd chain inet half came {{ type filter hook input priority 0; }}\n\
         add rule inet half came tcp sport {PORT} tcp dport {start}-{end} drop\n"
    );
    ns.enter(|| programs::run_with_input(&["nft", "-f", "-"], Some(&rules)))?;
    for (setting, times) in [("tcp_synack_retries", "20"), ("tcp_syn_retries", "20")] {
        ns.sysctl(&format!("net/ipv4/{setting}"), times)?;
    }
    Ok(())
}

/// Begins a handshake that is never finished: the service has a request for it.
fn request(ns: &Ns, family: Family, port: u16) -> anyhow::Result<OwnedFd> {
    let client = ns.enter(|| {
        let socket = tcp_socket(family, SocketAddr::new(family.client, port))?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        ensure!(connect(&socket, &service(family)) == Err(rustix::io::Errno::INPROGRESS), "it is connected");
        Ok(socket)
    })?;
    let end = Instant::now() + Duration::from_secs(5);
    while !tcp_sockets_in(ns)?.iter().any(|one| one.state == "SYN-RECV" && one.peer.port() == port) {
        ensure!(Instant::now() < end, "no request");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(client)
}

/// Sends a packet through a program so many times. XDP addresses it to a partition, and sees that the next time: a
/// partition has the address of the uplink here.
fn look(bench: &mut Bench, hook: Hook, times: u32, packet: &frame::Ip) -> anyhow::Result<()> {
    let uplink = bench.uplink;
    bench.repeat(hook, uplink, times, &packet.frame(uplink.mac))
}

fn at_the_uplinks_address(bench: &mut Bench) -> anyhow::Result<()> {
    let mac = bench.uplink.mac;
    bench.declare(|settings| Settings { inner_mac: mac, ..settings })
}

#[test]
fn every_socket_that_was_looked_at_is_given_back() {
    let mut bench = Bench::new("references").unwrap();
    at_the_uplinks_address(&mut bench).unwrap();
    never_finish(&bench.lab.a).unwrap();
    let (mut held, mut requests) = (Vec::new(), Vec::new());
    for family in families() {
        let listening = listener(&bench.lab.a, family).unwrap();
        time_wait(&bench.lab.a, &listening, family, 1001).unwrap();
        held.push((connection(&bench.lab.a, &listening, family, 1000).unwrap(), listening));
        let other = listener(&bench.lab.b, family).unwrap();
        held.push((connection(&bench.lab.b, &other, family, 1002).unwrap(), other));
        requests.push(request(&bench.lab.a, family, HALF_OPEN.start).unwrap());
    }
    let connected = families().map(|family| {
        let socket = bench.lab.a.enter(|| Ok(UdpSocket::bind(service(family))?)).unwrap();
        bench.lab.a.enter(|| Ok(socket.connect((family.client, 1000))?)).unwrap();
        socket
    });
    let spaces = [bench.lab.a.clone(), bench.lab.b.clone()];
    let count = || spaces.iter().map(references).collect::<anyhow::Result<Vec<_>>>();
    // A timer of a connection that has just begun holds it as well, for as long as its SYN would have been waited for: the
    // kernel lets it run out (RFC 6298 2.1: a second).
    let before = at_rest(count).unwrap();
    // A listener, a connection, what remains of one, a handshake of two ends and a socket of datagrams in each family.
    assert!(before[0].len() >= 12 && before[1].len() >= 4, "{before:?}");
    for (word, short_way) in
        [(DRAINING, true), (DRAINING, false), (Word::steady(Slot::B, 1).shared(50), true)]
    {
        bench.word(word).unwrap();
        bench.short_way(short_way).unwrap();
        for (family, hook) in families().into_iter().flat_map(|family| PROGRAMS.map(|hook| (family, hook))) {
            let to = (family.service, PORT);
            for (port, flags) in [
                (1000, ACK),
                (1000, SYN),
                (1001, ACK | FIN),
                (1001, SYN),
                (1002, ACK),
                (1003, SYN),
                (1003, ACK),
                (HALF_OPEN.start, ACK),
                (HALF_OPEN.start, SYN),
            ] {
                let packet = frame::tcp((family.client, port), to, flags, &[]);
                look(&mut bench, hook, TIMES, &packet).unwrap();
            }
            for port in [1000, 1003] {
                look(&mut bench, hook, TIMES, &frame::udp((family.client, port), to, b"?")).unwrap();
            }
        }
    }
    // What the kernel itself does with a socket meanwhile is over in a moment.
    let end = Instant::now() + SETTLED;
    while count().unwrap() != before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(count().unwrap(), before);
    drop((held, connected, requests));
    bench.finish().unwrap();
}

/// So many sockets of each family and state are looked at, and so often each. A listener with room for 128 gives up requests
/// early when it has half of that.
const SOCKETS: u16 = 60;
const LOOKS: u32 = 20;
/// Where the kernel's allocator has them: connections and listeners, handshakes under way, remains.
const SLABS: [&str; 6] =
    ["TCP", "TCPv6", "request_sock_TCP", "request_sock_TCPv6", "tw_sock_TCP", "tw_sock_TCPv6"];

/// How many objects of each kind the kernel has. It says so only of slabs that no processor keeps for itself: those are
/// given up first.
fn objects() -> anyhow::Result<BTreeMap<&'static str, i64>> {
    for slab in SLABS {
        std::fs::write(format!("/sys/kernel/slab/{slab}/shrink"), "1").context(slab)?;
    }
    let text = std::fs::read_to_string("/proc/slabinfo")?;
    let of = |slab: &'static str| {
        let line = text.lines().find_map(|line| line.strip_prefix(slab)?.strip_prefix(' '));
        let count = line.and_then(|rest| rest.split_whitespace().next()).context(slab)?;
        Ok((slab, count.parse()?))
    };
    // Sockets are never merged with others of their size: their slabs keep their type (`SLAB_TYPESAFE_BY_RCU`).
    SLABS.into_iter().map(of).collect()
}

/// What is there of each kind beyond what was there before.
fn more_than(before: &BTreeMap<&'static str, i64>) -> anyhow::Result<BTreeMap<&'static str, i64>> {
    Ok(objects()?.into_iter().map(|(slab, count)| (slab, count - before[slab])).collect())
}

type Held = (Vec<[TcpStream; 2]>, Vec<OwnedFd>, TcpListener);

/// Many connections, remains of others and handshakes under way of one family.
fn many(ns: &Ns, family: Family) -> anyhow::Result<Held> {
    let listening = listener(ns, family)?;
    let (mut connections, mut requests) = (Vec::new(), Vec::new());
    for number in 0..SOCKETS {
        connections.push(connection(ns, &listening, family, 1000 + number)?);
        time_wait(ns, &listening, family, 2000 + number)?;
        requests.push(request(ns, family, HALF_OPEN.start + number)?);
    }
    Ok((connections, requests, listening))
}

/// The end of a socket that was looked at is the end of its memory, also where `/proc` does not tell of references.
#[test]
fn sockets_that_were_looked_at_are_freed() {
    // Of earlier tests the kernel may still have some.
    let before = at_rest(objects).unwrap();
    let mut bench = Bench::new("slabs").unwrap();
    at_the_uplinks_address(&mut bench).unwrap();
    never_finish(&bench.lab.a).unwrap();
    let held = families().map(|family| many(&bench.lab.a, family).unwrap());
    bench.word(DRAINING).unwrap();
    for (family, hook) in families().into_iter().flat_map(|family| PROGRAMS.map(|hook| (family, hook))) {
        for (first, flags) in [(1000, ACK), (2000, ACK | FIN), (2000, SYN), (HALF_OPEN.start, ACK)] {
            for port in first..first + SOCKETS {
                let packet = frame::tcp((family.client, port), (family.service, PORT), flags, &[]);
                look(&mut bench, hook, LOOKS, &packet).unwrap();
            }
        }
    }
    let there = more_than(&before).unwrap();
    eprintln!("while they are there: {there:?}");
    // Sockets of others on this machine come and go meanwhile: namespaces of earlier tests, for instance, which the kernel has
    // not taken apart yet.
    let (few, most) = (i64::from(SOCKETS) / 4, i64::from(SOCKETS) * 3 / 4);
    drop(held);
    // With its namespaces, what remains of connections goes as well.
    bench.finish().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    // As many went as were made, whatever of others went meanwhile; and none of them is left.
    let is_freed =
        |left: &BTreeMap<&str, i64>| left.iter().all(|(slab, more)| *more < few && there[slab] - more > most);
    let mut left = more_than(&before).unwrap();
    while !is_freed(&left) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(200));
        left = more_than(&before).unwrap();
    }
    assert!(is_freed(&left), "{there:?} while they are there, {left:?} afterwards");
}
