//! How many requests a second a peer takes before it falls behind: its knee. Loads of the others are shares of the slowest
//! one's.

use std::time::Duration;

use anyhow::{Context as _, Result};
use patchswitch_load::client::Settings;
use patchswitch_load::report::Run;
use patchswitch_tests::netlab::SERVICE;
use patchswitch_tests::traffic::{Load, PORT, Server};

use crate::peers::{self, Peer, Side};
use crate::plan::Selection;
use crate::report::say;
use crate::stats::quantile;

/// Requests a second at first, and by how much more each time.
const FIRST: f64 = 500.0;
const STEP: f64 = 1.3;
/// No more than these: the client itself has a processor only.
const LAST: f64 = 20_000.0;
/// How long each rate is tried.
const TRY: Duration = Duration::from_millis(700);
/// A peer that answers later than this has fallen behind, in milliseconds.
const LATE_MS: f64 = 20.0;

/// The load of all measurements under load, at a rate.
pub(crate) fn load(rate: f64) -> Result<Settings> {
    let (connections, renew) = (8, Duration::from_secs(2));
    Ok(Settings { rate, connections, renew, ..Settings::new(vec![SERVICE[0].parse()?], PORT) })
}

/// The slowest peer that there is, and its knee.
pub(crate) fn slowest(selection: &Selection) -> Result<(&'static str, f64)> {
    let mut found: Option<(&'static str, f64)> = None;
    // Those that carry packets are alike; one that carries connections is another thing.
    for key in [peers::PRODUCT, peers::BRIDGE, peers::NFT, peers::HAPROXY] {
        if peers::hindrance(key).is_some() || key != peers::PRODUCT && !selection.peer(key) {
            continue;
        }
        let peer = peers::make(key)?;
        let knee = of(peer.as_ref())?;
        say(&format!("    {key}: falls behind above {knee:.0} requests a second"));
        if found.is_none_or(|(_, slowest)| knee < slowest) {
            found = Some((key, knee));
        }
    }
    found.context("there is no peer")
}

fn of(peer: &dyn Peer) -> Result<f64> {
    let _server = Server::start(peer.ns(Side::A), "a")?;
    let (mut rate, mut reached) = (FIRST, FIRST);
    while rate <= LAST {
        let load = Load::start(&peer.lab().client, load(rate)?);
        std::thread::sleep(TRY);
        if has_fallen_behind(&load.stop()?) {
            break;
        }
        reached = rate;
        rate *= STEP;
    }
    Ok(reached)
}

/// Whether requests failed, were answered late, or were not even sent in time.
fn has_fallen_behind(run: &Run) -> bool {
    let answers = run.answers.iter().flat_map(|series| series.iter());
    let mut late: Vec<f64> = answers.map(|answer| f64::from(answer.latency_us) / 1e3).collect();
    late.sort_by(f64::total_cmp);
    !run.failures.is_empty()
        || late.is_empty()
        || quantile(&late, 0.99) > LATE_MS
        || run.lag.longest_ms > LATE_MS
}
