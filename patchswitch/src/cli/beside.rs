//! What is beside an attachment on the host: programs on its links, and the firewall.

use std::fmt::Write;

use patchswitch::attachment::Record;
use patchswitch::doctor::{self, Item, Named};
use serde_json::{Value, json};

use super::print;

/// The lists, or nothing if they cannot be had: that is said, and no reason to keep the rest to oneself.
pub(super) async fn programs(record: &Record) -> Value {
    match record.programs().await {
        Ok(lists) => json!(lists),
        Err(error) => {
            print::progress(&format!("the programs on the links of {} are not known: {error}", record.name));
            Value::Null
        }
    }
}

/// Says what the firewall of this host means for an attachment, and what of it is not known.
pub(super) fn warn_of_the_firewall(record: &Record) {
    let Named { addresses, links } = doctor::rules_about(&record.addresses, &record.uplinks);
    for chain in addresses {
        print::progress(&format!("warning: rules of {chain} name the service, whose packets pass them by"));
    }
    for chain in links {
        let uplinks = record.uplinks.join(" or ");
        print::progress(&format!(
            "warning: rules of {chain} drop what comes or goes by {uplinks}; the service's packets pass them by"
        ));
    }
    if let Some(Item { found, cost, advice, .. }) = doctor::firewall() {
        print::progress(&format!("warning: {found}"));
        cost.into_iter().for_each(|cost| print::progress(&format!("  that means: {cost}")));
        advice.into_iter().for_each(|advice| print::progress(&format!("  next: {advice}")));
    }
}

/// What a detach would do even to connections that are older than the attachment and have another way to go on.
pub(super) fn cut_by_the_firewall() -> String {
    match doctor::drops_invalid().as_slice() {
        [] => String::new(),
        chains => format!(
            ", even those that are older than the attachment: {} drops what connection tracking has lost sight of",
            chains.join(", ")
        ),
    }
}

/// One line for each link and direction.
pub(super) fn lines(lists: &Value) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    for list in lists.as_array().into_iter().flatten() {
        let word = |key: &str| list[key].as_str().unwrap_or("?");
        let programs = list["programs"].as_array().into_iter().flatten().map(one);
        let programs = programs.collect::<Vec<_>>().join(", ");
        writeln!(text, "  programs   {} {}: {programs}", word("link"), word("direction"))?;
    }
    Ok(text)
}

/// `tcx ps_uplink 17 (ours, web)`, `clsact 49152 flower`
fn one(placed: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let mut words = vec![word(&placed["hook"])];
    words.extend(placed["priority"].as_u64().map(|number| number.to_string()));
    match &placed["program"] {
        Value::Null => words.push(word(&placed["kind"])),
        program => {
            words
                .push(Some(word(&program["name"])).filter(|name| !name.is_empty()).unwrap_or("?".to_owned()));
            words.push(program["id"].to_string());
        }
    }
    words.extend(placed["attachment"].as_str().map(|name| format!("(ours, {name})")));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_are_marked_and_others_named_as_far_as_they_have_a_name() {
        let lists = json!([{"link": "eth0", "direction": "ingress", "programs": [
            {"hook": "xdp-generic", "priority": null, "kind": "bpf", "attachment": null,
             "program": {"id": 7, "name": "", "tag": "00"}},
            {"hook": "tcx", "priority": null, "kind": "bpf", "attachment": "web",
             "program": {"id": 9, "name": "ps_uplink", "tag": "01"}},
            {"hook": "clsact", "priority": 3, "kind": "flower", "attachment": null, "program": null},
        ]}]);
        assert_eq!(
            lines(&lists).unwrap(),
            "  programs   eth0 ingress: xdp-generic ? 7, tcx ps_uplink 9 (ours, web), clsact 3 flower\n"
        );
        assert_eq!(lines(&Value::Null).unwrap(), "");
    }
}
