//! Servers that behave: nothing fails, and what is counted is what happened.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use patchswitch_load::client::{DownloadSettings, Settings};
use patchswitch_load::control::Response;
use patchswitch_load::knee::{self, KneeSettings};
use patchswitch_load::record::{Class, Family};
use patchswitch_load::report::{Report, Window};

use crate::servers::{Good, good_echo, kinds, run, run_with, settings};

#[test]
fn all_classes_are_answered_at_the_rate_in_both_families() {
    let server = Good::start("blue", None);
    let settings = Settings { udp_port: Some(good_echo("blue")), udp_rate: 50.0, ..settings(server.port) };
    let run = run(settings);
    assert_eq!(kinds(&run.failures), [""; 0]);
    // What was asked before the end may be answered after it.
    let all = Window { from_ns: run.started_ns, to_ns: u64::MAX };
    let stats = run.stats(all);
    for class in [Class::Keepalive, Class::New, Class::Udp] {
        for family in Family::ALL {
            let series = stats.series.iter().find(|s| s.class == class && s.family == family).unwrap();
            // 25 a second for half a second at least, and each takes its turn.
            assert!(series.requests >= 12, "{series:?}");
            assert!((series.requests * 6).abs_diff(stats.requests) <= 12, "{series:?} of {}", stats.requests);
            assert!(series.p50_ms.unwrap() <= series.p99_ms.unwrap(), "{series:?}");
        }
    }
    assert_eq!(stats.answered_by, BTreeMap::from([("blue".to_owned(), stats.requests)]));
    assert_eq!(run.sockets.keepalive_closed_by_server, 0);
    let text = serde_json::to_string(&run.clone().report()).unwrap();
    assert_eq!(Report::parse(&text).unwrap().run, run);
    server.end();
}

#[test]
fn connections_and_datagram_sockets_are_renewed_without_a_failure() {
    let server = Good::start("blue", None);
    let run = run(Settings {
        rate: 400.0,
        renew: Duration::from_millis(100),
        duration: Some(Duration::from_millis(800)),
        udp_port: Some(good_echo("blue")),
        udp_rate: 100.0,
        ..settings(server.port)
    });
    assert_eq!(kinds(&run.failures), [""; 0]);
    let sockets = run.sockets;
    assert!(sockets.keepalive_renewed >= 8 * 3, "eight of them, for eight times their age: {sockets:?}");
    assert!(sockets.keepalive_opened - sockets.keepalive_renewed <= 8, "{sockets:?}");
    assert_eq!((sockets.keepalive_told_to_close, sockets.keepalive_closed_by_server), (0, 0));
    server.end();
}

#[test]
fn connections_are_closed_as_the_server_says_without_a_failure() {
    let server = Good::start("blue", Some(5));
    let run = run(Settings {
        rate: 400.0,
        duration: Some(Duration::from_millis(800)),
        renew: Duration::from_secs(60),
        ..settings(server.port)
    });
    assert_eq!(kinds(&run.failures), [""; 0]);
    // 160 requests and more on eight kept connections, five each, some of them not yet at their end.
    assert!(run.sockets.keepalive_told_to_close >= 16, "{:?}", run.sockets);
    assert_eq!(run.sockets.keepalive_renewed, 0);
    server.end();
}

#[test]
fn what_the_server_closes_between_two_requests_is_replaced_quietly() {
    // Answers once and closes without having said so.
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer: rude\r\n\r\nok";
    let run = run(Settings { rate: 20.0, ..settings(crate::servers::answering(answer, 1)) });
    assert_eq!(kinds(&run.failures), [""; 0]);
    assert!(run.sockets.keepalive_closed_by_server > 0, "{:?}", run.sockets);
    assert_eq!(run.instances, ["rude"]);
}

#[test]
fn a_download_and_an_idle_connection_live_through_a_run() {
    let server = Good::start("blue", None);
    let download =
        DownloadSettings { path: "/bytes?n=300000".into(), bytes_per_second: 100_000, sha256: None };
    let settings = Settings { download: Some(download), idle: true, duration: None, ..settings(server.port) };
    let run = run_with(settings, |order| {
        std::thread::sleep(Duration::from_millis(50));
        order("mark quiet");
        assert_eq!(order("start-download"), Response::Done);
        std::thread::sleep(Duration::from_millis(500));
        let Response::Status(status) = order("status") else { panic!("no status") };
        assert_eq!(
            (status.downloading, status.failed),
            (2, 0),
            "three seconds of download are still under way"
        );
        order("mark after");
        assert_eq!(order("use-idle"), Response::Done);
        assert_eq!(order("finish-download"), Response::Done);
    });
    assert_eq!(kinds(&run.failures), [""; 0]);
    assert_eq!(run.downloads.len(), 2);
    for download in &run.downloads {
        assert!(download.ok && download.bytes == 300_000, "{download:?}");
        assert!(download.ended_ns - download.started_ns < 2_500_000_000, "not slowed down to the end");
        assert!(
            download.started_ns < run.mark("after").unwrap()
                && run.mark("after").unwrap() < download.ended_ns
        );
    }
    for used in &run.idle_uses {
        assert!(used.ok && used.opened_ns < run.mark("quiet").unwrap(), "{used:?}");
        assert!(used.used_ns > run.mark("after").unwrap(), "{used:?}");
    }
    assert_eq!(run.idle_uses.len(), 2);
    let phases: Vec<_> = run.phases().into_iter().map(|(name, _)| name).collect();
    assert_eq!(phases, ["start", "quiet", "after"]);
    server.end();
}

#[test]
fn a_server_that_ends_in_order_answers_what_is_under_way_and_closes_what_is_idle() {
    let server = Good::start("blue", None);
    let port = server.port;
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (mut busy, mut idle) = (connect(), connect());
    busy.write_all(b"GET /slow?ms=300 HTTP/1.1\r\n\r\n").unwrap();
    // The idle one has been accepted when it has been answered.
    idle.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(idle.read(&mut [0; 512]).unwrap() > 0);
    std::thread::sleep(Duration::from_millis(50));
    server.end();
    let mut answer = String::new();
    busy.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("blue\n"), "{answer}");
    assert_eq!(idle.read(&mut [0; 512]).unwrap(), 0);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn the_knee_of_a_server_on_the_same_machine_is_above_the_first_rate() {
    let server = Good::start("blue", None);
    let search = KneeSettings {
        first: 100.0,
        highest: 300.0,
        burst: Duration::from_millis(300),
        ..KneeSettings::default()
    };
    let knee = knee::measure(&settings(server.port), &search).unwrap();
    assert!(knee.rate.unwrap() >= 100.0, "{knee:?}");
    assert!(knee.bursts.iter().all(|burst| burst.requests > 25), "{knee:?}");
    server.end();
}
