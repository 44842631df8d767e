//! The files as they are written, before defaults and checks; every value with its place.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use super::duration::Span;
use super::place::{Place, Source};
use super::{
    Config, ConfigError, Datagrams, Drain, Exchange, Gate, Left, LossyGiveBack, Observe, OnDeadline, Policy,
    Probe, Quic, Quiesce, Runtime, Service, Strategy, Uplink, check,
};
use crate::names::Name;

type Opt<T> = Option<Spanned<T>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    schema: Opt<u32>,
    #[serde(default)]
    agent: RawAgent,
    #[serde(default)]
    job: RawJob,
    #[serde(default)]
    scan: RawScan,
    #[serde(default)]
    gate: RawGate,
    #[serde(default)]
    observe: RawObserve,
    #[serde(default)]
    drain: RawDrain,
    #[serde(default)]
    service: Vec<RawService>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAgent {
    state_dir: Opt<PathBuf>,
    runtime: Opt<Runtime>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawJob {
    boot: Opt<Span>,
    patch: Opt<Span>,
    restart: Opt<Span>,
    stop: Opt<Span>,
    copy: Opt<Span>,
    keep_old: Opt<Span>,
    store_lasts: Opt<Span>,
    extend_stores: Opt<bool>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawScan {
    packages: Opt<bool>,
    command: Opt<String>,
    limit: Opt<Span>,
    on_finding: Opt<Policy>,
    on_failure: Opt<Policy>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawStrategy {
    Takeover,
    Quiesce,
    Device,
    Address,
    Letter,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExchange {
    hold: Opt<Span>,
    on_deadline: Opt<Left>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQuiesce {
    finish: Opt<String>,
    stop: Spanned<String>,
    start: Spanned<String>,
    hold: Opt<Span>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQuic {
    port: NonZeroU16,
    #[serde(default)]
    cid_offset: u8,
    cid_len: u8,
    mask: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGate {
    need: Opt<u32>,
    every: Opt<Span>,
    timeout: Opt<Span>,
    deadline: Opt<Span>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawObserve {
    length: Opt<Span>,
    every: Opt<Span>,
    fail: Opt<u32>,
    of: Opt<u32>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDrain {
    command: Opt<String>,
    command_after: Opt<Span>,
    deadline: Opt<Span>,
    on_deadline: Opt<OnDeadline>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawService {
    name: Spanned<Name>,
    addresses: Spanned<Vec<Spanned<IpAddr>>>,
    uplinks: Spanned<Vec<Spanned<Uplink>>>,
    partition: Spanned<Name>,
    udp_idle: Opt<Span>,
    stateless: Opt<Vec<Spanned<NonZeroU16>>>,
    quic: Opt<RawQuic>,
    may_lose: Opt<Vec<Spanned<String>>>,
    lossy_give_back: Opt<LossyGiveBack>,
    strategy: Opt<RawStrategy>,
    quiesce: Opt<RawQuiesce>,
    exchange: Opt<RawExchange>,
    #[serde(default)]
    gate: RawGate,
    #[serde(default)]
    observe: RawObserve,
    #[serde(default)]
    drain: RawDrain,
    #[serde(default)]
    probe: Vec<RawProbe>,
}

/// Flat, although the keys depend on the kind: a tagged enum would lose the places.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProbe {
    kind: Spanned<Kind>,
    port: Opt<NonZeroU16>,
    path: Opt<String>,
    host: Opt<String>,
    status: Opt<u16>,
    contains: Opt<String>,
    command: Opt<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Tcp,
    Http,
    Command,
}

/// Puts files over each other and makes a configuration of them.
#[derive(Default)]
pub(super) struct Builder {
    config: Config,
    gate: Gate,
    observe: Observe,
    drain: Drain,
    places: BTreeMap<String, Place>,
    services: Vec<(RawService, Source)>,
}

/// Stores values of one table of one file, and where they stand.
struct Setter<'a> {
    source: &'a Source,
    places: &'a mut BTreeMap<String, Place>,
    table: String,
}

impl Setter<'_> {
    fn set<T, R: Into<T>>(&mut self, key: &str, slot: &mut T, raw: Opt<R>) {
        if let Some(raw) = raw {
            self.note(key, raw.span());
            *slot = raw.into_inner().into();
        }
    }

    fn note(&mut self, key: &str, span: std::ops::Range<usize>) {
        self.places.insert(format!("{}.{key}", self.table), self.source.place(span));
    }

    fn gate(&mut self, gate: &mut Gate, raw: RawGate) {
        self.set("gate.need", &mut gate.need, raw.need);
        self.set("gate.every", &mut gate.every, raw.every);
        self.set("gate.timeout", &mut gate.timeout, raw.timeout);
        self.set("gate.deadline", &mut gate.deadline, raw.deadline);
    }

    fn observe(&mut self, observe: &mut Observe, raw: RawObserve) {
        self.set("observe.length", &mut observe.length, raw.length);
        self.set("observe.every", &mut observe.every, raw.every);
        self.set("observe.fail", &mut observe.fail, raw.fail);
        self.set("observe.of", &mut observe.of, raw.of);
    }

    fn drain(&mut self, drain: &mut Drain, raw: RawDrain) {
        self.set("drain.command", &mut drain.command, raw.command);
        self.set("drain.command_after", &mut drain.command_after, raw.command_after);
        self.set("drain.deadline", &mut drain.deadline, raw.deadline);
        self.set("drain.on_deadline", &mut drain.on_deadline, raw.on_deadline);
    }
}

impl Builder {
    /// Adds a file; what it sets replaces what earlier ones set.
    pub(super) fn add(&mut self, name: &str, text: &str) -> Result<(), ConfigError> {
        let source = Source::new(name, text);
        let raw: RawFile = toml::from_str(text).map_err(|error| ConfigError::Text {
            place: source.place(error.span().unwrap_or_default()),
            message: one_line(error.message()),
        })?;
        if let Some(schema) = raw.schema.as_ref().filter(|schema| *schema.get_ref() != 1) {
            let message = format!("schema {} is unknown: this version reads schema 1", schema.get_ref());
            return Err(ConfigError::Text { place: source.place(schema.span()), message });
        }
        let mut set = Setter { source: &source, places: &mut self.places, table: String::new() };
        let config = &mut self.config;
        set.set("agent.state_dir", &mut config.agent.state_dir, raw.agent.state_dir);
        set.set("agent.runtime", &mut config.agent.runtime, raw.agent.runtime);
        set.set("job.boot", &mut config.job.boot, raw.job.boot);
        set.set("job.patch", &mut config.job.patch, raw.job.patch);
        set.set("job.restart", &mut config.job.restart, raw.job.restart);
        set.set("job.stop", &mut config.job.stop, raw.job.stop);
        set.set("job.copy", &mut config.job.copy, raw.job.copy);
        set.set("job.keep_old", &mut config.job.keep_old, raw.job.keep_old);
        set.set("job.store_lasts", &mut config.job.store_lasts, raw.job.store_lasts);
        set.set("job.extend_stores", &mut config.job.extend_stores, raw.job.extend_stores);
        set.set("scan.packages", &mut config.scan.packages, raw.scan.packages);
        set.set("scan.command", &mut config.scan.command, raw.scan.command);
        set.set("scan.limit", &mut config.scan.limit, raw.scan.limit);
        set.set("scan.on_finding", &mut config.scan.on_finding, raw.scan.on_finding);
        set.set("scan.on_failure", &mut config.scan.on_failure, raw.scan.on_failure);
        set.gate(&mut self.gate, raw.gate);
        set.observe(&mut self.observe, raw.observe);
        set.drain(&mut self.drain, raw.drain);
        self.services.extend(raw.service.into_iter().map(|service| (service, source.clone())));
        Ok(())
    }

    /// Fills in defaults and checks everything.
    pub(super) fn finish(mut self) -> Result<Config, ConfigError> {
        check::globals(&self.config, &|key| self.places.get(&format!(".{key}")).cloned())?;
        for (index, (raw, source)) in self.services.into_iter().enumerate() {
            let table = format!("service[{index}]");
            let mut set = Setter { source: &source, places: &mut self.places, table: table.clone() };
            let service = service(raw, &mut set, &self.gate, &self.observe, &self.drain)?;
            // A value that the service itself does not set comes from the tables for all services.
            let places = &self.places;
            let at =
                |key: &str| places.get(&format!("{table}.{key}")).or_else(|| places.get(&format!(".{key}")));
            check::service(&service, &|key| at(key).cloned())?;
            self.config.services.push(service);
        }
        check::together(&self.config.services, &|index, key| {
            self.places.get(&format!("service[{index}].{key}")).cloned()
        })?;
        Ok(self.config)
    }
}

fn service(
    raw: RawService,
    set: &mut Setter<'_>,
    gate: &Gate,
    observe: &Observe,
    drain: &Drain,
) -> Result<Service, ConfigError> {
    set.note("name", raw.name.span());
    set.note("partition", raw.partition.span());
    let mut service = Service {
        name: raw.name.into_inner(),
        addresses: list("addresses", raw.addresses, set),
        uplinks: list("uplinks", raw.uplinks, set),
        partition: raw.partition.into_inner(),
        udp_idle: super::DEFAULT_UDP_IDLE,
        datagrams: Datagrams::default(),
        may_lose: Vec::new(),
        lossy_give_back: LossyGiveBack::Refuse,
        strategy: Strategy::Takeover,
        gate: gate.clone(),
        observe: observe.clone(),
        drain: drain.clone(),
        probes: Vec::new(),
    };
    set.set("udp_idle", &mut service.udp_idle, raw.udp_idle);
    set.set("lossy_give_back", &mut service.lossy_give_back, raw.lossy_give_back);
    if let Some(patterns) = raw.may_lose {
        service.may_lose = list("may_lose", patterns, set);
    }
    if let Some(ports) = raw.stateless {
        service.datagrams.stateless =
            list("stateless", ports, set).into_iter().map(NonZeroU16::get).collect();
    }
    if let Some(quic) = raw.quic {
        set.note("quic", quic.span());
        service.datagrams.quic = Some(quic_of(&quic, set.source)?);
    }
    service.strategy = strategy(raw.strategy, (raw.quiesce, raw.exchange), set)?;
    set.gate(&mut service.gate, raw.gate);
    set.observe(&mut service.observe, raw.observe);
    set.drain(&mut service.drain, raw.drain);
    for (index, raw) in raw.probe.into_iter().enumerate() {
        set.note(&format!("probe[{index}]"), raw.kind.span());
        service.probes.push(probe(raw, set.source, &format!("probe[{index}]"), set.places, &set.table)?);
    }
    Ok(service)
}

/// A table is there if it is needed, and only then.
fn strategy(
    kind: Opt<RawStrategy>,
    (quiesce, exchange): (Opt<RawQuiesce>, Opt<RawExchange>),
    set: &mut Setter<'_>,
) -> Result<Strategy, ConfigError> {
    let wrong = |span, message: &str, set: &Setter<'_>| {
        Err(ConfigError::Text { place: set.source.place(span), message: message.to_owned() })
    };
    let of = kind.as_ref().map_or(RawStrategy::Takeover, |kind| *kind.get_ref());
    if let Some(raw) = quiesce.as_ref().filter(|_| of != RawStrategy::Quiesce) {
        return wrong(raw.span(), "only strategy = \"quiesce\" has this table", set);
    }
    let exchanges = matches!(of, RawStrategy::Device | RawStrategy::Address);
    if let Some(raw) = exchange.as_ref().filter(|_| !exchanges) {
        return wrong(raw.span(), "only strategy = \"device\" and \"address\" have this table", set);
    }
    match (of, quiesce) {
        (RawStrategy::Takeover, _) => Ok(Strategy::Takeover),
        (RawStrategy::Letter, _) => Ok(Strategy::Letter),
        (RawStrategy::Device, _) => Ok(Strategy::Device(exchange_of(exchange, set))),
        (RawStrategy::Address, _) => Ok(Strategy::Address(exchange_of(exchange, set))),
        (RawStrategy::Quiesce, Some(raw)) => Ok(Strategy::Quiesce(quiesce_of(raw.into_inner(), set))),
        (RawStrategy::Quiesce, None) => {
            let span = kind.map_or(0..0, |kind| kind.span());
            wrong(span, "it needs a table [service.quiesce] with stop and start", set)
        }
    }
}

fn quiesce_of(raw: RawQuiesce, set: &mut Setter<'_>) -> Quiesce {
    let RawQuiesce { finish, stop, start, hold } = raw;
    set.note("quiesce.stop", stop.span());
    set.note("quiesce.start", start.span());
    let (stop, start) = (stop.into_inner(), start.into_inner());
    let mut quiesce = Quiesce { finish: None, stop, start, hold: super::DEFAULT_HOLD };
    if let Some(finish) = finish {
        set.note("quiesce.finish", finish.span());
        quiesce.finish = Some(finish.into_inner());
    }
    set.set("quiesce.hold", &mut quiesce.hold, hold);
    quiesce
}

fn exchange_of(raw: Opt<RawExchange>, set: &mut Setter<'_>) -> Exchange {
    let RawExchange { hold, on_deadline } = raw.map(Spanned::into_inner).unwrap_or_default();
    let mut exchange = Exchange { hold: super::DEFAULT_HOLD, on_deadline: Left::Abort };
    set.set("exchange.hold", &mut exchange.hold, hold);
    set.set("exchange.on_deadline", &mut exchange.on_deadline, on_deadline);
    exchange
}

fn quic_of(raw: &Spanned<RawQuic>, source: &Source) -> Result<Quic, ConfigError> {
    let RawQuic { port, cid_offset, cid_len, mask } = raw.get_ref();
    Quic::new(port.get(), *cid_offset, *cid_len, mask.as_deref())
        .map_err(|error| ConfigError::Text { place: source.place(raw.span()), message: error.to_string() })
}

fn list<T>(key: &str, raw: Spanned<Vec<Spanned<T>>>, set: &mut Setter<'_>) -> Vec<T> {
    set.note(key, raw.span());
    let note = |(index, item): (usize, Spanned<T>)| {
        set.note(&format!("{key}[{index}]"), item.span());
        item.into_inner()
    };
    raw.into_inner().into_iter().enumerate().map(note).collect()
}

fn probe(
    raw: RawProbe,
    source: &Source,
    key: &str,
    places: &mut BTreeMap<String, Place>,
    table: &str,
) -> Result<Probe, ConfigError> {
    let kind = *raw.kind.get_ref();
    let name = match kind {
        Kind::Tcp => "tcp",
        Kind::Http => "http",
        Kind::Command => "command",
    };
    let error = |span, message| Err(ConfigError::Text { place: source.place(span), message });
    let (net, http, command) =
        (!matches!(kind, Kind::Command), matches!(kind, Kind::Http), matches!(kind, Kind::Command));
    let given = [
        ("port", raw.port.as_ref().map(Spanned::span), net, net),
        ("path", raw.path.as_ref().map(Spanned::span), http, false),
        ("host", raw.host.as_ref().map(Spanned::span), http, false),
        ("status", raw.status.as_ref().map(Spanned::span), http, false),
        ("contains", raw.contains.as_ref().map(Spanned::span), http, false),
        ("command", raw.command.as_ref().map(Spanned::span), command, command),
    ];
    for (field, span, allowed, needed) in given {
        match span {
            Some(span) if !allowed => {
                return error(span, format!("`{field}` has no effect in a probe of kind \"{name}\""));
            }
            Some(span) => {
                places.insert(format!("{table}.{key}.{field}"), source.place(span));
            }
            None if needed => {
                let message = format!("a probe of kind \"{name}\" needs `{field}`");
                return error(raw.kind.span(), message);
            }
            None => {}
        }
    }
    let text = |value: Opt<String>| value.map(Spanned::into_inner);
    Ok(match (kind, raw.port.map(Spanned::into_inner)) {
        (Kind::Tcp, Some(port)) => Probe::Tcp { port },
        (Kind::Http, Some(port)) => Probe::Http {
            port,
            path: text(raw.path).unwrap_or_else(|| "/".to_owned()),
            host: text(raw.host),
            status: raw.status.map_or(200, Spanned::into_inner),
            contains: text(raw.contains),
        },
        // The other kinds without a port were refused above.
        _ => Probe::Command { command: text(raw.command).unwrap_or_default() },
    })
}

/// The parser's messages may have several lines; ours have one.
fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}
