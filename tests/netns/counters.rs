//! Each packet is counted once: the programs' counters say what the links' own say.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use patchswitch::attachment::Spec;
use patchswitch::dataplane::HookKind;
use patchswitch_load::client::Settings;
use patchswitch_tests::netlab::UPLINK;
use serde_json::Value;

use crate::rig::{ECHO, Load, NAME, Rig, Server, echo_in, load, spec};
use crate::xdp;

/// Packets that a link has received, by its own count.
fn received(rig: &Rig, link: &str) -> Result<u64> {
    let shown: Value = serde_json::from_str(&rig.lab.host.ip(&format!("-j -s link show dev {link}"))?)?;
    shown[0]["stats64"]["rx"]["packets"].as_u64().context("no count")
}

/// Of a hook, all verdicts together.
fn counted(state: &Value, hook: &str) -> u64 {
    let verdicts = state["counters"]["packets"][hook].as_object();
    verdicts.map_or(0, |verdicts| verdicts.values().filter_map(Value::as_u64).sum())
}

/// What the hook at an uplink and that at the partitions' links counted, and what the links themselves did: read between two
/// equal readings of the hooks', for some packet of the links' own may come at any time.
fn both(rig: &Rig, hook: &str) -> Result<([u64; 2], [u64; 2])> {
    let of_programs = || -> Result<_> {
        let state = rig.ok(&["status", NAME])?["attachments"][0].clone();
        Ok(([counted(&state, hook), counted(&state, "from_partition")], state))
    };
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let (before, state) = of_programs()?;
        let links = state["partitions"].as_array().context("no partitions")?;
        let links = links.iter().map(|one| one["link"].as_str().context("no link"));
        let from: u64 = links.map(|link| received(rig, link?)).sum::<Result<u64>>()?;
        let links = [received(rig, UPLINK)?, from];
        if of_programs()?.0 == before {
            return Ok((before, links));
        }
        ensure!(Instant::now() < end, "packets never end");
    }
}

fn of_many(rig: &Rig, hook: &str) {
    let (programs_before, links_before) = both(rig, hook).unwrap();
    let settings = Settings { rate: 400.0, udp_port: Some(ECHO), udp_rate: 100.0, ..load() };
    let load = Load::start(&rig.lab.client, settings);
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(500));
        rig.ok(&["switch", NAME]).unwrap();
    }
    assert_eq!(load.stop().unwrap().failures, []);
    // The last packets may be on their way while the one or the other is asked.
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let (programs, links) = both(rig, hook).unwrap();
        let since = |now: [u64; 2], before: [u64; 2]| [now[0] - before[0], now[1] - before[1]];
        let (programs, links) = (since(programs, programs_before), since(links, links_before));
        if programs == links || Instant::now() >= end {
            eprintln!("{hook} and from_partition: {programs:?} packets, by the links {links:?}");
            assert_eq!(programs, links);
            assert!(links.iter().all(|count| *count > 1000), "{links:?}");
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn what_the_programs_count_is_what_the_links_received() {
    for (kind, hook) in
        [(HookKind::of_this_kernel(), "uplink"), (HookKind::Clsact, "uplink"), (HookKind::Xdp, "xdp")]
    {
        let rig = if kind == HookKind::Xdp { xdp::rig("countxdp") } else { Rig::new("count") }.unwrap();
        let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
        echo_in(&rig.lab.a, "a").unwrap();
        echo_in(&rig.lab.b, "b").unwrap();
        rig.attach_spec(Spec { hook: Some(kind), ..spec(Duration::from_secs(125)).unwrap() }).unwrap();
        of_many(&rig, hook);
        rig.finish_owned().unwrap();
    }
}
