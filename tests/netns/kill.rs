//! Killed at any moment: what is there of it is removed by whoever comes next.

use std::time::{Duration, Instant};

use patchswitch_tests::programs;
use rustix::process::Signal;

use crate::ask::who;
use crate::rig::{NAME, Rig, Server, ends};
use crate::xdp;

/// So many moments between the beginning and the end of a command.
const MOMENTS: u32 = 16;

/// Starts the product and kills it after a while; true if it had not ended by itself.
fn kill_after(rig: &Rig, arguments: &[&str], delay: Duration) -> anyhow::Result<bool> {
    let program = programs::built("patchswitch")?;
    let program = program.to_string_lossy();
    let argv: Vec<&str> = [program.as_ref()].into_iter().chain(arguments.iter().copied()).collect();
    let mut running = rig.lab.host.spawn(&argv, None)?;
    std::thread::sleep(delay);
    let alive = !running.has_ended();
    if alive {
        running.signal(Signal::KILL)?;
        running.wait(Duration::from_secs(10))?;
    }
    Ok(alive)
}

#[test]
fn an_attach_that_is_killed_can_be_detached_or_repeated() {
    killed_attach(&Rig::new("killed").unwrap(), "auto");
}

#[test]
fn an_attach_of_xdp_that_is_killed_can_be_detached_or_repeated() {
    killed_attach(&xdp::rig("xdpkilled").unwrap(), "xdp");
}

fn killed_attach(rig: &Rig, hook: &str) {
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    let arguments = [rig.attach_arguments(), vec!["--hook".to_owned(), hook.to_owned()]].concat();
    let attach: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let begin = Instant::now();
    rig.ok(&attach).unwrap();
    let whole = begin.elapsed();
    rig.ok(&["detach", NAME]).unwrap();
    let mut killed = 0;
    for moment in 0..MOMENTS {
        let alive = kill_after(rig, &attach, whole * moment / MOMENTS).unwrap();
        killed += u32::from(alive);
        if moment % 2 == 0 && alive {
            // Repeated: what is left of the first one is removed on the way.
            let ended = rig.run(&attach).unwrap();
            assert!(matches!(ended.code, Some(0 | 73)), "{moment}: {ended:?}");
            for end in ends() {
                assert_eq!(who(&rig.lab.client, end).unwrap(), "a", "{moment}");
            }
        }
        rig.ok(&["detach", NAME]).unwrap();
        let left = rig.left().unwrap();
        assert!(left.is_empty(), "killed at {moment}/{MOMENTS}: {left:?}");
    }
    assert!(killed >= MOMENTS / 4, "{killed} of {MOMENTS} were killed");
}

#[test]
fn a_detach_that_is_killed_can_be_repeated() {
    let rig = Rig::new("killoff").unwrap();
    rig.attach().unwrap();
    let begin = Instant::now();
    rig.ok(&["detach", NAME]).unwrap();
    let whole = begin.elapsed();
    let mut killed = 0;
    for moment in 0..MOMENTS {
        rig.attach().unwrap();
        killed += u32::from(kill_after(&rig, &["detach", NAME], whole * moment / MOMENTS).unwrap());
        rig.ok(&["detach", NAME]).unwrap();
        let left = rig.left().unwrap();
        assert!(left.is_empty(), "killed at {moment}/{MOMENTS}: {left:?}");
    }
    assert!(killed >= MOMENTS / 4, "{killed} of {MOMENTS} were killed");
}

#[test]
fn what_was_not_written_to_its_end_goes_with_the_rest() {
    const RECORDS: &str = "/run/patchswitch/attachments";
    let rig = Rig::new("halfway").unwrap();
    for with_record in [true, false] {
        if with_record {
            rig.attach().unwrap();
        }
        std::fs::create_dir_all(RECORDS).unwrap();
        std::fs::write(format!("{RECORDS}/{NAME}.new"), "{\"name\"").unwrap();
        if with_record {
            std::fs::write("/run/patchswitch/settings.new", "[").unwrap();
        }
        rig.ok(&["detach", NAME]).unwrap();
        let left = rig.left().unwrap();
        assert!(left.is_empty(), "with a record: {with_record}: {left:?}");
    }
}

#[test]
fn a_switch_that_is_killed_has_switched_or_not() {
    let rig = Rig::new("killmid").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let begin = Instant::now();
    rig.switch_to(&rig.lab.b).unwrap();
    let whole = begin.elapsed();
    for moment in 0..MOMENTS {
        kill_after(&rig, &["switch", NAME], whole * moment / MOMENTS).unwrap();
        let status = rig.ok(&["status", NAME]).unwrap();
        let partitions = status["attachments"][0]["partitions"].clone();
        let active = partitions.as_array().unwrap().iter().find(|p| p["role"] == "active").unwrap();
        let serving = if active["netns"] == rig.lab.a.name() { "a" } else { "b" };
        // Clients see one or the other, wherever they are, whatever the slow path says.
        for ns in [&rig.lab.client, &rig.lab.host] {
            for end in ends() {
                assert_eq!(who(ns, end).unwrap(), serving, "killed at {moment}/{MOMENTS}");
            }
        }
    }
    rig.ok(&["switch", NAME]).unwrap();
    rig.finish().unwrap();
}
