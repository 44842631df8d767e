//! Programs of another version take the place of those that are attached, under a flood, and no packet is lost.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use patchswitch::attachment::{Attachment, Spec};
use patchswitch::dataplane::HookKind;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::Counters;

use crate::ask::who;
use crate::rig::{NAME, Rig, Server, ends, service, spec};
use crate::xdp;

/// So many times the programs are replaced.
const REPLACEMENTS: u32 = 8;
/// A port of the flood.
const PORT: u16 = 7011;

/// The numbers of the programs that are pinned.
pub(crate) fn programs() -> Vec<u32> {
    let directory = format!("/sys/fs/bpf/patchswitch/v1/{NAME}/programs");
    let mut ids: Vec<u32> = std::fs::read_dir(directory)
        .unwrap()
        .map(|pin| aya::programs::ProgramInfo::from_pin(pin.unwrap().path()).unwrap().id())
        .collect();
    ids.sort_unstable();
    ids
}

/// What came to a socket of a namespace: what can be read from it, and what it had no room for.
fn arrived(ns: &Ns, sink: &UdpSocket, room_before: i64) -> i64 {
    sink.set_nonblocking(true).unwrap();
    let read = std::iter::from_fn(|| sink.recv(&mut [0; 64]).ok()).count();
    i64::try_from(read).unwrap() + no_room(ns) - room_before
}

/// Datagrams that the sockets of a namespace had no room for.
fn no_room(ns: &Ns) -> i64 {
    Counters::of(ns).unwrap().get("Udp.RcvbufErrors").unwrap()
}

/// Sends datagrams to the service until it is told to stop, and returns how many.
fn flood(ns: &Ns, stop: &AtomicBool) -> i64 {
    ns.enter(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((service()[0], PORT))?;
        let mut sent = 0;
        while !stop.load(Ordering::Relaxed) {
            socket.send(&[0; 22])?;
            sent += 1;
        }
        Ok(sent)
    })
    .unwrap()
}

/// Replaces the programs again and again under a flood.
fn nothing_is_lost(kind: HookKind) {
    let is_xdp = kind == HookKind::Xdp;
    let rig = if is_xdp { xdp::rig("xdpflood") } else { Rig::new("reload") }.unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    rig.attach_spec(Spec { hook: Some(kind), ..spec(Duration::from_secs(125)).unwrap() }).unwrap();
    let sink = a.enter(|| Ok(UdpSocket::bind(("0.0.0.0", PORT))?)).unwrap();
    let (first, before) = (programs(), no_room(a));
    let stop = AtomicBool::new(false);
    let (sent, results) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| flood(&rig.lab.client, &stop));
        let mut results = Vec::new();
        for _ in 0..REPLACEMENTS {
            let last = programs();
            let result = rig.with(async |attachment: &mut Attachment| Ok(attachment.reload(true)?));
            results.push((result, programs().iter().all(|id| !last.contains(id))));
        }
        stop.store(true, Ordering::Relaxed);
        (sender.join().unwrap(), results)
    });
    for (result, others) in &results {
        assert!(matches!(result, Ok(true)) && *others, "{result:?}, {others}");
    }
    eprintln!("{sent} datagrams, {} times other programs", results.len());
    assert_eq!(arrived(a, &sink, before), sent);
    assert!(sent > 100_000, "{sent}");
    assert!(programs().iter().all(|id| !first.contains(id)));
    // What was stored goes on: the counters, and the word.
    let hook = if is_xdp { "xdp" } else { "uplink" };
    assert!(rig.counter(&["packets", hook, "to_a"]).unwrap() >= u64::try_from(sent).unwrap());
    rig.with(async |attachment| Ok(attachment.switch(patchswitch_common::Slot::B).await?)).unwrap();
    rig.with(async |attachment: &mut Attachment| Ok(attachment.reload(true)?)).unwrap();
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "b");
    }
    rig.finish_owned().unwrap();
}

#[test]
fn nothing_is_lost_on_tcx() {
    if HookKind::of_this_kernel() != HookKind::Tcx {
        // The kernel has one way only, and that one is tested below.
        return;
    }
    nothing_is_lost(HookKind::Tcx);
}

#[test]
fn nothing_is_lost_on_clsact() {
    nothing_is_lost(HookKind::Clsact);
}

#[test]
fn nothing_is_lost_on_xdp() {
    nothing_is_lost(HookKind::Xdp);
}

#[test]
fn equal_programs_stay_and_a_reload_that_was_killed_is_gone_on_with() {
    let rig = Rig::new("again").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let first = programs();
    let said = rig.ok(&["reload", NAME]).unwrap();
    assert_eq!(said["attachments"][0]["changed"], false, "{said}");
    assert_eq!(programs(), first);
    // The twin in use was moved away, and nothing further happened.
    let pins = std::path::Path::new("/sys/fs/bpf/patchswitch/v1").join(NAME);
    std::fs::rename(pins.join("twin"), pins.join("past")).unwrap();
    let said = rig.ok(&["reload"]).unwrap();
    assert_eq!(said["attachments"][0]["changed"], true, "{said}");
    assert!(pins.join("twin").exists() && !pins.join("past").exists());
    assert_ne!(programs(), first);
    let text = rig.run(&["reload", NAME]).unwrap();
    assert_eq!((text.code, text.stdout.trim()), (Some(0), "web has them already"), "{text:?}");
    let error = rig.refused(&["reload", "nobody"], 1).unwrap();
    assert!(error.contains("patchswitch status"), "{error}");
    std::fs::rename(pins.join("twin"), pins.join("past")).unwrap();
    // What is left by one that is killed goes with the rest.
    rig.finish().unwrap();
}

#[test]
fn maps_of_another_form_are_not_touched() {
    let rig = Rig::new("other").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let maps = std::path::Path::new("/sys/fs/bpf/patchswitch/v1").join(NAME).join("maps");
    let exchange = || {
        for (from, to) in [("ADDRESSES", "kept"), ("UPLINKS", "ADDRESSES"), ("kept", "UPLINKS")] {
            std::fs::rename(maps.join(from), maps.join(to)).unwrap();
        }
    };
    let first = programs();
    // As a version would see it whose maps have other keys.
    exchange();
    let error = rig.refused(&["reload", NAME], 1).unwrap();
    assert!(error.contains("ADDRESSES") && error.contains("nothing was changed"), "{error}");
    exchange();
    assert_eq!(programs(), first);
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "a");
    }
    rig.finish().unwrap();
}
