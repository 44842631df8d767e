//! Somebody else on the uplink says that he has the service's address: he is named, and answered.

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use patchswitch_tests::frame::{ethernet, icmp};
use patchswitch_tests::netlab::{CLIENT_LINK, HOST, Ns, SERVICE, UPLINK};
use patchswitch_tests::programs::{self, Running};
use pnet::datalink::{self, Channel, Config, DataLinkReceiver, DataLinkSender};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::ask::{Asking, who};
use crate::rig::{NAME, Rig, Server, ends};

const EVERYBODY: [u8; 6] = [0xff; 6];

/// A host that is not there, by a number.
fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0x99, number]
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

pub(crate) fn v4(address: &str) -> [u8; 4] {
    address.parse::<std::net::Ipv4Addr>().unwrap().octets()
}

pub(crate) fn v6(address: &str) -> Ipv6Addr {
    address.parse().unwrap()
}

/// An ARP message: what is asked, who says it, with which address, about which one.
pub(crate) fn arp(operation: u8, mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let body = [&[0, 1, 8, 0, 6, 4, 0, operation][..], &mac, &sender, &[0; 6], &target].concat();
    from(mac, ethernet(EVERYBODY, 0x0806, &body))
}

/// A message of neighbour discovery about an address: its kind, its flags, whose it is.
pub(crate) fn discovery(
    kind: u8,
    flags: u8,
    mac: [u8; 6],
    source: Ipv6Addr,
    target: &str,
    to: &str,
) -> Vec<u8> {
    // The link address of the target, or of who asks: one without an address has none to tell.
    let option = match kind {
        136 => [&[2, 1][..], &mac].concat(),
        _ if source.is_unspecified() => Vec::new(),
        _ => [&[1, 1][..], &mac].concat(),
    };
    let payload = [&v6(target).octets()[..], &option].concat();
    let packet = icmp(source.into(), v6(to).into(), kind, [flags, 0, 0, 0], &payload);
    let to = v6(to).octets();
    let mut frame = from(mac, packet.frame([0x33, 0x33, to[12], to[13], to[14], to[15]]));
    // Nobody listens to discovery that may have crossed a router.
    frame[14 + 7] = 255;
    frame
}

fn from(mac: [u8; 6], mut frame: Vec<u8>) -> Vec<u8> {
    frame[6..12].copy_from_slice(&mac);
    frame
}

/// The client's link, frame by frame.
pub(crate) struct Wire {
    sender: Box<dyn DataLinkSender>,
    receiver: Box<dyn DataLinkReceiver>,
    pub(crate) uplink: [u8; 6],
}

impl Wire {
    fn of(rig: &Rig) -> anyhow::Result<Self> {
        Self::between((&rig.lab.client, CLIENT_LINK), (&rig.lab.host, UPLINK))
    }

    /// As a client's link hears it from an uplink of the host.
    pub(crate) fn between((client, link): (&Ns, &str), (host, uplink): (&Ns, &str)) -> anyhow::Result<Self> {
        let shown: Value = serde_json::from_str(&host.ip(&format!("-j link show dev {uplink}"))?)?;
        let uplink: pnet::util::MacAddr = shown[0]["address"].as_str().unwrap_or_default().parse()?;
        let channel = client.enter(|| {
            let links = datalink::interfaces();
            let link = links.iter().find(|one| one.name == link).context("no link")?;
            // What is for others is not to be heard: the link stays as it is.
            let read_timeout = Some(Duration::from_millis(20));
            let config = Config { read_timeout, promiscuous: false, ..Config::default() };
            Ok(datalink::channel(link, config)?)
        })?;
        let Channel::Ethernet(sender, receiver) = channel else { bail!("not an Ethernet link") };
        Ok(Self { sender, receiver, uplink: uplink.octets() })
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        self.sender.send_to(frame, None).unwrap().unwrap();
    }

    /// The next frame, if one comes.
    pub(crate) fn frame(&mut self) -> Option<&[u8]> {
        self.receiver.next().ok()
    }

    /// How often the host announces each service address in a time.
    pub(crate) fn announcements(&mut self, time: Duration) -> [usize; 2] {
        let end = Instant::now() + time;
        let mut count = [0; 2];
        while Instant::now() < end {
            let Ok(frame) = self.receiver.next() else { continue };
            count[0] += usize::from(is_gratuitous_arp(frame, self.uplink));
            count[1] += usize::from(is_advertisement(frame, self.uplink));
        }
        count
    }
}

/// A request to everybody. The kernel answers whoever asks for the address by a reply to him.
fn is_gratuitous_arp(frame: &[u8], from: [u8; 6]) -> bool {
    let service = v4(SERVICE[0]);
    frame.len() >= 42
        && frame[..14] == [&EVERYBODY[..], &from, &[8, 6]].concat()
        && frame[21] == 1
        && frame[22..32] == [&from[..], &service].concat()
        && frame[38..42] == service
}

/// One with the override flag: the kernel's own for an address that it proxies have none.
fn is_advertisement(frame: &[u8], from: [u8; 6]) -> bool {
    frame.len() >= 86
        && frame[6..14] == [&from[..], &[0x86, 0xdd]].concat()
        && frame[54] == 136
        && frame[58] & 0x20 != 0
        && frame[62..78] == v6(SERVICE[1]).octets()
}

/// `patchswitch watch` at work.
struct Watch(Running, NamedTempFile);

impl Watch {
    fn start(rig: &Rig, arguments: &[&str]) -> anyhow::Result<Self> {
        let program = programs::built("patchswitch")?;
        let path = program.to_string_lossy();
        let file = NamedTempFile::new()?;
        let argv = [&[path.as_ref(), "watch", NAME], arguments].concat();
        let running = rig.lab.host.spawn(&argv, Some(file.path()))?;
        // Until it listens: the kernel lists its sockets.
        let end = Instant::now() + Duration::from_secs(10);
        while rig.lab.host.proc("net/packet")?.lines().count() < 3 {
            anyhow::ensure!(Instant::now() < end, "it does not listen: {}", running.output());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self(running, file))
    }

    /// Waits for its end and returns what it has said.
    fn said(self, code: i32) -> String {
        let ended = self.0.wait(Duration::from_secs(20)).unwrap();
        let output = std::fs::read_to_string(self.1.path()).unwrap();
        assert_eq!(ended.code(), Some(code), "{output}");
        output
    }

    /// Waits for its end and returns what it has seen.
    fn seen(self, code: i32) -> Vec<Value> {
        let output = self.said(code);
        let lines = output.lines().filter(|line| line.starts_with("{\"")).map(serde_json::from_str);
        lines.collect::<Result<_, _>>().unwrap()
    }
}

#[test]
fn whoever_claims_the_address_is_named_and_answered() {
    let rig = Rig::new("claims").unwrap();
    let _server = Server::start(&rig.lab.a, "a").unwrap();
    rig.attach().unwrap();
    let mut wire = Wire::of(&rig).unwrap();
    let watch = Watch::start(&rig, &["--json", "--seconds", "4"]).unwrap();
    let (ours, theirs) = (v4(SERVICE[0]), v4("10.77.0.50"));
    let claims = [
        (arp(1, mac(1), ours, ours), "arp", SERVICE[0]),
        (arp(2, mac(2), ours, theirs), "arp", SERVICE[0]),
        (arp(1, mac(3), [0; 4], ours), "arp-probe", SERVICE[0]),
        (discovery(136, 0x20, mac(4), v6("fe80::4"), SERVICE[1], "ff02::1"), "advertisement", SERVICE[1]),
        (
            discovery(135, 0, mac(5), Ipv6Addr::UNSPECIFIED, SERVICE[1], "ff02::1:ff00:10"),
            "dad-probe",
            SERVICE[1],
        ),
        (discovery(135, 0, mac(6), v6(SERVICE[1]), HOST[1], "ff02::1:ff00:1"), "solicitation", SERVICE[1]),
    ];
    for (frame, ..) in &claims {
        wire.send(frame);
        // The same is told once.
        wire.send(frame);
    }
    // Claims of nothing that is the service's.
    wire.send(&arp(1, mac(7), theirs, ours));
    wire.send(&arp(1, mac(8), v4(HOST[0]), v4(HOST[0])));
    wire.send(&discovery(136, 0x20, mac(9), v6("fe80::9"), HOST[1], "ff02::1"));
    // One answer for each address, whoever asks and however often.
    assert_eq!(wire.announcements(Duration::from_secs(2)), [1, 1]);
    let seen = watch.seen(0);
    let told = |seen: &Value| {
        assert_eq!((&seen["schema"], &seen["event"]), (&json!("patchswitch.watch/1"), &json!("claim")));
        seen["what"].clone()
    };
    let mut told: Vec<Value> = seen.iter().map(told).collect();
    told.sort_by_key(|what| what["mac"].to_string());
    let answered = told.iter().filter(|what| what["answered"] == true).count();
    assert_eq!(answered, 2, "{told:?}");
    let expected = claims.iter().zip(1..).map(|((_, kind, address), number)| {
        json!({"address": address, "kind": kind, "link": UPLINK, "mac": text(mac(number))})
    });
    for what in &mut told {
        what.as_object_mut().unwrap().remove("answered");
    }
    assert_eq!(told, expected.collect::<Vec<_>>());
    // Neighbours believe the last who spoke: the service is found.
    for end in ends() {
        assert_eq!(who(&rig.lab.client, end).unwrap(), "a");
    }
    rig.finish().unwrap();
}

#[test]
fn a_foreign_claim_is_told_and_answered_in_every_phase() {
    let rig = Rig::new("claim-phases").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach_owned(Duration::from_secs(125)).unwrap();
    let mut wire = Wire::of(&rig).unwrap();
    let theirs = v4("10.77.0.50");
    for (number, phase) in (1..).zip(["steady", "learning", "sharing", "draining"]) {
        match phase {
            "learning" => rig.with(async |attachment| Ok(attachment.learn()?)).unwrap(),
            "sharing" => drop(rig.ok(&["switch", NAME, "--share", "30"]).unwrap()),
            "draining" => drop(rig.ok(&["switch", NAME]).unwrap()),
            _ => {}
        }
        let state = rig.ok(&["status", NAME]).unwrap()["attachments"][0].clone();
        // To learn is no phase of the word's.
        assert_eq!(state["phase"], if phase == "learning" { "steady" } else { phase }, "{state}");
        let watch = Watch::start(&rig, &["--json", "--seconds", "3"]).unwrap();
        wire.send(&arp(2, mac(number), v4(SERVICE[0]), theirs));
        wire.send(&discovery(136, 0x20, mac(number), v6("fe80::4"), SERVICE[1], "ff02::1"));
        assert_eq!(wire.announcements(Duration::from_secs(2)), [1, 1], "{phase}");
        let mut told: Vec<Value> = watch.seen(0).iter().map(|seen| seen["what"].clone()).collect();
        told.sort_by_key(|what| what["kind"].to_string());
        let expected = [("advertisement", SERVICE[1]), ("arp", SERVICE[0])].map(|(kind, address)| {
            json!({"address": address, "kind": kind, "link": UPLINK, "mac": text(mac(number)), "answered": true})
        });
        assert_eq!(told, expected, "{phase}");
        for end in ends() {
            who(&rig.lab.client, end).unwrap();
        }
    }
    rig.finish_owned().unwrap();
}

#[test]
fn while_somebody_watches_the_address_is_announced_again_and_again() {
    let rig = Rig::new("refresh").unwrap();
    rig.attach().unwrap();
    let mut wire = Wire::of(&rig).unwrap();
    assert_eq!(wire.announcements(Duration::from_secs(1)), [0, 0], "nobody watches");
    let watch = Watch::start(&rig, &["--json", "--seconds", "4.2", "--every", "1"]).unwrap();
    let [arp, advertisements] = wire.announcements(Duration::from_secs(4));
    assert!((3..=4).contains(&arp) && arp == advertisements, "{arp} {advertisements}");
    assert_eq!(watch.seen(0), Vec::<Value>::new(), "our own are no claims");
    // A job and a drain do the same, each minute.
    let mut wire = Wire::of(&rig).unwrap();
    let announced = rig.with(async |attachment| {
        let watching = attachment.watch_neighbours(Duration::from_millis(700));
        let counting = std::thread::spawn(move || wire.announcements(Duration::from_millis(2500)));
        tokio::time::sleep(Duration::from_millis(2600)).await;
        drop(watching);
        Ok(counting.join().unwrap())
    });
    let [arp, advertisements] = announced.unwrap();
    assert!((2..=3).contains(&arp) && arp == advertisements, "{arp} {advertisements}");
    assert_eq!(Wire::of(&rig).unwrap().announcements(Duration::from_millis(1500)), [0, 0], "it goes on");
    rig.finish().unwrap();
}

#[test]
fn a_drain_tells_of_foreign_claims() {
    let rig = Rig::new("claim-drain").unwrap();
    let _servers = [Server::start(&rig.lab.a, "a").unwrap(), Server::start(&rig.lab.b, "b").unwrap()];
    rig.attach().unwrap();
    let mut asking = Asking::from(&rig.lab.client, ends()[0]).unwrap();
    assert_eq!(asking.who().unwrap(), "a");
    rig.switch_to(&rig.lab.b).unwrap();
    let mut wire = Wire::of(&rig).unwrap();
    let ended = std::thread::scope(|scope| {
        let drain = scope.spawn(|| rig.run(&["drain", NAME, "--deadline", "3"]).unwrap());
        let probe = arp(1, mac(1), [0; 4], v4(SERVICE[0]));
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end {
            wire.send(&probe);
            std::thread::sleep(Duration::from_millis(300));
        }
        drain.join().unwrap()
    });
    let said: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("is claimed by")).collect();
    assert_eq!(said.len(), 1, "{ended:?}");
    let expected = format!("{} is claimed by {} on {UPLINK}, by an ARP probe", SERVICE[0], text(mac(1)));
    assert!(said[0].contains("WARN") && said[0].contains(&expected), "{said:?}");
    drop(asking);
    rig.finish().unwrap();
}

/// The limit: IPv4 is defended by who watches, IPv6 by the kernel.
#[test]
fn without_somebody_who_watches_the_kernel_defends_ipv6_only() {
    let rig = Rig::new("nobody-watches").unwrap();
    rig.attach().unwrap();
    let mut wire = Wire::of(&rig).unwrap();
    wire.send(&arp(1, mac(1), [0; 4], v4(SERVICE[0])));
    wire.send(&discovery(135, 0, mac(2), Ipv6Addr::UNSPECIFIED, SERVICE[1], "ff02::1:ff00:10"));
    let end = Instant::now() + Duration::from_secs(2);
    let (mut v4_answers, mut v6_answers) = (0, 0);
    while Instant::now() < end {
        let Ok(frame) = wire.receiver.next() else { continue };
        if frame[6..12] == wire.uplink {
            v4_answers += usize::from(frame[12..14] == [8, 6]);
            v6_answers += usize::from(frame[54] == 136 && frame[62..78] == v6(SERVICE[1]).octets());
        }
    }
    assert_eq!((v4_answers, v6_answers), (0, 1));
    rig.finish().unwrap();
}

#[test]
fn what_the_programs_say_is_told_to_one_who_watches() {
    let rig = Rig::new("watch-programs").unwrap();
    rig.attach_owned(Duration::from_secs(125)).unwrap();
    rig.lab.a.ip("addr add 10.99.0.9/32 dev eth0").unwrap();
    let watch = Watch::start(&rig, &["--json", "--seconds", "3"]).unwrap();
    // The second one sees nothing of them, and comes to no harm.
    let second = Watch::start(&rig, &["--json", "--seconds", "3"]).unwrap();
    std::thread::sleep(Duration::from_millis(800));
    let sent = rig.lab.a.enter(|| {
        let socket = std::net::UdpSocket::bind(("10.99.0.9", 0))?;
        (0..100).try_for_each(|_| socket.send_to(b"x", ("10.77.0.2", 7300)).map(drop))?;
        Ok(())
    });
    sent.unwrap();
    let mut seen = [watch.seen(0), second.seen(0)];
    seen.sort_by_key(Vec::len);
    assert_eq!(seen[0].len(), 0, "{seen:?}");
    let what = &seen[1][0];
    assert_eq!((&what["event"], &what["what"]["level"]), (&json!("programs"), &json!("WARN")), "{what}");
    assert!(what["what"]["text"].as_str().unwrap().contains("from 10.99.0.9"), "{what}");
    assert!(rig.counter(&["packets", "from_partition", "spoofed"]).unwrap() >= 100);
    rig.lab.a.ip("addr del 10.99.0.9/32 dev eth0").unwrap();
    rig.finish_owned().unwrap();
}

#[test]
fn who_watches_what_is_detached_is_told_so() {
    let rig = Rig::new("watch-ends").unwrap();
    assert!(rig.refused(&["watch", NAME], 1).unwrap().contains("nothing is attached as web"));
    rig.attach().unwrap();
    let watch = Watch::start(&rig, &["--every", "1"]).unwrap();
    let mut wire = Wire::of(&rig).unwrap();
    // Who watches is in nobody's way.
    rig.ok(&["detach", NAME]).unwrap();
    let said = watch.said(1);
    assert!(said.contains("web is not attached any more"), "{said}");
    assert_eq!(wire.announcements(Duration::from_secs(2)), [0, 0], "it is somebody else's now");
    // It ends in order when it is interrupted.
    rig.attach().unwrap();
    let watch = Watch::start(&rig, &["--json"]).unwrap();
    watch.0.signal(rustix::process::Signal::INT).unwrap();
    assert_eq!(watch.seen(0), Vec::<Value>::new());
    rig.finish().unwrap();
}
