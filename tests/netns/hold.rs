//! New flows wait while something is moved that only one side can have.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use patchswitch::attachment::{Attachment, SwitchOptions};
use patchswitch_load::client::Settings;
use patchswitch_load::record::Class;
use patchswitch_tests::netlab::{Ns, SERVICE};
use patchswitch_tests::programs;
use rustix::process::Signal;

use crate::ask::Asking;
use crate::load::answered;
use crate::rig::{Load, NAME, Rig, Server, ends, load};

fn loaded(label: &str) -> anyhow::Result<(Rig, [Server; 2], Load)> {
    let rig = Rig::new(label)?;
    let servers = [Server::start(&rig.lab.a, "a")?, Server::start(&rig.lab.b, "b")?];
    rig.attach()?;
    let load = Load::start(&rig.lab.client, Settings { rate: 300.0, connections: 8, ..load() });
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark begun")?;
    Ok((rig, servers, load))
}

#[test]
fn what_waits_goes_to_the_new_side_and_nobody_fails() {
    let (rig, _servers, load) = loaded("hold").unwrap();
    let held = rig.ok(&["switch", NAME, "--hold", "30s", "--run", "sleep 0.6"]).unwrap();
    load.order("mark released").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    assert_eq!(held["serving"], rig.lab.b.name(), "{held}");
    assert!(held["waited"]["connections"].as_u64().unwrap() > 50, "{held}");
    assert_eq!(held["waited"]["lost"], 0, "{held}");
    assert!(held["waited"]["held_ms"].as_f64().unwrap() >= 600.0, "{held}");
    // Connections that were there stay, and are answered meanwhile; new ones are the new side's.
    assert_eq!(answered(&run, Class::Keepalive, "begun", "end").unwrap(), ["a"]);
    assert_eq!(answered(&run, Class::New, "released", "end").unwrap(), ["b"]);
    rig.finish().unwrap();
}

#[test]
fn a_command_that_fails_or_takes_too_long_gives_back() {
    let (rig, servers, load) = loaded("holdback").unwrap();
    let [_serving, waiting] = servers;
    // Nobody answers there yet: what came to it would be refused.
    drop(waiting);
    for (limit, command) in [("30s", "sleep 0.3; exit 3"), ("500ms", "sleep 20; true")] {
        let begun = Instant::now();
        let ended = rig.run(&["switch", NAME, "--hold", limit, "--run", command]).unwrap();
        assert_eq!(ended.code, Some(22), "{command}: {ended:?}");
        assert!(begun.elapsed() < Duration::from_secs(15), "{command}: {:?}", begun.elapsed());
    }
    load.order("mark back").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    assert_eq!(answered(&run, Class::New, "back", "end").unwrap(), ["a"]);
    rig.finish().unwrap();
}

/// Whoever puts something back has what waits wait for longer than was agreed at first; but not once that is over.
#[test]
fn what_waits_may_wait_for_longer() {
    let (rig, servers, load) = loaded("holdlong").unwrap();
    let [_serving, waiting] = servers;
    drop(waiting);
    let (short, long) = (Duration::from_millis(400), Duration::from_secs(20));
    let pumped = rig.with(async |attachment: &mut Attachment| {
        let to = attachment.plane().word().active().other();
        let mut hold = attachment.hold(to, short, SwitchOptions::default()).await?;
        attachment.hold_longer(&mut hold, long)?;
        let left = hold.left();
        ensure!(left > Duration::from_secs(15), "{left:?}");
        tokio::time::sleep(2 * short).await;
        ensure!(attachment.plane().held(to)?.is_some(), "it is over");
        Ok(attachment.call_off(hold).await?)
    });
    let pumped = pumped.unwrap();
    assert!(pumped.held_ms >= 800.0 && pumped.connections > 50 && pumped.lost == 0, "{pumped:?}");
    load.order("mark back").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    assert_eq!(answered(&run, Class::New, "back", "end").unwrap(), ["a"]);

    let late = rig.with(async |attachment: &mut Attachment| {
        let to = attachment.plane().word().active().other();
        let mut hold = attachment.hold(to, short, SwitchOptions::default()).await?;
        tokio::time::sleep(short).await;
        attachment.hold_longer(&mut hold, long)?;
        ensure!(hold.left().is_zero() && attachment.plane().held(to)?.is_none_or(|left| left.is_zero()));
        Ok(attachment.call_off(hold).await?)
    });
    late.unwrap();
    rig.finish().unwrap();
}

/// Its client asks again after a second: one connection all the same, and the new side is asked once.
#[test]
fn a_connection_that_is_asked_for_again_while_it_waits_is_delivered_once() {
    let rig = Rig::new("holdagain").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let pumped = rig.with(async |attachment: &mut Attachment| {
        let to = attachment.plane().word().active().other();
        let hold = attachment.hold(to, Duration::from_secs(20), SwitchOptions::default()).await?;
        let asking = ends().map(|end| {
            let client = rig.lab.client.clone();
            std::thread::spawn(move || Asking::from(&client, end))
        });
        tokio::time::sleep(Duration::from_millis(2200)).await;
        let pumped = attachment.release(hold).await?;
        for one in asking {
            let who = one.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))??.who()?;
            ensure!(who == "b", "{who}");
        }
        Ok(pumped)
    });
    let pumped = pumped.unwrap();
    // Newer kernels ask each second, older ones after one and three.
    assert!(pumped.repeats >= 2, "{pumped:?}");
    // Those that were delivered; what the clients say then may wait as well.
    assert_eq!((pumped.connections, pumped.lost), (2, 0), "{pumped:?}");
    rig.finish().unwrap();
}

#[test]
fn whoever_holds_may_be_killed() {
    let (rig, _servers, load) = loaded("holdkill").unwrap();
    let program = programs::built("patchswitch").unwrap();
    let program = program.to_string_lossy();
    let argv = [program.as_ref(), "switch", NAME, "--hold", "500ms", "--run", "sleep 0.4; exec sleep 3"];
    let mut running = rig.lab.host.spawn(&argv, None).unwrap();
    let holds = || {
        let status = rig.ok(&["status", NAME]).unwrap();
        let partitions = status["attachments"][0]["partitions"].as_array().cloned().unwrap_or_default();
        partitions.iter().any(|partition| partition["held_ms"].is_u64())
    };
    let end = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < end && !running.has_ended(), "{}", running.output());
    }
    running.signal(Signal::KILL).unwrap();
    running.wait(Duration::from_secs(10)).unwrap();
    // The end of the hold is nobody's to decide any more.
    std::thread::sleep(Duration::from_millis(1800));
    load.order("mark over").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    assert_eq!(answered(&run, Class::New, "over", "end").unwrap(), ["b"]);
    let mended = rig.ok(&["switch", NAME, "--to", rig.lab.b.name()]).unwrap();
    assert_eq!(mended["mended"][0], "packets that waited go on", "{mended}");
    rig.finish().unwrap();
}

/// Where numbered datagrams go, which nobody answers.
const NUMBERED: u16 = 5353;

/// What a partition's socket hears until nothing comes for a while after the end.
fn hear(ns: &Ns, ending: &AtomicBool) -> anyhow::Result<Vec<u32>> {
    let socket = ns.enter(|| Ok(UdpSocket::bind(("0.0.0.0", NUMBERED))?))?;
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20)?;
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    let (mut heard, mut bytes) = (Vec::new(), [0; 4]);
    loop {
        match socket.recv(&mut bytes) {
            Ok(4) => heard.push(u32::from_be_bytes(bytes)),
            Ok(other) => anyhow::bail!("{other} bytes"),
            Err(_) if ending.load(Ordering::Relaxed) => return Ok(heard),
            Err(_) => {}
        }
    }
}

/// Numbers from 0 on, until it is told to end; how many.
fn count(ns: &Ns, ending: &AtomicBool) -> anyhow::Result<u32> {
    let socket = ns.enter(|| Ok(UdpSocket::bind(("0.0.0.0", 0))?))?;
    socket.connect((SERVICE[0], NUMBERED))?;
    let mut number = 0_u32;
    while !ending.load(Ordering::Relaxed) {
        socket.send(&number.to_be_bytes())?;
        number += 1;
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(number)
}

#[test]
fn what_waits_keeps_its_order_and_nothing_is_lost() {
    let rig = Rig::new("holdorder").unwrap();
    rig.attach().unwrap();
    let (sent_all, heard_all) = (AtomicBool::new(false), AtomicBool::new(false));
    let (sent, heard) = std::thread::scope(|scope| {
        let partitions = [&rig.lab.a, &rig.lab.b];
        let hearing = partitions.map(|ns| scope.spawn(|| hear(ns, &heard_all)));
        // Both listen before anything is sent.
        std::thread::sleep(Duration::from_millis(300));
        let sending = scope.spawn(|| count(&rig.lab.client, &sent_all));
        std::thread::sleep(Duration::from_millis(200));
        let held = rig.ok(&["switch", NAME, "--hold", "30s", "--run", "sleep 0.7"]);
        std::thread::sleep(Duration::from_millis(200));
        sent_all.store(true, Ordering::Relaxed);
        let sent = sending.join().unwrap();
        heard_all.store(true, Ordering::Relaxed);
        let heard = hearing.map(|hearing| hearing.join().unwrap().unwrap());
        held.unwrap();
        (sent.unwrap(), heard)
    });
    let [old, new] = &heard;
    assert!(!old.is_empty() && new.len() > 1000, "{} and {}", old.len(), new.len());
    let mut all: Vec<u32> = old.iter().chain(new).copied().collect();
    // What comes into the queue while it is being opened is overtaken by what comes after that, and nothing else is: were it
    // opened before what waits is delivered, nearly all would be.
    let (mut largest, mut overtaken) = (0, 0);
    for number in &all {
        overtaken += usize::from(*number < largest);
        largest = largest.max(*number);
    }
    assert!(overtaken < new.len() / 20, "{overtaken} of {}", new.len());
    all.sort_unstable();
    assert!(all.iter().copied().eq(0..sent), "{} of {sent}", all.len());
    rig.finish().unwrap();
}
