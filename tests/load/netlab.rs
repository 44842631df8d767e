//! The laboratory is what it says and leaves nothing.

use std::net::UdpSocket;
use std::time::Duration;

use patchswitch_tests::netlab::{CLIENT, HOST, Ns, SwitchLab};
use patchswitch_tests::programs;

/// Sends one datagram from one namespace to an address in another and returns what arrived there.
fn send(from: &Ns, to: &Ns, address: &str) -> anyhow::Result<String> {
    let server = to.enter(|| Ok(UdpSocket::bind((address, 0))?))?;
    let port = server.local_addr()?.port();
    server.set_read_timeout(Some(Duration::from_secs(2)))?;
    from.enter(|| {
        let any = if address.contains(':') { "::" } else { "0.0.0.0" };
        Ok(UdpSocket::bind((any, 0))?.send_to(b"hello", (address, port))?)
    })?;
    let mut bytes = [0; 16];
    let (length, _) = server.recv_from(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
}

#[test]
fn client_and_host_reach_each_other_in_both_families_and_nothing_is_left() {
    let names: Vec<String> = {
        let lab = SwitchLab::new("reach").unwrap();
        for (from, to, addresses) in [(&lab.client, &lab.host, HOST), (&lab.host, &lab.client, CLIENT)] {
            for address in addresses {
                assert_eq!(send(from, to, address).unwrap(), "hello", "{address}");
            }
        }
        assert!(send(&lab.a, &lab.host, HOST[0]).is_err(), "a service namespace has no way out yet");
        [&lab.client, &lab.host, &lab.a, &lab.b].map(|ns| ns.name().to_owned()).into()
    };
    let left = programs::run(&["ip", "netns", "list"]).unwrap();
    for name in names {
        assert!(!left.contains(&name), "{name} in {left}");
    }
}

#[test]
fn system_controls_and_counters_are_those_of_the_namespace() {
    let lab = SwitchLab::new("proc").unwrap();
    lab.a.sysctl("net/ipv4/ip_forward", "1").unwrap();
    assert_eq!(lab.a.proc("sys/net/ipv4/ip_forward").unwrap().trim(), "1");
    assert_eq!(lab.b.proc("sys/net/ipv4/ip_forward").unwrap().trim(), "0");
    assert!(lab.client.proc("net/dev").unwrap().contains("eth0"));
    assert!(!lab.a.proc("net/dev").unwrap().contains("eth0"));
    assert!(lab.a.sysctl("net/ipv4/no_such_control", "1").is_err());
}

#[test]
fn programs_run_inside_and_end_with_their_handle() {
    let lab = SwitchLab::new("spawn").unwrap();
    let pids = || programs::run(&["ip", "netns", "pids", lab.a.name()]).unwrap();
    let sleep = lab.a.spawn(&["sleep", "60"], None).unwrap();
    let pid = sleep.pid().to_string();
    assert!(pids().lines().any(|line| line == pid));
    drop(sleep);
    assert_eq!(pids(), "");
    let ended = lab.a.spawn(&["true"], None).unwrap().wait(Duration::from_secs(5)).unwrap();
    assert!(ended.success());
    assert!(lab.a.run(&["false"]).is_err());
}

#[test]
fn what_still_runs_inside_is_ended_with_the_laboratory() {
    let lab = SwitchLab::new("left").unwrap();
    let mut sleep = lab.b.spawn(&["sleep", "60"], None).unwrap();
    drop(lab);
    // Its end is seen here by waiting, so nobody else can have got its number.
    assert!(sleep.has_ended() || sleep.wait(Duration::from_secs(2)).is_ok());
}
