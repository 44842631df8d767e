//! Nobody who uses the service sees the switch.

use std::time::Duration;

use patchswitch_load::client::{DownloadSettings, Settings};
use patchswitch_load::record::Class;
use patchswitch_load::report::{Download, Run};
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::observe::{Counters, Trouble};

use crate::rig::{Load, Rig, Server, load};

/// What the kernels of clients and partitions had to repair, together.
fn trouble(spaces: &[&Ns]) -> anyhow::Result<Vec<Trouble>> {
    spaces.iter().map(|ns| Counters::of(ns)?.trouble()).collect()
}

fn since(before: &[Trouble], after: &[Trouble]) -> Trouble {
    let mut sum = Trouble::default();
    for (before, after) in before.iter().zip(after) {
        sum.retransmitted += after.retransmitted - before.retransmitted;
        sum.resets_sent += after.resets_sent - before.resets_sent;
        sum.established_reset += after.established_reset - before.established_reset;
        sum.attempts_failed += after.attempts_failed - before.attempts_failed;
        sum.time_outs += after.time_outs - before.time_outs;
        sum.syn_retransmitted += after.syn_retransmitted - before.syn_retransmitted;
        sum.listen_overflows += after.listen_overflows - before.listen_overflows;
        sum.listen_drops += after.listen_drops - before.listen_drops;
    }
    sum
}

/// Who answered the requests of a class between two marks.
fn answered(run: &Run, class: Class, from: &str, to: &str) -> anyhow::Result<Vec<String>> {
    let at = |name: &str| run.mark(name).map(|at| (at - run.started_ns) / 1000);
    let (Some(from), Some(to)) = (at(from), at(to)) else { anyhow::bail!("no such mark") };
    let answers = run.answers.iter().filter(|series| series.class == class).flat_map(|series| series.iter());
    let due = answers.filter(|answer| answer.due_us() >= from && answer.done_us < to);
    let mut found: Vec<String> =
        due.map(|answer| run.instances[usize::from(answer.instance)].clone()).collect();
    found.sort();
    found.dedup();
    Ok(found)
}

#[test]
fn there_and_back_under_load_is_seen_by_nobody() {
    let rig = Rig::new("load").unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    rig.attach().unwrap();
    let spaces = [&rig.lab.client, &rig.lab.host, a, b];
    let settings = Settings { rate: 600.0, connections: 16, idle: true, ..load() };
    let load = Load::start(&rig.lab.client, settings);
    std::thread::sleep(Duration::from_secs(1));
    load.order("mark quiet").unwrap();
    let quiet = trouble(&spaces).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let first = trouble(&spaces).unwrap();
    for (number, to) in [b, a, b, a, b].into_iter().enumerate() {
        load.order(&format!("mark before{number}")).unwrap();
        rig.switch_to(to).unwrap();
        load.order(&format!("mark after{number}")).unwrap();
        std::thread::sleep(Duration::from_millis(600));
    }
    load.order("mark end").unwrap();
    let last = trouble(&spaces).unwrap();
    load.order("use-idle").unwrap();
    let run = load.stop().unwrap();

    assert_eq!(run.failures, []);
    let requests = run.stats(run.whole()).requests;
    assert!(requests > 1500, "{requests}");
    // New flows move with each switch.
    for (number, (who, next)) in
        [("b", "before1"), ("a", "before2"), ("b", "before3"), ("a", "before4"), ("b", "end")]
            .into_iter()
            .enumerate()
    {
        let from = format!("after{number}");
        assert_eq!(answered(&run, Class::New, &from, next).unwrap(), [who], "after switch {number}");
    }
    // Old flows stay where they are.
    assert_eq!(answered(&run, Class::New, "quiet", "before0").unwrap(), ["a"]);
    assert_eq!(answered(&run, Class::Keepalive, "quiet", "end").unwrap(), ["a"]);
    assert_eq!(run.idle_uses.len(), 2);
    assert!(run.idle_uses.iter().all(|u| u.ok && u.instance.as_deref() == Some("a")), "{:?}", run.idle_uses);
    let (before, during) = (since(&quiet, &first), since(&first, &last));
    eprintln!("{requests} requests, quiet {before:?}, five switches {during:?}");
    assert_eq!(during.resets_sent, 0, "{during:?}");
    assert_eq!(during.established_reset, 0, "{during:?}");
    assert!(during.retransmitted <= before.retransmitted, "{before:?} {during:?}");
    rig.finish().unwrap();
}

#[test]
fn a_download_goes_on_across_the_switches() {
    const LENGTH: u64 = 8 << 20;
    let rig = Rig::new("download").unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    rig.attach().unwrap();
    let download =
        DownloadSettings { path: format!("/bytes?n={LENGTH}"), bytes_per_second: 1 << 20, sha256: None };
    let load = Load::start(&rig.lab.client, Settings { rate: 0.0, download: Some(download), ..load() });
    load.order("start-download").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    for to in [b, a, b] {
        rig.switch_to(to).unwrap();
        std::thread::sleep(Duration::from_millis(300));
    }
    load.order("finish-download").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    assert_eq!(run.downloads.len(), 2);
    // The digest is compared with that of a first download, made before.
    let good = |d: &Download| d.ok && d.bytes == LENGTH && d.instance.as_deref() == Some("a");
    assert!(run.downloads.iter().all(good), "{:?}", run.downloads);
    rig.finish().unwrap();
}
