//! Rows 8 to 11 and 18: the data path at rest and while draining, each compared with the floor and the peers in turn.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use patchswitch_common::maps::{FlowKey, FlowRecord, FragmentKey, FragmentRecord};
use patchswitch_common::parse::protocol::TCP;
use patchswitch_tests::programs;

use crate::flows::Flows;
use crate::packets::{Flooded, Sender, Sink, flood};
use crate::peers::{
    self, AGAIN, BRIDGE, FLOOR, HAPROXY, IPVS, KEEPALIVED, LETTER, NFT, PRODUCT, Peer, Product, Side,
};
use crate::plan::{Scale, Selection};
use crate::report::{Figure, Found, Target, say};
use crate::rr::{Answerer, Asker};
use crate::stats::{Block, abba};

/// Another flow or connection of patchswitch.
const SECOND: &str = "second one";
const PACKETS: &str = "64-byte UDP, steady";
const RR: [(&str, &str); 3] = [("TCP_RR rate", "requests/s"), ("TCP_RR P50", "µs"), ("TCP_RR P99", "µs")];
/// Bytes of a map for a million datagram flows, in MB.
const UDP_MB: f64 = 100.0;

/// A peer with a flow of datagrams and a connection through it.
struct Lane {
    /// Not of a peer that carries no datagrams.
    sender: Option<Sender>,
    asker: Asker,
    sinks: [Sink; 2],
    _answerers: [Answerer; 2],
}

impl Lane {
    fn open(peer: &dyn Peer) -> Result<Self> {
        let sinks = [Sink::start(peer, Side::A)?, Sink::start(peer, Side::B)?];
        let answerers = [Answerer::start(peer, Side::A)?, Answerer::start(peer, Side::B)?];
        let sender = peer.has_udp().then(|| Sender::open(peer)).transpose()?;
        Ok(Self { sender, asker: Asker::open(peer)?, sinks, _answerers: answerers })
    }

    fn sender(&self) -> Result<&Sender> {
        self.sender.as_ref().context("it carries no datagrams")
    }

    fn flood(&self, scale: Scale) -> Result<Flooded> {
        flood(self.sender()?, &self.sinks[Side::A as usize], scale.slot())
    }
}

/// Ratio and target by peer.
fn packets_target(key: &str) -> Option<Target> {
    match key {
        FLOOR => Some(Target::AtLeast(0.97)),
        BRIDGE => Some(Target::AtLeast(1.3)),
        NFT | IPVS => Some(Target::AtLeast(1.0)),
        _ => None,
    }
}

fn rr_target(key: &str, what: usize) -> Option<Target> {
    match (key, what) {
        (FLOOR, 0) => Some(Target::AtLeast(0.97)),
        (BRIDGE, 0) => Some(Target::AtLeast(1.0)),
        (FLOOR, 1) => Some(Target::AtMost(1.01)),
        (FLOOR, 2) => Some(Target::AtMost(1.02)),
        _ => None,
    }
}

fn with(figure: Figure, target: Option<Target>) -> Figure {
    match target {
        Some(target) => figure.must(target),
        None => figure,
    }
}

/// Measures all of these rows.
pub(crate) fn measure(scale: Scale, selection: &Selection, found: &mut Found) -> Result<()> {
    let mut product = Product::new("product")?;
    let mut ours = Lane::open(&product)?;
    let control = control(scale, selection, (&product, &mut ours), found)?;
    // The floor is wanted for the draining as well.
    for key in [FLOOR, BRIDGE, NFT, HAPROXY, IPVS].into_iter().filter(|key| selection.peer(key)) {
        if let Some(reason) = peers::hindrance(key) {
            found.not_run("packets and requests", key, reason);
            continue;
        }
        let peer = peers::make(key)?;
        let mut theirs = Lane::open(peer.as_ref())?;
        compare(scale, selection, (key, &mut theirs, &mut ours), &control, found)?;
    }
    for (key, same) in
        [(KEEPALIVED, BRIDGE), (LETTER, FLOOR)].into_iter().filter(|(key, _)| selection.peer(key))
    {
        if selection.rows(&[8, 10]) {
            found.not_run("packets and requests", key, format!("at rest it is what {same} is"));
        }
    }
    if selection.rows(&[11]) {
        let floor = peers::make(FLOOR)?;
        cycles(scale, &ours, &Lane::open(floor.as_ref())?, ("cycles for a packet, steady", 60.0), found)?;
    }
    if selection.rows(&[9, 11, 18]) {
        draining(scale, selection, (&mut product, &mut ours), &control, found)?;
    }
    if selection.rows(&[18]) {
        conntrack(scale, found)?;
    }
    Ok(())
}

/// What patchswitch is in relation to itself.
struct Control {
    packets: Option<Figure>,
    rr: Vec<Figure>,
}

impl Control {
    fn packets(&self, figure: Figure) -> Figure {
        match &self.packets {
            Some(control) => figure.controlled_by(control),
            None => figure,
        }
    }

    fn rr(&self, what: usize, figure: Figure) -> Figure {
        match self.rr.get(what) {
            Some(control) => figure.controlled_by(control),
            None => figure,
        }
    }
}

fn flood_blocks(scale: Scale, theirs: &Lane, ours: &Lane) -> Result<Vec<Block>> {
    let rate = |path: &Lane| path.flood(scale).map(|flooded| [flooded.rate()]);
    let [blocks] = abba(scale.blocks(), &mut || rate(theirs), &mut || rate(ours))?;
    Ok(blocks)
}

fn rr_blocks(scale: Scale, theirs: &mut Asker, ours: &mut Asker) -> Result<[Vec<Block>; 3]> {
    let slot = scale.slot();
    abba(scale.blocks(), &mut || theirs.converse(slot), &mut || ours.converse(slot))
}

/// The control is the very same flow and connection, measured as if it were two. How far a second one of patchswitch is
/// from the first is measured as well and told, but decides nothing.
fn control(
    scale: Scale,
    selection: &Selection,
    (product, ours): (&Product, &mut Lane),
    found: &mut Found,
) -> Result<Control> {
    let mut control = Control { packets: None, rr: Vec::new() };
    if selection.rows(&[8, 9]) {
        let figure = Figure::ratio(8, PACKETS, AGAIN, "packets/s", &flood_blocks(scale, ours, ours)?);
        found.add(figure.clone());
        control.packets = Some(figure);
        let (sender, sink) = (Sender::open(product)?, &ours.sinks[Side::A as usize]);
        let rate = |sender: &Sender| flood(sender, sink, scale.slot()).map(|flooded| [flooded.rate()]);
        let [blocks] = abba(scale.blocks(), &mut || rate(&sender), &mut || rate(ours.sender()?))?;
        found.add(Figure::ratio(8, PACKETS, SECOND, "packets/s", &blocks));
    }
    if selection.rows(&[9, 10]) {
        let slot = scale.slot();
        let same = RefCell::new(&mut ours.asker);
        let mut ask = || same.borrow_mut().converse(slot);
        let mut again = || same.borrow_mut().converse(slot);
        for (what, blocks) in abba(scale.blocks(), &mut ask, &mut again)?.iter().enumerate() {
            let (metric, unit) = RR[what];
            let figure = Figure::ratio(10, metric, AGAIN, unit, blocks);
            found.add(figure.clone());
            control.rr.push(figure);
        }
        let mut second = Asker::open(product)?;
        for (what, blocks) in rr_blocks(scale, &mut second, &mut ours.asker)?.iter().enumerate() {
            let (metric, unit) = RR[what];
            found.add(Figure::ratio(10, metric, SECOND, unit, blocks));
        }
    }
    Ok(control)
}

fn compare(
    scale: Scale,
    selection: &Selection,
    (key, theirs, ours): (&str, &mut Lane, &mut Lane),
    control: &Control,
    found: &mut Found,
) -> Result<()> {
    if selection.rows(&[8]) && theirs.sender.is_none() {
        found.not_run(PACKETS, key, "it carries no datagrams");
    } else if selection.rows(&[8]) {
        let lost = theirs.flood(scale)?;
        say(&format!(
            "    {key}: {:.0} of {:.0} thousand datagrams a second came to the reader",
            lost.rate() / 1e3,
            lost.sent as f64 / lost.seconds / 1e3
        ));
        let blocks = flood_blocks(scale, theirs, ours)?;
        let figure = Figure::ratio(8, PACKETS, key, "packets/s", &blocks);
        found.add(control.packets(with(figure, packets_target(key))));
    }
    if selection.rows(&[10]) {
        for (what, blocks) in rr_blocks(scale, &mut theirs.asker, &mut ours.asker)?.iter().enumerate() {
            let (metric, unit) = RR[what];
            let figure = Figure::ratio(10, metric, key, unit, blocks);
            found.add(control.rr(what, with(figure, rr_target(key, what))));
        }
    }
    Ok(())
}

/// With many old flows of the side that retires: an old flow of datagrams, which is looked up, not found and remembered,
/// and a new one, which nobody has.
fn draining(
    scale: Scale,
    selection: &Selection,
    (product, ours): (&mut Product, &mut Lane),
    control: &Control,
    found: &mut Found,
) -> Result<()> {
    let floor = peers::make(FLOOR)?;
    let mut theirs = Lane::open(floor.as_ref())?;
    let before = Kept::of(&product.pins())?;
    let old = Flows::open(product, Side::A, scale.old_flows())?;
    product.learn()?;
    ours.sender()?.ask()?;
    product.take_over(Side::B)?;
    let count = old.len();
    let note = format!("with {count} old TCP flows");
    if selection.rows(&[9]) {
        let blocks = flood_blocks(scale, &theirs, ours)?;
        let figure = Figure::ratio(9, "64-byte UDP, draining, old flow", FLOOR, "packets/s", &blocks);
        found.add(control.packets(figure.must(Target::AtLeast(0.90))).note(&note));
        let fresh = Sender::open(product)?;
        let rate = |flooded: Flooded| [flooded.rate()];
        let [blocks] = abba(scale.blocks(), &mut || theirs.flood(scale).map(rate), &mut || {
            flood(&fresh, &ours.sinks[Side::B as usize], scale.slot()).map(rate)
        })?;
        let figure = Figure::ratio(9, "64-byte UDP, draining, new flow", FLOOR, "packets/s", &blocks);
        found.add(control.packets(figure.must(Target::AtLeast(0.90))).note(&note));
        let [blocks, ..] = rr_blocks(scale, &mut theirs.asker, &mut ours.asker)?;
        let figure = Figure::ratio(9, "TCP_RR rate, draining, old flow", FLOOR, "requests/s", &blocks);
        found.add(control.rr(0, figure.must(Target::AtLeast(0.90))).note(&note));
    }
    if selection.rows(&[11]) {
        cycles(scale, ours, &theirs, ("cycles for a packet, draining", 250.0), found)?;
    }
    if selection.rows(&[18]) {
        const SAMPLE: usize = 1000;
        // A byte there and back on each of them: whatever remembers a flow by its packets has seen these.
        let alive = old.alive(SAMPLE)? as f64 / SAMPLE as f64 * 100.0;
        memory(product, (before, count), found)?;
        let figure =
            Figure::values(18, "old TCP flows that are alive while draining", PRODUCT, "%", &[alive]);
        found.add(figure.must(Target::AtLeast(100.0)).note(format!("a sample of {SAMPLE} of {count}")));
    }
    drop(old);
    product.take_over(Side::A)?;
    product.settle()
}

/// Bytes that the kernel has locked for the maps below a directory.
fn locked(pins: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(pins.join("maps"))? {
        sum += memlock(&entry?.path())?;
    }
    Ok(sum)
}

fn memlock(pin: &Path) -> Result<u64> {
    let map = MapData::from_pin(pin)?;
    let fd = map.fd().as_fd().as_raw_fd();
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
    let line = info.lines().find_map(|line| line.strip_prefix("memlock:"));
    Ok(line.context("the kernel does not tell a map's memory")?.trim().parse()?)
}

/// What the programs keep of TCP flows.
struct Kept {
    /// Bytes that the kernel has locked for all maps.
    locked: u64,
    /// Entries of the tables that could have a flow in them.
    entries: usize,
}

impl Kept {
    fn of(pins: &Path) -> Result<Self> {
        let map = |name: &str| MapData::from_pin(pins.join("maps").join(name));
        let learned: HashMap<_, FlowKey, FlowRecord> = HashMap::try_from(Map::HashMap(map("LEARNED")?))?;
        let fragments: HashMap<_, FragmentKey, FragmentRecord> =
            HashMap::try_from(Map::LruHashMap(map("FRAGMENTS")?))?;
        let flows = learned.keys().collect::<Result<Vec<_>, _>>()?;
        let tcp = flows.iter().filter(|key| key.protocol == TCP).count();
        Ok(Self { locked: locked(pins)?, entries: tcp + fragments.keys().count() })
    }
}

fn memory(product: &Product, (before, flows): (Kept, usize), found: &mut Found) -> Result<()> {
    const ENTRIES: f64 = 65_536.0;
    let pins = product.pins();
    let now = Kept::of(&pins)?;
    let entry = memlock(&pins.join("maps/LEARNED"))? as f64 / ENTRIES;
    let entries = now.entries.saturating_sub(before.entries);
    let grown = now.locked.saturating_sub(before.locked) as f64 + entries as f64 * entry;
    let figure = Figure::values(18, "our memory for a TCP flow", PRODUCT, "bytes", &[grown / flows as f64]);
    let note = format!("with {flows} flows, while draining; {entries} of them in our tables");
    found.add(figure.must(Target::AtMost(0.0)).note(note));
    let figure = Figure::values(18, "our memory for a million datagram flows", PRODUCT, "MB", &[entry]);
    found.add(figure.must(Target::AtMost(UDP_MB)));
    Ok(())
}

/// What conntrack needs for the same.
fn conntrack(scale: Scale, found: &mut Found) -> Result<()> {
    if let Some(reason) = peers::hindrance(NFT) {
        found.not_run("memory for a million flows", NFT, reason);
        return Ok(());
    }
    let peer = peers::make(NFT)?;
    let before = slab("nf_conntrack")?;
    let flows = Flows::open(peer.as_ref(), Side::A, scale.cold_flows())?;
    let bytes = slab("nf_conntrack")?.saturating_sub(before) as f64 / flows.len() as f64;
    found.add(Figure::values(18, "memory for a million flows", NFT, "MB", &[bytes]));
    Ok(())
}

/// Bytes of a cache of the kernel.
fn slab(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/slabinfo")?;
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(name));
    let numbers: Vec<u64> = line
        .context("no such cache")?
        .split_whitespace()
        .skip(1)
        .map_while(|word| word.parse().ok())
        .collect();
    let [_, objects, size, ..] = numbers[..] else { anyhow::bail!("/proc/slabinfo has another form") };
    Ok(objects * size)
}

/// Row 11, where the processor counts: beyond the floor, at rest and while draining.
fn cycles(scale: Scale, ours: &Lane, theirs: &Lane, what: (&str, f64), found: &mut Found) -> Result<()> {
    let (metric, limit) = what;
    if programs::find("perf").is_none() {
        found.not_run(metric, PRODUCT, "perf is not installed");
        return Ok(());
    }
    let mut blocks = Vec::new();
    for _ in 0..scale.blocks() {
        let (Some(theirs), Some(ours)) = (cycles_of(scale, theirs)?, cycles_of(scale, ours)?) else {
            found.not_run(metric, PRODUCT, "this machine's processor counts no cycles for its guests");
            return Ok(());
        };
        blocks.push(Block { a: [theirs; 2], b: [ours; 2] });
    }
    let figure = Figure::difference(11, metric, FLOOR, "cycles of the sending core", &blocks);
    found.add(figure.must(Target::AtMost(limit)));
    Ok(())
}

/// Cycles of the sending core for a packet; nothing if it counts none.
fn cycles_of(scale: Scale, lane: &Lane) -> Result<Option<f64>> {
    let seconds = scale.slot().as_secs_f64();
    let argv = ["perf", "stat", "-x,", "-C", "0", "-e", "cycles", "sleep", &format!("{seconds}")];
    let (counted, flooded) = std::thread::scope(|scope| {
        let counting = scope.spawn(|| programs::output(&argv, None));
        let flooded = lane.flood(scale);
        (counting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), flooded)
    });
    let text = counted?.stderr;
    let count = text.lines().find(|line| line.contains("cycles")).and_then(|line| line.split(',').next());
    let sent = flooded?.sent as f64;
    Ok(count.and_then(|word| word.parse::<f64>().ok()).map(|cycles| cycles / sent))
}
