//! What a partition sends: who may, what is learned of it, what is rewritten, and where it goes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use patchswitch::dataplane::{probe_mark, to_wire};
use patchswitch_common::Slot;
use patchswitch_common::decide::{ACK, RST, SYN};
use patchswitch_common::maps::Address;
use patchswitch_common::parse::{Flow, Fragment, Kind, Network, Packet, Transport, inbound, outbound};
use patchswitch_common::refuse;
use patchswitch_common::verdict::{AGAIN_MARK, Event, Verdict};
use patchswitch_common::word::{Phase, Word};
use patchswitch_tests::sums::with_source;

use super::known::network;
use super::sent::{PROBES, STATELESS};
use super::{Expected, LEARNED, OF_A, OF_B};
use crate::bench::{self, DROP, Family, NEXT, PORT, REDIRECT};
use crate::frame::{self, ETHERNET, SENDER};

/// A flow without a connection, as its key has it: the client, both ports, the protocol.
type Key = (Address, u16, u16, u8);
/// A datagram in fragments: source, destination, identification, protocol.
type Datagram = (Address, Address, u32, u8);

/// What the partitions, the host and the tables are.
pub(super) struct Partitions {
    families: [Family; 2],
    /// Who answered a flow, and under which address.
    learned: BTreeMap<Key, (Slot, Address)>,
    /// Who sent a first fragment, and what its source became.
    fragments: BTreeMap<Datagram, (Slot, Option<Address>)>,
    /// Whether the table of the first addresses is filled.
    pub(super) short: bool,
}

/// What is found out of a packet on its way, and what it has become.
struct Way {
    word: Word,
    slot: Slot,
    network: Network,
    expected: Expected,
    compared: Vec<&'static str>,
    counted: Vec<&'static str>,
}

impl Way {
    fn retires(&self) -> bool {
        self.word.phase() == Phase::Draining && self.slot != self.word.active()
    }
}

fn key(flow: &Flow) -> Key {
    (flow.remote, flow.remote_port, flow.local_port, flow.protocol)
}

fn datagram(network: &Network, source: Address) -> Datagram {
    // Of IPv6 a datagram is known by its identification alone (RFC 8200 4.5).
    let number = if network.v6 { 0 } else { network.protocol };
    (source, network.destination, network.fragment_id, number)
}

impl Partitions {
    pub(super) fn new() -> Self {
        let families = bench::families();
        Self { families, learned: BTreeMap::new(), fragments: BTreeMap::new(), short: true }
    }

    /// Forgets all flows but these: the client's port or identifier, the service's, the protocol, who answered.
    pub(super) fn know(&mut self, flows: &[(Family, u16, u8, Slot)]) {
        self.learned.clear();
        for (family, port, protocol, slot) in flows {
            let key = (to_wire(family.client), LEARNED.to_be(), port.to_be(), *protocol);
            self.learned.insert(key, (*slot, to_wire(family.service)));
        }
    }

    fn family(&self, v6: bool) -> &Family {
        &self.families[usize::from(v6)]
    }

    fn own(&self, slot: Slot, v6: bool) -> Address {
        let family = self.family(v6);
        to_wire(if slot == Slot::A { family.own_a } else { family.own_b })
    }

    fn is_service(&self, address: &Address) -> bool {
        self.families.iter().any(|family| to_wire(family.service) == *address)
    }

    /// What is to be seen of a frame that a partition sends; of nobody's link there is no slot.
    pub(super) fn expect(&mut self, word: Word, slot: Option<Slot>, mark: u32, frame: &[u8]) -> Expected {
        let Some(slot) = slot else { return Expected::plain(Verdict::NotOurs, NEXT, mark, frame) };
        if mark == AGAIN_MARK {
            return Expected::plain(Verdict::Again, NEXT, 0, frame);
        }
        if let Some((verdict, action)) = self.of_link(slot, frame) {
            return Expected::plain(verdict, action, mark, frame);
        }
        let v6 = frame[12..ETHERNET] == [0x86, 0xdd];
        let Some(network) = network(frame, v6) else {
            return Expected::plain(Verdict::Malformed, DROP, mark, frame);
        };
        if word.phase() == Phase::Steady && slot != word.active() {
            return if self.answers_probe(slot, &network, frame) {
                Expected::plain(Verdict::Probe, NEXT, probe_mark(slot), frame)
            } else {
                let early = self.is_service(&network.source).then(|| Event::TooEarly.name());
                Expected::plain(Verdict::Quarantined, DROP, mark, frame)
                    .with(Vec::new(), early.into_iter().collect())
            };
        }
        let expected = Expected::plain(Verdict::Out, REDIRECT, mark, frame);
        let way = Way { word, slot, network, expected, compared: Vec::new(), counted: Vec::new() };
        match self.refused(&way, frame) {
            Some(Verdict::OutByStack) => Expected::plain(Verdict::OutByStack, NEXT, mark, frame),
            Some(verdict) => Expected::plain(verdict, DROP, mark, frame),
            None => self.passes(way, frame),
        }
    }

    /// What ends a frame by its link header.
    fn of_link(&self, slot: Slot, frame: &[u8]) -> Option<(Verdict, i32)> {
        if frame[6..12] != SENDER {
            return Some((Verdict::SpoofedMac, DROP));
        }
        match u16::from_be_bytes([frame[12], frame[13]]) {
            0x0800 | 0x86dd => None,
            0x0806 => Some(self.of_arp(slot, frame)),
            0x8100 | 0x88a8 => Some((Verdict::ForgedControl, DROP)),
            _ if frame[..3] == [1, 0x80, 0xc2] => Some((Verdict::ForgedControl, DROP)),
            _ => Some((Verdict::NotOurs, NEXT)),
        }
    }

    /// A question in its own name, or in nobody's, passes; the kernel itself drops what is too short for one.
    fn of_arp(&self, slot: Slot, frame: &[u8]) -> (Verdict, i32) {
        let (Some(sender), Some(target)) = (frame.get(28..32), frame.get(38..42)) else {
            return (Verdict::Malformed, NEXT);
        };
        let [family, _] = self.families;
        let own = if slot == Slot::A { family.own_a } else { family.own_b };
        let held = [family.service, own, IpAddr::from([0; 4])];
        let is_held = held.iter().any(|held| matches!(held, IpAddr::V4(held) if held.octets() == sender));
        if is_held && sender != target { (Verdict::NotOurs, NEXT) } else { (Verdict::ForgedControl, DROP) }
    }

    /// Why a packet of IP may not leave, or that it is one of the link.
    fn refused(&self, way: &Way, frame: &[u8]) -> Option<Verdict> {
        let Way { slot, network, .. } = way;
        let v6 = network.v6;
        if let Some(verdict) = refuse::outbound(frame, network, |address| self.is_service(address)) {
            return Some(verdict);
        }
        let source = network.source;
        let of_link = v6 && (source == [0; 16] || source[0] == 0xfe && source[1] >> 6 == 2);
        if of_link {
            return Some(Verdict::OutByStack);
        }
        if !self.is_service(&source) && source != self.own(*slot, v6) {
            return Some(Verdict::Spoofed);
        }
        if network.destination == self.own(slot.other(), v6) {
            return Some(Verdict::Lateral);
        }
        let mut packet = Packet::EMPTY;
        let opens = way.retires()
            && outbound(frame, network, &mut packet).is_ok()
            && (packet.kind, packet.transport) == (Kind::Direct, Transport::Tcp)
            && packet.flags & (SYN | ACK) == SYN;
        let in_use = if way.word.active() == Slot::A { OF_A } else { OF_B };
        let theirs =
            key(&packet.flow) == (to_wire(self.family(v6).client), in_use.to_be(), PORT.to_be(), frame::TCP);
        (opens && theirs && self.is_service(&source)).then_some(Verdict::TupleInUse)
    }

    /// Whether a segment belongs to a probe: the host has one from a port of its own on each link.
    fn answers_probe(&self, slot: Slot, network: &Network, frame: &[u8]) -> bool {
        let mut packet = Packet::EMPTY;
        if inbound(frame, network, &mut packet).is_err() || packet.kind != Kind::Direct {
            return false;
        }
        let family = self.family(network.v6);
        let probe = Flow {
            remote: to_wire(family.service),
            local: to_wire(family.host),
            remote_port: PORT.to_be(),
            local_port: PROBES[slot as usize].to_be(),
            protocol: frame::TCP,
        };
        packet.flow == probe
    }

    /// What becomes of a packet that may leave.
    fn passes(&mut self, mut way: Way, frame: &[u8]) -> Expected {
        let Way { word, slot, network, .. } = way;
        let mut source = network.source;
        let mut packet = Packet::EMPTY;
        let looks = word.phase() != Phase::Steady || word.learns() || word.notice();
        if looks && outbound(frame, &network, &mut packet).is_ok() {
            compare(&mut way, &packet);
            if word.learns() && (slot == word.active() || word.phase() == Phase::Sharing) {
                self.learn(&mut way, &packet);
            } else if word.notice()
                && way.retires()
                && let Some(became) = self.rewritten(&mut way, &packet)
            {
                source = became;
                way.expected.frame = with_source(frame, &network, &source);
                way.counted.push(if network.v6 { "rewritten_v6" } else { "rewritten_v4" });
            }
        }
        if self.is_service(&source) {
            self.note_identification(&mut way, source);
            if !self.leaves(&network) {
                self.by_stack(&mut way, source, frame);
            }
        } else {
            way.stays(NEXT);
        }
        way.expected.with(way.counted, way.compared)
    }

    fn learn(&mut self, way: &mut Way, packet: &Packet) {
        let datagrams = packet.kind == Kind::Direct && packet.transport != Transport::Tcp;
        if datagrams && !is_stateless(&packet.flow) && self.is_service(&packet.flow.local) {
            self.remember(way, packet, packet.flow.local);
        }
    }

    fn remember(&mut self, way: &mut Way, packet: &Packet, local: Address) {
        let key = key(&packet.flow);
        if self.learned.contains_key(&key) || self.learned.len() < bench::LEARNED as usize {
            self.learned.insert(key, (way.slot, local));
            way.counted.push("learned");
        } else {
            way.counted.push("learn_full");
        }
    }

    /// The service's address that becomes the source of a reply; nothing if it stays what it is.
    fn rewritten(&mut self, way: &mut Way, packet: &Packet) -> Option<Address> {
        let network = way.network;
        let flow = self.learned.get(&key(&packet.flow)).copied();
        let answered = flow.filter(|(slot, _)| *slot == way.slot).map(|(_, local)| local);
        if self.is_service(&network.source) {
            if packet.kind == Kind::Direct && answered.is_some() {
                self.remember(way, packet, network.source);
            }
            return None;
        }
        if packet.kind == Kind::LaterFragment {
            return self.fragments.get(&datagram(&network, network.source))?.1;
        }
        let stateless = is_stateless(&packet.flow);
        let first = self.short.then(|| to_wire(self.family(network.v6).service));
        let local = if stateless { first? } else { answered? };
        if packet.kind == Kind::Direct && !stateless {
            self.remember(way, packet, local);
        }
        if network.fragment == Fragment::First {
            self.fragments.insert(datagram(&network, network.source), (way.slot, Some(local)));
        }
        Some(local)
    }

    /// Counts an identification that both sides use.
    fn note_identification(&mut self, way: &mut Way, source: Address) {
        if way.word.phase() == Phase::Draining && way.network.fragment == Fragment::First {
            let before = self.fragments.insert(datagram(&way.network, source), (way.slot, None));
            if before.is_some_and(|(slot, _)| slot != way.slot) {
                way.counted.push("fragment_id_shared");
            }
        }
    }

    /// Whether the host's routes lead out of its uplink: the network there is all that it has routes to, but for the
    /// first and the last address, its own and the service's.
    fn leaves(&self, network: &Network) -> bool {
        let to = network.destination;
        let family = self.family(network.v6);
        let kept = [to_wire(family.host), to_wire(family.service)].contains(&to);
        if network.v6 {
            to[..8] == [0xfd, 0x77, 0, 0, 0, 0, 0, 0] && to[8..] != [0; 8] && !kept
        } else {
            to[12..15] == [10, 77, 0] && !matches!(to[15], 0 | 255) && !kept
        }
    }

    /// The kernel takes a packet where its route for the service points, to the first partition.
    fn by_stack(&self, way: &mut Way, source: Address, frame: &[u8]) {
        let to = way.network.destination;
        // What does not leave its link (groups as well) has no route at all.
        let of_link = way.network.v6 && (to[0] == 0xff || to[0] == 0xfe && to[1] >> 6 == 2);
        if way.slot == Slot::A || of_link {
            way.stays(NEXT);
        } else if self.answers_probe(way.slot, &Network { source, ..way.network }, frame) {
            way.stays(NEXT);
            way.expected.mark = probe_mark(way.slot);
        } else {
            way.stays(REDIRECT);
            way.expected.mark = AGAIN_MARK;
        }
    }
}

impl Way {
    /// It is left to the kernel's routes.
    fn stays(&mut self, action: i32) {
        self.expected.counted = vec![Verdict::OutByStack.name()];
        self.expected.action = action;
    }
}

/// Counts what tells how a side does.
fn compare(way: &mut Way, packet: &Packet) {
    let counts = way.word.phase() != Phase::Steady;
    if !counts || (packet.kind, packet.transport) != (Kind::Direct, Transport::Tcp) {
        return;
    }
    if packet.flags & RST == RST {
        way.compared.push(Event::reset(way.slot).name());
    } else if packet.flags & (SYN | ACK) == SYN | ACK {
        way.compared.push(Event::answered(way.slot).name());
    }
}

fn is_stateless(flow: &Flow) -> bool {
    flow.protocol == frame::UDP && flow.local_port == STATELESS.to_be()
}
