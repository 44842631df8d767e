//! The resource table of logical computers (patent Fig. 5).

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde::Serialize;
use serde_json::Value;

use super::error::Fault;
use super::values::{Count, Json, Time, now, words};
use super::{Change, Store, StoreError};
use crate::names::Name;

words! {
    /// What a partition is to its service.
    Role {
        /// It gets new flows.
        Active = "active",
        /// It is a clone in the making, or unassigned if it has no service.
        Standby = "standby",
        /// It keeps its flows until they end, and gets no new ones.
        Retiring = "retiring",
    }
}

words! {
    /// What was last done to a partition; what it does now, the kernel says.
    State {
        /// Nothing of it is in the kernel.
        Defined = "defined",
        /// It was started.
        Running = "running",
        /// It was stopped; its disks are there.
        Stopped = "stopped",
        /// It did not start, or ended by itself.
        Failed = "failed",
    }
}

/// A row of the resource table. The columns are the figure's; `definition` has everything that defined it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Identifier (501).
    pub name: Name,
    /// Processor assignment rate (502), in percent of one processor.
    pub cpu_percent: u32,
    /// Memory capacity (503), in bytes.
    pub memory: u64,
    /// Network device (505).
    pub network: Option<String>,
    /// What it is to its service.
    pub role: Role,
    /// What was last done to it.
    pub state: State,
    /// Its service; a standby without one is free to be cloned into.
    pub service: Option<Name>,
    /// Counts the clones: a clone has the number after its original's.
    pub generation: u64,
    /// The whole definition, as its own module writes it.
    pub definition: Value,
}

/// A disk of a partition (504).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// Whose.
    pub partition: Name,
    /// Its name among the partition's disks.
    pub name: Name,
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// What is behind it, as the storage module writes it.
    pub backing: Value,
    /// What its clone is stored in, while it is a snapshot.
    pub cow: Option<Value>,
}

const COLUMNS: &str =
    "name, cpu_percent, memory, network, role, state, service, generation, definition FROM partitions";

impl Store {
    /// Defines a partition, or defines it anew.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if its service does not exist or has another active partition.
    pub fn put_partition(&mut self, partition: &Partition) -> Result<Change, StoreError> {
        self.write("store the partition", |tx| {
            if get(tx, &partition.name)?.as_ref() == Some(partition) {
                return Ok(Change::AlreadySo);
            }
            put(tx, partition)?;
            Ok(Change::Changed)
        })
    }

    /// Stores partitions with all their disks, in one write: a partition that becomes a clone, or stops being one, is
    /// never half of each. Disks that are not given are forgotten.
    ///
    /// # Errors
    /// As [`Store::put_partition`].
    pub fn put_machines(&mut self, machines: &[(Partition, Vec<Disk>)]) -> Result<Change, StoreError> {
        self.write("store the partitions", |tx| {
            for (partition, disks) in machines {
                put_machine(tx, partition, disks)?;
            }
            Ok(Change::Changed)
        })
    }

    /// One partition.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn partition(&self, name: &Name) -> Result<Option<Partition>, StoreError> {
        self.read("read the partition", |connection| Ok(get(connection, name)?))
    }

    /// All partitions, by name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn partitions(&self) -> Result<Vec<Partition>, StoreError> {
        self.read("read the partitions", |connection| {
            let mut query = connection.prepare_cached(&format!("SELECT {COLUMNS} ORDER BY name"))?;
            let rows = query.query_map([], row)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// Records what was done to a partition.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn set_partition_state(&mut self, name: &Name, state: State) -> Result<Change, StoreError> {
        self.write("store the partition's state", |tx| {
            let partition = get(tx, name)?.ok_or_else(|| Fault::not_found("partition", name))?;
            if partition.state == state {
                return Ok(Change::AlreadySo);
            }
            put(tx, &Partition { state, ..partition })?;
            Ok(Change::Changed)
        })
    }

    /// Makes a partition the standby of a service (a lease that one job holds), or frees it with `None`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`] if it is the active one or belongs to another service.
    pub fn assign_standby(&mut self, name: &Name, service: Option<&Name>) -> Result<Change, StoreError> {
        self.write("assign the standby", |tx| {
            let partition = get(tx, name)?.ok_or_else(|| Fault::not_found("partition", name))?;
            if partition.role == Role::Active {
                return Err(Fault::conflict(format!("partition {name} is active: it cannot be a standby")));
            }
            match (&partition.service, service) {
                (Some(current), Some(wanted)) if current != wanted => {
                    let message = format!("partition {name} is taken by service {current}");
                    return Err(Fault::conflict(message));
                }
                (current, wanted) if current.as_ref() == wanted && partition.role == Role::Standby => {
                    return Ok(Change::AlreadySo);
                }
                _ => {}
            }
            let service = service.cloned();
            put(tx, &Partition { role: Role::Standby, service, ..partition })?;
            Ok(Change::Changed)
        })
    }

    /// Forgets a partition and its disks.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a service has it.
    pub fn remove_partition(&mut self, name: &Name) -> Result<Change, StoreError> {
        self.write("remove the partition", |tx| {
            let Some(partition) = get(tx, name)? else { return Ok(Change::AlreadySo) };
            if let Some(service) = partition.service {
                return Err(Fault::conflict(format!("partition {name} belongs to service {service}")));
            }
            tx.execute("DELETE FROM partitions WHERE name = ?", [name])?;
            Ok(Change::Changed)
        })
    }

    /// Stores a disk of a partition.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such partition.
    pub fn put_disk(&mut self, disk: &Disk) -> Result<Change, StoreError> {
        self.write("store the disk", |tx| {
            if get(tx, &disk.partition)?.is_none() {
                return Err(Fault::not_found("partition", &disk.partition));
            }
            if disks(tx, &disk.partition)?.contains(disk) {
                return Ok(Change::AlreadySo);
            }
            put_disk(tx, disk)?;
            Ok(Change::Changed)
        })
    }

    /// The disks of a partition, by name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn disks(&self, partition: &Name) -> Result<Vec<Disk>, StoreError> {
        self.read("read the disks", |connection| Ok(disks(connection, partition)?))
    }

    /// Forgets a disk.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn remove_disk(&mut self, partition: &Name, disk: &Name) -> Result<Change, StoreError> {
        self.write("remove the disk", |tx| {
            let rows = tx.execute("DELETE FROM disks WHERE partition = ? AND name = ?", [partition, disk])?;
            Ok(if rows == 0 { Change::AlreadySo } else { Change::Changed })
        })
    }
}

pub(super) fn get(connection: &Connection, name: &Name) -> rusqlite::Result<Option<Partition>> {
    connection.prepare_cached(&format!("SELECT {COLUMNS} WHERE name = ?"))?.query_row([name], row).optional()
}

pub(super) fn of_service(connection: &Connection, service: &Name) -> rusqlite::Result<Vec<Partition>> {
    let mut query =
        connection.prepare_cached(&format!("SELECT {COLUMNS} WHERE service = ? ORDER BY name"))?;
    query.query_map([service], row)?.collect()
}

pub(super) fn put(tx: &Transaction<'_>, partition: &Partition) -> Result<(), Fault> {
    let result = tx.execute(
        "INSERT INTO partitions (name, cpu_percent, memory, network, role, state, service, generation, definition,
             changed_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
         ON CONFLICT (name) DO UPDATE SET cpu_percent = ?2, memory = ?3, network = ?4, role = ?5, state = ?6,
             service = ?7, generation = ?8, definition = ?9, changed_at = ?10",
        params![
            partition.name,
            partition.cpu_percent,
            Count(partition.memory),
            partition.network,
            partition.role,
            partition.state,
            partition.service,
            Count(partition.generation),
            Json(&partition.definition),
            Time(now()),
        ],
    );
    match result {
        Ok(_) => Ok(()),
        Err(error) if Fault::breaks_rule(&error) => Err(Fault::conflict(broken_rule(partition, &error))),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn put_machine(tx: &Transaction<'_>, partition: &Partition, all: &[Disk]) -> Result<(), Fault> {
    put(tx, partition)?;
    tx.execute("DELETE FROM disks WHERE partition = ?", [&partition.name])?;
    all.iter().try_for_each(|disk| put_disk(tx, disk))
}

fn put_disk(tx: &Transaction<'_>, disk: &Disk) -> Result<(), Fault> {
    tx.execute(
        "INSERT OR REPLACE INTO disks (partition, name, sectors, backing, cow) VALUES (?, ?, ?, ?, ?)",
        params![
            disk.partition,
            disk.name,
            Count(disk.sectors),
            Json(&disk.backing),
            disk.cow.as_ref().map(Json)
        ],
    )?;
    Ok(())
}

fn broken_rule(partition: &Partition, error: &rusqlite::Error) -> String {
    use rusqlite::ffi;
    let name = &partition.name;
    let service = partition.service.as_ref().map_or("none", Name::as_str);
    match error.sqlite_extended_error_code() {
        Some(ffi::SQLITE_CONSTRAINT_UNIQUE) => {
            format!("partition {name} cannot be active: service {service} has another active partition")
        }
        Some(ffi::SQLITE_CONSTRAINT_FOREIGNKEY) => {
            format!("partition {name} cannot belong to service {service}: there is no such service")
        }
        _ => format!("partition {name} is not possible: {error}"),
    }
}

fn row(row: &Row<'_>) -> rusqlite::Result<Partition> {
    Ok(Partition {
        name: row.get(0)?,
        cpu_percent: row.get(1)?,
        memory: row.get::<_, Count>(2)?.0,
        network: row.get(3)?,
        role: row.get(4)?,
        state: row.get(5)?,
        service: row.get(6)?,
        generation: row.get::<_, Count>(7)?.0,
        definition: row.get::<_, Json<Value>>(8)?.0,
    })
}

fn disks(connection: &Connection, partition: &Name) -> rusqlite::Result<Vec<Disk>> {
    let mut query = connection.prepare_cached(
        "SELECT partition, name, sectors, backing, cow FROM disks WHERE partition = ? ORDER BY name",
    )?;
    let rows = query.query_map([partition], |row| {
        Ok(Disk {
            partition: row.get(0)?,
            name: row.get(1)?,
            sectors: row.get::<_, Count>(2)?.0,
            backing: row.get::<_, Json<Value>>(3)?.0,
            cow: row.get::<_, Option<Json<Value>>>(4)?.map(|json| json.0),
        })
    })?;
    rows.collect()
}
