//! Which file system is on a block device, by its superblock, and what that means for who mounts a copy of it.
//!
//! | file system | at byte | begins with | a copy beside its original |
//! |---|---|---|---|
//! | ext2 to ext4 | 1080 | `0xEF53` (`fs/ext4/ext4.h`) | can be mounted as it is |
//! | XFS | 0 | `XFSB` (`fs/xfs/libxfs/xfs_format.h`) | can be mounted with `nouuid` |
//! | btrfs | 65600 | `_BHRfS_M` (`include/uapi/linux/btrfs_tree.h`) | needs an identity of its own first: the kernel takes devices with the same one for parts of one file system |

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::programs::{Program, ProgramError, Run};

/// A file system that partitions' disks can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// ext4, and what its driver reads as well.
    #[default]
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs, on one device.
    Btrfs,
}

impl Kind {
    /// Its name, as the kernel has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// What a mount of it needs: our mounts are private, and an XFS that is there twice is no mistake.
    pub(super) const fn options(self) -> Option<&'static std::ffi::CStr> {
        match self {
            Self::Xfs => Some(c"nouuid"),
            Self::Ext4 | Self::Btrfs => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How long a look at a device may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What the superblock of a file system says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Of which kind it is.
    pub kind: Kind,
    /// By what the kernel tells this one from others of its kind, where it does so by device: btrfs's `fsid`.
    pub identity: Option<[u8; 16]>,
    /// Of how many devices it consists.
    pub devices: u64,
    /// How large it is, in bytes.
    pub bytes: u64,
    /// Whether somebody was ended while he changed its identity.
    pub is_half_changed: bool,
}

/// Where a magic number is, and where the superblock of btrfs begins.
const EXT: usize = 1024;
const EXT_MAGIC: usize = EXT + 0x38;
const BTRFS: usize = 64 << 10;
const BTRFS_FSID: usize = BTRFS + 0x20;
const BTRFS_MAGIC: usize = BTRFS + 0x40;
const BTRFS_DEVICES: usize = BTRFS + 0x88;
/// `BTRFS_SUPER_FLAG_CHANGING_FSID` and `…_V2`.
const BTRFS_CHANGING: u64 = (1 << 35) | (1 << 36);
/// So much of a device tells everything here.
const HEAD: usize = BTRFS + (4 << 10);

impl FileSystem {
    /// Reads what is on a device, or in an image; none if it is nothing that is known here.
    ///
    /// # Errors
    /// What the kernel says when it cannot be read.
    pub fn read(device: &Path) -> io::Result<Option<Self>> {
        let file = File::open(device)?;
        let mut head = vec![0; HEAD];
        let mut length = 0;
        while length < HEAD {
            match file.read_at(&mut head[length..], u64::try_from(length).unwrap_or(u64::MAX)) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        head.truncate(length);
        Ok(Self::parse(&head))
    }

    /// The same from the first bytes of a device.
    pub fn parse(head: &[u8]) -> Option<Self> {
        let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
        let field = |at: usize| head.get(at..)?.first_chunk::<8>().copied();
        let half = |at: usize| head.get(at..)?.first_chunk::<4>().copied();
        let plain = |kind, bytes| Self { kind, identity: None, devices: 1, bytes, is_half_changed: false };
        if has(BTRFS_MAGIC, b"_BHRfS_M") {
            let flags = u64::from_le_bytes(field(BTRFS + 0x38)?);
            return Some(Self {
                kind: Kind::Btrfs,
                identity: Some(*head.get(BTRFS_FSID..)?.first_chunk()?),
                devices: u64::from_le_bytes(field(BTRFS_DEVICES)?),
                bytes: u64::from_le_bytes(field(BTRFS + 0x70)?),
                is_half_changed: flags & BTRFS_CHANGING != 0,
            });
        }
        if has(0, b"XFSB") {
            let block = u64::from(u32::from_be_bytes(half(4)?));
            return Some(plain(Kind::Xfs, u64::from_be_bytes(field(8)?).saturating_mul(block)));
        }
        if has(EXT_MAGIC, &[0x53, 0xef]) {
            let number = |at: usize| half(EXT + at).map(|bytes| u64::from(u32::from_le_bytes(bytes)));
            // The upper half of the number of blocks is only there with the feature 64bit.
            let high = if number(0x60)? & 0x80 == 0 { 0 } else { number(0x150)? };
            let block = 1024_u64.checked_shl(u32::try_from(number(0x18)?).ok()?)?;
            return Some(plain(Kind::Ext4, ((high << 32) | number(0x4)?).saturating_mul(block)));
        }
        None
    }

    /// Whether the kernel would take the two for one file system.
    pub fn is_taken_for(&self, other: &Self) -> bool {
        self.identity.is_some() && self.identity == other.identity
    }
}

/// What is on a device, as far as the system's own tools know it: file systems, volumes, tables of partitions. Empty if
/// nothing is.
///
/// # Errors
/// [`ProgramError`] of `wipefs(8)`.
pub fn signatures(device: &Path) -> Result<Vec<String>, ProgramError> {
    let run = Run::new(Program::Wipefs).limit(LIMIT).args(["--noheadings", "--output", "TYPE"]).arg(device);
    let printed = run.read()?;
    let mut found: Vec<String> = printed.split_whitespace().map(ToOwned::to_owned).collect();
    found.dedup();
    Ok(found)
}

/// Takes away by what [`signatures`] knows what is on a device.
///
/// # Errors
/// As [`signatures`].
pub fn forget(device: &Path) -> Result<(), ProgramError> {
    Run::new(Program::Wipefs).limit(LIMIT).args(["--quiet", "--all"]).arg(device).read().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        for (at, bytes) in parts {
            head[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn each_kind_is_told_by_its_superblock() {
        let found = |parts: &[(usize, &[u8])]| FileSystem::parse(&head(parts));
        let kind = |parts: &[(usize, &[u8])]| found(parts).map(|found| found.kind);
        let ext: [(usize, &[u8]); 5] = [
            (EXT_MAGIC, &[0x53, 0xef]),
            (EXT + 4, &[3]),
            (EXT + 0x18, &[2]),
            (EXT + 0x60, &[0x80]),
            (EXT + 0x150, &[1]),
        ];
        assert_eq!(found(&ext).unwrap().bytes, ((1 << 32) | 3) * 4096);
        assert_eq!(found(&ext[..3]).unwrap().bytes, 3 * 4096);
        let xfs: [(usize, &[u8]); 3] = [(0, b"XFSB"), (4, &[0, 0, 16, 0]), (15, &[5])];
        assert_eq!(found(&xfs).unwrap().bytes, 5 * 4096);
        let half: [(usize, &[u8]); 2] = [(BTRFS_MAGIC, b"_BHRfS_M"), (BTRFS + 0x38 + 4, &[0x10])];
        assert!(found(&half).unwrap().is_half_changed);
        assert_eq!(kind(&[(EXT_MAGIC, &[0x53, 0xef])]), Some(Kind::Ext4));
        assert_eq!(kind(&[(0, b"XFSB")]), Some(Kind::Xfs));
        assert_eq!(kind(&[(BTRFS_MAGIC, b"_BHRfS_M")]), Some(Kind::Btrfs));
        assert_eq!(kind(&[]), None);
        assert_eq!(kind(&[(0, b"LUKS\xba\xbe")]), None);
        assert_eq!(kind(&[(EXT_MAGIC, &[0x53])]), None);
    }

    #[test]
    fn what_ends_too_early_is_none_and_no_panic() {
        let whole = head(&[(BTRFS_MAGIC, b"_BHRfS_M"), (BTRFS_DEVICES, &[1])]);
        for length in (0..HEAD).step_by(7).chain(BTRFS_MAGIC..BTRFS_DEVICES + 8) {
            let found = FileSystem::parse(&whole[..length]);
            assert_eq!(found.is_some(), length >= BTRFS_DEVICES + 8, "{length}");
        }
    }

    #[test]
    fn only_a_btrfs_with_the_same_identity_is_taken_for_another() {
        let btrfs = |fsid: u8, devices: u8| {
            let parts: [(usize, &[u8]); 3] =
                [(BTRFS_MAGIC, b"_BHRfS_M"), (BTRFS_FSID, &[fsid; 16]), (BTRFS_DEVICES, &[devices])];
            FileSystem::parse(&head(&parts)).unwrap()
        };
        assert!(btrfs(1, 1).is_taken_for(&btrfs(1, 1)));
        assert!(!btrfs(1, 1).is_taken_for(&btrfs(2, 1)));
        assert_eq!(btrfs(1, 3).devices, 3);
        let xfs = FileSystem::parse(&head(&[(0, b"XFSB")])).unwrap();
        assert!(!xfs.is_taken_for(&xfs));
    }
}
