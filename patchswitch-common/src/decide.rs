//! Who gets a packet: the rules of ownership.
//!
//! A flow's owner is asked from the kernel, not remembered: it is the partition in whose network namespace the kernel
//! has the flow's socket. Only flows that have no socket of their own (an unconnected UDP server, ICMP echo) are
//! looked up in a table of flows that the retiring partition answered.
//!
//! In these rules a socket in `LISTEN` or `CLOSE` counts as none:
//!
//! 1. the retiring partition has a socket or a request socket for the flow: retiring, also for a SYN (RFC 5961 wants
//!    the owner's challenge ACK);
//! 2. an ACK without SYN or RST for which the retiring one has only a listener, and whose SYN cookie that listener
//!    accepts: the active one if it has a connection for it or accepts the cookie as well (the secret is the kernel's,
//!    not the namespace's), or if the segment ends what is in `TIME_WAIT` there; else the retiring one;
//! 3. `TIME_WAIT` in the retiring one: a SYN goes to the active one; any other segment to the active one if it has a
//!    socket for it, or accepts the SYN cookie in it (it keeps nothing of a SYN that it has answered by one) and the
//!    segment ends nothing; else to the retiring one;
//! 4. a SYN that nobody owns: active;
//! 5. everything else: active.
//!
//! While a canary gets a share of the new flows nobody retires, and both sides are asked: a connection, else a cookie that
//! only one of the two accepts, else what remains of a connection says whose a segment is; what remains comes before a
//! cookie if the segment ends something. What nobody owns goes by the share, a hash of the flow's ends, so that every
//! retry goes the same way and a larger share only adds.
//!
//! A FIN is no cookie where a connection remains: of a cookie only the difference between the segment's two numbers is
//! checked, so that the end of a connection which began by a cookie itself can pass for one, and the kernel shows a
//! connection that waits for its client's FIN without a process (`FIN_WAIT2`) as `TIME_WAIT`.

use crate::Slot;
use crate::maps::Address;
use crate::parse::{Flow, Kind, Packet, Transport};
use crate::word::{Phase, Word};

/// What the kernel knows of a TCP flow in one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// Nothing, or a socket in `CLOSE`.
    None,
    /// A listener that would take the segment; `cookie` if it was asked and accepts the SYN cookie in it.
    Listener {
        /// Whether the SYN cookie was asked for and is valid.
        cookie: bool,
    },
    /// A connection: `SYN_SENT`, `NEW_SYN_RECV`, `ESTABLISHED` … `LAST_ACK`.
    Connection,
    /// The remains of a connection.
    TimeWait,
}

/// States of a TCP socket as the kernel numbers them (`include/net/tcp_states.h`).
pub mod tcp_state {
    /// `TCP_ESTABLISHED`; also that of a connected UDP socket.
    pub const ESTABLISHED: u32 = 1;
    /// `TCP_TIME_WAIT`.
    pub const TIME_WAIT: u32 = 6;
    /// `TCP_CLOSE`; also that of an unconnected UDP socket.
    pub const CLOSE: u32 = 7;
    /// `TCP_LISTEN`.
    pub const LISTEN: u32 = 10;
}

/// What a decision may ask. Each question costs time, so it is asked only where its answer matters.
pub trait Kernel {
    /// The socket of a TCP flow in a partition; `cookie` if a listener's opinion on the SYN cookie matters.
    fn tcp(&mut self, slot: Slot, flow: &Flow, cookie: bool) -> Socket;

    /// Whether a partition has a **connected** UDP socket for the flow.
    fn udp_connected(&mut self, slot: Slot, flow: &Flow) -> bool;

    /// The slot that answered a flow while flows were learned, if that is not too long ago.
    fn learned(&mut self, flow: &Flow) -> Option<Slot>;

    /// The slot that got the first fragment of a packet.
    fn fragment(&mut self, source: &Address, id: u32, protocol: u8) -> Option<Slot>;
}

/// Who gets a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The partition that gets it.
    pub slot: Slot,
    /// Whether the other one gets a copy: a fragment whose first one was not seen yet, and an error about one, do not
    /// tell whose they are. Only the side that has the rest can make something of it.
    pub both: bool,
}

/// Who gets a packet that is addressed to the service.
///
/// `kernel` is asked nothing in [`Phase::Steady`], nor if the switch was [to the letter](Word::moved_to).
#[inline(always)]
pub fn owner(word: Word, packet: &Packet, kernel: &mut impl Kernel) -> Owner {
    let active = word.active();
    match (word.inward(), packet.kind) {
        (Phase::Steady, _) => Owner { slot: active, both: false },
        (_, Kind::ErrorOfFragment) => Owner { slot: active, both: true },
        (_, Kind::LaterFragment) => {
            match kernel.fragment(&packet.flow.remote, packet.fragment_id, packet.flow.protocol) {
                Some(slot) => Owner { slot, both: false },
                None => Owner { slot: active, both: true },
            }
        }
        (Phase::Draining, _) => Owner { slot: draining(active, packet, kernel), both: false },
        (Phase::Sharing, _) => {
            let slot = sharing(active, packet, kernel).unwrap_or_else(|| by_share(word, &packet.flow));
            Owner { slot, both: false }
        }
    }
}

/// The side that has a flow while both serve; nothing if none has.
#[inline(always)]
fn sharing(active: Slot, packet: &Packet, kernel: &mut impl Kernel) -> Option<Slot> {
    let (flow, other) = (&packet.flow, active.other());
    match (packet.kind, packet.transport) {
        (kind, Transport::Tcp) => tcp_shared(active, flow, (kind, packet.flags), kernel),
        (_, Transport::Udp) if kernel.udp_connected(active, flow) => Some(active),
        (_, Transport::Udp) if kernel.udp_connected(other, flow) => Some(other),
        _ => kernel.learned(flow),
    }
}

/// The side that a TCP segment belongs to, or an ICMP error about one.
#[inline(always)]
fn tcp_shared(
    active: Slot,
    flow: &Flow,
    (kind, flags): (Kind, u8),
    kernel: &mut impl Kernel,
) -> Option<Slot> {
    let direct = matches!(kind, Kind::Direct);
    let bare_ack = direct && flags & (SYN | RST | ACK) == ACK;
    let other = active.other();
    let first = kernel.tcp(active, flow, bare_ack);
    if first == Socket::Connection {
        return Some(active);
    }
    let second = kernel.tcp(other, flow, bare_ack);
    if second == Socket::Connection {
        return Some(other);
    }
    if direct && flags & SYN != 0 {
        return None;
    }
    let ends = flags & FIN != 0;
    match (first, second) {
        (Socket::TimeWait, Socket::Listener { cookie: true }) if ends => Some(active),
        (Socket::Listener { cookie: true }, Socket::TimeWait) if ends => Some(other),
        // Valid on both sides: the secret is the kernel's. The SYN went by the share, and so goes its ACK.
        (Socket::Listener { cookie: true }, Socket::Listener { cookie: true }) => None,
        (Socket::Listener { cookie: true }, _) => Some(active),
        (_, Socket::Listener { cookie: true }) => Some(other),
        (Socket::TimeWait, _) => Some(active),
        (_, Socket::TimeWait) => Some(other),
        _ => None,
    }
}

/// The side that a new flow goes to. The same for every packet of a flow; those that a share sends to the other side, a
/// larger one does as well.
#[inline(always)]
pub fn by_share(word: Word, flow: &Flow) -> Slot {
    let active = word.active();
    if u32::from(word.share()) > hundredth(flow) { active.other() } else { active }
}

/// In which of a hundred equal parts of all flows one is, by its ends.
#[inline(always)]
fn hundredth(flow: &Flow) -> u32 {
    let [a, b, c, d, e, f, g, h, rest @ ..] = flow.remote;
    let ports = u64::from(flow.remote_port) << 16 | u64::from(flow.local_port);
    let [.., w, x, y, z] = flow.local;
    let local = u64::from(u32::from_ne_bytes([w, x, y, z]));
    let mixed = mix(u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
    let mixed = mix(mixed ^ u64::from_ne_bytes(rest));
    let mixed = mix(mixed ^ (ports | local << 32));
    (((mixed >> 32) * 100) >> 32) as u32
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on every one given.
#[inline(always)]
const fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

#[inline(always)]
fn draining(active: Slot, packet: &Packet, kernel: &mut impl Kernel) -> Slot {
    let retiring = active.other();
    let flow = &packet.flow;
    let kept = match (packet.kind, packet.transport) {
        (Kind::Direct, Transport::Tcp) => tcp(active, flow, packet.flags, kernel),
        (_, Transport::Tcp) => tcp_error(active, flow, kernel),
        // Either is enough. The table of flows takes a third of the time that a look for a socket takes.
        (_, Transport::Udp) => kernel.learned(flow) == Some(retiring) || kernel.udp_connected(retiring, flow),
        (_, Transport::Other) => kernel.learned(flow) == Some(retiring),
    };
    if kept { retiring } else { active }
}

/// Whether the retiring partition keeps a TCP segment, as far as a look at its socket alone tells: by the socket's state,
/// or that there is none. Nothing if that takes a second question.
#[inline(always)]
pub const fn at_once(state: Option<u32>, flags: u8) -> Option<bool> {
    match state {
        None | Some(tcp_state::CLOSE) => Some(false),
        Some(tcp_state::LISTEN) if flags & (SYN | RST | ACK) != ACK => Some(false),
        Some(tcp_state::LISTEN | tcp_state::TIME_WAIT) => None,
        Some(_) => Some(true),
    }
}

/// Whether the retiring partition keeps a TCP segment.
#[inline(always)]
fn tcp(active: Slot, flow: &Flow, flags: u8, kernel: &mut impl Kernel) -> bool {
    let bare_ack = flags & (SYN | RST | ACK) == ACK;
    let begins = bare_ack && flags & FIN == 0;
    match kernel.tcp(active.other(), flow, bare_ack) {
        Socket::Connection => true,
        Socket::Listener { cookie } => {
            bare_ack
                && cookie
                && match kernel.tcp(active, flow, true) {
                    Socket::None | Socket::Listener { cookie: false } => true,
                    Socket::TimeWait => begins,
                    Socket::Connection | Socket::Listener { cookie: true } => false,
                }
        }
        Socket::TimeWait => {
            flags & SYN == 0
                && matches!(
                    kernel.tcp(active, flow, begins),
                    Socket::None | Socket::Listener { cookie: false }
                )
        }
        Socket::None => false,
    }
}

/// Whether the retiring partition keeps an ICMP error about a TCP segment it sent: rules 1 and 3 without SYN or cookie.
#[inline(always)]
fn tcp_error(active: Slot, flow: &Flow, kernel: &mut impl Kernel) -> bool {
    match kernel.tcp(active.other(), flow, false) {
        Socket::Connection => true,
        Socket::TimeWait => {
            matches!(kernel.tcp(active, flow, false), Socket::None | Socket::Listener { .. })
        }
        Socket::Listener { .. } | Socket::None => false,
    }
}

/// Flag bits of a TCP header (RFC 9293 3.1).
pub const FIN: u8 = 0x01;
/// As [`FIN`].
pub const SYN: u8 = 0x02;
/// As [`FIN`].
pub const RST: u8 = 0x04;
/// As [`FIN`].
pub const ACK: u8 = 0x10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::mapped;

    /// A kernel whose answers are given, and which counts what it was asked.
    #[derive(Default)]
    struct Given {
        retiring: Option<Socket>,
        active: Option<Socket>,
        udp: bool,
        learned: Option<Slot>,
        fragment: Option<Slot>,
        /// Slot B retires instead of slot A, and all of it is said of the other slot.
        mirrored: bool,
        asked: u32,
    }

    impl Given {
        fn slot(&self, slot: Slot) -> Slot {
            if self.mirrored { slot.other() } else { slot }
        }
    }

    impl Kernel for Given {
        fn tcp(&mut self, slot: Slot, _: &Flow, cookie: bool) -> Socket {
            self.asked += 1;
            let socket = match self.slot(slot) {
                Slot::A => self.retiring,
                Slot::B => self.active,
            };
            match socket.unwrap_or(Socket::None) {
                // A listener that was not asked for its opinion has none.
                Socket::Listener { cookie: valid } => Socket::Listener { cookie: valid && cookie },
                other => other,
            }
        }

        fn udp_connected(&mut self, slot: Slot, _: &Flow) -> bool {
            self.asked += 1;
            self.slot(slot) == Slot::A && self.udp
        }

        fn learned(&mut self, _: &Flow) -> Option<Slot> {
            self.asked += 1;
            self.learned.map(|slot| self.slot(slot))
        }

        fn fragment(&mut self, _: &Address, _: u32, _: u8) -> Option<Slot> {
            self.asked += 1;
            self.fragment.map(|slot| self.slot(slot))
        }
    }

    fn packet(kind: Kind, transport: Transport, flags: u8) -> Packet {
        let flow = Flow {
            remote: mapped([192, 0, 2, 1]),
            local: mapped([192, 0, 2, 80]),
            remote_port: 40000u16.to_be(),
            local_port: 80u16.to_be(),
            protocol: 6,
        };
        Packet { flow, kind, transport, flags, fragment_id: 7 }
    }

    const DRAINING: Word = Word::steady(Slot::A, 1).taken_over_by(Slot::B);
    const NONE: Socket = Socket::None;
    const LISTEN: Socket = Socket::Listener { cookie: false };
    const COOKIE: Socket = Socket::Listener { cookie: true };
    const CONN: Socket = Socket::Connection;
    const TW: Socket = Socket::TimeWait;

    /// Whose a packet is while slot A retires, and after how many questions. While slot B retires, as in a rollback, it is
    /// the same with the roles exchanged.
    fn while_draining(packet: &Packet, mut kernel: Given) -> (Owner, u32) {
        let mut mirror = Given { mirrored: true, ..kernel };
        let found = owner(DRAINING, packet, &mut kernel);
        let exchanged = owner(DRAINING.taken_over_by(Slot::A), packet, &mut mirror);
        assert_eq!((exchanged.slot.other(), exchanged.both), (found.slot, found.both), "{packet:?}");
        assert_eq!(mirror.asked, kernel.asked);
        (found, kernel.asked)
    }

    const fn alone(slot: Slot) -> Owner {
        Owner { slot, both: false }
    }

    #[test]
    fn steady_asks_nothing() {
        let mut kernel = Given { retiring: Some(CONN), ..Given::default() };
        let tcp = packet(Kind::Direct, Transport::Tcp, ACK);
        assert_eq!(owner(Word::steady(Slot::B, 0), &tcp, &mut kernel), alone(Slot::B));
        assert_eq!(kernel.asked, 0);
    }

    #[test]
    fn the_rules_for_tcp() {
        use Slot::{A, B};
        // (rule, flags, retiring, active, owner, questions)
        let table = [
            ("1: connection, data", ACK, CONN, LISTEN, A, 1),
            ("1: connection, SYN", SYN, CONN, LISTEN, A, 1),
            ("1: connection, RST", RST, CONN, LISTEN, A, 1),
            ("2: cookie of the retiring one alone", ACK, COOKIE, LISTEN, A, 2),
            ("2: cookie, no listener in the active one", ACK, COOKIE, NONE, A, 2),
            ("2: cookie valid in both", ACK, COOKIE, COOKIE, B, 2),
            ("2: a flow of the active one passes by chance", ACK, COOKIE, CONN, B, 2),
            ("2: remains in the active one", ACK, COOKIE, TW, A, 2),
            ("2: the end of what remains in the active one", ACK | FIN, COOKIE, TW, B, 2),
            ("2: the first data is all of it", ACK | FIN, COOKIE, LISTEN, A, 2),
            ("2: not a cookie", ACK, LISTEN, LISTEN, B, 1),
            ("2: SYN+ACK carries no cookie", SYN | ACK, COOKIE, LISTEN, B, 1),
            ("2: RST+ACK carries no cookie", RST | ACK, COOKIE, LISTEN, B, 1),
            ("3: SYN reuses the tuple", SYN, TW, LISTEN, B, 1),
            ("3: its later segments", ACK, TW, CONN, B, 2),
            ("3: its handshake, begun by a cookie", ACK, TW, COOKIE, B, 2),
            ("3: RST+ACK carries no cookie", RST | ACK, TW, COOKIE, A, 2),
            ("3: FIN", ACK | FIN, TW, LISTEN, A, 2),
            ("3: FIN, nothing in the active one", ACK | FIN, TW, NONE, A, 2),
            ("3: FIN that passes for a cookie", ACK | FIN, TW, COOKIE, A, 2),
            ("3: FIN of a connection of the active one", ACK | FIN, TW, CONN, B, 2),
            ("4: new SYN", SYN, LISTEN, LISTEN, B, 1),
            ("5: nobody knows it", ACK, NONE, NONE, B, 1),
        ];
        for (rule, flags, retiring, active, expected, asked) in table {
            let kernel = Given { retiring: Some(retiring), active: Some(active), ..Given::default() };
            let got = while_draining(&packet(Kind::Direct, Transport::Tcp, flags), kernel);
            assert_eq!(got, (alone(expected), asked), "{rule}");
        }
    }

    #[test]
    fn what_is_told_at_once_is_what_the_rules_say() {
        let states = [
            (None, NONE),
            (Some(tcp_state::CLOSE), NONE),
            (Some(tcp_state::LISTEN), LISTEN),
            (Some(tcp_state::TIME_WAIT), TW),
            (Some(tcp_state::ESTABLISHED), CONN),
            // SYN_SENT, SYN_RECV, LAST_ACK, NEW_SYN_RECV.
            (Some(2), CONN),
            (Some(3), CONN),
            (Some(9), CONN),
            (Some(12), CONN),
        ];
        for (state, retiring) in states {
            for flags in 0..=0x3f {
                let mut told = [false; 2];
                for active in [NONE, LISTEN, COOKIE, CONN, TW] {
                    // A listener's opinion on a cookie is a second question.
                    for retiring in [retiring, if retiring == LISTEN { COOKIE } else { retiring }] {
                        let kernel =
                            Given { retiring: Some(retiring), active: Some(active), ..Given::default() };
                        let (got, _) = while_draining(&packet(Kind::Direct, Transport::Tcp, flags), kernel);
                        told[usize::from(got.slot == Slot::A)] = true;
                        let at_once = at_once(state, flags);
                        assert!(
                            at_once.is_none_or(|kept| kept == (got.slot == Slot::A)),
                            "{state:?} {flags:#x}"
                        );
                    }
                }
                // It is silent only where the answer depends on more.
                let is_silent = at_once(state, flags).is_none();
                assert!(!is_silent || told == [true; 2] || flags & SYN != 0, "{state:?} {flags:#x}");
            }
        }
    }

    fn sharing(share: u8) -> Word {
        Word::steady(Slot::A, 1).shared(share)
    }

    #[test]
    fn the_rules_for_tcp_while_both_serve() {
        use Slot::{A, B};
        // (rule, flags, active, other, owner if anybody has it)
        let table = [
            ("connection of the active one", ACK, CONN, LISTEN, Some(A)),
            ("its SYN again", SYN, CONN, LISTEN, Some(A)),
            ("connection of the other one", ACK, LISTEN, CONN, Some(B)),
            ("its SYN again", SYN, LISTEN, CONN, Some(B)),
            ("connection here, remains there", ACK, TW, CONN, Some(B)),
            ("new", SYN, LISTEN, LISTEN, None),
            ("new, remains in the active one", SYN, TW, LISTEN, None),
            ("new, remains in the other one", SYN, LISTEN, TW, None),
            ("cookie of the active one", ACK, COOKIE, LISTEN, Some(A)),
            ("cookie of the other one", ACK, LISTEN, COOKIE, Some(B)),
            ("cookie of the other one, remains here", ACK, TW, COOKIE, Some(B)),
            ("cookie of both", ACK, COOKIE, COOKIE, None),
            ("cookie of the active one, remains there", ACK, COOKIE, TW, Some(A)),
            ("FIN", ACK | FIN, TW, LISTEN, Some(A)),
            ("FIN, of the other one", ACK | FIN, NONE, TW, Some(B)),
            ("FIN that passes for a cookie", ACK | FIN, TW, COOKIE, Some(A)),
            ("FIN, of the other one, that passes for a cookie", ACK | FIN, COOKIE, TW, Some(B)),
            ("nobody knows it", ACK, LISTEN, NONE, None),
        ];
        for (rule, flags, active, other, expected) in table {
            for share in [1, 99] {
                let mut kernel = Given { retiring: Some(active), active: Some(other), ..Given::default() };
                let packet = packet(Kind::Direct, Transport::Tcp, flags);
                let got = owner(sharing(share), &packet, &mut kernel);
                let expected = expected.unwrap_or_else(|| by_share(sharing(share), &packet.flow));
                assert_eq!(got, alone(expected), "{rule}, share {share}");
            }
        }
        let error = packet(Kind::Error, Transport::Tcp, 0);
        for (active, other, expected) in [(CONN, NONE, A), (NONE, CONN, B), (TW, LISTEN, A), (LISTEN, TW, B)]
        {
            let mut kernel = Given { retiring: Some(active), active: Some(other), ..Given::default() };
            assert_eq!(owner(sharing(50), &error, &mut kernel), alone(expected), "{active:?} {other:?}");
        }
    }

    #[test]
    fn datagrams_stay_where_they_were_answered_while_both_serve() {
        let udp = packet(Kind::Direct, Transport::Udp, 0);
        for share in [1, 99] {
            let case = |udp_socket, learned| {
                owner(sharing(share), &udp, &mut Given { udp: udp_socket, learned, ..Given::default() })
            };
            assert_eq!(case(true, None), alone(Slot::A));
            assert_eq!(case(false, Some(Slot::A)), alone(Slot::A));
            assert_eq!(case(false, Some(Slot::B)), alone(Slot::B));
            assert_eq!(case(false, None), alone(by_share(sharing(share), &udp.flow)));
        }
    }

    #[test]
    fn a_share_is_a_share_of_the_flows_and_a_larger_one_only_adds() {
        let flow = |number: u32| {
            let [a, b, c, d] = number.to_be_bytes();
            let flow = packet(Kind::Direct, Transport::Tcp, SYN).flow;
            Flow { remote: mapped([10, a, b, 1]), remote_port: u16::from_ne_bytes([c, d]), ..flow }
        };
        let went =
            |share| (0..100_000).map(flow).filter(move |f| by_share(sharing(share), f) == Slot::B).count();
        assert_eq!(went(0), 0);
        for share in [1, 10, 50, 99] {
            let (count, expected) = (went(share), usize::from(share) * 1000);
            // Five standard deviations of 100,000 throws.
            assert!(count.abs_diff(expected) < 5 * 158, "{count} of 100000 by a share of {share}");
        }
        for number in 0..10_000 {
            let mut before = Slot::A;
            for share in 0..=99 {
                let now = by_share(sharing(share), &flow(number));
                assert!(before == Slot::A || now == Slot::B, "flow {number} came back at {share}");
                before = now;
            }
        }
    }

    #[test]
    fn errors_follow_the_flow_they_are_about() {
        use Slot::{A, B};
        for (retiring, active, expected) in
            [(CONN, LISTEN, A), (TW, LISTEN, A), (TW, CONN, B), (COOKIE, NONE, B), (NONE, NONE, B)]
        {
            let kernel = Given { retiring: Some(retiring), active: Some(active), ..Given::default() };
            let error = packet(Kind::Error, Transport::Tcp, 0);
            assert_eq!(while_draining(&error, kernel).0, alone(expected), "{retiring:?} {active:?}");
        }
    }

    #[test]
    fn datagrams_follow_a_connected_socket_or_what_was_learned() {
        let udp = packet(Kind::Direct, Transport::Udp, 0);
        let case = |udp_socket, learned| {
            while_draining(&udp, Given { udp: udp_socket, learned, ..Given::default() }).0
        };
        assert_eq!(case(true, None), alone(Slot::A));
        assert_eq!(case(false, Some(Slot::A)), alone(Slot::A));
        assert_eq!(case(false, Some(Slot::B)), alone(Slot::B));
        assert_eq!(case(false, None), alone(Slot::B));
    }

    #[test]
    fn later_fragments_follow_the_first() {
        let later = packet(Kind::LaterFragment, Transport::Other, 0);
        let case = |fragment| while_draining(&later, Given { fragment, ..Given::default() }).0;
        assert_eq!(case(Some(Slot::A)), alone(Slot::A));
        assert_eq!(case(Some(Slot::B)), alone(Slot::B));
        assert_eq!(case(None), Owner { slot: Slot::B, both: true });
    }

    #[test]
    fn an_error_about_a_later_fragment_is_for_both() {
        let error = packet(Kind::ErrorOfFragment, Transport::Other, 0);
        assert_eq!(while_draining(&error, Given::default()).0, Owner { slot: Slot::B, both: true });
        assert_eq!(owner(Word::steady(Slot::A, 1), &error, &mut Given::default()), alone(Slot::A));
    }
}
