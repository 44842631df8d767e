//! The packets of the tables once more, in other buffers, where the kernel makes such for a test: as a card hands them over that
//! has summed them (CHECKSUM_COMPLETE), and with all but the link header in pages. Whose they are, and what comes out, is the same.

use std::collections::BTreeMap;

use anyhow::ensure;
use aya::maps::PerCpuValues;
use patchswitch_common::maps::{FlowKey, FlowRecord};
use patchswitch_common::verdict::Hook;

use crate::bench::{Bench, Done, Link, Seen};
use crate::sums;

/// The learned flows.
pub(crate) type Flows = Vec<(FlowKey, FlowRecord)>;
/// All counters, and how often programs were run.
pub(crate) type Counts = (Vec<PerCpuValues<u64>>, BTreeMap<&'static str, u64>);

impl Bench {
    /// Sends a packet through a program, and then in other buffers. What that counts and remembers is taken back.
    pub(crate) fn run_in_all(&mut self, hook: Hook, on: Link, frame: &[u8]) -> anyhow::Result<Seen> {
        let flows = self.flows()?;
        let seen = self.run(hook, on, 0, frame)?;
        let after = (self.flows()?, self.counts()?);
        for other in [Self::summed, Self::in_pages] {
            self.put_back(&flows)?;
            if let Some(done) = other(self, hook, on, frame)? {
                ensure!(
                    done == (seen.action, seen.frame.clone()),
                    "in another buffer: {done:?}, not {seen:?}"
                );
            }
        }
        self.put_back(&after.0)?;
        self.set_counts(after.1)?;
        Ok(seen)
    }

    fn summed(&mut self, hook: Hook, on: Link, frame: &[u8]) -> anyhow::Result<Option<Done>> {
        sums::summed(self, hook, on, frame)
    }

    fn in_pages(&mut self, hook: Hook, on: Link, frame: &[u8]) -> anyhow::Result<Option<Done>> {
        if hook != Hook::Uplink {
            return Ok(None);
        }
        Ok(self.run_in_pages(on, frame)?.map(|seen| (seen.action, seen.frame)))
    }
}
