//! Which chains of nftables have rules about certain addresses: those of a service are passed by on the fast path.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

use super::BadRules;

/// The elements of named sets, by family, table and name.
type Sets<'a> = BTreeMap<[&'a str; 3], &'a [Value]>;

/// Reads the output of `nft -j list ruleset` (`libnftables-json(5)`): each chain with a rule that compares the source or
/// the destination of packets with one of the addresses, as `nft` names it: family, table, chain.
///
/// # Errors
/// [`BadRules`].
pub(super) fn chains(json: &str, addresses: &[IpAddr]) -> Result<Vec<String>, BadRules> {
    let value: Value = serde_json::from_str(json).map_err(|error| BadRules(Some(error)))?;
    let objects = value["nftables"].as_array().ok_or(BadRules(None))?;
    let sets: Sets<'_> =
        objects.iter().flat_map(|object| [&object["set"], &object["map"]]).filter_map(set).collect();
    let mut chains = Vec::new();
    for rule in objects.iter().filter_map(|object| object.get("rule")) {
        let Some([family, table, chain]) = key(rule, "chain") else { continue };
        let names = |value: &Value| has(value, addresses, &|name| sets.get(&[family, table, name]).copied());
        let statements = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
        let chain = format!("{family} {table} {chain}");
        if compared(statements).any(names) && !chains.contains(&chain) {
            chains.push(chain);
        }
    }
    Ok(chains)
}

fn key<'a>(object: &'a Value, name: &str) -> Option<[&'a str; 3]> {
    Some([object["family"].as_str()?, object["table"].as_str()?, object[name].as_str()?])
}

fn set(object: &Value) -> Option<([&str; 3], &[Value])> {
    Some((key(object, "name")?, object["elem"].as_array()?))
}

/// What the addresses of packets are compared with.
fn compared(statements: &[Value]) -> impl Iterator<Item = &Value> {
    let is_address = |left: &Value| matches!(left["payload"]["field"].as_str(), Some("saddr" | "daddr"));
    statements.iter().filter_map(move |statement| {
        let (test, map) = (&statement["match"], &statement["vmap"]);
        match (is_address(&test["left"]), is_address(&map["key"])) {
            (true, _) => Some(&test["right"]),
            (_, true) => Some(&map["data"]),
            _ => None,
        }
    })
}

/// Whether an address is, or is in, what a rule names.
fn has<'a>(value: &'a Value, addresses: &[IpAddr], set: &dyn Fn(&str) -> Option<&'a [Value]>) -> bool {
    let inner = |values: &'a [Value]| values.iter().any(|value| has(value, addresses, set));
    match value {
        Value::String(text) => match text.strip_prefix('@') {
            Some(name) => set(name).is_some_and(inner),
            None => text.parse().is_ok_and(|address| addresses.contains(&address)),
        },
        Value::Array(values) => inner(values),
        Value::Object(fields) => fields.iter().any(|(kind, value)| match kind.as_str() {
            "prefix" => {
                let prefix =
                    value["addr"].as_str().and_then(|text| text.parse().ok()).zip(value["len"].as_u64());
                prefix.is_some_and(|(net, length)| addresses.iter().any(|a| starts_with(*a, net, length)))
            }
            "range" => {
                let end = |at: usize| value[at].as_str().and_then(|text| text.parse::<IpAddr>().ok());
                end(0).zip(end(1)).is_some_and(|(from, to)| {
                    addresses.iter().any(|a| a.is_ipv4() == from.is_ipv4() && (from..=to).contains(a))
                })
            }
            _ => has(value, addresses, set),
        }),
        _ => false,
    }
}

fn starts_with(address: IpAddr, net: IpAddr, length: u64) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let difference = bits(address) ^ bits(net);
    address.is_ipv4() == net.is_ipv4() && u64::from(difference.leading_zeros()) >= length
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(objects: &str) -> Vec<String> {
        let addresses = ["192.0.2.80".parse().unwrap(), "2001:db8::80".parse().unwrap()];
        chains(&format!("{{\"nftables\": [{{\"metainfo\": {{}}}}, {objects}]}}"), &addresses).unwrap()
    }

    fn rule(field: &str, right: &str) -> String {
        format!(
            r#"{{"rule": {{"family": "inet", "table": "filter", "chain": "fwd", "expr": [
               {{"match": {{"op": "==", "left": {{"payload": {{"protocol": "ip", "field": "{field}"}}}}, "right": {right}}}}},
               {{"drop": null}}]}}}}"#
        )
    }

    #[test]
    fn an_address_is_found_in_every_spelling() {
        for right in [
            r#""192.0.2.80""#,
            r#""2001:db8::80""#,
            r#"{"set": ["192.0.2.9", "192.0.2.80"]}"#,
            r#"{"prefix": {"addr": "192.0.2.0", "len": 24}}"#,
            r#"{"set": [{"prefix": {"addr": "2001:db8::", "len": 32}}]}"#,
            r#"{"range": ["192.0.2.70", "192.0.2.90"]}"#,
            r#"{"set": [{"elem": {"val": "192.0.2.80", "counter": {"packets": 1, "bytes": 1}}}]}"#,
        ] {
            assert_eq!(named(&rule("daddr", right)), ["inet filter fwd"], "{right}");
        }
        for right in [
            r#""192.0.2.81""#,
            r#"{"prefix": {"addr": "192.0.2.96", "len": 27}}"#,
            r#"{"prefix": {"addr": "c000:250::", "len": 32}}"#,
            r#"{"range": ["192.0.2.81", "192.0.2.90"]}"#,
            r#""@nobody""#,
        ] {
            assert_eq!(named(&rule("saddr", right)), [""; 0], "{right}");
        }
        assert_eq!(named(&rule("ttl", r#""192.0.2.80""#)), [""; 0], "another field");
    }

    #[test]
    fn sets_and_maps_are_looked_into() {
        let set = r#"{"set": {"family": "inet", "table": "filter", "name": "s", "elem": ["192.0.2.80"]}}"#;
        assert_eq!(named(&format!("{set}, {}", rule("daddr", r#""@s""#))), ["inet filter fwd"]);
        let other = set.replace("filter", "nat");
        assert_eq!(named(&format!("{other}, {}", rule("daddr", r#""@s""#))), [""; 0], "of another table");
        let map = r#"{"rule": {"family": "ip", "table": "t", "chain": "c", "expr": [{"vmap": {
            "key": {"payload": {"protocol": "ip", "field": "daddr"}},
            "data": {"set": [["192.0.2.80", {"drop": null}]]}}}]}}"#;
        assert_eq!(named(map), ["ip t c"]);
        assert!(chains("{}", &[]).is_err() && chains("no", &[]).is_err());
    }
}
