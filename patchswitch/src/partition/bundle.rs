//! The OCI bundle of a partition: `config.json` (OCI runtime specification 1.0).
//!
//! This is where the policy is: which privileges a partition has, what of the host it sees, how much it may use.
//! Everything else, namespaces and `pivot_root` and cgroups, is the runtime's work. Pure: facts in, document out.

use std::collections::HashSet;
use std::path::Path;

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Capability, Linux, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder, LinuxDeviceCgroupBuilder,
    LinuxMemoryBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxPidsBuilder,
    LinuxResources, LinuxResourcesBuilder, Mount, MountBuilder, PosixRlimitBuilder, PosixRlimitType, Process,
    ProcessBuilder, RootBuilder, Spec, SpecBuilder,
};

use serde::{Deserialize, Serialize};

use super::seccomp;
use super::spec::PartitionSpec;
use crate::control;
use crate::host::linux::cgroup;
use crate::names;
use crate::patch::wire::INIT_FILE;

/// The number of systemd's "stop" signal, `SIGRTMIN+3`. runc does not know its name.
pub const SYSTEMD_STOP_SIGNAL: i32 = 37;
/// The signal that asks `patchswitch-init` to stop.
pub const PATCHSWITCH_STOP_SIGNAL: i32 = 15;
/// Where systemd is on every distribution that has merged `/lib` into `/usr`; a path without symbolic links.
pub const SYSTEMD_FILE: &str = "/usr/lib/systemd/systemd";
/// Unit files here go before those in `/etc` (`systemd.unit(5)`), so a link to `/dev/null` here masks any unit.
const SYSTEMD_MASKS: &str = "/run/systemd/system.control";
/// The period of the processor limit, in microseconds.
const CPU_PERIOD_US: u64 = 100_000;

/// What dpkg, a start script and a service that gives up root need. Nothing here reaches beyond the partition.
const CAPABILITIES: [Capability; 9] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::NetBindService,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setuid,
];
/// What systemd needs beyond that, or its journal and login services fail.
const SYSTEMD_CAPABILITIES: [Capability; 3] =
    [Capability::AuditWrite, Capability::Setpcap, Capability::SysChroot];

/// Files of `/proc` and `/sys` that tell about the host, or reach it.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// PID 1 of a partition, decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pid1 {
    /// `patchswitch-init`.
    Patchswitch,
    /// systemd.
    Systemd,
}

impl Pid1 {
    /// The signal that asks it to stop the whole partition.
    pub fn stop_signal(self) -> i32 {
        match self {
            Self::Patchswitch => PATCHSWITCH_STOP_SIGNAL,
            Self::Systemd => SYSTEMD_STOP_SIGNAL,
        }
    }

    /// The program inside the partition; a path without symbolic links.
    pub fn file(self) -> &'static str {
        match self {
            Self::Patchswitch => INIT_FILE,
            Self::Systemd => SYSTEMD_FILE,
        }
    }
}

/// An application disk that the host has mounted for the partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataMount {
    /// Where the host has it, in the agent's mount namespace.
    pub source: std::path::PathBuf,
    /// Where the partition has it.
    pub target: String,
    /// Whether the partition may only read it.
    pub read_only: bool,
}

/// What the specification does not say: where things are at this boot.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// PID 1.
    pub pid1: Pid1,
    /// Where the system disk is mounted, in the agent's mount namespace.
    pub root: &'a Path,
    /// The network namespace, by a path that the runtime can open.
    pub netns: &'a Path,
    /// The host's control directory.
    pub control: &'a Path,
    /// The application disks.
    pub data: &'a [DataMount],
    /// Whether it is a standby: its singletons are masked, and it gets processor time that nobody else wants.
    pub quiet: bool,
    /// The host's directory with the masks for systemd.
    pub masks: &'a Path,
}

/// The document.
///
/// # Errors
/// If the OCI library refuses a value; never in practice.
pub fn config(spec: &PartitionSpec, facts: &Facts<'_>) -> Result<Spec, OciSpecError> {
    let root = RootBuilder::default().path(facts.root).readonly(false).build()?;
    SpecBuilder::default()
        .version("1.0.2")
        .root(root)
        .hostname(spec.hostname.clone())
        .process(process(spec, facts)?)
        .mounts(mounts(facts)?)
        .linux(linux(spec, facts)?)
        .build()
}

fn process(spec: &PartitionSpec, facts: &Facts<'_>) -> Result<Process, OciSpecError> {
    let mut set: HashSet<Capability> = CAPABILITIES.into();
    if facts.pid1 == Pid1::Systemd {
        set.extend(SYSTEMD_CAPABILITIES);
    }
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set)
        .inheritable(HashSet::new())
        .ambient(HashSet::new())
        .build()?;
    // What systemd gives its services; the agent's own limits must not leak into the partition.
    let files = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .soft(1024_u64)
        .hard(524_288_u64)
        .build()?;
    ProcessBuilder::default()
        .terminal(false)
        .args(arguments(spec, facts))
        .env(vec![
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
            "HOME=/root".to_owned(),
            "LC_ALL=C".to_owned(),
            "container=oci".to_owned(),
        ])
        .cwd("/")
        .capabilities(capabilities)
        .rlimits(vec![files])
        .no_new_privileges(true)
        .build()
}

fn arguments(spec: &PartitionSpec, facts: &Facts<'_>) -> Vec<String> {
    let mut arguments = vec![facts.pid1.file().to_owned()];
    if facts.pid1 == Pid1::Systemd {
        // What goes wrong before its journal runs has to be in the console log.
        arguments.push("--log-target=console".to_owned());
        return arguments;
    }
    arguments.extend(["--stop-limit".to_owned(), spec.stop_limit_s.to_string()]);
    if facts.quiet {
        for singleton in &spec.singletons {
            arguments.extend(["--mask".to_owned(), singleton.clone()]);
        }
    }
    if let Some(service) = &spec.service {
        arguments.extend(["--stop-signal".to_owned(), service.stop_signal.to_string()]);
        arguments.extend(["--restarts".to_owned(), service.restarts.to_string(), "--".to_owned()]);
        arguments.extend(service.command.iter().cloned());
    }
    arguments
}

fn mounts(facts: &Facts<'_>) -> Result<Vec<Mount>, OciSpecError> {
    let systemd = facts.pid1 == Pid1::Systemd;
    let cgroup = if systemd { "rw" } else { "ro" };
    let kernel = ["nosuid", "noexec", "nodev"];
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &kernel)?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"])?,
        mount("/dev/mqueue", "mqueue", "mqueue", &kernel)?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", cgroup])?,
        mount("/run", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=755", "size=65536k"])?,
    ];
    if systemd {
        // Without a mount of its own there systemd tries to make one, for which it lacks the privilege, and ends.
        mounts.push(mount("/run/lock", "tmpfs", "tmpfs", &["nosuid", "noexec", "nodev", "size=5120k"])?);
        mounts.push(mount("/tmp", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=1777"])?);
        if facts.quiet {
            mounts.push(bind(facts.masks, SYSTEMD_MASKS, true)?);
        }
    }
    // The directory, not the socket: the agent makes the socket anew when it is started anew.
    mounts.push(bind(facts.control, control::DIRECTORY, true)?);
    for disk in facts.data {
        mounts.push(bind(&disk.source, &disk.target, disk.read_only)?);
    }
    Ok(mounts)
}

fn mount(target: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount, OciSpecError> {
    let options: Vec<String> = options.iter().map(ToString::to_string).collect();
    MountBuilder::default().destination(target).typ(kind).source(source).options(options).build()
}

fn bind(source: &Path, target: &str, read_only: bool) -> Result<Mount, OciSpecError> {
    let access = if read_only { "ro" } else { "rw" };
    let options = ["bind", "nosuid", "nodev", access].map(ToOwned::to_owned).to_vec();
    MountBuilder::default().destination(target).typ("bind").source(source).options(options).build()
}

fn linux(spec: &PartitionSpec, facts: &Facts<'_>) -> Result<Linux, OciSpecError> {
    let mut linux = LinuxBuilder::default()
        .cgroups_path(names::cgroup(&spec.name))
        .namespaces(namespaces(facts.netns)?)
        .resources(resources(spec, facts.quiet)?)
        .rootfs_propagation("private")
        .masked_paths(MASKED.map(ToOwned::to_owned).to_vec())
        .readonly_paths(READ_ONLY.map(ToOwned::to_owned).to_vec())
        .seccomp(seccomp::profile(facts.pid1 == Pid1::Systemd)?)
        .build()?;
    // The library's default names devices; the runtimes add the harmless ones by themselves.
    linux.set_devices(None);
    Ok(linux)
}

fn namespaces(netns: &Path) -> Result<Vec<LinuxNamespace>, OciSpecError> {
    let new = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Cgroup,
    ];
    let network = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network).path(netns).build()?;
    let new = new.into_iter().map(|kind| LinuxNamespaceBuilder::default().typ(kind).build());
    new.chain([Ok(network)]).collect()
}

fn resources(spec: &PartitionSpec, quiet: bool) -> Result<LinuxResources, OciSpecError> {
    let quota = i64::from(spec.cpu_percent) * (CPU_PERIOD_US / 100) as i64;
    let cpu = LinuxCpuBuilder::default().quota(quota).period(CPU_PERIOD_US).build()?;
    let memory =
        LinuxMemoryBuilder::default().limit(i64::try_from(spec.memory).unwrap_or(i64::MAX)).build()?;
    let no_device = LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?;
    // A host may have one processor, and the partition that serves has to keep it while the clone boots and patches
    // itself: nobody is to notice.
    let idle = if quiet { "1" } else { "0" };
    LinuxResourcesBuilder::default()
        .unified([(cgroup::CPU_IDLE.to_owned(), idle.to_owned())])
        .cpu(cpu)
        .memory(memory)
        .pids(LinuxPidsBuilder::default().limit(i64::from(spec.pids)).build()?)
        .devices(vec![no_device])
        .build()
}

#[cfg(test)]
mod tests;
