//! Killed at any moment: what is there of it is removed by whoever comes next.

use std::time::{Duration, Instant};

use patchswitch_load::client::Settings;
use patchswitch_tests::netlab::Ns;
use patchswitch_tests::programs;
use rustix::process::Signal;

use crate::ask::who;
use crate::group;
use crate::reload::{attached, programs as pinned};
use crate::repairs::{Flood, Repairs};
use crate::rig::{ECHO, Load, NAME, Rig, Server, echo_in, ends, load};
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

/// Who uses the service, and who looks at what comes of it.
struct Users {
    load: Load,
    flood: Flood,
    repairs: Repairs,
}

/// A laboratory under load. Kept connections are renewed all the time, so that each side has flows at every moment.
fn loaded(
    label: &str,
    udp_rate: f64,
    attach: impl FnOnce(&Rig) -> anyhow::Result<()>,
) -> anyhow::Result<(Rig, [Server; 2], Users)> {
    let rig = Rig::new(label)?;
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let servers = [Server::start(a, "a")?, Server::start(b, "b")?];
    echo_in(a, "a")?;
    echo_in(b, "b")?;
    attach(&rig)?;
    let (repairs, flood) = (Repairs::begin(&rig, &[])?, Flood::start(&rig)?);
    let kept = Settings { rate: 300.0, connections: 8, renew: Duration::from_millis(300), ..load() };
    let udp_port = (udp_rate > 0.0).then_some(ECHO);
    let load = Load::start(&rig.lab.client, Settings { udp_port, udp_rate, ..kept });
    load.order("mark begun")?;
    Ok((rig, servers, Users { load, flood, repairs }))
}

fn owned(rig: &Rig) -> anyhow::Result<()> {
    rig.attach_owned(Duration::from_secs(125))
}

/// Who used the service saw none of it, no packet was lost, and nothing is left.
fn nobody_saw(rig: Rig, users: Users) {
    let run = users.load.stop().unwrap();
    assert_eq!(run.failures, []);
    let requests = run.stats(run.whole()).requests;
    let (sent, arrived) = users.flood.stop().unwrap();
    eprintln!("0 of {requests} requests failed, {arrived} of {sent} datagrams arrived");
    assert!(requests > 200 && sent > 1000, "{requests} {sent}");
    assert_eq!(arrived, sent, "datagrams");
    users.repairs.nothing_was_lost().unwrap();
    rig.finish_owned().unwrap();
}

/// A namespace as the product knows it when the library has attached it.
fn path(ns: &Ns) -> String {
    ns.path().to_string_lossy().into_owned()
}

#[test]
fn clients_see_nothing_of_switches_that_are_killed() {
    const SWITCHES: u32 = 3 * MOMENTS;
    let (rig, _servers, users) = loaded("killswitch", 50.0, owned).unwrap();
    let sides = [(path(&rig.lab.a), "a"), (path(&rig.lab.b), "b")];
    // What it takes when the program has been read from the disk.
    rig.ok(&["status", NAME]).unwrap();
    let begin = Instant::now();
    rig.ok(&["switch", NAME]).unwrap();
    let whole = begin.elapsed();
    let mut killed = 0;
    for (moment, (to, serving)) in (0..SWITCHES).zip(sides.iter().cycle()) {
        let switch = ["switch", NAME, "--to", to];
        killed += u32::from(kill_after(&rig, &switch, whole * moment / SWITCHES).unwrap());
        // Again: whatever the first one did, the service is where it is wanted.
        rig.ok(&switch).unwrap();
        for end in ends() {
            assert_eq!(who(&rig.lab.client, end).unwrap(), *serving, "killed at {moment}/{SWITCHES}");
        }
    }
    assert!(killed >= SWITCHES / 4, "{killed} of {SWITCHES} were killed");
    nobody_saw(rig, users);
}

#[test]
fn clients_see_nothing_of_drains_that_are_killed() {
    const DRAINS: u32 = 8;
    // Datagrams that are answered would keep the old side from ending for as long as a flow of them is remembered.
    let (rig, _servers, users) = loaded("killdrain", 0.0, owned).unwrap();
    let drain = ["drain", NAME, "--deadline", "10"];
    rig.ok(&["switch", NAME]).unwrap();
    let begin = Instant::now();
    rig.ok(&drain).unwrap();
    let whole = begin.elapsed();
    let mut killed = 0;
    for moment in 0..DRAINS {
        rig.ok(&["switch", NAME]).unwrap();
        killed += u32::from(kill_after(&rig, &drain, whole * moment / DRAINS).unwrap());
        let report = rig.ok(&drain).unwrap();
        assert_eq!(report["drain"]["settled"], true, "killed at {moment}/{DRAINS}: {report}");
        let status = rig.ok(&["status", NAME]).unwrap()["attachments"][0].clone();
        assert_eq!((&status["phase"], &status["notice"]), (&"steady".into(), &false.into()), "{status}");
    }
    assert!(killed >= DRAINS / 4, "{killed} of {DRAINS} were killed");
    nobody_saw(rig, users);
}

#[test]
fn clients_see_nothing_of_reloads_that_are_killed() {
    const RELOADS: u32 = 10;
    let (rig, _servers, users) = loaded("killreload", 50.0, owned).unwrap();
    let reload = ["reload", NAME, "--force"];
    let pins = std::path::Path::new("/sys/fs/bpf/patchswitch/v1").join(NAME);
    // The first one reads the program from the disk: what the second takes is the measure.
    rig.ok(&reload).unwrap();
    let begin = Instant::now();
    rig.ok(&reload).unwrap();
    let whole = begin.elapsed();
    let mut killed = 0;
    for moment in 0..RELOADS {
        // The end of it is what matters: where the programs are exchanged one after the other.
        let delay = whole / 3 + whole * 2 * moment / (RELOADS * 3);
        killed += u32::from(kill_after(&rig, &reload, delay).unwrap());
        // Here and there it is not repeated before the next switch, which has to work with what is there.
        if moment % 2 == 0 {
            // Without being forced it makes the pins those of what is attached, whatever version that is.
            rig.ok(&reload[..2]).unwrap();
            let before = pinned();
            assert_eq!(attached(&rig), before, "killed at {moment}/{RELOADS}");
            rig.ok(&reload).unwrap();
            assert!(pinned().iter().all(|id| !before.contains(id)), "killed at {moment}/{RELOADS}");
            assert!(pins.join("twin").exists() && !pins.join("next").exists() && !pins.join("past").exists());
        }
        rig.ok(&["switch", NAME]).unwrap();
        let serving = if moment % 2 == 0 { "b" } else { "a" };
        for end in ends() {
            assert_eq!(who(&rig.lab.client, end).unwrap(), serving, "killed at {moment}/{RELOADS}");
        }
    }
    assert!(killed >= RELOADS / 4, "{killed} of {RELOADS} were killed");
    nobody_saw(rig, users);
}

/// What is attached beside a service, or once more, is nothing to its clients, wherever that ends. The first attachment
/// of a partition is another matter: nobody can have reached it before.
#[test]
fn clients_see_nothing_of_an_attach_beside_them_that_is_killed() {
    let attach = |rig: &Rig| rig.attach().map(drop);
    let (rig, _servers, users) = loaded("killbeside", 0.0, attach).unwrap();
    let beside = [group::beside(&rig.lab.b, &rig.lab.a), rig.attach_arguments()];
    let [second, again] = [0, 1].map(|number| group::words(&beside[number]));
    rig.ok(&second).unwrap();
    let begin = Instant::now();
    rig.ok(&["detach", group::OTHER, "--force"]).unwrap();
    let off = begin.elapsed();
    let begin = Instant::now();
    rig.ok(&second).unwrap();
    let whole = begin.elapsed();
    let mut killed = 0;
    for moment in 0..MOMENTS {
        let detach = ["detach", group::OTHER, "--force"];
        killed += u32::from(kill_after(&rig, &detach, off * moment / MOMENTS).unwrap());
        rig.ok(&detach).unwrap();
        killed += u32::from(kill_after(&rig, &second, whole * moment / MOMENTS).unwrap());
        // Whatever is there of it: the service that was there before is not to be attached again.
        killed += u32::from(kill_after(&rig, &again, whole * moment / MOMENTS).unwrap());
        for end in ends() {
            assert_eq!(who(&rig.lab.client, end).unwrap(), "a", "killed at {moment}/{MOMENTS}");
        }
    }
    assert!(killed >= MOMENTS / 2, "{killed} of {} were killed", 3 * MOMENTS);
    rig.ok(&["detach", group::OTHER, "--force"]).unwrap();
    nobody_saw(rig, users);
}
