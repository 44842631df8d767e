//! When SYNs came to the uplink, seen ahead of the product's own program by the clock that BPF programs have.

use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::Result;
use aya::maps::{Array, Map, MapData};
use patchswitch_tests::netlab::{Ns, UPLINK};

use crate::kernel;
use crate::programs::link;

/// Looks on for as long as it lives.
pub(crate) struct Seen {
    times: Array<MapData, u64>,
    _link: OwnedFd,
}

impl Seen {
    /// Looks at SYNs to a port that come to a host's uplink.
    pub(crate) fn at(host: &Ns, port: u16) -> Result<Self> {
        let map = kernel::array_of_ports()?;
        let program = kernel::syn_times(map.as_fd(), port)?;
        let uplink = link(host, UPLINK)?.index;
        let link = host.enter(|| Ok(kernel::first_at_ingress(program.as_fd(), uplink)?))?;
        Ok(Self { times: Array::try_from(Map::Array(MapData::from_fd(map)?))?, _link: link })
    }

    /// When the last SYN from a port came, in nanoseconds of the boot clock; nothing if none did.
    pub(crate) fn when(&self, port: u16) -> Result<Option<u64>> {
        let at = self.times.get(&u32::from(port), 0)?;
        Ok((at != 0).then_some(at))
    }
}
