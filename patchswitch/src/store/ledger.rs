//! The ledger: every object of the kernel that is ours.
//!
//! An entry is written before its object exists and removed after the object has gone, so after any crash the objects
//! that are there are among the entries. Taking an entry that is there already is fine, and so is removing one that
//! is not.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde::Serialize;
use serde_json::Value;

use super::error::Fault;
use super::values::{Json, Time, now, words};
use super::{Change, Store, StoreError};

words! {
    /// What kind of object an entry stands for. The name says which one.
    Kind {
        /// A device-mapper device, by its name.
        DmDevice = "dm",
        /// A loop device, by the path of its file.
        LoopDevice = "loop",
        /// A mount, by its mount point.
        Mount = "mount",
        /// A held mount namespace, by the path that holds it.
        MountNamespace = "mountns",
        /// A network namespace, by the path that holds it.
        NetNamespace = "netns",
        /// A network device, by its name.
        Link = "link",
        /// An address, as `DEVICE ADDRESS/LENGTH`.
        Address = "address",
        /// A route, as `DEVICE DESTINATION`.
        Route = "route",
        /// A routing rule.
        Rule = "rule",
        /// A neighbour entry, as `DEVICE ADDRESS`; a proxy entry has `proxy` before it.
        Neighbour = "neighbour",
        /// A queueing discipline, as `DEVICE KIND`.
        Qdisc = "qdisc",
        /// A filter of a queueing discipline.
        Filter = "filter",
        /// A pinned program, map or link, by its path.
        Pin = "pin",
        /// A cgroup, relative to the cgroup root.
        Cgroup = "cgroup",
        /// A container of the OCI runtime, by its name.
        Container = "container",
        /// A kernel setting, by its path below `/proc/sys`; the undo data has the value that was found.
        Sysctl = "sysctl",
        /// A file, by its path.
        File = "file",
        /// A directory, by its path.
        Directory = "directory",
    }
}

/// Whether an object outlives a boot of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime<'a> {
    /// It is gone with this boot, see [`boot_id`].
    Boot(&'a str),
    /// It is on a disk.
    Durable,
}

/// An object that is about to be made.
#[derive(Clone, Copy, Debug)]
pub struct NewEntry<'a> {
    /// What kind of object.
    pub kind: Kind,
    /// Which one.
    pub name: &'a str,
    /// Who wants it: a service, a partition, an attachment, a job.
    pub owner: &'a str,
    /// Whether it outlives a boot.
    pub lifetime: Lifetime<'a>,
    /// What it takes to undo it; the old value of a setting.
    pub undo: &'a Value,
}

/// An object that is there, or was about to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// What kind of object.
    pub kind: Kind,
    /// Which one.
    pub name: String,
    /// Who wants it.
    pub owner: String,
    /// The boot in which it was made; none if it outlives a boot.
    pub boot_id: Option<String>,
    /// When the entry was written.
    pub made_at: Timestamp,
    /// What it takes to undo it.
    pub undo: Value,
}

const COLUMNS: &str = "kind, name, owner, boot_id, made_at, undo FROM ledger";

impl Store {
    /// Notes an object before it is made. If another owner holds the same object, the undo data are what that one
    /// found: our own value must not be taken for the administrator's.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn note(&mut self, entry: &NewEntry<'_>) -> Result<Change, StoreError> {
        self.write("note the object", |tx| note(tx, entry))
    }

    /// Forgets an object that has gone, or that this owner no longer wants.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn forget(&mut self, kind: Kind, name: &str, owner: &str) -> Result<Change, StoreError> {
        self.write("forget the object", |tx| {
            let rows = tx.execute(
                "DELETE FROM ledger WHERE kind = ? AND name = ? AND owner = ?",
                params![kind, name, owner],
            )?;
            Ok(if rows == 0 { Change::AlreadySo } else { Change::Changed })
        })
    }

    /// All entries, the newest first: the order in which objects are undone. Of one owner, or of all.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn ledger(&self, owner: Option<&str>) -> Result<Vec<Entry>, StoreError> {
        self.read("read the ledger", |connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} WHERE ?1 IS NULL OR owner = ?1 ORDER BY id DESC"
            ))?;
            let rows = query.query_map(params![owner], row)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// The other owners of an object: as long as there are any it is not undone.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn other_owners(&self, entry: &Entry) -> Result<Vec<String>, StoreError> {
        self.read("read the object's owners", |connection| {
            let mut query = connection.prepare_cached(
                "SELECT owner FROM ledger WHERE kind = ? AND name = ? AND owner <> ? ORDER BY id",
            )?;
            let rows = query.query_map(params![entry.kind, entry.name, entry.owner], |row| row.get(0))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// Forgets what a boot has taken away: every entry that belongs to another boot than this one. Returns them.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn forget_other_boots(&mut self, boot_id: &str) -> Result<Vec<Entry>, StoreError> {
        self.write("forget objects of earlier boots", |tx| {
            let gone = {
                let mut query =
                    tx.prepare_cached(&format!("SELECT {COLUMNS} WHERE boot_id <> ? ORDER BY id DESC"))?;
                query.query_map([boot_id], row)?.collect::<Result<_, _>>()?
            };
            tx.execute("DELETE FROM ledger WHERE boot_id <> ?", [boot_id])?;
            Ok(gone)
        })
    }
}

pub(super) fn note(tx: &Transaction<'_>, entry: &NewEntry<'_>) -> Result<Change, Fault> {
    let boot_id = match entry.lifetime {
        Lifetime::Boot(boot_id) => Some(boot_id),
        Lifetime::Durable => None,
    };
    let first = first(tx, entry.kind, entry.name, boot_id)?;
    let undo = first.as_ref().map_or(entry.undo, |first| &first.undo);
    let rows = tx.execute(
        "INSERT INTO ledger (kind, name, owner, boot_id, made_at, undo) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (kind, name, owner) DO UPDATE SET boot_id = ?4, made_at = ?5, undo = ?6
         WHERE boot_id IS NOT ?4",
        params![entry.kind, entry.name, entry.owner, boot_id, Time(now()), Json(undo)],
    )?;
    Ok(if rows == 0 { Change::AlreadySo } else { Change::Changed })
}

/// The first entry of the same object in the same boot: an older boot's value of a setting is gone with that boot.
fn first(
    connection: &Connection,
    kind: Kind,
    name: &str,
    boot_id: Option<&str>,
) -> rusqlite::Result<Option<Entry>> {
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} WHERE kind = ? AND name = ? AND boot_id IS ? ORDER BY id LIMIT 1"
        ))?
        .query_row(params![kind, name, boot_id], row)
        .optional()
}

/// The boot of this host, which every entry of a kernel object belongs to (`/proc/sys/kernel/random/boot_id`).
///
/// # Errors
/// What the kernel says; without `/proc` nothing of ours works.
pub fn boot_id() -> std::io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|text| text.trim().to_owned())
}

fn row(row: &Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry {
        kind: row.get(0)?,
        name: row.get(1)?,
        owner: row.get(2)?,
        boot_id: row.get(3)?,
        made_at: row.get::<_, Time>(4)?.0,
        undo: row.get::<_, Json<Value>>(5)?.0,
    })
}
