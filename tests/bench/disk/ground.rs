//! Where it is measured: disks of patchswitch over images.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use patchswitch::host::linux::dm::Dm;
use patchswitch::storage::disk::{Active, Backing, Disk, Room, activate, create_image, deactivate};
use patchswitch::storage::snapshot::{CloneOf, WhenBusy, discard};
use patchswitch_tests::{programs, vm};

const ROOT: &str = "/run/patchswitch-bench";
/// How long a device may be open for a moment.
pub(super) const LIMIT: Duration = Duration::from_secs(20);
pub(super) const MIB: u64 = 1 << 20;

/// The file system on which all images lie.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(super) dm: Dm,
}

/// Runs a script that has to succeed.
pub(super) fn sh(script: &str) -> Result<String> {
    programs::run(&["/bin/sh", "-ec", &format!("export DM_DISABLE_UDEV=1; {script}")])
}

impl Ground {
    pub(super) fn new() -> Result<Self> {
        let disk = vm::scratch_disk()?.context("the disks are measured in a test machine: --kernel 6.12")?;
        let disk = disk.display();
        sh(&format!(
            "mkdir -p {ROOT}; mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 {disk}; mount -n {disk} {ROOT}"
        ))?;
        Ok(Self { dm: Dm::open()? })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        Path::new(ROOT).join(name)
    }

    pub(super) fn image(&self, name: &str, bytes: u64, room: Room) -> Result<Backing> {
        let path = self.path(name);
        create_image(&path, bytes / 512, room)?;
        Ok(Backing::Image(path))
    }

    /// A disk that is in use, over a new image.
    pub(super) fn disk(&self, name: &str, bytes: u64, room: Room) -> Result<(Disk, Active)> {
        let backing = self.image(name, bytes, room)?;
        let disk = Disk { name: format!("ps-bench-{name}"), backing, sectors: bytes / 512 };
        let active = activate(&self.dm, &disk)?;
        Ok((disk, active))
    }

    /// How a disk is cloned, into a store of its own.
    pub(super) fn clone_of(&self, disk: &Disk, name: &str, store: u64) -> Result<CloneOf> {
        Ok(CloneOf {
            active: disk.name.clone(),
            clone: format!("{}-clone", disk.name),
            origin: disk.backing.clone(),
            cow: self.image(&format!("{name}-store"), store, Room::Allocated)?,
            sectors: disk.sectors,
            // It is smaller than the disk: nobody writes so much here.
            watched: true,
        })
    }

    pub(super) fn discard(&self, clone: &CloneOf) -> Result<()> {
        discard(&self.dm, std::slice::from_ref(clone), LIMIT, WhenBusy::Refuse)?;
        Ok(())
    }

    /// Makes an ext4 on a device and mounts it.
    pub(super) fn mount(&self, device: &Path, name: &str) -> Result<PathBuf> {
        let at = self.path(&format!("mnt-{name}"));
        let (device, shown) = (device.display(), at.display());
        sh(&format!(
            "mkfs.ext4 -q -F -E lazy_itable_init=1,lazy_journal_init=1 {device}; mkdir -p {shown}; mount -n -o noinit_itable \
             {device} {shown}"
        ))?;
        Ok(at)
    }

    pub(super) fn unmount(&self, at: &Path) -> Result<()> {
        sh(&format!("umount -n {0}; rmdir {0}", at.display())).map(drop)
    }

    /// Takes a disk away with its image.
    pub(super) fn remove(&self, disk: &Disk) -> Result<()> {
        deactivate(&self.dm, disk, LIMIT)?;
        Ok(std::fs::remove_file(disk.backing.path())?)
    }

    pub(super) fn finish(self) -> Result<()> {
        sh(&format!("umount -n {ROOT}; rmdir {ROOT}")).map(drop)
    }
}
