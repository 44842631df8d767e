//! Whatever is left behind is seen, and nothing is seen that is not left.
//!
//! Other tests run at the same time and make namespaces of their own, so each test looks only for what it made.

use std::path::Path;
use std::time::{Duration, Instant};

use patchswitch_tests::leftovers::{Leftover, List, Snapshot};
use patchswitch_tests::netlab::{Lab, SwitchLab, UPLINK};
use patchswitch_tests::programs;

/// The differences in a list since a snapshot whose names, scopes or values have a word in them.
fn left(before: &Snapshot, list: List, word: &str) -> Vec<Leftover> {
    let after = Snapshot::take().unwrap();
    let has = |leftover: &Leftover| {
        let text = leftover.to_string();
        leftover.list == list && text.contains(word)
    };
    before.diff(&after).into_iter().filter(has).collect()
}

#[test]
fn every_kind_of_thing_left_in_a_namespace_is_seen_and_gone_when_it_is_undone() {
    let lab = SwitchLab::new("left").unwrap();
    let name = lab.host.name();
    let before = Snapshot::take().unwrap();
    for (list, change, undo) in [
        (List::Link, "link add left0 type veth peer name left1", "link del left0"),
        (List::Link, "link set uplink0 promisc on", "link set uplink0 promisc off"),
        (List::Address, "addr add 10.9.9.9/32 dev uplink0", "addr del 10.9.9.9/32 dev uplink0"),
        (List::Address, "addr add fd99::9/128 dev uplink0 nodad", "addr del fd99::9/128 dev uplink0"),
        (List::Route, "route add 10.9.9.9/32 dev uplink0 table 77", "route del 10.9.9.9/32 table 77"),
        (List::Route, "-6 route add blackhole fd99::/64", "-6 route del blackhole fd99::/64"),
        (List::Rule, "rule add from 10.9.9.9 lookup 77", "rule del from 10.9.9.9 lookup 77"),
        (List::Rule, "-6 rule add from fd99::9 lookup 77", "-6 rule del from fd99::9 lookup 77"),
        (
            List::Neighbour,
            "neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 nud permanent dev uplink0",
            "neigh del 10.77.0.9 dev uplink0",
        ),
        (List::Neighbour, "neigh add proxy 10.77.0.10 dev uplink0", "neigh del proxy 10.77.0.10 dev uplink0"),
        (List::Neighbour, "neigh add proxy fd77::10 dev uplink0", "neigh del proxy fd77::10 dev uplink0"),
    ] {
        lab.host.ip(change).unwrap();
        assert_ne!(left(&before, list, name), [], "{change}");
        lab.host.ip(undo).unwrap();
        assert_eq!(left(&before, list, name), [], "{undo}");
    }
    for (alias, count) in [("somebody", 1), ("", 0)] {
        lab.host.run(&["ip", "link", "set", UPLINK, "alias", alias]).unwrap();
        assert_eq!(left(&before, List::Link, name).len(), count);
    }
    lab.host.sysctl("net/ipv4/ip_forward", "1").unwrap();
    let changed = left(&before, List::Sysctl, name);
    assert!(changed.iter().any(|left| left.name == "ipv4/ip_forward"), "{changed:?}");
    lab.host.sysctl("net/ipv4/ip_forward", "0").unwrap();
    assert_eq!(left(&before, List::Sysctl, name), []);
    lab.host.sysctl(&format!("net/ipv6/neigh/{UPLINK}/proxy_delay"), "0").unwrap();
    assert_eq!(left(&before, List::Sysctl, name).len(), 1);
}

#[test]
fn qdiscs_nsids_and_tables_of_a_namespace_are_seen() {
    let lab = SwitchLab::new("more").unwrap();
    let name = lab.host.name();
    let before = Snapshot::take().unwrap();
    lab.host.run(&["tc", "qdisc", "add", "dev", UPLINK, "clsact"]).unwrap();
    assert_eq!(left(&before, List::Qdisc, name).len(), 1);
    lab.host.run(&["ip", "netns", "set", lab.a.name(), "4711"]).unwrap();
    let ids = left(&before, List::NetnsId, name);
    assert!(ids.len() == 1 && ids[0].name == "4711", "{ids:?}");
    if programs::find("nft").is_some() {
        lab.host.run(&["nft", "add", "table", "inet", "left"]).unwrap();
        assert_eq!(left(&before, List::Nft, name).len(), 1);
    }
}

#[test]
fn a_namespace_that_is_left_is_one_leftover() {
    let before = Snapshot::take().unwrap();
    let mut lab = Lab::new("stays");
    let ns = lab.namespace("x").unwrap();
    let found = before.diff(&Snapshot::take().unwrap());
    let found: Vec<_> = found.iter().filter(|left| left.to_string().contains(ns.name())).collect();
    // Its name, and the file that carries it as a mount.
    let lists: Vec<_> = found.iter().map(|left| left.list).collect();
    assert_eq!(lists, [List::Netns, List::Mount], "{found:?}");
    let name = ns.name().to_owned();
    drop((ns, lab));
    assert_eq!(left(&before, List::Netns, &name), []);
}

#[test]
fn mounts_loops_and_programs_are_seen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let before = Snapshot::take().unwrap();
    programs::run(&["mount", "-t", "tmpfs", "left", path]).unwrap();
    let mounts = left(&before, List::Mount, path);
    programs::run(&["umount", path]).unwrap();
    assert_eq!(mounts.len(), 1);
    assert_eq!(left(&before, List::Mount, path), []);

    let file = directory.path().join("disk");
    std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let loop_device = programs::run(&["losetup", "-f", "--show", file.to_str().unwrap()]).unwrap();
    let loops = left(&before, List::Block, path);
    programs::run(&["losetup", "-d", loop_device.trim()]).unwrap();
    assert_eq!(loops.len(), 1, "{loop_device}");
    assert_eq!(left(&before, List::Block, path), []);
}

#[test]
fn a_process_of_ours_and_a_namespace_that_only_a_process_holds_are_seen() {
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("patchswitch-left");
    std::fs::copy(programs::find("sleep").unwrap(), &copy).unwrap();
    let before = Snapshot::take().unwrap();
    let running = programs::spawn(&["unshare", "--uts", copy.to_str().unwrap(), "60"], None).unwrap();
    let pid = running.pid();
    // `unshare` becomes the program.
    while !std::fs::read_link(format!("/proc/{pid}/exe")).unwrap().ends_with("patchswitch-left") {
        std::thread::sleep(Duration::from_millis(5));
    }
    let processes = left(&before, List::Process, "patchswitch-lef");
    assert!(processes.iter().any(|left| left.name.starts_with(&pid.to_string())), "{processes:?}");
    assert_ne!(left(&before, List::Namespace, "uts"), []);
    drop(running);
    assert_eq!(left(&before, List::Process, &format!("{pid} patchswitch-lef")), []);
}

#[test]
fn a_control_group_is_seen() {
    let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].into_iter().find(|root| Path::new(root).is_dir());
    let group = Path::new(root.unwrap()).join(format!("left{}", std::process::id()));
    let before = Snapshot::take().unwrap();
    std::fs::create_dir(&group).unwrap();
    let groups = left(&before, List::Cgroup, group.to_str().unwrap());
    std::fs::remove_dir(&group).unwrap();
    assert_eq!(groups.len(), 1);
    assert_eq!(left(&before, List::Cgroup, group.to_str().unwrap()), []);
}

#[test]
fn a_map_that_nothing_but_a_pin_holds_is_seen_until_the_kernel_has_freed_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let before = Snapshot::take().unwrap();
    programs::run(&["mount", "-t", "bpf", "bpf", path]).unwrap();
    let pin = format!("{path}/left");
    let words = "map create PIN type array key 4 value 4 entries 1 name leftbehind";
    let words: Vec<_> = words.split(' ').map(|word| if word == "PIN" { &pin } else { word }).collect();
    let made = programs::run(&[&["bpftool"], &words[..]].concat());
    let seen = left(&before, List::Bpf, "leftbehind");
    programs::run(&["umount", path]).unwrap();
    made.unwrap();
    assert_eq!(seen.len(), 1, "{seen:?}");
    let end = Instant::now() + Duration::from_secs(10);
    while !left(&before, List::Bpf, "leftbehind").is_empty() {
        assert!(Instant::now() < end, "the map stays");
    }
}

#[test]
fn looking_twice_finds_nothing_that_changes_by_itself() {
    let lab = SwitchLab::new("same").unwrap();
    let before = Snapshot::take().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let left = before.diff(&Snapshot::take().unwrap());
    // In the namespaces that only this test has; other tests change the machine's own lists meanwhile.
    let own =
        |left: &&Leftover| [&lab.client, &lab.host, &lab.a, &lab.b].iter().any(|ns| ns.name() == left.scope);
    let own: Vec<_> = left.iter().filter(own).collect();
    assert!(own.is_empty(), "{own:?}");
}
