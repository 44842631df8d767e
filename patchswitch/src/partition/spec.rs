//! What a logical computer is to be: its name, its resources, its init and its service.

use serde::{Deserialize, Serialize};

use super::resources::Resources;
use crate::exit::ExitCode;
use crate::names::Name;
use crate::patch::wire::Identity;

/// The mount point of the system disk.
pub const ROOT_MOUNT: &str = "/";
/// Mount points that application disks cannot have: the runtime or patchswitch needs what is there.
const RESERVED: [&str; 7] =
    ["/proc", "/sys", "/dev", "/run", "/usr/lib/patchswitch", "/etc/patchswitch", "/var/lib/patchswitch"];
/// The smallest memory limit that a system can start in, in bytes.
const MEMORY_MIN: u64 = 16 << 20;
/// The fewest processes that an init, a package manager and a service need.
const PIDS_MIN: u32 = 16;

/// A definition of a partition that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("partition {name}: {field} {reason}")]
pub struct SpecError {
    /// The partition.
    pub name: Name,
    /// The field, as it is called in the configuration.
    pub field: &'static str,
    /// What is wrong with its value.
    pub reason: String,
}

impl SpecError {
    /// The code for this end of a command.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::Config
    }
}

/// Which program is PID 1 of a partition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// systemd if the root has it, `patchswitch-init` otherwise.
    #[default]
    Auto,
    /// systemd.
    Systemd,
    /// `patchswitch-init`, which starts and supervises one service.
    Patchswitch,
}

/// What becomes of an application disk when its partition is patched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// The clone has a copy of its own, as of the cut.
    #[default]
    Snapshot,
    /// It has one writer at a time. Until the switch the clone has a copy that is thrown away; at the switch the disk
    /// itself goes over. Only a service that is quiesced can have such a disk.
    Move,
    /// The clone has a whole copy on a device of its own, made by a bulk copy and a log of what is written meanwhile
    /// (figures 8 to 10 of the patent). Of a service that is quiesced it is a copy of the disk as its last writer left it.
    Log,
    /// The same, made by a mirror that is split.
    Mirror,
}

impl Policy {
    /// Whether whoever takes over gets a whole copy on another device.
    pub fn copies(self) -> bool {
        matches!(self, Self::Log | Self::Mirror)
    }

    /// Whether it goes over when a service is quiesced, so that there is one writer at any time, and nothing is left behind.
    pub fn goes_over(self) -> bool {
        self == Self::Move || self.copies()
    }
}

/// One disk of a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name among the partition's disks.
    pub name: Name,
    /// Its size, in bytes.
    pub size: u64,
    /// Where the partition has it: `/` is the system disk, anything else an application disk.
    pub mount: String,
    /// Whether the partition may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// What becomes of it when the partition is patched. The system disk is always cloned.
    #[serde(default)]
    pub policy: Policy,
}

/// What `patchswitch-init` starts and supervises.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// The program and its arguments; it stays in the foreground.
    pub command: Vec<String>,
    /// The signal that asks it to end, by number.
    #[serde(default = "default_stop_signal")]
    pub stop_signal: i32,
    /// How often it is started again after it failed, within one minute, before the partition gives up.
    #[serde(default = "default_restarts")]
    pub restarts: u32,
}

/// What a logical computer is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionSpec {
    /// Its identifier (Fig. 5, column 501).
    pub name: Name,
    /// The name of the machine inside. A clone has the one of its original.
    pub hostname: String,
    /// Percent of one processor (column 502).
    pub cpu_percent: u32,
    /// Memory, in bytes (column 503).
    pub memory: u64,
    /// How many processes and threads.
    #[serde(default = "default_pids")]
    pub pids: u32,
    /// Its disks (column 504); exactly one has the mount point `/`.
    pub disks: Vec<Disk>,
    /// The host's device by which clients reach it (column 505).
    pub network: Option<String>,
    /// Its PID 1.
    #[serde(default)]
    pub init: Init,
    /// Its service; only with `patchswitch-init`. Without one the start scripts start everything.
    #[serde(default)]
    pub service: Option<Service>,
    /// How long it may take to stop by itself, in seconds, before it is killed.
    #[serde(default = "default_stop_limit")]
    pub stop_limit_s: u64,
    /// Whether a clone keeps machine-id and host keys.
    #[serde(default)]
    pub identity: Identity,
    /// What must not run twice (cron, queue runners): names of systemd units, or of start scripts without their
    /// number. A clone does not start them before the switch.
    #[serde(default)]
    pub singletons: Vec<String>,
}

fn default_stop_signal() -> i32 {
    15
}

fn default_restarts() -> u32 {
    5
}

fn default_pids() -> u32 {
    512
}

fn default_stop_limit() -> u64 {
    20
}

impl PartitionSpec {
    /// A partition with the defaults, one system disk and no service.
    pub fn new(name: Name, cpu_percent: u32, memory: u64, root_size: u64, root: Name) -> Self {
        Self {
            hostname: name.to_string(),
            name,
            cpu_percent,
            memory,
            pids: default_pids(),
            disks: vec![Disk {
                name: root,
                size: root_size,
                mount: ROOT_MOUNT.to_owned(),
                read_only: false,
                policy: Policy::Snapshot,
            }],
            network: None,
            init: Init::Auto,
            service: None,
            stop_limit_s: default_stop_limit(),
            identity: Identity::Keep,
            singletons: Vec::new(),
        }
    }

    /// The same logical computer under another name: what a clone of it is. The machine inside keeps its name.
    #[must_use]
    pub fn renamed(&self, name: Name) -> Self {
        Self { name, ..self.clone() }
    }

    /// Its row in the resource table.
    pub fn resources(&self) -> Resources {
        Resources {
            cpu_percent: self.cpu_percent,
            memory: self.memory,
            pids: self.pids,
            disks: self.disks.iter().map(|disk| disk.size).collect(),
            network: self.network.clone(),
        }
    }

    /// The application disks: all but the system disk.
    pub fn application_disks(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| disk.mount != ROOT_MOUNT)
    }

    /// Checks everything that can be checked without looking at the host.
    ///
    /// # Errors
    /// [`SpecError`], the first one found.
    pub fn check(&self) -> Result<(), SpecError> {
        self.check_numbers()?;
        self.check_disks()?;
        let hostname = self.hostname.split('.').all(is_label) && self.hostname.len() <= 64;
        self.require(hostname, "hostname", || format!("{:?} is not a host name", self.hostname))?;
        let network = self.network.as_deref().is_none_or(is_link);
        self.require(network, "network", || format!("{:?} is not a device's name", self.network))?;
        for singleton in &self.singletons {
            self.require(is_unit(singleton), "singletons", || {
                format!("has {singleton:?}, not a unit or script")
            })?;
        }
        self.service.as_ref().map_or(Ok(()), |service| self.check_service(service))
    }

    fn check_numbers(&self) -> Result<(), SpecError> {
        let cpu = (1..=100 * 1024).contains(&self.cpu_percent);
        self.require(cpu, "cpu", || format!("is {}%, has to be 1% or more", self.cpu_percent))?;
        let memory = (MEMORY_MIN..=i64::MAX as u64).contains(&self.memory);
        self.require(memory, "memory", || format!("is {} bytes, less than {MEMORY_MIN}", self.memory))?;
        self.require(self.pids >= PIDS_MIN, "pids", || format!("is {}, less than {PIDS_MIN}", self.pids))?;
        let stop = (1..=3600).contains(&self.stop_limit_s);
        self.require(stop, "stop_limit_s", || "has to be between 1 and 3600".to_owned())
    }

    fn check_disks(&self) -> Result<(), SpecError> {
        let roots = self.disks.iter().filter(|disk| disk.mount == ROOT_MOUNT).count();
        self.require(roots == 1, "disks", || format!("with the mount point /: {roots}; one is needed"))?;
        for (index, disk) in self.disks.iter().enumerate() {
            let earlier = &self.disks[..index];
            let twice = earlier.iter().any(|other| other.name == disk.name || other.mount == disk.mount);
            self.require(!twice, "disk", || format!("{} or its mount point occurs twice", disk.name))?;
            let place = disk.mount == ROOT_MOUNT || is_plain_path(&disk.mount);
            self.require(place, "disk", || {
                format!("{} has the mount point {:?}, which is no plain absolute path", disk.name, disk.mount)
            })?;
            let below = |reserved: &&str| std::path::Path::new(&disk.mount).starts_with(reserved);
            let reserved = RESERVED.iter().any(below);
            self.require(!reserved, "disk", || {
                format!("{} has the mount point {:?}, which is needed for the system", disk.name, disk.mount)
            })?;
            let root = disk.mount == ROOT_MOUNT && disk.read_only;
            self.require(!root, "disk", || {
                format!("{} is the system disk and cannot be read-only: patches change it", disk.name)
            })?;
            let fixed = disk.mount == ROOT_MOUNT || disk.read_only;
            self.require(!fixed || disk.policy == Policy::Snapshot, "disk", || {
                let what = if disk.policy == Policy::Move { "move" } else { "be copied" };
                format!("{} cannot {what}: it is the system disk, or read-only", disk.name)
            })?;
            self.require(disk.size >= 1 << 20, "disk", || format!("{} is smaller than 1 MiB", disk.name))?;
        }
        Ok(())
    }

    fn check_service(&self, service: &Service) -> Result<(), SpecError> {
        let absent = self.init != Init::Systemd;
        self.require(absent, "service", || "cannot be given for systemd, which has units".to_owned())?;
        let command = service.command.first().is_some_and(|program| !program.is_empty());
        self.require(command, "service.command", || "is empty".to_owned())?;
        let plain = service.command.iter().all(|argument| !argument.contains('\0'));
        self.require(plain, "service.command", || "has a zero byte".to_owned())?;
        let signal = (1..=64).contains(&service.stop_signal);
        self.require(signal, "service.stop_signal", || format!("{} is not a signal", service.stop_signal))
    }

    fn require(
        &self,
        good: bool,
        field: &'static str,
        reason: impl FnOnce() -> String,
    ) -> Result<(), SpecError> {
        if good { Ok(()) } else { Err(SpecError { name: self.name.clone(), field, reason: reason() }) }
    }
}

fn is_label(label: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    (1..=63).contains(&label.len())
        && label.bytes().all(plain)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// What the kernel accepts as a device's name (`dev_valid_name`), less what nobody uses.
fn is_link(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':')
}

fn is_unit(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"@._-:".contains(&b);
    (1..=128).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with('-')
        && !name.starts_with('.')
}

/// An absolute path in its shortest form.
fn is_plain_path(path: &str) -> bool {
    let good = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    path.len() <= 256 && path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(good))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> PartitionSpec {
        let name = Name::new("web").unwrap();
        let root = Name::new("root").unwrap();
        let mut spec = PartitionSpec::new(name, 50, 256 << 20, 1 << 30, root);
        let data = Disk {
            name: Name::new("data").unwrap(),
            size: 64 << 20,
            mount: "/srv/data".to_owned(),
            read_only: false,
            policy: Policy::default(),
        };
        spec.disks.push(data);
        spec.network = Some("eth0".to_owned());
        spec.service = Some(Service {
            command: vec!["nginx".to_owned(), "-g".to_owned(), "daemon off;".to_owned()],
            stop_signal: 3,
            restarts: 5,
        });
        spec
    }

    fn refused(change: impl FnOnce(&mut PartitionSpec)) -> String {
        let mut changed = spec();
        change(&mut changed);
        let error = changed.check().unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Config);
        error.to_string()
    }

    #[test]
    fn what_cannot_work_is_refused_with_its_field() {
        assert_eq!(spec().check(), Ok(()));
        assert!(refused(|s| s.cpu_percent = 0).contains("cpu is 0%"));
        assert!(refused(|s| s.memory = 1 << 20).contains("memory is 1048576 bytes"));
        assert!(refused(|s| s.pids = 3).contains("pids is 3"));
        assert!(refused(|s| s.stop_limit_s = 0).contains("stop_limit_s"));
        assert!(refused(|s| s.disks.remove(0).size = 0).contains("disks with the mount point /: 0"));
        assert!(refused(|s| s.disks[1].mount = "/".into()).contains("disks with the mount point /: 2"));
        assert!(refused(|s| s.disks[1].name = s.disks[0].name.clone()).contains("twice"));
        assert!(refused(|s| s.disks[0].read_only = true).contains("read-only"));
        assert!(refused(|s| s.disks[1].size = 0).contains("smaller"));
        assert!(
            refused(|s| s.service.as_mut().unwrap().command.clear()).contains("service.command is empty")
        );
        assert!(refused(|s| s.service.as_mut().unwrap().stop_signal = 65).contains("not a signal"));
        assert!(refused(|s| s.init = Init::Systemd).contains("cannot be given for systemd"));
        for hostname in ["", "-a", "a b", "a/b", "a..b"] {
            assert!(refused(|s| s.hostname = hostname.into()).contains("not a host name"), "{hostname:?}");
        }
        for network in ["", "eth0/x", "..", "a b", "0123456789abcdef"] {
            assert!(refused(|s| s.network = Some(network.into())).contains("not a device"), "{network:?}");
        }
        for singleton in ["", "-x", "a/b", ".hidden", "a b"] {
            let text = refused(|s| s.singletons = vec![singleton.into()]);
            assert!(text.contains("not a unit or script"), "{singleton:?}");
        }
        for mount in ["srv", "/srv/../etc", "/srv/", "//srv", "/srv/./x"] {
            assert!(
                refused(|s| s.disks[1].mount = mount.into()).contains("no plain absolute path"),
                "{mount:?}"
            );
        }
        for mount in ["/proc/x", "/dev", "/run/a", "/usr/lib/patchswitch"] {
            assert!(
                refused(|s| s.disks[1].mount = mount.into()).contains("needed for the system"),
                "{mount:?}"
            );
        }
    }

    #[test]
    fn a_clone_is_the_same_machine_under_another_name() {
        let clone = spec().renamed(Name::new("web-b").unwrap());
        assert_eq!(clone.hostname, "web");
        assert_eq!(clone.resources(), spec().resources());
        assert_eq!(clone.application_disks().map(|d| d.mount.as_str()).collect::<Vec<_>>(), ["/srv/data"]);
    }

    #[test]
    fn unknown_keys_are_refused_and_defaults_are_filled_in() {
        let text = r#"{"name": "web", "hostname": "web", "cpu_percent": 25, "memory": 268435456,
            "disks": [{"name": "root", "size": 1073741824, "mount": "/"}], "network": null}"#;
        let spec: PartitionSpec = serde_json::from_str(text).unwrap();
        assert_eq!((spec.init, spec.identity, spec.pids), (Init::Auto, Identity::Keep, 512));
        assert_eq!(spec.check(), Ok(()));
        let typo = text.replace("cpu_percent", "cpu_percnt");
        assert!(serde_json::from_str::<PartitionSpec>(&typo).is_err());
    }
}
