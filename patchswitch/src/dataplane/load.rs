//! The BPF object: where it comes from, how it gets into the kernel, and its pins.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use aya::programs::{Program, ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};

use super::attach::Point;
use super::{DataplaneError, maps};
use crate::host::linux::mountns;

/// The object that was built from `patchswitch-ebpf` and is checked in, so that no LLVM is needed to install.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../bpf/patchswitch.bpf.o");
/// Names another object; for tests of one that was just built.
const OBJECT_VARIABLE: &str = "PATCHSWITCH_BPF_OBJECT";

/// The object to load: the built-in one, unless the environment names another.
///
/// # Errors
/// [`DataplaneError::File`] if the one that is named cannot be read.
pub fn object() -> Result<Cow<'static, [u8]>, DataplaneError> {
    match std::env::var_os(OBJECT_VARIABLE) {
        None => Ok(Cow::Borrowed(OBJECT)),
        Some(path) => fs::read(&path).map(Cow::Owned).map_err(|source| DataplaneError::File {
            action: "read BPF object",
            path: path.into(),
            source,
        }),
    }
}

/// Loads the object and pins all maps and programs below `directory`. The phase word is the one that is pinned below
/// `with`, if that is given.
pub(super) fn load_and_pin(directory: &Path, with: Option<&Path>, xdp: bool) -> Result<(), DataplaneError> {
    let links = directory.join("links");
    fs::create_dir_all(&links).map_err(made(&links))?;
    let known: Vec<_> = with.into_iter().map(|with| (with, maps::WORD)).collect();
    pin(load(None, &known)?, directory, Point::all(xdp))
}

/// Loads the object onto the maps that are pinned below `directory`; its programs are not in the kernel yet.
pub(super) fn load_onto(directory: &Path) -> Result<Ebpf, DataplaneError> {
    load(None, &maps::ALL.map(|name| (directory, name)))
}

/// Loads the object once more, as the twin that the self-test asks, and pins it below `directory`.
///
/// It is done when nobody waits for it: the verifier reads the program for as long as it takes, and a partition that
/// joins while clients are served is tested with what is there then.
pub(super) fn load_and_pin_twin(directory: &Path, xdp: bool) -> Result<(), DataplaneError> {
    // It learns nothing.
    pin(load(Some(1), &[])?, directory, points_of_twin(xdp))
}

/// Whose programs a twin has, with XDP or without.
pub(super) fn points_of_twin(xdp: bool) -> &'static [Point] {
    if xdp { &[Point::Uplink, Point::Xdp] } else { &[Point::Uplink] }
}

fn pin(mut ebpf: Ebpf, directory: &Path, points: &[Point]) -> Result<(), DataplaneError> {
    for part in ["maps", "programs"] {
        let path = directory.join(part);
        fs::create_dir_all(&path).map_err(made(&path))?;
    }
    maps::pin_all(&ebpf, directory)?;
    for point in points {
        let name = point.program();
        let program = program(&mut ebpf, *point)?;
        let path = directory.join("programs").join(name);
        program.pin(&path).map_err(|error| DataplaneError::Program {
            action: "pin",
            program: name.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(())
}

fn made(path: &Path) -> impl FnOnce(std::io::Error) -> DataplaneError {
    let path = path.to_owned();
    move |source| DataplaneError::File { action: "make directory", path, source }
}

/// Loads the maps of the object, those of flows with room for `flows` if that is given; in place of the `known` ones it
/// takes those that are pinned below a directory. Programs are loaded by [`program`].
fn load(flows: Option<u32>, known: &[(&Path, &str)]) -> Result<Ebpf, DataplaneError> {
    let version = aya::util::KernelVersion::current().ok();
    let at_least =
        |major, minor| version.is_some_and(|v| v >= aya::util::KernelVersion::new(major, minor, 0));
    // BPF_FIB_LOOKUP_SKIP_NEIGH came with 6.3.
    let skip_neigh = u32::from(at_least(6, 3));
    // BPF_F_IPV6 came with 6.16 and was taken into stable series; where it is not known, EINVAL would cost the packet,
    // while its absence costs nothing for what a partition sends itself.
    let csum_ipv6 = u32::from(at_least(6, 16));
    let object = object()?;
    let mut loader = EbpfLoader::new();
    loader.override_global("HAS_SKIP_NEIGH", &skip_neigh, true).override_global(
        "HAS_CSUM_IPV6",
        &csum_ipv6,
        true,
    );
    if let Some(flows) = flows {
        for map in maps::OF_FLOWS {
            loader.map_max_entries(map, flows);
        }
        // The least that a ring can have.
        loader.map_max_entries(maps::LOG, 4096);
    }
    for (directory, name) in known {
        loader.map_pin_path(name, maps::path(directory, name));
    }
    loader.load(&object).map_err(|error| DataplaneError::Load(Box::new(error)))
}

/// Loads the program of a point into the kernel.
pub(super) fn program(ebpf: &mut Ebpf, point: Point) -> Result<&mut Program, DataplaneError> {
    let program = in_object(ebpf, point)?;
    let loaded = match program {
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => return Err(missing(point)),
    };
    loaded.map_err(|error| refused("load", point.program(), &error))?;
    Ok(program)
}

/// The program of a point, loaded or not.
pub(super) fn in_object(ebpf: &mut Ebpf, point: Point) -> Result<&mut Program, DataplaneError> {
    ebpf.program_mut(point.program()).ok_or_else(|| missing(point))
}

fn missing(point: Point) -> DataplaneError {
    DataplaneError::Missing(format!("program {}", point.program()))
}

/// Opens a pinned program.
pub(super) fn open(directory: &Path, point: Point) -> Result<SchedClassifier, DataplaneError> {
    let name = point.program();
    let path = directory.join("programs").join(name);
    SchedClassifier::from_pin(path).map_err(|error| refused("open", name, &error))
}

/// Names a program's failure; of the verifier's log the end, where the reason is.
pub(super) fn refused(action: &'static str, program: &str, error: &ProgramError) -> DataplaneError {
    let reason = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<_> = log.lines().rev().take(12).collect();
            let tail: Vec<_> = lines.into_iter().rev().collect();
            format!("{io_error}; the verifier says at last:\n{}", tail.join("\n"))
        }
        other => chain(other),
    };
    DataplaneError::Program { action, program: program.to_owned(), reason }
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// Removes all pins below `directory`, the twin's as well, and the directories that are empty then.
pub(super) fn remove_pins(directory: &Path) -> Result<(), DataplaneError> {
    let twin = remove_all(&super::twin_dir(directory)).and(super::replace::remove_remains(directory));
    let all = remove_all(directory);
    // The shared directories above go with the last attachment; in use: they stay.
    for parent in directory.ancestors().skip(1).take(2) {
        let _ = fs::remove_dir(parent);
    }
    all.and(twin)
}

/// Removes one pin, if it is there.
pub(super) fn remove_file(path: &Path) -> Result<(), DataplaneError> {
    gone(fs::remove_file(path), "remove pin", path)
}

fn gone(result: std::io::Result<()>, action: &'static str, path: &Path) -> Result<(), DataplaneError> {
    match result {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(DataplaneError::File { action, path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Removes all pins of a directory and the directory itself, whatever of it is there.
pub(super) fn remove_all(directory: &Path) -> Result<(), DataplaneError> {
    let mut result = Ok(());
    // Links first: they are what packets depend on.
    for part in ["links", "programs", "maps"] {
        let part = directory.join(part);
        for entry in fs::read_dir(&part).into_iter().flatten().flatten() {
            result = result.and(remove_file(&entry.path()));
        }
        result = result.and(gone(fs::remove_dir(&part), "remove directory", &part));
    }
    result.and(gone(fs::remove_dir(directory), "remove directory", directory))
}

/// Mounts the BPF file system where it belongs, if it is not there yet; only root may look into it.
///
/// # Errors
/// [`DataplaneError::File`] if it cannot be mounted, [`DataplaneError::PrivateMounts`] if only this process and its
/// children would see it.
pub fn ensure_bpffs() -> Result<(), DataplaneError> {
    use rustix::mount::{MountFlags, mount};
    const BPFFS: &str = "/sys/fs/bpf";
    /// `BPF_FS_MAGIC` of `linux/magic.h`.
    const MAGIC: u64 = 0xcafe_4a11;
    let failed = |source: rustix::io::Errno| DataplaneError::File {
        action: "mount the BPF file system at",
        path: BPFFS.into(),
        source: source.into(),
    };
    let found = rustix::fs::statfs(BPFFS).map_err(failed)?;
    if u64::try_from(found.f_type).is_ok_and(|kind| kind == MAGIC) {
        return Ok(());
    }
    // What is pinned in a mount namespace of its own is gone with it, and the path of the packets as well.
    if mountns::is_private() {
        return Err(DataplaneError::PrivateMounts);
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("bpf", BPFFS, "bpf", flags, c"mode=0700").map_err(failed)
}
