//! Keeps maintainer scripts from starting services while patches are applied (Debian policy, `policy-rc.d`).
//!
//! Under systemd this is vital: a package that restarts its service waits for a job that waits for the unit in which
//! the package is being installed, until somebody kills it half-way. Under our own init the service is started right
//! afterwards anyway.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::paths::Paths;

const FILE: &str = "/usr/sbin/policy-rc.d";
const SAVED: &str = "/usr/sbin/policy-rc.d.patchswitch-saved";
/// 101: "action not allowed".
const CONTENT: &str = "#!/bin/sh\n# patchswitch: no service is started while patches are applied\nexit 101\n";

/// Puts the guard there, keeping the administrator's own. A root without `/usr/sbin` has no maintainer scripts.
pub(super) fn set(paths: &Paths) -> io::Result<()> {
    restore(paths)?;
    let (file, saved) = places(paths);
    if !file.parent().is_some_and(std::path::Path::is_dir) {
        return Ok(());
    }
    if fs::symlink_metadata(&file).is_ok() {
        fs::rename(&file, &saved)?;
    }
    fs::write(&file, CONTENT)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))
}

/// Takes the guard away and puts the administrator's own back; also after a boot that was cut short.
pub(super) fn restore(paths: &Paths) -> io::Result<()> {
    let (file, saved) = places(paths);
    if fs::read(&file).is_ok_and(|content| content == CONTENT.as_bytes()) {
        fs::remove_file(&file)?;
    }
    match fs::rename(&saved, &file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn places(paths: &Paths) -> (PathBuf, PathBuf) {
    (paths.at(FILE), paths.at(SAVED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_administrators_own_policy_survives_even_a_boot_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::below(Some(dir.path()));
        set(&paths).unwrap();
        assert!(!paths.at(FILE).exists(), "nothing to guard without /usr/sbin");
        fs::create_dir_all(dir.path().join("usr/sbin")).unwrap();
        fs::write(paths.at(FILE), "own").unwrap();
        for _cut_short in 0..2 {
            set(&paths).unwrap();
            assert_eq!(fs::read_to_string(paths.at(FILE)).unwrap(), CONTENT);
            assert_eq!(fs::metadata(paths.at(FILE)).unwrap().permissions().mode() & 0o777, 0o755);
        }
        restore(&paths).unwrap();
        assert_eq!(fs::read_to_string(paths.at(FILE)).unwrap(), "own");
        restore(&paths).unwrap();
        assert_eq!(fs::read_to_string(paths.at(FILE)).unwrap(), "own");
        fs::remove_file(paths.at(FILE)).unwrap();
        set(&paths).unwrap();
        restore(&paths).unwrap();
        assert!(!paths.at(FILE).exists());
    }
}
