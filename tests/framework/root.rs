//! A root for partitions that is made of this machine's own programs: small, and quick to copy.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::programs;

/// Programs of the machine that the small root gets, with their libraries.
const PROGRAMS: [&str; 22] = [
    "sh", "sleep", "cat", "ls", "setsid", "mkdir", "touch", "id", "dd", "head", "tail", "chmod", "mount",
    "unshare", "mknod", "env", "true", "stat", "hostname", "ps", "kill", "tr",
];
const DIRECTORIES: [&str; 13] = [
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "usr/lib64",
    "etc",
    "var",
    "root",
    "srv",
    "proc",
    "sys",
    "dev",
    "run",
    "tmp",
];
/// As Debian's roots have them since they are merged.
const LINKS: [(&str, &str); 4] =
    [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")];

/// A directory with a shell and some programs of this machine, merged as Debian's roots are. Made once for all who want
/// it: it takes longer than most tests.
///
/// # Errors
/// If a program is not here, or the directory cannot be made.
pub fn small() -> anyhow::Result<PathBuf> {
    let complete = PathBuf::from("/run/patchswitch-test-root.small");
    if complete.is_dir() {
        return Ok(complete);
    }
    let root = complete.with_extension("new");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for directory in DIRECTORIES {
        fs::create_dir_all(root.join(directory))?;
    }
    for (link, target) in LINKS {
        symlink(target, root.join(link))?;
    }
    put_programs(&root, &PROGRAMS.map(|program| (program, program)))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::rename(root, &complete)?;
    Ok(complete)
}

/// Puts programs of this machine into a root, each under a name of its own there, with the libraries that they need.
///
/// # Errors
/// If a program is not here, or cannot be copied.
pub fn put_programs(root: &Path, programs: &[(&str, &str)]) -> anyhow::Result<()> {
    let find = |(program, _): &(&str, &str)| {
        programs::find(program).with_context(|| format!("there is no {program} here"))
    };
    let paths = programs.iter().map(find).collect::<anyhow::Result<Vec<PathBuf>>>()?;
    for (path, (_, name)) in paths.iter().zip(programs) {
        let _ = fs::copy(fs::canonicalize(path)?, root.join("usr/bin").join(name))?;
    }
    // One call for all: to start a program is the slow part in an emulated machine.
    let mut ldd = vec!["ldd"];
    ldd.extend(paths.iter().filter_map(|path| path.to_str()));
    let listed = programs::run(&ldd)?;
    let libraries: BTreeSet<&str> = listed
        .lines()
        .filter(|line| line.starts_with('\t'))
        .flat_map(str::split_whitespace)
        .filter(|word| word.starts_with('/'))
        .collect();
    for library in libraries {
        let place = root.join(library.trim_start_matches('/'));
        place.parent().map_or(Ok(()), fs::create_dir_all)?;
        let _ = fs::copy(fs::canonicalize(library)?, place)?;
    }
    Ok(())
}
