//! The rules of ownership, whatever packet, word and kernel: as many questions as matter, and the same with the roles
//! exchanged.

use super::{is_v6, network, packet};
use patchswitch_common::Slot;
use patchswitch_common::decide::{ACK, FIN, Kernel, Owner, RST, SYN, Socket, by_share, owner};
use patchswitch_common::maps::Address;
use patchswitch_common::parse::{Flow, Kind, Packet, Transport};
use patchswitch_common::word::{Phase, Word};

/// A kernel whose answers are bits of the link addresses.
#[derive(Clone)]
struct Given {
    answers: [u8; 4],
    /// Whether what it knows of one slot it says of the other.
    mirrored: bool,
    asked: u32,
}

impl Given {
    fn slot(&self, slot: Slot) -> Slot {
        if self.mirrored { slot.other() } else { slot }
    }

    fn known(&self, bits: u8) -> Option<Slot> {
        (bits & 1 != 0).then(|| self.slot(Slot::from_bit(bits >> 1)))
    }

    fn socket(&self, slot: Slot, cookie: bool) -> Socket {
        let bits = self.answers[self.slot(slot).index() as usize];
        match bits & 3 {
            0 => Socket::None,
            1 => Socket::Listener { cookie: cookie && bits & 4 != 0 },
            2 => Socket::Connection,
            _ => Socket::TimeWait,
        }
    }
}

impl Kernel for Given {
    fn tcp(&mut self, slot: Slot, _: &Flow, cookie: bool) -> Socket {
        self.asked += 1;
        self.socket(slot, cookie)
    }

    fn udp_connected(&mut self, slot: Slot, _: &Flow) -> bool {
        self.asked += 1;
        self.answers[2] >> self.slot(slot).index() & 1 != 0
    }

    fn learned(&mut self, _: &Flow) -> Option<Slot> {
        self.asked += 1;
        self.known(self.answers[3])
    }

    fn fragment(&mut self, _: &Address, _: u32, _: u8) -> Option<Slot> {
        self.asked += 1;
        self.known(self.answers[3] >> 2)
    }
}

/// The rules once more, as the design states them.
fn expected(word: Word, packet: &Packet, kernel: &mut Given) -> Owner {
    let active = word.active();
    let retiring = active.other();
    let alone = |kept: bool| Owner { slot: if kept { retiring } else { active }, both: false };
    if word.phase() == Phase::Steady || word.is_to_the_letter() {
        return alone(false);
    }
    match packet.kind {
        Kind::ErrorOfFragment => return Owner { slot: active, both: true },
        Kind::LaterFragment => {
            let first = kernel.fragment(&packet.flow.remote, packet.fragment_id, packet.flow.protocol);
            return first.map_or(Owner { slot: active, both: true }, |slot| Owner { slot, both: false });
        }
        Kind::Direct | Kind::Error => {}
    }
    if word.phase() == Phase::Sharing {
        let slot = shared(active, packet, kernel).unwrap_or_else(|| by_share(word, &packet.flow));
        return Owner { slot, both: false };
    }
    if packet.transport != Transport::Tcp {
        let connected = packet.transport == Transport::Udp && kernel.udp_connected(retiring, &packet.flow);
        return alone(connected || kernel.learned(&packet.flow) == Some(retiring));
    }
    let error = packet.kind == Kind::Error;
    let (syn, rst, ack) = (packet.flags & SYN != 0, packet.flags & RST != 0, packet.flags & ACK != 0);
    let bare = ack && !syn && !rst && !error;
    let fin = packet.flags & FIN != 0;
    let is_cookie = |socket| bare && socket == Socket::Listener { cookie: true };
    // Who would keep it is asked in this order; each of them only if it has what the others have not.
    alone(match (kernel.socket(retiring, true), kernel.socket(active, true)) {
        (Socket::Connection, _) => true,
        (_, Socket::Connection) => false,
        (old, Socket::TimeWait) if is_cookie(old) => !fin,
        (Socket::TimeWait, new) if is_cookie(new) => !syn && fin,
        (old, new) if is_cookie(old) => !is_cookie(new),
        (Socket::TimeWait, new) => !syn && new != Socket::TimeWait,
        _ => false,
    })
}

/// Whose a flow is while both serve, if it is anybody's.
fn shared(active: Slot, packet: &Packet, kernel: &mut Given) -> Option<Slot> {
    let sides = [active, active.other()];
    if packet.transport != Transport::Tcp {
        let connected = packet.transport == Transport::Udp;
        let connected = sides.into_iter().find(|side| connected && kernel.udp_connected(*side, &packet.flow));
        return connected.or_else(|| kernel.learned(&packet.flow));
    }
    let sockets = sides.map(|side| (side, kernel.socket(side, true)));
    let with = |wanted: fn(Socket) -> bool| {
        sockets.iter().filter(move |(_, socket)| wanted(*socket)).map(|(side, _)| *side)
    };
    if let Some(side) = with(|socket| socket == Socket::Connection).next() {
        return Some(side);
    }
    let error = packet.kind == Kind::Error;
    let (syn, rst, ack) = (packet.flags & SYN != 0, packet.flags & RST != 0, packet.flags & ACK != 0);
    if syn && !error {
        return None;
    }
    let cookies: Vec<Slot> = with(|socket| socket == Socket::Listener { cookie: true }).collect();
    let remains = with(|socket| socket == Socket::TimeWait).next();
    match cookies[..] {
        _ if packet.flags & FIN != 0 && remains.is_some() => remains,
        [side] if ack && !rst && !error => Some(side),
        [_, _] if ack && !rst && !error => None,
        _ => remains,
    }
}

/// Checks it of a frame whose bytes are word and answers as well; what was said of it.
pub fn check(frame: &[u8]) -> Option<(Phase, Owner)> {
    let v6 = is_v6(frame)?;
    let read = network(frame, v6).ok()?;
    let packet = packet(frame, &read, false).ok()?;
    let mut number = [0; 8];
    number.copy_from_slice(&frame[..8]);
    // Mostly words that there are; any others as well.
    let word = Word(u64::from_ne_bytes(number) & if frame[7] & 3 == 0 { u64::MAX } else { !0xfeec });
    let given = Given { answers: [frame[8], frame[9], frame[10], frame[11]], mirrored: false, asked: 0 };

    let mut kernel = given.clone();
    let found = owner(word, &packet, &mut kernel);
    assert!(kernel.asked <= 3, "{} questions", kernel.asked);
    assert!(!(word.phase() == Phase::Steady || word.is_to_the_letter()) || kernel.asked == 0);
    assert!(!found.both || found.slot == word.active());
    assert_eq!(found, expected(word, &packet, &mut given.clone()), "{word:?} {packet:?}");

    let mut mirror = Given { mirrored: true, ..given };
    let other = owner(Word(word.0 ^ 1 << 8), &packet, &mut mirror);
    assert_eq!((other.slot, other.both), (found.slot.other(), found.both));
    assert_eq!(mirror.asked, kernel.asked);
    Some((word.phase(), found))
}
