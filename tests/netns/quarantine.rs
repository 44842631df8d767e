//! A standby reaches nothing and is reached by nothing but the agent's probes, and a partition sends under no address
//! but its own.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use patchswitch_common::Slot;
use patchswitch_tests::netlab::{CLIENT, HOST, Ns, OWN_A, OWN_B, SERVICE, UPLINK};
use patchswitch_tests::observe::Capture;

use crate::ask::{Asking, who};
use crate::rig::{Rig, Server, ends};

const IDLE: Duration = Duration::from_secs(5);

/// A socket that waits for a datagram, of one family.
fn waiting(ns: &Ns, address: &str) -> anyhow::Result<UdpSocket> {
    let socket = ns.enter(|| Ok(UdpSocket::bind((address, 4000))?))?;
    socket.set_read_timeout(Some(Duration::from_millis(250)))?;
    Ok(socket)
}

/// Sends a datagram from an address of a namespace.
fn send(ns: &Ns, from: &str, to: &str) -> anyhow::Result<()> {
    ns.enter(|| {
        let socket = UdpSocket::bind((from, 0))?;
        socket.send_to(b"hello", (to, 4000))?;
        Ok(())
    })
}

/// Who sent the datagram that waits, if there is one.
fn came(socket: &UdpSocket) -> Option<IpAddr> {
    socket.recv_from(&mut [0; 16]).ok().map(|(_, from)| from.ip())
}

#[test]
fn a_standby_reaches_nothing_until_it_serves() {
    let rig = Rig::new("mute").unwrap();
    rig.attach_owned(IDLE).unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let from =
        [SERVICE, OWN_B].concat().iter().map(|a| format!("src host {a}")).collect::<Vec<_>>().join(" or ");
    // Its own address is answered for by the host (ARP), as the active one's is.
    let capture = Capture::start_in(&rig.lab.host, UPLINK, &format!("(ip or ip6) and ({from})")).unwrap();
    for family in 0..2 {
        let targets = [
            ("the client", waiting(&rig.lab.client, CLIENT[family]).unwrap(), CLIENT[family]),
            ("the host", waiting(&rig.lab.host, HOST[family]).unwrap(), HOST[family]),
            ("the active one", waiting(a, OWN_A[family]).unwrap(), OWN_A[family]),
        ];
        for (who, socket, to) in &targets {
            for from in [SERVICE[family], OWN_B[family]] {
                send(b, from, to).unwrap();
                assert_eq!(came(socket), None, "{who} was reached from {from}");
            }
        }
        // Nor is it reached: not from outside, not from the host, not from the active one.
        let standby = waiting(b, OWN_B[family]).unwrap();
        for (ns, from) in
            [(&rig.lab.client, CLIENT[family]), (&rig.lab.host, HOST[family]), (a, OWN_A[family])]
        {
            send(ns, from, OWN_B[family]).unwrap();
            assert_eq!(came(&standby), None, "reached from {from}");
        }
    }
    let captured = capture.stop().unwrap();
    assert_eq!(captured.packets, [], "on the uplink");
    assert!(rig.counter(&["packets", "from_partition", "quarantined"]).unwrap() >= 12);
    // The same once it serves: what was silent above is not so for want of a way.
    rig.with(async |attachment| Ok(attachment.switch(Slot::B).await?)).unwrap();
    for family in 0..2 {
        let client = waiting(&rig.lab.client, CLIENT[family]).unwrap();
        for from in [SERVICE[family], OWN_B[family]] {
            send(b, from, CLIENT[family]).unwrap();
            assert_eq!(came(&client), Some(from.parse().unwrap()));
        }
        let own = waiting(b, OWN_B[family]).unwrap();
        send(&rig.lab.client, CLIENT[family], OWN_B[family]).unwrap();
        assert_eq!(came(&own), Some(CLIENT[family].parse().unwrap()));
    }
    rig.finish_owned().unwrap();
}

#[test]
fn a_partition_sends_under_no_other_address() {
    let rig = Rig::new("forge").unwrap();
    rig.attach_owned(IDLE).unwrap();
    let a = &rig.lab.a;
    a.ip_batch("addr add 10.66.6.6/32 dev eth0\naddr add fd66::6/128 dev eth0 nodad\n").unwrap();
    for (family, forged) in ["10.66.6.6", "fd66::6"].into_iter().enumerate() {
        let client = waiting(&rig.lab.client, CLIENT[family]).unwrap();
        let before = rig.counter(&["packets", "from_partition", "spoofed"]).unwrap();
        send(a, forged, CLIENT[family]).unwrap();
        assert_eq!(came(&client), None, "{forged}");
        assert_eq!(rig.counter(&["packets", "from_partition", "spoofed"]).unwrap(), before + 1);
        for from in [SERVICE[family], OWN_A[family]] {
            send(a, from, CLIENT[family]).unwrap();
            assert_eq!(came(&client), Some(from.parse().unwrap()));
        }
    }
    rig.finish_owned().unwrap();
}

fn probes_reach_whom_they_are_for(label: &str, rp_filter: &str) {
    let mut rig = Rig::new(label).unwrap();
    // The greater of this one and the link's own counts.
    rig.lab.host.sysctl("net/ipv4/conf/all/rp_filter", rp_filter).unwrap();
    rig.furnished().unwrap();
    let a = Server::start(&rig.lab.a, "a").unwrap();
    let b = Server::start(&rig.lab.b, "b").unwrap();
    rig.attach().unwrap();
    let probers =
        rig.with(async |attachment| Ok([attachment.prober(Slot::A)?, attachment.prober(Slot::B)?])).unwrap();
    let probe = |slot: usize, end: SocketAddr| {
        let answer = || -> anyhow::Result<String> { Asking::by(probers[slot].socket(end)?, end)?.who() };
        rig.lab.host.enter(|| Ok(answer())).unwrap()
    };
    // Whoever serves: before the switch, while one retires, after it.
    for step in ["steady", "draining", "over"] {
        for end in ends() {
            assert_eq!(probe(0, end).unwrap(), "a", "{step} {end}");
            assert_eq!(probe(1, end).unwrap(), "b", "{step} {end}");
        }
        match step {
            "steady" => rig.switch_to(&rig.lab.b).unwrap(),
            "draining" => drop(rig.ok(&["drain", "web", "--deadline", "10"]).unwrap()),
            _ => {}
        }
    }
    // A dead one is dead, however well the other one is.
    drop(a);
    for end in ends() {
        let error = format!("{:#}", probe(0, end).unwrap_err());
        assert!(error.contains("refused"), "{error}");
        assert_eq!(probe(1, end).unwrap(), "b");
        assert_eq!(who(&rig.lab.client, end).unwrap(), "b");
    }
    drop(b);
    rig.finish().unwrap();
}

#[test]
fn a_probe_is_answered_by_whom_it_was_for() {
    probes_reach_whom_they_are_for("probe0", "0");
}

#[test]
fn a_probe_is_answered_in_spite_of_the_check_of_the_way_back() {
    probes_reach_whom_they_are_for("probe1", "1");
}
