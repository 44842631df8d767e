//! `patchswitch partition …`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use patchswitch::exit::ExitCode;
use patchswitch::host::linux::filesystem::Kind;
use patchswitch::manager::{Definition, Layout, Manager, Origin, Source};
use patchswitch::names::Name;
use patchswitch::partition::lifecycle;
use patchswitch::partition::spec::{Disk, Init, PartitionSpec, Policy, Service};
use patchswitch::patch::wire::Identity;
use patchswitch::storage::disk::Backing;
use serde_json::json;

use super::{print, size};

/// Subcommands of `partition`.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Define a partition from a root, or a standby that can take a clone.
    Define(Box<Define>),
    /// List the partitions with their resources (the resource table).
    List,
    /// Show one partition.
    Show(One),
    /// Start a partition by itself, without a service address.
    Start(One),
    /// Stop a partition.
    Stop(One),
    /// Run a command in a partition.
    Exec(Exec),
    /// Show the end of a partition's console.
    Logs(One),
    /// Remove a partition and its disks.
    Remove(Remove),
}

/// Arguments of `partition remove`.
#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// Name of the partition.
    name: Name,
    /// Stop it first if it runs.
    #[arg(long)]
    force: bool,
}

/// A partition, by name.
#[derive(Debug, Args)]
pub(crate) struct One {
    /// Name of the partition.
    name: Name,
}

/// Arguments of `partition exec`.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Name of the partition.
    name: Name,
    /// The longest time it may take, in seconds.
    #[arg(long, default_value_t = 60)]
    limit: u64,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum InitKind {
    Auto,
    Systemd,
    Patchswitch,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FileSystemKind {
    Ext4,
    Xfs,
    Btrfs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum IdentityKind {
    Keep,
    Renew,
}

/// Arguments of `partition define`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples, a web server and the standby that its patches are tried on:
  patchswitch partition define web-a --from root.tar --size 1G --cpu 50 --memory 256M \\
      --own 192.0.2.81 --own 2001:db8::81 --command \"nginx -g 'daemon off;'\"
  patchswitch partition define web-b --standby --size 1G --cpu 50 --memory 256M \\
      --own 192.0.2.82 --own 2001:db8::82

A database whose root is on a volume of LVM already, and whose data are on a disk of their own:
  patchswitch partition define db-a --on root=/dev/volumes/db --on data=/dev/disk/by-id/nvme-DATA \\
      --disk data::/var/lib/postgresql")]
pub(crate) struct Define {
    /// Name: lower-case letters, digits, dashes.
    name: Name,
    /// The root: a tar archive, a directory, or an image of an ext4, XFS or btrfs. Not needed if the system disk lies on a
    /// device (--on root=DEVICE) that has one already.
    #[arg(long, value_name = "PATH", conflicts_with = "standby", required_unless_present_any = ["standby", "on"])]
    from: Option<PathBuf>,
    /// A standby: its disk is the store of a clone, allocated at once.
    #[arg(long)]
    standby: bool,
    /// Size of the system disk; of a standby, of the disk that it can take. Not needed if the system disk lies on a device:
    /// it has the device's size then.
    #[arg(long, value_parser = size::parse, required_unless_present = "on")]
    size: Option<u64>,
    /// The block device on which a disk lies (the system disk is called root), instead of an image: a volume of LVM, a
    /// partition of a disk, a disk, by a name that it still has after a boot (/dev/VOLUMES/NAME, /dev/disk/by-id/…). A file
    /// system that is on it stays as it is; anything else that is on it is in the way. A standby's is a store and has to be
    /// empty. May be given once for each disk.
    #[arg(long, value_name = "DISK=DEVICE", value_parser = on)]
    on: Vec<(Name, PathBuf)>,
    /// The file system of disks that are empty.
    #[arg(long, value_enum, default_value = "ext4", conflicts_with = "standby")]
    fs: FileSystemKind,
    /// Of a standby: the size of its store, if less than everything a clone could write; while it is in use it becomes
    /// larger if the host has room (`extend_stores`), else jobs turn back before it is full.
    #[arg(long, value_name = "SIZE", value_parser = size::parse, requires = "standby")]
    store: Option<u64>,
    /// Further disks, e.g. data:512M:/srv/data; one that lies on a device needs no size (data::/srv/data). With :ro at the
    /// end it can only be read; with :move it has one writer at a
    /// time, and goes to the patched partition itself instead of being cloned (a service with strategy quiesce); with :log or
    /// :mirror the patched partition gets a whole copy on the standby's disk, by a log of writes or by a mirror.
    #[arg(long = "disk", value_name = "NAME:SIZE:MOUNT[:ro|:move|:log|:mirror]")]
    disks: Vec<String>,
    /// Percent of one processor.
    #[arg(long, default_value_t = 100, value_name = "PERCENT")]
    cpu: u32,
    /// Memory limit.
    #[arg(long, default_value = "256M", value_parser = size::parse)]
    memory: u64,
    /// How many processes and threads it may have.
    #[arg(long, default_value_t = 512)]
    pids: u32,
    /// The device by which clients reach it; a standby must have the same one.
    #[arg(long, value_name = "DEVICE")]
    network: Option<String>,
    /// An address of its own, one per family; by it the partition is known when it retires.
    #[arg(long = "own", value_name = "ADDRESS")]
    own: Vec<IpAddr>,
    /// What patchswitch-init starts and supervises, as a shell would read it.
    #[arg(long, value_name = "COMMAND")]
    command: Option<String>,
    /// PID 1: systemd if the root has it, or patchswitch-init.
    #[arg(long, value_enum, default_value = "auto")]
    init: InitKind,
    /// Whether a clone keeps machine-id and host keys.
    #[arg(long, value_enum, default_value = "keep")]
    identity: IdentityKind,
    /// What must not run twice: not started in a clone before the switch. May be given several times.
    #[arg(long = "singleton", value_name = "NAME")]
    singletons: Vec<String>,
}

impl Define {
    fn layout(&self) -> anyhow::Result<Layout> {
        let devices: BTreeMap<Name, PathBuf> = self.on.iter().cloned().collect();
        anyhow::ensure!(devices.len() == self.on.len(), "--on: a disk is given two devices");
        let file_system = match self.fs {
            FileSystemKind::Ext4 => Kind::Ext4,
            FileSystemKind::Xfs => Kind::Xfs,
            FileSystemKind::Btrfs => Kind::Btrfs,
        };
        Ok(Layout { devices, file_system })
    }

    /// The size of a disk that is not given: its device's. A store can say nothing about the disk that it is for.
    fn size_of(&self, disk: &str, layout: &Layout) -> anyhow::Result<u64> {
        let device = layout.devices.iter().find(|(name, _)| name.as_str() == disk).map(|(_, device)| device);
        match device.filter(|_| !self.standby) {
            Some(device) => Ok(Backing::Device(device.clone()).sectors()?.saturating_mul(512)),
            None => anyhow::bail!("disk {disk} has no size: give one (--size is the system disk's)"),
        }
    }

    fn definition(&self, layout: &Layout) -> anyhow::Result<Definition> {
        let root = Name::new("root")?;
        let size = self.size.map_or_else(|| self.size_of("root", layout), Ok)?;
        let mut spec = PartitionSpec::new(self.name.clone(), self.cpu, self.memory, size, root);
        spec.pids = self.pids;
        spec.network.clone_from(&self.network);
        spec.init = match self.init {
            InitKind::Auto => Init::Auto,
            InitKind::Systemd => Init::Systemd,
            InitKind::Patchswitch => Init::Patchswitch,
        };
        spec.identity = match self.identity {
            IdentityKind::Keep => Identity::Keep,
            IdentityKind::Renew => Identity::Renew,
        };
        spec.singletons.clone_from(&self.singletons);
        spec.service = self.command.as_ref().map(|command| Service {
            command: vec!["/bin/sh".to_owned(), "-c".to_owned(), format!("exec {command}")],
            stop_signal: 15,
            restarts: 5,
        });
        for text in &self.disks {
            spec.disks.push(disk(text, |name| self.size_of(name, layout))?);
        }
        Ok(Definition {
            spec,
            own: self.own.clone(),
            is_store: self.standby,
            store: self.store,
            reserve: None,
            spare: Vec::new(),
        })
    }
}

fn on(text: &str) -> Result<(Name, PathBuf), String> {
    let (disk, device) = text.split_once('=').ok_or("give DISK=DEVICE, e.g. root=/dev/volumes/web")?;
    if !device.starts_with('/') {
        return Err(format!("{device:?} is no path of a device: give it from / on"));
    }
    Ok((Name::new(disk).map_err(|error| error.to_string())?, PathBuf::from(device)))
}

fn disk(text: &str, device_size: impl Fn(&str) -> anyhow::Result<u64>) -> anyhow::Result<Disk> {
    let mut parts = text.split(':');
    let bad = || {
        anyhow::anyhow!(
            "{text:?} is no disk: give NAME:SIZE:MOUNT, e.g. data:512M:/srv/data, perhaps with :ro, :move, :log or :mirror"
        )
    };
    let (name, bytes, mount) =
        (parts.next().ok_or_else(bad)?, parts.next().ok_or_else(bad)?, parts.next().ok_or_else(bad)?);
    let (read_only, policy) = match (parts.next(), parts.next()) {
        (None, None) => (false, Policy::Snapshot),
        (Some("ro"), None) => (true, Policy::Snapshot),
        (Some("move"), None) => (false, Policy::Move),
        (Some("log"), None) => (false, Policy::Log),
        (Some("mirror"), None) => (false, Policy::Mirror),
        _ => return Err(bad()),
    };
    let size = match bytes {
        "" => device_size(name)?,
        bytes => size::parse(bytes).map_err(anyhow::Error::msg)?,
    };
    Ok(Disk { name: Name::new(name)?, size, mount: mount.to_owned(), read_only, policy })
}

impl Verb {
    pub(crate) fn run(&self, manager: &mut Manager, json: bool) -> anyhow::Result<ExitCode> {
        match self {
            Self::Define(define) => {
                let origin = match &define.from {
                    Some(path) => Origin::Root(Source::of(path)?),
                    None if define.standby => Origin::Store,
                    None => Origin::Root(Source::Device),
                };
                let layout = define.layout()?;
                manager.define(&define.definition(&layout)?, &origin, &layout)?;
                done(json, "defined", &define.name)
            }
            Self::List => list(manager, json),
            Self::Show(one) => show(manager, &one.name, json),
            Self::Start(one) => start(manager, &one.name, json),
            Self::Stop(one) => stop(manager, &one.name, json),
            Self::Exec(exec) => run_inside(manager, exec, json),
            Self::Logs(one) => {
                manager.machine(&one.name)?;
                print::text(&lifecycle::logs(&one.name, 64 << 10)?);
                Ok(ExitCode::Done)
            }
            Self::Remove(one) => remove(manager, one, json),
        }
    }
}

fn start(manager: &mut Manager, name: &Name, json: bool) -> anyhow::Result<ExitCode> {
    let machine = manager.machine(name)?;
    if manager.is_running(&machine)? {
        return done(json, "running already", name);
    }
    if let Some(service) = &machine.row.service {
        anyhow::bail!(
            "partition {name} belongs to service {service}; `patchswitch up` starts what serves, `patchswitch \
             rollback {service}` the old partition"
        );
    }
    let is_empty = machine.definition.is_store && machine.disks.iter().all(|disk| disk.clone.is_none());
    anyhow::ensure!(
        !is_empty,
        "partition {name} is a standby: its disks are empty until a job makes a clone on them, so there is nothing \
         to start"
    );
    let limit = manager.config.job.boot;
    let mut running = manager.start(&machine, false)?;
    Manager::wait_started(&mut running, &machine, limit)?;
    done(json, "started", name)
}

fn stop(manager: &mut Manager, name: &Name, json: bool) -> anyhow::Result<ExitCode> {
    let machine = manager.machine(name)?;
    if let Some(service) = &machine.row.service {
        anyhow::bail!(
            "partition {name} belongs to service {service}; `patchswitch service remove {service}` stops it"
        );
    }
    let was_running = manager.is_running(&machine)?;
    // Also what a partition leaves that ended by itself.
    manager.stop(&machine)?;
    done(json, if was_running { "stopped" } else { "stopped already" }, name)
}

fn remove(manager: &mut Manager, remove: &Remove, json: bool) -> anyhow::Result<ExitCode> {
    let name = &remove.name;
    if !remove.force && manager.store.partition(name)?.is_some() {
        let machine = manager.machine(name)?;
        // One of a service is refused by the library, which says what to do about that.
        let is_running = machine.row.service.is_none() && manager.is_running(&machine)?;
        anyhow::ensure!(
            !is_running,
            "partition {name} runs, nothing was removed; `patchswitch partition remove {name} --force` stops it and \
             removes it with its disks"
        );
    }
    let was_there = manager.remove_partition(name)?;
    done(json, if was_there { "removed" } else { "not there, nothing to do" }, name)
}

fn done(json: bool, what: &str, name: &Name) -> anyhow::Result<ExitCode> {
    if json {
        print::json(&json!({"schema": "patchswitch.partition/1", "partition": name, "result": what}))?;
    } else {
        print::text(&format!("{name}: {what}"));
    }
    Ok(ExitCode::Done)
}

fn list(manager: &Manager, json: bool) -> anyhow::Result<ExitCode> {
    let rows = manager.store.partitions()?;
    if json {
        print::json(&json!({"schema": "patchswitch.partitions/1", "partitions": rows}))?;
        return Ok(ExitCode::Done);
    }
    if rows.is_empty() {
        print::text("no partition is defined; `patchswitch partition define --help` shows how");
        return Ok(ExitCode::Done);
    }
    print::text(&format!(
        "{:<16} {:<9} {:<8} {:<12} {:>5} {:>8} {:>9}  NETWORK",
        "NAME", "ROLE", "STATE", "SERVICE", "CPU", "MEMORY", "DISKS"
    ));
    for row in rows {
        let disks: u64 = manager.store.disks(&row.name)?.iter().map(|disk| disk.sectors * 512).sum();
        let service = row.service.as_ref().map_or("-", Name::as_str);
        let network = row.network.as_deref().unwrap_or("-");
        print::text(&format!(
            "{:<16} {:<9} {:<8} {:<12} {:>4}% {:>8} {:>9}  {network}",
            row.name.as_str(),
            row.role,
            row.state,
            service,
            row.cpu_percent,
            size::format(row.memory),
            size::format(disks),
        ));
    }
    Ok(ExitCode::Done)
}

fn show(manager: &Manager, name: &Name, json: bool) -> anyhow::Result<ExitCode> {
    let machine = manager.machine(name)?;
    let running = manager.is_running(&machine)?;
    let disks = manager.store.disks(name)?;
    if json {
        print::json(&json!({
            "schema": "patchswitch.partition/1", "partition": machine.row, "running": running, "disks": disks,
        }))?;
        return Ok(ExitCode::Done);
    }
    let own: Vec<_> = machine.definition.own.iter().map(ToString::to_string).collect();
    print::text(&format!(
        "{name}: {}, {}\n  service  {}\n  limits   {}% of a processor, {} of memory, {} processes\n  own      {}",
        machine.row.role,
        if running { "running" } else { "not running" },
        machine.row.service.as_ref().map_or("-", Name::as_str),
        machine.spec().cpu_percent,
        size::format(machine.spec().memory),
        machine.spec().pids,
        if own.is_empty() { "-".to_owned() } else { own.join(", ") },
    ));
    for disk in &machine.disks {
        let kind = if disk.clone.is_some() { " (a clone)" } else { "" };
        let bytes = size::format(disk.sectors * 512);
        print::text(&format!("  disk     {} {bytes} {}{kind}", disk.name, disk.backing.path().display()));
    }
    Ok(ExitCode::Done)
}

fn run_inside(manager: &Manager, exec: &Exec, json: bool) -> anyhow::Result<ExitCode> {
    let machine = manager.machine(&exec.name)?;
    anyhow::ensure!(manager.is_running(&machine)?, "partition {} does not run", exec.name);
    let arguments: Vec<&str> = exec.command.iter().map(String::as_str).collect();
    let done = manager.exec(&machine, &arguments, Duration::from_secs(exec.limit))?;
    if json {
        print::json(&json!({
            "schema": "patchswitch.exec/1", "exit_code": done.code, "stdout": done.stdout, "stderr": done.stderr,
        }))?;
    } else {
        print::raw(&done.stdout, &done.stderr);
        anyhow::ensure!(done.code == 0, "the command ended with exit code {}", done.code);
    }
    Ok(if done.code == 0 { ExitCode::Done } else { ExitCode::Failed })
}
