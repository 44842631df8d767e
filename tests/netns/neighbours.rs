//! Who asks the uplink for the service's address, whenever it is, gets one answer, and always the same.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use patchswitch::attachment::Attachment;
use patchswitch_common::Slot;
use patchswitch_tests::netlab::{CLIENT_LINK, Ns, SERVICE, UPLINK};

use crate::claims::{Wire, arp, discovery, v4, v6};
use crate::rig::Rig;

/// So many neighbours ask in turn, so that an answer says whose question it is for.
const NEIGHBOURS: u8 = 100;
const SWITCHES: usize = 10;
/// So often it is asked in each phase.
const QUESTIONS: u32 = 20;

/// A neighbour's addresses.
fn neighbour(number: u8) -> ([u8; 4], Ipv6Addr) {
    ([10, 77, 0, 100 + number], Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 1, number.into()))
}

/// Whom an answer is for, and every link address in it; nothing if the frame is none.
fn answer(frame: &[u8]) -> Option<(IpAddr, Vec<[u8; 6]>)> {
    let mac = |at: usize| frame.get(at..at + 6)?.try_into().ok();
    match frame.get(12..14)? {
        [8, 6] if frame.get(21)? == &2 && frame.get(28..32)? == v4(SERVICE[0]) => {
            let to: [u8; 4] = frame.get(38..42)?.try_into().ok()?;
            Some((to.into(), vec![mac(6)?, mac(22)?]))
        }
        [0x86, 0xdd] if frame.get(54)? == &136 && frame.get(62..78)? == v6(SERVICE[1]).octets() => {
            let to: [u8; 16] = frame.get(38..54)?.try_into().ok()?;
            // The option with the target's link address is not told from others here: there is no other.
            let told = if frame.len() >= 86 { mac(80) } else { None };
            Some((to.into(), [mac(6), told].into_iter().flatten().collect()))
        }
        _ => None,
    }
}

/// Asks by ARP and by NDP and waits for both answers; whatever else is heard is one too many.
fn ask(wire: &mut Wire, mac: [u8; 6], number: u8) -> Result<()> {
    let (from_v4, from_v6) = neighbour(number);
    wire.send(&arp(1, mac, from_v4, v4(SERVICE[0])));
    wire.send(&discovery(135, 0, mac, from_v6, SERVICE[1], "ff02::1:ff00:10"));
    let mut open: Vec<IpAddr> = vec![from_v4.into(), from_v6.into()];
    let end = Instant::now() + Duration::from_secs(5);
    while !open.is_empty() {
        ensure!(Instant::now() < end, "{open:?} has no answer");
        heard(wire, &mut open)?;
    }
    Ok(())
}

/// Takes a frame from the wire, if there is one.
fn heard(wire: &mut Wire, open: &mut Vec<IpAddr>) -> Result<()> {
    let uplink = wire.uplink;
    let Some((to, macs)) = wire.frame().and_then(answer) else { return Ok(()) };
    ensure!(
        macs.len() == 2 && macs.iter().all(|mac| *mac == uplink),
        "{to} hears of {macs:x?}, not {uplink:x?}"
    );
    let at = open.iter().position(|one| *one == to).with_context(|| format!("{to} has a second answer"))?;
    open.remove(at);
    Ok(())
}

/// Asks each millisecond until it is told to stop.
fn ask_on(mut wire: Wire, mac: [u8; 6], asked: &AtomicU32, stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let number = asked.load(Ordering::Relaxed) % u32::from(NEIGHBOURS);
        ask(&mut wire, mac, u8::try_from(number)?)?;
        asked.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
    }
    // Whoever answers twice may do so a little later.
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        heard(&mut wire, &mut Vec::new())?;
    }
    Ok(())
}

/// Waits until it was asked some more.
fn some_more(asked: &AtomicU32) -> Result<()> {
    let (before, end) = (asked.load(Ordering::Relaxed), Instant::now() + Duration::from_secs(20));
    while asked.load(Ordering::Relaxed) < before + QUESTIONS {
        ensure!(Instant::now() < end, "nobody asks any more");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Goes through all phases, there and back, and stays in each for some questions.
fn switches(rig: &Rig, asked: &AtomicU32) -> Result<()> {
    for to in [Slot::B, Slot::A].into_iter().cycle().take(SWITCHES) {
        some_more(asked)?;
        rig.with(async |attachment: &mut Attachment| Ok(attachment.learn()?))?;
        some_more(asked)?;
        rig.with(async |attachment: &mut Attachment| Ok(attachment.share(30).await?))?;
        some_more(asked)?;
        rig.with(async |attachment: &mut Attachment| Ok(attachment.switch(to).await.map(drop)?))?;
        some_more(asked)?;
        rig.with(async |attachment: &mut Attachment| Ok(attachment.settle()?))?;
    }
    Ok(())
}

fn link_address(ns: &Ns, link: &str) -> Result<[u8; 6]> {
    let shown: serde_json::Value = serde_json::from_str(&ns.ip(&format!("-j link show dev {link}"))?)?;
    let mac: pnet::util::MacAddr = shown[0]["address"].as_str().unwrap_or_default().parse()?;
    Ok(mac.octets())
}

#[test]
fn in_every_phase_who_asks_for_the_address_gets_one_answer_and_the_same() {
    let rig = Rig::new("neighbours").unwrap();
    rig.attach_owned(Duration::from_secs(125)).unwrap();
    let (client, host) = (&rig.lab.client, &rig.lab.host);
    let mac = link_address(client, CLIENT_LINK).unwrap();
    let wire = Wire::between((client, CLIENT_LINK), (host, UPLINK)).unwrap();
    let (asked, stop) = (AtomicU32::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| ask_on(wire, mac, &asked, &stop));
        let switched = switches(&rig, &asked);
        stop.store(true, Ordering::Relaxed);
        asking.join().unwrap().unwrap();
        switched.unwrap();
    });
    let asked = asked.into_inner();
    eprintln!("{asked} questions of each family, each answered once");
    assert!(asked >= QUESTIONS * 4 * u32::try_from(SWITCHES).unwrap(), "{asked}");
    rig.finish_owned().unwrap();
}
