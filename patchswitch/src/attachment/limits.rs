//! What a switch would cut although it should not: found before it, and refused or told.
//!
//! * A flow's owner is found by asking the kernel for its socket. A socket that is bound to a device
//!   (`SO_BINDTODEVICE`) is found by packets of that device only, and the question is asked on another one.
//! * A client of Multipath TCP (RFC 8684) may add a path to a connection at any time, by a SYN with a token that only the
//!   partition with the connection knows. After a switch it goes to the other one, which refuses it
//!   (`MPTcpExt.MPJoinNoTokenFound`, which `status` shows); the connection goes on with the paths that it has.

use std::net::{IpAddr, SocketAddr};

use patchswitch_common::Slot;

use super::record::{Record, SlotRecord};
use super::{AttachError, SwitchOptions, flows};
use crate::host::linux::netns::Netns;
use crate::host::linux::sockets::{Protocol, Socket};
use crate::host::linux::{counters, netns};

/// Refuses a switch whose retiring side has sockets that its packets would not be matched with.
pub(super) fn bound_to_device(
    slot: &SlotRecord,
    netns: &Netns,
    (sockets, addresses): (&[Socket], &[IpAddr]),
    options: SwitchOptions,
) -> Result<(), AttachError> {
    // A partition that has lost its link has no flow to lose.
    let Some(link) = netns.run(|| netns::link_index(&slot.inner_link))? else { return Ok(()) };
    let Some(end) = lost(sockets, addresses, link).next() else { return Ok(()) };
    let what = format!(
        "the socket {end} of {} is bound to the device {} (SO_BINDTODEVICE): its connections cannot be told from new \
         ones, and a switch would cut them",
        slot.netns, slot.inner_link
    );
    // To the letter nobody asks for sockets, and all connections are cut.
    if options.letter {
        return Ok(());
    }
    if options.despite_losses {
        tracing::warn!("{what}");
        return Ok(());
    }
    Err(AttachError::Refused(format!(
        "{what}; nothing was switched; bind it to the service address instead of a device"
    )))
}

/// Sockets of the service that only packets of a device find. Unconnected ones of UDP are nobody's flow: what they answer is
/// remembered. A connected one is the service's if others wait for its clients at the same port; else the partition itself
/// asks somebody.
fn lost<'a>(
    sockets: &'a [Socket],
    addresses: &'a [IpAddr],
    link: u32,
) -> impl Iterator<Item = SocketAddr> + 'a {
    let served = flows::ports(sockets, addresses).udp;
    let is_asked = move |socket: &&Socket| {
        let is_served = socket.is_connected() && served.contains(&socket.local.port());
        socket.protocol == Protocol::Tcp || is_served
    };
    let bound = sockets.iter().filter(is_asked).filter(|socket| socket.device() != 0);
    let ours = move |socket: &&Socket| {
        let local = socket.local.ip();
        addresses.contains(&local) || local.is_unspecified() && socket.device() == link
    };
    bound.filter(ours).map(|socket| socket.local)
}

/// Tells that clients of Multipath TCP may lose the paths that they add.
pub(super) fn tell_of_multipath(slot: &SlotRecord, netns: &Netns) {
    // Connections that clients have opened with it since the namespace is there.
    let opened = netns.run(|| counters::read("MPTcpExt", "MPCapableACKRX"));
    if let Ok(Ok(Some(count))) = opened
        && count > 0
    {
        tracing::warn!(
            "{} has had {count} connections of Multipath TCP: paths that their clients add after the switch are \
             refused, and they go on with those that they have",
            slot.netns
        );
    }
}

impl Record {
    /// How many paths of Multipath TCP (RFC 8684 3.2) the partition in a slot has refused since its network namespace is
    /// there, because it has no such connection; after a switch the other one has it. Only root may look.
    ///
    /// `None`: nobody is there, it cannot be asked, or its kernel does not count them.
    pub fn paths_refused(&self, slot: Slot) -> Option<u64> {
        let netns = super::flows::netns(self, slot).ok()?;
        netns.run(|| counters::read("MPTcpExt", "MPJoinNoTokenFound")).ok()?.ok()?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(protocol: Protocol, local: &str, device: u32) -> Socket {
        Socket::listening(protocol, local.parse().unwrap(), device)
    }

    #[test]
    fn only_sockets_of_the_service_that_a_device_hides_are_lost() {
        let addresses = ["192.0.2.80".parse().unwrap()];
        let lost = |socket: &Socket| lost(std::slice::from_ref(socket), &addresses, 2).count();
        for (protocol, local, device, count) in [
            (Protocol::Tcp, "0.0.0.0:80", 2, 1),
            (Protocol::Tcp, "[::]:80", 2, 1),
            (Protocol::Tcp, "192.0.2.80:80", 3, 1),
            // Nobody's device, another service's address, another service's device.
            (Protocol::Tcp, "0.0.0.0:80", 0, 0),
            (Protocol::Tcp, "192.0.2.9:80", 2, 0),
            (Protocol::Tcp, "0.0.0.0:80", 3, 0),
            (Protocol::Udp, "0.0.0.0:80", 2, 0),
        ] {
            assert_eq!(lost(&socket(protocol, local, device)), count, "{protocol:?} {local} {device}");
        }
        // A flow of its own, which is looked up.
        let mut connected = socket(Protocol::Udp, "192.0.2.80:80", 2);
        connected.state = 1;
        assert_eq!(lost(&connected), 0, "it asks somebody");
        let served = [connected, socket(Protocol::Udp, "0.0.0.0:80", 0)];
        assert_eq!(super::lost(&served, &addresses, 2).count(), 1);
    }
}
