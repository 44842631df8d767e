//! Putting the patches into a clone that has never run (patent steps 705 and 706), and reading what became of them.
//!
//! Everything is written through [`Root`], which trusts no path of the clone; the patch table comes last, so that a
//! clone that has one has everything. A clone in which this failed half-way is thrown away.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::table::{self, TableError};
use super::wire::{
    Driver, Identity, OnError, PATCHES_MAX, PatchInput, PatchResults, PatchTableInput, WIRE_MAX,
    WIRE_VERSION, WireError,
};
use crate::config::Job;
use crate::exit::ExitCode;
use crate::host::linux::root::{Absent, Folder, Place, Root, RootError};
use crate::store::{JobId, Patch};

const INIT: &str = "init";
const TABLE: &str = "table.json";
const RESULT: &str = "result.json";
/// What the init renames to [`RESULT`].
const RESULT_UNFINISHED: &str = "result.json.new";
const PATCHES: &str = "patches";
const SCRIPTS: &str = "start.d";
/// The unit that has the init apply the patches where systemd is PID 1.
const UNIT: &str = "patchswitch-apply.service";
const WANTS: &str = "multi-user.target.wants";
/// The largest init program, in bytes.
const INIT_MAX: u64 = 64 << 20;

/// Why nothing, or not everything, was put into the clone.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The clone has something there that the host does not touch, or the kernel failed.
    #[error(transparent)]
    Root(#[from] RootError),
    /// A stored patch is not the one that was approved.
    #[error(transparent)]
    Patch(#[from] TableError),
    /// The clone is mounted in a way in which its files could act on the host.
    #[error("the clone is not mounted nosuid,nodev: this is a bug")]
    Unguarded,
    /// The init program cannot be read.
    #[error("failed to read the init program {path:?}: is patchswitch installed completely?")]
    Init {
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There are too many patches, or the table is too large.
    #[error("failed to write the patch table")]
    Table(#[source] WireError),
    /// The results in the clone cannot be used.
    #[error("failed to read the results of the clone")]
    Results(#[source] WireError),
}

impl InjectError {
    /// The code for this end of a command.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Root(error) => error.exit_code(),
            Self::Patch(error) => error.exit_code(),
            Self::Unguarded => ExitCode::Internal,
            Self::Init { .. } => ExitCode::Unavailable,
            Self::Table(_) => ExitCode::Failed,
            Self::Results(_) => ExitCode::BadData,
        }
    }
}

/// What is put into a clone.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// The host's file of `patchswitch-init`; see [`init_program`].
    pub init: &'a Path,
    /// Starting scripts of the administrator beside those that the root has: name and content.
    pub scripts: &'a [(&'a str, &'a [u8])],
    /// The text of the unit that applies the patches, where systemd is PID 1.
    pub unit: Option<&'a str>,
    /// What the clone is told; made by [`table_of`].
    pub table: &'a PatchTableInput,
    /// The patches of that table.
    pub patches: &'a [Patch],
    /// Where the host keeps their files.
    pub state_dir: &'a Path,
}

/// Makes the table for a clone: packages together, in one run of their driver, at the place of the first of them;
/// scripts alone; everything by its date (605).
///
/// # Errors
/// [`InjectError::Table`] if there are too many.
pub fn table_of(
    job: JobId,
    patches: &[Patch],
    limits: &Job,
    on_error: OnError,
    identity: Identity,
) -> Result<PatchTableInput, InjectError> {
    let mut sorted: Vec<&Patch> = patches.iter().collect();
    sorted.sort_by_key(|patch| (patch.issued_at, patch.id));
    let first_deb = sorted.iter().position(|patch| patch.driver == Driver::Deb).unwrap_or_default();
    let (debs, scripts): (Vec<_>, Vec<_>) =
        sorted.into_iter().enumerate().partition(|(_, patch)| patch.driver == Driver::Deb);
    let mut ordered: Vec<(usize, &Patch)> = debs.into_iter().map(|(_, patch)| (first_deb, patch)).collect();
    ordered.extend(scripts);
    ordered.sort_by_key(|(position, patch)| (*position, patch.issued_at, patch.id));
    let input = |(position, patch): (usize, &Patch)| PatchInput {
        id: patch.id.to_string(),
        file: patch.file.to_string(),
        sha256: patch.sha256.clone(),
        size: patch.size,
        driver: patch.driver,
        time_limit_s: limits.patch.as_secs().max(1),
        group: u32::try_from(position).unwrap_or(u32::MAX),
    };
    let table = PatchTableInput {
        version: WIRE_VERSION,
        job: job.to_string(),
        on_error,
        identity,
        patches: ordered.into_iter().map(input).collect(),
    };
    table.check().map_err(InjectError::Table)?;
    Ok(table)
}

/// Writes everything into the clone, whose root the agent has mounted `nosuid,nodev` for itself alone.
///
/// # Errors
/// [`InjectError`]; the clone is to be thrown away then. Outside the clone nothing has changed.
pub fn inject(root: &Root, payload: &Payload<'_>) -> Result<(), InjectError> {
    if !root.is_guarded()? {
        return Err(InjectError::Unguarded);
    }
    write_all(root, payload)
}

fn write_all(root: &Root, payload: &Payload<'_>) -> Result<(), InjectError> {
    let bytes =
        serde_json::to_vec_pretty(payload.table).map_err(WireError::Json).map_err(InjectError::Table)?;
    if bytes.len() > WIRE_MAX || payload.patches.len() > PATCHES_MAX {
        return Err(InjectError::Table(WireError::TooLong { bytes: bytes.len() }));
    }
    let state = root.folder(Place::State, &[], Absent::Create)?;
    // The disk may be one that was patched before: what that job left must not be taken for this one's.
    for old in [TABLE, RESULT, RESULT_UNFINISHED] {
        state.remove(old)?;
    }
    write_init(&root.folder(Place::Programs, &[], Absent::Create)?, payload.init)?;
    let patches = root.folder(Place::State, &[PATCHES], Absent::Create)?;
    patches.clear()?;
    for patch in payload.patches {
        write_patch(&patches, payload, patch)?;
    }
    let scripts = root.folder(Place::Settings, &[SCRIPTS], Absent::Create)?;
    for (name, content) in payload.scripts {
        scripts.write(name, 0o755, content)?;
    }
    if let Some(unit) = payload.unit {
        root.folder(Place::Units, &[], Absent::Create)?.write(UNIT, 0o644, unit.as_bytes())?;
        let wants = root.folder(Place::Units, &[WANTS], Absent::Create)?;
        wants.symlink(UNIT, &format!("../{UNIT}"))?;
    }
    state.write(TABLE, 0o644, &bytes)?;
    Ok(())
}

fn write_init(folder: &Folder, path: &Path) -> Result<(), InjectError> {
    let failed = |source| InjectError::Init { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(INIT_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > INIT_MAX {
        return Err(failed(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(folder.write(INIT, 0o755, &bytes)?)
}

/// The digest is that of the bytes that were written: a file that changes in this moment does not get its name.
fn write_patch(folder: &Folder, payload: &Payload<'_>, patch: &Patch) -> Result<(), InjectError> {
    let mut file = folder.create(&format!("{}-{}", patch.sha256, patch.file))?;
    table::copy_stored(payload.state_dir, patch, &mut file)?;
    let mode = match patch.driver {
        Driver::Deb => 0o644,
        Driver::Script => 0o755,
    };
    Ok(file.finish(mode)?)
}

/// What the clone has written about its patches; none if it has not written anything. Hostile: judge it with
/// [`PatchResults::verdict`] and store it with [`crate::store::Store::merge_results`].
///
/// # Errors
/// [`InjectError::Root`] if something else than a plain, small file is there; [`InjectError::Results`] if it is
/// nothing that our init writes.
pub fn read_results(root: &Root) -> Result<Option<PatchResults>, InjectError> {
    let bytes =
        root.folder(Place::State, &[], Absent::Fail).and_then(|state| state.read(RESULT, WIRE_MAX as u64));
    match bytes {
        Ok(bytes) => PatchResults::parse(&bytes).map(Some).map_err(InjectError::Results),
        Err(RootError::Missing { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Where the host has `patchswitch-init`: beside the running program, else where packages put it.
///
/// # Errors
/// [`InjectError::Init`] that names the last place.
pub fn init_program() -> Result<PathBuf, InjectError> {
    let beside = std::env::current_exe().ok().map(|path| path.with_file_name("patchswitch-init"));
    let packaged = PathBuf::from("/usr/lib/patchswitch/patchswitch-init");
    match beside.into_iter().chain([packaged.clone()]).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => Err(InjectError::Init { path: packaged, source: io::ErrorKind::NotFound.into() }),
    }
}

#[cfg(test)]
mod tests;
