//! Servers that misbehave: each way is seen and called by its name.

use std::io::Write as _;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use patchswitch_load::client::{DownloadSettings, LoadError, Settings};
use patchswitch_load::control::Response;
use patchswitch_load::record::{Class, ErrorKind, Family};
use patchswitch_load::report::Run;

use crate::servers::{
    Good, LOOPBACK, answering, bad, bad_echo, kinds, nobody, read_question, run, run_with, settings,
};

/// A time-out for servers that never answer.
const SOON: Duration = Duration::from_millis(300);

/// Every request of every class and family failed in one way.
fn all_failed(run: &Run, kind: &str) {
    assert_eq!(kinds(&run.failures), [kind]);
    let stats = run.stats(run.whole());
    assert!(stats.requests >= 50 && stats.failed == stats.requests, "{stats:?}");
    for class in [Class::Keepalive, Class::New] {
        for family in Family::ALL {
            assert!(run.failures.iter().any(|f| f.class == class && f.family == family), "{class} {family}");
        }
    }
    let mut numbers: Vec<_> = run.failures.iter().map(|failure| failure.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), run.failures.len(), "each has its own number");
    assert!(run.failures.iter().all(|f| f.failed_ns >= f.due_ns && f.due_ns >= run.started_ns));
}

#[test]
fn refused() {
    let run = run(settings(nobody()));
    all_failed(&run, "refused");
    assert!(run.failures.iter().all(|failure| failure.opened_ns.is_some()));
}

#[test]
fn reset() {
    let port = bad(|mut stream| {
        read_question(&mut stream);
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    });
    let run = run(settings(port));
    all_failed(&run, "reset");
    assert!(run.failures.iter().all(|failure| failure.local.is_some()));
}

#[test]
fn hangs() {
    let begin = Instant::now();
    let port = bad(|mut stream| while read_question(&mut stream) {});
    let run = run(Settings { time_out: SOON, ..settings(port) });
    all_failed(&run, "time-out");
    assert!(begin.elapsed() < Duration::from_secs(10), "there is an end of waiting");
    for failure in &run.failures {
        let waited = Duration::from_nanos(failure.failed_ns - failure.due_ns);
        assert!(waited >= SOON - Duration::from_millis(1), "{failure:?}");
    }
}

#[test]
fn closes_without_an_answer() {
    all_failed(
        &run(settings(bad(|mut stream| assert!(read_question(&mut stream))))),
        "closed without an answer",
    );
}

#[test]
fn cuts_an_answer_off() {
    let port = answering("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n12345", 1);
    all_failed(&run(settings(port)), "answer cut off after 5 of 9 bytes");
}

#[test]
fn answers_by_another_status() {
    let port = answering("HTTP/1.1 503 No\r\nContent-Length: 0\r\nX-Instance: green\r\n\r\n", 1);
    let run = run(settings(port));
    all_failed(&run, "status 503");
    assert!(run.failures.iter().all(|failure| failure.instance.as_deref() == Some("green")));
}

#[test]
fn answers_by_something_else() {
    let run = run(settings(answering("220 mail.example ESMTP\r\n\r\n", 1)));
    assert!(run.failures.iter().all(|failure| matches!(failure.error, ErrorKind::BadAnswer(_))));
    assert_eq!(run.failures.len() as u64, run.stats(run.whole()).requests);
}

#[test]
fn a_pause_of_the_server_is_a_gap_of_its_phase_and_a_latency_from_the_moment_it_was_due() {
    // One pause of 800 ms, which all conversations share.
    let begin = Instant::now();
    let port = bad(move |mut stream| {
        while read_question(&mut stream) {
            let now = begin.elapsed();
            let (from, to) = (Duration::from_millis(700), Duration::from_millis(1500));
            if (from..to).contains(&now) {
                std::thread::sleep(to - now);
            }
            if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nServer: s\r\n\r\n").is_err() {
                return;
            }
        }
    });
    let run = run_with(Settings { duration: None, ..settings(port) }, |order| {
        for (name, until) in [("before", 600), ("pause", 1600), ("after", 2100)] {
            order(&format!("mark {name}"));
            std::thread::sleep(Duration::from_millis(until).saturating_sub(begin.elapsed()));
        }
    });
    assert_eq!(kinds(&run.failures), [""; 0]);
    let report = run.report();
    let phase = |name: &str| &report.summary.phases.iter().find(|phase| phase.name == name).unwrap().stats;
    let gap = |name: &str| phase(name).longest_gap.unwrap().ms;
    assert!(gap("pause") > 750.0, "{}", gap("pause"));
    // The machine may be busy, but not for that long.
    assert!(gap("before") < 500.0 && gap("after") < 500.0, "{} {}", gap("before"), gap("after"));
    // An open loop keeps asking during the pause: 100 a second, of which the early ones waited long.
    let pause = phase("pause");
    assert!(pause.requests >= 95, "{}", pause.requests);
    assert!(pause.series.iter().any(|series| series.max_ms.is_some_and(|ms| ms > 700.0)));
    let kept = pause.series.iter().find(|s| s.class == Class::Keepalive && s.family == Family::V4).unwrap();
    assert!(kept.p50_ms.unwrap() > 200.0, "more than half of the requests were due in the pause: {kept:?}");
}

fn datagrams(port: u16) -> Run {
    run(Settings { rate: 0.0, udp_rate: 60.0, udp_port: Some(port), time_out: SOON, ..settings(1) })
}

#[test]
fn a_datagram_is_not_answered() {
    let run = datagrams(bad_echo(|_, _, _| {}));
    assert_eq!(kinds(&run.failures), ["time-out"]);
    assert!(run.failures.len() >= 30 && run.failures.len() as u64 == run.stats(run.whole()).requests);
}

#[test]
fn a_datagram_is_answered_by_a_stranger() {
    let run = datagrams(bad_echo(|socket, bytes, client| {
        let stranger = UdpSocket::bind((socket.local_addr().unwrap().ip(), 0)).unwrap();
        stranger.send_to(&[bytes, b"green"].concat(), client).unwrap();
    }));
    assert_eq!(run.failures.len() as u64, run.stats(run.whole()).requests);
    for failure in &run.failures {
        let ErrorKind::WrongSource(SocketAddr::V4(_) | SocketAddr::V6(_)) = failure.error else {
            panic!("{failure:?}");
        };
        assert_eq!(failure.instance.as_deref(), Some("green"));
    }
}

#[test]
fn a_datagram_is_answered_from_another_address_of_the_same_host() {
    // What a wildcard socket does that lives behind two addresses.
    let port = bad_echo(|socket, bytes, client| {
        if client.is_ipv4() {
            let port = socket.local_addr().unwrap().port();
            let other = UdpSocket::bind(("127.0.0.9", port)).unwrap();
            other.send_to(bytes, client).unwrap();
        } else {
            socket.send_to(bytes, client).unwrap();
        }
    });
    let run = datagrams(port);
    assert_eq!(kinds(&run.failures), [format!("answer from 127.0.0.9:{port}")]);
    assert!(run.failures.iter().all(|failure| failure.family == Family::V4));
    assert!(run.stats(run.whole()).answered_by[""] >= 15, "IPv6 was answered");
}

#[test]
fn another_datagram_is_answered() {
    let run = datagrams(bad_echo(|socket, bytes, client| {
        let mut changed = bytes.to_vec();
        changed[8] ^= 0xff;
        socket.send_to(&changed, client).unwrap();
    }));
    assert_eq!(kinds(&run.failures), ["time-out"]);
    assert_eq!(run.sockets.udp_stray, run.failures.len() as u64);
}

#[test]
fn a_datagram_is_answered_twice() {
    let run = datagrams(bad_echo(|socket, bytes, client| {
        for _ in 0..2 {
            socket.send_to(bytes, client).unwrap();
        }
    }));
    assert_eq!(kinds(&run.failures), [""; 0]);
    let answered = run.stats(run.whole()).requests;
    // The last second answers may come after the end.
    assert!((answered - 2..=answered).contains(&run.sockets.udp_stray), "{:?}", run.sockets);
}

fn downloading(port: u16, sha256: Option<&str>) -> Settings {
    let download = DownloadSettings {
        path: "/bytes?n=50000".into(),
        bytes_per_second: 1_000_000,
        sha256: sha256.map(str::to_owned),
    };
    Settings { rate: 0.0, duration: None, download: Some(download), time_out: SOON, ..settings(port) }
}

fn download_once(settings: Settings) -> Run {
    run_with(settings, |order| {
        order("start-download");
        assert_eq!(order("finish-download"), Response::Error("a download failed".into()));
    })
}

#[test]
fn a_download_has_another_content_than_before() {
    // Two quick downloads come first, one in each family.
    let count = AtomicUsize::new(0);
    let port = bad(move |mut stream| {
        read_question(&mut stream);
        let byte = if count.fetch_add(1, Ordering::SeqCst) < 2 { b'a' } else { b'b' };
        let body = [byte; 1000];
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n").unwrap();
        stream.write_all(&body).unwrap();
    });
    let run = download_once(downloading(port, None));
    assert_eq!(run.failures.len(), 2);
    assert!(run.failures.iter().all(|failure| matches!(failure.error, ErrorKind::BadDigest(_))));
    assert!(run.downloads.iter().all(|download| !download.ok && download.bytes == 1000));
}

#[test]
fn a_download_is_cut_off_or_stops() {
    for (hangs, kind) in [(false, "answer cut off after 10 of 50000 bytes"), (true, "time-out")] {
        let port = bad(move |mut stream| {
            read_question(&mut stream);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n0123456789").unwrap();
            while hangs && read_question(&mut stream) {}
        });
        let run = download_once(downloading(port, Some("00")));
        assert_eq!(kinds(&run.failures), [kind]);
        assert_eq!(run.downloads.len(), 2);
    }
}

#[test]
fn the_first_download_must_come() {
    let error =
        patchswitch_load::client::run(downloading(nobody(), None), tokio::sync::mpsc::unbounded_channel().1);
    assert!(matches!(error, Err(LoadError::Download { source: ErrorKind::Refused, .. })), "{error:?}");
}

#[test]
fn an_idle_connection_is_dead_when_it_is_used() {
    let port = bad(|mut stream| {
        // Closed at once, or as soon as it is used: the client sees both as an end without an answer.
        drop(stream.flush());
    });
    let settings = Settings { rate: 0.0, idle: true, duration: None, ..settings(port) };
    let run = run_with(settings, |order| {
        std::thread::sleep(Duration::from_millis(100));
        assert!(matches!(order("use-idle"), Response::Error(_)));
        // Each is used once: there is none now.
        assert!(matches!(order("use-idle"), Response::Error(_)));
    });
    assert!(run.idle_uses.len() == 4 && run.idle_uses.iter().all(|used| !used.ok));
    assert!(kinds(&run.failures).contains(&"no idle connection is open".to_owned()));
    assert!(
        run.failures.iter().any(|f| matches!(f.error, ErrorKind::Closed | ErrorKind::Reset)),
        "{:?}",
        run.failures
    );
}

#[test]
fn two_addresses_of_one_family_are_refused() {
    let server = Good::start("blue", None);
    for targets in [vec![], vec![LOOPBACK[0]; 2], vec![LOOPBACK[0], LOOPBACK[1], LOOPBACK[0]]] {
        let settings = Settings { targets, ..settings(server.port) };
        let result = patchswitch_load::client::run(settings, tokio::sync::mpsc::unbounded_channel().1);
        assert!(matches!(result, Err(LoadError::Targets(_))));
    }
    server.end();
}
