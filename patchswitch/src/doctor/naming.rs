//! Which chains of nftables have rules about certain addresses, or drop by certain links: packets of a service pass them by
//! on the fast path.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

use super::BadRules;
use super::firewall::{Ways, has_drop, name, statements};

/// The elements of named sets, by family, table and name.
type Sets<'a> = BTreeMap<[&'a str; 3], &'a [Value]>;

/// Chains, as `nft` names them: family, table, chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// With a rule that compares the source or the destination of packets with one of the addresses.
    pub addresses: Vec<String>,
    /// With a rule that drops what comes in or goes out by one of the links.
    pub links: Vec<String>,
}

/// The hooks that the fast path passes by. What is for the host itself does not take it.
const PASSED_BY: [&str; 4] = ["ingress", "prerouting", "forward", "postrouting"];

/// Reads the output of `nft -j list ruleset` (`libnftables-json(5)`).
///
/// # Errors
/// [`BadRules`].
pub(super) fn named(json: &str, addresses: &[IpAddr], links: &[String]) -> Result<Named, BadRules> {
    let value: Value = serde_json::from_str(json).map_err(|error| BadRules(Some(error)))?;
    let objects = value["nftables"].as_array().ok_or(BadRules(None))?;
    let sets: Sets<'_> =
        objects.iter().flat_map(|object| [&object["set"], &object["map"]]).filter_map(set).collect();
    let passed_by = Ways::of(objects).from(&PASSED_BY);
    let mut found = Named::default();
    for rule in objects.iter().filter_map(|object| object.get("rule")) {
        let Some([family, table, _]) = key(rule, "chain") else { continue };
        let set = |name: &str| sets.get(&[family, table, name]).copied();
        let is_address = |text: &str| text.parse().is_ok_and(|address| addresses.contains(&address));
        let is_link = |text: &str| links.iter().any(|link| stands_for(text, link));
        let about = |value: &Value| has(value, addresses, &is_address, &set);
        let by = |value: &Value| has(value, &[], &is_link, &set);
        let chain = name(rule, "chain");
        if compared(statements(rule), names_address).any(|(value, _)| about(value)) {
            note(&mut found.addresses, &chain);
        }
        if passed_by.contains(&chain) && drops_by(statements(rule), by) {
            note(&mut found.links, &chain);
        }
    }
    Ok(found)
}

fn note(chains: &mut Vec<String>, chain: &str) {
    if !chains.iter().any(|known| known == chain) {
        chains.push(chain.to_owned());
    }
}

fn key<'a>(object: &'a Value, name: &str) -> Option<[&'a str; 3]> {
    Some([object["family"].as_str()?, object["table"].as_str()?, object[name].as_str()?])
}

fn set(object: &Value) -> Option<([&str; 3], &[Value])> {
    Some((key(object, "name")?, object["elem"].as_array()?))
}

fn names_address(left: &Value) -> bool {
    matches!(left["payload"]["field"].as_str(), Some("saddr" | "daddr"))
}

fn names_link(left: &Value) -> bool {
    matches!(left["meta"]["key"].as_str(), Some("iif" | "iifname" | "oif" | "oifname"))
}

/// What something of packets is compared with, by itself or beside others, and whether it is to be another.
fn compared(
    statements: &[Value],
    is_it: impl Fn(&Value) -> bool + Copy,
) -> impl Iterator<Item = (&Value, bool)> {
    let names =
        move |left: &Value| is_it(left) || left["concat"].as_array().is_some_and(|all| all.iter().any(is_it));
    statements.iter().filter_map(move |statement| {
        let (test, map) = (&statement["match"], &statement["vmap"]);
        match (names(&test["left"]), names(&map["key"])) {
            (true, _) => Some((&test["right"], test["op"] == "!=")),
            (_, true) => Some((&map["data"], false)),
            _ => None,
        }
    })
}

/// Whether a rule drops, and what the links of packets are compared with fits. Of a map it is enough that it has both.
fn drops_by(statements: &[Value], fits: impl Fn(&Value) -> bool) -> bool {
    statements.iter().any(has_drop)
        && compared(statements, names_link).any(|(value, is_other)| fits(value) != is_other)
}

/// Whether a name in a rule is that of a link: `eth*` is that of many.
fn stands_for(text: &str, link: &str) -> bool {
    text.strip_suffix('*').map_or(text == link, |start| link.starts_with(start))
}

/// Whether one of the addresses, or a word that is meant, is what a rule names, or is in it.
fn has<'a>(
    value: &Value,
    addresses: &[IpAddr],
    is_meant: &dyn Fn(&str) -> bool,
    set: &dyn Fn(&str) -> Option<&'a [Value]>,
) -> bool {
    let inner = |values: &[Value]| values.iter().any(|value| has(value, addresses, is_meant, set));
    match value {
        Value::String(text) => match text.strip_prefix('@') {
            Some(name) => set(name).is_some_and(inner),
            None => is_meant(text),
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
            _ => has(value, addresses, is_meant, set),
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

    fn all(objects: &str) -> Named {
        let addresses = ["192.0.2.80".parse().unwrap(), "2001:db8::80".parse().unwrap()];
        let json = format!("{{\"nftables\": [{{\"metainfo\": {{}}}}, {objects}]}}");
        super::named(&json, &addresses, &["eth0".to_owned()]).unwrap()
    }

    fn named(objects: &str) -> Vec<String> {
        all(objects).addresses
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
        let beside = r#"{"rule": {"family": "ip", "table": "t", "chain": "c", "expr": [{"match": {"op": "==",
            "left": {"concat": [{"payload": {"protocol": "ip", "field": "daddr"}}, {"meta": {"key": "mark"}}]},
            "right": {"set": [{"concat": ["192.0.2.80", 7]}]}}}]}}"#;
        assert_eq!(named(beside), ["ip t c"]);
        assert!(super::named("{}", &[], &[]).is_err() && super::named("no", &[], &[]).is_err());
    }

    /// The chains that drop by the link: one at a hook with a rule that compares, and ends, like that.
    fn by_link(hook: &str, (op, key, right): (&str, &str, &str), end: &str) -> Vec<String> {
        let chain = format!(
            r#"{{"chain": {{"family": "inet", "table": "filter", "name": "fwd", "hook": "{hook}", "policy": "accept"}}}}"#
        );
        let rule = format!(
            r#"{{"rule": {{"family": "inet", "table": "filter", "chain": "fwd", "expr": [
               {{"match": {{"op": "{op}", "left": {{"meta": {{"key": "{key}"}}}}, "right": {right}}}}}, {end}]}}}}"#
        );
        let set = r#"{"set": {"family": "inet", "table": "filter", "name": "s", "elem": ["lan", "eth*"]}}"#;
        all(&format!("{chain}, {rule}, {set}")).links
    }

    #[test]
    fn a_link_is_found_in_every_spelling_where_something_is_dropped() {
        const DROP: &str = r#"{"counter": {"packets": 0, "bytes": 0}}, {"drop": null}"#;
        for (op, right) in [
            ("==", r#""eth0""#),
            ("==", r#""eth*""#),
            ("==", r#"{"set": ["lan", "eth0"]}"#),
            ("==", r#""@s""#),
            ("!=", r#""lan""#),
        ] {
            for key in ["iifname", "oifname", "iif", "oif"] {
                for hook in ["ingress", "prerouting", "forward", "postrouting"] {
                    assert_eq!(
                        by_link(hook, (op, key, right), DROP),
                        ["inet filter fwd"],
                        "{hook} {key} {right}"
                    );
                }
            }
            // What is for the host itself, or comes from it, does not take the fast path.
            assert_eq!(by_link("input", (op, "iifname", right), DROP), [""; 0], "{right}");
            assert_eq!(by_link("forward", (op, "mark", right), DROP), [""; 0], "{right}");
            assert_eq!(by_link("forward", (op, "iifname", right), r#"{"accept": null}"#), [""; 0], "{right}");
        }
        let reject = r#"{"xt": {"type": "target", "name": "REJECT"}}"#;
        assert_eq!(by_link("forward", ("==", "oifname", r#""eth*""#), reject), ["inet filter fwd"]);
        for (op, right) in
            [("==", r#""eth1""#), ("==", r#""eth0.7""#), ("==", r#""lan*""#), ("!=", r#""eth0""#)]
        {
            assert_eq!(by_link("forward", (op, "iifname", right), DROP), [""; 0], "{op} {right}");
        }
    }

    #[test]
    fn links_beside_others_and_in_maps_are_found_also_in_a_chain_that_is_jumped_to() {
        let base = r#"{"chain": {"family": "ip", "table": "t", "name": "b", "hook": "forward", "policy": "accept"}},
            {"rule": {"family": "ip", "table": "t", "chain": "b", "expr": [{"jump": {"target": "c"}}]}}"#;
        let links = |expressions: &str, base: &str| {
            let rule = format!(
                r#"{{"rule": {{"family": "ip", "table": "t", "chain": "c", "expr": [{expressions}]}}}}"#
            );
            all(&format!("{base}, {rule}")).links
        };
        let map =
            r#"{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": {"set": [["eth0", {"drop": null}]]}}}"#;
        let beside = r#"{"match": {"op": "==", "left": {"concat": [{"meta": {"key": "iifname"}}, {"meta": {"key": "mark"}}]},
            "right": {"set": [{"concat": ["eth0", 7]}]}}}, {"drop": null}"#;
        for expressions in [map, beside] {
            assert_eq!(links(expressions, base), ["ip t c"], "{expressions}");
            assert_eq!(links(expressions, &base.replace("jump", "none")), [""; 0], "nobody comes there");
        }
    }
}
