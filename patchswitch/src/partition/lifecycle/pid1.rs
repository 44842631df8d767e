//! Which program of a root is to be PID 1.
//!
//! It has to be a plain executable file at a path without symbolic links: the runtime follows links inside the root,
//! and what they lead to is the partition's to choose. On today's roots `/sbin/init` is such a link.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{Init, LifecycleError, Pid1};

/// Decides, and makes sure that the program is there. To be called in the agent's mount namespace.
pub(super) fn choose(init: Init, root: &Path) -> Result<Pid1, LifecycleError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(root, flags, Mode::empty());
    let root = opened.map_err(|errno| LifecycleError::io("open", root)(errno.into()))?;
    let require = |pid1: Pid1| {
        let missing = |reason| LifecycleError::NoInit { file: pid1.file(), reason };
        look(&root, pid1.file()).map(|()| pid1).map_err(missing)
    };
    match init {
        Init::Systemd => require(Pid1::Systemd),
        Init::Patchswitch => require(Pid1::Patchswitch),
        Init::Auto => require(Pid1::Systemd).or_else(|_| require(Pid1::Patchswitch)),
    }
}

/// What is wrong with the file, in words.
fn look(root: &OwnedFd, file: &str) -> Result<(), String> {
    let resolve = ResolveFlags::IN_ROOT
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let opened = rustix::fs::openat2(root, file, flags, Mode::empty(), resolve);
    let found = opened.map_err(|errno| match errno {
        Errno::NOENT => "it is not there".to_owned(),
        Errno::LOOP => "a symbolic link leads there".to_owned(),
        Errno::XDEV => "it is on another file system".to_owned(),
        other => other.to_string(),
    })?;
    let stat = rustix::fs::fstat(&found).map_err(|errno| errno.to_string())?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("it is not a plain file".to_owned());
    }
    if stat.st_mode & 0o100 == 0 {
        return Err("it is not executable".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn put(root: &Path, file: &str, mode: u32) {
        let path = root.join(file.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn systemd_is_taken_where_it_is_and_our_own_init_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), Pid1::Patchswitch.file(), 0o755);
        assert_eq!(choose(Init::Auto, dir.path()).unwrap(), Pid1::Patchswitch);
        put(dir.path(), Pid1::Systemd.file(), 0o755);
        assert_eq!(choose(Init::Auto, dir.path()).unwrap(), Pid1::Systemd);
        assert_eq!(choose(Init::Patchswitch, dir.path()).unwrap(), Pid1::Patchswitch);
        assert_eq!(choose(Init::Systemd, dir.path()).unwrap(), Pid1::Systemd);
    }

    #[test]
    fn an_init_that_is_missing_a_link_or_no_program_is_named_with_the_reason() {
        let refused = |prepare: fn(&Path)| {
            let dir = tempfile::tempdir().unwrap();
            prepare(dir.path());
            choose(Init::Patchswitch, dir.path()).unwrap_err().to_string()
        };
        let missing = refused(|_| ());
        assert_eq!(
            missing,
            "the root has no /usr/lib/patchswitch/init that could be its init: it is not there"
        );
        assert!(refused(|root| put(root, Pid1::Patchswitch.file(), 0o644)).contains("not executable"));
        let linked = refused(|root| {
            fs::create_dir_all(root.join("usr/lib/patchswitch")).unwrap();
            symlink("/bin/sh", root.join("usr/lib/patchswitch/init")).unwrap();
        });
        assert!(linked.contains("a symbolic link leads there"), "{linked}");
        let below_a_link = refused(|root| {
            fs::create_dir_all(root.join("usr")).unwrap();
            symlink("/lib", root.join("usr/lib")).unwrap();
        });
        assert!(below_a_link.contains("a symbolic link leads there"), "{below_a_link}");
        let directory = refused(|root| fs::create_dir_all(root.join("usr/lib/patchswitch/init")).unwrap());
        assert!(directory.contains("not a plain file"), "{directory}");
    }
}
