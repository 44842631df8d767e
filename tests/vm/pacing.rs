//! Senders that say when each packet is to leave (`SO_MAX_PACING_RATE`), and links whose queue holds them until then
//! (`fq`): times that a partition wrote mean nothing to the queue of the uplink, and hold nothing up there.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab::{Ns, SERVICE, SwitchLab, UPLINK};
use patchswitch_tests::programs;
use patchswitch_tests::sockets::set_option;

const PORT: u16 = 8080;
/// Bytes of an answer, and how many of them leave in a second.
const LENGTH: usize = 1 << 18;
const RATE: u64 = 1 << 20;
/// No answer stands still for so long.
const STALL: Duration = Duration::from_secs(5);

/// Answers each byte of a client with as many of its own as are wanted, paced.
fn serve(ns: &Ns, tag: u8) -> anyhow::Result<()> {
    for address in SERVICE {
        let end = SocketAddr::new(address.parse()?, PORT);
        let listener = ns.enter(|| Ok(TcpListener::bind(end)?))?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || answer(stream, tag));
            }
        });
    }
    Ok(())
}

fn answer(mut stream: TcpStream, tag: u8) -> anyhow::Result<()> {
    set_option(&stream, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, RATE)?;
    while stream.read(&mut [0])? == 1 {
        stream.write_all(&vec![tag; LENGTH])?;
    }
    Ok(())
}

/// Asks once, and reads the whole answer.
fn ask(stream: &mut TcpStream) -> anyhow::Result<u8> {
    let begun = Instant::now();
    stream.write_all(b"?")?;
    let mut answer = vec![0; LENGTH];
    stream.read_exact(&mut answer).context("the answer stands still")?;
    // Without a pace it is there at once; the first packets have none.
    ensure!(begun.elapsed() > Duration::from_millis(100), "it was not paced: {:?}", begun.elapsed());
    ensure!(answer.iter().all(|byte| *byte == answer[0]), "of two servers");
    Ok(answer[0])
}

fn connect(lab: &SwitchLab) -> anyhow::Result<Vec<TcpStream>> {
    let open = |address: &str| {
        let stream = lab.client.enter(|| Ok(TcpStream::connect(SocketAddr::new(address.parse()?, PORT))?))?;
        stream.set_read_timeout(Some(STALL))?;
        Ok(stream)
    };
    SERVICE.into_iter().map(open).collect()
}

fn asked(streams: &mut [TcpStream]) -> anyhow::Result<Vec<u8>> {
    streams.iter_mut().map(ask).collect()
}

#[test]
fn packets_with_a_time_to_leave_stand_nowhere_still() {
    let lab = SwitchLab::new("pacing").unwrap();
    let patchswitch = programs::built("patchswitch").unwrap();
    lab.host.run(&["tc", "qdisc", "replace", "dev", UPLINK, "root", "fq"]).unwrap();
    let before = Snapshot::take().unwrap();
    let run = |line: &str| {
        let path = patchswitch.to_string_lossy();
        let argv: Vec<&str> = [path.as_ref()].into_iter().chain(line.split(' ')).collect();
        lab.host.run(&argv).unwrap();
    };
    let [v4, v6] = SERVICE;
    let (a, b) = (lab.a.name(), lab.b.name());
    run(&format!("attach paced --address {v4} --address {v6} --uplink {UPLINK} --announce 1 {a} {b}"));
    serve(&lab.a, b'a').unwrap();
    serve(&lab.b, b'b').unwrap();
    let link = lab.a.ip("-o link show type veth").unwrap();
    let link = link.split([' ', '@', ':']).filter(|word| !word.is_empty()).nth(1).unwrap().to_owned();
    // The partition's own queue as well: whoever paces without one does it by the clock of TCP.
    lab.a.run(&["tc", "qdisc", "replace", "dev", &link, "root", "fq"]).unwrap();
    let mut old = connect(&lab).unwrap();
    assert_eq!(asked(&mut old).unwrap(), b"aa");
    run(&format!("switch paced --to {b}"));
    let mut new = connect(&lab).unwrap();
    assert_eq!(asked(&mut new).unwrap(), b"bb");
    assert_eq!(asked(&mut old).unwrap(), b"aa");
    let shown = lab.host.run(&["tc", "-s", "qdisc", "show", "dev", UPLINK]).unwrap();
    assert!(shown.contains("qdisc fq ") && !shown.contains("Sent 0 bytes"), "{shown}");
    run("detach paced --force");
    drop((old, new));
    let mut left = Snapshot::left_since(&before, Duration::from_secs(5)).unwrap();
    left.retain(|one| one.is_of(lab.prefix()));
    assert!(left.is_empty(), "{left:?}");
}
