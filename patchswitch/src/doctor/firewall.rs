//! What the rules of nftables do to connections whose packets the host does not all see.
//!
//! The fast path takes packets past the host's firewall. A firewall that keeps track of connections therefore does not
//! know them, and one that drops what it does not know cuts them as soon as a packet takes the slow path.

use serde::Serialize;
use serde_json::Value;

/// What matters here of a ruleset. Each chain is named as `nft` does: family, table, chain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rules {
    /// Chains of the hook `forward` whose policy is to drop.
    pub forward_drops: Vec<String>,
    /// Chains with a rule that drops what connection tracking calls invalid.
    pub drop_invalid: Vec<String>,
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
    for object in objects {
        if let Some(chain) = object.get("chain") {
            if chain["hook"] == "forward" && chain["policy"] == "drop" {
                rules.forward_drops.push(name(chain, "name"));
            }
        } else if let Some(rule) = object.get("rule")
            && drops_invalid(rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default())
        {
            let chain = name(rule, "chain");
            if !rules.drop_invalid.contains(&chain) {
                rules.drop_invalid.push(chain);
            }
        }
    }
    Ok(rules)
}

fn name(object: &Value, chain: &str) -> String {
    let part = |key: &str| object[key].as_str().unwrap_or("?");
    format!("{} {} {}", part("family"), part("table"), part(chain))
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

fn is_drop(verdict: &Value) -> bool {
    verdict.get("drop").is_some() || verdict.get("reject").is_some()
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
            r#"{"xt": null}"#,
        ] {
            assert!(rules(&rule(harmless)).drop_invalid.is_empty(), "{harmless}");
        }
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
