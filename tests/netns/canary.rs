//! A canary: some of the new flows first, then more, and back by itself if the new side does worse.

use std::time::{Duration, Instant};

use patchswitch_load::client::Settings;
use patchswitch_load::record::Class;
use patchswitch_load::report::Run;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::programs::{self, Running};
use patchswitch_tests::standstill::Witness;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::rig::{ECHO, Load, NAME, PORT, Rig, Server, echo_in, load};

/// How many requests of a class each side answered that were due between two marks.
fn answered(run: &Run, class: Class, from: &str, to: &str) -> (usize, usize) {
    let at = |name: &str| (run.mark(name).unwrap() - run.started_ns) / 1000;
    let (from, to) = (at(from), at(to));
    let answers = run.answers.iter().filter(|series| series.class == class).flat_map(|series| series.iter());
    let due = answers.filter(|answer| answer.due_us() >= from && answer.done_us < to);
    let by: Vec<&str> = due.map(|answer| run.instances[usize::from(answer.instance)].as_str()).collect();
    let count = |name: &str| by.iter().filter(|by| **by == name).count();
    (count("a"), count("b"))
}

fn phase(rig: &Rig) -> (Value, Value) {
    let status = rig.ok(&["status", NAME]).unwrap();
    let one = &status["attachments"][0];
    (one["phase"].clone(), one["share"].clone())
}

#[test]
fn a_share_of_the_new_flows_goes_to_the_new_side_and_nobody_sees_it() {
    let rig = Rig::new("canary").unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _servers = [Server::start(a, "a").unwrap(), Server::start(b, "b").unwrap()];
    echo_in(a, "a").unwrap();
    echo_in(b, "b").unwrap();
    rig.attach_owned(Duration::from_secs(125)).unwrap();
    // Datagram sockets are never renewed: all their flows are a's before the canary.
    let settings = Settings { rate: 600.0, udp_port: Some(ECHO), udp_rate: 100.0, ..load() };
    let load = Load::start(&rig.lab.client, settings);
    std::thread::sleep(Duration::from_millis(500));
    for (share, mark) in [("20", "twenty"), ("60", "sixty")] {
        let mut words = vec!["switch", NAME, "--share", share];
        if share == "20" {
            words.extend(["--learn", "1"]);
        }
        let said = rig.ok(&words).unwrap();
        assert_eq!(said["share"].to_string(), share);
        assert_eq!(phase(&rig), ("sharing".into(), share.parse::<u64>().unwrap().into()));
        load.order(&format!("mark {mark}")).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        load.order(&format!("mark end-{mark}")).unwrap();
    }
    let said = rig.run(&["drain", NAME]).unwrap();
    assert!(said.code == Some(1) && said.stderr.contains("patchswitch switch"), "{said:?}");
    let canary = ["switch", NAME, "--share", "80,100", "--every", "1s"];
    let said = rig.ok(&canary).unwrap();
    assert_eq!(
        (&said["canary"]["share"], &said["canary"]["given_back"]),
        (&100.into(), &Value::Null),
        "{said}"
    );
    assert_eq!(phase(&rig).0, "draining");
    load.order("mark all").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    load.order("mark end").unwrap();
    let run = load.stop().unwrap();
    assert_eq!(run.failures, []);
    for (mark, share) in [("twenty", 0.2), ("sixty", 0.6)] {
        let (old, new) = answered(&run, Class::New, mark, &format!("end-{mark}"));
        let part = f64::from(u32::try_from(new).unwrap()) / f64::from(u32::try_from(old + new).unwrap());
        // Five standard deviations of 600 throws.
        assert!((part - share).abs() < 0.1, "{mark}: {new} of {}", old + new);
    }
    assert_eq!(answered(&run, Class::New, "all", "end").0, 0);
    // Kept connections stay where they began, and so do the datagrams of one socket.
    assert_eq!(answered(&run, Class::Keepalive, "twenty", "end").1, 0);
    let (old, new) = answered(&run, Class::Udp, "twenty", "end");
    assert!(old > 300 && new == 0, "{old} {new}");
    let conduct = &said["canary"]["new"];
    assert!(conduct["asked"].as_u64() > Some(100) && conduct["asked"] == conduct["answered"], "{said}");
    rig.finish_owned().unwrap();
}

/// A canary at work: the product in the background, and clients.
struct Watched {
    running: Running,
    output: NamedTempFile,
    load: Load,
    witness: Witness,
}

impl Watched {
    /// Begins, and returns when the new side has its first share.
    fn start(rig: &Rig, shares: &str) -> anyhow::Result<Self> {
        let patient = Settings { rate: 400.0, time_out: Duration::from_secs(10), ..load() };
        let (load, witness) = (Load::start(&rig.lab.client, patient), Witness::start());
        std::thread::sleep(Duration::from_millis(500));
        let program = programs::built("patchswitch")?;
        let program = program.to_string_lossy();
        let argv = [program.as_ref(), "switch", NAME, "--share", shares, "--every", "60s"];
        let output = NamedTempFile::new()?;
        let running = rig.lab.host.spawn(&argv, Some(output.path()))?;
        let end = Instant::now() + Duration::from_secs(20);
        // One that is given back at once has been at it as well.
        while phase(rig).0 == "steady" {
            anyhow::ensure!(Instant::now() < end, "it does not begin");
        }
        Ok(Self { running, output, load, witness })
    }

    /// Waits until it is given back, at a share and for a reason, and returns what the clients saw. None of them has to
    /// do with the new side from then on.
    fn given_back(self, rig: &Rig, share: u8, why: &str) -> Run {
        let ended = self.running.wait(Duration::from_secs(40)).unwrap();
        self.load.order("mark back").unwrap();
        let said = std::fs::read_to_string(self.output.path()).unwrap();
        assert_eq!(ended.code(), Some(22), "{said}");
        assert!(said.contains(&format!("given back at {share} of 100")) && said.contains(why), "{said}");
        assert_eq!(phase(rig).0, "draining");
        std::thread::sleep(Duration::from_secs(1));
        self.load.order("mark end").unwrap();
        let run = self.load.stop().unwrap();
        let (old, new) = answered(&run, Class::New, "back", "end");
        assert!(old > 100 && new == 0, "{old} {new}");
        Run { standstills: self.witness.stop().unwrap(), ..run }
    }
}

/// When the requests were due that a new side has failed, in order: no answer, or one only to a second SYN.
fn failed(run: &Run) -> Vec<u64> {
    let second_try = Duration::from_millis(900).as_micros();
    let late =
        run.answers.iter().filter(|series| series.class == Class::New).flat_map(|series| series.iter());
    let late = late.filter(|answer| u128::from(answer.latency_us) >= second_try);
    let mut due: Vec<u64> = late.map(|answer| run.started_ns + answer.due_us() * 1000).collect();
    due.extend(run.failures.iter().map(|failure| failure.due_ns));
    due.sort_unstable();
    due
}

/// From the failure that made it more than chance to the last one no more than a second went by, in which the machine
/// ran.
fn within_a_second(run: &Run) {
    let due = failed(run);
    assert!(due.len() >= 5, "{due:?}");
    let still: u64 = run.standstills.iter().map(|one| one.to_ns - one.from_ns).sum();
    let time = due[due.len() - 1] - due[4];
    eprintln!("{} connections failed, the last one {} ms after the fifth", due.len(), time / 1_000_000);
    assert!(time <= 1_000_000_000 + still, "{time} ns, of which the machine stood still {still}");
    assert!(due.last() < run.mark("back").as_ref(), "after it was given back");
}

/// Packets to the service's port that a partition does not get.
fn lose(ns: &Ns, which: &str) -> anyhow::Result<()> {
    let rules = format!(
        "table inet spoilt {{ chain c {{ type filter hook input priority 0; tcp dport {PORT} {which} drop; }}; }}"
    );
    ns.enter(|| programs::run_with_input(&["nft", "-f", "-"], Some(&rules))).map(drop)
}

fn lose_no_more(ns: &Ns) -> anyhow::Result<()> {
    ns.run(&["nft", "delete", "table", "inet", "spoilt"]).map(drop)
}

/// It is over: what the new side has ends, and nothing is left.
fn over(rig: Rig) {
    rig.ok(&["drain", NAME, "--deadline", "20"]).unwrap();
    assert_eq!(phase(&rig).0, "steady");
    rig.finish().unwrap();
}

#[test]
fn a_new_side_that_resets_is_given_back() {
    let rig = Rig::new("worse").unwrap();
    // Nobody listens in the new one.
    let _server = Server::start(&rig.lab.a, "a").unwrap();
    rig.attach().unwrap();
    let run = Watched::start(&rig, "10,50,100").unwrap().given_back(&rig, 10, "reset");
    within_a_second(&run);
    // A tenth of 200 new connections a second.
    assert!(run.failures.len() < 100, "{}", run.failures.len());
    over(rig);
}

#[test]
fn a_new_side_that_accepts_less_is_given_back() {
    let rig = Rig::new("deaf").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    lose(&rig.lab.b, "tcp flags & (syn | ack) == syn").unwrap();
    let run = Watched::start(&rig, "10,50,100").unwrap().given_back(&rig, 10, "not accepted, 0 reset");
    within_a_second(&run);
    // Whoever was not heard tries again, and then the old side serves.
    assert_eq!(run.failures, []);
    lose_no_more(&rig.lab.b).unwrap();
    over(rig);
}

#[test]
fn a_new_side_that_sends_more_again_is_given_back() {
    let rig = Rig::new("again").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    // It accepts all, and does not hear that its answers arrive.
    lose(&rig.lab.b, "tcp flags & (syn | psh) == 0 numgen random mod 10 < 5").unwrap();
    let run = Watched::start(&rig, "50,100").unwrap().given_back(&rig, 50, "segments the new side sent");
    assert_eq!(run.failures, []);
    lose_no_more(&rig.lab.b).unwrap();
    over(rig);
}

#[test]
fn a_new_side_that_breaks_late_is_given_back() {
    let rig = Rig::new("late").unwrap();
    let _server = Server::start(&rig.lab.a, "a").unwrap();
    let breaks = Server::start(&rig.lab.b, "b").unwrap();
    rig.attach().unwrap();
    let watched = Watched::start(&rig, "50,100").unwrap();
    watched.load.order("mark good").unwrap();
    std::thread::sleep(Duration::from_secs(4));
    watched.load.order("mark breaks").unwrap();
    drop(breaks);
    let run = watched.given_back(&rig, 50, "reset");
    let (old, new) = answered(&run, Class::New, "good", "breaks");
    assert!(old > 200 && new > 200, "{old} {new}");
    assert!(failed(&run)[0] >= run.mark("good").unwrap(), "{:?}", run.failures.first());
    within_a_second(&run);
    over(rig);
}

#[test]
fn who_is_killed_leaves_a_canary_that_goes_on_and_can_be_called_off() {
    let rig = Rig::new("off").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let load = Load::start(&rig.lab.client, Settings { rate: 400.0, ..load() });
    let program = programs::built("patchswitch").unwrap();
    let argv = [program.to_str().unwrap(), "switch", NAME, "--share", "50,100", "--every", "60s"];
    for (signal, code) in [(Signal::KILL, None), (Signal::INT, Some(130))] {
        let running = rig.lab.host.spawn(&argv, None).unwrap();
        for _ in 0..100 {
            if phase(&rig).0 == "sharing" {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_millis(300));
        running.signal(signal).unwrap();
        assert_eq!(running.wait(Duration::from_secs(20)).unwrap().code(), code);
        let expected = if code.is_none() { "sharing" } else { "draining" };
        assert_eq!(phase(&rig).0, expected, "{signal:?}");
    }
    // The side that served is the active one again.
    let said = rig.run(&["switch", NAME, "--to", rig.lab.a.name()]).unwrap();
    assert!(said.code == Some(0) && said.stdout.contains("serves already"), "{said:?}");
    assert_eq!(load.stop().unwrap().failures, []);
    rig.finish().unwrap();
}

#[test]
fn a_share_that_makes_no_sense_is_refused() {
    let rig = Rig::new("shares").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    for (arguments, code, words) in [
        (&["--share", "0"][..], 2, "0"),
        (&["--share", "101"], 2, "101"),
        (&["--share", "10", "--every", "5"], 2, "unit"),
        (&["--every", "5s"], 2, "--share"),
        (&["--share", "10,5", "--every", "1s"], 1, "larger"),
        (&["--share", "10,100"], 1, "--every"),
        (&["--share", "10", "--to", rig.lab.a.name()], 1, "serves already"),
    ] {
        let said = rig.refused(&[&["switch", NAME][..], arguments].concat(), code).unwrap();
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    assert_eq!(phase(&rig), ("steady".into(), 0.into()));
    rig.switch_to(&rig.lab.b).unwrap();
    let said = rig.refused(&["switch", NAME, "--share", "10"], 1).unwrap();
    assert!(said.contains("patchswitch drain"), "{said}");
    rig.finish().unwrap();
}
