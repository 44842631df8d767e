//! The control channel between real processes in real cgroups.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use patchswitch::control::{self, Boot, Message};
use patchswitch::partition::control::{Event, Next};
use patchswitch::partition::lifecycle::{self, Started};

use super::lab::{Lab, SOON, service};

const SOCKET: &str = "/run/patchswitch/partitions/lab/control/agent.sock";

fn next(started: &mut Started) -> Next {
    started.control.next(Instant::now() + SOON, Some(&started.process)).unwrap()
}

#[test]
fn a_process_of_the_host_is_refused_even_with_the_right_nonce() {
    let lab = Lab::new();
    let mut started = lab.start();
    let boot: Boot = started.control.boot().clone();
    let mut rogue = UnixStream::connect(SOCKET).unwrap();
    let hello = Message::Hello { boot_id: boot.boot_id, nonce: boot.nonce };
    rogue.write_all(&control::encode(hello).unwrap()).unwrap();
    let Next::Event(Event::Refused(reason)) = next(&mut started) else { panic!("not refused") };
    assert_eq!(reason, format!("process {} is not in this partition", std::process::id()));
    rogue.set_read_timeout(Some(SOON)).unwrap();
    let mut answer = Vec::new();
    // The answer, and then the end.
    let _ = rogue.read_to_end(&mut answer);
    assert!(String::from_utf8_lossy(&answer).contains("refused"));
}

#[test]
fn the_partition_s_own_processes_are_heard_and_a_restart_changes_the_nonce() {
    let lab = Lab::new();
    let first = lab.start();
    let boot = first.control.boot().clone();
    let inside = lab.sh("cat /run/patchswitch/control/boot.json");
    assert!(inside.contains(&boot.boot_id) && inside.contains(&boot.nonce));
    drop(first);
    lab.stop(SOON);
    let second = lab.start();
    assert!(second.control.boot().boot_id != boot.boot_id && second.control.boot().nonce != boot.nonce);
}

#[test]
fn the_socket_works_for_the_next_agent() {
    let mut lab = Lab::new();
    lab.spec.service = Some(service("while ! test -e /end; do sleep 0.1; done; exit 3"));
    let first = lab.start();
    drop(first);
    assert!(!Path::new(SOCKET).exists());
    let mut again = lifecycle::find(lab.name()).unwrap().unwrap();
    assert!(Path::new(SOCKET).exists());
    // The service fails, and the init says so to whoever listens now.
    lab.put("/end", 0o644, "");
    loop {
        match next(&mut again) {
            Next::Event(Event::Stopping { reason, code }) => {
                assert_eq!((reason.as_str(), code), ("the service ended with status 3", 3));
                break;
            }
            Next::Event(Event::Hello) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(again.process.wait(Instant::now() + SOON).unwrap());
}

#[test]
fn an_agent_that_does_not_listen_does_not_delay_the_stop() {
    let lab = Lab::new();
    let _listening_but_not_serving = lab.start();
    let start = Instant::now();
    assert!(!lab.stop(SOON).killed);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}
