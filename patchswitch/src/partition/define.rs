//! A partition's disks get their content: a file system, and in it a root.
//!
//! The archive or directory is the administrator's and is read where the administrator is, in the host's mount
//! namespace; what is written is written in the agent's own, onto a `nosuid,nodev` mount of a disk of limited size.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::exit::ExitCode;
use crate::host::linux::filesystem::{FileSystem, Kind};
use crate::host::linux::mountns::{Inside, MountNamespace, MountNsError};
use crate::host::linux::programs::{Program, ProgramError, Run};
use crate::host::linux::root::{Absent, Place, Root, RootError};
use crate::partition::program::{self, ProgramFileError};

/// How long making or checking a file system, or unpacking a root, may take.
const LIMIT: Duration = Duration::from_secs(1800);
/// The size of a piece that is copied at once.
const PIECE: usize = 1 << 20;
/// The name that [`crate::patch::wire::INIT_FILE`] has in its directory.
const INIT_NAME: &str = "init";

/// Why a disk has no content.
#[derive(Debug, thiserror::Error)]
pub enum DefineError {
    /// A program failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The mount namespace could not be entered.
    #[error(transparent)]
    Mount(#[from] MountNsError),
    /// Something in the root is not as it has to be.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The init cannot be used.
    #[error(transparent)]
    Init(#[from] ProgramFileError),
    /// The files of a root do not fit.
    #[error("the root does not fit on its disk; define it with a larger --size")]
    Full(#[source] ProgramError),
    /// The archive of a root is none, or not whole.
    #[error("failed to unpack {}: it is not the whole archive of a root", archive.display())]
    Archive {
        /// The archive.
        archive: PathBuf,
        /// What tar said.
        #[source]
        source: ProgramError,
    },
    /// The image does not fit.
    #[error("image {image} has {needed} bytes, the disk {present}; define a larger disk")]
    TooLarge {
        /// The image.
        image: PathBuf,
        /// Its size.
        needed: u64,
        /// The disk's size.
        present: u64,
    },
    /// There is no file system in an image that could be a partition's, or only a part of one.
    #[error("image {image} is no whole ext4, XFS or btrfs on one device")]
    NoFileSystem {
        /// The image.
        image: PathBuf,
    },
    /// Somebody was ended while he gave a btrfs an identity of its own.
    #[error(
        "the identity of the btrfs on {device} was being changed when that was cut off; `btrfs check {device}` tells whether it is usable"
    )]
    HalfChanged {
        /// The device.
        device: PathBuf,
    },
    /// A file could not be read or written.
    #[error("failed to {action} {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl DefineError {
    /// The code for this end of a command.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Program(ProgramError::Missing { .. }) | Self::Init(_) => ExitCode::Unavailable,
            Self::TooLarge { .. } | Self::Full(_) => ExitCode::Config,
            Self::Archive { .. } | Self::NoFileSystem { .. } => ExitCode::BadData,
            Self::Io { source, .. } => ExitCode::of_io(source),
            _ => ExitCode::Failed,
        }
    }
}

/// Makes a file system on a device or image, whatever was there before.
///
/// The tables of an ext4 are written now: the kernel would do it later, in the background, into the store of every clone.
///
/// # Errors
/// [`DefineError::Program`], also if the device is too small for its kind.
pub fn make_file_system(kind: Kind, device: &Path) -> Result<(), DefineError> {
    let (program, arguments): (_, &[&str]) = match kind {
        Kind::Ext4 => {
            (Program::Mkfs, &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"])
        }
        Kind::Xfs => (Program::MkfsXfs, &["-q", "-f", "-K"]),
        Kind::Btrfs => (Program::MkfsBtrfs, &["-q", "-f", "-K"]),
    };
    let run = Run::new(program).limit(LIMIT).args(arguments.iter().copied()).arg(device);
    run.read().map(drop).map_err(Into::into)
}

/// Gives the copy of a file system an identity of its own, if the kernel would take it for its original otherwise. It
/// must not have been mounted yet. Whether that was needed.
///
/// Only the superblocks change (`btrfstune -m`): what has been written refers to the identity that it was written under,
/// which is kept beside the new one.
///
/// # Errors
/// [`DefineError::Io`], [`DefineError::Program`].
pub fn tell_apart(copy: &Path, original: &Path) -> Result<bool, DefineError> {
    let read = |device: &Path| FileSystem::read(device).map_err(error("read", device));
    let Some(found) = read(copy)?.filter(|found| found.identity.is_some()) else { return Ok(false) };
    if found.is_half_changed {
        return Err(DefineError::HalfChanged { device: copy.to_owned() });
    }
    if !read(original)?.is_some_and(|other| found.is_taken_for(&other)) {
        return Ok(false);
    }
    let run = Run::new(Program::Btrfstune).limit(LIMIT).arg("-m").arg(copy);
    run.read().map(|_| true).map_err(Into::into)
}

/// Copies an image of a file system onto a device. An ext4 is checked there; the others check themselves when they are
/// mounted.
///
/// # Errors
/// [`DefineError::TooLarge`] before anything is written; [`DefineError::Io`]; [`DefineError::Program`] if the file
/// system is damaged, [`DefineError::NoFileSystem`].
pub fn copy_image(image: &Path, device: &Path) -> Result<(), DefineError> {
    let mut from = File::open(image).map_err(error("open", image))?;
    let mut to = File::options().write(true).open(device).map_err(error("open", device))?;
    let needed = from.seek(SeekFrom::End(0)).map_err(error("measure", image))?;
    let present = to.seek(SeekFrom::End(0)).map_err(error("measure", device))?;
    if needed > present {
        return Err(DefineError::TooLarge { image: image.to_owned(), needed, present });
    }
    from.rewind().map_err(error("read", image))?;
    to.rewind().map_err(error("write", device))?;
    let mut piece = vec![0; PIECE];
    loop {
        let count = from.read(&mut piece).map_err(error("read", image))?;
        if count == 0 {
            break;
        }
        to.write_all(&piece[..count]).map_err(error("write", device))?;
    }
    to.sync_all().map_err(error("write", device))?;
    drop(to);
    let found = FileSystem::read(device).map_err(error("read", device))?;
    match found {
        Some(FileSystem { kind: Kind::Ext4, .. }) => {}
        Some(FileSystem { devices: 1, .. }) => {
            // The next partition that is made of this image is another file system.
            let _ = tell_apart(device, image)?;
            return Ok(());
        }
        _ => return Err(DefineError::NoFileSystem { image: image.to_owned() }),
    }
    let check = Run::new(Program::Fsck).limit(LIMIT).args(["-f", "-p"]).arg(device).status()?;
    // 1: errors were there and were corrected (e2fsck(8)); typically a journal that was replayed.
    if matches!(check.status.code(), Some(0 | 1)) {
        return Ok(());
    }
    let stderr = format!("{}{}", check.stdout, check.stderr);
    let arguments = format!("-f -p {}", device.display());
    Err(ProgramError::Failed { program: Program::Fsck, arguments, status: check.status, stderr }.into())
}

/// Unpacks an archive of a root, compressed or not, into a mounted root.
///
/// # Errors
/// [`DefineError`]; also if a member of the archive would be written outside of the root.
pub fn unpack(mounts: &MountNamespace, archive: &Path, root: &Path) -> Result<(), DefineError> {
    let mut file = File::open(archive).map_err(error("open", archive))?;
    let mut magic = Vec::new();
    Read::by_ref(&mut file).take(8).read_to_end(&mut magic).map_err(error("read", archive))?;
    file.rewind().map_err(error("read", archive))?;
    mounts.run(|inside| extract(inside, file, compression(&magic), root))?.map_err(|error| match error {
        DefineError::Program(source) if is_bad_archive(&source) => {
            DefineError::Archive { archive: archive.to_owned(), source }
        }
        other => other,
    })
}

/// Whether tar or its decompressor says that a file is no archive or was cut off, and not that something else failed.
fn is_bad_archive(error: &ProgramError) -> bool {
    const SAID: [&str; 5] = [
        "does not look like a tar archive",
        "Unexpected EOF",
        "unexpected end of",
        "not in gzip format",
        "premature end",
    ];
    let ProgramError::Failed { stderr, .. } = error else { return false };
    !stderr.contains("Cannot exec") && SAID.iter().any(|said| stderr.contains(said))
}

/// Copies a directory into a mounted root. What is mounted below the directory is left out.
///
/// # Errors
/// [`DefineError`].
pub fn copy_tree(mounts: &MountNamespace, from: &Path, root: &Path) -> Result<(), DefineError> {
    let from = from.canonicalize().map_err(error("find", from))?;
    let (reader, writer) = io::pipe().map_err(error("make a pipe for", &from))?;
    let reader = File::from(std::os::fd::OwnedFd::from(reader));
    std::thread::scope(|scope| {
        let extracted = scope.spawn(|| mounts.run(|inside| extract(inside, reader, None, root)));
        // Opened by tar through our own descriptor, so that what it has to say is not mixed into the archive.
        let pipe = format!("/proc/{}/fd/{}", std::process::id(), writer.as_raw_fd());
        let run = Run::new(Program::Tar).limit(LIMIT).args(["--create", "--file", &pipe, "--force-local"]);
        let run = run.args(["--one-file-system", "--numeric-owner", "--sparse", "--xattrs"]);
        let run = run.args(["--xattrs-include=security.capability", "--directory"]).arg(&from).arg(".");
        let packed = run.read();
        drop(writer);
        let extracted = extracted.join().unwrap_or(Err(MountNsError::Lost));
        // If both failed, the reader ended first and the writer merely noticed.
        extracted??;
        packed.map(drop).map_err(Into::into)
    })
}

/// Gives a mounted root what patchswitch needs in it: its init, and empty directories for the rest.
///
/// # Errors
/// [`DefineError::Root`] naming the component, if the root has something else there.
pub fn prepare(mounts: &MountNamespace, root: &Path) -> Result<(), DefineError> {
    let init = program::read()?;
    mounts.run(|_| {
        let root = Root::open(root)?;
        root.folder(Place::Programs, &[], Absent::Create)?.write(INIT_NAME, 0o755, &init)?;
        root.folder(Place::Settings, &["start.d"], Absent::Create)?;
        root.folder(Place::State, &["patches"], Absent::Create)?;
        Ok(())
    })?
}

/// GNU tar itself refuses `..`, takes leading slashes away, and puts symbolic links that lead elsewhere in place only
/// at the end, so that no member is written through one.
fn extract(
    _inside: &Inside,
    archive: File,
    compression: Option<&'static str>,
    root: &Path,
) -> Result<(), DefineError> {
    let run = Run::new(Program::Tar).limit(LIMIT).stdin(archive);
    let run = run.args(["--extract", "--file=-", "--numeric-owner", "--same-owner", "--same-permissions"]);
    let run = run.args(["--delay-directory-restore", "--xattrs", "--xattrs-include=security.capability"]);
    // The partition gets these from the runtime. A device node would be of no use on this mount.
    let run = run.args(["--anchored", "--wildcards", "--wildcards-match-slash"]);
    let run = run.args(
        ["dev", "proc", "sys", "run"]
            .into_iter()
            .flat_map(|dir| [format!("--exclude=./{dir}/*"), format!("--exclude={dir}/*")]),
    );
    run.args(compression).arg("--directory").arg(root).read().map(drop).map_err(extraction)
}

/// Names the cause that is the caller's to mend. What tar has to say begins with it, and then there is a lot.
fn extraction(error: ProgramError) -> DefineError {
    match error {
        ProgramError::Failed { program, arguments, status, stderr } if stderr.contains(NO_SPACE) => {
            let line = stderr.lines().find(|line| line.contains(NO_SPACE)).unwrap_or(NO_SPACE).to_owned();
            DefineError::Full(ProgramError::Failed { program, arguments, status, stderr: line })
        }
        other => other.into(),
    }
}

/// `ENOSPC` as the C library has it.
const NO_SPACE: &str = "No space left on device";

/// tar recognises a compressed archive only by its name, which standard input has not.
fn compression(magic: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 4] = [
        (b"\x1f\x8b", "--gzip"),
        (b"\xfd7zXZ\0", "--xz"),
        (b"\x28\xb5\x2f\xfd", "--zstd"),
        (b"BZh", "--bzip2"),
    ];
    known.iter().find(|(start, _)| magic.starts_with(start)).map(|(_, option)| *option)
}

fn error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> DefineError {
    let path = path.to_owned();
    move |source| DefineError::Io { action, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn a_disk_that_is_too_small_is_named_and_not_every_file() {
        let failed = |stderr: &str| ProgramError::Failed {
            program: Program::Tar,
            arguments: String::new(),
            status: std::process::ExitStatus::from_raw(0x200),
            stderr: stderr.to_owned(),
        };
        let full =
            extraction(failed("tar: a: Cannot open: No space left on device\ntar: b: Cannot mkdir: x\n"));
        assert_eq!(full.exit_code(), ExitCode::Config);
        let DefineError::Full(cause) = full else { panic!("{full:?}") };
        assert!(!cause.to_string().contains("tar: b"), "{cause}");
        assert!(matches!(extraction(failed("tar: damaged")), DefineError::Program(_)));
    }

    #[test]
    fn compressed_archives_are_told_by_their_first_bytes() {
        assert_eq!(compression(b"\x1f\x8b\x08\0"), Some("--gzip"));
        assert_eq!(compression(b"\xfd7zXZ\0\0\x04"), Some("--xz"));
        assert_eq!(compression(b"\x28\xb5\x2f\xfd\x24"), Some("--zstd"));
        assert_eq!(compression(b"BZh91AY&"), Some("--bzip2"));
        assert_eq!(compression(b"./\0\0\0\0\0\0"), None);
        assert_eq!(compression(b""), None);
    }

    #[test]
    fn an_image_larger_than_the_disk_is_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (image, disk) = (dir.path().join("image"), dir.path().join("disk"));
        std::fs::write(&image, [7; 100]).unwrap();
        std::fs::write(&disk, [1; 99]).unwrap();
        let error = copy_image(&image, &disk).unwrap_err();
        assert!(matches!(error, DefineError::TooLarge { needed: 100, present: 99, .. }));
        assert_eq!(std::fs::read(&disk).unwrap(), [1; 99]);
    }

    #[test]
    fn an_image_is_copied_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let (image, disk) = (dir.path().join("image"), dir.path().join("disk"));
        File::create(&image).unwrap().set_len(4 << 20).unwrap();
        File::create(&disk).unwrap().set_len(8 << 20).unwrap();
        make_file_system(Kind::Ext4, &image).unwrap();
        copy_image(&image, &disk).unwrap();
        let (image, mut disk_content) = (std::fs::read(&image).unwrap(), std::fs::read(&disk).unwrap());
        disk_content.truncate(image.len());
        // The check writes its time into the superblock, and nothing else.
        let differing = image.chunks(4096).zip(disk_content.chunks(4096)).filter(|(a, b)| a != b).count();
        assert!(differing <= 1, "{differing} blocks differ");
        std::fs::write(image_of_noise(dir.path()), noise()).unwrap();
        assert!(copy_image(&image_of_noise(dir.path()), &disk).is_err());
    }

    fn image_of_noise(dir: &Path) -> PathBuf {
        dir.join("noise")
    }

    fn noise() -> Vec<u8> {
        (0..1_u32 << 16).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
    }
}
