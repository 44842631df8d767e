//! How another partition gets a service.
//!
//! | strategy | new flows | flows that there are | what goes over | figures of the patent |
//! |---|---|---|---|---|
//! | `takeover` | to the new one at once | stay with the old one | a pointer | 21 to 26, and more |
//! | `quiesce` | wait | its command ends them | the disk of a single writer | 13, 15: without a refusal |
//! | `device` | wait | end first | the network device | 13, 14 |
//! | `address` | wait | end first | the address at an uplink of its own | 15 to 17 |
//! | `letter` | to the new one at once | go there as well, and are reset | a pointer | 21 to 26, to the letter |

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::duration;

/// How another partition gets a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Strategy {
    /// New flows go to the new partition, those that there are stay with the old one. The default.
    #[default]
    Takeover,
    /// New flows wait while the old partition ends its work and gives its disk to the new one.
    Quiesce(Quiesce),
    /// New flows wait while those of the old partition end and the two change their network devices: see
    /// [`Exchange::Device`](crate::attachment::Exchange::Device).
    Device(Exchange),
    /// New flows wait while those of the old partition end and the address goes from its uplink to the new one's: see
    /// [`Exchange::Address`](crate::attachment::Exchange::Address).
    Address(Exchange),
    /// Everything that is sent to the service goes to the new partition at once: see
    /// [`SwitchOptions::letter`](crate::attachment::SwitchOptions::letter).
    Letter,
}

/// `[service.quiesce]`: what is done with a single writer while new flows wait. The commands are of the shell, and are
/// run inside the partition. What they are for may be so already: then they have nothing to do and end with 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quiesce {
    /// Ends what clients do, and returns when that has ended; nothing: `stop` does that as well.
    pub finish: Option<String>,
    /// Ends the server, and returns when it has ended: nothing of it may have the disk open.
    pub stop: String,
    /// Begins it, and returns when it serves.
    pub start: String,
    /// How long new flows may wait for all of this.
    #[serde(with = "duration")]
    pub hold: Duration,
}

/// `[service.exchange]`: how long new flows wait for what goes over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// How long new flows may wait for all of it: half of this for the flows of the old partition to end.
    #[serde(with = "duration")]
    pub hold: Duration,
    /// What becomes of those that do not.
    pub on_deadline: Left,
}

/// What becomes of flows that do not end although new ones wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Left {
    /// Nothing is switched, and the flows that waited go to the old partition. The default.
    Abort,
    /// They are reset, counted, and the job ends with 24.
    Reset,
}

impl Strategy {
    /// Its name in the configuration.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Takeover => "takeover",
            Self::Quiesce(_) => "quiesce",
            Self::Device(_) => "device",
            Self::Address(_) => "address",
            Self::Letter => "letter",
        }
    }

    /// For how long new flows may wait at a switch, if they do.
    pub const fn hold(&self) -> Option<Duration> {
        match self {
            Self::Quiesce(quiesce) => Some(quiesce.hold),
            Self::Device(exchange) | Self::Address(exchange) => Some(exchange.hold),
            Self::Takeover | Self::Letter => None,
        }
    }

    /// Whether both partitions answer for a while, so that flows without a socket of their own have to be remembered before a
    /// switch.
    pub const fn is_shared(&self) -> bool {
        self.hold().is_none()
    }
}
