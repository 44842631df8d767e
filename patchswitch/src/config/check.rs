//! What one value alone cannot say: values that do not fit each other.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use super::duration::format;
use super::place::Place;
use super::{Config, ConfigError, OnDeadline, Probe, Service, Strategy};

/// Finds the place of a key, if a file sets it.
type Where<'a> = &'a dyn Fn(&str) -> Option<Place>;

/// An error at the first of the keys that a file sets.
fn at(place_of: Where<'_>, keys: &[&str], message: String) -> Result<(), ConfigError> {
    match keys.iter().find_map(|key| place_of(key)) {
        Some(place) => Err(ConfigError::Text { place, message }),
        None => Err(ConfigError::Value(format!("{}: {message}", keys.first().unwrap_or(&"")))),
    }
}

/// Checks what is not a service.
pub(super) fn globals(config: &Config, place_of: Where<'_>) -> Result<(), ConfigError> {
    let job = &config.job;
    for (key, value) in [
        ("job.boot", job.boot),
        ("job.patch", job.patch),
        ("job.restart", job.restart),
        ("job.stop", job.stop),
        ("job.copy", job.copy),
        ("scan.limit", config.scan.limit),
    ] {
        positive(place_of, key, value)?;
    }
    if !config.agent.state_dir.is_absolute() {
        return at(place_of, &["agent.state_dir"], "the path must begin with a slash".to_owned());
    }
    if let Some(command) = &config.scan.command {
        shell(place_of, "scan.command", command)?;
    }
    Ok(())
}

/// Checks one service by itself.
pub(super) fn service(service: &Service, place_of: Where<'_>) -> Result<(), ConfigError> {
    lists(service, place_of)?;
    timers(service, place_of)?;
    if let Err(error) = service.datagrams.check() {
        return at(place_of, &["stateless", "quic"], error.to_string());
    }
    if service.probes.is_empty() {
        let message = "the service has no [[service.probe]]: health is never assumed".to_owned();
        return at(place_of, &["name"], message);
    }
    for (index, probe) in service.probes.iter().enumerate() {
        check_probe(&format!("probe[{index}]"), probe, place_of)?;
    }
    if let Strategy::Quiesce(quiesce) = &service.strategy {
        shell(place_of, "quiesce.stop", &quiesce.stop)?;
        shell(place_of, "quiesce.start", &quiesce.start)?;
        if let Some(finish) = &quiesce.finish {
            shell(place_of, "quiesce.finish", finish)?;
        }
        positive(place_of, "quiesce.hold", quiesce.hold)?;
    }
    if let Strategy::Device(exchange) | Strategy::Address(exchange) = &service.strategy {
        positive(place_of, "exchange.hold", exchange.hold)?;
    }
    if matches!(service.strategy, Strategy::Address(_)) && service.uplinks.len() != 2 {
        let message = "the address goes from one uplink to another (strategy = \"address\"): it needs two of them, the first \
                       for the partition that serves first"
            .to_owned();
        return at(place_of, &["uplinks"], message);
    }
    if service.strategy == Strategy::Letter && service.drain.on_deadline == OnDeadline::Abort {
        let message = "to the letter (strategy = \"letter\") every connection is left at the deadline: \"abort\" would turn \
                       each job back"
            .to_owned();
        return at(place_of, &["drain.on_deadline"], message);
    }
    match &service.drain.command {
        Some(command) => shell(place_of, "drain.command", command),
        None => Ok(()),
    }
}

/// Checks the services against each other.
pub(super) fn together(
    services: &[Service],
    place_of: &dyn Fn(usize, &str) -> Option<Place>,
) -> Result<(), ConfigError> {
    let mut seen: BTreeMap<String, (usize, String)> = BTreeMap::new();
    for (index, service) in services.iter().enumerate() {
        let mut claims = vec![
            (format!("service {:?}", service.name.as_str()), "name".to_owned()),
            (format!("partition {:?}", service.partition.as_str()), "partition".to_owned()),
        ];
        for (number, address) in service.addresses.iter().enumerate() {
            claims.push((format!("address {address}"), format!("addresses[{number}]")));
        }
        for (what, key) in claims {
            if let Some((other, other_key)) = seen.get(&what) {
                let first = place_of(*other, other_key).map(|place| format!(", first at {place}"));
                let message = format!("{what} is given twice{}", first.unwrap_or_default());
                return at(&|key| place_of(index, key), &[&key], message);
            }
            seen.insert(what, (index, key));
        }
    }
    Ok(())
}

fn lists(service: &Service, place_of: Where<'_>) -> Result<(), ConfigError> {
    if service.addresses.is_empty() {
        return at(place_of, &["addresses"], "a service needs at least one address".to_owned());
    }
    if service.uplinks.is_empty() {
        return at(place_of, &["uplinks"], "a service needs at least one uplink".to_owned());
    }
    for (index, address) in service.addresses.iter().enumerate() {
        let key = format!("addresses[{index}]");
        if let Some(reason) = undeliverable(address) {
            return at(place_of, &[&key], format!("{address} cannot be a service address: {reason}"));
        }
        if service.addresses[..index].contains(address) {
            return at(place_of, &[&key], format!("address {address} is given twice"));
        }
    }
    for (index, uplink) in service.uplinks.iter().enumerate() {
        if service.uplinks[..index].contains(uplink) {
            return at(place_of, &[&format!("uplinks[{index}]")], format!("uplink {uplink} is given twice"));
        }
    }
    for (index, pattern) in service.may_lose.iter().enumerate() {
        let good = pattern.starts_with('/')
            && pattern.split('/').all(|part| part != ".." && part != ".")
            && !pattern.contains(char::is_control);
        if !good {
            let message = format!("{pattern:?} is not a pattern of absolute paths, like \"/var/log/**\"");
            return at(place_of, &[&format!("may_lose[{index}]")], message);
        }
    }
    Ok(())
}

/// Timers that contradict each other are found here and not in the middle of a switch.
fn timers(service: &Service, place_of: Where<'_>) -> Result<(), ConfigError> {
    let (gate, observe, drain) = (&service.gate, &service.observe, &service.drain);
    for (key, value) in [
        ("gate.every", gate.every),
        ("gate.timeout", gate.timeout),
        ("gate.deadline", gate.deadline),
        ("observe.every", observe.every),
        ("drain.deadline", drain.deadline),
        ("udp_idle", service.udp_idle),
    ] {
        positive(place_of, key, value)?;
    }
    if gate.need == 0 {
        return at(place_of, &["gate.need"], "at least one success is needed".to_owned());
    }
    let least = gate.every.saturating_mul(gate.need - 1);
    if gate.deadline <= least {
        let (need, every, deadline) = (gate.need, format(gate.every), format(gate.deadline));
        let message = format!(
            "the gate can never pass: {need} rounds {every} apart take {}, the deadline is {deadline}",
            format(least)
        );
        return at(place_of, &["gate.deadline", "gate.need", "gate.every"], message);
    }
    if gate.timeout > gate.deadline {
        let (timeout, deadline) = (format(gate.timeout), format(gate.deadline));
        let message = format!("one probe may take {timeout}, the whole gate only {deadline}");
        return at(place_of, &["gate.timeout", "gate.deadline"], message);
    }
    if observe.fail == 0 || observe.fail > observe.of {
        let message = format!("{} failures of {} rounds can never be counted", observe.fail, observe.of);
        return at(place_of, &["observe.fail", "observe.of"], message);
    }
    if !observe.length.is_zero() && observe.length < observe.every.saturating_mul(observe.fail) {
        let (length, every) = (format(observe.length), format(observe.every));
        let message = format!(
            "{} failures {every} apart cannot happen within {length}: the service would never be given back",
            observe.fail
        );
        return at(place_of, &["observe.length", "observe.every", "observe.fail"], message);
    }
    if service.udp_idle > drain.deadline {
        let (idle, deadline) = (format(service.udp_idle), format(drain.deadline));
        let message = format!(
            "a UDP flow ends after {idle} of silence, the drain's deadline is already after {deadline}"
        );
        return at(place_of, &["udp_idle", "drain.deadline"], message);
    }
    Ok(())
}

fn check_probe(key: &str, probe: &Probe, place_of: Where<'_>) -> Result<(), ConfigError> {
    let field = |name: &str| format!("{key}.{name}");
    match probe {
        Probe::Tcp { .. } => Ok(()),
        Probe::Command { command } => shell(place_of, &field("command"), command),
        Probe::Http { path, host, status, contains, .. } => {
            // Both go into the request as they are: a line end would begin a field of its own.
            let bad = |text: &str| text.contains(|c: char| c.is_whitespace() || c.is_control());
            if !path.starts_with('/') || bad(path) {
                let message =
                    format!("{path:?} is not a path: it begins with a slash and has no white space");
                return at(place_of, &[&field("path"), key], message);
            }
            if let Some(host) = host.as_deref().filter(|host| host.is_empty() || bad(host)) {
                return at(place_of, &[&field("host"), key], format!("{host:?} is not a host name"));
            }
            if !(200..=599).contains(status) {
                let message = format!("{status} is not the status of a final answer (200 to 599)");
                return at(place_of, &[&field("status"), key], message);
            }
            if contains.as_deref() == Some("") {
                let message = "an empty text is in every body".to_owned();
                return at(place_of, &[&field("contains"), key], message);
            }
            Ok(())
        }
    }
}

fn shell(place_of: Where<'_>, key: &str, command: &str) -> Result<(), ConfigError> {
    if command.trim().is_empty() || command.contains('\0') {
        return at(place_of, &[key], "an empty command does nothing: leave the key out".to_owned());
    }
    Ok(())
}

fn positive(place_of: Where<'_>, key: &str, value: Duration) -> Result<(), ConfigError> {
    if value.is_zero() { at(place_of, &[key], "the time must not be 0".to_owned()) } else { Ok(()) }
}

/// Why routers do not deliver to an address; nothing if they do.
pub(crate) fn undeliverable(address: &IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("it is the unspecified address"),
        _ if address.is_loopback() => Some("it is a loopback address"),
        _ if address.is_multicast() => Some("it is a multicast address"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("it is the broadcast address"),
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some("it is of this network alone (0.0.0.0/8)"),
        IpAddr::V4(v4) if v4.octets()[0] >= 240 => Some("it is reserved (240.0.0.0/4)"),
        IpAddr::V4(v4) if v4.is_link_local() => Some("it is link-local, as the partitions' gateway is"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            Some("it is link-local, as the partitions' gateway is")
        }
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Some("it is an IPv4 address in an IPv6 form"),
        _ => None,
    }
}
