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
    // `ip netns list` shows the files of this directory.
    for name in super::machine::names(Path::new(NAMED)) {
        read_named(snapshot, &name)?;
    }
    Ok(())
}

const NAMED: &str = "/run/netns";
/// How often a namespace is read that changes or goes away while it is read.
const ATTEMPTS: u32 = 3;

/// Reads a named namespace, unless it has gone away meanwhile.
pub(super) fn read_named(snapshot: &mut Snapshot, name: &str) -> anyhow::Result<()> {
    let path = Path::new(NAMED).join(name);
    let mut attempt = 1;
    loop {
        let Ok(file) = File::open(&path) else { return Ok(()) };
        let inside = netlab::enter(&file, || {
            let mut inside = Snapshot::default();
            read_one(&mut inside, name)?;
            Ok(inside)
        });
        match inside {
            Ok(inside) => {
                snapshot.add(List::Netns, "", name, "");
                snapshot.entries.extend(inside.entries);
                snapshot.unseen.extend(inside.unseen);
                return Ok(());
            }
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
    // Neighbours that were learned come and go by themselves; permanent ones and proxies do not.
    const LISTS: [&str; 7] = [
        "link show",
        "addr show",
        "route show table all",
        "neigh show nud permanent",
        "neigh show proxy",
        "netns list-id",
        "rule show",
    ];
    let [ref link, ref address, ref route, ref neighbour, ref proxy, ref ids, ref rule] = batch("", LISTS)?;
    links(snapshot, scope, link);
    addresses(snapshot, scope, address);
    routes(snapshot, scope, route);
    neighbours(snapshot, scope, "permanent", neighbour);
    neighbours(snapshot, scope, "proxy", proxy);
    for id in ids {
        snapshot.add(List::NetnsId, scope, text(id, "nsid"), text(id, "name"));
    }
    let [ref rule6] = batch("-6", ["rule show"])?;
    for (family, rule) in [("IPv4", rule), ("IPv6", rule6)] {
        rules(snapshot, scope, family, rule);
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

type Object = Map<String, Value>;

/// Asks `ip` for several lists at once: a process for each would take most of the time. Without a family `rule`
/// means IPv4, and all others mean both.
fn batch<const N: usize>(family: &str, commands: [&str; N]) -> anyhow::Result<[Vec<Object>; N]> {
    let family = Some(family).filter(|family| !family.is_empty());
    let words: Vec<&str> = ["ip", "-j", "-d"].into_iter().chain(family).chain(["-batch", "-"]).collect();
    let answers = programs::run_with_input(&words, Some(&(commands.join("\n") + "\n")))?;
    let lists: Vec<_> = parse(&answers)?;
    let count = lists.len();
    lists.try_into().ok().with_context(|| format!("{count} answers of ip to {N} questions"))
}

/// Arrays of objects, one after the other.
fn parse(json: &str) -> anyhow::Result<Vec<Vec<Object>>> {
    let arrays = serde_json::Deserializer::from_str(json).into_iter::<Vec<Object>>();
    let arrays = arrays.map(|objects| {
        let mut objects = objects.with_context(|| format!("not lists of objects: {json}"))?;
        // `ip` also prints an empty object in place of what it filtered out.
        objects.retain(|object| !object.is_empty());
        Ok(objects)
    });
    arrays.collect()
}

fn text(object: &Object, key: &str) -> String {
    match object.get(key) {
        None => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// An object as text, without some keys.
fn value(object: &Object, without: &[&str]) -> String {
    let kept = object.iter().filter(|(key, _)| !without.contains(&key.as_str()));
    Value::Object(kept.map(|(key, value)| (key.clone(), value.clone())).collect()).to_string()
}

fn links(snapshot: &mut Snapshot, scope: &str, links: &[Object]) {
    for mut link in links.iter().cloned() {
        if let Some(Value::Array(flags)) = link.get_mut("flags") {
            // Follow the other end's state, not anybody's setting.
            flags.retain(|flag| !["LOWER_UP", "NO-CARRIER", "M-DOWN"].contains(&flag.as_str().unwrap_or("")));
        }
        if let Some(Value::Object(info)) = link.get_mut("linkinfo").and_then(|info| info.get_mut("info_data"))
        {
            // What a bridge counts down by itself.
            info.retain(|key, _| !key.ends_with("_timer") && !key.starts_with("topology_change"));
        }
        // The number of a link says nothing; its state follows the other end; `qdisc` is in a list of its own.
        let without = ["ifindex", "ifname", "operstate", "qdisc", "link_index", "linkmode"];
        snapshot.add(List::Link, scope, text(&link, "ifname"), value(&link, &without));
    }
}

fn addresses(snapshot: &mut Snapshot, scope: &str, links: &[Object]) {
    for link in links {
        let infos = link.get("addr_info").and_then(Value::as_array).cloned().unwrap_or_default();
        for address in infos.iter().filter_map(Value::as_object).filter(|address| !address.is_empty()) {
            // Privacy addresses of IPv6 are made and dropped by the kernel by the clock.
            if address.get("temporary").is_some() {
                continue;
            }
            let name =
                format!("{} {}/{}", text(link, "ifname"), text(address, "local"), text(address, "prefixlen"));
            // Lifetimes given by a router or a DHCP server run down; `tentative` ends by itself.
            let without = ["local", "prefixlen", "valid_life_time", "preferred_life_time", "tentative"];
            snapshot.add(List::Address, scope, name, value(address, &without));
        }
    }
}

fn routes(snapshot: &mut Snapshot, scope: &str, routes: &[Object]) {
    for route in routes {
        let name = ["type", "dst", "dev", "table"].map(|key| text(route, key)).join(" ");
        // Routes learned from a router expire and are renewed; `linkdown` and `dead` follow the other end.
        let without = ["type", "dst", "dev", "table", "expires", "flags", "used", "users", "age"];
        snapshot.add(List::Route, scope, name, value(route, &without));
    }
}

fn rules(snapshot: &mut Snapshot, scope: &str, family: &str, rules: &[Object]) {
    for rule in rules {
        let name = format!("{family} {}", text(rule, "priority"));
        snapshot.add(List::Rule, scope, name, value(rule, &["priority"]));
    }
}

fn neighbours(snapshot: &mut Snapshot, scope: &str, kind: &str, neighbours: &[Object]) {
    for neighbour in neighbours {
        let name = format!("{kind} {} {}", text(neighbour, "dst"), text(neighbour, "dev"));
        snapshot.add(List::Neighbour, scope, name, text(neighbour, "lladdr"));
    }
}

/// Returns the places at which filters may hang.
fn qdiscs(snapshot: &mut Snapshot, scope: &str, json: &str) -> anyhow::Result<Vec<(String, String)>> {
    let mut places = Vec::new();
    for discipline in parse(json)?.into_iter().flatten() {
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

    fn read(f: impl FnOnce(&mut Snapshot)) -> Vec<(String, String)> {
        let mut snapshot = Snapshot::default();
        f(&mut snapshot);
        snapshot.entries.into_iter().map(|(key, value)| (key.name, value)).collect()
    }

    fn one(json: &str) -> Vec<Object> {
        parse(json).unwrap().remove(0)
    }

    #[test]
    fn what_follows_the_other_end_or_the_clock_is_left_out() {
        let up = r#"[{"ifindex":3,"ifname":"v0","flags":["BROADCAST","UP","LOWER_UP"],"operstate":"UP","mtu":1500}]"#;
        let down = r#"[{"ifindex":9,"ifname":"v0","flags":["NO-CARRIER","BROADCAST","UP"],"operstate":"DOWN","mtu":1500}]"#;
        let link = |json: &str| read(|snapshot| links(snapshot, "", &one(json)));
        assert_eq!(link(up), link(down));
        assert_ne!(link(up), link(&up.replace("1500", "1400")));
        assert_ne!(link(up), link(&up.replace(r#","UP""#, "")), "set down");

        let address = |life: &str, more: &str| {
            let json = format!(
                r#"[{{"ifname":"e","addr_info":[{{}},{{"local":"fd00::5","prefixlen":64{more},"valid_life_time":{life}}}]}}]"#
            );
            read(|snapshot| addresses(snapshot, "", &one(&json)))
        };
        assert_eq!(address("100", ""), address("99", ""));
        assert_eq!(address("100", "")[0].0, "e fd00::5/64");
        assert_ne!(address("100", ""), address("100", r#","deprecated":true"#));
        assert_eq!(address("100", r#","temporary":true"#), []);

        let route = |more: &str| {
            let json = format!(r#"[{{"type":"unicast","dst":"default","dev":"e","table":"main"{more}}}]"#);
            read(|snapshot| routes(snapshot, "", &one(&json)))
        };
        assert_eq!(route(r#","expires":17"#), route(r#","expires":16"#));
        assert_ne!(route(""), route(r#","prefsrc":"10.0.0.1""#));
    }

    #[test]
    fn answers_to_several_questions_are_told_apart() {
        let lists = parse("[{\"a\":1},{}]\n[]\n[ ]\n[{},{\"b\":2},{\"c\":3}]").unwrap();
        assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [1, 0, 0, 2]);
        assert!(parse("[] nonsense").is_err());
        assert_eq!(batch("", ["rule show", "link show"]).unwrap().len(), 2);
        assert!(batch("", ["nonsense show"]).is_err());
    }

    #[test]
    fn a_clsact_is_seen_and_its_filters_are_looked_for() {
        let json = r#"[{"kind":"noqueue","handle":"0:","dev":"lo","root":true,"refcnt":2},
            {"kind":"clsact","handle":"ffff:","dev":"e0","parent":"ffff:fff1","options":{}}]"#;
        let mut places = Vec::new();
        let found = read(|snapshot| {
            places = qdiscs(snapshot, "", json).unwrap();
        });
        assert_eq!(found[0].0, "e0 clsact ffff:ffff:fff1");
        assert_eq!(places, [("e0".into(), "ingress".into()), ("e0".into(), "egress".into())]);
    }

    #[test]
    fn each_table_of_a_ruleset_is_one() {
        let ruleset = "table inet a {\n\tchain c {\n\t\tdrop\n\t}\n}\ntable ip b {\n}\n";
        let tables = read(|snapshot| {
            nft(snapshot, "", ruleset);
        });
        let expected = [("table inet a", "chain c {\ndrop\n}\n"), ("table ip b", "")];
        assert_eq!(tables, expected.map(|(name, body)| (name.to_owned(), body.to_owned())));
    }
}
