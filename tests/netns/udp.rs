//! Flows without a connection: learned while a switch is prepared, kept across it, answered with the service's
//! address, forgotten when they are idle.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use patchswitch::attachment::{AttachError, DrainOptions, OnDeadline, SwitchOptions};
use patchswitch::config::Datagrams;
use patchswitch_common::Slot;
use patchswitch_load::client::Settings;
use patchswitch_load::echo;
use patchswitch_load::record::ErrorKind;
use patchswitch_load::report::Window;
use patchswitch_tests::frame::{self, Ip, Place};
use patchswitch_tests::netlab::{CLIENT, CLIENT_LINK, Ns, OWN_A, SERVICE, UPLINK};
use pnet::datalink::{self, Channel, Config, MacAddr};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, bind, ipproto, sendto, socket_with};

use crate::rig::{ECHO, Load, Rig, echo_in, load, service};
use crate::shared::bound;

pub(crate) const IDLE: Duration = Duration::from_millis(1500);
const PAUSE: Duration = Duration::from_millis(400);

/// Datagrams only, each flow for the whole run.
fn datagrams() -> Settings {
    Settings { rate: 0.0, udp_rate: 100.0, udp_port: Some(ECHO), ..load() }
}

/// A laboratory with an echo service in both partitions.
pub(crate) fn echoing(label: &str, idle: Duration) -> anyhow::Result<Rig> {
    let rig = Rig::new(label)?;
    echo_in(&rig.lab.a, "a")?;
    echo_in(&rig.lab.b, "b")?;
    rig.attach_owned(idle)?;
    Ok(rig)
}

pub(crate) fn learn(rig: &Rig) -> anyhow::Result<()> {
    rig.with(async |attachment| Ok(attachment.learn()?))
}

pub(crate) fn switch(rig: &Rig, to: Slot) -> anyhow::Result<()> {
    rig.with(async |attachment| Ok(attachment.switch(to).await.map(drop)?))
}

pub(crate) fn event(rig: &Rig, name: &str) -> u64 {
    rig.counter(&["events", name]).unwrap_or_default()
}

#[test]
fn flows_in_flight_are_answered_with_the_services_address() {
    let rig = echoing("datagrams", IDLE).unwrap();
    let old = Load::start(&rig.lab.client, datagrams());
    std::thread::sleep(PAUSE);
    learn(&rig).unwrap();
    std::thread::sleep(IDLE);
    switch(&rig, Slot::B).unwrap();
    let new = Load::start(&rig.lab.client, datagrams());
    std::thread::sleep(PAUSE);
    let rewritten = [event(&rig, "rewritten_v4"), event(&rig, "rewritten_v6")];
    assert!(rewritten.iter().all(|count| *count > 0), "{rewritten:?}");
    // Given back while flows of both are in flight: each side keeps its own once more.
    learn(&rig).unwrap();
    std::thread::sleep(IDLE);
    switch(&rig, Slot::A).unwrap();
    std::thread::sleep(PAUSE);
    let newest = Load::start(&rig.lab.client, datagrams());
    std::thread::sleep(PAUSE);
    for (load, who) in [(old, "a"), (new, "b"), (newest, "a")] {
        let run = load.stop().unwrap();
        assert_eq!(run.failures, [], "of {who}");
        assert_eq!(run.instances, [who]);
        assert!(run.stats(run.whole()).requests >= 30);
    }
    let more = [event(&rig, "rewritten_v4"), event(&rig, "rewritten_v6")];
    assert!(more.iter().zip(rewritten).all(|(more, before)| *more > before), "{rewritten:?} {more:?}");
    assert_eq!(event(&rig, "rewrite_failed"), 0);
    // When nothing is in flight the notice is taken back by the drain.
    let report = rig.ok(&["drain", "web", "--deadline", "20"]).unwrap();
    assert_eq!(report["drain"]["settled"], true, "{report}");
    let status = rig.ok(&["status", "web"]).unwrap();
    assert_eq!(status["attachments"][0]["notice"], false, "{status}");
    rig.finish_owned().unwrap();
}

#[test]
fn without_the_notice_nobody_hears_the_answers() {
    let rig = echoing("unnoticed", IDLE).unwrap();
    let load = Load::start(&rig.lab.client, Settings { time_out: Duration::from_millis(300), ..datagrams() });
    std::thread::sleep(PAUSE);
    learn(&rig).unwrap();
    std::thread::sleep(IDLE);
    let options = SwitchOptions { notice: false, ..SwitchOptions::default() };
    rig.with(async |attachment| Ok(attachment.switch_with(Slot::B, options).await?)).unwrap();
    load.order("mark switched").unwrap();
    std::thread::sleep(PAUSE * 2);
    let run = load.stop().unwrap();
    let switched = run.mark("switched").unwrap();
    let after = run.stats(Window { from_ns: switched, to_ns: run.ended_ns });
    assert!(after.requests > 20 && after.failed == after.requests, "{after:?}");
    for failure in run.failures_due(Window { from_ns: switched, to_ns: run.ended_ns }) {
        let ErrorKind::WrongSource(from) = failure.error else { panic!("{failure:?}") };
        assert!(OWN_A.contains(&from.ip().to_string().as_str()), "{failure:?}");
    }
    assert_eq!(event(&rig, "rewritten_v4") + event(&rig, "rewritten_v6"), 0);
    rig.finish_owned().unwrap();
}

/// One client socket for each family, connected to a port of the service.
pub(crate) fn clients(rig: &Rig, port: u16) -> anyhow::Result<[UdpSocket; 2]> {
    let open = |to: IpAddr| {
        rig.lab.client.enter(|| {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect((to, port))?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            Ok(socket)
        })
    };
    let [v4, v6] = service().map(open);
    Ok([v4?, v6?])
}

/// Who answers a question on a connected socket, which hears nobody but the service.
pub(crate) fn ask(socket: &UdpSocket, number: u64) -> anyhow::Result<String> {
    socket.send(&echo::question(1, number))?;
    let mut bytes = [0; echo::DATAGRAM_MAX];
    let length = socket.recv(&mut bytes)?;
    let (_, got, tag) = echo::parse(&bytes[..length]).ok_or_else(|| anyhow::anyhow!("not an answer"))?;
    anyhow::ensure!(got == number, "an old answer");
    Ok(String::from_utf8_lossy(tag).into_owned())
}

#[test]
fn a_flow_that_is_idle_is_forgotten() {
    let rig = echoing("idle", IDLE).unwrap();
    let [v4, v6] = clients(&rig, ECHO).unwrap();
    learn(&rig).unwrap();
    for socket in [&v4, &v6] {
        assert_eq!(ask(socket, 1).unwrap(), "a");
    }
    switch(&rig, Slot::B).unwrap();
    let mut last = Instant::now();
    // Each answer begins the time anew.
    for number in 2..6 {
        std::thread::sleep(IDLE / 3);
        for socket in [&v4, &v6] {
            assert_eq!(ask(socket, number).unwrap(), "a", "{number}");
        }
        last = Instant::now();
    }
    std::thread::sleep(IDLE.saturating_sub(last.elapsed()) + PAUSE);
    for socket in [&v4, &v6] {
        assert_eq!(ask(socket, 9).unwrap(), "b", "who has been silent for so long is a new client");
    }
    rig.finish_owned().unwrap();
}

#[test]
fn the_idle_time_can_be_changed_while_flows_are_learned() {
    let rig = echoing("idlechange", IDLE * 400).unwrap();
    let sockets = clients(&rig, ECHO).unwrap();
    learn(&rig).unwrap();
    for socket in &sockets {
        assert_eq!(ask(socket, 1).unwrap(), "a");
    }
    for changes in [true, false] {
        let changed =
            rig.with(async |attachment| Ok(attachment.set_datagrams(IDLE, &Datagrams::default())?)).unwrap();
        assert_eq!(changed, changes);
    }
    std::thread::sleep(IDLE + PAUSE);
    switch(&rig, Slot::B).unwrap();
    for socket in &sockets {
        assert_eq!(ask(socket, 2).unwrap(), "b", "silent for longer than it may be");
    }
    rig.finish_owned().unwrap();
}

#[test]
fn flows_that_were_not_learned_go_to_the_new_partition() {
    let rig = echoing("unlearned", IDLE).unwrap();
    let sockets = clients(&rig, ECHO).unwrap();
    for socket in &sockets {
        assert_eq!(ask(socket, 1).unwrap(), "a");
    }
    switch(&rig, Slot::B).unwrap();
    for socket in &sockets {
        assert_eq!(ask(socket, 2).unwrap(), "b");
    }
    rig.finish_owned().unwrap();
}

/// Echoes datagrams of any size, with a tag for their first byte.
pub(crate) fn big_echo(ns: &Ns, port: u16, tag: u8) -> anyhow::Result<()> {
    for socket in ns.enter(|| Ok(echo::bind(port)?))? {
        std::thread::spawn(move || {
            let mut bytes = vec![0; 65_536];
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                bytes[0] = tag;
                // Whoever does not hear it says so.
                drop(socket.send_to(&bytes[..length], from));
            }
        });
    }
    Ok(())
}

#[test]
fn fragments_follow_the_first_one_both_ways() {
    let rig = Rig::new("fragments").unwrap();
    big_echo(&rig.lab.a, 7200, b'a').unwrap();
    big_echo(&rig.lab.b, 7200, b'b').unwrap();
    rig.attach_owned(IDLE).unwrap();
    let question: Vec<u8> = (0..4000_u32).map(|i| (i % 251) as u8).collect();
    let ask = |socket: &UdpSocket| {
        socket.send(&question).unwrap();
        let mut answer = vec![0; 65_536];
        let length = socket.recv(&mut answer).unwrap();
        assert_eq!(answer[1..length], question[1..], "whole");
        answer[0]
    };
    let old = clients(&rig, 7200).unwrap();
    learn(&rig).unwrap();
    for socket in &old {
        assert_eq!(ask(socket), b'a');
    }
    switch(&rig, Slot::B).unwrap();
    let new = clients(&rig, 7200).unwrap();
    for _ in 0..10 {
        for socket in &old {
            assert_eq!(ask(socket), b'a');
        }
        for socket in &new {
            assert_eq!(ask(socket), b'b');
        }
    }
    // Three fragments each, of which only the first has ports.
    assert!(event(&rig, "rewritten_v4") >= 30 && event(&rig, "rewritten_v6") >= 30);
    rig.finish_owned().unwrap();
}

/// Sends frames on the client's link, addressed to the host.
pub(crate) fn send_frames(rig: &Rig, packets: &[Ip]) -> anyhow::Result<()> {
    let shown = rig.lab.host.ip(&format!("-j link show dev {UPLINK}"))?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    let mac: MacAddr = shown[0]["address"].as_str().unwrap_or_default().parse()?;
    rig.lab.client.enter(|| {
        let links = datalink::interfaces();
        let link = links.iter().find(|link| link.name == CLIENT_LINK).context("no link")?;
        let Channel::Ethernet(mut sender, _) = datalink::channel(link, Config::default())? else {
            anyhow::bail!("no Ethernet")
        };
        for packet in packets {
            sender.send_to(&packet.frame(mac.octets()), None).context("no room")??;
        }
        Ok(())
    })
}

#[test]
fn a_fragment_before_its_first_one_finds_its_side() {
    let rig = Rig::new("disorder").unwrap();
    big_echo(&rig.lab.a, 7200, b'a').unwrap();
    big_echo(&rig.lab.b, 7200, b'b').unwrap();
    rig.attach_owned(IDLE).unwrap();
    let old = clients(&rig, 7200).unwrap();
    learn(&rig).unwrap();
    for socket in &old {
        socket.send(b"?").unwrap();
        socket.recv(&mut [0; 8]).unwrap();
    }
    switch(&rig, Slot::B).unwrap();
    let new = clients(&rig, 7200).unwrap();
    let mut id = 0x7000;
    for (sockets, owner) in [(&old, b'a'), (&new, b'b')] {
        for (socket, service) in sockets.iter().zip(service()) {
            let client = socket.local_addr().unwrap();
            let whole = frame::udp((client.ip(), client.port()), (service, 7200), &[b'?'; 1200]);
            id += 1;
            let part = |offset: u16, more, bytes: &[u8]| {
                let place = Some(Place { offset, more, id });
                Ip { place, payload: bytes.to_vec(), ..whole.clone() }
            };
            let (first, later) = whole.payload.split_at(800);
            // Nobody can tell whose this is until the other one has come.
            send_frames(&rig, &[part(100, false, later), part(0, true, first)]).unwrap();
            let mut answer = [0; 2000];
            assert_eq!((socket.recv(&mut answer).unwrap(), answer[0]), (1200, owner), "{service}");
        }
    }
    assert!(event(&rig, "fragment_unknown") >= 4);
    rig.finish_owned().unwrap();
}

#[test]
fn a_table_that_is_full_refuses_the_switch() {
    let rig = echoing("full", Duration::from_secs(60)).unwrap();
    let flood = |addresses: [&str; 2]| {
        rig.lab.a.enter(|| {
            let socket = UdpSocket::bind((SERVICE[0], 7300))?;
            for address in addresses {
                let address: IpAddr = address.parse()?;
                for port in 1..=u16::MAX {
                    // The client has nobody there and says so.
                    drop(socket.send_to(b"x", (address, port)));
                }
            }
            Ok(())
        })
    };
    let refused = |result: Result<_, AttachError>| matches!(result, Err(AttachError::LearnFull { packets }) if packets > 0);
    learn(&rig).unwrap();
    rig.lab.client.ip("addr add 10.77.0.3/24 dev eth0").unwrap();
    flood([CLIENT[0], "10.77.0.3"]).unwrap();
    assert!(event(&rig, "learn_full") > 0);
    assert!(rig.with(async |attachment| Ok(refused(attachment.switch(Slot::B).await))).unwrap());
    let status = rig.ok(&["status", "web"]).unwrap();
    assert_eq!(status["attachments"][0]["phase"], "steady", "{status}");
    // It is what counted since the learning began that matters.
    rig.with(async |attachment| {
        attachment.settle()?;
        attachment.learn()?;
        Ok(attachment.switch(Slot::B).await?)
    })
    .unwrap();
    rig.with(async |attachment| Ok(attachment.settle()?)).unwrap();
    // Told to, it is done all the same.
    learn(&rig).unwrap();
    let options = SwitchOptions { despite_losses: true, ..SwitchOptions::default() };
    rig.with(async |attachment| Ok(attachment.switch_with(Slot::A, options).await?)).unwrap();
    rig.lab.client.ip("addr del 10.77.0.3/24 dev eth0").unwrap();
    rig.finish_owned().unwrap();
}

#[test]
fn the_programs_say_what_they_could_not_remember() {
    let mut rig = Rig::new("log").unwrap();
    rig.lab.client.ip("addr add fd77::3/64 dev eth0 nodad").unwrap();
    rig.furnished().unwrap();
    rig.attach().unwrap();
    let a = rig.lab.a.clone();
    let flood = std::thread::spawn(move || {
        // While the command below learns.
        std::thread::sleep(Duration::from_millis(500));
        a.enter(|| {
            let socket = UdpSocket::bind((SERVICE[1], 7300))?;
            for port in 1..=u16::MAX {
                drop(socket.send_to(b"x", (CLIENT[1], port)));
                drop(socket.send_to(b"x", ("fd77::3", port)));
            }
            Ok(())
        })
    });
    let ended = rig.run(&["switch", "web", "--learn", "6"]).unwrap();
    flood.join().unwrap().unwrap();
    assert_eq!(ended.code, Some(21), "{ended:?}");
    assert!(ended.stderr.contains("WARN"), "{}", ended.stderr);
    let line = "the table of learned flows is full: fd77::";
    let lines = ended.stderr.lines().filter(|text| text.contains(line)).count();
    assert!((1..=40).contains(&lines), "{lines} lines: {}", ended.stderr);
    assert!(event(&rig, "learn_full") > 1000);
    // Said once: the next reader hears only what is new.
    let again = rig.run(&["switch", "web"]).unwrap();
    assert!(!again.stderr.contains(line), "{again:?}");
    rig.finish().unwrap();
}

/// Sends what is to look like UDP by a raw socket: the kernel makes the header of IP, and nothing else.
fn raw(ns: &Ns, from: &str, to: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let (from, to): (IpAddr, IpAddr) = (from.parse()?, to.parse()?);
    let family = if from.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    ns.enter(|| {
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::UDP))?;
        bind(&socket, &SocketAddr::new(from, 0))?;
        sendto(&socket, bytes, SendFlags::empty(), &SocketAddr::new(to, 0))?;
        Ok(())
    })
}

#[test]
fn what_is_too_short_for_an_answer_is_none() {
    let rig = echoing("cut-short", Duration::from_secs(60)).unwrap();
    let clients = clients(&rig, ECHO).unwrap();
    learn(&rig).unwrap();
    for client in &clients {
        assert_eq!(ask(client, 1).unwrap(), "a");
    }
    switch(&rig, Slot::B).unwrap();
    let rewritten = || [event(&rig, "rewritten_v4"), event(&rig, "rewritten_v6")];
    for (family, client) in clients.iter().enumerate() {
        let to = client.local_addr().unwrap().port();
        // It has ports, so it could be known whose it is, and ends where a checksum would be.
        let short = [ECHO.to_be_bytes(), to.to_be_bytes()].concat();
        raw(&rig.lab.a, OWN_A[family], CLIENT[family], &short).unwrap();
    }
    assert_eq!(rewritten(), [0, 0]);
    // A whole one is.
    for client in &clients {
        assert_eq!(ask(client, 2).unwrap(), "a");
    }
    assert_eq!((rewritten(), event(&rig, "rewrite_failed")), ([1, 1], 0));
    rig.finish_owned().unwrap();
}

/// Who waits for flows is told of those without a connection as well: they are waited for, and cut at the deadline.
#[test]
fn flows_without_a_connection_count_in_what_is_left() {
    let rig = echoing("left", Duration::from_secs(60)).unwrap();
    learn(&rig).unwrap();
    for client in &clients(&rig, ECHO).unwrap() {
        assert_eq!(ask(client, 1).unwrap(), "a");
    }
    switch(&rig, Slot::B).unwrap();
    let said = rig.refused(&["detach", "web"], 1).unwrap();
    assert!(said.contains("web still has 2 flows, which would be cut"), "{said}");
    let drain = |on_deadline: &str| {
        let ended = rig.run(&["drain", "web", "--deadline", "0.3", "--on-deadline", on_deadline, "--json"]);
        let ended = ended.unwrap();
        let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
        let of = |key: &str| report["drain"][key].clone();
        (ended.code, of("flows_at_start"), of("left"), of("reset"), of("settled"))
    };
    assert_eq!(drain("keep"), (Some(1), 2.into(), 2.into(), 0.into(), false.into()));
    assert_eq!(drain("reset"), (Some(24), 2.into(), 2.into(), 2.into(), true.into()));
    rig.finish_owned().unwrap();
}

#[test]
fn a_partition_that_forges_its_source_is_named_in_a_few_lines() {
    const FORGED: &str = "10.99.0.9";
    let rig = Rig::new("forged").unwrap();
    rig.attach_owned(IDLE).unwrap();
    rig.lab.a.ip("addr add 10.99.0.9/32 dev eth0").unwrap();
    let sent = rig.lab.a.enter(|| {
        let socket = UdpSocket::bind((FORGED, 0))?;
        (0..1000).try_for_each(|_| socket.send_to(b"x", (CLIENT[0], 7300)).map(drop))?;
        Ok(())
    });
    sent.unwrap();
    let said = rig.run(&["switch", "web"]).unwrap();
    assert_eq!(said.code, Some(0), "{said:?}");
    let lines: Vec<&str> = said.stderr.lines().filter(|text| text.contains("WARN")).collect();
    // The 1st, 2nd, 4th … of each processor.
    let most = 10 * std::thread::available_parallelism().unwrap().get();
    assert!((1..=most).contains(&lines.len()), "{lines:#?}");
    let wanted = "a partition sent a packet from 10.99.0.9, which is not its address, or not yet: dropped";
    assert!(lines.iter().all(|text| text.ends_with(wanted)), "{lines:#?}");
    assert_eq!(rig.counter(&["packets", "from_partition", "spoofed"]).unwrap(), 1000);
    rig.lab.a.ip("addr del 10.99.0.9/32 dev eth0").unwrap();
    rig.finish_owned().unwrap();
}

#[test]
fn a_connected_socket_keeps_its_flow_and_is_waited_for() {
    const CONNECTED: u16 = 7400;
    let rig = Rig::new("connected").unwrap();
    rig.attach_owned(IDLE).unwrap();
    let clients = clients(&rig, CONNECTED).unwrap();
    let mut servers = Vec::new();
    for (client, address) in clients.iter().zip(service()) {
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let peer = SocketAddr::new(
            CLIENT[usize::from(address.is_ipv6())].parse().unwrap(),
            client.local_addr().unwrap().port(),
        );
        let (waiting, connected) = rig
            .lab
            .a
            .enter(|| {
                let waiting = bound((any, CONNECTED).into())?;
                let connected = bound((address, CONNECTED).into())?;
                connected.connect(peer)?;
                connected.set_read_timeout(Some(Duration::from_secs(2)))?;
                Ok((waiting, connected))
            })
            .unwrap();
        servers.push((waiting, connected));
    }
    switch(&rig, Slot::B).unwrap();
    for (client, (_, connected)) in clients.iter().zip(&servers) {
        client.send(b"question").unwrap();
        let length = connected.recv(&mut [0; 16]).unwrap();
        assert_eq!(length, 8, "no entry is needed where a socket tells");
        connected.send(b"answer").unwrap();
        assert_eq!(client.recv(&mut [0; 16]).unwrap(), 6);
    }
    let options = |on_deadline| DrainOptions { deadline: Some(Duration::from_millis(600)), on_deadline };
    let kept =
        rig.with(async |attachment| Ok(attachment.drain(&options(OnDeadline::Keep), |_| ()).await?)).unwrap();
    assert_eq!((kept.left, kept.settled), (2, false));
    let reset = rig
        .with(async |attachment| Ok(attachment.drain(&options(OnDeadline::Reset), |_| ()).await?))
        .unwrap();
    assert_eq!((reset.reset, reset.settled), (2, true));
    rig.finish_owned().unwrap();
}
