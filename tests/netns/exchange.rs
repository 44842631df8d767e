//! What only one side can have goes over while new flows wait: the network device, or the address at an uplink.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use patchswitch_tests::netlab::{CLIENT, CLIENT_LINK, Ns, OWN_A, SERVICE, UPLINK};
use patchswitch_tests::programs;
use rustix::process::Signal;
use serde_json::Value;

use crate::ask::{Asking, who};
use crate::claims::Wire;
use crate::rig::{NAME, Rig, Server, ends};
use crate::uplinks::{SECOND, heard};

const EXCHANGE: [&str; 4] = ["switch", NAME, "--exchange", "device"];

/// A laboratory in which the first side serves.
fn served(label: &str) -> anyhow::Result<(Rig, [Server; 2])> {
    let rig = Rig::new(label)?;
    let servers = [Server::start(&rig.lab.a, "a")?, Server::start(&rig.lab.b, "b")?];
    rig.attach()?;
    Ok((rig, servers))
}

/// The host's links to which the devices in the two namespaces belong, by what the kernel says of their other ends.
fn links(rig: &Rig) -> anyhow::Result<[u64; 2]> {
    let of = |ns: &Ns| -> anyhow::Result<u64> {
        let links: Value = serde_json::from_str(&ns.ip("-j link show type veth")?)?;
        anyhow::ensure!(links.as_array().map(Vec::len) == Some(1), "{links}");
        links[0]["link_index"].as_u64().context("no other end")
    };
    Ok([of(&rig.lab.a)?, of(&rig.lab.b)?])
}

/// Asks on new connections until it is told to end; who answered, and how long the longest took.
fn ask_on(rig: &Rig, ending: &AtomicBool) -> anyhow::Result<(Vec<String>, Duration)> {
    let (mut answers, mut longest) = (Vec::new(), Duration::ZERO);
    while !ending.load(Ordering::Relaxed) {
        for end in ends() {
            let begun = Instant::now();
            answers.push(who(&rig.lab.client, end).with_context(|| format!("after {}", answers.len()))?);
            longest = longest.max(begun.elapsed());
        }
    }
    Ok((answers, longest))
}

/// Kills a command as soon as something is so, and waits for the end of the hold that nobody ends any more.
#[track_caller]
fn killed_when(rig: &Rig, argv: &[&str], is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    let mut running = rig.lab.host.spawn(argv, None).unwrap();
    while !is_so() {
        assert!(Instant::now() < end && !running.has_ended(), "{}", running.output());
    }
    running.signal(Signal::KILL).unwrap();
    running.wait(Duration::from_secs(10)).unwrap();
    let waits = || {
        let status = rig.ok(&["status", NAME]).unwrap();
        let partitions = status["attachments"][0]["partitions"].as_array().cloned().unwrap_or_default();
        partitions.iter().any(|partition| partition["held_ms"].as_u64() > Some(0))
    };
    while waits() {
        assert!(Instant::now() < end, "the hold has no end");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn new_flows_wait_for_the_device_and_nobody_fails() {
    let (rig, _servers) = served("device").unwrap();
    let at_first = links(&rig).unwrap();
    let ending = AtomicBool::new(false);
    let (asked, done) = std::thread::scope(|scope| {
        let asking = [(); 3].map(|()| scope.spawn(|| ask_on(&rig, &ending)));
        let mut done = Vec::new();
        for round in 0..6 {
            std::thread::sleep(Duration::from_millis(150));
            let held = rig.ok(&[&EXCHANGE[..], &["--hold", "10s"]].concat());
            done.push(
                held.and_then(|held| Ok((held, links(&rig)?))).with_context(|| format!("round {round}")),
            );
        }
        std::thread::sleep(Duration::from_millis(150));
        ending.store(true, Ordering::Relaxed);
        (asking.map(|asking| asking.join().unwrap()), done)
    });
    for (round, done) in done.into_iter().enumerate() {
        let (held, now) = done.unwrap();
        let back = round % 2 == 1;
        let serving = if back { rig.lab.a.name() } else { rig.lab.b.name() };
        assert_eq!((&held["serving"], &held["changed"]), (&serving.into(), &true.into()), "{held}");
        assert_eq!(held["waited"]["lost"], 0, "{held}");
        let [a, b] = at_first;
        assert_eq!(now, if back { [a, b] } else { [b, a] }, "the pairs have changed places");
    }
    for asked in asked {
        let (answers, longest) = asked.unwrap();
        assert!(answers.iter().any(|who| who == "a") && answers.iter().any(|who| who == "b"));
        // Nobody had to send a SYN again.
        assert!(longest < Duration::from_millis(900), "{longest:?}");
    }
    rig.finish().unwrap();
}

#[test]
fn flows_of_the_old_side_end_first() {
    let (rig, _servers) = served("devicewait").unwrap();
    let at_first = links(&rig).unwrap();
    let [v4, v6] = ends();
    let mut kept = [v4, v6].map(|end| Asking::from(&rig.lab.client, end).unwrap());
    // They do not: then nothing is switched, and they go on.
    let ended = rig.run(&[&EXCHANGE[..], &["--hold", "1s"]].concat()).unwrap();
    assert!(
        ended.code == Some(22) && ended.stdout.contains("2 flows of the old side have not ended"),
        "{ended:?}"
    );
    assert_eq!(links(&rig).unwrap(), at_first);
    for asking in &mut kept {
        assert_eq!(asking.who().unwrap(), "a");
    }
    assert_eq!(who(&rig.lab.client, v4).unwrap(), "a");
    // They do, after a while.
    let held = std::thread::scope(|scope| {
        let ending = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            kept.iter_mut().for_each(|asking| assert_eq!(asking.who().unwrap(), "a"));
            drop(kept);
        });
        let held = rig.ok(&[&EXCHANGE[..], &["--hold", "20s"]].concat());
        ending.join().unwrap();
        held.unwrap()
    });
    assert!(held["waited"]["held_ms"].as_f64().unwrap() >= 450.0, "{held}");
    assert_ne!(links(&rig).unwrap(), at_first);
    // They are reset, if somebody wants that.
    let mut kept = Asking::from(&rig.lab.client, v6).unwrap();
    assert_eq!(kept.who().unwrap(), "b");
    let ended = rig.run(&[&EXCHANGE[..], &["--hold", "1s", "--left", "reset"]].concat()).unwrap();
    assert!(ended.code == Some(24) && ended.stdout.contains("1 flows had not ended in time"), "{ended:?}");
    assert!(kept.who().is_err());
    assert_eq!(who(&rig.lab.client, v6).unwrap(), "a");
    rig.finish().unwrap();
}

#[test]
fn what_fails_after_it_puts_it_back() {
    let (rig, _servers) = served("deviceback").unwrap();
    let at_first = links(&rig).unwrap();
    let ended = rig.run(&[&EXCHANGE[..], &["--hold", "10s", "--run", "exit 3"]].concat()).unwrap();
    assert_eq!(ended.code, Some(22), "{ended:?}");
    assert_eq!(links(&rig).unwrap(), at_first);
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "a");
    }
    for bad in [
        &["--hold", "1s"][..],
        &["--exchange", "device"],
        &["--hold", "1s", "--left", "reset", "--run", "true"],
    ] {
        rig.refused(&[&["switch", NAME], bad].concat(), 2).unwrap();
    }
    rig.finish().unwrap();
}

#[test]
fn a_device_that_is_elsewhere_is_brought_back() {
    let (rig, _servers) = served("devicestray").unwrap();
    let program = programs::built("patchswitch").unwrap();
    let program = program.to_string_lossy();
    let argv = [&[program.as_ref()], &EXCHANGE[..], &["--hold", "2s", "--run", "exec sleep 3"]].concat();
    let at_first = links(&rig).unwrap();
    // With all the devices' addresses yet to come.
    killed_when(&rig, &argv, || links(&rig).is_ok_and(|now| now != at_first));
    let mended = rig.ok(&["switch", NAME, "--to", rig.lab.b.name()]).unwrap();
    assert!(!mended["mended"].as_array().unwrap().is_empty(), "{mended}");
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "b");
    }
    // And one that somebody moves, of whichever side, under another name.
    let now = links(&rig).unwrap();
    for (from, to) in [(&rig.lab.b, &rig.lab.a), (&rig.lab.a, &rig.lab.b)] {
        let links: Value = serde_json::from_str(&from.ip("-j link show type veth").unwrap()).unwrap();
        let name = links[0]["ifname"].as_str().unwrap();
        from.ip(&format!("link set {name} netns {} name stray0", to.name())).unwrap();
        let mended = rig.ok(&["switch", NAME, "--to", rig.lab.b.name()]).unwrap();
        assert_eq!(mended["mended"][0], "a network device is where it belongs again", "{mended}");
        assert_eq!(self::links(&rig).unwrap(), now);
        for end in ends() {
            assert_eq!(who(&rig.lab.client, end).unwrap(), "b");
        }
    }
    rig.switch_to(&rig.lab.a).unwrap();
    assert_eq!(who(&rig.lab.client, ends()[0]).unwrap(), "a");
    rig.finish().unwrap();
}

const READDRESS: [&str; 4] = ["switch", NAME, "--exchange", "address"];

/// Both uplinks on one network with the client, one for each side.
fn readdressed(label: &str) -> anyhow::Result<(Rig, [Server; 2])> {
    let mut rig = Rig::new(label)?;
    rig.lab.lab.veth((&rig.lab.client, "eth1"), (&rig.lab.host, SECOND))?;
    let [v4, v6] = CLIENT;
    rig.lab.client.ip_batch(&format!(
        "link add br0 type bridge forward_delay 0\nlink set {CLIENT_LINK} master br0\nlink set eth1 master br0\n\
         addr flush dev {CLIENT_LINK}\nlink set br0 up\naddr add {v4}/24 dev br0\naddr add {v6}/64 dev br0 nodad\n"
    ))?;
    // The kernel gives a link its own address when it has seen that the other end is up.
    let end = Instant::now() + Duration::from_secs(10);
    while !rig.lab.host.ip(&format!("-6 addr show dev {SECOND}"))?.contains("fe80::") {
        anyhow::ensure!(Instant::now() < end, "{SECOND} gets no address");
        std::thread::sleep(Duration::from_millis(20));
    }
    rig.furnished()?;
    let servers = [Server::start(&rig.lab.a, "a")?, Server::start(&rig.lab.b, "b")?];
    let [v4, v6] = SERVICE;
    let words = ["attach", NAME, "--address", v4, "--address", v6, "--uplink", UPLINK, "--uplink", SECOND];
    let words =
        [&words[..], &["--own-uplinks", "--announce", "1", rig.lab.a.name(), rig.lab.b.name()]].concat();
    rig.ok(&words)?;
    Ok((rig, servers))
}

/// The link-layer addresses of the two uplinks.
fn macs(rig: &Rig) -> anyhow::Result<[String; 2]> {
    let of = |link: &str| -> anyhow::Result<String> {
        let found: Value = serde_json::from_str(&rig.lab.host.ip(&format!("-j link show dev {link}"))?)?;
        Ok(found[0]["address"].as_str().context("no MAC")?.to_owned())
    };
    Ok([of(UPLINK)?, of(SECOND)?])
}

/// Where the client believes the service to be.
fn believed(rig: &Rig, address: &str) -> anyhow::Result<Option<String>> {
    let found: Value = serde_json::from_str(&rig.lab.client.ip(&format!("-j neigh show to {address}"))?)?;
    Ok(found[0]["lladdr"].as_str().map(str::to_owned))
}

/// At which uplinks the host answers for the service.
fn answering(rig: &Rig) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for family in ["-4", "-6"] {
        let all: Value = serde_json::from_str(&rig.lab.host.ip(&format!("{family} -j neigh show proxy"))?)?;
        let ours =
            all.as_array().into_iter().flatten().filter(|one| SERVICE.iter().any(|a| one["dst"] == *a));
        found.extend(ours.filter_map(|one| one["dev"].as_str().map(str::to_owned)));
    }
    Ok(found)
}

#[test]
fn the_address_goes_to_the_other_uplink_and_all_neighbours_know() {
    let (rig, _servers) = readdressed("address").unwrap();
    let macs = macs(&rig).unwrap();
    let ending = AtomicBool::new(false);
    let (asked, beliefs) = std::thread::scope(|scope| {
        let asking = [(); 2].map(|()| scope.spawn(|| ask_on(&rig, &ending)));
        let watching = scope.spawn(|| -> anyhow::Result<Vec<String>> {
            let mut seen: Vec<String> = Vec::new();
            while !ending.load(Ordering::Relaxed) {
                seen.extend(believed(&rig, SERVICE[0])?.filter(|mac| seen.last() != Some(mac)));
            }
            Ok(seen)
        });
        std::thread::sleep(Duration::from_millis(300));
        let mut told = Vec::new();
        for [from, to] in [[0, 1], [1, 0], [0, 1]] {
            let held = rig.ok(&[&READDRESS[..], &["--hold", "10s"]].concat());
            told.push(held.and_then(|held| {
                let now = SERVICE.map(|address| believed(&rig, address));
                for now in now {
                    anyhow::ensure!(now?.as_deref() == Some(macs[to].as_str()), "not known at once");
                }
                let [old, new] = [[&rig.lab.a, &rig.lab.b][from], [&rig.lab.a, &rig.lab.b][to]];
                let [old, new] = [old.ip("-br addr show")?, new.ip("-br addr show")?];
                anyhow::ensure!(SERVICE.iter().all(|a| new.contains(a) && !old.contains(a)), "{old} {new}");
                anyhow::ensure!(answering(&rig)? == [[UPLINK, SECOND][to]; 2], "{:?}", answering(&rig)?);
                anyhow::ensure!(held["waited"]["lost"] == 0, "{held}");
                Ok(())
            }));
            std::thread::sleep(Duration::from_millis(200));
        }
        ending.store(true, Ordering::Relaxed);
        let asked = asking.map(|asking| asking.join().unwrap());
        told.into_iter().for_each(|told| told.unwrap());
        (asked, watching.join().unwrap().unwrap())
    });
    for asked in asked {
        let (answers, longest) = asked.unwrap();
        assert!(answers.iter().any(|who| who == "a") && answers.iter().any(|who| who == "b"));
        assert!(longest < Duration::from_millis(900), "{longest:?}");
    }
    // One change each time, and nobody told anything else in between.
    let [first, second] = &macs;
    assert_eq!(beliefs.iter().collect::<Vec<_>>(), [first, second, first, second]);
    // A switch as usual takes the address along as well.
    rig.switch_to(&rig.lab.a).unwrap();
    assert_eq!(answering(&rig).unwrap(), [UPLINK; 2]);
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "a");
    }
    rig.finish().unwrap();
}

/// Five times at once and five a second later, where the address has come to and nowhere else; with flows that wait, five more
/// when they go on.
#[test]
fn where_the_address_has_gone_is_said_again() {
    let (rig, _servers) = readdressed("again").unwrap();
    let wire = |uplink| Wire::between((&rig.lab.client, "br0"), (&rig.lab.host, uplink)).unwrap();
    let (mut first, mut second) = (wire(UPLINK), wire(SECOND));
    rig.ok(&[&READDRESS[..], &["--hold", "10s"]].concat()).unwrap();
    assert_eq!((heard(&mut second, 15), heard(&mut first, 0)), ([15; 2], [0; 2]));
    rig.switch_to(&rig.lab.a).unwrap();
    assert_eq!((heard(&mut first, 10), heard(&mut second, 0)), ([10; 2], [0; 2]));
    rig.finish().unwrap();
}

const ONLY_PORT: u16 = 40_001;

/// The first side serves, and has all that belongs to it.
#[track_caller]
fn assert_first_serves(rig: &Rig) {
    assert_eq!(answering(rig).unwrap(), [UPLINK; 2]);
    let (a, b) = (rig.lab.a.ip("-br addr show").unwrap(), rig.lab.b.ip("-br addr show").unwrap());
    assert!(SERVICE.iter().all(|address| a.contains(address)), "{a} {b}");
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "a");
    }
}

#[test]
fn a_side_that_cannot_take_the_address_does_not_get_it() {
    let (rig, _servers) = readdressed("addressback").unwrap();
    // What fails after it.
    let ended = rig.run(&[&READDRESS[..], &["--hold", "10s", "--run", "exit 3"]].concat()).unwrap();
    assert_eq!(ended.code, Some(22), "{ended:?}");
    assert_first_serves(&rig);
    // No socket of its can have the address: the only port that there is has somebody else.
    let taken = rig.lab.b.enter(|| Ok(TcpListener::bind(("::", ONLY_PORT))?)).unwrap();
    rig.lab.b.sysctl("net/ipv4/ip_local_port_range", &format!("{ONLY_PORT} {ONLY_PORT}")).unwrap();
    let ended = rig.run(&[&READDRESS[..], &["--hold", "10s"]].concat()).unwrap();
    assert_eq!(ended.code, Some(22), "{ended:?}");
    assert!(ended.stdout.contains("cannot be used in the partition that was given it"), "{ended:?}");
    assert_first_serves(&rig);
    drop(taken);
    rig.lab.b.sysctl("net/ipv4/ip_local_port_range", "32768 60999").unwrap();
    // It has no IPv6: found before anybody waits.
    let links: Value = serde_json::from_str(&rig.lab.b.ip("-j link show type veth").unwrap()).unwrap();
    let name = links[0]["ifname"].as_str().unwrap();
    rig.lab.b.sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1").unwrap();
    rig.refused(&[&READDRESS[..], &["--hold", "10s"]].concat(), 1).unwrap();
    assert_first_serves(&rig);
    rig.finish().unwrap();
}

#[test]
fn whoever_gives_the_address_away_may_be_killed() {
    let (rig, _servers) = readdressed("addresskill").unwrap();
    let program = programs::built("patchswitch").unwrap();
    let program = program.to_string_lossy();
    let argv = [&[program.as_ref()], &READDRESS[..], &["--hold", "2s", "--run", "exec sleep 3"]].concat();
    for (to, serving) in [(&rig.lab.b, "b"), (&rig.lab.a, "a")] {
        let from = if serving == "b" { &rig.lab.a } else { &rig.lab.b };
        killed_when(&rig, &argv, || !from.ip("-br addr show").unwrap().contains(SERVICE[0]));
        rig.ok(&["switch", NAME, "--to", to.name()]).unwrap();
        for end in ends() {
            assert_eq!(who(&rig.lab.client, end).unwrap(), serving);
        }
        let uplink = if serving == "b" { SECOND } else { UPLINK };
        assert_eq!(answering(&rig).unwrap(), [uplink; 2]);
    }
    assert_first_serves(&rig);
    // As if it had been killed when it had put back all but the word: who serves has nothing any more.
    let links: Value = serde_json::from_str(&rig.lab.a.ip("-j link show type veth").unwrap()).unwrap();
    let name = links[0]["ifname"].as_str().unwrap();
    for (address, width) in SERVICE.iter().zip([32, 128]) {
        rig.lab.a.ip(&format!("addr del {address}/{width} dev {name}")).unwrap();
    }
    rig.ok(&["switch", NAME, "--to", rig.lab.a.name()]).unwrap();
    assert_first_serves(&rig);
    // The other side's uplink is gone: no hindrance for the one that is there.
    rig.lab.host.ip(&format!("link del {SECOND}")).unwrap();
    rig.run(&["switch", NAME, "--to", rig.lab.a.name()]).unwrap();
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "a");
    }
    rig.ok(&["detach", NAME, "--force"]).unwrap();
}

#[test]
fn an_address_needs_two_uplinks_to_go_from_one_to_the_other() {
    let (rig, _servers) = served("addressless").unwrap();
    let text = rig.refused(&[&READDRESS[..], &["--hold", "1s"]].concat(), 1).unwrap();
    assert!(text.contains("--own-uplinks"), "{text}");
    let (a, b) = (rig.lab.a.name(), rig.lab.b.name());
    let words = ["attach", "other", "--address", OWN_A[0], "--uplink", UPLINK, "--own-uplinks", a];
    rig.refused(&words, 2).unwrap();
    let text = rig.refused(&[&words[..], &[b]].concat(), 1).unwrap();
    assert!(text.contains("an uplink of its own"), "{text}");
    rig.finish().unwrap();
}
