//! The patch table (patent Fig. 6).

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde::Serialize;

use super::audit::{self, Who};
use super::error::Fault;
use super::results::{self, PatchResult};
use super::values::{Count, Time, now, other, row_id, words};
use super::{Change, Store, StoreError};
use crate::patch::name::FileName;
use crate::patch::wire::Driver;

row_id! {
    /// The number of a patch, for the administrator to name it by.
    PatchId
}

words! {
    /// Apply next time? (606)
    Decision {
        /// Nobody has said yet.
        Pending = "pending",
        /// It is applied by the next job.
        Approved = "approved",
        /// It is not applied.
        Rejected = "rejected",
        /// It is not applied for now.
        Held = "held",
        /// A newer patch takes its place.
        Superseded = "superseded",
    }
}

/// What a patch is for (602, 603, 604). A set: one patch may be all three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Types {
    /// It closes a hole.
    pub security: bool,
    /// It makes the program do more.
    pub enhancement: bool,
    /// It makes the program do what it should.
    pub bugfix: bool,
}

/// A text that names no types of a patch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a list of security, bugfix and enhancement, separated by commas")]
pub struct BadTypes(pub String);

impl Types {
    /// Whether it is none: every patch is for something.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn union(self, other: Self) -> Self {
        Self {
            security: self.security || other.security,
            enhancement: self.enhancement || other.enhancement,
            bugfix: self.bugfix || other.bugfix,
        }
    }
}

impl std::str::FromStr for Types {
    type Err = BadTypes;

    fn from_str(text: &str) -> Result<Self, BadTypes> {
        let mut types = Self::default();
        for word in text.split(',') {
            match word.trim() {
                "security" => types.security = true,
                "enhancement" => types.enhancement = true,
                "bugfix" => types.bugfix = true,
                _ => return Err(BadTypes(text.to_owned())),
            }
        }
        Ok(types)
    }
}

impl std::fmt::Display for Types {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let words = [(self.security, "security"), (self.bugfix, "bugfix"), (self.enhancement, "enhancement")];
        let words: Vec<&str> = words.iter().filter(|(set, _)| *set).map(|(_, word)| *word).collect();
        f.pad(&words.join(","))
    }
}

/// What a package says of itself; only shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The architecture it is for.
    pub architecture: String,
}

/// A patch that is to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPatch {
    /// Its file's name (601).
    pub file: FileName,
    /// What it is for; not none.
    pub types: Types,
    /// When it was published (605).
    pub issued_at: Timestamp,
    /// The SHA-256 of its file in lower-case hexadecimal digits: its identity.
    pub sha256: String,
    /// The size of its file in bytes.
    pub size: u64,
    /// Where it came from: a path or an address.
    pub source: String,
    /// What applies it.
    pub driver: Driver,
    /// What it says of itself, if it is a package.
    pub package: Option<Package>,
}

/// A row of the patch table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Patch {
    /// Its number.
    pub id: PatchId,
    /// Its file's name (601).
    pub file: FileName,
    /// What it is for (602 to 604).
    pub types: Types,
    /// When it was published (605).
    pub issued_at: Timestamp,
    /// Apply next time? (606)
    pub decision: Decision,
    /// Who decided that.
    pub decided_by: Who,
    /// When.
    pub decided_at: Timestamp,
    /// How it ended when it was last applied (607).
    pub last_result: Option<PatchResult>,
    /// The SHA-256 of its file.
    pub sha256: String,
    /// The size of its file in bytes.
    pub size: u64,
    /// Where it came from.
    pub source: String,
    /// What applies it.
    pub driver: Driver,
    /// What it says of itself.
    pub package: Option<Package>,
    /// When it was added.
    pub added_at: Timestamp,
}

const COLUMNS: &str = "id, file, security, enhancement, bugfix, issued_at, decision, decided_by, decided_how, \
                       decided_at, sha256, size, source, driver, package, version, architecture, added_at \
                       FROM patches";

impl Store {
    /// Adds a patch, undecided. The same file again, by whatever name, is the same patch: its types are joined.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if it is for nothing.
    pub fn add_patch(&mut self, patch: &NewPatch, who: &Who) -> Result<(PatchId, Change), StoreError> {
        self.write("store the patch", |tx| {
            if patch.types.is_empty() {
                let message = format!("patch {} has no type: security, bugfix or enhancement", patch.file);
                return Err(Fault::conflict(message));
            }
            match find_by(tx, "sha256", &patch.sha256)?.into_iter().next() {
                Some(old) => {
                    let change = join_types(tx, &old, patch.types, who)?;
                    Ok((old.id, change))
                }
                None => Ok((insert(tx, patch, who)?, Change::Changed)),
            }
        })
    }

    /// All patches, in the order in which they were added.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn patches(&self) -> Result<Vec<Patch>, StoreError> {
        self.read("read the patches", |connection| {
            let mut query = connection.prepare_cached(&format!("SELECT {COLUMNS} ORDER BY id"))?;
            let rows = query.query_map([], |columns| row(connection, columns))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// The patch that a text means: its number, its file's name, or the beginning of its digest (8 digits or more).
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`] if it means several.
    pub fn find_patch(&self, text: &str) -> Result<Patch, StoreError> {
        self.read("find the patch", |connection| {
            let mut found = match text.parse::<PatchId>() {
                Ok(id) => get(connection, id)?.into_iter().collect(),
                Err(_) => find_by(connection, "file", text)?,
            };
            let hex = text.len() >= 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            if found.is_empty() && hex {
                found = find_by(connection, "substr(sha256, 1, length(?1))", text)?;
            }
            match (found.len(), found.pop()) {
                (1, Some(patch)) => Ok(patch),
                (_, None) => Err(Fault::not_found("patch", text)),
                (count, Some(_)) => {
                    Err(Fault::conflict(format!("{text} means {count} patches: name one by its number")))
                }
            }
        })
    }

    /// Decides about a patch; the audit log has it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn decide(&mut self, id: PatchId, decision: Decision, who: &Who) -> Result<Change, StoreError> {
        self.write("store the decision", |tx| {
            let patch = get(tx, id)?.ok_or_else(|| Fault::not_found("patch", id))?;
            if patch.decision == decision {
                return Ok(Change::AlreadySo);
            }
            tx.execute(
                "UPDATE patches SET decision = ?, decided_by = ?, decided_how = ?, decided_at = ? WHERE id = ?",
                params![decision, who.name, who.how, Time(now()), id],
            )?;
            let change = (patch.decision.as_str(), decision.as_str());
            audit::note(tx, who, &format!("patch {id}"), "decide", change)?;
            Ok(Change::Changed)
        })
    }
}

pub(super) fn get(connection: &Connection, id: PatchId) -> rusqlite::Result<Option<Patch>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} WHERE id = ?"))?
        .query_row([id], |columns| row(connection, columns))
        .optional()
}

/// `expression` is one of this file's own texts.
fn find_by(connection: &Connection, expression: &str, value: &str) -> rusqlite::Result<Vec<Patch>> {
    let mut query =
        connection.prepare_cached(&format!("SELECT {COLUMNS} WHERE {expression} = ?1 ORDER BY id"))?;
    query.query_map([value], |columns| row(connection, columns))?.collect()
}

fn insert(tx: &Transaction<'_>, patch: &NewPatch, who: &Who) -> Result<PatchId, Fault> {
    let package = patch.package.as_ref();
    tx.execute(
        "INSERT INTO patches (file, security, enhancement, bugfix, issued_at, decision, decided_by, decided_how,
             decided_at, sha256, size, source, driver, package, version, architecture, added_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?9)",
        params![
            patch.file,
            patch.types.security,
            patch.types.enhancement,
            patch.types.bugfix,
            Time(patch.issued_at),
            Decision::Pending,
            who.name,
            who.how,
            Time(now()),
            patch.sha256,
            Count(patch.size),
            patch.source,
            driver_word(patch.driver),
            package.map(|package| &package.name),
            package.map(|package| &package.version),
            package.map(|package| &package.architecture),
        ],
    )?;
    let id = PatchId(tx.last_insert_rowid());
    audit::note(tx, who, &format!("patch {id}"), "add", ("", patch.file.as_str()))?;
    Ok(id)
}

fn join_types(tx: &Transaction<'_>, old: &Patch, types: Types, who: &Who) -> Result<Change, Fault> {
    let joined = old.types.union(types);
    if joined == old.types {
        return Ok(Change::AlreadySo);
    }
    tx.execute(
        "UPDATE patches SET security = ?, enhancement = ?, bugfix = ? WHERE id = ?",
        params![joined.security, joined.enhancement, joined.bugfix, old.id],
    )?;
    let change = (old.types.to_string(), joined.to_string());
    audit::note(tx, who, &format!("patch {}", old.id), "join types", (&change.0, &change.1))?;
    Ok(Change::Changed)
}

const fn driver_word(driver: Driver) -> &'static str {
    match driver {
        Driver::Deb => "deb",
        Driver::Script => "script",
    }
}

fn row(connection: &Connection, row: &Row<'_>) -> rusqlite::Result<Patch> {
    let driver: String = row.get(13)?;
    let driver = [Driver::Deb, Driver::Script].into_iter().find(|known| driver_word(*known) == driver);
    let file: String = row.get(1)?;
    let file = FileName::new(&file).map_err(|error| rusqlite::Error::from(other(error)))?;
    let id = row.get(0)?;
    let (name, version, architecture): (Option<_>, Option<_>, Option<_>) =
        (row.get(14)?, row.get(15)?, row.get(16)?);
    let package = match (name, version, architecture) {
        (Some(name), Some(version), Some(architecture)) => Some(Package { name, version, architecture }),
        _ => None,
    };
    Ok(Patch {
        id,
        file,
        types: Types { security: row.get(2)?, enhancement: row.get(3)?, bugfix: row.get(4)? },
        issued_at: row.get::<_, Time>(5)?.0,
        decision: row.get(6)?,
        decided_by: Who { name: row.get(7)?, how: row.get(8)? },
        decided_at: row.get::<_, Time>(9)?.0,
        last_result: results::last(connection, id)?,
        sha256: row.get(10)?,
        size: row.get::<_, Count>(11)?.0,
        source: row.get(12)?,
        driver: driver.ok_or(rusqlite::Error::InvalidQuery)?,
        package,
        added_at: row.get::<_, Time>(17)?.0,
    })
}
