//! What the kernel knows, as a table, and whose a packet to the service is by it.

use std::collections::BTreeMap;

use patchswitch::dataplane::to_wire;
use patchswitch_common::Slot;
use patchswitch_common::decide::{ACK, Kernel, SYN, Socket, owner};
use patchswitch_common::maps::{Address, unmapped};
use patchswitch_common::parse::{
    Flow, Fragment, Kind, LINK_HEADER, Network, Packet, Transport, inbound, ipv4, ipv6,
};
use patchswitch_common::refuse;
use patchswitch_common::verdict::{Event, Verdict};
use patchswitch_common::word::{Phase, Word};

use super::{LEARNED, OF_A, OF_B};
use crate::bench::{Bench, Family, PORT, families, key};
use crate::frame::{self, ETHERNET};
use crate::steer::{connection, listener};

/// What the kernel knows, as a table.
pub(crate) struct Known {
    v4: bool,
    /// The addresses of the family: client and service.
    client: Address,
    service: Address,
    /// Where first fragments went: by source, identification and protocol.
    fragments: BTreeMap<(Address, Address, u32, u8), Slot>,
    /// Who retires, and whether it was asked in vain, with the packet at hand.
    retiring: Option<Slot>,
    nothing: bool,
}

impl Known {
    fn new(family: Family) -> Self {
        Self {
            v4: family.client.is_ipv4(),
            client: to_wire(family.client),
            service: to_wire(family.service),
            fragments: BTreeMap::new(),
            retiring: None,
            nothing: false,
        }
    }
}

impl Kernel for Known {
    fn tcp(&mut self, slot: Slot, flow: &Flow, _cookie: bool) -> Socket {
        let own = if slot == Slot::A { OF_A } else { OF_B };
        let to_listener = (flow.local, flow.local_port) == (self.service, PORT.to_be());
        if to_listener && (flow.remote, flow.remote_port) == (self.client, own.to_be()) {
            Socket::Connection
        } else if to_listener {
            Socket::Listener { cookie: false }
        } else {
            // Of two that share none retires.
            self.nothing |= self.retiring == Some(slot);
            Socket::None
        }
    }

    fn udp_connected(&mut self, _: Slot, _: &Flow) -> bool {
        false
    }

    fn learned(&mut self, flow: &Flow) -> Option<Slot> {
        let port = if flow.protocol == frame::UDP { PORT } else { 0 };
        let known = (flow.remote, flow.local) == (self.client, self.service)
            && flow.remote_port == LEARNED.to_be()
            && flow.local_port == port.to_be()
            && [frame::UDP, echo(self.v4)].contains(&flow.protocol);
        known.then_some(Slot::A)
    }

    fn fragment(&mut self, source: &Address, id: u32, protocol: u8) -> Option<Slot> {
        let number = if self.v4 { protocol } else { 0 };
        self.fragments.get(&(*source, self.service, id, number)).copied()
    }
}

/// The protocol of pings.
pub(super) const fn echo(v4: bool) -> u8 {
    if v4 { frame::ICMP } else { frame::ICMPV6 }
}

/// Whose a packet is, and what else is counted.
pub(super) struct Chosen {
    pub(super) slot: Slot,
    pub(super) both: bool,
    pub(super) counted: Vec<&'static str>,
    pub(super) compared: Vec<&'static str>,
}

/// The network header of a frame; nothing if it cannot be read.
pub(super) fn network(bytes: &[u8], v6: bool) -> Option<Network> {
    let mut network = Network::EMPTY;
    let read =
        if v6 { ipv6(bytes, LINK_HEADER, &mut network) } else { ipv4(bytes, LINK_HEADER, &mut network) };
    read.ok().map(|()| network)
}

/// Who gets a packet of IP, or why nobody here does.
pub(super) fn choose(word: Word, bytes: &[u8], v6: bool, known: &mut Known) -> Result<Chosen, Verdict> {
    // To the letter clients know of one side only.
    let word = if word.is_to_the_letter() { Word::steady(word.active(), 0) } else { word };
    let at = ETHERNET + if v6 { 24 } else { 16 };
    let destination = bytes.get(at..at + if v6 { 16 } else { 4 }).ok_or(Verdict::Malformed)?;
    let wanted = if v6 { known.service.to_vec() } else { unmapped(&known.service).to_vec() };
    if destination != wanted {
        return Err(Verdict::NotOurs);
    }
    let network = network(bytes, v6).ok_or(Verdict::Malformed)?;
    if let Some(verdict) = refuse::inbound(bytes, &network) {
        return Err(verdict);
    }
    let mut packet = Packet::EMPTY;
    let simple = word.phase() == Phase::Steady && network.fragment == Fragment::Whole;
    if !simple && inbound(bytes, &network, &mut packet).is_err() {
        return Err(Verdict::Malformed);
    }
    known.retiring = (word.phase() == Phase::Draining).then(|| word.active().other());
    known.nothing = false;
    let found = owner(word, &packet, known);
    let mut counted = Vec::new();
    if word.phase() == Phase::Draining && found.slot != word.active() {
        counted.push("kept_by_retiring");
    }
    let asks = packet.kind == Kind::Direct
        && packet.transport == Transport::Tcp
        && packet.flags & (SYN | ACK) == SYN;
    let asked = (word.phase() != Phase::Steady && asks).then(|| Event::asked(found.slot).name());
    if known.nothing {
        counted.push("nothing_in_retiring");
    }
    match network.fragment {
        Fragment::First => {
            // Of IPv6 a datagram is known by its identification alone (RFC 8200 4.5).
            let number = if v6 { 0 } else { network.protocol };
            let key = (network.source, network.destination, network.fragment_id, number);
            known.fragments.insert(key, found.slot);
        }
        Fragment::Later if found.both => counted.push("fragment_unknown"),
        _ => {}
    }
    Ok(Chosen { slot: found.slot, both: found.both, counted, compared: asked.into_iter().collect() })
}

/// The verdict of a packet that goes to a partition.
pub(super) const fn to(chosen: &Chosen) -> Verdict {
    match (chosen.both, chosen.slot) {
        (true, _) => Verdict::ToBoth,
        (false, Slot::A) => Verdict::ToA,
        (false, Slot::B) => Verdict::ToB,
    }
}

/// Gives both partitions a listener and a connection in each family; holds them.
pub(crate) fn connect(bench: &Bench) -> anyhow::Result<(Vec<impl Sized + use<>>, [Known; 2])> {
    let mut held = Vec::new();
    for family in families() {
        for (ns, port) in [(&bench.lab.a, OF_A), (&bench.lab.b, OF_B)] {
            let listening = listener(ns, family)?;
            held.push((connection(ns, &listening, family, port)?, listening));
        }
    }
    Ok((held, families().map(Known::new)))
}

/// Makes the flows of slot A known, or fresh.
pub(crate) fn learn(bench: &mut Bench) -> anyhow::Result<()> {
    for family in families() {
        for (port, protocol) in [(PORT, frame::UDP), (0, echo(family.client.is_ipv4()))] {
            bench.remember(key((family.client, LEARNED), port, protocol), family.service, Slot::A, 0)?;
        }
    }
    Ok(())
}
