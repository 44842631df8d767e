//! The journal: jobs and their steps, the intent written before the act and the outcome after it.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;
use serde_json::Value;

use super::error::Fault;
use super::values::{Json, Time, now, row_id, words};
use super::{Change, Store, StoreError};
use crate::exit::ExitCode;
use crate::names::Name;

row_id! {
    /// The number of a job.
    JobId
}
row_id! {
    /// The number of a step.
    StepId
}

words! {
    /// How far a step has come.
    StepState {
        /// It was about to be done. After a crash: perhaps done, perhaps half done.
        Intended = "intended",
        /// It was done.
        Done = "done",
        /// It failed.
        Failed = "failed",
        /// It was done or half done, and undone.
        Undone = "undone",
    }
}

/// A job that begins.
#[derive(Clone, Debug)]
pub struct NewJob<'a> {
    /// The service.
    pub service: &'a Name,
    /// What it does: `apply`, `rollback`, `commit`.
    pub kind: &'a str,
    /// Everything that is needed to go on with it or to undo it.
    pub plan: &'a Value,
    /// The boot of the host, see [`boot_id`].
    pub boot_id: &'a str,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// The service.
    pub service: Name,
    /// What it does.
    pub kind: String,
    /// What was planned.
    pub plan: Value,
    /// The process that began it.
    pub pid: u32,
    /// The boot in which it began.
    pub boot_id: String,
    /// When.
    pub started_at: Timestamp,
    /// When it was over; none while it is open, be it under way or interrupted.
    pub ended_at: Option<Timestamp>,
    /// What it ended with.
    pub exit_code: Option<u8>,
    /// What it had to say at its end.
    pub message: Option<String>,
}

impl Job {
    /// Whether it ended because somebody wanted it to end: it was undone then.
    pub fn was_interrupted(&self) -> bool {
        self.exit_code == Some(ExitCode::Interrupted.number())
    }
}

/// A step of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Its number; steps of a job are in the order of their numbers.
    pub id: StepId,
    /// The job.
    pub job: JobId,
    /// The phase of the job.
    pub phase: String,
    /// What was to be done, with the names of what it makes.
    pub intent: Value,
    /// How far it came.
    pub state: StepState,
    /// What came of it.
    pub outcome: Option<Value>,
    /// When the intent was written.
    pub began_at: Timestamp,
    /// When the outcome was written.
    pub ended_at: Option<Timestamp>,
}

const JOB: &str = "id, service, kind, plan, pid, boot_id, started_at, ended_at, exit_code, message FROM jobs";
const STEP: &str = "id, job, phase, intent, state, outcome, began_at, ended_at FROM steps";

/// The boot of this host (`/proc/sys/kernel/random/boot_id`).
///
/// # Errors
/// What the kernel says; without `/proc` nothing of ours works.
pub fn boot_id() -> std::io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|text| text.trim().to_owned())
}

impl Store {
    /// Begins a job of this process.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a job of the service is open: recovery ends it first.
    pub fn begin_job(&mut self, job: &NewJob<'_>) -> Result<JobId, StoreError> {
        self.write("begin the job", |tx| {
            if let Some(open) = open_job(tx, job.service)? {
                let message = format!(
                    "job {} ({}) of service {} is not over: run `patchswitch up` if nobody is at it",
                    open.id, open.kind, open.service
                );
                return Err(Fault::conflict(message));
            }
            tx.execute(
                "INSERT INTO jobs (service, kind, plan, pid, boot_id, started_at) VALUES (?, ?, ?, ?, ?, ?)",
                params![job.service, job.kind, Json(job.plan), std::process::id(), job.boot_id, Time(now())],
            )?;
            Ok(JobId(tx.last_insert_rowid()))
        })
    }

    /// Ends a job. That it has ended with the same code is fine.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`] if it has ended otherwise.
    pub fn end_job(&mut self, id: JobId, code: ExitCode, message: &str) -> Result<Change, StoreError> {
        self.write("end the job", |tx| {
            let job = get(tx, id)?.ok_or_else(|| Fault::not_found("job", id))?;
            match job.exit_code {
                Some(old) if old == code.number() => return Ok(Change::AlreadySo),
                Some(old) => return Err(Fault::conflict(format!("job {id} has ended with {old} already"))),
                None => {}
            }
            tx.execute(
                "UPDATE jobs SET ended_at = ?, exit_code = ?, message = ? WHERE id = ?",
                params![Time(now()), code.number(), message, id],
            )?;
            Ok(Change::Changed)
        })
    }

    /// One job.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn job(&self, id: JobId) -> Result<Option<Job>, StoreError> {
        self.read("read the job", |connection| Ok(get(connection, id)?))
    }

    /// The newest jobs, oldest first; of one service or of all.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn jobs(&self, service: Option<&Name>, limit: u32) -> Result<Vec<Job>, StoreError> {
        self.read("read the jobs", |connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT * FROM (SELECT {JOB} WHERE ?1 IS NULL OR service = ?1 ORDER BY id DESC LIMIT ?2) ORDER BY id"
            ))?;
            let rows = query.query_map(params![service, limit], job)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// The newest job that was to patch a service: the one that made its clone, while there is one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn last_apply(&self, service: &Name) -> Result<Option<JobId>, StoreError> {
        self.read("read the last job", |connection| {
            let mut query = connection
                .prepare_cached("SELECT max(id) FROM jobs WHERE service = ?1 AND kind = 'apply'")?;
            Ok(query.query_row(params![service], |row| row.get(0))?)
        })
    }

    /// The jobs that are not over: what recovery looks at.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open_jobs(&self) -> Result<Vec<Job>, StoreError> {
        self.read("read the open jobs", |connection| {
            let mut query =
                connection.prepare_cached(&format!("SELECT {JOB} WHERE ended_at IS NULL ORDER BY id"))?;
            let rows = query.query_map([], job)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// The job of a service that is not over.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open_job(&self, service: &Name) -> Result<Option<Job>, StoreError> {
        self.read("read the open job", |connection| Ok(open_job(connection, service)?))
    }

    /// Writes down what is about to be done; it is on the disk when this returns.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`] if the job is over.
    pub fn intend(&mut self, job: JobId, phase: &str, intent: &Value) -> Result<StepId, StoreError> {
        self.write("write the intent", |tx| {
            let open = get(tx, job)?.ok_or_else(|| Fault::not_found("job", job))?;
            if open.ended_at.is_some() {
                return Err(Fault::conflict(format!("job {job} is over")));
            }
            tx.execute(
                "INSERT INTO steps (job, phase, intent, state, began_at) VALUES (?, ?, ?, ?, ?)",
                params![job, phase, Json(intent), StepState::Intended, Time(now())],
            )?;
            Ok(StepId(tx.last_insert_rowid()))
        })
    }

    /// Writes down what came of a step. A step that is done or failed may become undone later; nothing else changes.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`] if it has another outcome already.
    pub fn conclude(
        &mut self,
        step: StepId,
        state: StepState,
        outcome: &Value,
    ) -> Result<Change, StoreError> {
        self.write("write the outcome", |tx| {
            let old: Option<StepState> =
                tx.query_row("SELECT state FROM steps WHERE id = ?", [step], |row| row.get(0)).optional()?;
            match (old.ok_or_else(|| Fault::not_found("step", step))?, state) {
                (old, new) if old == new => return Ok(Change::AlreadySo),
                (StepState::Intended, _) | (StepState::Done | StepState::Failed, StepState::Undone) => {}
                (old, new) => {
                    return Err(Fault::conflict(format!("step {step} is {old}, it cannot become {new}")));
                }
            }
            tx.execute(
                "UPDATE steps SET state = ?, outcome = ?, ended_at = ? WHERE id = ?",
                params![state, Json(outcome), Time(now()), step],
            )?;
            Ok(Change::Changed)
        })
    }

    /// The steps of a job, in the order in which they were begun.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn steps(&self, job: JobId) -> Result<Vec<Step>, StoreError> {
        self.read("read the steps", |connection| {
            let mut query = connection.prepare_cached(&format!("SELECT {STEP} WHERE job = ? ORDER BY id"))?;
            let rows = query.query_map([job], step)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }
}

pub(super) fn get(connection: &Connection, id: JobId) -> rusqlite::Result<Option<Job>> {
    connection.prepare_cached(&format!("SELECT {JOB} WHERE id = ?"))?.query_row([id], job).optional()
}

fn open_job(connection: &Connection, service: &Name) -> rusqlite::Result<Option<Job>> {
    connection
        .prepare_cached(&format!("SELECT {JOB} WHERE service = ? AND ended_at IS NULL"))?
        .query_row([service], job)
        .optional()
}

fn job(row: &Row<'_>) -> rusqlite::Result<Job> {
    Ok(Job {
        id: row.get(0)?,
        service: row.get(1)?,
        kind: row.get(2)?,
        plan: row.get::<_, Json<Value>>(3)?.0,
        pid: row.get(4)?,
        boot_id: row.get(5)?,
        started_at: row.get::<_, Time>(6)?.0,
        ended_at: row.get::<_, Option<Time>>(7)?.map(|time| time.0),
        exit_code: row.get(8)?,
        message: row.get(9)?,
    })
}

fn step(row: &Row<'_>) -> rusqlite::Result<Step> {
    Ok(Step {
        id: row.get(0)?,
        job: row.get(1)?,
        phase: row.get(2)?,
        intent: row.get::<_, Json<Value>>(3)?.0,
        state: row.get(4)?,
        outcome: row.get::<_, Option<Json<Value>>>(5)?.map(|json| json.0),
        began_at: row.get::<_, Time>(6)?.0,
        ended_at: row.get::<_, Option<Time>>(7)?.map(|time| time.0),
    })
}
