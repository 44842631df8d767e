//! Programs of another version take the place of those that are attached, under a flood, and no packet is lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aya::programs::SchedClassifier;
use patchswitch::attachment::{Attachment, Spec};
use patchswitch::dataplane::HookKind;

use crate::ask::who;
use crate::flood::{self, Flood};
use crate::rig::{NAME, Rig, Server, ends, spec};
use crate::xdp;

/// So many packets of each family, and of both together ten million.
const PACKETS: u32 = 5_000_000;
/// So many of each at a time: both families flow all the while.
const BURST: u32 = 50_000;
/// At least so many times the programs are replaced while they flow.
const REPLACEMENTS: usize = 8;
/// From one replacement to the next: who replaces and who sends may have one processor between them.
const PAUSE: Duration = Duration::from_millis(200);
/// So long it may take, on a machine that is slow and busy.
const LONGEST: Duration = Duration::from_secs(150);

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

/// The verdicts at a hook, those on what is no packet of the flood left out: the link has its own.
fn verdicts(rig: &Rig, hook: &str) -> BTreeMap<String, u64> {
    let status = rig.ok(&["status", NAME]).unwrap();
    let found =
        status["attachments"][0]["counters"]["packets"][hook].as_object().cloned().unwrap_or_default();
    let counts = found.into_iter().map(|(verdict, count)| (verdict, count.as_u64().unwrap()));
    counts.filter(|(verdict, _)| !["not_ours", "for_host"].contains(&verdict.as_str())).collect()
}

/// Replaces the programs again and again while packets flow; how often that was, and how many packets of each family.
fn replaced_while_they_flow(rig: &Rig, flood: &Flood) -> (usize, u32) {
    let is_over = AtomicBool::new(false);
    let end = Instant::now() + LONGEST;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while sent < PACKETS && Instant::now() < end {
                flood.send(BURST).unwrap();
                sent += BURST;
            }
            is_over.store(true, Ordering::Relaxed);
            sent
        });
        let mut replacements = 0;
        while !is_over.load(Ordering::Relaxed) && !sender.is_finished() {
            let last = programs();
            let changed = rig.with(async |attachment: &mut Attachment| Ok(attachment.reload(true)?)).unwrap();
            assert!(changed && programs().iter().all(|id| !last.contains(id)));
            replacements += 1;
            std::thread::sleep(PAUSE);
        }
        (replacements, sender.join().unwrap())
    })
}

/// Replaces the programs again and again under a flood.
fn nothing_is_lost(kind: HookKind) {
    let is_xdp = kind == HookKind::Xdp;
    if is_xdp {
        flood::on_one_processor().unwrap();
    }
    let mut rig = if is_xdp { xdp::rig("xdpflood") } else { Rig::new("reload") }.unwrap();
    flood::count_in(&rig.lab.a).unwrap();
    rig.furnished().unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach_spec(Spec { hook: Some(kind), ..spec(Duration::from_secs(125)).unwrap() }).unwrap();
    let flood = Flood::new(&rig.lab, is_xdp).unwrap();
    let (first, hook) = (programs(), if is_xdp { "xdp" } else { "uplink" });
    let mut expected = verdicts(&rig, hook);
    let begun = Instant::now();
    let (replacements, sent) = replaced_while_they_flow(&rig, &flood);
    eprintln!("{sent} packets of each family, {replacements} times other programs, {:?}", begun.elapsed());
    // What was sent has come, and each has one verdict, which is what the maps hold that every program had in turn.
    assert_eq!(flood::counted(&rig.lab.a).unwrap(), [u64::from(sent); 2]);
    *expected.entry("to_a".to_owned()).or_default() += 2 * u64::from(sent);
    assert_eq!(verdicts(&rig, hook), expected);
    assert_eq!(sent, PACKETS, "not in {LONGEST:?}");
    assert!(replacements >= REPLACEMENTS, "{replacements}");
    assert!(programs().iter().all(|id| !first.contains(id)));
    // What was stored goes on: the word as well.
    rig.with(async |attachment| Ok(attachment.switch(patchswitch_common::Slot::B).await?)).unwrap();
    rig.with(async |attachment: &mut Attachment| Ok(attachment.reload(true)?)).unwrap();
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "b");
    }
    drop(flood);
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

/// The numbers of our programs on all links, as the kernel says.
pub(crate) fn attached(rig: &Rig) -> Vec<u32> {
    let status = rig.ok(&["status", NAME]).unwrap();
    let lists = status["attachments"][0]["programs"].as_array().unwrap().iter();
    let placed = lists.flat_map(|list| list["programs"].as_array().unwrap());
    let ours = placed.filter(|one| one["attachment"] == NAME);
    let mut ids: Vec<u32> =
        ours.map(|one| u32::try_from(one["program"]["id"].as_u64().unwrap()).unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// As a reload leaves it that is killed between the exchange of a program and its pin.
fn killed_before_the_pin(rig: &Rig) {
    let programs = std::path::Path::new("/sys/fs/bpf/patchswitch/v1").join(NAME).join("programs");
    let (pin, new, kept) =
        (programs.join("ps_from_part"), programs.join("ps_from_part-new"), programs.join("kept"));
    SchedClassifier::from_pin(&pin).unwrap().pin(&kept).unwrap();
    rig.with(async |attachment: &mut Attachment| Ok(attachment.reload(true)?)).unwrap();
    std::fs::rename(&pin, &new).unwrap();
    std::fs::rename(&kept, &pin).unwrap();
}

#[test]
fn a_reload_that_was_killed_between_a_program_and_its_pin_is_gone_on_with() {
    for kind in [HookKind::of_this_kernel(), HookKind::Clsact] {
        let rig = Rig::new("halfpin").unwrap();
        let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
        rig.attach_spec(Spec { hook: Some(kind), ..spec(Duration::from_secs(125)).unwrap() }).unwrap();
        let way = format!("patchswitch reload {NAME}");
        let told = || {
            let json = rig.ok(&["status", NAME]).unwrap()["attachments"][0]["reload_unfinished"].clone();
            (json, rig.run(&["status", NAME]).unwrap().stdout.contains(&way))
        };
        assert_eq!((attached(&rig), told()), (programs(), (false.into(), false)), "{kind:?}");
        killed_before_the_pin(&rig);
        let (half, pinned) = (attached(&rig), programs());
        assert!(pinned.len() == half.len() + 1, "the old one's pin is there: {half:?}, {pinned:?}");
        assert_eq!(told(), (true.into(), true), "{kind:?}");
        // By equal programs, of the same version, without being forced to.
        let said = rig.ok(&["reload", NAME]).unwrap();
        assert_eq!(said["attachments"][0]["changed"], true, "{said}");
        assert_eq!((attached(&rig), told()), (programs(), (false.into(), false)), "{kind:?}");
        assert!(attached(&rig).iter().all(|id| !pinned.contains(id)), "{kind:?}");
        let said = rig.ok(&["reload", NAME]).unwrap();
        assert_eq!(said["attachments"][0]["changed"], false, "{said}");
        // What is left by one that is killed goes with the rest.
        killed_before_the_pin(&rig);
        rig.finish_owned().unwrap();
    }
}

#[test]
fn a_reload_that_was_killed_before_the_twin_is_gone_on_with() {
    let rig = Rig::new("halftwin").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let pins = std::path::Path::new("/sys/fs/bpf/patchswitch/v1").join(NAME);
    let twin = pins.join("twin/programs");
    // Some other program: to the self-test, that of another version.
    SchedClassifier::from_pin(pins.join("programs/ps_from_part")).unwrap().pin(twin.join("other")).unwrap();
    std::fs::rename(twin.join("other"), twin.join("ps_uplink")).unwrap();
    for changed in [true, false] {
        let said = rig.ok(&["reload", NAME]).unwrap();
        assert_eq!(said["attachments"][0]["changed"], changed, "{said}");
    }
    assert_eq!(attached(&rig), programs());
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
