//! The command: its servers, its orders, its signals and its report.
#![expect(clippy::unwrap_used, reason = "what a test's own helpers cannot do ends the test")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use patchswitch_load::control::Client;
use patchswitch_load::report::Report;
use rustix::process::{Pid, Signal, kill_process};

/// A running command; killed with its handle.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended: then there is nothing to kill.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Running {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn ends_well(&mut self) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the program under test")]
fn start(arguments: &[&str]) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patchswitch-load"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    Running(command.spawn().unwrap())
}

/// A server on a free port, and what runs it.
fn serve(tag: &str) -> (u16, Running) {
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let text = port.to_string();
    let server = start(&["serve", "--port", &text, "--udp-port", &text, "--tag", tag]);
    let end = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(("::1", port)).is_err() {
        assert!(Instant::now() < end, "the server does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    (port, server)
}

fn load(port: u16, out: &Path, more: &[&str]) -> Running {
    let port = port.to_string();
    let fixed = ["run", "--target4", "127.0.0.1", "--target6", "::1", "--rate", "100", "--port", &port];
    let out = ["--udp-port", &port, "--out", out.to_str().unwrap()];
    start(&[&fixed[..], &out[..], more].concat())
}

fn report(path: &PathBuf) -> Report {
    Report::parse(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_run_under_orders_writes_its_report_and_removes_its_socket() {
    let directory = tempfile::tempdir().unwrap();
    let (out, socket) = (directory.path().join("report.json"), directory.path().join("control"));
    let (port, mut server) = serve("blue");
    let more = ["--control", socket.to_str().unwrap(), "--download", "/bytes?n=200000", "--idle"];
    let mut run = load(port, &out, &more);
    let mut client = Client::connect(&socket, Duration::from_secs(10)).unwrap();
    let quiet = client.mark("quiet").unwrap();
    client.order("start-download").unwrap();
    client.mark_at("flip", quiet + 1000).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    client.order("use-idle").unwrap();
    client.order("finish-download").unwrap();
    let status = client.status().unwrap();
    assert!(status.now_ns > quiet && status.issued > 20 && status.failed == 0, "{status:?}");
    client.order("stop").unwrap();
    run.ends_well();
    assert!(!socket.exists());
    let report = report(&out);
    assert_eq!((report.summary.whole.failed, report.run.instances), (0, vec!["blue".to_owned()]));
    assert!(report.run.downloads.iter().all(|download| download.ok) && report.run.idle_uses.len() == 2);
    assert_eq!(report.run.marks[1].at_ns, quiet + 1000);
    server.signal(Signal::TERM);
    server.ends_well();
}

#[test]
fn the_standard_input_gives_orders_and_its_end_ends_the_run() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("report.json");
    let (port, _server) = serve("blue");
    let mut run = load(port, &out, &["--stdin"]);
    let mut input = run.0.stdin.take().unwrap();
    let mut output = BufReader::new(run.0.stdout.take().unwrap()).lines();
    input.write_all(b"mark one\nnonsense\n").unwrap();
    assert!(output.next().unwrap().unwrap().starts_with("ok "));
    assert_eq!(output.next().unwrap().unwrap(), "error \"nonsense\" is no order");
    drop(input);
    run.ends_well();
    assert_eq!(report(&out).run.marks[0].name, "one");
}

#[test]
fn a_signal_and_a_file_end_the_run_with_a_report() {
    let directory = tempfile::tempdir().unwrap();
    let (port, _server) = serve("blue");
    let (out, file) = (directory.path().join("a.json"), directory.path().join("end"));
    let mut run = load(port, &out, &["--seconds", "60"]);
    std::thread::sleep(Duration::from_millis(300));
    run.signal(Signal::INT);
    run.ends_well();
    assert!(report(&out).summary.whole.requests > 10);
    let out = directory.path().join("b.json");
    let mut run = load(port, &out, &["--until-file", file.to_str().unwrap()]);
    std::thread::sleep(Duration::from_millis(300));
    std::fs::write(&file, "").unwrap();
    run.ends_well();
    assert_eq!(report(&out).summary.whole.failed, 0);
}

#[test]
fn a_run_without_an_end_or_a_target_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("report.json");
    for arguments in [
        &["run", "--target4", "127.0.0.1", "--out", out.to_str().unwrap()][..],
        &["run", "--seconds", "1", "--out", out.to_str().unwrap()],
        &["run", "--target4", "::1", "--seconds", "1", "--out", out.to_str().unwrap()],
        &["run", "--target4", "127.0.0.1", "--seconds", "-1", "--out", out.to_str().unwrap()],
    ] {
        let status = start(arguments).0.wait().unwrap();
        assert!(!status.success(), "{arguments:?}");
        assert!(!out.exists());
    }
}

#[test]
fn the_knee_and_the_clock_are_printed_for_programs() {
    let (port, _server) = serve("blue");
    let port = port.to_string();
    let arguments = ["knee", "--target4", "127.0.0.1", "--port", &port, "--highest", "150", "--burst", "0.2"];
    let mut knee = start(&arguments);
    let text = std::io::read_to_string(knee.0.stdout.take().unwrap()).unwrap();
    knee.ends_well();
    let knee: patchswitch_load::knee::Knee = serde_json::from_str(&text).unwrap();
    assert!(knee.rate.is_some(), "{text}");
    let mut clock = start(&["clock"]);
    let text = std::io::read_to_string(clock.0.stdout.take().unwrap()).unwrap();
    clock.ends_well();
    let now = patchswitch_load::clock::now_ns();
    assert!((1..now).contains(&text.trim().parse().unwrap()), "{text}");
}
