//! What a job did: its figures.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Phase;
use super::quiesce::Waited;
use crate::attachment::{DrainReport, Switched};
use crate::exit::ExitCode;
use crate::manager::ManagerError;
use crate::names::Name;
use crate::storage::copies::Account;
use crate::storage::meter::{Changes, Mark};
use crate::store::JobId;

/// The kind of a job that gives a service back.
pub(super) const ROLLBACK: &str = "rollback";

/// How many files are named.
const FIRST: usize = 20;

/// Writes that a switch or a rollback leaves behind.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Loss {
    /// Sectors of 512 bytes; nothing where that is not known: the devices were made anew meanwhile, or cannot be read.
    pub sectors: Option<u64>,
    /// Files outside what the service declared it may lose, and places that could not be looked into.
    pub files: u64,
    /// The first of them.
    pub first: Vec<PathBuf>,
}

impl Loss {
    /// Adds what was found on one disk. What could not be looked at counts as lost.
    pub(super) fn add(&mut self, changes: &Changes) {
        let room = FIRST.saturating_sub(self.first.len());
        self.first.extend(changes.undeclared.iter().take(room).map(|file| file.path.clone()));
        self.files += changes.undeclared_total + changes.skipped;
    }
}

/// One side's disks at a moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AtSwitch {
    /// One mark for each disk.
    pub marks: Vec<Mark>,
    /// When it was.
    pub at: SystemTime,
}

/// The report of a job. Times are in seconds unless a name says otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The form of this document.
    pub schema: &'static str,
    /// The job.
    pub job: JobId,
    /// `apply`, `rollback` or `commit`.
    pub kind: &'static str,
    /// The service.
    pub service: Name,
    /// The partition that served at the beginning.
    pub from: Option<Name>,
    /// The partition that was patched.
    pub to: Option<Name>,
    /// Phases in the order in which they ended, with their times.
    pub phases: Vec<(Phase, f64)>,
    /// How long writers waited at the cut, in milliseconds.
    pub freeze_ms: Option<f64>,
    /// How long the clone took as a whole, in milliseconds.
    pub clone_ms: Option<f64>,
    /// How whole copies of disks were made, where there are any.
    pub copies: Vec<Account>,
    /// How much the clone differs from its original, in bytes.
    pub cow_bytes: Option<u64>,
    /// What the scan found.
    pub scan: Option<Value>,
    /// What became of each patch.
    pub patches: Vec<Value>,
    /// The switch.
    pub switch: Option<Switched>,
    /// The switch back, if the job gave the service back.
    pub give_back: Option<Switched>,
    /// How long new flows waited for the switch, if they did.
    pub waited: Option<Waited>,
    /// How long they waited for the switch back.
    pub waited_back: Option<Waited>,
    /// From before the store to after it, in microseconds.
    pub flip_us: Option<f64>,
    /// Flows of the old partition at the switch.
    pub old_flows_at_flip: Option<usize>,
    /// The drain.
    pub drain: Option<DrainReport>,
    /// What the old side wrote after the cut: lost by the switch.
    pub lost_by_switch: Option<Loss>,
    /// What the new side wrote after the switch: lost by a give-back or a rollback.
    pub lost_by_give_back: Option<Loss>,
    /// What had been written to the new side's disks at the switch, and when that was: what a rollback counts from.
    pub at_switch: Option<AtSwitch>,
    /// What had been written to the old side's disks at the cut, and when that was: what its retirement counts from.
    pub at_cut: Option<AtSwitch>,
    /// How it ended, in one word.
    pub outcome: String,
    /// The end of the command.
    pub exit_code: u8,
    /// What failed, if something did.
    pub error: Option<String>,
}

impl Report {
    /// An empty report.
    pub fn new(job: JobId, kind: &'static str, service: &Name) -> Self {
        Self {
            schema: "patchswitch.report/1",
            job,
            kind,
            service: service.clone(),
            from: None,
            to: None,
            phases: Vec::new(),
            freeze_ms: None,
            clone_ms: None,
            copies: Vec::new(),
            cow_bytes: None,
            scan: None,
            patches: Vec::new(),
            switch: None,
            give_back: None,
            waited: None,
            waited_back: None,
            flip_us: None,
            old_flows_at_flip: None,
            drain: None,
            lost_by_switch: None,
            lost_by_give_back: None,
            at_switch: None,
            at_cut: None,
            outcome: "running".to_owned(),
            exit_code: 0,
            error: None,
        }
    }

    pub(super) fn phase(&mut self, phase: Phase, seconds: f64) {
        self.phases.push((phase, seconds));
    }

    /// The end of a command that went as planned.
    pub(super) fn exit_code(&self) -> ExitCode {
        let cut = self.drain.as_ref().is_some_and(|drain| drain.reset > 0);
        let waited = [&self.waited, &self.waited_back].into_iter().flatten();
        if cut || waited.into_iter().any(|waited| waited.reset > 0) {
            return ExitCode::DrainForced;
        }
        ExitCode::Done
    }

    /// Where the report of a job is kept.
    pub fn path(state: &Path, job: JobId) -> PathBuf {
        state.join("reports").join(format!("{job}.json"))
    }

    /// Keeps the report, durably: after a power cut a rollback and a commit go by it.
    ///
    /// # Errors
    /// [`ManagerError::Io`].
    pub fn save(&self, state: &Path) -> Result<(), ManagerError> {
        write(&Self::path(state, self.job), self)
    }
}

/// Writes a report durably, as a whole or not at all.
///
/// # Errors
/// [`ManagerError::Io`].
pub(super) fn write(path: &Path, report: &impl Serialize) -> Result<(), ManagerError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory).map_err(ManagerError::io("make", directory))?;
    let text = serde_json::to_vec_pretty(report).map_err(std::io::Error::from);
    let text = text.map_err(ManagerError::io("write", path))?;
    let new = path.with_extension("new");
    let write = |text: &[u8]| {
        let mut file = File::create(&new)?;
        file.write_all(text)?;
        file.sync_all()
    };
    write(&text).map_err(ManagerError::io("write", &new))?;
    std::fs::rename(&new, path).map_err(ManagerError::io("write", path))?;
    File::open(directory).and_then(|file| file.sync_all()).map_err(ManagerError::io("write", directory))
}
