//! Nobody who uses the service sees the switch.

use std::time::Duration;

use patchswitch_common::Slot;
use patchswitch_load::client::{DownloadSettings, Settings};
use patchswitch_load::record::Class;
use patchswitch_load::report::{Download, Run, Window};

use crate::repairs::Repairs;
use crate::rig::{ECHO, Load, Rig, Server, echo_in, load};

/// Who answered the requests of a class between two marks.
pub(crate) fn answered(run: &Run, class: Class, from: &str, to: &str) -> anyhow::Result<Vec<String>> {
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
    let repairs = Repairs::begin(&rig, &[]).unwrap();
    let settings = Settings { rate: 600.0, connections: 16, idle: true, ..load() };
    let load = Load::start(&rig.lab.client, settings);
    std::thread::sleep(Duration::from_secs(1));
    load.order("mark quiet").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    for (number, to) in [b, a, b, a, b].into_iter().enumerate() {
        load.order(&format!("mark before{number}")).unwrap();
        rig.switch_to(to).unwrap();
        load.order(&format!("mark after{number}")).unwrap();
        std::thread::sleep(Duration::from_millis(600));
    }
    load.order("mark end").unwrap();
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
    eprintln!("{requests} requests, five switches");
    repairs.nothing_was_lost().unwrap();
    rig.finish().unwrap();
}

/// So many switches, half of them back.
const SWITCHES: u32 = 200;

#[test]
fn two_hundred_switches_fail_nothing() {
    let rig = Rig::new("hundreds").unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    echo_in(a, "a").unwrap();
    echo_in(b, "b").unwrap();
    rig.attach_owned(Duration::from_secs(125)).unwrap();
    let repairs = Repairs::begin(&rig, &[]).unwrap();
    // Kept connections are renewed all the time, so that each side has flows at every switch.
    let kept = Settings { rate: 600.0, connections: 16, renew: Duration::from_millis(500), ..load() };
    let load = Load::start(&rig.lab.client, Settings { udp_port: Some(ECHO), udp_rate: 100.0, ..kept });
    std::thread::sleep(Duration::from_millis(500));
    load.order("mark first").unwrap();
    let longest = rig
        .with(async |attachment| {
            let mut longest = 0.0_f64;
            for number in 0..SWITCHES {
                let to = if number % 2 == 0 { Slot::B } else { Slot::A };
                longest = longest.max(attachment.switch(to).await?.flip_us);
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(longest)
        })
        .unwrap();
    load.order("mark last").unwrap();
    let run = load.stop().unwrap();

    assert_eq!(run.failures, []);
    let stats = run.stats(Window { from_ns: run.mark("first").unwrap(), to_ns: run.mark("last").unwrap() });
    let each = f64::from(u32::try_from(stats.requests).unwrap()) / f64::from(SWITCHES);
    // Nothing in n: with 95 % confidence fewer than 3 in n (the rule of three).
    eprintln!(
        "0 of {} requests failed in {SWITCHES} switches ({each:.0} for each): fewer than {:.1e} of them fail; longest \
         flip {longest:.1} us",
        stats.requests,
        3.0 / f64::from(u32::try_from(stats.requests).unwrap()),
    );
    assert!(each >= 5.0, "{each}");
    for side in ["a", "b"] {
        let share = stats.answered_by[side] * 100 / stats.requests;
        assert!((20..=80).contains(&share), "{side} answered {share} %");
    }
    repairs.nothing_was_lost().unwrap();
    rig.finish_owned().unwrap();
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
