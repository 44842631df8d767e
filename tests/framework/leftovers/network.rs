//! The lists of a network namespace, as `ip`, `tc`, `nft` and `/proc/sys/net` show them.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Map, Value};

use super::{List, Snapshot};
use crate::{netlab, programs};

/// Reads the observer's namespace and all named ones.
pub(super) fn read(snapshot: &mut Snapshot) -> anyhow::Result<()> {
    read_one(snapshot, "")?;
    let named = programs::run(&["ip", "-j", "netns", "list"])?;
    for namespace in parse(&named)? {
        let name = text(&namespace, "name");
        if let Some(inside) = read_named(&name)? {
            snapshot.add(List::Netns, "", &name, "");
            snapshot.entries.extend(inside.entries);
            snapshot.unseen.extend(inside.unseen);
        }
    }
    Ok(())
}

/// How often a namespace is read that changes or goes away while it is read.
const ATTEMPTS: u32 = 3;

/// Reads a named namespace; none if it has gone away meanwhile.
fn read_named(name: &str) -> anyhow::Result<Option<Snapshot>> {
    let path = Path::new("/run/netns").join(name);
    let mut attempt = 1;
    loop {
        let Ok(file) = File::open(&path) else { return Ok(None) };
        let inside = netlab::enter(&file, || {
            let mut inside = Snapshot::default();
            read_one(&mut inside, name)?;
            Ok(inside)
        });
        match inside {
            Ok(inside) => return Ok(Some(inside)),
            Err(error) if attempt == ATTEMPTS => {
                return Err(error).with_context(|| format!("in the namespace {name}"));
            }
            // Who deletes a namespace may kill what runs in it, and that includes the `ip` that reads it.
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
        attempt += 1;
    }
}

fn read_one(snapshot: &mut Snapshot, scope: &str) -> anyhow::Result<()> {
    let ip = |arguments: &[&str]| programs::run(&[&["ip", "-j"], arguments].concat());
    links(snapshot, scope, &ip(&["-d", "link", "show"])?)?;
    addresses(snapshot, scope, &ip(&["addr", "show"])?)?;
    for family in ["-4", "-6"] {
        routes(snapshot, scope, &ip(&[family, "-d", "route", "show", "table", "all"])?)?;
        rules(snapshot, scope, family, &ip(&[family, "rule", "show"])?)?;
    }
    // Neighbours that were learned come and go by themselves; these do not.
    for kind in [&["nud", "permanent"][..], &["proxy"]] {
        neighbours(snapshot, scope, kind, &ip(&[&["neigh", "show"], kind].concat())?)?;
    }
    for id in parse(&ip(&["netns", "list-id"])?)? {
        snapshot.add(List::NetnsId, scope, text(&id, "nsid"), text(&id, "name"));
    }
    let disciplines = programs::run(&["tc", "-j", "qdisc", "show"])?;
    for (link, parent) in qdiscs(snapshot, scope, &disciplines)? {
        let filters = programs::run(&["tc", "filter", "show", "dev", &link, &parent])?;
        for line in filters.lines() {
            snapshot.add(List::Qdisc, scope, format!("{link} {parent} {}", line.trim()), "");
        }
    }
    match programs::find("nft") {
        Some(_) => nft(snapshot, scope, &programs::run(&["nft", "-s", "list", "ruleset"])?),
        None => snapshot.not_seen("nft is not installed: tables of nftables are not compared".into()),
    }
    for area in ["ipv4", "ipv6", "core", "unix"] {
        let path = Path::new("/proc/sys/net").join(area);
        if path.is_dir() {
            sysctls(snapshot, scope, &path)?;
        }
    }
    Ok(())
}

/// The objects of an array; `ip` prints nothing at all for some empty lists.
fn parse(json: &str) -> anyhow::Result<Vec<Map<String, Value>>> {
    if json.trim().is_empty() {
        return Ok(Vec::new());
    }
    let objects: Vec<Map<String, Value>> =
        serde_json::from_str(json).with_context(|| format!("not a list of objects: {json}"))?;
    // `ip` also prints an empty object in place of what it filtered out.
    Ok(objects.into_iter().filter(|object| !object.is_empty()).collect())
}

fn text(object: &Map<String, Value>, key: &str) -> String {
    match object.get(key) {
        None => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// An object as text, without some keys.
fn value(object: &Map<String, Value>, without: &[&str]) -> String {
    let kept = object.iter().filter(|(key, _)| !without.contains(&key.as_str()));
    Value::Object(kept.map(|(key, value)| (key.clone(), value.clone())).collect()).to_string()
}

fn links(snapshot: &mut Snapshot, scope: &str, json: &str) -> anyhow::Result<()> {
    for mut link in parse(json)? {
        if let Some(Value::Array(flags)) = link.get_mut("flags") {
            // Follow the other end's state, not anybody's setting.
            flags.retain(|flag| !["LOWER_UP", "NO-CARRIER", "M-DOWN"].contains(&flag.as_str().unwrap_or("")));
        }
        // The number of a link says nothing; its state follows the other end; `qdisc` is in a list of its own.
        let without = ["ifindex", "ifname", "operstate", "qdisc", "link_index", "linkmode"];
        snapshot.add(List::Link, scope, text(&link, "ifname"), value(&link, &without));
    }
    Ok(())
}

fn addresses(snapshot: &mut Snapshot, scope: &str, json: &str) -> anyhow::Result<()> {
    for link in parse(json)? {
        let infos = link.get("addr_info").and_then(Value::as_array).cloned().unwrap_or_default();
        for address in infos.iter().filter_map(Value::as_object).filter(|address| !address.is_empty()) {
            // Privacy addresses of IPv6 are made and dropped by the kernel by the clock.
            if address.get("temporary").is_some() {
                continue;
            }
            let name = format!(
                "{} {}/{}",
                text(&link, "ifname"),
                text(address, "local"),
                text(address, "prefixlen")
            );
            // Lifetimes given by a router or a DHCP server run down; `tentative` ends by itself.
            let without = ["local", "prefixlen", "valid_life_time", "preferred_life_time", "tentative"];
            snapshot.add(List::Address, scope, name, value(address, &without));
        }
    }
    Ok(())
}

fn routes(snapshot: &mut Snapshot, scope: &str, json: &str) -> anyhow::Result<()> {
    for route in parse(json)? {
        let name = ["type", "dst", "dev", "table"].map(|key| text(&route, key)).join(" ");
        // Routes learned from a router expire and are renewed; `linkdown` and `dead` follow the other end.
        let without = ["type", "dst", "dev", "table", "expires", "flags", "used", "users", "age"];
        snapshot.add(List::Route, scope, name, value(&route, &without));
    }
    Ok(())
}

fn rules(snapshot: &mut Snapshot, scope: &str, family: &str, json: &str) -> anyhow::Result<()> {
    for rule in parse(json)? {
        let name = format!("{family} {}", text(&rule, "priority"));
        snapshot.add(List::Rule, scope, name, value(&rule, &["priority"]));
    }
    Ok(())
}

fn neighbours(snapshot: &mut Snapshot, scope: &str, kind: &[&str], json: &str) -> anyhow::Result<()> {
    for neighbour in parse(json)? {
        let name = format!("{} {} {}", kind.join(" "), text(&neighbour, "dst"), text(&neighbour, "dev"));
        snapshot.add(List::Neighbour, scope, name, text(&neighbour, "lladdr"));
    }
    Ok(())
}

/// Returns the places at which filters may hang.
fn qdiscs(snapshot: &mut Snapshot, scope: &str, json: &str) -> anyhow::Result<Vec<(String, String)>> {
    let mut places = Vec::new();
    for discipline in parse(json)? {
        let (link, kind) = (text(&discipline, "dev"), text(&discipline, "kind"));
        if kind == "clsact" {
            places.extend(["ingress", "egress"].map(|parent| (link.clone(), parent.to_owned())));
        }
        let name = format!("{link} {kind} {}{}", text(&discipline, "handle"), text(&discipline, "parent"));
        // The number of users is the kernel's own.
        snapshot.add(
            List::Qdisc,
            scope,
            name,
            value(&discipline, &["dev", "kind", "handle", "parent", "refcnt"]),
        );
    }
    Ok(places)
}

/// Each table of a ruleset, from its first line to its closing brace.
fn nft(snapshot: &mut Snapshot, scope: &str, ruleset: &str) {
    let mut table: Option<(String, String)> = None;
    for line in ruleset.lines() {
        match &mut table {
            None => table = line.strip_suffix(" {").map(|name| (name.to_owned(), String::new())),
            Some((name, body)) if line == "}" => {
                snapshot.add(List::Nft, scope, std::mem::take(name), std::mem::take(body));
                table = None;
            }
            Some((_, body)) => {
                body.push_str(line.trim());
                body.push('\n');
            }
        }
    }
}

fn sysctls(snapshot: &mut Snapshot, scope: &str, directory: &Path) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(directory);
    // A link's directory may go away meanwhile.
    for entry in entries.into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sysctls(snapshot, scope, &path)?;
            continue;
        }
        // Some can only be written (`flush`) or are not set (`stable_secret`).
        let Ok(value) = std::fs::read_to_string(&path) else { continue };
        let name = path.strip_prefix("/proc/sys/net")?.display().to_string();
        // The key is made by the kernel at its first use.
        if name != "ipv4/tcp_fastopen_key" {
            snapshot.add(List::Sysctl, scope, name, value.trim());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(f: impl FnOnce(&mut Snapshot) -> anyhow::Result<()>) -> Vec<(String, String)> {
        let mut snapshot = Snapshot::default();
        f(&mut snapshot).unwrap();
        snapshot.entries.into_iter().map(|(key, value)| (key.name, value)).collect()
    }

    #[test]
    fn what_follows_the_other_end_or_the_clock_is_left_out() {
        let up = r#"[{"ifindex":3,"ifname":"v0","flags":["BROADCAST","UP","LOWER_UP"],"operstate":"UP","mtu":1500}]"#;
        let down = r#"[{"ifindex":9,"ifname":"v0","flags":["NO-CARRIER","BROADCAST","UP"],"operstate":"DOWN","mtu":1500}]"#;
        let link = |json: &str| read(|snapshot| links(snapshot, "", json));
        assert_eq!(link(up), link(down));
        assert_ne!(link(up), link(&up.replace("1500", "1400")));
        assert_ne!(link(up), link(&up.replace(r#","UP""#, "")), "set down");

        let address = |life: &str, more: &str| {
            let json = format!(
                r#"[{{"ifname":"e","addr_info":[{{}},{{"local":"fd00::5","prefixlen":64{more},"valid_life_time":{life}}}]}}]"#
            );
            read(|snapshot| addresses(snapshot, "", &json))
        };
        assert_eq!(address("100", ""), address("99", ""));
        assert_eq!(address("100", "")[0].0, "e fd00::5/64");
        assert_ne!(address("100", ""), address("100", r#","deprecated":true"#));
        assert_eq!(address("100", r#","temporary":true"#), []);

        let route = |more: &str| {
            let json = format!(r#"[{{"type":"unicast","dst":"default","dev":"e","table":"main"{more}}}]"#);
            read(|snapshot| routes(snapshot, "", &json))
        };
        assert_eq!(route(r#","expires":17"#), route(r#","expires":16"#));
        assert_ne!(route(""), route(r#","prefsrc":"10.0.0.1""#));
    }

    #[test]
    fn lists_that_are_empty_in_any_of_the_ways_of_ip_are_empty() {
        for json in ["", "\n", "[]", "[ ]\n", "[{}]"] {
            assert_eq!(parse(json).unwrap().len(), 0, "{json:?}");
        }
        assert!(parse("nonsense").is_err());
    }

    #[test]
    fn a_clsact_is_seen_and_its_filters_are_looked_for() {
        let json = r#"[{"kind":"noqueue","handle":"0:","dev":"lo","root":true,"refcnt":2},
            {"kind":"clsact","handle":"ffff:","dev":"e0","parent":"ffff:fff1","options":{}}]"#;
        let mut places = Vec::new();
        let found = read(|snapshot| {
            places = qdiscs(snapshot, "", json)?;
            Ok(())
        });
        assert_eq!(found[0].0, "e0 clsact ffff:ffff:fff1");
        assert_eq!(places, [("e0".into(), "ingress".into()), ("e0".into(), "egress".into())]);
    }

    #[test]
    fn each_table_of_a_ruleset_is_one() {
        let ruleset = "table inet a {\n\tchain c {\n\t\tdrop\n\t}\n}\ntable ip b {\n}\n";
        let tables = read(|snapshot| {
            nft(snapshot, "", ruleset);
            Ok(())
        });
        let expected = [("table inet a", "chain c {\ndrop\n}\n"), ("table ip b", "")];
        assert_eq!(tables, expected.map(|(name, body)| (name.to_owned(), body.to_owned())));
    }
}
