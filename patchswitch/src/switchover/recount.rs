//! What the old partition writes until it retires is lost by the switch. The job that switched counts it when it retires
//! that partition; where somebody else does, because the job was killed or its flows were kept, it is counted here, into
//! the report of that job: commits and people go by it.

use std::path::Path;

use serde_json::{Value, json};

use super::report::{self, AtSwitch, Loss, Report};
use super::undo;
use crate::config::Service;
use crate::manager::{Machine, Manager, ManagerError};
use crate::names::Name;

/// Counts what an old partition that runs has written since it was cloned. Nothing is known of the clone, or the
/// partition does not run: the count stays as it is.
///
/// # Errors
/// [`ManagerError`] if it cannot be counted or kept.
pub(crate) fn recount(manager: &Manager, service: &Service, old: &Machine) -> Result<(), ManagerError> {
    let Some((path, mut report)) = last_report(manager, &service.name)? else { return Ok(()) };
    let Some(cut) = field::<AtSwitch>(&path, &report, "at_cut")? else { return Ok(()) };
    if !manager.is_running(old)? {
        return Ok(());
    }
    report["lost_by_switch"] = json!(undo::written_since(service, old, &cut)?);
    report::write(&path, &report)
}

/// What the last switch of a service loses, as counted by now.
///
/// # Errors
/// [`ManagerError::Io`] if the report is there and cannot be read.
pub(super) fn counted(manager: &Manager, service: &Name) -> Result<Option<Loss>, ManagerError> {
    let Some((path, report)) = last_report(manager, service)? else { return Ok(None) };
    field(&path, &report, "lost_by_switch")
}

/// A part of a report; nothing if it was not known. One that is damaged is an error: it must not pass for "nothing".
fn field<T: serde::de::DeserializeOwned>(
    path: &Path,
    report: &Value,
    name: &str,
) -> Result<Option<T>, ManagerError> {
    let found = serde_json::from_value(report[name].clone());
    found.map_err(|error| ManagerError::io("read", path)(error.into()))
}

fn last_report(
    manager: &Manager,
    service: &Name,
) -> Result<Option<(std::path::PathBuf, Value)>, ManagerError> {
    let Some(job) = manager.store.last_apply(service)? else { return Ok(None) };
    let path = Report::path(manager.state(), job);
    read(&path).map(|report| report.map(|report| (path, report)))
}

fn read(path: &Path) -> Result<Option<Value>, ManagerError> {
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ManagerError::io("read", path)(error)),
        Ok(text) => {
            serde_json::from_slice(&text).map_err(|error| ManagerError::io("read", path)(error.into()))
        }
    }
}
