//! Killed between the store of the word and what belongs to it: whoever comes next puts routes and sources right, says
//! so, and has nothing to do the second time. Looked at with the kernel's own eyes.

use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use patchswitch::attachment::Spec;
use patchswitch::dataplane::Dataplane;
use patchswitch_common::Slot;
use patchswitch_tests::netlab::{CLIENT, Ns, OWN_A, OWN_B, SERVICE};
use patchswitch_tests::programs;
use rustix::process::Signal;
use serde_json::Value;

use crate::ask::{Asking, who};
use crate::rig::{NAME, Rig, Server, ends, name, spec};

const IDLE: Duration = Duration::from_secs(1);

/// The two slots by their letter, with the own addresses of the partition there.
const SIDES: [(&str, Slot, [&str; 2]); 2] = [("a", Slot::A, OWN_A), ("b", Slot::B, OWN_B)];

fn ns<'a>(rig: &'a Rig, side: &str) -> &'a Ns {
    if side == "a" { &rig.lab.a } else { &rig.lab.b }
}

fn other(side: &str) -> &'static str {
    if side == "a" { "b" } else { "a" }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// The link by which the host reaches a service address: its last letter is the slot's.
#[track_caller]
fn route(rig: &Rig, address: &str) -> String {
    let shown = json(&rig.lab.host.ip(&format!("-j route get {address}")).unwrap());
    shown[0]["dev"].as_str().unwrap().to_owned()
}

/// The source of what a partition begins now, by the kernel's own choice.
fn source(ns: &Ns, to: &str) -> anyhow::Result<IpAddr> {
    let to: IpAddr = to.parse()?;
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    ns.enter(|| {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((to, 9)).context("no way")?;
        Ok(socket.local_addr()?.ip())
    })
}

/// Everything follows: routes, sources, clients inside and outside.
#[track_caller]
fn assert_whole(rig: &Rig, serving: &str, retires: bool, when: &str) {
    for address in SERVICE {
        let link = route(rig, address);
        assert!(link.ends_with(serving), "{when}: {address} is routed to {link}, {serving} serves");
    }
    for (side, _, own) in SIDES {
        for family in 0..2 {
            let expected = match (side == serving, retires) {
                (true, _) => SERVICE[family],
                (false, true) => own[family],
                (false, false) => continue,
            };
            let found = source(ns(rig, side), CLIENT[family]).unwrap();
            assert_eq!(found.to_string(), expected, "{when}: source of {side}");
        }
    }
    for place in [&rig.lab.client, &rig.lab.host] {
        for end in ends() {
            assert_eq!(who(place, end).unwrap(), serving, "{when}");
        }
    }
}

/// The word says that a slot serves, and nothing else does: as after a kill at that moment.
fn store_only(rig: &Rig, to: Slot) -> anyhow::Result<()> {
    rig.with(async |attachment| {
        let word = attachment.plane().word();
        Ok(attachment.plane().store(word, word.with_notice(true).taken_over_by(to))?)
    })
}

#[track_caller]
fn mend(rig: &Rig, serving: &str) -> Vec<String> {
    let path = ns(rig, serving).path();
    let said = rig.ok(&["switch", NAME, "--to", path.to_str().unwrap()]).unwrap();
    assert_eq!(said["changed"], false, "{said}");
    said["mended"].as_array().unwrap().iter().map(|what| what.as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_follows_the_word_is_mended_and_told() {
    let rig = Rig::new("mend").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach_owned(IDLE).unwrap();
    assert_eq!(mend(&rig, "a"), [""; 0]);
    assert_whole(&rig, "a", false, "at the beginning");
    // There, back, and there again with the first part of the rest done.
    for (round, (side, slot, _)) in [SIDES[1], SIDES[0], SIDES[1]].into_iter().enumerate() {
        let mut kept: Vec<_> =
            ends().map(|end| Asking::from(&rig.lab.client, end).unwrap()).into_iter().collect();
        for asking in &mut kept {
            assert_eq!(asking.who().unwrap(), other(side));
        }
        store_only(&rig, slot).unwrap();
        if round == 2 {
            for (address, option, scope) in [(SERVICE[0], "-4", "scope link"), (SERVICE[1], "-6", "")] {
                let old = route(&rig, address);
                let link = format!("{}{side}", old.strip_suffix(other(side)).unwrap());
                let line = format!("{option} route replace {address} dev {link} proto 117 {scope}");
                rig.lab.host.ip(&line).unwrap();
            }
        }
        let mended = mend(&rig, side);
        let route = mended.iter().any(|what| what.contains("the host's route"));
        assert_eq!(route, round < 2, "{mended:?}");
        assert!(mended.iter().any(|what| what.contains("an address of its own")), "{mended:?}");
        assert_whole(&rig, side, true, &format!("round {round}"));
        for asking in &mut kept {
            assert_eq!(asking.who().unwrap(), other(side), "a flow that existed");
        }
        assert_eq!(mend(&rig, side), [""; 0], "the second time");
    }
    rig.finish_owned().unwrap();
}

/// Deprecated addresses are no source, so they are looked at as well.
#[test]
fn addresses_that_are_gone_or_wrong_are_put_back() {
    let rig = Rig::new("mendaddr").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach_owned(IDLE).unwrap();
    rig.with(async |attachment| attachment.switch(Slot::B).await.map(drop).map_err(Into::into)).unwrap();
    for (side, line) in [
        ("a", format!("addr change {}/128 dev eth0 preferred_lft forever", SERVICE[1])),
        ("a", format!("addr del {}/32 dev eth0", OWN_A[0])),
        ("b", format!("addr change {}/128 dev eth0 preferred_lft 0", SERVICE[1])),
        ("b", "route del default".to_owned()),
        ("b", "-6 route del default".to_owned()),
    ] {
        ns(&rig, side).ip(&line).unwrap();
        assert_eq!(mend(&rig, "b").len(), 1, "{side}: {line}");
        assert_whole(&rig, "b", true, &line);
        assert_eq!(mend(&rig, "b"), [""; 0], "{side}: {line}");
    }
    rig.finish_owned().unwrap();
}

#[test]
fn a_partition_that_leaves_takes_no_route_along() {
    let rig = Rig::new("mendleave").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach_owned(IDLE).unwrap();
    store_only(&rig, Slot::B).unwrap();
    rig.with(async |attachment| {
        attachment.settle()?;
        Ok(attachment.leave(Slot::A).await?)
    })
    .unwrap();
    assert_whole(&rig, "b", false, "after the other has left");
    rig.finish_owned().unwrap();
}

#[test]
fn a_switch_that_did_not_come_is_called_off() {
    let rig = Rig::new("mendlearn").unwrap();
    let _server = Server::start(&rig.lab.a, "a").unwrap();
    rig.attach_owned(IDLE).unwrap();
    // As `switch --learn` leaves it that was killed.
    rig.with(async |attachment| Ok(attachment.learn()?)).unwrap();
    assert_eq!(mend(&rig, "a").len(), 1);
    let word = rig.with(async |attachment| Ok(attachment.plane().word())).unwrap();
    assert!(!word.learns() && !word.notice(), "{word:?}");
    assert_eq!(mend(&rig, "a"), [""; 0]);
    rig.finish_owned().unwrap();
}

/// Real kills, the first ones as soon as the word has changed.
#[test]
fn a_switch_that_is_killed_after_the_store_is_mended() {
    let rig = Rig::new("mendkill").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach_owned(IDLE).unwrap();
    let program = programs::built("patchswitch").unwrap();
    let plane = Dataplane::open(&name().unwrap()).unwrap();
    let mut unfinished = 0;
    for (round, (side, slot, _)) in SIDES.into_iter().rev().cycle().take(10).enumerate() {
        let delay = Duration::from_micros(1500) * u32::try_from(round / 2).unwrap();
        let mut running = rig.lab.host.spawn(&[program.to_str().unwrap(), "switch", NAME], None).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while plane.word().active() != slot {
            assert!(Instant::now() < end, "no switch");
            std::hint::spin_loop();
        }
        std::thread::sleep(delay);
        if !running.has_ended() {
            running.signal(Signal::KILL).unwrap();
        }
        running.wait(Duration::from_secs(10)).unwrap();
        let mended = mend(&rig, side);
        unfinished += u32::from(!mended.is_empty());
        assert_whole(&rig, side, true, &format!("killed {delay:?} after the store, mended {mended:?}"));
        assert_eq!(mend(&rig, side), [""; 0]);
    }
    assert!(unfinished >= 3, "only {unfinished} were killed before their end");
    rig.finish_owned().unwrap();
}

/// The record of a service would not follow what is done by hand.
#[test]
fn what_belongs_to_a_service_is_not_switched_by_hand() {
    let rig = Rig::new("byhand").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach_spec(Spec { of_service: true, ..spec(IDLE).unwrap() }).unwrap();
    let b = rig.lab.b.path();
    let abort = ["drain", NAME, "--deadline", "0", "--on-deadline", "abort"];
    for (arguments, instead) in [
        (&["switch", NAME][..], "`patchswitch apply web` or `patchswitch rollback web`"),
        (&["switch", NAME, "--to", b.to_str().unwrap()], "patchswitch apply web"),
        (&abort, "patchswitch rollback web"),
        (&["detach", NAME], "`patchswitch service remove web` or `patchswitch down`"),
        (&["detach", NAME, "--force"], "patchswitch service remove web"),
    ] {
        let text = rig.refused(arguments, 1).unwrap();
        assert!(text.contains("nothing was changed") && text.contains(instead), "{arguments:?}: {text}");
        assert_whole(&rig, "a", false, "refused");
    }
    // To look is allowed, and to wait.
    assert_eq!(rig.ok(&["status", NAME]).unwrap()["attachments"][0]["phase"], "steady");
    rig.ok(&["flows", NAME]).unwrap();
    rig.with(async |attachment| Ok(attachment.switch(Slot::B).await.map(drop)?)).unwrap();
    let drained = rig.ok(&["drain", NAME, "--deadline", "5"]).unwrap();
    assert_eq!((&drained["drain"]["settled"], &drained["on_deadline"]), (&true.into(), &"keep".into()));
}
