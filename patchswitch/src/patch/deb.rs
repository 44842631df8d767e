//! What a patch file is, by its content.

use std::path::Path;

use crate::host::linux::programs::{Program, ProgramError, Run};
use crate::patch::wire::{Driver, printable};
use crate::store::Package;

/// A Debian package is an `ar` archive whose first member says so (`deb(5)`).
const DEB: &[u8] = b"!<arch>\ndebian-binary";
/// How much of a file's beginning is needed to know its driver, in bytes.
pub(super) const HEAD: usize = DEB.len();
/// The longest field that is shown, in characters.
const FIELD_MAX: usize = 256;

/// The driver for a file that begins with these bytes.
pub(super) fn driver(head: &[u8]) -> Option<Driver> {
    if head.starts_with(DEB) {
        Some(Driver::Deb)
    } else if head.starts_with(b"#!") {
        Some(Driver::Script)
    } else {
        None
    }
}

/// Asks `dpkg-deb` what a package is; none if the host has no `dpkg-deb`, since this is only shown.
///
/// # Errors
/// [`ProgramError`] if the file is no package that `dpkg-deb` can read.
pub(super) fn package(path: &Path) -> Result<Option<Package>, ProgramError> {
    let fields = ["Package", "Version", "Architecture"];
    match Run::new(Program::DpkgDeb).arg("--field").arg(path).args(fields).read() {
        Ok(text) => Ok(parse(&text)),
        Err(ProgramError::Missing { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Parses `Name: value` lines.
fn parse(text: &str) -> Option<Package> {
    let field = |wanted: &str| {
        let value = text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| *name == wanted)?.1;
        let value: String = printable(value.trim()).chars().take(FIELD_MAX).collect();
        (!value.is_empty()).then_some(value)
    };
    let (name, version) = (field("Package")?, field("Version")?);
    Some(Package { name, version, architecture: field("Architecture")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_a_file_tells_its_driver() {
        for (head, expected) in [
            (&b"!<arch>\ndebian-binary   1700000000  0"[..], Some(Driver::Deb)),
            (b"#!/bin/sh\n", Some(Driver::Script)),
            (b"!<arch>\nother.o/", None),
            (b"!<arch>\n", None),
            (b"\x7fELF", None),
            (b"", None),
        ] {
            assert_eq!(driver(head), expected, "{head:?}");
        }
    }

    #[test]
    fn fields_are_read_in_any_order_and_a_missing_one_means_unknown() {
        let package = parse("Architecture: amd64\nPackage: nginx\nVersion: 1:1.22.1-9+deb12u11\n").unwrap();
        assert_eq!(package.name, "nginx");
        assert_eq!(package.version, "1:1.22.1-9+deb12u11");
        assert_eq!(package.architecture, "amd64");
        assert_eq!(parse("Package: nginx\nVersion:\nArchitecture: amd64\n"), None);
        assert_eq!(parse(""), None);
        let loud = parse("Package: a\u{1b}[2J\nVersion: 1\nArchitecture: all\n").unwrap();
        assert!(!loud.name.contains('\u{1b}'));
    }
}
