//! How patches ended (patent Fig. 6, column 607): history that is only added to.
//!
//! Results come from inside a partition and are hostile. Whatever they say, the most that can happen is one more row
//! in `patch_results` for each patch that the job's own table lists.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde::Serialize;

use super::error::Fault;
use super::jobs::{self, JobId};
use super::patches::{self, PatchId};
use super::values::{Count, Json, Time, now};
use super::{Change, Store, StoreError};
use crate::names::Name;
use crate::patch::wire::{
    LOG_TAIL_MAX, PatchFailure, PatchOutcome, PatchResults, PatchTableInput, PatchVerdict, printable, tail,
};

/// How a patch ended once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PatchResult {
    /// The patch.
    pub patch: PatchId,
    /// The job.
    pub job: JobId,
    /// The partition in which it was applied.
    pub partition: Name,
    /// Counts the results of this patch from 1.
    pub attempt: u32,
    /// Whether it was applied.
    pub success: bool,
    /// What its program ended with.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What else went wrong.
    pub failure: Option<PatchFailure>,
    /// How long it ran, in milliseconds.
    pub duration_ms: u64,
    /// The SHA-256 of what it wrote.
    pub log_digest: String,
    /// The end of what it wrote.
    pub log_tail: String,
    /// The boot of the partition in which it ran.
    pub boot_id: String,
    /// When the host heard of it.
    pub recorded_at: Timestamp,
}

/// What came of results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Merged {
    /// This many results are new; those that were known already stay as they were first reported.
    Added(usize),
    /// They are about something else, and nothing was stored. Says what.
    Refused(String),
}

const COLUMNS: &str = "patch, job, partition, attempt, success, exit_code, signal, failure, duration_ms, log_digest, \
                       log_tail, boot_id, recorded_at FROM patch_results";

impl Store {
    /// Stores what a partition said about the patches of a job. `table` is the host's own copy.
    ///
    /// Monotone: a result is never changed, so whoever reports twice is heard once.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the table is of a job or a patch that is not in the store: a mistake of the
    /// caller. What the partition did wrong is no error but [`Merged::Refused`].
    pub fn merge_results(
        &mut self,
        job: JobId,
        partition: &Name,
        table: &PatchTableInput,
        results: &PatchResults,
    ) -> Result<Merged, StoreError> {
        self.write("store the results", |tx| {
            jobs::get(tx, job)?.ok_or_else(|| Fault::not_found("job", job))?;
            if table.job != job.to_string() {
                return Err(Fault::conflict(format!("the patch table is not the one of job {job}")));
            }
            if let Err(error) = results.check() {
                return Ok(Merged::Refused(error.to_string()));
            }
            if let PatchVerdict::Foreign(reason) = results.verdict(table) {
                return Ok(Merged::Refused(reason.to_owned()));
            }
            let mut added = 0;
            for outcome in &results.outcomes {
                // The table has the id, or the results were foreign.
                let id = outcome.id.parse::<PatchId>();
                let patch = match id {
                    Ok(id) => patches::get(tx, id)?,
                    Err(_) => None,
                };
                let patch = patch.ok_or_else(|| Fault::not_found("patch", &outcome.id))?;
                added += insert(tx, patch.id, job, partition, outcome)?;
            }
            Ok(Merged::Added(added))
        })
    }

    /// Everything that ever became of a patch, oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn results(&self, patch: PatchId) -> Result<Vec<PatchResult>, StoreError> {
        self.list_results("patch", patch.0)
    }

    /// The results of one job.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn job_results(&self, job: JobId) -> Result<Vec<PatchResult>, StoreError> {
        self.list_results("job", job.0)
    }

    /// Records that the service runs with what a job has applied: when its clone has taken over.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn set_applied(&mut self, job: JobId) -> Result<Change, StoreError> {
        self.write("record what runs", |tx| {
            let service = jobs::get(tx, job)?.ok_or_else(|| Fault::not_found("job", job))?.service;
            // A patch that is applied again stays with the job that applied it first.
            let rows = tx.execute(
                "INSERT OR IGNORE INTO applied (service, patch, job)
                 SELECT ?1, patch, job FROM patch_results WHERE job = ?2 AND success = 1",
                params![service, job],
            )?;
            Ok(if rows == 0 { Change::AlreadySo } else { Change::Changed })
        })
    }

    /// Records that the service runs without it again: after a give-back or a rollback.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn unset_applied(&mut self, job: JobId) -> Result<Change, StoreError> {
        self.write("record what runs", |tx| {
            let rows = tx.execute("DELETE FROM applied WHERE job = ?", [job])?;
            Ok(if rows == 0 { Change::AlreadySo } else { Change::Changed })
        })
    }

    /// The patches that the service runs with.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn applied(&self, service: &Name) -> Result<Vec<PatchId>, StoreError> {
        self.read("read what runs", |connection| {
            let mut query =
                connection.prepare_cached("SELECT patch FROM applied WHERE service = ? ORDER BY patch")?;
            let rows = query.query_map([service], |row| row.get(0))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    fn list_results(&self, column: &str, value: i64) -> Result<Vec<PatchResult>, StoreError> {
        self.read("read the results", |connection| {
            let mut query =
                connection.prepare_cached(&format!("SELECT {COLUMNS} WHERE {column} = ? ORDER BY id"))?;
            let rows = query.query_map([value], row)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }
}

pub(super) fn last(connection: &Connection, patch: PatchId) -> rusqlite::Result<Option<PatchResult>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} WHERE patch = ? ORDER BY id DESC LIMIT 1"))?
        .query_row([patch], row)
        .optional()
}

fn insert(
    tx: &Transaction<'_>,
    patch: PatchId,
    job: JobId,
    partition: &Name,
    outcome: &PatchOutcome,
) -> Result<usize, Fault> {
    let known: bool = tx.query_row(
        "SELECT EXISTS (SELECT 1 FROM patch_results WHERE patch = ? AND job = ?)",
        params![patch, job],
        |row| row.get(0),
    )?;
    if known {
        return Ok(0);
    }
    let log_tail = printable(tail(&outcome.log_tail, LOG_TAIL_MAX));
    Ok(tx.execute(
        "INSERT INTO patch_results (patch, job, partition, attempt, success, exit_code, signal, failure, duration_ms,
             log_digest, log_tail, boot_id, recorded_at)
         VALUES (?1, ?2, ?3, (SELECT count(*) + 1 FROM patch_results WHERE patch = ?1), ?4, ?5, ?6, ?7, ?8, ?9, ?10,
             ?11, ?12)",
        params![
            patch,
            job,
            partition,
            outcome.success(),
            outcome.exit_code,
            outcome.signal,
            outcome.failure.map(Json),
            // A partition may claim any number; the column has 63 bits.
            Count(outcome.duration_ms.min(i64::MAX as u64)),
            outcome.log_digest,
            log_tail,
            outcome.boot_id,
            Time(now()),
        ],
    )?)
}

fn row(row: &Row<'_>) -> rusqlite::Result<PatchResult> {
    Ok(PatchResult {
        patch: row.get(0)?,
        job: row.get(1)?,
        partition: row.get(2)?,
        attempt: row.get(3)?,
        success: row.get(4)?,
        exit_code: row.get(5)?,
        signal: row.get(6)?,
        failure: row.get::<_, Option<Json<PatchFailure>>>(7)?.map(|json| json.0),
        duration_ms: row.get::<_, Count>(8)?.0,
        log_digest: row.get(9)?,
        log_tail: row.get(10)?,
        boot_id: row.get(11)?,
        recorded_at: row.get::<_, Time>(12)?.0,
    })
}
