//! Connections that begin while the word is stored: of a million, each comes to one side, and none is held by both.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use patchswitch::attachment::Attachment;
use patchswitch_common::Slot;
use patchswitch_tests::frame::tcp;
use patchswitch_tests::netlab::{CLIENT, CLIENT_LINK, Ns, UPLINK};
use patchswitch_tests::observe::Counters;
use pnet::datalink::{Channel, Config, DataLinkSender};
use socket2::{Domain, Socket, Type};

use crate::rig::{PORT, Rig, service};

/// Times connections of both families begin, each time new ones.
const ROUNDS: u16 = 25;
/// Of each family in a round; 2 · 25 of them are a million.
const CONNECTIONS: u32 = 20_000;
/// Of one client address.
const PORTS: u32 = 10_000;
const FIRST_PORT: u32 = 2_000;
pub(crate) const SYN: u8 = 2;
/// The state of a connection that waits for the client's ACK, as `/proc/net/tcp` has it.
const SYN_RECV: &str = "03";

/// Nobody has these addresses; their answers get lost in the client's namespace.
pub(crate) fn source(is_v4: bool, round: u16, number: u32) -> (IpAddr, u16) {
    let host = 1 + (number / PORTS) as u16;
    let address = if is_v4 {
        Ipv4Addr::new(10, 78, round.to_be_bytes()[1], host.to_be_bytes()[1]).into()
    } else {
        Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, round, host).into()
    };
    (address, (FIRST_PORT + number % PORTS) as u16)
}

/// A listener that has room for all that begin in a round, and takes none of them.
fn listener(ns: &Ns, family: IpAddr) -> Result<TcpListener> {
    ns.enter(|| {
        let (domain, any) = match family {
            IpAddr::V4(_) => (Domain::IPV4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT))),
            IpAddr::V6(_) => (Domain::IPV6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT))),
        };
        let socket = Socket::new(domain, Type::STREAM, None)?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(true)?;
        }
        socket.bind(&any.into())?;
        socket.listen(4 * CONNECTIONS as i32)?;
        Ok(socket.into())
    })
}

/// A client's end as the kernel writes it in its tables: the address as numbers of the processor.
fn written((address, port): (IpAddr, u16)) -> String {
    let word = |bytes: &[u8]| format!("{:08X}", bytes.iter().rev().fold(0, |n, b| n << 8 | u32::from(*b)));
    let words: String = match address {
        IpAddr::V4(v4) => word(&v4.octets()),
        IpAddr::V6(v6) => v6.octets().chunks(4).map(word).collect(),
    };
    format!("{words}:{port:04X}")
}

/// The clients of a round whose connections wait in a namespace, both families. Those of earlier rounds may be there as
/// well: what waits for a listener that is gone is given up only when its timer runs out.
fn waiting(ns: &Ns, round: u16) -> Result<HashSet<String>> {
    let clients = (0..CONNECTIONS).flat_map(|number| [true, false].map(|v4| source(v4, round, number)));
    let of_round: HashSet<String> = clients.map(written).collect();
    let mut found = HashSet::new();
    for table in ["tcp", "tcp6"] {
        let text = ns.enter(|| Ok(std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))?))?;
        let lines = text.lines().skip(1).map(|line| line.split_whitespace().skip(2));
        found.extend(lines.filter_map(|mut fields| {
            let remote = fields.next()?;
            (fields.next()? == SYN_RECV && of_round.contains(remote)).then(|| remote.to_owned())
        }));
    }
    Ok(found)
}

/// Answers that were lost on the links of the two sides. It is the only loss that a side hears of.
fn lost(rig: &Rig) -> Result<u64> {
    let of = |ns: &Ns| {
        let shown: serde_json::Value = serde_json::from_str(&ns.ip("-j -s link show eth0")?)?;
        shown[0]["stats64"]["tx"]["dropped"].as_u64().context("no count of what was dropped")
    };
    Ok(of(&rig.lab.a)? + of(&rig.lab.b)?)
}

/// Sends the SYN of each connection of a round.
fn begin(sender: &mut Box<dyn DataLinkSender>, mac: [u8; 6], round: u16) -> Result<()> {
    for number in 0..CONNECTIONS {
        for address in service() {
            let frame = tcp(source(address.is_ipv4(), round, number), (address, PORT), SYN, &[]).frame(mac);
            sender.send_to(&frame, None).context("no room to send")??;
        }
    }
    Ok(())
}

/// Switches there and back until it is told to stop; how often.
fn switch_until(rig: &Rig, stop: &AtomicBool) -> Result<u32> {
    let mut switches = 0;
    while !stop.load(Ordering::Relaxed) {
        rig.with(async |attachment: &mut Attachment| {
            let to: Slot = attachment.plane().word().active().other();
            Ok(attachment.switch(to).await?)
        })?;
        switches += 1;
    }
    Ok(switches)
}

/// Begins the connections of a round, and all of them once more, as clients do that had no answer.
fn round(rig: &Rig, sender: &mut Box<dyn DataLinkSender>, mac: [u8; 6], round: u16) -> Result<u32> {
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    let _listeners: Vec<TcpListener> = [a, b]
        .into_iter()
        .flat_map(|ns| service().map(|family| listener(ns, family)))
        .collect::<Result<_>>()?;
    let (before, lost_before) = (segments(rig)?, lost(rig)?);
    let stop = AtomicBool::new(false);
    let switches = std::thread::scope(|scope| {
        let switching = scope.spawn(|| switch_until(rig, &stop));
        let sent = begin(sender, mac, round).and_then(|()| begin(sender, mac, round));
        stop.store(true, Ordering::Relaxed);
        let switches = switching.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        sent.and(switches)
    })?;
    // The last ones may be on their way yet.
    let end = Instant::now() + Duration::from_secs(10);
    while segments(rig)? - before < 4 * i64::from(CONNECTIONS) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    let came = segments(rig)? - before;
    ensure!(came == 4 * i64::from(CONNECTIONS), "{came} SYNs of {} came to one side", 4 * CONNECTIONS);
    let (of_a, of_b) = (waiting(a, round)?, waiting(b, round)?);
    let both = of_a.intersection(&of_b).count();
    ensure!(both == 0, "{both} connections are answered by both sides, {switches} switches");
    // A kernel that has no room for an answer that it sends again forgets the connection, and for no other reason.
    let (answered, lost) = (of_a.len() + of_b.len(), lost(rig)? - lost_before);
    let missing = (2 * CONNECTIONS as usize).saturating_sub(answered);
    println!("round {round}: {missing} are missing, {lost} answers lost, {switches} switches");
    ensure!(missing as u64 <= lost, "{missing} connections are not there, and {lost} answers were lost");
    ensure!(answered > CONNECTIONS as usize, "{answered} of {} connections are there", 2 * CONNECTIONS);
    ensure!(of_a.len() > 100 && of_b.len() > 100, "one side has all of them: {switches} switches");
    Ok(switches)
}

/// Segments that came to the two sides.
fn segments(rig: &Rig) -> Result<i64> {
    let of = |ns: &Ns| Counters::of(ns)?.get("Tcp.InSegs");
    Ok(of(&rig.lab.a)? + of(&rig.lab.b)?)
}

/// Who sends frames on the client's link, and the uplink's address. As long as it is there the link hears everything.
pub(crate) fn sender(rig: &Rig) -> Result<(Box<dyn DataLinkSender>, [u8; 6])> {
    let mac = link_address(&rig.lab.host, UPLINK)?;
    let sender = rig.lab.client.enter(|| {
        let all = pnet::datalink::interfaces();
        let link = all.iter().find(|link| link.name == CLIENT_LINK).context("no link")?;
        match pnet::datalink::channel(link, Config::default())? {
            Channel::Ethernet(sender, _) => Ok(sender),
            _ => bail!("no Ethernet"),
        }
    })?;
    Ok((sender, mac))
}

fn link_address(ns: &Ns, link: &str) -> Result<[u8; 6]> {
    let shown = ns.ip(&format!("-br link show {link}"))?;
    let word = shown.split_whitespace().find(|word| word.matches(':').count() == 5).context("no address")?;
    let bytes: Vec<u8> =
        word.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("no address of six bytes")
}

/// Room for so many connections that have only begun, and no cookies instead of them.
fn furnish(rig: &Rig) -> Result<()> {
    let room = (8 * CONNECTIONS).to_string();
    for ns in [&rig.lab.a, &rig.lab.b] {
        ns.sysctl("net/core/somaxconn", &room)?;
        ns.sysctl("net/ipv4/tcp_max_syn_backlog", &room)?;
        ns.sysctl("net/ipv4/tcp_syncookies", "0")?;
        // An answer is sent again for longer than a round takes.
        ns.sysctl("net/ipv4/tcp_synack_retries", "20")?;
    }
    routes(rig)
}

/// To the sources of the SYNs: their answers go where they came from.
pub(crate) fn routes(rig: &Rig) -> Result<()> {
    let [v4, v6] = CLIENT;
    rig.lab.host.ip(&format!("route add 10.78.0.0/16 via {v4}"))?;
    rig.lab.host.ip(&format!("-6 route add fd78::/64 via {v6}")).map(drop)
}

#[test]
fn of_a_million_that_begin_while_it_switches_none_is_held_by_both_sides() {
    let mut rig = Rig::new("syns").unwrap();
    furnish(&rig).unwrap();
    rig.furnished().unwrap();
    rig.attach_owned(Duration::from_secs(125)).unwrap();
    let (mut sender, mac) = sender(&rig).unwrap();
    let switches: u32 = (0..ROUNDS).map(|number| round(&rig, &mut sender, mac, number).unwrap()).sum();
    assert!(switches >= 20, "{switches}");
    drop(sender);
    rig.finish_owned().unwrap();
}
