//! What the rules of nftables do to connections whose packets the host does not all see.
//!
//! The fast path takes packets past the host's firewall. A firewall that keeps track of connections therefore does not
//! know them, and one that drops what it does not know cuts them as soon as a packet takes the slow path.
//!
//! Rules of `iptables-nft` are in the same ruleset, but much of what they say is not: of a match of iptables `nft` prints
//! the name alone (`{"xt": {"type": "match", "name": "conntrack"}}`), and other versions of it print less.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

/// What matters here of a ruleset. Each chain is named as `nft` does: family, table, chain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rules {
    /// Chains of the hook `forward` whose policy is to drop.
    pub forward_drops: Vec<String>,
    /// Chains with a rule that drops what connection tracking calls invalid.
    pub drop_invalid: Vec<String>,
    /// Chains on the way of packets that come in, with a rule of iptables of which `nft` does not say what it drops.
    pub unread: Vec<String>,
}

/// The output of `nft` is not what it should be.
#[derive(Debug, thiserror::Error)]
#[error("failed to understand the output of nft")]
pub struct BadRules(#[source] pub(super) Option<serde_json::Error>);

/// Reads the output of `nft -j list ruleset` (`libnftables-json(5)`).
///
/// # Errors
/// [`BadRules`].
pub fn parse(json: &str) -> Result<Rules, BadRules> {
    let value: Value = serde_json::from_str(json).map_err(|error| BadRules(Some(error)))?;
    let objects = value["nftables"].as_array().ok_or(BadRules(None))?;
    let mut rules = Rules::default();
    for chain in objects.iter().filter_map(|object| object.get("chain")) {
        if chain["hook"] == "forward" && chain["policy"] == "drop" {
            rules.forward_drops.push(name(chain, "name"));
        }
    }
    let ways = Ways::of(objects);
    let reached = ways.from(&INWARD);
    for rule in objects.iter().filter_map(|object| object.get("rule")) {
        let (chain, said) = (name(rule, "chain"), statements(rule));
        if drops_invalid(said) {
            note(&mut rules.drop_invalid, chain);
        } else if reached.contains(&chain) && is_unread(said, |target| ways.drops(&beside(rule, target))) {
            note(&mut rules.unread, chain);
        }
    }
    Ok(rules)
}

/// The hooks on the way of what comes in, by whatever way it goes on.
const INWARD: [&str; 4] = ["ingress", "prerouting", "input", "forward"];

fn note(chains: &mut Vec<String>, chain: String) {
    if !chains.contains(&chain) {
        chains.push(chain);
    }
}

pub(super) fn statements(rule: &Value) -> &[Value] {
    rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default()
}

pub(super) fn name(object: &Value, chain: &str) -> String {
    beside(object, object[chain].as_str().unwrap_or("?"))
}

/// The chain of this name in the table of a rule.
fn beside(object: &Value, chain: &str) -> String {
    let part = |key: &str| object[key].as_str().unwrap_or("?");
    format!("{} {} {chain}", part("family"), part("table"))
}

/// How packets come from chain to chain.
pub(super) struct Ways {
    /// The chains where packets begin, and at which hook.
    bases: Vec<(String, String)>,
    /// Where the rules of a chain send packets.
    jumps: BTreeMap<String, BTreeSet<String>>,
    /// The chains with a rule that drops.
    dropping: BTreeSet<String>,
}

impl Ways {
    pub(super) fn of(objects: &[Value]) -> Self {
        let mut ways = Self { bases: Vec::new(), jumps: BTreeMap::new(), dropping: BTreeSet::new() };
        for object in objects {
            if let Some(chain) = object.get("chain")
                && let Some(hook) = chain["hook"].as_str()
            {
                ways.bases.push((name(chain, "name"), hook.to_owned()));
            } else if let Some(rule) = object.get("rule") {
                let chain = name(rule, "chain");
                let mut targets = Vec::new();
                statements(rule).iter().for_each(|statement| sends(statement, &mut targets));
                ways.jumps
                    .entry(chain.clone())
                    .or_default()
                    .extend(targets.iter().map(|target| beside(rule, target)));
                if statements(rule).iter().any(has_drop) {
                    ways.dropping.insert(chain);
                }
            }
        }
        ways
    }

    /// The chains that packets come to from some hooks.
    pub(super) fn from(&self, hooks: &[&str]) -> BTreeSet<String> {
        let bases = self.bases.iter().filter(|(_, hook)| hooks.contains(&hook.as_str()));
        self.reached(bases.map(|(chain, _)| chain.clone()).collect())
    }

    fn reached(&self, mut open: Vec<String>) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        while let Some(chain) = open.pop() {
            let targets = self.jumps.get(&chain);
            if seen.insert(chain) {
                open.extend(targets.into_iter().flatten().cloned());
            }
        }
        seen
    }

    /// Whether a rule in a chain, or in one to which its rules send packets, drops.
    fn drops(&self, chain: &str) -> bool {
        !self.reached(vec![chain.to_owned()]).is_disjoint(&self.dropping)
    }
}

/// The chains to which a statement sends packets, those in a map as well.
fn sends<'a>(statement: &'a Value, targets: &mut Vec<&'a str>) {
    match statement {
        Value::Array(values) => values.iter().for_each(|value| sends(value, targets)),
        Value::Object(fields) => {
            for (kind, value) in fields {
                match (kind.as_str(), value["target"].as_str()) {
                    ("jump" | "goto", Some(target)) => targets.push(target),
                    _ => sends(value, targets),
                }
            }
        }
        _ => {}
    }
}

/// Whether a verdict to drop is in a statement, be it in a map.
pub(super) fn has_drop(statement: &Value) -> bool {
    is_drop(statement)
        || statement["vmap"]["data"]["set"].as_array().is_some_and(|set| set.iter().any(|e| is_drop(&e[1])))
}

/// Matches of iptables that let every packet by.
const NO_MATCH: [&str; 1] = ["comment"];
/// Targets of iptables after which a packet goes on its way.
const HARMLESS: [&str; 24] = [
    "AUDIT",
    "CHECKSUM",
    "CLASSIFY",
    "CONNMARK",
    "CONNSECMARK",
    "CT",
    "DNAT",
    "DSCP",
    "HL",
    "LED",
    "LOG",
    "MARK",
    "MASQUERADE",
    "NETMAP",
    "NFLOG",
    "RATEEST",
    "REDIRECT",
    "SECMARK",
    "SET",
    "SNAT",
    "TCPMSS",
    "TOS",
    "TRACE",
    "TTL",
];

/// Whether a rule of iptables may drop packets of which `nft` does not say which: a match that it cannot print before a
/// verdict to drop or a chain that `drops`, or a target that is not known to do nothing of the kind.
fn is_unread(statements: &[Value], drops: impl Fn(&str) -> bool) -> bool {
    let xt = |statement: &Value, kind: &str, known: &[&str]| {
        let Some(xt) = statement.get("xt") else { return false };
        // Some versions print nothing but that there is something.
        let is_other = xt["type"].as_str().is_some_and(|named| named != kind);
        !is_other && !xt["name"].as_str().is_some_and(|name| known.contains(&name))
    };
    let is_target = |statement: &Value| xt(statement, "target", &HARMLESS) && !is_drop(statement);
    let mut targets = Vec::new();
    statements.iter().for_each(|statement| sends(statement, &mut targets));
    let ends = || statements.iter().any(has_drop) || targets.iter().any(|target| drops(target));
    statements.iter().any(is_target) || (statements.iter().any(|s| xt(s, "match", &NO_MATCH)) && ends())
}

/// `ct state … invalid … drop`, or a verdict map that says the same.
fn drops_invalid(statements: &[Value]) -> bool {
    let mapped = |statement: &Value| {
        let map = &statement["vmap"];
        let entries = map["data"]["set"].as_array();
        is_state(&map["key"])
            && entries.is_some_and(|entries| entries.iter().any(|e| has_invalid(&e[0]) && is_drop(&e[1])))
    };
    let matched = |statement: &Value| {
        let test = &statement["match"];
        is_state(&test["left"]) && (has_invalid(&test["right"]) != (test["op"] == "!="))
    };
    statements.iter().any(mapped) || (statements.iter().any(matched) && statements.iter().any(is_drop))
}

fn is_state(left: &Value) -> bool {
    left["ct"]["key"] == "state"
}

/// Of iptables only `DROP` is a verdict of nftables.
pub(super) fn is_drop(verdict: &Value) -> bool {
    verdict.get("drop").is_some() || verdict.get("reject").is_some() || verdict["xt"]["name"] == "REJECT"
}

/// A word, a list of words, or a list in an object (`{"set": …}`, `{"|": …}`).
fn has_invalid(right: &Value) -> bool {
    match right {
        Value::String(word) => word == "invalid",
        Value::Array(words) => words.iter().any(has_invalid),
        Value::Object(fields) => fields.values().any(has_invalid),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(objects: &str) -> Rules {
        parse(&format!("{{\"nftables\": [{{\"metainfo\": {{\"version\": \"1.0.6\"}}}}{objects}]}}")).unwrap()
    }

    fn rule(expressions: &str) -> String {
        format!(
            r#", {{"rule": {{"family": "inet", "table": "filter", "chain": "in", "handle": 4, "expr": [{expressions}]}}}}"#
        )
    }

    #[test]
    fn rules_that_drop_what_is_invalid_are_found_in_every_spelling() {
        // As nft 1.0.6 prints: ct state invalid drop; invalid,untracked counter drop; vmap; != established,related.
        for dropping in [
            r#"{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}}, {"drop": null}"#,
            r#"{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["invalid", "untracked"]}}, {"counter": {"packets": 0, "bytes": 0}}, {"drop": null}"#,
            r#"{"match": {"op": "==", "left": {"ct": {"key": "state"}}, "right": {"set": ["invalid", "untracked"]}}}, {"reject": {"type": "tcp reset"}}"#,
            r#"{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"drop": null}], ["established", {"accept": null}]]}}}"#,
            r#"{"match": {"op": "!=", "left": {"ct": {"key": "state"}}, "right": {"|": ["established", "related"]}}}, {"drop": null}"#,
        ] {
            assert_eq!(rules(&rule(dropping)).drop_invalid, ["inet filter in"], "{dropping}");
        }
        for harmless in [
            "",
            r#"{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}}, {"counter": {}}"#,
            r#"{"match": {"op": "==", "left": {"ct": {"key": "state"}}, "right": {"set": ["established", "related"]}}}, {"accept": null}"#,
            r#"{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"accept": null}], ["new", {"drop": null}]]}}}"#,
            r#"{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "invalid"}}, {"drop": null}"#,
            r#"{"match": {"op": "!=", "left": {"ct": {"key": "state"}}, "right": "invalid"}}, {"drop": null}"#,
        ] {
            assert!(rules(&rule(harmless)).drop_invalid.is_empty(), "{harmless}");
        }
    }

    fn chain(name: &str, hook: &str) -> String {
        let hook = if hook.is_empty() {
            String::new()
        } else {
            format!(r#", "hook": "{hook}", "policy": "accept""#)
        };
        format!(r#", {{"chain": {{"family": "inet", "table": "filter", "name": "{name}"{hook}}}}}"#)
    }

    #[test]
    fn rules_of_iptables_that_may_drop_are_unread_wherever_packets_come_in() {
        const MATCH: &str =
            r#"{"xt": {"type": "match", "name": "conntrack"}}, {"counter": {"packets": 0, "bytes": 0}}"#;
        let said = |hook: &str, expressions: &str| rules(&(chain("in", hook) + &rule(expressions))).unread;
        // As nft 1.0.6 prints what iptables-nft 1.8.9 made: -m conntrack --ctstate INVALID -j DROP; -j REJECT; and other
        // versions of nft, which print a match as nothing.
        for unread in [
            format!(r#"{MATCH}, {{"drop": null}}"#),
            format!(r#"{MATCH}, {{"xt": {{"type": "target", "name": "REJECT"}}}}"#),
            r#"{"xt": null}, {"drop": null}"#.to_owned(),
            r#"{"xt": null}"#.to_owned(),
            r#"{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth0"}}, {"xt": {"type": "target", "name": "TARPIT"}}"#.to_owned(),
        ] {
            for hook in ["ingress", "prerouting", "input", "forward"] {
                assert_eq!(said(hook, &unread), ["inet filter in"], "{hook}: {unread}");
            }
            assert_eq!((said("output", &unread), said("", &unread)), (vec![], vec![]), "{unread}");
        }
        for read in [
            format!(r#"{MATCH}, {{"accept": null}}"#),
            format!(r#"{MATCH}, {{"xt": {{"type": "target", "name": "LOG"}}}}"#),
            r#"{"xt": {"type": "match", "name": "comment"}}, {"drop": null}"#.to_owned(),
            r#"{"xt": {"type": "target", "name": "REJECT"}}"#.to_owned(),
            r#"{"drop": null}"#.to_owned(),
        ] {
            assert_eq!(said("forward", &read), [""; 0], "{read}");
        }
    }

    #[test]
    fn a_chain_that_drops_is_followed_into() {
        const JUMP: &str = r#"{"xt": {"type": "match", "name": "conntrack"}}, {"goto": {"target": "SUB"}}"#;
        let of = |name: &str, expressions: &str| {
            rule(expressions).replace(r#""chain": "in""#, &format!(r#""chain": "{name}""#))
        };
        let all = chain("in", "forward") + &chain("SUB", "") + &chain("END", "") + &rule(JUMP);
        assert_eq!(rules(&all).unread, [""; 0], "there is nothing in it");
        let all = all + &of("SUB", r#"{"jump": {"target": "END"}}"#) + &of("END", r#"{"drop": null}"#);
        assert_eq!(rules(&all).unread, ["inet filter in"]);
        let all = all + &of("END", r#"{"xt": null}, {"drop": null}"#);
        assert_eq!(rules(&all).unread, ["inet filter in", "inet filter END"]);
        let round = all + &of("END", r#"{"jump": {"target": "SUB"}}"#);
        assert_eq!(rules(&round).unread, ["inet filter in", "inet filter END"], "two that call each other");
    }

    #[test]
    fn a_forward_chain_that_drops_is_named_and_no_other_chain() {
        let chain = |hook: &str, policy: &str| {
            format!(
                r#", {{"chain": {{"family": "ip", "table": "t", "name": "c", "hook": "{hook}", "policy": "{policy}"}}}}"#
            )
        };
        assert_eq!(rules(&chain("forward", "drop")).forward_drops, ["ip t c"]);
        assert_eq!(rules(&(chain("forward", "accept") + &chain("input", "drop"))), Rules::default());
        assert!(parse("{}").is_err() && parse("Error: x").is_err());
    }
}
