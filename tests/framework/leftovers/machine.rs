//! The lists of the machine: block devices, mounts, control groups, BPF, processes, namespaces, files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::{List, Snapshot};
use crate::programs;

/// Reads them all.
pub(super) fn read(snapshot: &mut Snapshot) -> anyhow::Result<()> {
    block(snapshot)?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("failed to read the mounts")?;
    for (point, value) in parse_mounts(&mounts)? {
        snapshot.add(List::Mount, "", point, value);
    }
    cgroups(snapshot, Path::new("/sys/fs/cgroup"));
    for path in tree(Path::new("/sys/fs/bpf")) {
        snapshot.add(List::BpfPin, "", path.display().to_string(), "");
    }
    bpf(snapshot)?;
    processes(snapshot)?;
    files(snapshot);
    Ok(())
}

fn block(snapshot: &mut Snapshot) -> anyhow::Result<()> {
    for device in names(Path::new("/sys/block")) {
        let attribute = |name: &str| {
            let path = Path::new("/sys/block").join(&device).join(name);
            std::fs::read_to_string(path).map(|text| text.trim().to_owned()).ok()
        };
        match (attribute("loop/backing_file"), attribute("dm/name")) {
            (Some(file), _) => {
                let value = format!("{file} at {}", attribute("loop/offset").unwrap_or_default());
                snapshot.add(List::Block, "", device, value);
            }
            (None, Some(name)) => {
                let suspended = attribute("dm/suspended").unwrap_or_default();
                let value = format!("{}, suspended {suspended}", attribute("dm/uuid").unwrap_or_default());
                snapshot.add(List::Block, "", format!("dm {name}"), value);
            }
            // A loop device without a file is only a number that was used once.
            (None, None) if device.starts_with("loop") => {}
            (None, None) => {
                snapshot.add(List::Block, "", &device, attribute("size").unwrap_or_default());
            }
        }
    }
    if !Path::new("/sys/class/misc/device-mapper").exists() {
        return Ok(());
    }
    if programs::find("dmsetup").is_none() {
        snapshot.not_seen("dmsetup is not installed: tables of device-mapper are not compared".into());
        return Ok(());
    }
    let tables = programs::run(&["dmsetup", "table"])?;
    // Whether a table is loaded and not yet live, and whether the device is suspended.
    let states = ["dmsetup", "info", "-c", "--noheadings", "--separator", ":", "-o", "name,attr"];
    for (kind, text) in [("table", tables), ("state", programs::run(&states)?)] {
        for (name, value) in parse_dmsetup(&text) {
            snapshot.add(List::Block, "", format!("dm {name} {kind}"), value);
        }
    }
    Ok(())
}

/// Lines of a name, a colon and a text; `No devices found` has none.
fn parse_dmsetup(text: &str) -> Vec<(String, String)> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// Mount points and what is mounted there, of a text of the form of `/proc/self/mountinfo` (proc(5)).
fn parse_mounts(text: &str) -> anyhow::Result<Vec<(String, String)>> {
    let mut mounts = Vec::new();
    for line in text.lines() {
        let (left, right) = line.split_once(" - ").with_context(|| format!("not a mount: {line}"))?;
        let left: Vec<&str> = left.split(' ').collect();
        let [_, _, device, root, point, options, propagation @ ..] = &left[..] else {
            anyhow::bail!("not a mount: {line}");
        };
        let kind = right.split(' ').take(2).collect::<Vec<_>>().join(" ");
        // systemd makes these for sessions and services as they come and go; `ip netns` makes its directory a
        // mount at its first use and never undoes that.
        let own = ["/run/user/", "/run/credentials/"].iter().any(|prefix| point.starts_with(prefix));
        if own || *point == "/run/netns" {
            continue;
        }
        // The number of a peer group is the kernel's own; that there is one is not.
        let propagation: Vec<_> =
            propagation.iter().map(|word| word.split(':').next().unwrap_or(word)).collect();
        let value = format!("{kind} {device} {root} {options} {}", propagation.join(" "));
        mounts.push(((*point).to_owned(), value));
    }
    Ok(mounts)
}

fn cgroups(snapshot: &mut Snapshot, directory: &Path) {
    for name in names(directory) {
        let path = directory.join(name);
        // Symbolic links are the old names of joined hierarchies.
        if path.is_symlink() || !path.is_dir() {
            continue;
        }
        let text = path.display().to_string();
        if !is_systemds(&text) {
            snapshot.add(List::Cgroup, "", text, "");
        }
        cgroups(snapshot, &path);
    }
}

/// Whether a control group is one of the units that systemd starts and ends by itself: sessions of users, and
/// services that a timer or a socket starts. Scopes are not: they are made on demand.
fn is_systemds(path: &str) -> bool {
    let unit = Path::new(path).extension().is_some_and(|end| end == "service" || end == "mount");
    path.contains("/user.slice/") || (path.contains("/system.slice/") && unit)
}

fn bpf(snapshot: &mut Snapshot) -> anyhow::Result<()> {
    for program in aya::programs::loaded_programs() {
        let program = program.context("failed to list the BPF programs")?;
        let name = String::from_utf8_lossy(program.name()).into_owned();
        // systemd loads and frees these for its units.
        if name.starts_with("sd_") || name.starts_with("restrict_") {
            continue;
        }
        let value = format!("{name} {:?} {:016x}", program.program_type(), program.tag());
        snapshot.add(List::Bpf, "", format!("program {}", program.id()), value);
    }
    for map in aya::maps::loaded_maps() {
        let map = map.context("failed to list the BPF maps")?;
        let kind = map.map_type().map_or_else(|_| "of another type".into(), |kind| format!("{kind:?}"));
        let value = format!("{} {kind}", String::from_utf8_lossy(map.name()));
        snapshot.add(List::Bpf, "", format!("map {}", map.id()), value);
    }
    for link in aya::programs::loaded_links() {
        let link = link.context("failed to list the BPF links")?;
        let kind = link.link_type().map_or_else(|_| "of another type".into(), |kind| format!("{kind:?}"));
        let value = format!("{kind} of program {}", link.program_id());
        snapshot.add(List::Bpf, "", format!("link {}", link.id()), value);
    }
    Ok(())
}

/// Kinds of namespaces that are looked for in processes.
const NAMESPACES: [&str; 6] = ["net", "mnt", "pid", "ipc", "uts", "cgroup"];

fn processes(snapshot: &mut Snapshot) -> anyhow::Result<()> {
    let own_pids = std::fs::read_link("/proc/self/ns/pid").context("failed to read the own PID namespace")?;
    let mut seen = BTreeSet::new();
    for pid in by_age() {
        let process = Path::new("/proc").join(&pid);
        // A process that ends meanwhile has no links any more.
        let Ok(pids) = std::fs::read_link(process.join("ns/pid")) else { continue };
        let comm = std::fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_owned();
        let exe = std::fs::read_link(process.join("exe")).unwrap_or_default();
        if pids != own_pids || is_ours(&exe) {
            snapshot.add(List::Process, "", format!("{pid} {comm}"), exe.display().to_string());
        }
        for kind in NAMESPACES {
            let Ok(namespace) = std::fs::read_link(process.join("ns").join(kind)) else { continue };
            let observers = std::fs::read_link(Path::new("/proc/self/ns").join(kind)).ok();
            if Some(&namespace) != observers.as_ref() && seen.insert(namespace.clone()) {
                snapshot.add(List::Namespace, "", namespace.display().to_string(), comm.clone());
            }
        }
    }
    Ok(())
}

/// All processes, the oldest first: a namespace is known by who made it, whatever numbers those have that came later.
fn by_age() -> Vec<String> {
    let pids = names(Path::new("/proc")).into_iter().filter_map(|name| name.parse::<u32>().ok());
    let began = |pid: u32| -> Option<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may have anything in it; what follows its end is numbered from 3 on in proc(5), and 22 is the time.
        stat.rsplit_once(')')?.1.split_whitespace().nth(22 - 3)?.parse().ok()
    };
    let mut all: Vec<(u64, u32)> = pids.filter_map(|pid| Some((began(pid)?, pid))).collect();
    all.sort_unstable();
    all.into_iter().map(|(_, pid)| pid.to_string()).collect()
}

/// Whether a program is patchswitch's or an OCI runtime's. A program that was replaced meanwhile has a longer name.
fn is_ours(exe: &Path) -> bool {
    let name = exe.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.starts_with("patchswitch") || ["crun", "runc", "conmon"].iter().any(|runtime| name == *runtime)
}

/// Run-time directories of others have files that come and go, so only their names count; ours and the runtimes'
/// count in full. `/var/lib/patchswitch` is meant to stay.
fn files(snapshot: &mut Snapshot) {
    let mut paths: Vec<PathBuf> =
        names(Path::new("/run")).into_iter().map(|name| Path::new("/run").join(name)).collect();
    for directory in ["/run/patchswitch", "/run/crun", "/run/runc", "/dev/mapper"] {
        paths.extend(tree(Path::new(directory)));
    }
    for path in paths {
        snapshot.add(List::File, "", path.display().to_string(), "");
    }
}

/// The names in a directory, in order; none if it is not there.
pub(super) fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// All paths below a directory.
fn tree(directory: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for name in names(directory) {
        let path = directory.join(name);
        if path.is_dir() && !path.is_symlink() {
            paths.extend(tree(&path));
        }
        paths.push(path);
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_without_numbers_of_the_kernel() {
        let text = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
            40 22 0:30 /a\\040b /mnt rw,nosuid master:3 shared:9 - tmpfs tmpfs rw,size=1\n\
            41 22 0:4 net:[4026] /run/patchswitch/netns/a rw - nsfs nsfs rw\n\
            42 22 0:31 / /run/user/0 rw - tmpfs tmpfs rw\n43 22 0:31 / /run/netns rw - tmpfs tmpfs rw\n";
        let mounts = parse_mounts(text).unwrap();
        let points: Vec<_> = mounts.iter().map(|(point, _)| point.as_str()).collect();
        assert_eq!(points, ["/", "/mnt", "/run/patchswitch/netns/a"]);
        assert_eq!(mounts[1].1, "tmpfs tmpfs 0:30 /a\\040b rw,nosuid master shared");
        assert!(parse_mounts("22 1 254:0 / /\n").is_err());
    }

    #[test]
    fn tables_and_states_of_device_mapper_are_read() {
        let text = "ps-web-root: 0 204800 snapshot-origin 7:0\nps-web-clone: 0 8 linear 7:1 0\n";
        assert_eq!(parse_dmsetup(text)[0], ("ps-web-root".into(), "0 204800 snapshot-origin 7:0".into()));
        assert_eq!(parse_dmsetup("a:LIsw\n"), [("a".to_owned(), "LIsw".to_owned())]);
        assert_eq!(parse_dmsetup("No devices found\n"), []);
    }

    #[test]
    fn units_that_systemd_ends_by_itself_are_its_own() {
        for (path, own) in [
            ("/sys/fs/cgroup/system.slice/apt-daily.service", true),
            ("/sys/fs/cgroup/user.slice/user-0.slice", true),
            ("/sys/fs/cgroup/system.slice/crun-web.scope", false),
            ("/sys/fs/cgroup/system.slice", false),
            ("/sys/fs/cgroup/patchswitch/web", false),
            ("/sys/fs/cgroup/memory/patchswitch", false),
        ] {
            assert_eq!(is_systemds(path), own, "{path}");
        }
    }

    #[test]
    fn programs_of_ours_are_known_even_when_they_were_replaced() {
        for (exe, ours) in [
            ("/usr/bin/patchswitch", true),
            ("/usr/bin/patchswitch (deleted)", true),
            ("/usr/bin/patchswitch-init", true),
            ("/usr/bin/crun", true),
            ("/usr/bin/nginx", false),
            ("", false),
        ] {
            assert_eq!(is_ours(Path::new(exe)), ours, "{exe}");
        }
    }
}
