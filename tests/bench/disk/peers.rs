//! Whom clones are compared with: volumes of others, each with a file system.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use patchswitch::storage::disk::{Attached, Backing, Room};

use super::ground::{Ground, MIB, sh};

/// Size of what is cloned.
pub(super) const SIZE: u64 = 256 * MIB;
/// How LVM is called: nobody's udev is waited for, and nothing of its own is kept.
const LVM: &str = "--config 'devices { filter=[\"a|/dev/loop.*|\",\"r|.*|\"] use_devicesfile=0 } activation { udev_sync=0 \
                   udev_rules=0 verify_udev_operations=0 monitoring=0 } global { use_lvmpolld=0 } backup { backup=0 archive=0 }'";
const GROUP: &str = "psbench";

/// Another way to keep the content of a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Thick,
    Thin,
    Btrfs,
    Copy,
}

impl Peer {
    pub(super) const ALL: [Self; 4] = [Self::Thick, Self::Thin, Self::Btrfs, Self::Copy];

    pub(super) const fn key(self) -> &'static str {
        match self {
            Self::Thick => "lvm-thick",
            Self::Thin => "lvm-thin",
            Self::Btrfs => "btrfs",
            Self::Copy => "copy",
        }
    }

    pub(super) const fn note(self) -> &'static str {
        match self {
            Self::Thick => "`lvcreate --snapshot`, with the start of its program",
            Self::Thin => "`lvcreate --snapshot` of a thin volume, with the start of its program",
            Self::Btrfs => "`btrfs subvolume snapshot`, with the start of its program",
            Self::Copy => "dd of 256 MiB past the page cache, on which nobody writes meanwhile",
        }
    }
}

/// A volume of a peer, with a file system that is mounted.
pub(super) struct Volume {
    peer: Peer,
    images: Vec<Backing>,
    loops: Vec<Attached>,
    /// Where its file system is.
    pub(super) at: PathBuf,
    /// The block device below it, if writing to that is what is measured.
    pub(super) device: Option<PathBuf>,
}

impl Volume {
    pub(super) fn new(ground: &Ground, peer: Peer) -> Result<Self> {
        let at = ground.path(&format!("mnt-{}", peer.key()));
        let sizes: &[(&str, u64)] = match peer {
            Peer::Copy => &[("peer", SIZE), ("peer-copy", SIZE)],
            Peer::Thick | Peer::Thin | Peer::Btrfs => &[("peer", SIZE * 3)],
        };
        let images = sizes.iter().map(|(name, size)| ground.image(name, *size, Room::Allocated));
        let images = images.collect::<Result<Vec<_>>>()?;
        let loops = images.iter().map(Backing::attach).collect::<Result<Vec<_>, _>>()?;
        let node = loops[0].device().node()?.display().to_string();
        let shown = at.display().to_string();
        let mount = "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0";
        let mib = SIZE / MIB;
        let device = PathBuf::from("/dev").join(GROUP).join("volume");
        let made = match peer {
            Peer::Thick => sh(&format!(
                "pvcreate -q {LVM} {node}; vgcreate -q {LVM} {GROUP} {node}; lvcreate -q -y -Wn {LVM} -L {mib}m -n volume {GROUP}"
            )),
            Peer::Thin => sh(&format!(
                "pvcreate -q {LVM} {node}; vgcreate -q {LVM} {GROUP} {node}; lvcreate -q -y {LVM} -Zn -L {}m -T {GROUP}/pool; \
                 lvcreate -q -y -Wn {LVM} -V {mib}m -T {GROUP}/pool -n volume",
                mib * 2
            )),
            Peer::Btrfs => sh(&format!(
                "mkfs.btrfs -q -f {node}; mkdir -p {shown}; mount -n {node} {shown}; btrfs -q subvolume create {shown}/volume"
            )),
            Peer::Copy => sh(&format!("{mount} {node}; mkdir -p {shown}; mount -n {node} {shown}")),
        };
        let is_lvm = matches!(peer, Peer::Thick | Peer::Thin);
        let volume = Self { peer, images, loops, at, device: is_lvm.then_some(device.clone()) };
        let made = made.and_then(|_| {
            if is_lvm {
                sh(&format!("{mount} {0}; mkdir -p {shown}; mount -n {0} {shown}", device.display()))?;
            }
            Ok(())
        });
        match made {
            Ok(()) => Ok(volume),
            Err(error) => {
                drop(volume.remove());
                Err(error)
            }
        }
    }

    /// Where a writer writes.
    pub(super) fn folder(&self) -> PathBuf {
        if self.peer == Peer::Btrfs { self.at.join("volume") } else { self.at.clone() }
    }

    /// Keeps what it has now.
    pub(super) fn clone(&self) -> Result<()> {
        let at = self.at.display();
        let store = SIZE / MIB;
        let script = match self.peer {
            Peer::Thick => format!("lvcreate -q -y {LVM} -s -L {store}m -n kept {GROUP}/volume"),
            Peer::Thin => format!("lvcreate -q -y {LVM} -s -n kept {GROUP}/volume"),
            Peer::Btrfs => format!("btrfs -q subvolume snapshot {at}/volume {at}/kept"),
            Peer::Copy => {
                let [from, to] = [&self.loops[0], &self.loops[1]].map(|one| one.device().node());
                format!(
                    "dd if={} of={} bs=1M iflag=direct oflag=direct conv=fsync status=none",
                    from?.display(),
                    to?.display()
                )
            }
        };
        sh(&script).map(drop)
    }

    /// Gives it up again.
    pub(super) fn discard(&self) -> Result<()> {
        let at = self.at.display();
        let script = match self.peer {
            Peer::Thick | Peer::Thin => format!("lvremove -q -y {LVM} {GROUP}/kept"),
            Peer::Btrfs => format!("btrfs -q subvolume delete -c {at}/kept; sync"),
            Peer::Copy => return Ok(()),
        };
        sh(&script).map(drop)
    }

    /// Takes everything of it away.
    pub(super) fn remove(self) -> Result<()> {
        let at = self.at.display();
        let end = match self.peer {
            Peer::Thick | Peer::Thin => format!(
                "vgremove -q -y -ff {LVM} {GROUP}; pvremove -q -y -ff {LVM} $(losetup -n -O NAME -j {})",
                self.images[0].path().display()
            ),
            Peer::Btrfs | Peer::Copy => ":".to_owned(),
        };
        let removed = sh(&format!("umount -n {at} 2>/dev/null || :; rmdir {at} 2>/dev/null || :; {end}"));
        drop(self.loops);
        for image in &self.images {
            image.detach()?;
            std::fs::remove_file(image.path())?;
        }
        removed.map(drop)
    }
}

/// A device is there.
pub(super) fn there(device: &Path) -> Result<()> {
    ensure!(device.exists(), "{} is not there", device.display());
    Ok(())
}
