//! What the process says at its end, in one number.
//!
//! Scripts depend on these, so a number never changes its meaning. Those from 64 on are the ones of `sysexits.h`;
//! 10 to 25 tell the ends of a job apart. Every error type of the library that can end a command has a method
//! `exit_code`.

use std::fmt;

/// The end of a command. The discriminant is the number the process ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum ExitCode {
    /// Done.
    Done = 0,
    /// Failed, the service was not touched; the text says more.
    Failed = 1,
    /// The command line is wrong (clap's own number).
    Usage = 2,
    /// Nothing to do, nothing new.
    Nothing = 10,
    /// A patch failed on the clone; the service was not touched.
    PatchFailed = 20,
    /// The checks before the switch failed; the service was not touched.
    GateFailed = 21,
    /// Switched, then put back automatically; the service is fine.
    GivenBack = 22,
    /// Putting back failed: a person is needed.
    GiveBackFailed = 23,
    /// Done, but the drain was forced and flows were cut.
    DrainForced = 24,
    /// Done, but writes were lost.
    WritesLost = 25,
    /// Bad data: a digest, a signature, an infected disk.
    BadData = 65,
    /// No standby covers the active partition, or this host lacks a feature.
    Unavailable = 69,
    /// An internal error: a bug.
    Internal = 70,
    /// A file or an object cannot be created.
    CannotCreate = 73,
    /// Input or output failed.
    Io = 74,
    /// Busy: somebody holds the lock; try later.
    Busy = 75,
    /// Not permitted.
    Permission = 77,
    /// The configuration is wrong.
    Config = 78,
    /// Interrupted; the text says whether the job goes on or was undone.
    Interrupted = 130,
}

impl ExitCode {
    /// Every code, in the order of the numbers.
    pub const ALL: [Self; 19] = [
        Self::Done,
        Self::Failed,
        Self::Usage,
        Self::Nothing,
        Self::PatchFailed,
        Self::GateFailed,
        Self::GivenBack,
        Self::GiveBackFailed,
        Self::DrainForced,
        Self::WritesLost,
        Self::BadData,
        Self::Unavailable,
        Self::Internal,
        Self::CannotCreate,
        Self::Io,
        Self::Busy,
        Self::Permission,
        Self::Config,
        Self::Interrupted,
    ];

    /// The number.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The code of a number, if it has one.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.number() == number)
    }

    /// The code that fits an error of the operating system, where nothing more exact is known.
    pub fn of_io(error: &std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => Self::Permission,
            std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::ReadOnlyFilesystem => Self::CannotCreate,
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::ResourceBusy => Self::Busy,
            _ => Self::Io,
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.number())
    }
}

impl fmt::Display for ExitCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "done",
            Self::Failed => "failed, service untouched",
            Self::Usage => "usage",
            Self::Nothing => "nothing to do",
            Self::PatchFailed => "patch failed on the clone, service untouched",
            Self::GateFailed => "checks before the switch failed, service untouched",
            Self::GivenBack => "switched, then put back automatically",
            Self::GiveBackFailed => "putting back failed, a person is needed",
            Self::DrainForced => "done, but the drain was forced",
            Self::WritesLost => "done, but writes were lost",
            Self::BadData => "bad data",
            Self::Unavailable => "not available",
            Self::Internal => "internal error",
            Self::CannotCreate => "cannot create",
            Self::Io => "input or output failed",
            Self::Busy => "busy, try later",
            Self::Permission => "not permitted",
            Self::Config => "configuration",
            Self::Interrupted => "interrupted",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_the_documented_ones() {
        let numbers: Vec<u8> = ExitCode::ALL.iter().map(|code| code.number()).collect();
        assert_eq!(
            numbers,
            [0, 1, 2, 10, 20, 21, 22, 23, 24, 25, 65, 69, 70, 73, 74, 75, 77, 78, 130],
            "scripts depend on these numbers"
        );
    }

    #[test]
    fn a_number_leads_back_to_its_code_and_no_other_number_does() {
        for number in 0..=u8::MAX {
            match ExitCode::from_number(number) {
                Some(code) => assert_eq!(code.number(), number),
                None => assert!(ExitCode::ALL.iter().all(|code| code.number() != number)),
            }
        }
    }
}
