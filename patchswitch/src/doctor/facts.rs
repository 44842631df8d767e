//! What is there: read, and nothing changed.
//!
//! Asking device-mapper for a target loads the target's module, as the first clone would; so it is with TAP devices.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access, statfs, statvfs};

use super::firewall::{self, Rules};
use crate::config::{self, Runtime};
use crate::dataplane::HookKind;
use crate::host::linux::dm::{Dm, DmError};
use crate::host::linux::mountns;
use crate::host::linux::programs::{Program, Run};
use crate::host::linux::tap::Tap;
use crate::manager::chain;
use crate::names::RUN_ROOT;
use crate::partition::program;
use crate::store;

/// The targets of device-mapper that a job needs.
const TARGETS: [&str; 4] = ["linear", "snapshot", "snapshot-origin", "snapshot-merge"];
/// Those that whole copies of disks need.
const COPIES: [&str; 2] = ["log-writes", "mirror"];
/// The controllers that a partition's limits need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// The BPF file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bpffs {
    /// It is mounted.
    Mounted,
    /// It is not mounted; `attach` mounts it.
    Mountable,
    /// It is not mounted in this private mount namespace, where it would vanish with the process.
    Private,
    /// The kernel has none.
    None,
}

/// Control groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cgroups {
    /// Version 2, and the controllers that are needed and not there.
    V2(Vec<&'static str>),
    /// Another version, or nothing at all.
    Other,
}

/// Device-mapper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mapper {
    /// The version of its interface, and the targets that are needed and not there.
    There([u32; 3], Vec<&'static str>),
    /// It is not there; what was tried and what the kernel said.
    Absent(String),
    /// Only root may ask.
    Forbidden,
}

/// A directory of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it is, or will be made.
    pub path: PathBuf,
    /// Whether it, or the directory in which it will be made, can be written to.
    pub writable: bool,
    /// How much is free there, in bytes.
    pub free: u64,
}

/// A default route of IPv6 that was learned from a router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterRoute {
    /// The link.
    pub link: String,
    /// What the kernel does with advertisements there.
    pub accept_ra: String,
}

/// Everything that is known of a host.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Release of the kernel.
    pub kernel: String,
    /// Whether the process is root.
    pub root: bool,
    /// `net.core.bpf_jit_enable`, if it may be read.
    pub jit: Option<String>,
    /// Whether the kernel describes its types.
    pub btf: bool,
    /// What programs are attached by.
    pub hook: HookKind,
    /// The BPF file system.
    pub bpffs: Bpffs,
    /// Control groups.
    pub cgroups: Cgroups,
    /// Device-mapper.
    pub mapper: Mapper,
    /// Whether there are loop devices.
    pub loops: bool,
    /// The OCI runtime that is configured.
    pub runtime: Program,
    /// Where it is and which version, or why that is not known.
    pub runtime_version: Result<(PathBuf, String), String>,
    /// Programs that a job needs and that are not installed.
    pub missing_programs: Vec<Program>,
    /// Programs for disks with other file systems than ext4 that are not installed.
    pub missing_file_systems: Vec<Program>,
    /// Targets of device-mapper that whole copies of disks need and that are not there; nothing where it cannot be asked.
    pub missing_copies: Option<Vec<&'static str>>,
    /// Whether there are TAP devices, in which new flows can wait.
    pub taps: bool,
    /// Where `patchswitch-init` is, or what is wrong with it.
    pub init: Result<PathBuf, String>,
    /// The rules of nftables, or why they are not known.
    pub rules: Result<Rules, String>,
    /// Tables of the older iptables, which `nft` does not show.
    pub old_tables: Vec<String>,
    /// Links with a strict `rp_filter`.
    pub strict: Vec<String>,
    /// Default routes learned from routers.
    pub router_routes: Vec<RouterRoute>,
    /// The state directory.
    pub state: Place,
    /// The run directory.
    pub run: Place,
    /// How many services the configuration has, or what is wrong with it.
    pub config: Result<usize, String>,
}

/// Looks at this host, in the network namespace of the caller.
pub fn read(config_file: &Path) -> Facts {
    let loaded = config::load(config_file);
    let config = loaded.as_ref().ok().cloned().unwrap_or_default();
    let runtime = match config.agent.runtime {
        Runtime::Crun => Program::Crun,
        Runtime::Runc => Program::Runc,
    };
    let needed =
        [Program::Tar, Program::Mkfs, Program::Fsck, Program::Wipefs, Program::Shell, Program::DpkgDeb];
    let others = [Program::MkfsXfs, Program::MkfsBtrfs, Program::Btrfstune];
    let missing = |programs: &[Program]| -> Vec<Program> {
        programs.iter().copied().filter(|program| program.find().is_none()).collect()
    };
    Facts {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        root: rustix::process::geteuid().is_root(),
        jit: word("/proc/sys/net/core/bpf_jit_enable"),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        hook: HookKind::of_this_kernel(),
        bpffs: bpffs(),
        cgroups: cgroups(),
        mapper: mapper(),
        loops: Path::new("/dev/loop-control").exists(),
        runtime,
        runtime_version: version(runtime),
        missing_programs: missing(&needed),
        missing_file_systems: missing(&others),
        missing_copies: copies(),
        taps: Tap::are_there(),
        init: program::find().map_err(|error| chain(&error)),
        rules: rules(),
        old_tables: old_tables(),
        strict: strict(),
        router_routes: router_routes(),
        state: place(&store::state_dir(&config.agent.state_dir)),
        run: place(Path::new(RUN_ROOT)),
        config: loaded.map(|config| config.services.len()).map_err(|error| chain(&error)),
    }
}

fn word(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(ToOwned::to_owned).collect()
}

/// Whether a file system of this kind (`linux/magic.h`) is mounted at a path.
fn is_mounted(path: &str, magic: u64) -> bool {
    statfs(path).is_ok_and(|found| u64::try_from(found.f_type).is_ok_and(|kind| kind == magic))
}

fn bpffs() -> Bpffs {
    const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
    if is_mounted("/sys/fs/bpf", BPF_FS_MAGIC) {
        return Bpffs::Mounted;
    }
    let kinds = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !kinds.lines().any(|line| line.ends_with("\tbpf")) {
        return Bpffs::None;
    }
    if mountns::is_private() { Bpffs::Private } else { Bpffs::Mountable }
}

fn cgroups() -> Cgroups {
    const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
    if !is_mounted("/sys/fs/cgroup", CGROUP2_SUPER_MAGIC) {
        return Cgroups::Other;
    }
    let there = words(&fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default());
    Cgroups::V2(CONTROLLERS.into_iter().filter(|name| !there.iter().any(|there| there == name)).collect())
}

fn mapper() -> Mapper {
    let dm = match Dm::open() {
        Ok(dm) => dm,
        Err(DmError::NoDeviceMapper(error)) if error.kind() == ErrorKind::PermissionDenied => {
            return Mapper::Forbidden;
        }
        Err(error) => return Mapper::Absent(chain(&error)),
    };
    let missing = |name: &&str| dm.target_version(name).map(|version| version.is_none());
    let mut lacks = Vec::new();
    for target in TARGETS {
        match missing(&target) {
            Ok(true) => lacks.push(target),
            Ok(false) => {}
            Err(error) => return Mapper::Absent(chain(&error)),
        }
    }
    match dm.version() {
        Ok(version) => Mapper::There(version, lacks),
        Err(error) => Mapper::Absent(chain(&error)),
    }
}

/// What is missing of it, if somebody can be asked.
fn copies() -> Option<Vec<&'static str>> {
    let dm = Dm::open().ok()?;
    let mut lacks = Vec::new();
    for target in COPIES {
        if dm.target_version(target).ok()?.is_none() {
            lacks.push(target);
        }
    }
    Some(lacks)
}

fn version(runtime: Program) -> Result<(PathBuf, String), String> {
    let path = runtime.find().ok_or_else(|| format!("{runtime} is not installed"))?;
    let text = Run::new(runtime).arg("--version").read().map_err(|error| chain(&error))?;
    Ok((path, text.lines().next().unwrap_or_default().to_owned()))
}

/// Tables of the older iptables, which `nft` does not show.
pub(super) fn old_tables() -> Vec<String> {
    ["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"]
        .into_iter()
        .flat_map(|path| words(&fs::read_to_string(path).unwrap_or_default()))
        .collect()
}

pub(super) fn rules() -> Result<Rules, String> {
    firewall::parse(&ruleset()?).map_err(|error| chain(&error))
}

pub(super) fn ruleset() -> Result<String, String> {
    Run::new(Program::Nft).args(["-j", "list", "ruleset"]).read().map_err(|error| chain(&error))
}

/// The folders of a directory, by name.
fn folders(path: &str) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn strict() -> Vec<String> {
    const LINKS: &str = "/proc/sys/net/ipv4/conf";
    let is_strict = |link: &String| word(&format!("{LINKS}/{link}/rp_filter")).as_deref() == Some("1");
    folders(LINKS).into_iter().filter(is_strict).collect()
}

fn router_routes() -> Vec<RouterRoute> {
    let links = learned_defaults(&fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default());
    let route = |link: String| {
        let accept_ra = word(&format!("/proc/sys/net/ipv6/conf/{link}/accept_ra")).unwrap_or_default();
        RouterRoute { link, accept_ra }
    };
    links.into_iter().map(route).collect()
}

/// The links with a default route that the kernel learned from an advertisement, of `/proc/net/ipv6_route`
/// (`net/ipv6/ip6_fib.c`, `ipv6_route_native_seq_show`).
pub(super) fn learned_defaults(table: &str) -> Vec<String> {
    /// Default route, and learned from an advertisement (`linux/ipv6_route.h`).
    const RTF_DEFAULT: u32 = 0x0001_0000;
    const RTF_ADDRCONF: u32 = 0x0004_0000;
    let mut links = Vec::new();
    for line in table.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "00", .., flags, link] = fields.as_slice() else { continue };
        let learned = u32::from_str_radix(flags, 16).unwrap_or(0) & (RTF_DEFAULT | RTF_ADDRCONF);
        if learned == RTF_DEFAULT | RTF_ADDRCONF && !links.iter().any(|known| known == link) {
            links.push((*link).to_owned());
        }
    }
    links
}

fn place(path: &Path) -> Place {
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let free = statvfs(there).map_or(0, |found| found.f_bavail.saturating_mul(found.f_frsize));
    Place { path: path.to_owned(), writable: access(there, Access::WRITE_OK).is_ok(), free }
}
