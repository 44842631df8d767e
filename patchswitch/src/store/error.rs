//! Why the store did not do what it was asked to.

use std::path::PathBuf;

use rusqlite::ErrorCode;

use crate::exit::ExitCode;

/// Why the store did not do what it was asked to. Nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory or the file cannot be made or examined.
    #[error("failed to open {path:?}")]
    Open {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The directory or the file is not what only the agent may write to.
    #[error("refused {path:?}: {reason}")]
    Unsafe {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// What is in the file is damaged.
    #[error("the store {path:?} is damaged: {detail}; move it away or restore it, and run `patchswitch up`")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        detail: String,
    },
    /// A newer patchswitch has written the file.
    #[error("the store has version {found}, this program knows {known}: use the newer patchswitch")]
    Newer {
        /// The version of the file.
        found: i64,
        /// The newest version that is known.
        known: i64,
    },
    /// Another process kept the store locked for longer than a few seconds.
    #[error("failed to {action}: another patchswitch keeps the store locked; try again")]
    Busy {
        /// What was to be done.
        action: &'static str,
    },
    /// Something with that name is not in the store.
    #[error("there is no {what} {name}")]
    NotFound {
        /// What kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// It would contradict what is in the store.
    #[error("{0}")]
    Conflict(String),
    /// SQLite failed.
    #[error("failed to {action}")]
    Sql {
        /// What was to be done.
        action: &'static str,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
}

impl StoreError {
    /// The code for this end of a command.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Open { source, .. } => ExitCode::of_io(source),
            Self::Unsafe { .. } => ExitCode::Permission,
            Self::Corrupt { .. } => ExitCode::BadData,
            Self::Newer { .. } => ExitCode::Config,
            Self::Busy { .. } => ExitCode::Busy,
            Self::NotFound { .. } | Self::Conflict(_) => ExitCode::Failed,
            Self::Sql { source, .. } => match source.sqlite_error_code() {
                Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => {
                    ExitCode::Io
                }
                Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => ExitCode::Permission,
                _ => ExitCode::Internal,
            },
        }
    }
}

/// An error inside a transaction, which does not know what the transaction is for.
pub(super) enum Fault {
    Sql(rusqlite::Error),
    Store(StoreError),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Fault {
    pub(super) fn conflict(text: String) -> Self {
        Self::Store(StoreError::Conflict(text))
    }

    pub(super) fn not_found(what: &'static str, name: impl ToString) -> Self {
        Self::Store(StoreError::NotFound { what, name: name.to_string() })
    }

    /// Whether a rule of the schema was broken: UNIQUE, CHECK, REFERENCES or a trigger.
    pub(super) fn breaks_rule(error: &rusqlite::Error) -> bool {
        error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation)
    }

    pub(super) fn during(self, action: &'static str, path: &std::path::Path) -> StoreError {
        match self {
            Self::Store(error) => error,
            Self::Sql(source) => match source.sqlite_error_code() {
                Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Busy { action },
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                    StoreError::Corrupt { path: path.to_owned(), detail: source.to_string() }
                }
                _ => StoreError::Sql { action, source },
            },
        }
    }
}
