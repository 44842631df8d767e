//! Sockets of the agent's own probes.
//!
//! A probe must reach the partition it was meant for and no other: a dead standby must not look healthy because the
//! active one answered. Three things see to that, each on its own: the socket is bound to the partition's host-side
//! link; its mark selects a routing table in which the service is behind that link; and the program on the link lets
//! what has the mark pass. A standby's answer passes its quarantine only to a connection that is bound to its link.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use patchswitch_common::Slot;
use socket2::{Domain, Protocol, Socket, Type};

use super::{AttachError, Attachment};
use crate::dataplane;

/// Makes sockets that reach one partition, whoever serves.
#[derive(Clone, Debug)]
pub struct Prober {
    link: String,
    mark: u32,
}

impl Prober {
    /// A TCP socket that is not connected yet. To be called in the host's network namespace, as root.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn socket(&self, address: SocketAddr) -> io::Result<OwnedFd> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.bind_device(Some(self.link.as_bytes()))?;
        socket.set_mark(self.mark)?;
        Ok(socket.into())
    }
}

impl Attachment {
    /// A way to probe the partition in a slot.
    ///
    /// # Errors
    /// [`AttachError::Refused`] if the slot is empty.
    pub fn prober(&self, slot: Slot) -> Result<Prober, AttachError> {
        Ok(Prober { link: self.slot(slot)?.link.clone(), mark: dataplane::probe_mark(slot) })
    }
}
