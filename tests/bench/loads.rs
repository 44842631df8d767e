//! Rows 1 and 2 under loads that are parts of what the slowest peer can carry at most: its knee.
//!
//! ```text
//!  knee of each peer ─► the slowest one's ─► 30, 60, 90 % of it: each peer, a quiet time, then many switches
//! ```
//!
//! Without probes: they would be a load of their own, and the knee is measured without them.

use std::time::Duration;

use anyhow::{Context as _, Result};
use patchswitch_load::client::Settings;
use patchswitch_load::knee::{self, KneeSettings};
use patchswitch_load::report;
use patchswitch_tests::netlab::SERVICE;
use patchswitch_tests::traffic::{Load, PORT, Server};

use crate::peers::{self, PRODUCT, Peer, Side};
use crate::plan::{Scale, Selection};
use crate::report::{Figure, Found, Target, say};
use crate::window::{many, window};

/// What part of the knee is asked for, in percent.
const LEVELS: [u8; 3] = [30, 60, 90];
/// Who is asked for a knee: the rest carry packets as one of them does.
const KINDS: [&str; 5] = [PRODUCT, peers::BRIDGE, peers::NFT, peers::HAPROXY, peers::IPVS];
/// Between two switches.
const PACE: Duration = Duration::from_millis(50);
/// The kept connections are open and busy then.
const WARM_UP: Duration = Duration::from_secs(1);

/// Measures all peers under all of these loads.
pub(crate) fn measure(scale: Scale, selection: &Selection, found: &mut Found) -> Result<()> {
    let wanted = |key: &str| {
        let is_wanted = key == PRODUCT || scale.level_peers().contains(&key) && selection.peer(key);
        is_wanted && peers::hindrance(key).is_none()
    };
    let (slowest, knee) = slowest(wanted)?;
    for level in LEVELS {
        let rate = knee * f64::from(level) / 100.0;
        say(&format!("    {level} % of the knee of {slowest}: {rate:.0} requests a second"));
        let all = peers::ALL.into_iter().map(|(key, _)| key);
        for key in [PRODUCT].into_iter().chain(all).filter(|key| wanted(key)) {
            let mut peer = peers::make(key)?;
            let switches = scale.switches_at_level(peer.settles_s() > 0.0);
            let measured = Measured::of(peer.as_mut(), rate, switches)
                .with_context(|| format!("{key} under {rate:.0} requests a second"))?;
            measured.report(key, level, found);
        }
    }
    Ok(())
}

/// The peer that falls behind first, and at how many requests a second.
fn slowest(wanted: impl Fn(&str) -> bool) -> Result<(&'static str, f64)> {
    let mut found: Option<(&'static str, f64)> = None;
    for key in KINDS.into_iter().filter(|key| wanted(key)) {
        let peer = peers::make(key)?;
        prepare_client(peer.as_ref())?;
        let _server = Server::start(peer.ns(Side::A), "a")?;
        let settings = settings(KneeSettings::default().first)?;
        let knee = peer.lab().client.enter(|| Ok(knee::measure(&settings, &KneeSettings::default())?))?;
        let rate =
            knee.rate.with_context(|| format!("{key} does not even carry {:.0} a second", settings.rate))?;
        say(&format!("    {key}: keeps up with {rate:.0} requests a second"));
        if found.is_none_or(|(_, slowest)| rate < slowest) {
            found = Some((key, rate));
        }
    }
    found.context("there is no peer")
}

/// Half of the requests are on connections of their own, thousands a second: without more ports, and their use again
/// after a second in TIME_WAIT, the client would have none left within ten seconds.
fn prepare_client(peer: &dyn Peer) -> Result<()> {
    let client = &peer.lab().client;
    client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    client.sysctl("net/ipv4/tcp_tw_reuse", "1")
}

fn settings(rate: f64) -> Result<Settings> {
    Ok(Settings {
        rate,
        connections: 32,
        renew: Duration::from_secs(2),
        ..Settings::new(vec![SERVICE[0].parse()?], PORT)
    })
}

/// What became of a peer under a load.
struct Measured {
    rate: f64,
    switches: u32,
    requests: u64,
    failed: u64,
    /// Connections reset or timed out while it switched, and in as much time without a switch.
    broken: [f64; 2],
    /// How late the client was at most, in milliseconds.
    late_ms: f64,
}

impl Measured {
    fn of(peer: &mut dyn Peer, rate: f64, switches: u32) -> Result<Self> {
        prepare_client(peer)?;
        let _servers = [Server::start(peer.ns(Side::A), "a")?, Server::start(peer.ns(Side::B), "b")?];
        let load = Load::start(&peer.lab().client, settings(rate)?);
        std::thread::sleep(WARM_UP);
        peer.prepare()?;
        let pace = PACE + Duration::from_secs_f64(peer.settles_s());
        let quiet = window(peer, pace * switches, None)?;
        let (switched, _) = many(peer, switches, pace)?;
        let run = load.stop()?;
        let during = run.stats(report::Window { from_ns: switched.from_ns, to_ns: run.ended_ns });
        let longer = switched.seconds() / quiet.seconds();
        Ok(Self {
            rate,
            switches,
            requests: during.requests,
            failed: during.failed,
            broken: [switched.trouble.broken as f64, quiet.trouble.broken as f64 * longer],
            late_ms: run.lag.longest_ms,
        })
    }

    fn report(&self, key: &str, level: u8, found: &mut Found) {
        let each = |count: f64| count / f64::from(self.switches);
        let must = |figure: Figure, limit: f64| {
            if key == PRODUCT { figure.must(Target::AtMost(limit)) } else { figure }
        };
        let Self { rate, switches, requests, failed, broken: [broken, quiet], late_ms } = self;
        let bound = if *failed == 0 { bound(*requests) } else { String::new() };
        let value = |row, what: &str, value| {
            let metric = format!("{what}, at {level} % of the knee");
            Figure::values(row, &metric, key, "per switch", &[value])
        };
        let note =
            format!("{failed} of {requests} requests in {switches} switches at {rate:.0} a second{bound}");
        found.add(must(value(1, "requests failed", each(*failed as f64)), 0.0).note(note));
        let note = format!("the load was at most {late_ms:.1} ms late");
        found.add(must(value(2, "connections broken", each(*broken)), each(*quiet)).note(note));
    }
}

/// Nothing in n means, with a confidence of 95 %, fewer than 3 in n.
pub(crate) fn bound(requests: u64) -> String {
    format!(": fewer than {:.1e} of them fail", 3.0 / requests as f64)
}
