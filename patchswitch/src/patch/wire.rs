//! What passes between the host and a partition about patches: the input table and the results.
//!
//! The host writes the table once, before the clone first runs; `patchswitch-init` reads it, never changes it, and
//! writes the results (patent Fig. 6 column 607, Fig. 12 step 1205). A partition's results are hostile input:
//! [`PatchResults::parse`] checks size and form, and [`PatchResults::verdict`] judges them against the host's own
//! copy of the table, never against the one inside.

use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

/// Where a partition keeps what belongs to patching, seen from its root.
pub const PATCH_STATE_DIR: &str = "/var/lib/patchswitch";
/// The input table, a [`PatchTableInput`]; written by the host, immutable.
pub const TABLE_FILE: &str = "/var/lib/patchswitch/table.json";
/// The results, a [`PatchResults`]; written by `patchswitch-init`, replaced by rename.
pub const RESULT_FILE: &str = "/var/lib/patchswitch/result.json";
/// Where the patch files are: see [`PatchInput::path`].
pub const PATCH_DIR: &str = "/var/lib/patchswitch/patches";
/// The starting scripts, run in the order of their names.
pub const START_DIR: &str = "/etc/patchswitch/start.d";
/// The static binary `patchswitch-init`.
pub const INIT_FILE: &str = "/usr/lib/patchswitch/init";

/// The version of both formats.
pub const WIRE_VERSION: u32 = 1;
/// The longest results or table that is read, in bytes.
pub const WIRE_MAX: usize = 1 << 20;
/// How many patches one table may have.
pub const PATCHES_MAX: usize = 256;
/// The longest log tail of one patch, in bytes.
pub const LOG_TAIL_MAX: usize = 8 << 10;

/// A table or results that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// More bytes than [`WIRE_MAX`].
    #[error("the document has {bytes} bytes, more than the {WIRE_MAX} that are allowed")]
    TooLong {
        /// How many there are.
        bytes: usize,
    },
    /// Not JSON, or not of this form.
    #[error("failed to parse the document")]
    Json(#[source] serde_json::Error),
    /// Written by another version of patchswitch.
    #[error("the document has version {0}, this program reads version {WIRE_VERSION}")]
    Version(u32),
    /// A value that no correct writer produces.
    #[error("the document has a bad {field}: {value:?}")]
    Value {
        /// Which field.
        field: &'static str,
        /// The value, shortened.
        value: String,
    },
}

/// The program that applies a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// A Debian package, given to `dpkg -i`.
    Deb,
    /// A file that is executed: a script or a program.
    Script,
}

/// What to do with the patches that follow a failed one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// They are not run.
    #[default]
    Stop,
    /// They are run all the same.
    Continue,
}

/// Whether a clone keeps the identity of its original: machine-id and host keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Identity {
    /// Clients and peers see the machine they knew.
    #[default]
    Keep,
    /// A new machine-id and new host keys are made at the first boot, before any patch.
    Renew,
}

/// One row of the input table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchInput {
    /// The patch's identifier in the host's patch table (patent Fig. 6, column 601).
    pub id: String,
    /// The file's name, without a directory.
    pub file: String,
    /// The SHA-256 of the file, 64 lower-case hexadecimal digits; checked inside before the file is used.
    pub sha256: String,
    /// The file's size in bytes.
    pub size: u64,
    /// What applies it.
    pub driver: Driver,
    /// How long it may take, in seconds; packages of one group have the sum of theirs.
    pub time_limit_s: u64,
    /// Packages of the same group are given to one run of `dpkg`; scripts always run alone.
    pub group: u32,
}

impl PatchInput {
    /// The name of the patch's file inside [`PATCH_DIR`].
    pub fn stored_name(&self) -> String {
        format!("{}-{}", self.sha256, self.file)
    }

    /// The path of the patch's file in the partition.
    pub fn path(&self) -> String {
        format!("{PATCH_DIR}/{}", self.stored_name())
    }
}

/// The patches of one job, in the order in which they are applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchTableInput {
    /// [`WIRE_VERSION`].
    pub version: u32,
    /// The job. Results of another job, left by an earlier patch on the same disk, count as none.
    pub job: String,
    /// What a failure means for the patches after it.
    #[serde(default)]
    pub on_error: OnError,
    /// Whether the clone gets an identity of its own.
    #[serde(default)]
    pub identity: Identity,
    /// The patches.
    pub patches: Vec<PatchInput>,
}

/// Why a patch has no success although no exit code says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PatchFailure {
    /// It was still running at the end of its time and was killed with all its children.
    TimeOut,
    /// Its file is missing or not a plain file.
    Missing,
    /// Its file is not the one that the table names.
    Digest,
    /// Its driver is not in the partition, or could not be started.
    Driver,
    /// It was begun in an earlier boot and never ended; it is not begun again.
    Interrupted,
    /// A patch before it failed.
    NotRun,
}

impl std::fmt::Display for PatchFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TimeOut => "did not end in its time and was killed",
            Self::Missing => "its file was not there",
            Self::Digest => "its file was another one",
            Self::Driver => "what applies it is not in the partition",
            Self::Interrupted => "was interrupted",
            Self::NotRun => "was not run, because one before it failed",
        })
    }
}

/// How one patch ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchOutcome {
    /// [`PatchInput::id`].
    pub id: String,
    /// What its program ended with, unless a signal ended it or it never ran.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What went wrong beside that.
    pub failure: Option<PatchFailure>,
    /// How long it ran, in milliseconds.
    pub duration_ms: u64,
    /// The SHA-256 of everything that it wrote, in hexadecimal digits.
    pub log_digest: String,
    /// The end of what it wrote, at most [`LOG_TAIL_MAX`] bytes, without control characters.
    pub log_tail: String,
    /// The boot of the partition in which it ran.
    pub boot_id: String,
}

impl PatchOutcome {
    /// Whether the patch was applied.
    pub fn success(&self) -> bool {
        self.exit_code == Some(0) && self.signal.is_none() && self.failure.is_none()
    }
}

/// Everything that a partition says about the patches of one job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchResults {
    /// [`WIRE_VERSION`].
    pub version: u32,
    /// [`PatchTableInput::job`].
    pub job: String,
    /// The boot of the partition that wrote this.
    pub boot_id: String,
    /// Patches that were begun and have no outcome yet; durable before they are begun.
    pub started: Vec<String>,
    /// The outcomes, in the order of the table.
    pub outcomes: Vec<PatchOutcome>,
    /// Nothing more will be done.
    pub finished: bool,
}

/// What the host concludes from the results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PatchVerdict {
    /// Every patch of the table was applied.
    Applied,
    /// These were not, in the order of the table.
    Failed(Vec<String>),
    /// The partition is not done yet.
    Unfinished,
    /// The results are about something else; says what.
    Foreign(&'static str),
}

impl PatchTableInput {
    /// Parses and checks a table.
    ///
    /// # Errors
    /// [`WireError`] if it is too long, not of this form or version, or has a value that could lead elsewhere.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let table: Self = parse(bytes)?;
        table.check()?;
        Ok(table)
    }

    /// Checks what the type does not: the writer calls it as well.
    ///
    /// # Errors
    /// [`WireError::Version`] or [`WireError::Value`].
    pub fn check(&self) -> Result<(), WireError> {
        version(self.version)?;
        token("job", &self.job)?;
        if self.patches.len() > PATCHES_MAX {
            return Err(bad("number of patches", &self.patches.len().to_string()));
        }
        for (index, patch) in self.patches.iter().enumerate() {
            token("id", &patch.id)?;
            file_name(&patch.file)?;
            digest("sha256", &patch.sha256)?;
            if patch.time_limit_s == 0 {
                return Err(bad("time_limit_s", "0"));
            }
            if self.patches[..index].iter().any(|other| other.id == patch.id) {
                return Err(bad("id (twice)", &patch.id));
            }
        }
        Ok(())
    }
}

impl PatchResults {
    /// Results of a job that has just begun.
    pub fn new(job: &str, boot_id: &str) -> Self {
        Self {
            version: WIRE_VERSION,
            job: job.to_owned(),
            boot_id: boot_id.to_owned(),
            started: Vec::new(),
            outcomes: Vec::new(),
            finished: false,
        }
    }

    /// Parses and checks results, from a file or from the control socket.
    ///
    /// # Errors
    /// [`WireError`] if they are too long, not of this form or version, or have a value that no writer produces.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let mut results: Self = parse(bytes)?;
        results.check()?;
        for outcome in &mut results.outcomes {
            outcome.log_tail = printable(&outcome.log_tail);
        }
        Ok(results)
    }

    /// Checks what the type does not.
    ///
    /// # Errors
    /// [`WireError::Version`] or [`WireError::Value`].
    pub fn check(&self) -> Result<(), WireError> {
        version(self.version)?;
        token("job", &self.job)?;
        token("boot_id", &self.boot_id)?;
        if self.outcomes.len() > PATCHES_MAX || self.started.len() > PATCHES_MAX {
            return Err(bad("number of outcomes", &self.outcomes.len().to_string()));
        }
        self.started.iter().try_for_each(|id| token("id", id))?;
        for outcome in &self.outcomes {
            token("id", &outcome.id)?;
            token("boot_id", &outcome.boot_id)?;
            digest("log_digest", &outcome.log_digest)?;
            if outcome.log_tail.len() > LOG_TAIL_MAX {
                return Err(bad("log_tail", &outcome.log_tail));
            }
        }
        Ok(())
    }

    /// The results as bytes that fit [`WIRE_MAX`]; log tails are shortened, all alike, until they do.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if they do not fit even without tails, [`WireError::Json`] never in practice.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut results = self.clone();
        let mut limit = LOG_TAIL_MAX;
        loop {
            let bytes = serde_json::to_vec(&results).map_err(WireError::Json)?;
            if bytes.len() <= WIRE_MAX {
                return Ok(bytes);
            }
            if limit == 0 {
                return Err(WireError::TooLong { bytes: bytes.len() });
            }
            limit /= 2;
            for outcome in &mut results.outcomes {
                outcome.log_tail = tail(&outcome.log_tail, limit).to_owned();
            }
        }
    }

    /// The outcome of one patch.
    pub fn outcome(&self, id: &str) -> Option<&PatchOutcome> {
        self.outcomes.iter().find(|outcome| outcome.id == id)
    }

    /// Judges the results by the host's own table.
    pub fn verdict(&self, table: &PatchTableInput) -> PatchVerdict {
        if self.job != table.job {
            return PatchVerdict::Foreign("they belong to another job");
        }
        let known = |id: &str| table.patches.iter().any(|patch| patch.id == id);
        if !self.outcomes.iter().all(|outcome| known(&outcome.id)) {
            return PatchVerdict::Foreign("they name a patch that the job does not have");
        }
        let twice = |id: &str| self.outcomes.iter().filter(|outcome| outcome.id == id).count() > 1;
        if self.outcomes.iter().any(|outcome| twice(&outcome.id)) {
            return PatchVerdict::Foreign("they have two outcomes for one patch");
        }
        if !self.finished {
            return PatchVerdict::Unfinished;
        }
        let applied = |patch: &&PatchInput| self.outcome(&patch.id).is_some_and(PatchOutcome::success);
        let failed: Vec<String> =
            table.patches.iter().filter(|patch| !applied(patch)).map(|patch| patch.id.clone()).collect();
        if failed.is_empty() { PatchVerdict::Applied } else { PatchVerdict::Failed(failed) }
    }
}

/// The end of a text, at most `limit` bytes, cut between characters.
pub fn tail(text: &str, limit: usize) -> &str {
    let start = text.len().saturating_sub(limit);
    let start = (start..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    text.get(start..).unwrap_or_default()
}

/// The text with every control character but line feed and tab replaced: it ends up on terminals.
pub fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    text.chars().map(shown).collect()
}

fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > WIRE_MAX {
        return Err(WireError::TooLong { bytes: bytes.len() });
    }
    serde_json::from_slice(bytes).map_err(WireError::Json)
}

fn version(version: u32) -> Result<(), WireError> {
    if version == WIRE_VERSION { Ok(()) } else { Err(WireError::Version(version)) }
}

fn bad(field: &'static str, value: &str) -> WireError {
    let value = printable(value).chars().take(80).collect();
    WireError::Value { field, value }
}

/// Identifiers are printed and compared, so they are short and plain.
fn token(field: &'static str, text: &str) -> Result<(), WireError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._+-:".contains(&b);
    let good = (1..=128).contains(&text.len()) && text.bytes().all(plain);
    if good { Ok(()) } else { Err(bad(field, text)) }
}

/// A name that stays in its directory. `~` and `:` occur in the names of Debian packages.
fn file_name(text: &str) -> Result<(), WireError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._+-~:%".contains(&b);
    let good = (1..=180).contains(&text.len())
        && text.bytes().all(plain)
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if good { Ok(()) } else { Err(bad("file", text)) }
}

fn digest(field: &'static str, text: &str) -> Result<(), WireError> {
    let good = text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if good { Ok(()) } else { Err(bad(field, text)) }
}
