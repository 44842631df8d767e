//! The program `patchswitch-init`: where the host has it, and whether it can run in a partition.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The program's file name on the host.
pub const FILE: &str = "patchswitch-init";
/// Where packages put it.
const DIRECTORIES: [&str; 2] = ["/usr/lib/patchswitch", "/usr/local/lib/patchswitch"];
/// How much of the file is looked at: its header and its table of segments.
const HEADER_MAX: u64 = 64 << 10;
/// Larger than any build of it.
const FILE_MAX: u64 = 256 << 20;

/// The program cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProgramFileError {
    /// It is nowhere.
    #[error("{FILE} is neither next to the running program nor in {}; install both", DIRECTORIES.join(" or "))]
    Missing,
    /// A root without the right libraries could not run it.
    #[error(
        "{0} is not a static program of this machine; build it with RUSTFLAGS=\"-C target-feature=+crt-static\""
    )]
    NotStatic(PathBuf),
    /// It could not be read.
    #[error("failed to read {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Finds the program: next to the one that is running, or where packages put it.
///
/// # Errors
/// [`ProgramFileError`], also if it is not static.
pub fn find() -> Result<PathBuf, ProgramFileError> {
    let own = std::env::current_exe().unwrap_or_default();
    let beside = own.parent().map(Path::to_owned).unwrap_or_default();
    // Cargo puts tests one directory below the programs.
    let above = beside.parent().filter(|_| beside.ends_with("deps")).map(Path::to_owned);
    let directories = [Some(beside), above].into_iter().flatten().chain(DIRECTORIES.map(PathBuf::from));
    let found = directories.map(|dir| dir.join(FILE)).find(|path| path.is_file());
    let path = found.ok_or(ProgramFileError::Missing)?;
    let mut header = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(HEADER_MAX).read_to_end(&mut header));
    read.map_err(|source| ProgramFileError::Io { path: path.clone(), source })?;
    if is_static(&header) { Ok(path) } else { Err(ProgramFileError::NotStatic(path)) }
}

/// The program's content, to be written into a root.
///
/// # Errors
/// As [`find`].
pub fn read() -> Result<Vec<u8>, ProgramFileError> {
    let path = find()?;
    let mut content = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(FILE_MAX).read_to_end(&mut content));
    read.map(|_| content).map_err(|source| ProgramFileError::Io { path, source })
}

/// Whether this is the beginning of a 64-bit little-endian ELF program without an interpreter (`elf(5)`).
fn is_static(header: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, length: usize| {
        let bytes = header.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0_u64, |value, byte| (value << 8) | u64::from(*byte)))
    };
    let usize_at = |at, length| number(at, length).and_then(|value| usize::try_from(value).ok());
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return false;
    }
    let (Some(table), Some(size), Some(count)) = (usize_at(0x20, 8), usize_at(0x36, 2), usize_at(0x38, 2))
    else {
        return false;
    };
    let kind = |index: usize| table.checked_add(index.checked_mul(size)?).and_then(|at| number(at, 4));
    count > 0 && (0..count).all(|index| kind(index).is_some_and(|kind| kind != u64::from(PT_INTERP)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(kinds: &[u32]) -> Vec<u8> {
        let mut header = vec![0; 0x40];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[0x20] = 0x40;
        header[0x36] = 56;
        header[0x38] = u8::try_from(kinds.len()).unwrap();
        for kind in kinds {
            let mut segment = vec![0; 56];
            segment[..4].copy_from_slice(&kind.to_le_bytes());
            header.extend(segment);
        }
        header
    }

    #[test]
    fn a_program_with_an_interpreter_or_none_at_all_is_not_static() {
        assert!(is_static(&elf(&[1, 1, 4])));
        assert!(!is_static(&elf(&[6, 3, 1])), "an interpreter");
        assert!(!is_static(&elf(&[])));
        assert!(!is_static(&elf(&[1, 1])[..0x60]), "cut short");
        assert!(!is_static(b"#!/bin/sh\n") && !is_static(b""));
        let mut far = elf(&[1]);
        far[0x20..0x28].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(!is_static(&far));
    }
}
