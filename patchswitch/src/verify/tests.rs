//! Servers on the loopback that behave badly, and the gate in front of them.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::config::Gate;

/// As any client of this host.
pub(super) const HERE: Reach<'static> = Reach { open: &plain_socket, run: &run_on_host };

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
const TIMEOUT: Duration = Duration::from_millis(400);

/// Serves connections, the first as number 0, until the test ends.
fn serve(address: IpAddr, behave: impl Fn(usize, TcpStream) + Send + 'static) -> NonZeroU16 {
    let listener = TcpListener::bind(SocketAddr::new(address, 0)).unwrap();
    let port = NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap();
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            behave(number, stream);
        }
    });
    port
}

/// Reads the request's head, so that closing the connection does not reset it.
fn answer(mut stream: TcpStream, text: &str) {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|count| count > 0) {
        request.push(byte[0]);
    }
    let _ = stream.write_all(text.as_bytes());
}

fn http(port: NonZeroU16) -> Probe {
    Probe::Http { port, path: "/".to_owned(), host: None, status: 200, contains: None }
}

fn fail(outcome: Result<Outcome, CannotTell>) -> String {
    match outcome {
        Ok(Outcome::Fail(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn tcp_and_http_pass_in_both_families() {
    for address in [V4, V6] {
        let port =
            serve(address, |_, stream| answer(stream, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"));
        assert_eq!(probe(&Probe::Tcp { port }, address, HERE, TIMEOUT).unwrap(), Outcome::Pass);
        assert_eq!(probe(&http(port), address, HERE, TIMEOUT).unwrap(), Outcome::Pass);
        let with = |text: &str| Probe::Http {
            port,
            path: "/".to_owned(),
            host: Some("h".to_owned()),
            status: 200,
            contains: Some(text.to_owned()),
        };
        assert_eq!(probe(&with("ell"), address, HERE, TIMEOUT).unwrap(), Outcome::Pass);
        assert!(fail(probe(&with("bye"), address, HERE, TIMEOUT)).contains("without \"bye\""));
    }
}

#[test]
fn nobody_listening_is_a_failure() {
    for address in [V4, V6] {
        // Bound and not listening, so that nobody else can take the port meanwhile.
        let socket = plain_socket(SocketAddr::new(address, 0)).unwrap();
        rustix::net::bind(&socket, &SocketAddr::new(address, 0)).unwrap();
        let listener = TcpListener::from(socket);
        let port = NonZeroU16::new(listener.local_addr().unwrap().port()).unwrap();
        let reason = fail(probe(&Probe::Tcp { port }, address, HERE, TIMEOUT));
        assert!(reason.contains("did not accept"), "{reason}");
    }
}

#[test]
fn wrong_answers_are_failures_that_say_what_came() {
    let cases = [
        ("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "status 503 instead of 200"),
        ("HTTP/1.1 301 Moved\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", "status 301 instead of 200"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhalf", "in the middle of its answer"),
        ("HTTP/1.1 200 OK\r\nContent", "in the middle of its answer"),
        ("", "without an answer"),
        ("220 mail.example.org ESMTP\r\n\r\n", "did not answer in HTTP"),
    ];
    for (text, words) in cases {
        let port = serve(V4, move |_, stream| answer(stream, text));
        let reason = fail(probe(&http(port), V4, HERE, TIMEOUT));
        assert!(reason.contains(words), "{reason}");
    }
}

#[test]
fn a_reset_is_a_failure() {
    let port = serve(V4, |_, stream| {
        // Closing with unread data resets the connection.
        std::thread::sleep(Duration::from_millis(50));
        drop(stream);
    });
    let reason = fail(probe(&http(port), V4, HERE, TIMEOUT));
    assert!(reason.contains("broke off") || reason.contains("without an answer"), "{reason}");
}

#[test]
fn silence_and_dripping_end_with_the_time_limit() {
    type Behave = fn(usize, TcpStream);
    let silent: Behave = |_, stream| {
        std::thread::sleep(Duration::from_secs(30));
        drop(stream);
    };
    let dripping: Behave = |_, mut stream| {
        while stream.write_all(b"H").is_ok() {
            std::thread::sleep(Duration::from_millis(30));
        }
    };
    for behave in [silent, dripping] {
        let port = serve(V4, behave);
        let start = Instant::now();
        let reason = fail(probe(&http(port), V4, HERE, TIMEOUT));
        assert!(reason.contains("in time"), "{reason}");
        assert!(start.elapsed() >= TIMEOUT && start.elapsed() < TIMEOUT * 10, "{:?}", start.elapsed());
    }
}

#[test]
fn a_half_open_listener_with_a_full_queue_ends_with_the_time_limit() {
    let socket = plain_socket(SocketAddr::new(V4, 0)).unwrap();
    rustix::net::bind(&socket, &SocketAddr::new(V4, 0)).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().unwrap();
    // Nobody accepts: the queue is filled until a connection is no longer answered.
    let short = Duration::from_millis(200);
    let waiting: Vec<_> = (0..8).filter_map(|_| TcpStream::connect_timeout(&address, short).ok()).collect();
    assert!(waiting.len() < 8, "the queue never filled");
    let port = NonZeroU16::new(address.port()).unwrap();
    let reason = fail(probe(&Probe::Tcp { port }, V4, HERE, TIMEOUT));
    assert!(reason.contains("in time"), "{reason}");
}

#[test]
fn trouble_on_this_side_is_no_verdict() {
    let port = NonZeroU16::new(80).unwrap();
    let none = |_| Err(std::io::Error::from_raw_os_error(24));
    let reach = Reach { open: &none, ..HERE };
    assert!(matches!(probe(&http(port), V4, reach, TIMEOUT), Err(CannotTell::Socket { .. })));
    // An IPv4 socket cannot go to an IPv6 address: the kernel does not even try.
    let wrong = |_| plain_socket(SocketAddr::new(V4, 0));
    let reach = Reach { open: &wrong, ..HERE };
    assert!(matches!(probe(&http(port), V6, reach, TIMEOUT), Err(CannotTell::Unreachable { .. })));
}

fn quick(need: u32, timeout_ms: u64, deadline_ms: u64) -> Gate {
    let millis = Duration::from_millis;
    Gate { need, every: millis(5), timeout: millis(timeout_ms), deadline: millis(deadline_ms) }
}

#[test]
fn a_gate_needs_its_successes_in_a_row() {
    // Good, good, bad, and good from then on: three in a row are there after the sixth.
    let port = serve(V4, |number, stream| {
        let status = if number == 2 { "500 No" } else { "200 OK" };
        answer(stream, &format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"));
    });
    let target = Target { addresses: &[V4], probes: &[http(port)] };
    assert_eq!(gate(target, &quick(3, 10_000, 60_000), HERE, &|| false).unwrap().rounds, 6);
}

#[test]
fn a_gate_fails_if_one_of_several_addresses_or_probes_fails() {
    let good = serve(V4, |_, stream| answer(stream, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
    let flapping = serve(V4, |number, stream| {
        let status = if number % 2 == 0 { "200 OK" } else { "500 No" };
        answer(stream, &format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"));
    });
    let both = [http(good), http(flapping)];
    let cases = [
        (Target { addresses: &[V4], probes: &both }, "status 500"),
        (Target { addresses: &[V4, V6], probes: &both[..1] }, "did not accept"),
    ];
    for (target, words) in cases {
        let error = gate(target, &quick(2, 1000, 1500), HERE, &|| false).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.exit_code().number(), 21);
    }
}

#[test]
fn the_reason_is_not_that_the_deadline_cut_the_last_round_short() {
    let port = serve(V4, |number, stream| {
        if number > 0 {
            std::thread::sleep(Duration::from_secs(30));
        }
        answer(stream, "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n");
    });
    let target = Target { addresses: &[V4], probes: &[http(port)] };
    let error = gate(target, &quick(1, 60_000, 1500), HERE, &|| false).unwrap_err();
    assert!(error.to_string().contains("status 500"), "{error}");
}

#[test]
fn a_gate_that_cannot_tell_does_not_pass() {
    let command = Probe::Command { command: "/nowhere/check".to_owned() };
    let target = Target { addresses: &[V4], probes: &[command] };
    let error = gate(target, &quick(1, 1000, 1500), HERE, &|| false).unwrap_err();
    assert!(matches!(error, GateError::CannotTell { .. }), "{error}");
}

#[test]
fn a_gate_can_be_interrupted() {
    let port = NonZeroU16::new(9).unwrap();
    let asked = AtomicUsize::new(0);
    let stop = || asked.fetch_add(1, Ordering::Relaxed) > 3;
    let target = Target { addresses: &[V4], probes: &[Probe::Tcp { port }] };
    let error = gate(target, &quick(1, 1000, 60_000), HERE, &stop).unwrap_err();
    assert!(matches!(error, GateError::Stopped), "{error}");
}
