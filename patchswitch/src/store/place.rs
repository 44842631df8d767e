//! Where the store is, and who may look into it.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{FILE, StoreError};

/// The variable that puts the state directory elsewhere, before the configuration does.
pub const STATE_DIR_VARIABLE: &str = "PATCHSWITCH_STATE_DIR";

/// The state directory: from the environment, else as configured.
pub fn state_dir(configured: &Path) -> PathBuf {
    choose(std::env::var_os(STATE_DIR_VARIABLE), configured)
}

fn choose(variable: Option<OsString>, configured: &Path) -> PathBuf {
    variable.filter(|value| !value.is_empty()).map_or_else(|| configured.to_owned(), PathBuf::from)
}

/// Makes the directory (0700) and an empty file (0600), or checks those that are there. Returns the directory
/// without symbolic links.
pub(super) fn prepare(dir: &Path) -> Result<PathBuf, StoreError> {
    let failed = |path: &Path, source: io::Error| StoreError::Open { path: path.to_owned(), source };
    match rustix::fs::mkdir(dir, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed(dir, errno.into())),
    }
    let dir = std::fs::canonicalize(dir).map_err(|source| failed(dir, source))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(&dir, flags, Mode::empty()).map_err(|errno| failed(&dir, errno.into()))?;
    let stat = rustix::fs::fstat(&fd).map_err(|errno| failed(&dir, errno.into()))?;
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(StoreError::Unsafe { path: dir, reason: "it belongs to another user" });
    }
    if stat.st_mode & 0o077 != 0 {
        rustix::fs::fchmod(&fd, Mode::RWXU).map_err(|errno| failed(&dir, errno.into()))?;
    }
    let file = dir.join(FILE);
    // SQLite gives its other files the mode of this one.
    let create = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::open(&file, create, Mode::RUSR | Mode::WUSR) {
        Ok(_created) => rustix::fs::fsync(&fd).map_err(|errno| failed(&dir, errno.into()))?,
        Err(Errno::EXIST) => check_file(&file)?,
        Err(errno) => return Err(failed(&file, errno.into())),
    }
    Ok(dir)
}

/// Looks without opening: closing a descriptor of the file would drop the locks that SQLite holds on it in this
/// process (`fcntl(2)`, "Record locks").
fn check_file(file: &Path) -> Result<(), StoreError> {
    let failed = |errno: Errno| StoreError::Open { path: file.to_owned(), source: errno.into() };
    let refused = |reason| Err(StoreError::Unsafe { path: file.to_owned(), reason });
    let stat = rustix::fs::statat(CWD, file, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return refused("it is not a regular file");
    }
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return refused("it belongs to another user");
    }
    if stat.st_mode & 0o077 != 0 {
        rustix::fs::chmodat(CWD, file, Mode::RUSR | Mode::WUSR, AtFlags::empty()).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_goes_before_the_configuration() {
        let configured = Path::new("/srv/ps");
        assert_eq!(choose(Some("/elsewhere".into()), configured), Path::new("/elsewhere"));
        assert_eq!(choose(Some("".into()), configured), configured);
        assert_eq!(choose(None, configured), configured);
    }
}
