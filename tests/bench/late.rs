//! Rows 5 and 6, what is patchswitch's own of it: a SYN that comes to the hook after the store and goes to the old side,
//! or one that comes before the store and goes to the new one.
//!
//! Connections are opened as fast as it goes, and a BPF program ahead of ours says when each came. If in none of n switches
//! one went the wrong way, the store takes effect, with a confidence of 95 %, within 3/n of the time between two of them.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::flip::{Acceptor, under};
use crate::peers::{PRODUCT, Peer as _, Product, Side};
use crate::plan::Scale;
use crate::probe::TCP_PROBE;
use crate::report::{Figure, Found, Target};
use crate::seen::Seen;
use crate::stats::{at_most, median};

/// How long connections are opened before a store, and after it.
const AROUND: Duration = Duration::from_millis(10);
/// How long those that are open may take to be accepted.
const ACCEPTED: Duration = Duration::from_millis(30);
const LATE_US: f64 = 1.0;

/// Connections around a store.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Around {
    /// How many went the wrong way.
    wrong: usize,
    /// The time between two of them, in microseconds.
    gap_us: f64,
}

/// Finds it: a moment before the store and one after it, and when the connections came that each side accepted, in
/// nanoseconds. Nothing if a side has none.
fn around([before, after]: [u64; 2], old: &[u64], new: &[u64]) -> Option<Around> {
    let wrong = old.iter().filter(|at| **at > after).count() + new.iter().filter(|at| **at < before).count();
    let mut all: Vec<u64> = old.iter().chain(new).copied().collect();
    all.sort_unstable();
    let gaps: Vec<f64> = all.windows(2).map(|two| (two[1] - two[0]) as f64 / 1e3).collect();
    (!new.is_empty() && !old.is_empty()).then(|| Around { wrong, gap_us: median(&gaps) })
}

/// Measures both rows.
pub(crate) fn measure(
    product: &Product,
    acceptors: &[Acceptor; 2],
    scale: Scale,
    found: &mut Found,
) -> Result<()> {
    let seen = Seen::at(&product.lab().host, TCP_PROBE)?;
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for _ in 0..scale.stores() {
        there.push(store(product, acceptors, &seen, Side::B)?);
        back.push(store(product, acceptors, &seen, Side::A)?);
    }
    for (row, metric, stores) in
        [(5, "store to its effect, at most", &there), (6, "rollback to its effect, at most", &back)]
    {
        found.add(figure(row, metric, stores));
    }
    Ok(())
}

fn store(product: &Product, acceptors: &[Acceptor; 2], seen: &Seen, to: Side) -> Result<Around> {
    let (stored, _) = under(&product.lab().client, [Duration::ZERO, AROUND, AROUND], || product.store(to))?;
    std::thread::sleep(ACCEPTED);
    let times = |side: Side| -> Result<Vec<u64>> {
        let ports = acceptors[side as usize].accepted().into_iter().map(|(port, _)| seen.when(port));
        Ok(ports.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    };
    around(stored, &times(to.other())?, &times(to)?).context("a side accepted nothing around the store")
}

fn figure(row: u8, metric: &str, stores: &[Around]) -> Figure {
    let wrong: usize = stores.iter().map(|around| around.wrong).sum();
    let gap_us = median(&stores.iter().map(|around| around.gap_us).collect::<Vec<_>>());
    let count = stores.len();
    let limit = at_most(wrong) / count as f64 * gap_us;
    let note = format!("{wrong} went the wrong way in {count} switches, with one each {gap_us:.1} µs; 95 %");
    Figure::values(row, metric, PRODUCT, "µs", &[limit]).must(Target::AtMost(LATE_US)).note(note)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_the_wrong_way_is_seen_on_both_sides_of_the_store() {
        let moments = [5_000, 6_000];
        let found = around(moments, &[1_000, 3_000, 5_500], &[5_600, 7_000, 9_000]).unwrap();
        assert_eq!(found.wrong, 0, "what came during the store may go either way");
        assert_eq!(found.gap_us, 2.0);
        assert_eq!(around(moments, &[1_000, 6_001], &[7_000]).unwrap().wrong, 1, "late");
        assert_eq!(around(moments, &[1_000], &[4_999, 7_000]).unwrap().wrong, 1, "early");
        assert_eq!(around(moments, &[], &[7_000]), None);
    }

    #[test]
    fn none_in_many_is_three_in_as_many_at_most() {
        let none = figure(5, "m", &[Around { wrong: 0, gap_us: 20.0 }; 100]);
        assert!((none.row.ratio_median - 0.6).abs() < 0.01 && none.reached == Some(true), "{none:?}");
        let one = figure(5, "m", &[Around { wrong: 1, gap_us: 20.0 }; 100]);
        assert!(one.row.ratio_median > 20.0 && one.reached == Some(false), "{one:?}");
    }
}
