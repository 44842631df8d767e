//! The resource table of the host (patent Fig. 5): what there is, which partition has what, what is free.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Manager, ManagerError};
use crate::names::Name;
use crate::storage::disk::Backing;
use crate::store::Role;

/// Links of the host that are not for clients: ours carry this as their alias.
const OUR_ALIAS: &str = "patchswitch ";

/// Amounts of what can be divided. Negative where more was promised than there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amounts {
    /// Column 502: percent of one processor.
    pub cpu_percent: i64,
    /// Column 503: bytes of memory.
    pub memory: i64,
    /// Column 504: bytes of disk.
    pub disk: i64,
}

/// What one partition has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Column 501.
    pub partition: Name,
    /// What it is to its service.
    pub role: Role,
    /// Its service; a standby without one is free to be cloned into.
    pub service: Option<Name>,
    /// Columns 502 to 504.
    pub amounts: Amounts,
    /// Column 505.
    pub network: Option<String>,
}

/// A network device of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Whether it can carry packets now.
    pub up: bool,
    /// The partitions that are reached by it.
    pub partitions: Vec<Name>,
}

/// The resource table of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostTable {
    /// What the host has. Of disk: the file system that holds the state directory.
    pub host: Amounts,
    /// What each partition has.
    pub shares: Vec<Share>,
    /// What no partition has. Of disk: what is free there once every image has grown to its size.
    pub free: Amounts,
    /// The network devices of the host.
    pub devices: Vec<Device>,
}

/// What the host has, as it was read.
#[derive(Clone, Copy, Debug)]
struct Found {
    host: Amounts,
    /// Free on the file system, and what sparse images may still take of it, in bytes.
    disk_free: i64,
    disk_owed: i64,
}

impl Manager {
    /// The resource table of the host. Processors may be promised several times over, as limits are not reservations;
    /// memory and disk had better not.
    ///
    /// # Errors
    /// [`ManagerError::Store`], [`ManagerError::Io`].
    pub fn host_table(&self) -> Result<HostTable, ManagerError> {
        let mut shares = Vec::new();
        let mut images = BTreeSet::new();
        for row in self.store.partitions()? {
            let machine = self.machine(&row.name)?;
            for disk in &machine.disks {
                let cow = disk.clone.as_ref().map(|clone| &clone.cow);
                images.extend([Some(&disk.backing), cow].into_iter().flatten().filter_map(image));
            }
            let spare = &machine.definition.spare;
            images.extend(spare.iter().filter_map(image));
            // One that is gone takes none; whoever needs it says so.
            let spare = spare.iter().map(|store| store.sectors().unwrap_or_default());
            let disk = signed(machine.disks.iter().map(|disk| disk.sectors).chain(spare).sum::<u64>() * 512);
            let amounts = Amounts { cpu_percent: row.cpu_percent.into(), memory: signed(row.memory), disk };
            let (role, service, network) = (row.role, row.service, row.network);
            shares.push(Share { partition: row.name, role, service, amounts, network });
        }
        let found = found(self.state(), &images)?;
        Ok(table(found, shares, links()))
    }
}

/// Puts the table together.
fn table(found: Found, shares: Vec<Share>, links: Vec<(String, bool)>) -> HostTable {
    let given = |amount: fn(&Amounts) -> i64| shares.iter().map(|share| amount(&share.amounts)).sum::<i64>();
    let free = Amounts {
        cpu_percent: found.host.cpu_percent - given(|amounts| amounts.cpu_percent),
        memory: found.host.memory - given(|amounts| amounts.memory),
        disk: found.disk_free - found.disk_owed,
    };
    let by = |device: &str| {
        let reached = shares.iter().filter(|share| share.network.as_deref() == Some(device));
        reached.map(|share| share.partition.clone()).collect()
    };
    let devices = links.into_iter().map(|(name, up)| Device { partitions: by(&name), name, up }).collect();
    HostTable { host: found.host, free, devices, shares }
}

fn image(backing: &Backing) -> Option<PathBuf> {
    match backing {
        Backing::Image(path) => Some(path.clone()),
        Backing::Device(_) => None,
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn found(state: &Path, images: &BTreeSet<PathBuf>) -> Result<Found, ManagerError> {
    const MEMORY: &str = "/proc/meminfo";
    let text = fs::read_to_string(MEMORY).map_err(ManagerError::io("read", MEMORY))?;
    let memory =
        memory(&text).ok_or_else(|| ManagerError::io("read", MEMORY)(io::ErrorKind::InvalidData.into()))?;
    let processors = std::thread::available_parallelism().map_err(ManagerError::io("count", "processors"))?;
    let room = rustix::fs::statvfs(state)
        .map_err(|errno| ManagerError::io("ask for the room of", state)(errno.into()))?;
    let bytes = |blocks: u64| signed(blocks.saturating_mul(room.f_frsize));
    // An image that is gone owes nothing; whoever needs it will say so.
    let owed = |path: &PathBuf| {
        fs::metadata(path).map_or(0, |found| found.len().saturating_sub(found.blocks() * 512))
    };
    let cpu_percent = i64::try_from(processors.get()).unwrap_or(i64::MAX).saturating_mul(100);
    Ok(Found {
        host: Amounts { cpu_percent, memory: signed(memory), disk: bytes(room.f_blocks) },
        disk_free: bytes(room.f_bavail),
        disk_owed: signed(images.iter().map(owed).sum()),
    })
}

/// The memory of the host in bytes, of `/proc/meminfo` (`proc_meminfo(5)`).
fn memory(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

/// The links on which clients can be, and whether they carry packets.
fn links() -> Vec<(String, bool)> {
    const LINKS: &str = "/sys/class/net";
    let read = |name: &str, file: &str| {
        fs::read_to_string(format!("{LINKS}/{name}/{file}")).unwrap_or_default().trim().to_owned()
    };
    let entries = fs::read_dir(LINKS).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_ours = |name: &String| read(name, "ifalias").starts_with(OUR_ALIAS);
    let mut links: Vec<(String, bool)> = names
        .filter(|name| {
            name != "lo" && Path::new(LINKS).join(name).join("operstate").exists() && !is_ours(name)
        })
        .map(|name| {
            // Some drivers, veth of old among them, do not tell more than "unknown".
            let up = read(&name, "operstate") != "down" && read(&name, "carrier") == "1";
            (name, up)
        })
        .collect();
    links.sort();
    links
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(name: &str, amounts: Amounts, network: Option<&str>) -> Share {
        Share {
            partition: Name::new(name).unwrap(),
            role: Role::Standby,
            service: None,
            amounts,
            network: network.map(ToOwned::to_owned),
        }
    }

    #[test]
    fn what_is_free_is_what_nobody_has_and_may_be_less_than_nothing() {
        let has = |cpu_percent, memory, disk| Amounts { cpu_percent, memory, disk };
        let found = Found { host: has(200, 1000, 5000), disk_free: 900, disk_owed: 400 };
        let shares =
            vec![share("a", has(150, 600, 300), Some("eth0")), share("b", has(150, 300, 300), Some("eth0"))];
        let table = table(found, shares, vec![("eth0".to_owned(), true), ("eth1".to_owned(), false)]);
        assert_eq!(table.free, has(-100, 100, 500));
        let users: Vec<usize> = table.devices.iter().map(|device| device.partitions.len()).collect();
        assert_eq!(users, [2, 0]);
    }

    #[test]
    fn memory_is_read_as_the_kernel_prints_it() {
        assert_eq!(memory("MemTotal:        4030848 kB\nMemFree:  1 kB\n"), Some(4_030_848 << 10));
        for bad in ["", "MemTotal: x kB", "MemTotal: 18446744073709551615 kB", "MemFree: 1 kB"] {
            assert_eq!(memory(bad), None, "{bad}");
        }
    }

    #[test]
    fn this_host_has_something_of_everything() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("sparse.img");
        fs::File::create(&image).unwrap().set_len(1 << 30).unwrap();
        let found = found(dir.path(), &[image].into()).unwrap();
        assert!(found.host.cpu_percent >= 100 && found.host.memory > 0, "{found:?}");
        assert!(found.host.disk >= found.disk_free && found.disk_owed == 1 << 30, "{found:?}");
        assert!(links().iter().all(|(name, _)| name != "lo"));
    }
}
