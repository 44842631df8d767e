//! From the initial RAM disk to a running Debian: modules, disks, mounts, the agent.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_move};
use rustix::process::{WaitOptions, chdir, chroot, wait};
use rustix::system::RebootCommand;

use crate::{complain, program};

/// How long the kernel gets to find a disk that was promised on its command line.
const DISK_LIMIT: Duration = Duration::from_secs(20);
/// Loaded at once. The first ones make device nodes that nothing would ask for by itself (there is no udev); the
/// others would be loaded on demand, in the middle of what a test measures.
const MODULES: [&str; 11] = [
    "dm_mod",
    "dm_snapshot",
    "loop",
    "tun",
    "veth",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "nf_tables",
];

/// Runs as the first process and does not return while the machine lives.
pub(crate) fn run() -> Result<()> {
    let outcome = prepare().and_then(|()| tend());
    if let Err(error) = outcome {
        complain(&format!("{error:#}"));
    }
    rustix::fs::sync();
    // QEMU runs with -no-reboot, so that this is the end of it; ACPI would take longer.
    rustix::system::reboot(RebootCommand::Restart).context("failed to end the machine")
}

fn prepare() -> Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        attach(kind, kind, target, "")?;
    }
    load_boot_modules()?;
    let arguments = fs::read_to_string("/proc/cmdline")?;
    assemble_root(arguments.split_whitespace().any(|word| word == "patchswitch.payload"))?;
    enter_root()?;
    furnish()
}

/// The modules without which there is no root, in the order of their names.
fn load_boot_modules() -> Result<()> {
    let mut files: Vec<PathBuf> =
        fs::read_dir("/boot")?.map(|entry| entry.map(|e| e.path())).collect::<io::Result<_>>()?;
    files.sort();
    for file in files {
        let opened = fs::File::open(&file)?;
        match rustix::system::finit_module(&opened, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => bail!("failed to load {}: {error}", file.display()),
        }
    }
    Ok(())
}

/// The image stays as it is: what the tests write goes to memory and is gone with the machine.
fn assemble_root(payload: bool) -> Result<()> {
    for dir in ["/lower", "/upper", "/new"] {
        fs::create_dir_all(dir)?;
    }
    attach("ext4", &disk("root")?, "/lower", "ro")?;
    attach("tmpfs", "tmpfs", "/upper", "mode=755")?;
    fs::create_dir("/upper/data")?;
    fs::create_dir("/upper/work")?;
    attach("overlay", "root", "/new", "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work")?;
    fs::create_dir_all("/new/usr/lib/modules")?;
    attach("ext4", &disk("modules")?, "/new/usr/lib/modules", "ro")?;
    if payload {
        fs::create_dir_all("/new/payload")?;
        attach("ext4", &disk("payload")?, "/new/payload", "ro")?;
    }
    Ok(())
}

fn enter_root() -> Result<()> {
    for dir in ["dev", "proc", "sys"] {
        let target = format!("/new/{dir}");
        fs::create_dir_all(&target)?;
        mount_move(format!("/{dir}"), &target).with_context(|| format!("failed to move /{dir}"))?;
    }
    chdir("/new")?;
    mount_move(".", "/").context("failed to move the root")?;
    chroot(".").context("failed to enter the root")?;
    chdir("/")?;
    Ok(())
}

/// What systemd would have done on a Debian host before the first service runs.
fn furnish() -> Result<()> {
    // With a private root, an unmount would not reach the copies of a mount in other namespaces.
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)?;
    for dir in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        fs::create_dir_all(dir)?;
    }
    attach("devpts", "devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666")?;
    attach("tmpfs", "tmpfs", "/dev/shm", "mode=1777")?;
    attach("mqueue", "mqueue", "/dev/mqueue", "")?;
    attach("tmpfs", "tmpfs", "/run", "mode=755")?;
    attach("tmpfs", "tmpfs", "/tmp", "mode=1777")?;
    attach("cgroup2", "cgroup2", "/sys/fs/cgroup", "nsdelegate,memory_recursiveprot")?;
    attach("bpf", "bpf", "/sys/fs/bpf", "mode=700")?;
    attach("tracefs", "tracefs", "/sys/kernel/tracing", "mode=700")?;
    fs::create_dir_all("/run/lock")?;
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        symlink(format!("/proc/self/fd{target}"), format!("/dev/{link}"))?;
    }
    fs::write("/etc/hosts", "127.0.0.1 localhost vm\n::1 localhost\n")?;
    rustix::system::sethostname(b"vm")?;
    must("ip", &["link", "set", "lo", "up"])?;
    must("modprobe", &[&["-a"], MODULES.as_slice()].concat())
}

/// Waits for the agent and, as the first process has to, for every orphan.
fn tend() -> Result<()> {
    let agent = program("/proc/self/exe").arg("agent").spawn().context("failed to start the agent")?;
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if u32::try_from(pid.as_raw_nonzero().get()) == Ok(agent.id()) => {
                return Ok(());
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("failed to wait for the agent"),
        }
    }
}

/// The device of the disk with this serial number. The host gives each disk one, because names depend on their order.
fn disk(serial: &str) -> Result<String> {
    let end = Instant::now() + DISK_LIMIT;
    loop {
        for entry in fs::read_dir("/sys/block")? {
            let dir = entry?.path();
            let found = fs::read_to_string(dir.join("serial")).unwrap_or_default();
            if let (true, Some(name)) = (found.trim() == serial, dir.file_name()) {
                return Ok(format!("/dev/{}", name.to_string_lossy()));
            }
        }
        if Instant::now() >= end {
            bail!("no disk has the serial number {serial:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn attach(kind: &str, source: &str, target: &str, options: &str) -> Result<()> {
    let (flags, data) = match options {
        "ro" => (MountFlags::RDONLY, String::new()),
        data => (MountFlags::empty(), data.to_owned()),
    };
    fs::create_dir_all(Path::new(target)).ok();
    let data = std::ffi::CString::new(data)?;
    mount(source, target, kind, flags, Some(data.as_c_str()))
        .with_context(|| format!("failed to mount {kind} on {target}"))
}

fn must(name: &str, arguments: &[&str]) -> Result<()> {
    let status = program(name).args(arguments).status().with_context(|| format!("failed to run {name}"))?;
    if status.success() { Ok(()) } else { bail!("{name} {}: {status}", arguments.join(" ")) }
}
