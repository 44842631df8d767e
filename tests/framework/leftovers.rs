//! What is left behind: the kernel's lists before and after, and how they differ.
//!
//! Everything in a list counts, whatever its name, so that a leftover is seen even if the product forgot that it
//! made it. What changes by itself is left out in the place where it is read, each with its reason.

mod machine;
mod network;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::netlab::Ns;

/// A list of the kernel, or of the system around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum List {
    /// Named network namespaces.
    Netns,
    /// Numbers by which network namespaces know each other.
    NetnsId,
    /// Network links.
    Link,
    /// Addresses.
    Address,
    /// Routes of all tables.
    Route,
    /// Routing rules.
    Rule,
    /// Permanent and proxy neighbours.
    Neighbour,
    /// Queueing disciplines, and filters hung onto `clsact`.
    Qdisc,
    /// System controls of the network.
    Sysctl,
    /// Tables of nftables.
    Nft,
    /// Block devices; bound loops with their files, device-mapper devices with their tables.
    Block,
    /// Mounts of the observer's mount namespace.
    Mount,
    /// Control groups of all hierarchies.
    Cgroup,
    /// Files below `/sys/fs/bpf`.
    BpfPin,
    /// BPF programs, maps and links, pinned or not.
    Bpf,
    /// Processes that are patchswitch's, an OCI runtime's, or in a PID namespace below the observer's.
    Process,
    /// Namespaces that only processes hold.
    Namespace,
    /// Files of the run-time directories.
    File,
}

/// Where an entry is and what it is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Key {
    list: List,
    /// The network namespace it is in; empty for the observer's, and for what is in none.
    scope: String,
    name: String,
}

/// The lists at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    #[serde(with = "entries")]
    entries: BTreeMap<Key, String>,
    /// What could not be looked at, and why.
    unseen: BTreeSet<String>,
}

/// Something that was not there before, or is not any more, or is another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftover {
    /// The list it is in.
    pub list: List,
    /// The network namespace it is in; empty for the observer's, and for what is in none.
    pub scope: String,
    /// What it is called.
    pub name: String,
    /// What it was before, if it was.
    pub before: Option<String>,
    /// What it is now, if it is.
    pub after: Option<String>,
}

impl Leftover {
    /// Whether a test can have left it whose laboratory's namespaces have names that begin with this; other work goes on
    /// on the machine.
    pub fn is_of(&self, prefix: &str) -> bool {
        // A namespace cannot lose the number by which another one knows it.
        if self.list == List::NetnsId {
            return false;
        }
        // A BPF program, map or link that is gone was another's: a test takes its list when it has none.
        if self.list == List::Bpf && self.after.is_none() {
            return false;
        }
        let product = matches!(self.list, List::File | List::Mount | List::BpfPin | List::Bpf);
        let text = self.to_string();
        text.contains(prefix) || product && (text.contains("patchswitch") || text.contains("ps_"))
    }
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = format!("{:?}", self.list).to_lowercase();
        write!(f, "{list} ")?;
        if !self.scope.is_empty() {
            write!(f, "in {} ", self.scope)?;
        }
        write!(f, "{}", self.name)?;
        match (&self.before, &self.after) {
            (None, Some(after)) => write!(f, " is left: {after}"),
            (Some(before), None) => write!(f, " is gone: {before}"),
            (before, after) => {
                let text = |value: &Option<String>| value.clone().unwrap_or_default();
                write!(f, " was changed from {} to {}", text(before), text(after))
            }
        }
    }
}

impl Snapshot {
    /// Reads all lists, of the observer's network namespace and of every named one.
    ///
    /// # Errors
    /// If a list that must be there cannot be read. What may be missing (nftables, device-mapper) is noted in
    /// [`Snapshot::unseen`] instead.
    pub fn take() -> anyhow::Result<Self> {
        let mut snapshot = Self::default();
        network::read(&mut snapshot)?;
        machine::read(&mut snapshot)?;
        Ok(snapshot)
    }

    /// Reads only the lists of some namespaces: for tests that share their machine with others.
    ///
    /// # Errors
    /// As [`Snapshot::take`].
    pub fn of(namespaces: &[&Ns]) -> anyhow::Result<Self> {
        let mut snapshot = Self::default();
        for namespace in namespaces {
            network::read_named(&mut snapshot, namespace.name())?;
        }
        Ok(snapshot)
    }

    /// What could not be looked at, and why.
    pub fn unseen(&self) -> impl Iterator<Item = &str> {
        self.unseen.iter().map(String::as_str)
    }

    /// How this, the earlier one, differs from a later one.
    pub fn diff(&self, later: &Self) -> Vec<Leftover> {
        let keys: BTreeSet<&Key> = self.entries.keys().chain(later.entries.keys()).collect();
        let shown = keys.into_iter().filter(|key| self.is_shown(later, key));
        let differing = shown.filter_map(|key| {
            let (before, after) = (self.entries.get(key), later.entries.get(key));
            (before != after).then(|| Leftover {
                list: key.list,
                scope: key.scope.clone(),
                name: key.name.clone(),
                before: before.cloned(),
                after: after.cloned(),
            })
        });
        differing.collect()
    }

    /// Whether a difference is worth a line of its own. What lies in a namespace that came or went is not: the
    /// namespace is shown. Nor are the controls of a link that came or went: the link is shown.
    fn is_shown(&self, later: &Self, key: &Key) -> bool {
        let names = |snapshot: &Self| snapshot.entries.contains_key(&Key::netns(&key.scope));
        let stays = key.scope.is_empty() || (names(self) && names(later));
        if !stays {
            return false;
        }
        key.list != List::Sysctl || (self.entries.contains_key(key) && later.entries.contains_key(key))
    }

    /// What is left since an earlier snapshot. Looks again for a while before it says that something is: the kernel
    /// frees programs, maps, namespaces and control groups a little after their last user has gone.
    ///
    /// # Errors
    /// As [`Snapshot::take`].
    pub fn left_since(before: &Self, patience: Duration) -> anyhow::Result<Vec<Leftover>> {
        let end = Instant::now() + patience;
        loop {
            let left = before.diff(&Self::take()?);
            if left.is_empty() || Instant::now() >= end {
                return Ok(left);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn add(&mut self, list: List, scope: &str, name: impl Into<String>, value: impl Into<String>) {
        let mut key = Key { list, scope: scope.to_owned(), name: name.into() };
        // Two mounts on one place, two equal routes: the second one counts as well.
        let name = key.name.clone();
        for number in 2.. {
            if !self.entries.contains_key(&key) {
                break;
            }
            key.name = format!("{name} ({number})");
        }
        self.entries.insert(key, value.into());
    }

    fn not_seen(&mut self, what: String) {
        self.unseen.insert(what);
    }
}

impl Key {
    fn netns(name: &str) -> Self {
        Self { list: List::Netns, scope: String::new(), name: name.to_owned() }
    }
}

mod entries {
    use std::collections::BTreeMap;

    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::Key;

    pub(super) fn serialize<S: Serializer>(map: &BTreeMap<Key, String>, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(map)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<Key, String>, D::Error> {
        Ok(Vec::deserialize(d)?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(entries: &[(List, &str, &str, &str)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (list, scope, name, value) in entries {
            snapshot.add(*list, scope, *name, *value);
        }
        snapshot
    }

    fn texts(before: &Snapshot, after: &Snapshot) -> Vec<String> {
        before.diff(after).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_came_went_and_changed_is_told() {
        let before = snapshot(&[(List::Link, "", "a", "up"), (List::Mount, "", "/m", "ext4")]);
        let after = snapshot(&[(List::Link, "", "a", "down"), (List::Bpf, "", "program 7", "steer")]);
        assert_eq!(
            texts(&before, &after),
            ["link a was changed from up to down", "mount /m is gone: ext4", "bpf program 7 is left: steer"]
        );
        assert_eq!(before.diff(&before), []);
    }

    #[test]
    fn a_second_one_of_the_same_name_counts() {
        let once = snapshot(&[(List::Mount, "", "/m", "tmpfs")]);
        let twice = snapshot(&[(List::Mount, "", "/m", "tmpfs"), (List::Mount, "", "/m", "tmpfs")]);
        assert_eq!(texts(&once, &twice), ["mount /m (2) is left: tmpfs"]);
    }

    #[test]
    fn a_namespace_stands_for_what_is_in_it_and_a_link_for_its_controls() {
        let inside = [(List::Link, "ns", "lo", "up"), (List::Route, "ns", "default", "dev lo")];
        let with = snapshot(&[&[(List::Netns, "", "ns", "")], &inside[..]].concat());
        assert_eq!(texts(&snapshot(&[]), &with), ["netns ns is left: "]);
        assert_eq!(texts(&with, &snapshot(&[])), ["netns ns is gone: "]);
        let less = snapshot(&[(List::Netns, "", "ns", ""), inside[0]]);
        assert_eq!(texts(&with, &less), ["route in ns default is gone: dev lo"], "it was and is there");

        let link = snapshot(&[(List::Link, "", "v0", ""), (List::Sysctl, "", "ipv4/conf/v0/rp_filter", "0")]);
        assert_eq!(texts(&snapshot(&[]), &link), ["link v0 is left: "]);
        let changed =
            snapshot(&[(List::Link, "", "v0", ""), (List::Sysctl, "", "ipv4/conf/v0/rp_filter", "2")]);
        assert_eq!(texts(&link, &changed), ["sysctl ipv4/conf/v0/rp_filter was changed from 0 to 2"]);
    }

    #[test]
    fn a_snapshot_survives_its_file() {
        let mut taken = snapshot(&[(List::Link, "", "a", "up"), (List::BpfPin, "", "/x", "")]);
        taken.not_seen("nft is not installed".into());
        let text = serde_json::to_string(&taken).unwrap();
        assert_eq!(serde_json::from_str::<Snapshot>(&text).unwrap(), taken);
    }
}
