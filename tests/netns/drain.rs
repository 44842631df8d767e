//! The end of a switch: what it waits for, and what happens to what does not end.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use patchswitch::dataplane::Dataplane;
use patchswitch_common::Slot;
use patchswitch_tests::netlab::{CLIENT, SERVICE};
use serde_json::Value;

use crate::ask::{Asking, who};
use crate::rig::{ECHO, NAME, Rig, Server, ends, name};
use crate::udp;

/// A laboratory in which the old partition still has one flow of each family.
fn retiring(label: &str) -> anyhow::Result<(Rig, [Server; 2], Vec<Asking>)> {
    let rig = Rig::new(label)?;
    let servers = [Server::start(&rig.lab.a, "a")?, Server::start(&rig.lab.b, "b")?];
    rig.attach()?;
    let mut flows = Vec::new();
    for end in ends() {
        let mut asking = Asking::from(&rig.lab.client, end)?;
        anyhow::ensure!(asking.who()? == "a");
        flows.push(asking);
    }
    rig.switch_to(&rig.lab.b)?;
    Ok((rig, servers, flows))
}

fn status(rig: &Rig) -> anyhow::Result<Value> {
    Ok(rig.ok(&["status", NAME])?["attachments"][0].clone())
}

/// The partition with a role.
fn with_role<'a>(status: &'a Value, role: &str) -> Option<&'a str> {
    status["partitions"].as_array()?.iter().find(|p| p["role"] == role)?["netns"].as_str()
}

#[test]
fn a_drain_ends_when_the_last_flow_does() {
    let (rig, _servers, flows) = retiring("drain").unwrap();
    let before = status(&rig).unwrap();
    assert_eq!(before["phase"], "draining");
    assert_eq!(with_role(&before, "retiring"), Some(rig.lab.a.name()));
    let begin = Instant::now();
    let closing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1500));
        drop(flows);
    });
    let report = rig.ok(&["drain", NAME]).unwrap();
    closing.join().unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(1500), "{report}");
    let drain = &report["drain"];
    assert_eq!(
        (&drain["flows_at_start"], &drain["left"], &drain["settled"]),
        (&2.into(), &0.into(), &true.into())
    );
    let after = status(&rig).unwrap();
    assert_eq!((&after["phase"], &after["notice"]), (&"steady".into(), &false.into()), "{after}");
    assert_eq!(with_role(&after, "standby"), Some(rig.lab.a.name()));
    // Nobody retires: nothing to wait for.
    assert_eq!(rig.ok(&["drain", NAME]).unwrap()["drain"]["settled"], true);
    let said = rig.run(&["drain", NAME]).unwrap().stdout;
    assert!(said.contains("nothing to do"), "{said}");
    rig.finish().unwrap();
}

#[test]
fn whoever_waits_for_the_end_is_in_nobodys_way_who_looks() {
    let (rig, _servers, flows) = retiring("look").unwrap();
    std::thread::scope(|scope| {
        // Each of the two may find the other in its way for a moment.
        let drain = scope.spawn(|| {
            loop {
                let ended = rig.run(&["drain", NAME, "--json"]).unwrap();
                if ended.code != Some(75) {
                    break ended;
                }
            }
        });
        // A change is refused from the moment on when the drain has the attachment. It is asked with a switch to
        // where the service is already: until then that changes nothing.
        let end = Instant::now() + Duration::from_secs(20);
        while rig.run(&["switch", NAME, "--to", rig.lab.b.name()]).unwrap().code != Some(75) {
            assert!(Instant::now() < end, "the drain does not begin");
        }
        let shown = rig.ok(&["flows", NAME]).unwrap();
        let of =
            |active: bool| shown["partitions"].as_array().unwrap().iter().find(|p| p["active"] == active);
        assert_eq!(of(false).unwrap()["flows"]["accepted"].as_array().unwrap().len(), 2, "{shown}");
        assert_eq!(status(&rig).unwrap()["phase"], "draining");
        assert_eq!(rig.run(&["detach", NAME]).unwrap().code, Some(75), "the drain was over");
        drop(flows);
        let ended = drain.join().unwrap();
        assert_eq!(ended.code, Some(0), "{ended:?}");
    });
    rig.finish().unwrap();
}

#[test]
fn at_the_deadline_flows_are_kept() {
    let (rig, _servers, mut flows) = retiring("keep").unwrap();
    let ended = rig.run(&["drain", NAME, "--deadline", "0.5", "--json"]).unwrap();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(
        (&report["drain"]["left"], &report["drain"]["settled"]),
        (&2.into(), &false.into()),
        "{report}"
    );
    for asking in &mut flows {
        assert_eq!(asking.who().unwrap(), "a");
    }
    drop(flows);
    rig.ok(&["drain", NAME, "--deadline", "10"]).unwrap();
    rig.finish().unwrap();
}

#[test]
fn at_the_deadline_the_switch_is_reversed() {
    let (rig, _servers, mut flows) = retiring("abort").unwrap();
    let mut newer = Asking::from(&rig.lab.client, ends()[0]).unwrap();
    assert_eq!(newer.who().unwrap(), "b");
    let ended = rig.run(&["drain", NAME, "--deadline", "0.5", "--on-deadline", "abort"]).unwrap();
    assert_eq!(ended.code, Some(22), "{ended:?}");
    let after = status(&rig).unwrap();
    assert_eq!(with_role(&after, "active"), Some(rig.lab.a.name()), "{after}");
    for (asking, owner) in flows.iter_mut().map(|flow| (flow, "a")).chain([(&mut newer, "b")]) {
        assert_eq!(asking.who().unwrap(), owner);
    }
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "a");
    }
    rig.finish().unwrap();
}

/// Nobody has remembered them; of a service without datagrams there is nothing to say.
#[test]
fn flows_of_datagrams_that_a_give_back_cuts_are_told_of() {
    for serves in [true, false] {
        let rig = Rig::new("unlearned").unwrap();
        let bind = || Ok(UdpSocket::bind("0.0.0.0:7600")?);
        let _server = serves.then(|| rig.lab.a.enter(bind).unwrap());
        rig.attach().unwrap();
        rig.switch_to(&rig.lab.b).unwrap();
        let back = rig.run(&["switch", NAME, "--to", rig.lab.a.name()]).unwrap();
        assert_eq!(back.code, Some(0), "{back:?}");
        assert_eq!(back.stderr.contains("has begun since the switch are not known"), serves, "{back:?}");
        rig.finish().unwrap();
    }
}

#[test]
fn at_the_deadline_flows_are_reset() {
    let (rig, _servers, mut flows) = retiring("reset").unwrap();
    let ended = rig.run(&["drain", NAME, "--deadline", "0.5", "--on-deadline", "reset", "--json"]).unwrap();
    assert_eq!(ended.code, Some(24), "{ended:?}");
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(
        (&report["drain"]["reset"], &report["drain"]["settled"]),
        (&2.into(), &true.into()),
        "{report}"
    );
    for asking in &mut flows {
        let error = format!("{:#}", asking.who().unwrap_err());
        assert!(error.contains("reset") || error.contains("Broken pipe"), "{error}");
    }
    let left = rig.ok(&["flows", NAME]).unwrap();
    assert!(
        left["partitions"].as_array().unwrap().iter().all(|p| p["flows"]["accepted"] == Value::Array(vec![]))
    );
    rig.finish().unwrap();
}

#[test]
fn connections_that_the_partition_made_itself_are_listed_and_not_waited_for() {
    let rig = Rig::new("outgoing").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    for (family, service) in SERVICE.into_iter().enumerate() {
        let remote = rig.lab.client.enter(|| Ok(TcpListener::bind((CLIENT[family], 0))?)).unwrap();
        let to = remote.local_addr().unwrap();
        // From the service address, as a partition whose only address that is.
        let mut outgoing = rig.lab.a.enter(|| connect_from(service, to)).unwrap();
        let (mut far, from) = remote.accept().unwrap();
        assert_eq!(from.ip().to_string(), service);
        rig.switch_to(&rig.lab.b).unwrap();
        let flows = rig.ok(&["flows", NAME]).unwrap();
        let retiring = &flows["partitions"][1]["flows"];
        assert_eq!(retiring["accepted"], Value::Array(vec![]), "{flows}");
        let outgoing_ones = retiring["outgoing"].as_array().unwrap();
        assert!(outgoing_ones.iter().any(|flow| flow["remote"] == to.to_string()), "{flows}");
        // It works all the same while its owner retires.
        far.write_all(b"x").unwrap();
        outgoing.read_exact(&mut [0]).unwrap();
        outgoing.write_all(b"y").unwrap();
        far.read_exact(&mut [0]).unwrap();
        let report = rig.ok(&["drain", NAME, "--deadline", "5"]).unwrap();
        assert_eq!(report["drain"]["settled"], true, "{report}");
        assert!(report["drain"]["seconds"].as_f64().unwrap() < 2.0, "{report}");
        drop(outgoing);
        rig.switch_to(&rig.lab.a).unwrap();
        rig.ok(&["drain", NAME, "--deadline", "5"]).unwrap();
    }
    rig.finish().unwrap();
}

#[test]
fn datagrams_that_the_partition_began_itself_are_listed_and_not_waited_for() {
    let rig = Rig::new("outgoing-udp").unwrap();
    rig.attach_owned(Duration::from_secs(60)).unwrap();
    let ends = SERVICE.into_iter().zip(CLIENT).map(|(service, client)| {
        let remote = rig.lab.client.enter(|| Ok(UdpSocket::bind((client, 0))?)).unwrap();
        remote.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let ours = rig.lab.a.enter(|| Ok(UdpSocket::bind((service, 0))?)).unwrap();
        ours.connect(remote.local_addr().unwrap()).unwrap();
        (ours, remote)
    });
    let ends: Vec<_> = ends.collect();
    let tell = || {
        for (ours, remote) in &ends {
            ours.send(b"!").unwrap();
            assert_eq!(remote.recv_from(&mut [0; 8]).unwrap().1, ours.local_addr().unwrap());
        }
    };
    udp::learn(&rig).unwrap();
    tell();
    udp::switch(&rig, Slot::B).unwrap();
    tell();
    assert_eq!(remembered(), 2);
    let flows = rig.ok(&["flows", NAME]).unwrap();
    let retiring = &flows["partitions"][1]["flows"];
    assert_eq!(
        (&retiring["learned"], retiring["outgoing"].as_array().unwrap().len()),
        (&0.into(), 2),
        "{flows}"
    );
    let report = rig.ok(&["drain", NAME, "--deadline", "5"]).unwrap();
    assert_eq!(report["drain"]["settled"], true, "{report}");
    assert!(report["drain"]["seconds"].as_f64().unwrap() < 2.0, "{report}");
    rig.finish_owned().unwrap();
}

fn connect_from(address: &str, to: std::net::SocketAddr) -> anyhow::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with};
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    bind(&socket, &std::net::SocketAddr::new(address.parse()?, 0))?;
    connect(&socket, &to).context("no connection")?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    Ok(stream)
}

/// Flows that a partition remembers without a connection, in the map itself, whether they are idle or not.
fn remembered() -> usize {
    let pin = format!("/sys/fs/bpf/patchswitch/v1/{NAME}/maps/LEARNED");
    let map = aya::maps::Map::HashMap(aya::maps::MapData::from_pin(pin).unwrap());
    let map: aya::maps::HashMap<_, [u8; 24], [u8; 32]> = map.try_into().unwrap();
    map.keys().map(Result::unwrap).count()
}

fn learned(rig: &Rig) -> Vec<Value> {
    let flows = rig.ok(&["flows", NAME]).unwrap();
    flows["partitions"].as_array().unwrap().iter().map(|one| one["flows"]["learned"].clone()).collect()
}

#[test]
fn with_the_notice_off_no_flow_is_remembered() {
    for (idle, words, code) in [
        // It ends by itself when they are idle.
        (Duration::from_millis(1500), &["--deadline", "60"][..], 0),
        // They are cut before they are.
        (Duration::from_secs(125), &["--deadline", "0.5", "--on-deadline", "reset"], 24),
    ] {
        let rig = udp::echoing("forgotten", idle).unwrap();
        let clients = udp::clients(&rig, ECHO).unwrap();
        udp::learn(&rig).unwrap();
        for client in &clients {
            assert_eq!(udp::ask(client, 1).unwrap(), "a");
        }
        udp::switch(&rig, Slot::B).unwrap();
        assert_eq!(remembered(), 2);
        let ended = rig.run(&[&["drain", NAME], words].concat()).unwrap();
        assert_eq!(ended.code, Some(code), "{ended:?}");
        let after = status(&rig).unwrap();
        assert_eq!((&after["phase"], &after["notice"]), (&"steady".into(), &false.into()), "{after}");
        assert_eq!((remembered(), learned(&rig)), (0, vec![0.into(), 0.into()]));
        // Nor is one from then on.
        for client in &clients {
            assert_eq!(udp::ask(client, 2).unwrap(), "b");
        }
        assert_eq!(remembered(), 0);
        rig.finish_owned().unwrap();
    }
}

/// As a kill leaves it between the word that says that the switch is over and what is done then.
#[test]
fn what_is_remembered_of_a_switch_that_is_over_is_forgotten_by_whoever_comes_next() {
    let rig = udp::echoing("remembered", Duration::from_secs(125)).unwrap();
    let clients = udp::clients(&rig, ECHO).unwrap();
    udp::learn(&rig).unwrap();
    for client in &clients {
        assert_eq!(udp::ask(client, 1).unwrap(), "a");
    }
    udp::switch(&rig, Slot::B).unwrap();
    let plane = Dataplane::open(&name().unwrap()).unwrap();
    plane.store(plane.word(), plane.word().settled()).unwrap();
    assert_eq!(remembered(), 2);
    let again = ["switch", NAME, "--to", rig.lab.b.name()];
    let said = rig.ok(&again).unwrap();
    let mended = said["mended"].as_array().unwrap();
    assert!(mended.contains(&"flows of a switch that is over were forgotten".into()), "{said}");
    assert_eq!(remembered(), 0);
    assert_eq!(rig.ok(&again).unwrap()["mended"], serde_json::json!([]));
    rig.finish_owned().unwrap();
}
