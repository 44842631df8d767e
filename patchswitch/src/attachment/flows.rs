//! Which flows a partition has, asked from the kernel: to look needs no lock.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use patchswitch_common::Slot;
use serde::Serialize;

use super::{AttachError, Attachment, Gone, Record, ServicePorts, SwitchOptions, here, limits, preflight};
use crate::dataplane::{Dataplane, to_wire};
use crate::host::linux::netns::{Netns, NetnsRef};
use crate::host::linux::sockets::{self, Protocol, Socket};
use crate::names::Name;

/// An attachment, to be looked at: without its lock, so that a job, a switch or a drain under way is not in the way.
///
/// What it shows is true at one moment of a course that goes on.
#[derive(Debug)]
pub struct View {
    record: Record,
    plane: Dataplane,
}

impl View {
    /// Looks at an attachment. Root only, in the network namespace in which it was made.
    ///
    /// # Errors
    /// [`RecordError::Unknown`](super::RecordError::Unknown), [`AttachError::Refused`] from another namespace, or
    /// [`DataplaneError::NotAttached`](crate::dataplane::DataplaneError::NotAttached) if its pins are gone.
    pub fn open(name: &Name) -> Result<Self, AttachError> {
        preflight::root()?;
        let record = Record::load(name)?;
        here(&record)?;
        Ok(Self { plane: Dataplane::open(name)?, record })
    }

    /// What it consists of.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Its data path.
    pub fn plane(&self) -> &Dataplane {
        &self.plane
    }

    /// The flows of the partition in a slot that use a service address.
    ///
    /// # Errors
    /// [`AttachError::Sockets`]; [`AttachError::Netns`] if the partition left meanwhile.
    pub fn flows(&self, slot: Slot) -> Result<Flows, AttachError> {
        flows(&self.record, &self.plane, slot)
    }

    /// Whether a switch would be refused because the side that serves has sockets whose flows it would cut.
    ///
    /// # Errors
    /// [`AttachError::Refused`] if so; [`AttachError::Sockets`], [`AttachError::Netns`].
    pub fn check_switch(&self, options: SwitchOptions) -> Result<(), AttachError> {
        let active = self.plane.word().active();
        let Some(slot) = &self.record.slots[active as usize] else { return Ok(()) };
        let netns = netns(&self.record, active)?;
        let sockets = sockets::all(&netns)?;
        limits::bound_to_device(slot, &netns, (&sockets, &self.record.addresses), options)
    }
}

/// The flows of one partition.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Flows {
    /// Connections that the service accepted, or is about to: the drain waits for these.
    pub accepted: Vec<Flow>,
    /// Connections that the partition itself opened: listed, not waited for.
    pub outgoing: Vec<Flow>,
    /// Connections that wait in a listener's queue for being accepted. Closing the listener would reset them.
    pub queued: u32,
    /// Learned flows that are not idle for too long: UDP and ICMP.
    pub learned: usize,
    #[serde(skip)]
    pub(super) sockets: Vec<Socket>,
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Flow {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// The partition's end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// State as the kernel names it, in lower case.
    pub state: &'static str,
}

impl Flows {
    /// How many flows the drain waits for, of every kind: connections, accepted or waiting for it, and learned flows.
    ///
    /// The kernel lists a connection in a listener's queue among the others as well, so it is not counted twice; a
    /// queue that has more of them is one of connections to other addresses than the service's.
    pub fn count(&self) -> usize {
        self.accepted
            .len()
            .max(usize::try_from(self.queued).unwrap_or(usize::MAX))
            .saturating_add(self.learned)
    }

    /// Whether nothing is left that the drain waits for.
    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }
}

fn state_name(state: u8) -> &'static str {
    match state {
        1 => "established",
        2 => "syn-sent",
        3 | 12 => "syn-recv",
        4 => "fin-wait-1",
        5 => "fin-wait-2",
        8 => "close-wait",
        9 => "last-ack",
        11 => "closing",
        _ => "unknown",
    }
}

impl Attachment {
    /// The flows of the partition in a slot that use a service address.
    ///
    /// # Errors
    /// [`AttachError::Sockets`].
    pub fn flows(&self, slot: Slot) -> Result<Flows, AttachError> {
        flows(self.record(), self.plane(), slot)
    }
}

/// The network namespace of the partition in a slot.
pub(super) fn netns(record: &Record, slot: Slot) -> Result<Netns, AttachError> {
    let entry = record.slots[slot as usize].as_ref();
    let none = || AttachError::Refused(format!("{} has no second partition", record.name));
    Ok(Netns::open(&NetnsRef::Path(entry.ok_or_else(none)?.held.clone()))?)
}

fn flows(record: &Record, plane: &Dataplane, slot: Slot) -> Result<Flows, AttachError> {
    if record.gone(slot) == Some(Gone::Namespace) {
        return Ok(Flows::default());
    }
    let all = sockets::all(&netns(record, slot)?)?;
    let now = ports(&all, &record.addresses);
    let known = &record.service_ports;
    let serves = |socket: &Socket| {
        match socket.protocol {
            Protocol::Tcp => [&known.tcp, &now.tcp],
            Protocol::Udp => [&known.udp, &now.udp],
        }
        .iter()
        .any(|ports| ports.contains(&socket.local.port()))
    };
    let ours = |socket: &Socket| record.addresses.contains(&socket.local.ip());
    let mut flows = Flows::default();
    // What the partition has begun itself, by sockets that know their other end.
    let mut begun = HashSet::new();
    for socket in all {
        if socket.is_listener() {
            let wide = socket.local.ip().is_unspecified() || ours(&socket);
            flows.queued += if wide { socket.receive_queue } else { 0 };
        } else if socket.is_connected() && ours(&socket) {
            let flow = flow(&socket);
            if serves(&socket) {
                flows.accepted.push(flow);
                flows.sockets.push(socket);
            } else {
                if socket.protocol == Protocol::Udp {
                    let (remote, local) = (socket.remote, socket.local.port());
                    let _ = begun.insert((to_wire(remote.ip()), remote.port(), local));
                }
                flows.outgoing.push(flow);
            }
        }
    }
    flows.learned = plane.learned_but(slot, &begun)?;
    Ok(flows)
}

fn flow(socket: &Socket) -> Flow {
    let protocol = match socket.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    Flow { protocol, local: socket.local, remote: socket.remote, state: state_name(socket.state) }
}

/// The ports on which somebody waits for flows to one of the addresses.
pub(super) fn ports(sockets: &[Socket], addresses: &[IpAddr]) -> ServicePorts {
    let of = |protocol| {
        let waits = |s: &&Socket| s.protocol == protocol && !s.is_connected();
        let hears = |s: &&Socket| s.local.ip().is_unspecified() || addresses.contains(&s.local.ip());
        let waiting = sockets.iter().filter(waits).filter(hears);
        let mut ports: Vec<u16> = waiting.map(|s| s.local.port()).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    };
    ServicePorts { tcp: of(Protocol::Tcp), udp: of(Protocol::Udp) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_flow_counts_and_none_twice() {
        let local = SocketAddr::from(([192, 0, 2, 80], 80));
        let flow = Flow { protocol: "tcp", local, remote: local, state: "established" };
        let flows = |accepted, queued, learned| Flows {
            accepted: vec![flow.clone(); accepted],
            queued,
            learned,
            ..Flows::default()
        };
        assert!(flows(0, 0, 0).is_empty());
        for (accepted, queued, learned, count) in
            [(2, 0, 0, 2), (2, 2, 0, 2), (0, 3, 0, 3), (0, 0, 4, 4), (2, 1, 4, 6)]
        {
            let flows = flows(accepted, queued, learned);
            assert_eq!((flows.count(), flows.is_empty()), (count, false), "{flows:?}");
        }
    }
}
