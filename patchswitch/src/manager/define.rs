//! Partitions come into being, and go.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::layout::{Content, Layout};
use super::{Machine, Manager, ManagerError};
use crate::config::undeliverable;
use crate::exit::ExitCode;
use crate::host::linux::block::SECTOR;
use crate::host::linux::filesystem::{FileSystem, forget};
use crate::host::linux::mountns::MountNamespace;
use crate::names::Name;
use crate::partition::console::Console;
use crate::partition::define as content;
use crate::partition::lifecycle::LifecycleError;
use crate::partition::spec::{PartitionSpec, ROOT_MOUNT};
use crate::storage::cow;
use crate::storage::disk::{self, Backing, Room};
use crate::store::{self, Role, State};

/// What defines a partition: the part of its row that is kept as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// The logical computer.
    pub spec: PartitionSpec,
    /// Its own addresses, at most one per family: by these it is known when it retires.
    pub own: Vec<IpAddr>,
    /// Whether its disks hold nothing that anybody wants: only then a job may make them the stores of a clone.
    #[serde(default)]
    pub is_store: bool,
    /// Of a standby: the size of each store in bytes, if it is not to be one that can never fill up. A job that uses it
    /// watches it, and turns back before it is full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<u64>,
    /// What it was before it became a clone, and is again when the clone is discarded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve: Option<PartitionSpec>,
    /// Stores that it has beyond what the partition needs of which it is a clone: they are its own again with the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spare: Vec<Backing>,
}

/// Where a partition's root comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A tar archive of a root, compressed or not.
    Tar(PathBuf),
    /// A directory, copied.
    Directory(PathBuf),
    /// An image of a file system, copied.
    Image(PathBuf),
    /// None: it is on the device of the system disk already ([`Layout::devices`]).
    Device,
}

impl Source {
    /// Tells by looking: a directory, a file that begins like a file system, anything else is a tar archive.
    ///
    /// # Errors
    /// [`ManagerError::Io`] if it cannot be read.
    pub fn of(path: &Path) -> Result<Self, ManagerError> {
        let failed = |source| ManagerError::io("read", path)(source);
        if std::fs::metadata(path).map_err(failed)?.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let is_image = FileSystem::read(path).map_err(failed)?.is_some();
        Ok(if is_image { Self::Image(path.to_owned()) } else { Self::Tar(path.to_owned()) })
    }
}

/// What a new partition starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A root of its own.
    Root(Source),
    /// Nothing: a standby, whose disks are stores for a clone.
    Store,
}

impl Manager {
    /// Where the image of a new disk goes. Commits exchange what is behind disks, so the plain name may be taken by
    /// another partition's disk.
    fn image(&self, partition: &Name, disk: &Name) -> PathBuf {
        let directory = self.state().join("disks");
        let plain = directory.join(format!("{partition}-{disk}.img"));
        let numbered = (2..).map(|n: u32| directory.join(format!("{partition}-{disk}-{n}.img")));
        std::iter::once(plain).chain(numbered).find(|path| !path.exists()).unwrap_or(directory)
    }

    /// Defines a partition: a row in the resource table, and its disks. All or nothing.
    ///
    /// # Errors
    /// [`ManagerError`]; the images that were made are removed again, and devices that were empty have nothing on them.
    pub fn define(
        &mut self,
        definition: &Definition,
        origin: &Origin,
        layout: &Layout,
    ) -> Result<(), ManagerError> {
        let spec = &definition.spec;
        spec.check()?;
        if self.store.partition(&spec.name)?.is_some() {
            return Err(ManagerError::refused(format!(
                "there is a partition {0} already; `patchswitch partition remove {0}` removes it",
                spec.name
            )));
        }
        self.check_own(definition)?;
        let definition = &Definition { is_store: *origin == Origin::Store, ..definition.clone() };
        let disks = self.plan_disks(definition, origin, layout);
        self.check_room(&spec.name, &disks)?;
        let contents = self.look_at_devices(definition, (origin, layout), &disks)?;
        let is_store = definition.is_store;
        let result = self.make(definition, (origin, &contents), &disks);
        if result.is_err() {
            for (disk, content) in disks.iter().zip(&contents) {
                match (serde_json::from_value(disk.backing.clone()), content) {
                    (Ok(Backing::Image(path)), _) => drop(disk::remove_image(&path)),
                    // It was empty, and what is on it now is half of a root that nobody should take for a whole one.
                    (Ok(Backing::Device(path)), Content::Made(_)) if !is_store => drop(forget(&path)),
                    _ => {}
                }
            }
            let _ = self.store.remove_partition(&spec.name);
        }
        result
    }

    /// Own addresses are those by which clients' packets find one partition and no other.
    fn check_own(&self, definition: &Definition) -> Result<(), ManagerError> {
        let refuse = |own: &IpAddr, why: String| {
            let message = format!("partition {}: own address {own}: {why}", definition.spec.name);
            Err(ManagerError::Refused { message, code: ExitCode::Config })
        };
        for (index, own) in definition.own.iter().enumerate() {
            if let Some(why) = undeliverable(own) {
                return refuse(own, why.to_owned());
            }
            if definition.own[..index].iter().any(|other| other.is_ipv4() == own.is_ipv4()) {
                return refuse(own, "it is the second one of its family; give at most one".to_owned());
            }
            if let Some(service) = self.config.services.iter().find(|one| one.addresses.contains(own)) {
                return refuse(own, format!("it is an address of service {}", service.name));
            }
            for row in self.store.partitions()? {
                if self.machine(&row.name)?.definition.own.contains(own) {
                    return refuse(own, format!("partition {} has it", row.name));
                }
            }
        }
        Ok(())
    }

    /// Disks with a root grow as they are written, so that there may be less room than they could need (`host` shows how
    /// much); but no disk can have more than there will ever be.
    fn check_room(&self, name: &Name, disks: &[store::Disk]) -> Result<(), ManagerError> {
        let state = self.state();
        std::fs::create_dir_all(state).map_err(ManagerError::io("make", state))?;
        let found = rustix::fs::statvfs(state)
            .map_err(|errno| ManagerError::io("ask for the room of", state)(errno.into()))?;
        let all = found.f_blocks.saturating_mul(found.f_frsize);
        // What lies on a device of its own needs none of it.
        let in_images = disks.iter().filter(|disk| disk.backing.get("image").is_some());
        let bytes = in_images.map(|disk| disk.sectors.saturating_mul(SECTOR));
        let wanted = bytes.fold(0, u64::saturating_add);
        if wanted <= all {
            return Ok(());
        }
        let mib = |bytes: u64| bytes >> 20;
        let message = format!(
            "partition {name}: its disks have {} MiB, and {} is on a file system of {} MiB; nothing was changed",
            mib(wanted),
            state.display(),
            mib(all)
        );
        Err(ManagerError::Refused { message, code: ExitCode::Config })
    }

    fn plan_disks(&self, definition: &Definition, origin: &Origin, layout: &Layout) -> Vec<store::Disk> {
        let spec = &definition.spec;
        let sectors = |bytes: u64| match (origin, definition.store) {
            (Origin::Root(_), _) => bytes.div_ceil(SECTOR),
            (Origin::Store, None) => cow::cow_sectors(bytes.div_ceil(SECTOR)),
            (Origin::Store, Some(store)) => store.div_ceil(SECTOR),
        };
        let disk = |disk: &crate::partition::spec::Disk| store::Disk {
            partition: spec.name.clone(),
            name: disk.name.clone(),
            sectors: sectors(disk.size),
            backing: serde_json::json!(layout.backing(&disk.name, || self.image(&spec.name, &disk.name))),
            cow: None,
        };
        spec.disks.iter().map(disk).collect()
    }

    fn make(
        &mut self,
        definition: &Definition,
        (origin, contents): (&Origin, &[Content]),
        disks: &[store::Disk],
    ) -> Result<(), ManagerError> {
        let spec = &definition.spec;
        let directory = self.state().join("disks");
        std::fs::create_dir_all(&directory).map_err(ManagerError::io("make", &directory))?;
        let room = match origin {
            Origin::Root(_) => Room::Sparse,
            Origin::Store => Room::Allocated,
        };
        let row = store::Partition {
            name: spec.name.clone(),
            cpu_percent: spec.cpu_percent,
            memory: spec.memory,
            network: spec.network.clone(),
            role: Role::Standby,
            state: State::Defined,
            service: None,
            generation: 0,
            definition: serde_json::json!(definition),
        };
        // Before any image, and in one piece: whoever comes after a kill knows all that there may be.
        let _ = self.store.put_machines(&[(row, disks.to_vec())])?;
        let machine = self.machine(&spec.name)?;
        for disk in &machine.disks {
            if let Backing::Image(path) = &disk.backing {
                let _ = disk::create_image(path, disk.sectors, room)?;
            }
        }
        match origin {
            Origin::Store => Ok(()),
            Origin::Root(source) => self.fill(&machine, source, contents),
        }
    }

    /// Puts the root into the system disk, and file systems onto the others.
    fn fill(&self, machine: &Machine, source: &Source, contents: &[Content]) -> Result<(), ManagerError> {
        let filled = self.fill_disks(machine, source, contents);
        let closed = self.close_disks(machine);
        filled.and(closed)
    }

    fn fill_disks(
        &self,
        machine: &Machine,
        source: &Source,
        contents: &[Content],
    ) -> Result<(), ManagerError> {
        let devices = self.open_disks(machine)?;
        for ((disk, content), device) in machine.spec().disks.iter().zip(contents).zip(&devices) {
            let source = (disk.mount == ROOT_MOUNT).then_some(source);
            match (source, content) {
                (_, Content::Kept) => {}
                (Some(Source::Image(image)), _) => content::copy_image(image, device)?,
                (_, Content::Made(kind)) => content::make_file_system(*kind, device)?,
            }
        }
        let mounts = Self::mounts()?;
        let root = match self.mount(&mounts, machine, &devices, false) {
            Ok(root) => root,
            Err(error) => {
                // One of several may be mounted.
                self.unmount(&mounts, machine)?;
                return Err(error);
            }
        };
        let filled = match source {
            Source::Tar(tar) => content::unpack(&mounts, tar, &root),
            Source::Directory(from) => content::copy_tree(&mounts, from, &root),
            Source::Image(_) | Source::Device => Ok(()),
        };
        let prepared = filled.and_then(|()| content::prepare(&mounts, &root)).map_err(ManagerError::from);
        prepared.and(self.unmount(&mounts, machine))
    }

    /// Removes a partition and its disks. Not there: nothing to do.
    ///
    /// # Errors
    /// [`ManagerError::Refused`] if a service has it; [`ManagerError::Cleanup`].
    pub fn remove_partition(&mut self, name: &Name) -> Result<bool, ManagerError> {
        let Some(row) = self.store.partition(name)? else { return Ok(false) };
        if let Some(service) = &row.service {
            return Err(ManagerError::refused(format!(
                "partition {name} belongs to service {service}; `patchswitch service remove {service}` frees it"
            )));
        }
        let machine = self.machine(name)?;
        self.stop(&machine)?;
        let _ = Console::of(name).remove().map_err(LifecycleError::from)?;
        // The row goes last: by it the images are known to who comes after a kill.
        let stores = machine.disks.iter().map(|disk| &disk.backing).chain(&machine.definition.spare);
        for store in stores {
            if let Backing::Image(path) = store {
                // Under another's name it is another's: commits exchange what is behind disks.
                disk::remove_image(path)?;
            }
        }
        let _ = self.store.remove_partition(name)?;
        if self.store.partitions()?.is_empty() {
            let _ = MountNamespace::remove(&Self::mount_namespace())?;
        }
        Self::remove_empty_directories();
        Ok(true)
    }
}
