//! Where the disks of a new partition lie: in images, or on block devices of the administrator's (LVM's volumes,
//! partitions of a disk, whole disks). What `wipefs` knows on a device is never overwritten: it is used, or it is in the way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Definition, Manager, ManagerError, Origin, Source};
use crate::exit::ExitCode;
use crate::host::linux::block::DeviceNumber;
use crate::host::linux::filesystem::{FileSystem, Kind, signatures};
use crate::host::linux::programs::{Program, ProgramError};
use crate::names::Name;
use crate::partition::spec::ROOT_MOUNT;
use crate::storage::disk::{self, Backing};
use crate::store;

/// Where the disks of a new partition lie, and what empty ones get.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Block devices, by the names of the disks that lie on them; the others get images. They are remembered by these
    /// paths, which should be such that outlive a reboot: `/dev/VOLUMES/NAME`, `/dev/disk/by-id/…`.
    pub devices: BTreeMap<Name, PathBuf>,
    /// The file system that empty disks get.
    pub file_system: Kind,
}

/// What becomes of the content of a new disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// There is a file system on it, which stays.
    Kept,
    /// It gets one.
    Made(Kind),
}

impl Layout {
    /// What is behind a disk: its device, or this image.
    pub(super) fn backing(&self, disk: &Name, image: impl FnOnce() -> PathBuf) -> Backing {
        match self.devices.get(disk) {
            Some(device) => Backing::Device(device.clone()),
            None => Backing::Image(image()),
        }
    }
}

fn refuse<T>(partition: &Name, what: &Path, why: &str) -> Result<T, ManagerError> {
    let message = format!("partition {partition}: {} {why}; nothing was changed", what.display());
    Err(ManagerError::Refused { message, code: ExitCode::Config })
}

impl Manager {
    /// Looks at the devices on which a partition is to lie, before anything is changed: what becomes of each disk's
    /// content, in the order of the definition.
    pub(super) fn look_at_devices(
        &self,
        definition: &Definition,
        (origin, layout): (&Origin, &Layout),
        disks: &[store::Disk],
    ) -> Result<Vec<Content>, ManagerError> {
        let spec = &definition.spec;
        let nobodys =
            layout.devices.iter().find(|(name, _)| spec.disks.iter().all(|disk| disk.name != **name));
        if let Some((name, device)) = nobodys {
            return refuse(
                &spec.name,
                device,
                &format!("is for disk {name}, which the partition does not have"),
            );
        }
        let mut contents = Vec::new();
        for (index, (disk, planned)) in spec.disks.iter().zip(disks).enumerate() {
            let is_root = disk.mount == ROOT_MOUNT;
            let Some(device) = layout.devices.get(&disk.name) else {
                if is_root && *origin == Origin::Root(Source::Device) {
                    return refuse(
                        &spec.name,
                        Path::new(ROOT_MOUNT),
                        "has neither a source (--from) nor a device (--on root=DEVICE)",
                    );
                }
                contents.push(Content::Made(layout.file_system));
                continue;
            };
            let earlier = spec.disks[..index].iter().filter_map(|disk| layout.devices.get(&disk.name));
            self.check_device(&spec.name, device, planned.sectors, earlier)?;
            let found = FileSystem::read(device).map_err(ManagerError::io("read", device))?;
            contents.push(match (origin, is_root) {
                (Origin::Root(Source::Device), true) => kept(&spec.name, device, disk.size, found)?,
                (Origin::Root(_), false) if found.is_some() => kept(&spec.name, device, disk.size, found)?,
                _ => {
                    must_be_empty(&spec.name, device)?;
                    Content::Made(layout.file_system)
                }
            });
        }
        Ok(contents)
    }

    /// A device that can be a partition's: large enough, and nobody else's.
    fn check_device<'a>(
        &self,
        partition: &Name,
        device: &Path,
        sectors: u64,
        mut earlier: impl Iterator<Item = &'a PathBuf>,
    ) -> Result<(), ManagerError> {
        let number = disk::number(device)?;
        if has_kernels_name(device) {
            let why = "may be another one after the next boot; give it by a name that stays, such as one below \
                       /dev/disk/by-id or of a volume";
            return refuse(partition, device, why);
        }
        if earlier.any(|other| disk::number(other).is_ok_and(|other| other == number)) {
            return refuse(partition, device, "is given for two disks");
        }
        if let Some(owner) = self.owner(number)? {
            return refuse(partition, device, &format!("is a disk of partition {owner}"));
        }
        let planned =
            disk::Disk { name: String::new(), backing: Backing::Device(device.to_owned()), sectors };
        disk::check_free(&planned)?;
        if number.is_private() {
            let why = "is a private device of patchswitch, LVM or Stratis, on which nothing can be recognised; give the one that \
                       people are to use";
            return refuse(partition, device, why);
        }
        Ok(())
    }

    /// The partition that has a disk, or the store of one, on a device.
    fn owner(&self, device: DeviceNumber) -> Result<Option<Name>, ManagerError> {
        for row in self.store.partitions()? {
            let machine = self.machine(&row.name)?;
            let stores = machine.clones().into_iter().map(|clone| clone.cow);
            let own = machine.disks.iter().map(|disk| &disk.backing).chain(&machine.definition.spare);
            let mut all = own.cloned().chain(stores);
            let is_it = |backing: Backing| match backing {
                Backing::Device(path) => disk::number(&path).is_ok_and(|number| number == device),
                Backing::Image(_) => false,
            };
            if all.any(is_it) {
                return Ok(Some(row.name));
            }
        }
        Ok(None)
    }
}

/// A file system that is there and stays, on a disk of so many bytes.
fn kept(
    partition: &Name,
    device: &Path,
    bytes: u64,
    found: Option<FileSystem>,
) -> Result<Content, ManagerError> {
    let Some(FileSystem { kind, devices, bytes: needed, .. }) = found else {
        return refuse(
            partition,
            device,
            "has no file system that is known here (ext4, XFS, btrfs); give what is to be put on it by --from",
        );
    };
    if devices != 1 {
        let why = format!("is one of {devices} devices of a {kind}; it has to be the only one");
        return refuse(partition, device, &why);
    }
    if needed > bytes {
        let why = format!("has a {kind} of {needed} bytes, and the disk is to have {bytes}; give no size");
        return refuse(partition, device, &why);
    }
    // Half of a mirror looks like a whole file system.
    let all = signatures(device)?;
    if all.len() > 1 {
        return refuse(
            partition,
            device,
            &format!("is not only a file system: there is {} on it", all.join(", ")),
        );
    }
    if kind == Kind::Btrfs && Program::Btrfstune.find().is_none() {
        let missing = ProgramError::Missing { program: Program::Btrfstune };
        return Err(ManagerError::from(missing));
    }
    Ok(Content::Kept)
}

/// Whether a device is called as the kernel happened to number it. Links are made by somebody for what is behind them.
fn has_kernels_name(device: &Path) -> bool {
    let is_link = std::fs::symlink_metadata(device).is_ok_and(|data| data.is_symlink());
    !is_link && device.parent() == Some(Path::new("/dev"))
}

fn must_be_empty(partition: &Name, device: &Path) -> Result<(), ManagerError> {
    let found = signatures(device)?;
    if found.is_empty() {
        return Ok(());
    }
    let wipe = format!("`wipefs --all {}` if nobody wants it", device.display());
    refuse(partition, device, &format!("is not empty, there is {} on it ({wipe})", found.join(", ")))
}
