//! The files of a clone against the digests of its package database: what `dpkg --verify` does.
//!
//! The host's `dpkg --verify --root=…` is not used for it. It opens the files by their paths, and so follows an absolute
//! symbolic link of the clone into the host: the one who made the link chooses what the host's root opens, and opening
//! is an act already for a pipe or a watchdog. Here the kernel resolves every path inside the clone, and nothing but a
//! regular file is opened. Of a host without `dpkg` nothing is missed.

use std::io::Read;
use std::time::Instant;

use md5::{Digest, Md5};

use super::database::{Diversions, Installed, parse_md5sums, parse_status};
use super::{KEPT, Verdict};
use crate::host::linux::root::{Look, Root, RootError};
use crate::patch::digest::hex;
use crate::patch::wire::printable;

/// The directory of the database.
const DATABASE: &str = "var/lib/dpkg";
/// The largest text of the database that is read, in bytes. A Debian desktop has some 10 MB.
const TEXT_MAX: u64 = 256 << 20;

/// Why the check could not go on.
enum Stop {
    Late,
    Root(RootError),
    Read(String, std::io::Error),
    Database(String),
}

impl From<RootError> for Stop {
    fn from(error: RootError) -> Self {
        Self::Root(error)
    }
}

/// Checks everything until the end of the time.
pub(super) fn check(root: &Root, end: Instant) -> Verdict {
    let mut tally = Tally::default();
    match check_all(root, end, &mut tally) {
        Ok(true) => tally.verdict(),
        Ok(false) => Verdict::NotRun("the clone has no dpkg database".to_owned()),
        // What was found until then counts more than that it was not everything.
        Err(_) if tally.count > 0 => tally.verdict(),
        Err(Stop::Late) => Verdict::Failed(format!("no time was left after {} files", tally.files)),
        Err(Stop::Root(error)) => Verdict::Failed(error.to_string()),
        Err(Stop::Read(path, error)) => Verdict::Failed(format!("failed to read {path:?}: {error}")),
        Err(Stop::Database(reason)) => Verdict::Failed(reason),
    }
}

#[derive(Default)]
struct Tally {
    packages: usize,
    files: usize,
    missing: usize,
    without_digests: usize,
    findings: Vec<String>,
    count: usize,
}

impl Tally {
    fn find(&mut self, finding: String) {
        self.count += 1;
        if self.findings.len() < KEPT {
            self.findings.push(printable(&finding));
        }
    }

    fn verdict(self) -> Verdict {
        if self.count > 0 {
            return Verdict::Found { findings: self.findings, count: self.count };
        }
        // Documentation is often left out on purpose, so a missing file is no finding.
        Verdict::Clean(format!(
            "{} files of {} packages; {} files are missing, {} packages have no digests",
            self.files, self.packages, self.missing, self.without_digests
        ))
    }
}

fn check_all(root: &Root, end: Instant, tally: &mut Tally) -> Result<bool, Stop> {
    let Some(status) = text(root, &format!("{DATABASE}/status"))? else { return Ok(false) };
    let diversions = text(root, &format!("{DATABASE}/diversions"))?.unwrap_or_default();
    let diversions = Diversions::parse(&diversions);
    let installed = parse_status(&status);
    if installed.is_empty() {
        return Err(Stop::Database("the dpkg database of the clone names no package".to_owned()));
    }
    for package in &installed {
        tally.packages += 1;
        check_package(root, package, &diversions, end, tally)?;
    }
    Ok(true)
}

fn check_package(
    root: &Root,
    package: &Installed,
    diversions: &Diversions,
    end: Instant,
    tally: &mut Tally,
) -> Result<(), Stop> {
    let Installed { name, architecture, conffiles } = package;
    // With the architecture where several may be installed side by side.
    let both =
        [format!("{DATABASE}/info/{name}:{architecture}.md5sums"), format!("{DATABASE}/info/{name}.md5sums")];
    let mut sums = None;
    for path in both {
        sums = sums.or(text(root, &path)?);
    }
    let Some(sums) = sums else {
        tally.without_digests += 1;
        return Ok(());
    };
    for line in parse_md5sums(&sums) {
        let (digest, path) = match line {
            Ok(line) => line,
            Err(line) => {
                return Err(Stop::Database(format!("the digests of package {name} have the line {line:?}")));
            }
        };
        let path = format!("/{path}");
        if conffiles.contains(&path) {
            continue;
        }
        let place = diversions.place(&path, name);
        tally.files += 1;
        match root.look(place)? {
            Look::Missing => tally.missing += 1,
            Look::Other(kind) => tally.find(format!("{place:?} of package {name} is a {kind:?}")),
            Look::File(file, _) => {
                if !md5(file, place, end)?.eq_ignore_ascii_case(digest) {
                    tally.find(format!("{place:?} of package {name} has changed"));
                }
            }
        }
    }
    Ok(())
}

/// A text of the database; none if there is no such file.
fn text(root: &Root, path: &str) -> Result<Option<String>, Stop> {
    let (file, size) = match root.look(path)? {
        Look::Missing => return Ok(None),
        Look::Other(kind) => return Err(Stop::Database(format!("{path:?} of the clone is a {kind:?}"))),
        Look::File(file, size) => (file, size),
    };
    if size > TEXT_MAX {
        return Err(Stop::Database(format!("{path:?} of the clone has {size} bytes")));
    }
    let mut bytes = Vec::new();
    file.take(TEXT_MAX).read_to_end(&mut bytes).map_err(|error| Stop::Read(path.to_owned(), error))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// The clock is looked at while reading: a file can be as long as its maker wants.
fn md5(mut file: std::fs::File, path: &str, end: Instant) -> Result<String, Stop> {
    let mut digest = Md5::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        if Instant::now() >= end {
            return Err(Stop::Late);
        }
        match file.read(&mut piece) {
            Ok(0) => return Ok(hex(&digest.finalize())),
            Ok(count) => digest.update(piece.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Stop::Read(path.to_owned(), error)),
        }
    }
}
