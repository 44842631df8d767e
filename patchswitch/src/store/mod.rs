//! The store: what patchswitch knows, durably, in one SQLite file.
//!
//! | table | what it is |
//! |---|---|
//! | `partitions`, `disks` | the resource table of logical computers (patent Fig. 5) |
//! | `services`, `primaries` | what is served, and by whom as far as a boot is concerned |
//! | `patches`, `patch_results`, `audit` | the patch table (patent Fig. 6), its history, who decided what |
//! | `jobs`, `steps` | the journal: intent before the act, outcome after it |
//!
//! A write returns when it is on the disk (`synchronous=FULL`), whole or not at all. Readers never wait for a writer
//! and see the state between two writes (WAL); writers of several processes take turns. While the host is up, the
//! phase word in the pinned map is the only truth about the flip, and recovery makes these tables follow it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

mod audit;
mod error;
mod jobs;
mod lock;
mod partitions;
mod patches;
mod place;
mod results;
mod schema;
mod services;
#[cfg(test)]
mod tests;
mod values;

pub use audit::{AuditRow, Who};
pub use error::StoreError;
pub use jobs::{Job, JobId, NewJob, Step, StepId, StepState, boot_id};
pub use lock::{Holder, JobLock, LockError};
pub use partitions::{Disk, Partition, Role, State};
pub use patches::{Decision, NewPatch, Package, Patch, PatchId, Types};
pub use place::{STATE_DIR_VARIABLE, state_dir};
pub use results::{Merged, PatchResult};
pub use services::Primary;
pub use values::UnknownWord;

use error::Fault;

/// How long a write waits for another process's write.
const BUSY: Duration = Duration::from_secs(5);
/// The file's name in the state directory.
const FILE: &str = "state.db";

/// What a repeatable operation did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[must_use]
pub enum Change {
    /// It changed something.
    Changed,
    /// Everything was so already.
    AlreadySo,
}

/// The store. One per thread: SQLite's connection is not shared, opening another one is cheap.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
}

impl Store {
    /// Opens the store in a state directory; makes both if they are not there, brings an older file up to date.
    ///
    /// The directory is made accessible to the agent's user alone. The whole file is checked.
    ///
    /// # Errors
    /// [`StoreError`]; a damaged file is reported and not touched.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, schema::MIGRATIONS)
    }

    fn open_with(dir: &Path, migrations: &[&str]) -> Result<Self, StoreError> {
        let path = place::prepare(dir)?.join(FILE);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW
            | OpenFlags::SQLITE_OPEN_EXRESCODE;
        let failed = |error: rusqlite::Error| Fault::from(error).during("open the store", &path);
        let connection = Connection::open_with_flags(&path, flags).map_err(failed)?;
        let mut store = Self { connection, path: path.clone() };
        store.configure().map_err(|fault| fault.during("open the store", &path))?;
        store.check()?;
        if store.read("read the store's version", |connection| schema::is_old(connection, migrations))? {
            store.write("bring the store up to date", |tx| schema::migrate(tx, migrations))?;
        }
        Ok(store)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn configure(&self) -> Result<(), Fault> {
        let connection = &self.connection;
        connection.busy_timeout(BUSY)?;
        let end = Instant::now() + BUSY;
        // The change to WAL does not wait by itself; two processes may open a new store at once.
        while let Err(error) = connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| {
            row.get::<_, String>(0).map(|_mode| ())
        }) {
            let busy = error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy);
            if !busy || Instant::now() > end {
                return Err(error.into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "trusted_schema", false)?;
        Ok(())
    }

    /// Reads every page and every reference.
    fn check(&self) -> Result<(), StoreError> {
        let damaged = |detail: String| StoreError::Corrupt { path: self.path.clone(), detail };
        let failed = |error: rusqlite::Error| Fault::from(error).during("check the store", &self.path);
        let mut detail = String::new();
        self.connection
            .pragma_query(None, "integrity_check", |row| {
                let line: String = row.get(0)?;
                if line != "ok" && detail.len() < 500 {
                    detail.push_str(&line);
                    detail.push(' ');
                }
                Ok(())
            })
            .map_err(failed)?;
        self.connection
            .pragma_query(None, "foreign_key_check", |row| {
                detail = format!("a row of {} refers to nothing", row.get::<_, String>(0)?);
                Ok(())
            })
            .map_err(failed)?;
        if detail.is_empty() { Ok(()) } else { Err(damaged(detail.trim_end().to_owned())) }
    }

    /// One write, whole or not at all.
    fn write<T>(
        &mut self,
        action: &'static str,
        act: impl FnOnce(&Transaction<'_>) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let whole = |connection: &mut Connection| {
            // Immediate: a transaction that begins by reading could not be sure to become a write.
            let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = act(&tx)?;
            tx.commit()?;
            Ok(value)
        };
        whole(&mut self.connection).map_err(|fault: Fault| fault.during(action, &self.path))
    }

    /// One read of a consistent state.
    fn read<T>(
        &self,
        action: &'static str,
        act: impl FnOnce(&Connection) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let whole = || {
            // Several queries of one read see the same state.
            let tx = self.connection.unchecked_transaction()?;
            let value = act(&tx)?;
            tx.commit()?;
            Ok(value)
        };
        whole().map_err(|fault: Fault| fault.during(action, &self.path))
    }
}
