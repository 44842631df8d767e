//! Whether the judgement follows from the facts.

use std::path::PathBuf;

use super::facts::learned_defaults;
use super::*;
use crate::dataplane::HookKind;
use crate::exit::ExitCode;
use crate::host::linux::programs::Program;

/// A host that has everything.
fn good() -> Facts {
    let place = |path: &str| Place { path: path.into(), writable: true, free: 3 << 30 };
    Facts {
        kernel: "6.12.41+deb13-amd64".to_owned(),
        root: true,
        jit: Some("1".to_owned()),
        btf: true,
        hook: HookKind::Tcx,
        bpffs: Bpffs::Mounted,
        cgroups: Cgroups::V2(Vec::new()),
        mapper: Mapper::There([4, 48, 0], Vec::new()),
        loops: true,
        runtime: Program::Crun,
        runtime_version: Ok((PathBuf::from("/usr/bin/crun"), "crun version 1.8.1".to_owned())),
        missing_programs: Vec::new(),
        missing_file_systems: Vec::new(),
        missing_copies: Some(Vec::new()),
        taps: true,
        init: Ok(PathBuf::from("/usr/lib/patchswitch/patchswitch-init")),
        rules: Ok(Rules::default()),
        old_tables: Vec::new(),
        strict: Vec::new(),
        router_routes: Vec::new(),
        state: place("/var/lib/patchswitch"),
        run: place("/run/patchswitch"),
        config: Ok(1),
    }
}

/// The one item that is not as on the good host.
fn changed(change: impl FnOnce(&mut Facts)) -> (Item, bool, bool) {
    let mut facts = good();
    change(&mut facts);
    let found = judge(&facts);
    let before = judge(&good());
    let mut differing: Vec<Item> =
        found.items.iter().filter(|item| !before.items.contains(item)).cloned().collect();
    assert_eq!(differing.len(), 1, "{differing:?}");
    (differing.remove(0), found.switch, found.whole_job)
}

#[test]
fn a_good_host_is_told_nothing_to_do() {
    let found = judge(&good());
    assert!(
        found
            .items
            .iter()
            .all(|item| item.state == State::Ok && item.advice.is_none() && item.cost.is_none())
    );
    assert_eq!((found.switch, found.whole_job, found.exit_code()), (true, true, ExitCode::Done));
    let names: std::collections::BTreeSet<_> = found.items.iter().map(|item| item.name).collect();
    assert_eq!(names.len(), found.items.len(), "an item is named twice");
}

/// What is changed, the item that says so, its state, and whether the switch and whole jobs work all the same.
type Case = (fn(&mut Facts), &'static str, State, bool, bool);

#[test]
fn each_lack_is_told_with_what_it_costs_and_what_to_type() {
    use State::{Missing, Unknown, Warn};
    let cases: [Case; 24] = [
        (|f| f.kernel = "5.15.0-91-generic".into(), "kernel", Missing, false, false),
        (|f| f.kernel = "odd".into(), "kernel", Unknown, false, false),
        (|f| f.jit = Some("0".into()), "BPF JIT", Warn, true, true),
        (|f| f.jit = None, "BPF JIT", Unknown, true, true),
        (|f| f.btf = false, "BTF", Warn, true, true),
        (|f| f.bpffs = Bpffs::Private, "BPF file system", Missing, false, false),
        (|f| f.bpffs = Bpffs::None, "BPF file system", Missing, false, false),
        (|f| f.cgroups = Cgroups::Other, "control groups", Missing, true, false),
        (|f| f.cgroups = Cgroups::V2(vec!["cpu"]), "control groups", Missing, true, false),
        (|f| f.mapper = Mapper::Absent("no".into()), "device-mapper", Missing, true, false),
        (|f| f.mapper = Mapper::There([4, 0, 0], vec!["snapshot"]), "device-mapper", Missing, true, false),
        (|f| f.mapper = Mapper::Forbidden, "device-mapper", Unknown, true, false),
        (|f| f.loops = false, "loop devices", Missing, true, false),
        (|f| f.runtime_version = Err("crun is not installed".into()), "OCI runtime", Missing, true, false),
        (|f| f.missing_programs = vec![Program::Mkfs, Program::Fsck], "programs", Missing, true, false),
        (|f| f.missing_copies = None, "copies of disks", Unknown, true, true),
        (|f| f.init = Err("nowhere".into()), "patchswitch-init", Missing, true, false),
        (|f| f.rules = Err("nft is not installed".into()), "firewall", Unknown, true, true),
        (|f| f.old_tables = vec!["filter".into()], "firewall", Unknown, true, true),
        (
            |f| f.rules = Ok(Rules { unread: vec!["ip filter FORWARD".into()], ..Rules::default() }),
            "firewall",
            Unknown,
            true,
            true,
        ),
        (|f| f.state.writable = false, "state directory", Missing, true, false),
        (|f| f.run.writable = false, "run directory", Missing, false, false),
        (|f| f.config = Err("patchswitch.toml:1:1: bad".into()), "configuration", Missing, true, false),
        (
            |f| f.router_routes = vec![RouterRoute { link: "eth0".into(), accept_ra: "1".into() }],
            "router advertisements",
            Warn,
            true,
            true,
        ),
    ];
    for (change, name, state, switch, whole_job) in cases {
        let (item, can_switch, can_all) = changed(change);
        assert_eq!((item.name, item.state), (name, state), "{item:?}");
        assert!(item.cost.is_some() && item.advice.is_some(), "{item:?}");
        assert_eq!((can_switch, can_all), (switch, whole_job), "{item:?}");
    }
}

#[test]
fn what_is_no_lack_is_told_as_it_is() {
    let (item, ..) = changed(|facts| facts.hook = HookKind::Clsact);
    assert_eq!((item.state, item.found.starts_with("clsact")), (State::Ok, true));
    let (item, ..) = changed(|facts| facts.bpffs = Bpffs::Mountable);
    assert_eq!(item.state, State::Ok);
    let (item, ..) = changed(|facts| facts.missing_file_systems = vec![Program::Btrfstune]);
    assert_eq!(
        (item.state, item.found.as_str()),
        (State::Ok, "ext4, XFS, btrfs with the package btrfs-progs")
    );
    let (item, ..) = changed(|facts| facts.missing_copies = Some(vec!["log-writes"]));
    assert_eq!(
        (item.state, item.found.as_str()),
        (State::Ok, ":log with the kernel's module dm_log_writes, :mirror")
    );
    let (item, ..) = changed(|facts| facts.taps = false);
    assert_eq!((item.state, item.found.as_str()), (State::Ok, "TAP devices with the kernel's module tun"));
    let (item, ..) = changed(|facts| facts.strict = vec!["all".into()]);
    assert_eq!((item.name, item.state), ("rp_filter", State::Ok));
    let mut facts = good();
    facts.router_routes = vec![RouterRoute { link: "eth0".into(), accept_ra: "2".into() }];
    assert_eq!(judge(&facts), judge(&good()), "2 survives forwarding, 0 is somebody else's business");
}

#[test]
fn a_firewall_is_told_with_its_chains_and_both_of_its_costs() {
    let (item, switch, whole_job) = changed(|facts| {
        facts.rules = Ok(Rules {
            forward_drops: vec!["inet filter forward".into()],
            drop_invalid: vec!["inet filter input".into()],
            unread: vec!["ip filter FORWARD".into()],
        });
        facts.old_tables = vec!["mangle".into()];
    });
    assert_eq!((item.name, item.state, switch, whole_job), ("firewall", State::Warn, true, true));
    assert!(
        ["inet filter forward", "inet filter input", "ip filter FORWARD", "mangle"]
            .iter()
            .all(|name| item.found.contains(name)),
        "{item:?}"
    );
    let advice = item.advice.unwrap();
    for part in ["drain NAME", "iptables-save", "iptables-legacy-save"] {
        assert_eq!(advice.matches(part).count(), 1, "{part} in {advice}");
    }
    let cost = item.cost.unwrap();
    assert!(cost.contains("detach") && cost.contains("fast path"), "{cost}");
}

#[test]
fn what_only_root_may_see_is_unknown_not_missing() {
    let mut facts = good();
    (facts.root, facts.state.writable, facts.run.writable) = (false, false, false);
    facts.mapper = Mapper::Forbidden;
    let found = judge(&facts);
    assert!(found.items.iter().all(|item| item.state != State::Missing), "{found:?}");
    assert_eq!(found.exit_code(), ExitCode::Unavailable, "what is not known is not promised");
}

#[test]
fn a_learned_default_route_is_told_from_all_others() {
    // Of a Linux 6.18: a route by hand, one by an advertisement, a prefix by an advertisement.
    let zero = "0".repeat(32);
    let line = |to: &str, length: &str, flags: &str, link: &str| {
        format!(
            "{to} {length} {zero} 00 fe800000000000000000000000000001 00000400 00000002 00000000 {flags} {link:>8}\n"
        )
    };
    let table = line(&zero, "00", "00000003", "eth0")
        + &line(&zero, "00", "00450003", "eth1")
        + &line(&zero, "00", "00450003", "eth1")
        + &line("20010db8000000000000000000000000", "40", "00040001", "eth2")
        + &line(&zero, "00", "80200200", "lo");
    assert_eq!(learned_defaults(&table), ["eth1"]);
    assert!(learned_defaults("").is_empty() && learned_defaults("a b\n").is_empty());
}
