//! Services, and the durable record of who serves each.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde::Serialize;

use super::error::Fault;
use super::partitions::{self, Disk, Partition, Role};
use super::values::{Count, Json, Time, now};
use super::{Change, Store, StoreError};
use crate::config::Service;
use crate::names::Name;

/// Who serves, as far as a boot is concerned: while the host is up the phase word says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Primary {
    /// The partition.
    pub partition: Name,
    /// The generation of the switch that made it so.
    pub generation: u64,
    /// When this was recorded.
    pub recorded_at: Timestamp,
}

impl Store {
    /// Adds a service whose partition becomes its active one and its primary, or changes the settings of a service.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such partition; [`StoreError::Conflict`] if another service has the
    /// partition or one of the addresses.
    pub fn put_service(&mut self, service: &Service) -> Result<Change, StoreError> {
        self.write("store the service", |tx| {
            let old = get(tx, &service.name)?;
            if old.as_ref() == Some(service) {
                return Ok(Change::AlreadySo);
            }
            tx.execute(
                "INSERT INTO services (name, settings, changed_at) VALUES (?1, ?2, ?3)
                 ON CONFLICT (name) DO UPDATE SET settings = ?2, changed_at = ?3",
                params![service.name, Json(service), Time(now())],
            )?;
            put_addresses(tx, service)?;
            // Who serves an existing service is a matter of switches, not of settings.
            if old.is_none() {
                put_first_partition(tx, service)?;
            }
            Ok(Change::Changed)
        })
    }

    /// One service.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn service(&self, name: &Name) -> Result<Option<Service>, StoreError> {
        self.read("read the service", |connection| Ok(get(connection, name)?))
    }

    /// All services, by name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn services(&self) -> Result<Vec<Service>, StoreError> {
        self.read("read the services", |connection| {
            let mut query = connection.prepare_cached("SELECT settings FROM services ORDER BY name")?;
            let rows = query.query_map([], |row| Ok(row.get::<_, Json<Service>>(0)?.0))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// Forgets a service; its partitions become unassigned.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a job of it is open.
    pub fn remove_service(&mut self, name: &Name) -> Result<Change, StoreError> {
        self.write("remove the service", |tx| {
            if get(tx, name)?.is_none() {
                return Ok(Change::AlreadySo);
            }
            let open: bool = tx.query_row(
                "SELECT EXISTS (SELECT 1 FROM jobs WHERE service = ? AND ended_at IS NULL)",
                [name],
                |row| row.get(0),
            )?;
            if open {
                return Err(Fault::conflict(format!("service {name} has a job that is not over")));
            }
            for partition in partitions::of_service(tx, name)? {
                partitions::put(tx, &Partition { role: Role::Standby, service: None, ..partition })?;
            }
            tx.execute("DELETE FROM services WHERE name = ?", [name])?;
            Ok(Change::Changed)
        })
    }

    /// Who serves, as last recorded.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn primary(&self, service: &Name) -> Result<Option<Primary>, StoreError> {
        self.read("read who serves", |connection| Ok(primary(connection, service)?))
    }

    /// Records a switch: `to` is the primary and the active partition from now on, and the one that was active
    /// retires. All in one write, which is on the disk when this returns. A give-back is the same with a higher
    /// generation. Where the new side writes data of its own this comes before the first new flow reaches it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`] if the generation is not higher than the recorded one, or
    /// `to` does not belong to the service.
    pub fn record_switch(
        &mut self,
        service: &Name,
        to: &Name,
        generation: u64,
    ) -> Result<Change, StoreError> {
        self.write("record the switch", |tx| switch(tx, service, to, generation))
    }

    /// As [`Store::record_switch`], with disks that go over: who serves and who has them is never told apart.
    ///
    /// # Errors
    /// As there.
    pub fn record_move(
        &mut self,
        service: &Name,
        to: &Name,
        generation: u64,
        machines: &[(Partition, Vec<Disk>)],
    ) -> Result<Change, StoreError> {
        self.write("record the move", |tx| {
            for (partition, disks) in machines {
                partitions::put_machine(tx, partition, disks)?;
            }
            switch(tx, service, to, generation)
        })
    }
}

fn switch(tx: &Transaction<'_>, service: &Name, to: &Name, generation: u64) -> Result<Change, Fault> {
    let old = primary(tx, service)?.ok_or_else(|| Fault::not_found("service", service))?;
    if old.partition == *to && old.generation == generation {
        return Ok(Change::AlreadySo);
    }
    if generation <= old.generation {
        let message = format!(
            "generation {generation} of service {service} is not newer than the recorded one, {}",
            old.generation
        );
        return Err(Fault::conflict(message));
    }
    let new = partitions::get(tx, to)?.ok_or_else(|| Fault::not_found("partition", to))?;
    if new.service.as_ref() != Some(service) {
        return Err(Fault::conflict(format!("partition {to} does not belong to service {service}")));
    }
    // First the one that goes: at no moment are two of them active.
    for other in partitions::of_service(tx, service)? {
        if other.role == Role::Active && other.name != *to {
            partitions::put(tx, &Partition { role: Role::Retiring, ..other })?;
        }
    }
    partitions::put(tx, &Partition { role: Role::Active, ..new })?;
    put_primary(tx, service, to, generation)?;
    Ok(Change::Changed)
}

fn get(connection: &Connection, name: &Name) -> rusqlite::Result<Option<Service>> {
    connection
        .prepare_cached("SELECT settings FROM services WHERE name = ?")?
        .query_row([name], |row| Ok(row.get::<_, Json<Service>>(0)?.0))
        .optional()
}

fn primary(connection: &Connection, service: &Name) -> rusqlite::Result<Option<Primary>> {
    connection
        .prepare_cached("SELECT partition, generation, recorded_at FROM primaries WHERE service = ?")?
        .query_row([service], |row| {
            let recorded_at = row.get::<_, Time>(2)?.0;
            Ok(Primary { partition: row.get(0)?, generation: row.get::<_, Count>(1)?.0, recorded_at })
        })
        .optional()
}

fn put_primary(tx: &Transaction<'_>, service: &Name, to: &Name, generation: u64) -> Result<(), Fault> {
    tx.execute(
        "INSERT OR REPLACE INTO primaries (service, partition, generation, recorded_at) VALUES (?, ?, ?, ?)",
        params![service, to, Count(generation), Time(now())],
    )?;
    Ok(())
}

fn put_addresses(tx: &Transaction<'_>, service: &Service) -> Result<(), Fault> {
    tx.execute("DELETE FROM service_addresses WHERE service = ?", [&service.name])?;
    for address in &service.addresses {
        let text = address.to_string();
        let taken: Option<String> = tx
            .query_row("SELECT service FROM service_addresses WHERE address = ?", [&text], |row| row.get(0))
            .optional()?;
        if let Some(other) = taken {
            return Err(Fault::conflict(format!("service {other} has the address {address} already")));
        }
        tx.execute(
            "INSERT INTO service_addresses (address, service) VALUES (?, ?)",
            params![text, service.name],
        )?;
    }
    Ok(())
}

fn put_first_partition(tx: &Transaction<'_>, service: &Service) -> Result<(), Fault> {
    let name = &service.partition;
    let partition = partitions::get(tx, name)?.ok_or_else(|| Fault::not_found("partition", name))?;
    if let Some(other) = &partition.service {
        return Err(Fault::conflict(format!("partition {name} is taken by service {other}")));
    }
    let generation = partition.generation;
    let owner = Some(service.name.clone());
    partitions::put(tx, &Partition { role: Role::Active, service: owner, ..partition })?;
    put_primary(tx, &service.name, name, generation)
}
