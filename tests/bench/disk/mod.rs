//! The measurements of clones: `cargo xtask bench disk`, in a machine with device-mapper.
//!
//! ```text
//!  ground (images on one disk, a file system for all) ─► clone (13), stall (14), writes (15),
//!                                                                standby (16), merge (17)
//!                       peers: LVM thick and thin, btrfs, a plain copy
//! ```
//!
//! Everything lies on images of one disk, the peers' volumes as well: what differs is what keeps the old content.

mod clone;
mod ground;
mod merge;
mod peers;
mod stall;
mod standby;
mod writer;
mod writes;

use anyhow::Result;

use crate::plan::Selection;
use crate::report::{Found, say};
use ground::Ground;

/// The rows that are measured here, and what they say.
pub(crate) const ROWS: [(u8, &str); 5] = [
    (13, "time to clone against the size of the disk, and against peers"),
    (14, "how long a writer waits at the cut, over a bare suspend and resume"),
    (15, "write throughput while the clone exists, first and second time"),
    (16, "from the start of a standby until it serves, over crun alone"),
    (17, "merge bandwidth, over a plain copy; how long a writer waits meanwhile"),
];

/// The keys of those with whom clones are compared.
pub(crate) fn keys() -> impl Iterator<Item = &'static str> {
    peers::Peer::ALL.into_iter().map(peers::Peer::key)
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    pub(crate) quick: bool,
}

impl Scale {
    /// Rounds of everything.
    pub(crate) fn rounds(self) -> usize {
        if self.quick { 5 } else { 15 }
    }
}

/// Measures what is selected.
pub(crate) fn measure(scale: Scale, selection: &Selection, found: &mut Found) -> Result<()> {
    let ground = Ground::new()?;
    if selection.rows(&[13]) {
        say("\nthe time to clone (row 13)");
        clone::measure(&ground, scale, selection, found)?;
    }
    if selection.rows(&[14]) {
        say("\na writer at the cut (row 14)");
        stall::measure(&ground, scale, selection, found)?;
    }
    if selection.rows(&[15]) {
        say("\nwriting beside a clone (row 15)");
        writes::measure(&ground, scale, selection, found)?;
    }
    if selection.rows(&[16]) {
        say("\nfrom the start of a standby until it serves (row 16)");
        standby::measure(&ground, scale, found)?;
    }
    if selection.rows(&[17]) {
        say("\nthe merge (row 17)");
        merge::measure(&ground, scale, found)?;
    }
    ground.finish()
}
