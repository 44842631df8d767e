//! Who decided what, when and by which way.

use jiff::Timestamp;
use rusqlite::{Connection, params};
use serde::Serialize;

use super::error::Fault;
use super::values::{Time, now};
use super::{Store, StoreError};

/// Who wants something, and by which way the wish came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Who {
    /// The person or the rule: a user's name, `policy`.
    pub name: String,
    /// The way: `command line`, `mail`.
    pub how: String,
}

/// One line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuditRow {
    /// When.
    pub at: Timestamp,
    /// Who, and by which way.
    pub who: Who,
    /// What it was done to, e.g. `patch 3`.
    pub subject: String,
    /// What was done.
    pub action: String,
    /// What was so before; empty for something new.
    pub before: String,
    /// What is so now.
    pub after: String,
}

pub(super) fn note(
    connection: &Connection,
    who: &Who,
    subject: &str,
    action: &str,
    (before, after): (&str, &str),
) -> Result<(), Fault> {
    connection.execute(
        "INSERT INTO audit (at, who, how, subject, action, before, after) VALUES (?, ?, ?, ?, ?, ?, ?)",
        params![Time(now()), who.name, who.how, subject, action, before, after],
    )?;
    Ok(())
}

impl Store {
    /// The newest lines of the audit log, oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn audit(&self, limit: u32) -> Result<Vec<AuditRow>, StoreError> {
        self.read("read the audit log", |connection| {
            let mut query = connection.prepare_cached(
                "SELECT at, who, how, subject, action, before, after FROM
                 (SELECT * FROM audit ORDER BY id DESC LIMIT ?) ORDER BY id",
            )?;
            let rows = query.query_map([limit], |row| {
                Ok(AuditRow {
                    at: row.get::<_, Time>(0)?.0,
                    who: Who { name: row.get(1)?, how: row.get(2)? },
                    subject: row.get(3)?,
                    action: row.get(4)?,
                    before: row.get(5)?,
                    after: row.get(6)?,
                })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }
}
