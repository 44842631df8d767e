//! Why something could not be attached, switched or detached.

use super::record::RecordError;
use crate::dataplane::DataplaneError;
use crate::exit::ExitCode;
use crate::host::linux::netlink::NetlinkError;
use crate::host::linux::netns::NetnsError;
use crate::host::linux::sockets::SocketsError;
use crate::host::linux::sysctl::SysctlError;
use crate::names::Name;

/// Why something could not be attached, switched or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The data path.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// A namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The network.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A kernel setting.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The list of sockets.
    #[error(transparent)]
    Sockets(#[from] SocketsError),
    /// Somebody has packets wait, who is gone.
    #[error(
        "packets of {name} wait, and whoever holds them is gone: in {} ms they go on by themselves; type the same again then",
        left.as_millis()
    )]
    Waiting {
        /// The attachment.
        name: Name,
        /// For how much longer.
        left: std::time::Duration,
    },
    /// The queue in which packets wait.
    #[error("failed to have packets wait in the queue of a TAP device, as the kernel's module tun has them")]
    Queue {
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A partition cannot use an address that it was given.
    #[error("{address} cannot be used in the partition that was given it")]
    NotTaken {
        /// The address.
        address: std::net::IpAddr,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// An address could not be announced.
    #[error("failed to send frames on {link}")]
    Announce {
        /// The uplink.
        link: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A link inside a partition could not be made to take what XDP redirects.
    #[error(
        "failed to switch generic receive offload on for {link} in network namespace {netns}, as XDP needs it"
    )]
    Receive {
        /// The link inside.
        link: String,
        /// The namespace.
        netns: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// What a network namespace counts could not be read.
    #[error("failed to read the counters of network namespace {netns}")]
    Counters {
        /// The namespace.
        netns: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Neighbours cannot be heard.
    #[error("failed to listen to neighbours on {link}")]
    Listen {
        /// The uplink.
        link: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The request makes no sense on this host; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// Not permitted; nothing was changed.
    #[error("this changes network namespaces and loads BPF programs, which only root may")]
    NotRoot,
    /// Whoever made it was killed before it was done.
    #[error("{0} was not made to its end; `patchswitch detach {0}` removes what is there of it")]
    Incomplete(Name),
    /// Flows were in flight that could not be remembered: they would be lost by the switch. Nothing was changed.
    #[error(
        "{packets} packets of flows without a socket found the table of learned flows full; these flows would be cut"
    )]
    LearnFull {
        /// Packets that found no room since the learning began.
        packets: u64,
    },
    /// The switch is made, new flows go to the new partition, but something that belongs to it failed.
    #[error(
        "the switch is made, but not everything that belongs to it: {}; of a service `patchswitch up` mends that, else a \
         switch to where it is",
        causes.join("; ")
    )]
    AfterSwitch {
        /// What failed.
        causes: Vec<String>,
    },
    /// What depends on the phase word is not all as the word says.
    #[error("not everything of {name} follows who serves: {}", causes.join("; "))]
    Unmended {
        /// The attachment.
        name: Name,
        /// What failed.
        causes: Vec<String>,
    },
    /// A service has it, whose record would not follow what is done by hand. Nothing was changed.
    #[error(
        "{name} belongs to the service of that name, which must know of this; nothing was changed; use {instead}"
    )]
    OfService {
        /// The attachment, and the service.
        name: Name,
        /// What to type instead.
        instead: String,
    },
    /// Building failed and was undone, or the undoing failed as well.
    #[error("failed to attach {name}; {undone}")]
    Undone {
        /// The attachment.
        name: Name,
        /// What became of what was built until then.
        undone: String,
        /// Why.
        #[source]
        cause: Box<AttachError>,
    },
    /// Not everything could be removed.
    #[error("failed to remove all of {name}: {}", causes.join("; "))]
    Removal {
        /// The attachment.
        name: Name,
        /// Everything that failed.
        causes: Vec<String>,
    },
}

impl AttachError {
    /// What a command that ends with it says.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Record(RecordError::Busy(_)) | Self::Waiting { .. } => ExitCode::Busy,
            Self::Record(RecordError::Exists(_)) => ExitCode::CannotCreate,
            Self::NotRoot => ExitCode::Permission,
            Self::LearnFull { .. } => ExitCode::GateFailed,
            Self::AfterSwitch { .. } | Self::Unmended { .. } => ExitCode::Io,
            Self::Undone { cause, .. } => cause.exit_code(),
            other if is_denied(other) => ExitCode::Permission,
            _ => ExitCode::Failed,
        }
    }
}

/// Whether the kernel said that this is not permitted, at any depth.
fn is_denied(error: &(dyn std::error::Error + 'static)) -> bool {
    let own = error.downcast_ref::<std::io::Error>();
    own.is_some_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
        || error.source().is_some_and(is_denied)
}
