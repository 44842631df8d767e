//! The results on the partition's disk: each change is durable before the next step (patent Fig. 12, step 1205).

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::patch::wire::{PatchFailure, PatchInput, PatchOutcome, PatchResults, PatchTableInput};

/// The results of one job, in memory and on the disk alike.
#[derive(Debug)]
pub(super) struct Recorded {
    path: PathBuf,
    results: PatchResults,
}

impl Recorded {
    /// The results of this job so far. Those of another job count as none, those that cannot be read as well.
    pub(super) fn open(path: &Path, job: &str, boot_id: &str) -> Self {
        let found = fs::read(path).ok().and_then(|bytes| PatchResults::parse(&bytes).ok());
        let results = found.filter(|r| r.job == job).unwrap_or_else(|| PatchResults::new(job, boot_id));
        Self { path: path.to_owned(), results: PatchResults { boot_id: boot_id.to_owned(), ..results } }
    }

    pub(super) fn get(&self) -> &PatchResults {
        &self.results
    }

    /// A patch that was begun in an earlier boot may have done anything, so it is not begun again: it failed.
    pub(super) fn settle_interrupted(&mut self) -> io::Result<()> {
        let boot_id = self.results.boot_id.clone();
        let started = std::mem::take(&mut self.results.started);
        if started.is_empty() {
            return Ok(());
        }
        let unsettled = started.iter().filter(|id| self.results.outcome(id).is_none());
        let outcomes: Vec<_> = unsettled.map(|id| failed(id, PatchFailure::Interrupted, &boot_id)).collect();
        self.results.outcomes.extend(outcomes);
        self.save()
    }

    /// Durable before the patches are begun.
    pub(super) fn begin(&mut self, patches: &[&PatchInput]) -> io::Result<()> {
        self.results.started = patches.iter().map(|patch| patch.id.clone()).collect();
        self.save()
    }

    /// Durable before the next ones are begun.
    pub(super) fn end(&mut self, outcomes: Vec<PatchOutcome>) -> io::Result<()> {
        self.results.started.clear();
        self.results.outcomes.extend(outcomes);
        self.save()
    }

    /// Nothing more will be done: what has no outcome yet was not run.
    pub(super) fn finish(&mut self, table: &PatchTableInput) -> io::Result<()> {
        let boot_id = self.results.boot_id.clone();
        for patch in &table.patches {
            if self.results.outcome(&patch.id).is_none() {
                self.results.outcomes.push(failed(&patch.id, PatchFailure::NotRun, &boot_id));
            }
        }
        let place = |id: &str| table.patches.iter().position(|patch| patch.id == id);
        self.results.outcomes.sort_by_key(|outcome| place(&outcome.id));
        self.results.finished = true;
        self.save()
    }

    fn save(&self) -> io::Result<()> {
        let bytes = self.results.encode().map_err(io::Error::other)?;
        let new = self.path.with_extension("json.new");
        let mut file = File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        self.path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    }
}

/// An outcome of a patch that has neither exit code nor output.
pub(super) fn failed(id: &str, failure: PatchFailure, boot_id: &str) -> PatchOutcome {
    let (log_digest, log_tail) = super::log::Log::default().finish();
    PatchOutcome {
        id: id.to_owned(),
        exit_code: None,
        signal: None,
        failure: Some(failure),
        duration_ms: 0,
        log_digest,
        log_tail,
        boot_id: boot_id.to_owned(),
    }
}
