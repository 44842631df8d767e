//! Every exit of the programs has a counter, and every counter a name.
//!
//! The sum of the exits of a hook is the number of packets it saw. What happens to a packet on its way to an exit
//! (learned, rewritten) is counted apart, as an [`Event`].

use crate::Slot;

/// Where a packet met a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// Ingress of an uplink: from the clients.
    Uplink = 0,
    /// Egress of a host-side veth: to a partition, from the host or from another partition.
    ToPartition = 1,
    /// Ingress of a host-side veth: from a partition.
    FromPartition = 2,
    /// Ingress of an uplink by XDP, before [`Hook::Uplink`], which gets what this one passes on.
    Xdp = 3,
}

/// All hooks, in the order of their counters.
pub const HOOKS: [Hook; 4] = [Hook::Uplink, Hook::ToPartition, Hook::FromPartition, Hook::Xdp];

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// Not an address of this service; left to others.
    NotOurs = 0,
    /// Too short or inconsistent. What comes in is left to the kernel, which drops and counts it as it would without us;
    /// what a partition sends is dropped.
    Malformed = 1,
    /// Neighbour and router discovery, group membership, and other messages of the link to a service address: left to
    /// the host, which answers for it.
    ForHost = 2,
    /// To slot A.
    ToA = 3,
    /// To slot B.
    ToB = 4,
    /// A probe of the agent; goes to the veth it was sent on.
    Probe = 5,
    /// No partition is there yet; left to the kernel's routes.
    Unsteered = 6,
    /// From a partition straight to an uplink's next hop.
    Out = 7,
    /// From a partition to the kernel's routes (local and unreachable destinations, other partitions).
    OutByStack = 8,
    /// From or to a standby that does not serve: dropped. Only the agent's probes and their answers pass.
    Quarantined = 9,
    /// From a partition with a source address that is not its own: dropped.
    Spoofed = 10,
    /// A packet of a partition that this hook has judged already and that the kernel now takes as if it came from the
    /// link to which its routes point, or a copy for the other partition (see [`AGAIN_MARK`]).
    Again = 11,
    /// To both: it does not tell whose it is. The slot that serves gets the packet, the other one a copy.
    ToBoth = 12,
    /// To the service from an address that nobody can have, or from a partition over IPv6 with one of IPv4: dropped.
    Martian = 13,
    /// To the service, with the way it is to take: dropped.
    SourceRoute = 14,
    /// To the service, with a better way for it: dropped.
    Redirect = 15,
    /// To the service, an ICMP error about an ICMP error: dropped.
    NestedError = 16,
    /// To the service, neighbour discovery in fragments: dropped (RFC 6980).
    SplitDiscovery = 17,
    /// From a partition under another link address than its own: dropped.
    SpoofedMac = 18,
    /// From a partition: what only a router, a server of addresses or the host may say. Dropped.
    ForgedControl = 19,
    /// From one partition to the other one's own address: dropped.
    Lateral = 20,
    /// From the retiring partition, a new connection under a pair of ends that the serving one has in use: dropped.
    TupleInUse = 21,
    /// From a partition to an address by which the host itself is governed (its loopback, the metadata of a cloud):
    /// dropped.
    HostControl = 22,
    /// To the service, for a partition that is not ready yet: into the queue in which its packets wait. Where XDP sees it,
    /// the program behind does that.
    Held = 23,
    /// At XDP: longer than the link of the partition takes, which drops it without a word; left to the program behind.
    TooLong = 24,
}

/// The mark of a packet on its way from one of our hooks to another one, which takes it off again. A partition cannot set
/// it: the kernel clears marks where a packet leaves a network namespace.
pub const AGAIN_MARK: u32 = 0x7073_6167;

/// All verdicts, in the order of their counters.
pub const VERDICTS: [Verdict; 25] = [
    Verdict::NotOurs,
    Verdict::Malformed,
    Verdict::ForHost,
    Verdict::ToA,
    Verdict::ToB,
    Verdict::Probe,
    Verdict::Unsteered,
    Verdict::Out,
    Verdict::OutByStack,
    Verdict::Quarantined,
    Verdict::Spoofed,
    Verdict::Again,
    Verdict::ToBoth,
    Verdict::Martian,
    Verdict::SourceRoute,
    Verdict::Redirect,
    Verdict::NestedError,
    Verdict::SplitDiscovery,
    Verdict::SpoofedMac,
    Verdict::ForgedControl,
    Verdict::Lateral,
    Verdict::TupleInUse,
    Verdict::HostControl,
    Verdict::Held,
    Verdict::TooLong,
];

impl Verdict {
    /// The name of its counter.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotOurs => "not_ours",
            Self::Malformed => "malformed",
            Self::ForHost => "for_host",
            Self::ToA => "to_a",
            Self::ToB => "to_b",
            Self::Probe => "probe",
            Self::Unsteered => "unsteered",
            Self::Out => "out",
            Self::OutByStack => "out_by_stack",
            Self::Quarantined => "quarantined",
            Self::Spoofed => "spoofed",
            Self::Again => "again",
            Self::ToBoth => "to_both",
            Self::Martian => "martian",
            Self::SourceRoute => "source_route",
            Self::Redirect => "redirect",
            Self::NestedError => "nested_error",
            Self::SplitDiscovery => "split_discovery",
            Self::SpoofedMac => "spoofed_mac",
            Self::ForgedControl => "forged_control",
            Self::Lateral => "lateral",
            Self::TupleInUse => "tuple_in_use",
            Self::HostControl => "host_control",
            Self::Held => "held",
            Self::TooLong => "too_long",
        }
    }

    /// The verdict with a number that [`refuse`](crate::refuse) gave; nothing if it gave none.
    #[inline(always)]
    pub const fn of_refusal(number: i32) -> Option<Self> {
        const fn is(number: i32, verdict: Verdict) -> bool {
            number == verdict as i32
        }
        match number {
            n if n < 0 => None,
            n if is(n, Self::ForHost) => Some(Self::ForHost),
            n if is(n, Self::Martian) => Some(Self::Martian),
            n if is(n, Self::SourceRoute) => Some(Self::SourceRoute),
            n if is(n, Self::Redirect) => Some(Self::Redirect),
            n if is(n, Self::NestedError) => Some(Self::NestedError),
            n if is(n, Self::SplitDiscovery) => Some(Self::SplitDiscovery),
            n if is(n, Self::ForgedControl) => Some(Self::ForgedControl),
            n if is(n, Self::HostControl) => Some(Self::HostControl),
            _ => Some(Self::Malformed),
        }
    }

    /// Whether a packet with this verdict is dropped.
    #[inline(always)]
    pub const fn drops(self) -> bool {
        matches!(
            self,
            Self::Quarantined
                | Self::Spoofed
                | Self::Martian
                | Self::SourceRoute
                | Self::Redirect
                | Self::NestedError
                | Self::SplitDiscovery
                | Self::SpoofedMac
                | Self::ForgedControl
                | Self::Lateral
                | Self::TupleInUse
                | Self::HostControl
        )
    }
}

impl Hook {
    /// The name of its group of counters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::ToPartition => "to_partition",
            Self::FromPartition => "from_partition",
            Self::Xdp => "xdp",
        }
    }
}

/// What happened to a packet before its exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// A flow without a socket of its own was remembered or refreshed.
    Learned = 0,
    /// A flow could not be remembered: the table is full.
    LearnFull = 1,
    /// The source of an IPv4 reply was rewritten to the service address.
    RewrittenV4 = 2,
    /// The source of an IPv6 reply was rewritten to the service address.
    RewrittenV6 = 3,
    /// A rewrite was refused by the kernel; the packet went out as it was.
    RewriteFailed = 4,
    /// A later fragment came before its first; it went to the active partition.
    FragmentUnknown = 5,
    /// A packet went to the retiring partition: the flow is its own.
    KeptByRetiring = 6,
    /// Both partitions sent one client fragments under one identification within [`FRAGMENT_NS`]: the client may join
    /// what does not belong together, which only its checksums tell.
    ///
    /// [`FRAGMENT_NS`]: crate::maps::FRAGMENT_NS
    FragmentIdShared = 7,
    /// The retiring partition had not even a listener for a TCP packet: it has closed the port, or its network namespace
    /// is gone.
    NothingInRetiring = 8,
    /// A client of QUIC went on from another address, and its connection id told whose it is.
    Moved = 9,
    /// A SYN went to slot A. This and what follows is counted only while there are two sides to compare.
    AskedA = 10,
    /// A SYN went to slot B.
    AskedB = 11,
    /// Slot A accepted a connection: it sent a SYN with ACK.
    AnsweredA = 12,
    /// Slot B accepted a connection.
    AnsweredB = 13,
    /// Slot A reset a connection or refused one.
    ResetA = 14,
    /// Slot B reset a connection or refused one.
    ResetB = 15,
    /// A standby sent a packet with the service's address, before it serves.
    TooEarly = 16,
}

/// All events, in the order of their counters.
pub const EVENTS: [Event; 17] = [
    Event::Learned,
    Event::LearnFull,
    Event::RewrittenV4,
    Event::RewrittenV6,
    Event::RewriteFailed,
    Event::FragmentUnknown,
    Event::KeptByRetiring,
    Event::FragmentIdShared,
    Event::NothingInRetiring,
    Event::Moved,
    Event::AskedA,
    Event::AskedB,
    Event::AnsweredA,
    Event::AnsweredB,
    Event::ResetA,
    Event::ResetB,
    Event::TooEarly,
];

impl Event {
    /// The name of its counter.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Learned => "learned",
            Self::LearnFull => "learn_full",
            Self::RewrittenV4 => "rewritten_v4",
            Self::RewrittenV6 => "rewritten_v6",
            Self::RewriteFailed => "rewrite_failed",
            Self::FragmentUnknown => "fragment_unknown",
            Self::KeptByRetiring => "kept_by_retiring",
            Self::FragmentIdShared => "fragment_id_shared",
            Self::NothingInRetiring => "nothing_in_retiring",
            Self::Moved => "moved",
            Self::AskedA => "asked_a",
            Self::AskedB => "asked_b",
            Self::AnsweredA => "answered_a",
            Self::AnsweredB => "answered_b",
            Self::ResetA => "reset_a",
            Self::ResetB => "reset_b",
            Self::TooEarly => "too_early",
        }
    }

    /// Whether it tells what one of the two sides does.
    pub const fn compares(self) -> bool {
        self as u32 >= Self::AskedA as u32
    }

    /// A SYN went to a slot.
    #[inline(always)]
    pub const fn asked(slot: Slot) -> Self {
        match slot {
            Slot::A => Self::AskedA,
            Slot::B => Self::AskedB,
        }
    }

    /// A slot accepted a connection.
    #[inline(always)]
    pub const fn answered(slot: Slot) -> Self {
        match slot {
            Slot::A => Self::AnsweredA,
            Slot::B => Self::AnsweredB,
        }
    }

    /// A slot reset a connection.
    #[inline(always)]
    pub const fn reset(slot: Slot) -> Self {
        match slot {
            Slot::A => Self::ResetA,
            Slot::B => Self::ResetB,
        }
    }

    /// Index of its counter.
    #[inline(always)]
    pub const fn counter(self) -> u32 {
        (HOOKS.len() * VERDICTS.len()) as u32 + self as u32
    }
}

/// Index of the counter of a verdict at a hook.
#[inline(always)]
pub const fn counter(hook: Hook, verdict: Verdict) -> u32 {
    hook as u32 * VERDICTS.len() as u32 + verdict as u32
}

/// How many counters there are.
pub const COUNTERS: u32 = (HOOKS.len() * VERDICTS.len() + EVENTS.len()) as u32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_an_index_of_its_own() {
        let mut seen = [false; COUNTERS as usize];
        let verdicts = HOOKS.into_iter().flat_map(|h| VERDICTS.into_iter().map(move |v| counter(h, v)));
        for index in verdicts.chain(EVENTS.into_iter().map(Event::counter)) {
            assert!(!core::mem::replace(&mut seen[index as usize], true), "{index} twice");
        }
        assert!(seen.iter().all(|s| *s));
    }
}
