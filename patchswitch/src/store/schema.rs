//! The versions of the file.

use rusqlite::{Connection, Transaction};

use super::StoreError;
use super::error::Fault;

/// Each brings the file from the version before it (its index) to its own.
pub(super) const MIGRATIONS: &[&str] = &[include_str!("schema_1.sql")];

/// Marks the file as ours for `file(1)` and others: "ptsw".
const APPLICATION: i32 = 0x7074_7377;

/// Whether there is something to migrate. Asked without a write, so that opening does not wait for a writer.
pub(super) fn is_old(connection: &Connection, migrations: &[&str]) -> Result<bool, Fault> {
    Ok(version(connection, migrations)? < migrations.len())
}

/// Brings the file up to date, in the transaction: it has the old version or the new one, nothing between.
pub(super) fn migrate(tx: &Transaction<'_>, migrations: &[&str]) -> Result<(), Fault> {
    let done = version(tx, migrations)?;
    for migration in migrations.get(done..).unwrap_or_default() {
        tx.execute_batch(migration)?;
    }
    tx.pragma_update(None, "application_id", APPLICATION)?;
    tx.pragma_update(None, "user_version", i64::try_from(migrations.len()).unwrap_or(i64::MAX))?;
    Ok(())
}

fn version(connection: &Connection, migrations: &[&str]) -> Result<usize, Fault> {
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    match usize::try_from(found) {
        Ok(done) if done <= migrations.len() => Ok(done),
        _ => {
            let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
            Err(StoreError::Newer { found, known }.into())
        }
    }
}
