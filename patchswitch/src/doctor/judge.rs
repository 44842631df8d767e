//! What follows from what is there. Nothing here asks the host.

use std::fmt::Write as _;

use super::facts::{Bpffs, Cgroups, Facts, Mapper, Place};
use super::{Diagnosis, Item, Need, Rules, State};
use crate::dataplane::HookKind;
use crate::host::linux::programs::Program;

/// The oldest kernel, `(major, minor)`.
const OLDEST: (u32, u32) = (6, 1);

/// Judges.
pub fn judge(facts: &Facts) -> Diagnosis {
    Diagnosis::new(vec![
        root(facts),
        kernel(facts),
        jit(facts),
        btf(facts),
        hook(facts),
        bpffs(facts),
        cgroups(facts),
        mapper(facts),
        loops(facts),
        runtime(facts),
        programs(facts),
        file_systems(facts),
        copies(facts),
        waiting(facts),
        init(facts),
        firewall(&facts.rules, &facts.old_tables),
        reverse_path(facts),
        routers(facts),
        directory("state directory", Need::Job, &facts.state, facts.root),
        directory("run directory", Need::Switch, &facts.run, facts.root),
        config(facts),
        scope(),
    ])
}

fn ok(name: &'static str, needed_by: Need, found: impl Into<String>) -> Item {
    Item { name, state: State::Ok, needed_by, found: found.into(), cost: None, advice: None }
}

/// Not well: what was found, what it costs, what to type.
fn bad(item: Item, state: State, cost: &str, advice: &str) -> Item {
    Item { state, cost: Some(cost.to_owned()), advice: Some(advice.to_owned()), ..item }
}

fn root(facts: &Facts) -> Item {
    if facts.root {
        return ok("root", Need::Nobody, "yes");
    }
    let item = ok("root", Need::Nobody, "no");
    bad(
        item,
        State::Warn,
        "what only root may look at is unknown below; all other verbs are for root",
        "sudo patchswitch doctor",
    )
}

/// Major and minor number of a release such as `6.12.41+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel(facts: &Facts) -> Item {
    let item = ok("kernel", Need::Switch, facts.kernel.clone());
    match version(&facts.kernel) {
        Some(version) if version >= OLDEST => item,
        Some(_) => {
            bad(item, State::Missing, "the programs of the data path do not load", "boot Linux 6.1 or later")
        }
        None => bad(item, State::Unknown, "the release does not say which kernel it is", "uname -r"),
    }
}

fn jit(facts: &Facts) -> Item {
    let item = ok("BPF JIT", Need::Nobody, "on");
    match facts.jit.as_deref() {
        Some("0") => bad(
            Item { found: "off".to_owned(), ..item },
            State::Warn,
            "every packet's programs are interpreted, which takes several times as long",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Some(_) => item,
        None => bad(
            Item { found: "net.core.bpf_jit_enable cannot be read".to_owned(), ..item },
            State::Unknown,
            "without it every packet's programs are interpreted",
            "sudo patchswitch doctor",
        ),
    }
}

fn btf(facts: &Facts) -> Item {
    if facts.btf {
        return ok("BTF", Need::Nobody, "/sys/kernel/btf/vmlinux");
    }
    let item = ok("BTF", Need::Nobody, "not there");
    let cost = "nothing of patchswitch; bpftool shows maps and programs without types";
    bad(item, State::Warn, cost, "use a kernel with CONFIG_DEBUG_INFO_BTF=y, as distributions build it")
}

/// Which hook `attach` takes of itself.
fn hook(facts: &Facts) -> Item {
    let found = match facts.hook {
        HookKind::Tcx | HookKind::Xdp => "tcx; attach --hook xdp puts XDP before it",
        HookKind::Clsact => "clsact, as TCX came with Linux 6.6; attach --hook xdp puts XDP before it",
    };
    ok("hook", Need::Nobody, found)
}

fn bpffs(facts: &Facts) -> Item {
    let item = |found: &str| ok("BPF file system", Need::Switch, found);
    match facts.bpffs {
        Bpffs::Mounted => item("mounted at /sys/fs/bpf"),
        Bpffs::Mountable => item("not mounted yet; attach mounts it at /sys/fs/bpf"),
        Bpffs::Private => bad(
            item("not mounted in this private mount namespace"),
            State::Missing,
            "what is pinned here would vanish with the process",
            "nsenter --net=/run/netns/NAME patchswitch … instead of ip netns exec",
        ),
        Bpffs::None => bad(
            item("the kernel has none"),
            State::Missing,
            "nothing can be attached",
            "use a kernel with CONFIG_BPF_SYSCALL=y",
        ),
    }
}

fn cgroups(facts: &Facts) -> Item {
    let item = |found: String| ok("control groups", Need::Job, found);
    let advice = "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line";
    match &facts.cgroups {
        Cgroups::V2(lacks) if lacks.is_empty() => item("version 2, with cpu, memory and pids".to_owned()),
        Cgroups::V2(lacks) => bad(
            item(format!("version 2, without {}", lacks.join(", "))),
            State::Missing,
            "a partition's limits cannot be set",
            "remove cgroup_disable= from the kernel's command line, and version 1 mounts of these controllers",
        ),
        Cgroups::Other => {
            let cost = "partitions cannot be started; attach, switch, drain and detach work";
            bad(item("not version 2".to_owned()), State::Missing, cost, advice)
        }
    }
}

fn mapper(facts: &Facts) -> Item {
    let item = |found: String| ok("device-mapper", Need::Job, found);
    let cost = "no disks, no clones: only attach, switch, drain, flows, detach and status work";
    match &facts.mapper {
        Mapper::There(version, lacks) if lacks.is_empty() => {
            let [major, minor, patch] = version;
            item(format!("{major}.{minor}.{patch}, with dm_snapshot"))
        }
        Mapper::There(_, lacks) => {
            bad(item(format!("without {}", lacks.join(", "))), State::Missing, cost, "modprobe dm_snapshot")
        }
        Mapper::Absent(why) => {
            let advice = "modprobe -a dm_mod dm_snapshot; the whole job also runs in a virtual machine: cargo xtask demo";
            bad(item(why.clone()), State::Missing, cost, advice)
        }
        Mapper::Forbidden => {
            bad(item("only root may ask".to_owned()), State::Unknown, cost, "sudo patchswitch doctor")
        }
    }
}

fn loops(facts: &Facts) -> Item {
    if facts.loops {
        return ok("loop devices", Need::Job, "/dev/loop-control");
    }
    let item = ok("loop devices", Need::Job, "no /dev/loop-control");
    bad(item, State::Missing, "disks in image files cannot be used", "modprobe loop")
}

fn runtime(facts: &Facts) -> Item {
    match &facts.runtime_version {
        Ok((path, version)) => ok("OCI runtime", Need::Job, format!("{version}, {}", path.display())),
        Err(why) => bad(
            ok("OCI runtime", Need::Job, why.clone()),
            State::Missing,
            "partitions cannot be started",
            &format!("apt-get install {}", facts.runtime.package()),
        ),
    }
}

fn programs(facts: &Facts) -> Item {
    let names: Vec<_> = facts.missing_programs.iter().map(ToString::to_string).collect();
    if names.is_empty() {
        return ok("programs", Need::Job, "tar, mkfs.ext4, e2fsck, wipefs, sh, dpkg-deb");
    }
    let mut packages: Vec<_> = facts.missing_programs.iter().map(|program| program.package()).collect();
    packages.dedup();
    bad(
        ok("programs", Need::Job, format!("not installed: {}", names.join(", "))),
        State::Missing,
        "partitions cannot be defined, or patches not be read",
        &format!("apt-get install {}", packages.join(" ")),
    )
}

/// Of disks. That one is missing is no lack for whoever does not want it.
fn file_systems(facts: &Facts) -> Item {
    let lacks = |program: Program| facts.missing_file_systems.contains(&program);
    let (xfs, btrfs) = (lacks(Program::MkfsXfs), lacks(Program::MkfsBtrfs) || lacks(Program::Btrfstune));
    let mut found = "ext4".to_owned();
    for (name, is_missing, program) in [("XFS", xfs, Program::MkfsXfs), ("btrfs", btrfs, Program::MkfsBtrfs)]
    {
        found.push_str(", ");
        found.push_str(name);
        if is_missing {
            let _ = write!(found, " with the package {}", program.package());
        }
    }
    ok("file systems", Need::Nobody, found)
}

/// As [`file_systems`].
fn copies(facts: &Facts) -> Item {
    let item = |found: String| ok("copies of disks", Need::Nobody, found);
    let Some(missing) = &facts.missing_copies else {
        let cost = "whether disks can be copied whole (:log, :mirror) is seen only when a job is planned";
        let advice = match facts.mapper {
            Mapper::Forbidden => "sudo patchswitch doctor",
            _ => "modprobe -a dm_mod dm_log_writes dm_mirror",
        };
        return bad(item("device-mapper cannot be asked".to_owned()), State::Unknown, cost, advice);
    };
    let found = [(":log", "log-writes", "dm_log_writes"), (":mirror", "mirror", "dm_mirror")].map(
        |(policy, target, module)| match missing.contains(&target) {
            true => format!("{policy} with the kernel's module {module}"),
            false => policy.to_owned(),
        },
    );
    item(found.join(", "))
}

/// As [`file_systems`]: of `switch --hold`, and of the strategies in which something goes over.
fn waiting(facts: &Facts) -> Item {
    let found = if facts.taps { "TAP devices" } else { "TAP devices with the kernel's module tun" };
    ok("new flows can wait", Need::Nobody, found)
}

fn init(facts: &Facts) -> Item {
    match &facts.init {
        Ok(path) => ok("patchswitch-init", Need::Job, path.display().to_string()),
        Err(why) => bad(
            ok("patchswitch-init", Need::Job, why.clone()),
            State::Missing,
            "a clone cannot apply patches",
            "put the static patchswitch-init beside patchswitch",
        ),
    }
}

/// What a firewall means for attachments.
pub(super) fn firewall(rules: &Result<Rules, String>, old_tables: &[String]) -> Item {
    let mut all: Vec<(State, String, &str, &str)> = Vec::new();
    let mut add = |state, found, cost, advice| all.push((state, found, cost, advice));
    match rules {
        Ok(rules) => known(rules, &mut add),
        Err(why) => add(
            State::Unknown,
            format!("the rules of the firewall are not known: {why}"),
            "rules that drop invalid packets, all that is forwarded or what is the service's would not be seen",
            "apt-get install nftables; sudo patchswitch doctor",
        ),
    }
    if !old_tables.is_empty() {
        add(
            State::Unknown,
            format!("there are tables of iptables-legacy: {}", old_tables.join(", ")),
            "their rules are not read here; those that drop INVALID cut connections at a detach",
            "iptables-legacy-save; ip6tables-legacy-save",
        );
    }
    let join = |part: fn(&(State, String, &str, &str)) -> String| -> String {
        let mut parts: Vec<String> = all.iter().map(part).collect();
        parts.dedup();
        parts.join("; ")
    };
    if all.is_empty() {
        return ok("firewall", Need::Nobody, "no rule drops invalid packets or all that is forwarded");
    }
    let state =
        if all.iter().any(|(state, ..)| *state == State::Warn) { State::Warn } else { State::Unknown };
    let item = ok("firewall", Need::Nobody, join(|(_, found, ..)| found.clone()));
    bad(item, state, &join(|(_, _, cost, _)| (*cost).to_owned()), &join(|(.., advice)| (*advice).to_owned()))
}

/// What follows from rules that can be read, and from that some cannot.
fn known(rules: &Rules, add: &mut impl FnMut(State, String, &'static str, &'static str)) {
    const INSIDE: &str = "filter inside the partition; before detach: patchswitch drain NAME";
    if !rules.drop_invalid.is_empty() {
        add(
            State::Warn,
            format!("invalid packets are dropped in {}", rules.drop_invalid.join(", ")),
            "connections begun while attached are cut by a detach: the firewall has not seen them begin",
            INSIDE,
        );
    }
    if !rules.forward_drops.is_empty() {
        add(
            State::Warn,
            format!("forwarding is dropped by {}", rules.forward_drops.join(", ")),
            "the fast path passes it by, so its rules do not guard service addresses; what takes the slow path is dropped",
            INSIDE,
        );
    }
    if !rules.unread.is_empty() {
        add(
            State::Unknown,
            format!(
                "what rules of iptables drop in {} is not known: nft does not print it",
                rules.unread.join(", ")
            ),
            "the fast path passes them by; those that drop INVALID cut connections begun while attached at a detach",
            "iptables-save; ip6tables-save",
        );
    }
}

fn reverse_path(facts: &Facts) -> Item {
    if facts.strict.is_empty() {
        return ok("rp_filter", Need::Nobody, "nowhere strict");
    }
    ok("rp_filter", Need::Nobody, format!("strict on {}, which is allowed for", facts.strict.join(", ")))
}

fn routers(facts: &Facts) -> Item {
    let risky = facts.router_routes.iter().filter(|route| route.accept_ra == "1");
    let links: Vec<&str> = risky.map(|route| route.link.as_str()).collect();
    if links.is_empty() {
        return ok("router advertisements", Need::Nobody, "no default route depends on accept_ra=1");
    }
    let advice: Vec<_> =
        links.iter().map(|link| format!("sysctl -w net.ipv6.conf.{link}.accept_ra=2")).collect();
    bad(
        ok(
            "router advertisements",
            Need::Nobody,
            format!("the default route of {} was learned from one", links.join(", ")),
        ),
        State::Warn,
        "an attachment with an IPv6 address turns forwarding on and sets accept_ra=2 for that; whoever sets it back to 1 \
         meanwhile loses the route",
        &advice.join("; "),
    )
}

fn directory(name: &'static str, needed_by: Need, place: &Place, root: bool) -> Item {
    let gib = place.free as f64 / f64::from(1_u32 << 30);
    let item = ok(name, needed_by, format!("{}, {gib:.1} GiB free", place.path.display()));
    match (place.writable, root) {
        (true, _) => item,
        (false, false) => bad(item, State::Unknown, "only root writes there", "sudo patchswitch doctor"),
        (false, true) => {
            let advice = format!("mount -o remount,rw the file system of {}", place.path.display());
            bad(item, State::Missing, "it cannot be written to; nothing can be kept", &advice)
        }
    }
}

fn config(facts: &Facts) -> Item {
    match &facts.config {
        Ok(0) => ok("configuration", Need::Job, "no service yet"),
        Ok(count) => ok("configuration", Need::Job, format!("{count} services")),
        Err(why) => bad(
            ok("configuration", Need::Job, why.clone()),
            State::Missing,
            "no verb but those of the switch alone works",
            "mend the file at the place that is named",
        ),
    }
}

fn scope() -> Item {
    ok("kernel patches", Need::Nobody, "out of scope: both partitions share the host's kernel")
}
