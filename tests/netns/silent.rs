//! Connections on which nothing is said: the probes of their clients' kernels find who has them (packet cases D-24 and
//! D-25).

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::ensure;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::Counters;
use rustix::net::sockopt;

use crate::rig::{PORT, Rig, ends};

/// Longer than a kernel takes for a few probes of each kind, on a slow machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection of the client to a partition's listener.
fn connect(rig: &Rig, listener: &TcpListener, end: SocketAddr) -> anyhow::Result<[TcpStream; 2]> {
    let client = rig.lab.client.enter(|| Ok(TcpStream::connect_timeout(&end, PATIENCE)?))?;
    let pair = [client, listener.accept()?.0];
    pair.iter().try_for_each(|stream| stream.set_read_timeout(Some(PATIENCE)))?;
    Ok(pair)
}

/// Asks every second whether the other end is there, and gives up after two that nobody answered.
fn probe_often(stream: &TcpStream) -> anyhow::Result<()> {
    let second = Duration::from_secs(1);
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, second)?;
    sockopt::set_tcp_keepintvl(stream, second)?;
    Ok(sockopt::set_tcp_keepcnt(stream, 2)?)
}

/// Writes until the other end, which does not read, has no room left; how much that was.
fn fill(mut stream: &TcpStream) -> anyhow::Result<usize> {
    stream.set_nonblocking(true)?;
    let (mut written, mut idle) = (0, Instant::now());
    // The kernel sends on what it took as long as there is room at the other end.
    while idle.elapsed() < Duration::from_millis(300) {
        match stream.write(&[7; 1 << 16]) {
            Ok(length) => {
                written += length;
                idle = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
    stream.set_nonblocking(false)?;
    Ok(written)
}

/// Waits until the client's kernel has sent so many more probes of either kind.
fn probed(client: &Ns, more: [i64; 2]) -> anyhow::Result<()> {
    let counted = || {
        let counters = Counters::of(client)?;
        anyhow::Ok([counters.get("TcpExt.TCPKeepAlive")?, counters.get("TcpExt.TCPWinProbe")?])
    };
    let (before, end) = (counted()?, Instant::now() + PATIENCE);
    loop {
        let now = counted()?;
        if (0..2).all(|kind| now[kind] >= before[kind] + more[kind]) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "too few probes: {before:?} {now:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn probes_of_silent_connections_are_answered_by_who_has_them() {
    let rig = Rig::new("silent").unwrap();
    let on = |ns: &Ns| ns.enter(|| Ok(TcpListener::bind(("::", PORT))?));
    let (a, _b) = (on(&rig.lab.a).unwrap(), on(&rig.lab.b).unwrap());
    rig.attach().unwrap();
    let segments = |ns: &Ns| Counters::of(ns).unwrap().get("Tcp.InSegs").unwrap();
    for end in ends() {
        let [mut client, mut server] = connect(&rig, &a, end).unwrap();
        let [full, mut slow] = connect(&rig, &a, end).unwrap();
        probe_often(&client).unwrap();
        let written = fill(&full).unwrap();
        rig.switch_to(&rig.lab.b).unwrap();
        let (other, kept) = (segments(&rig.lab.b), rig.counter(&["events", "kept_by_retiring"]).unwrap());
        // More than the client waits for in vain. Those of the window become rare soon.
        probed(&rig.lab.client, [4, 2]).unwrap();
        let more = rig.counter(&["events", "kept_by_retiring"]).unwrap() - kept;
        assert!(more >= 6, "{end}: {more} probes were kept");
        assert_eq!(segments(&rig.lab.b), other, "{end}: the other side was asked");
        for text in [&b"question"[..], b"answer"] {
            client.write_all(text).unwrap();
            let mut got = vec![0; text.len()];
            server.read_exact(&mut got).unwrap();
            assert_eq!(got, text, "{end}");
            (client, server) = (server, client);
        }
        let mut got = vec![0; written];
        slow.read_exact(&mut got).unwrap();
        assert!(got.iter().all(|byte| *byte == 7), "{end}");
        drop(full);
        assert_eq!(slow.read(&mut [0]).unwrap(), 0, "{end}: no more than that");
        rig.switch_to(&rig.lab.a).unwrap();
    }
    rig.finish().unwrap();
}
