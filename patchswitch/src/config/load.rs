//! Reading the configuration's files; what they say is parsed elsewhere.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};

use super::{Config, ConfigError, parse_all};

/// The main file. Drop-ins are in `config.d` beside it.
pub const DEFAULT_FILE: &str = "/etc/patchswitch/patchswitch.toml";
/// The largest file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// Reads the main file and its drop-ins. Without any of them the configuration is the default one, with no service.
///
/// # Errors
/// [`ConfigError`]; a file that others than root or the agent's user may write to is refused.
pub fn load(main: &Path) -> Result<Config, ConfigError> {
    let mut files = Vec::new();
    for path in std::iter::once(main.to_owned()).chain(drop_ins(main)?) {
        match read(&path) {
            Ok(text) => files.push((path.to_string_lossy().into_owned(), text)),
            Err(ConfigError::Read { source, .. }) if path == main && is_absent(&source) => {}
            Err(error) => return Err(error),
        }
    }
    parse_all(files.iter().map(|(name, text)| (name.as_str(), text.as_str())))
}

fn is_absent(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}

/// `config.d/*.toml` in the order of their names. Hidden files are those that editors leave.
fn drop_ins(main: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let folder = main.with_file_name("config.d");
    let failed = |source| ConfigError::Read { path: folder.clone(), source };
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".toml") && !name.starts_with('.') {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source: std::io::Error| ConfigError::Read { path: path.to_owned(), source };
    // A FIFO must not block the agent.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    check_file(path, &fd)?;
    let mut text = String::new();
    let size = File::from(fd).take(FILE_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if size as u64 > FILE_MAX {
        return Err(unsafe_file(path, "it is larger than one mebibyte"));
    }
    Ok(text)
}

fn check_file(path: &Path, fd: impl AsFd) -> Result<(), ConfigError> {
    let stat = rustix::fs::fstat(fd)
        .map_err(|errno| ConfigError::Read { path: path.to_owned(), source: errno.into() })?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    // A link to /dev/null masks a file, as it does for systemd.
    let null = kind == FileType::CharacterDevice && stat.st_rdev == rustix::fs::makedev(1, 3);
    if null {
        return Ok(());
    }
    if kind != FileType::RegularFile {
        return Err(unsafe_file(path, "it is not a regular file"));
    }
    if stat.st_uid != 0 && stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(unsafe_file(path, "it belongs to another user; chown it to root"));
    }
    if stat.st_mode & 0o022 != 0 {
        return Err(unsafe_file(path, "other users may write to it; chmod it to 0644"));
    }
    Ok(())
}

fn unsafe_file(path: &Path, reason: &'static str) -> ConfigError {
    ConfigError::Unsafe { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn put(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    }

    #[test]
    fn drop_ins_follow_the_main_file_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("patchswitch.toml");
        assert_eq!(load(&main).unwrap(), Config::default());
        put(dir.path(), "patchswitch.toml", "[job]\nboot = \"1s\"\nstop = \"2s\"\n");
        put(dir.path(), "config.d/90-last.toml", "[job]\nboot = \"3s\"\n");
        put(dir.path(), "config.d/10-first.toml", "[job]\nboot = \"4s\"\npatch = \"5s\"\n");
        put(dir.path(), "config.d/.hidden.toml", "nonsense");
        put(dir.path(), "config.d/note.txt", "nonsense");
        std::os::unix::fs::symlink("/dev/null", dir.path().join("config.d/95-mask.toml")).unwrap();
        let job = load(&main).unwrap().job;
        let seconds = [job.boot, job.stop, job.patch].map(|d| d.as_secs());
        assert_eq!(seconds, [3, 2, 5]);
        put(dir.path(), "config.d/95-bad.toml", "[job]\n\nbot = \"3s\"\n");
        let error = load(&main).unwrap_err().to_string();
        assert!(error.contains("config.d/95-bad.toml:3:1: unknown field `bot`"), "{error}");
    }

    #[test]
    fn a_file_that_others_may_change_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("patchswitch.toml");
        put(dir.path(), "patchswitch.toml", "");
        for (mode, good) in [(0o600, true), (0o644, true), (0o664, false), (0o646, false)] {
            std::fs::set_permissions(&main, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(load(&main).is_ok(), good, "{mode:o}");
        }
        std::fs::remove_file(&main).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &main, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(matches!(load(&main), Err(ConfigError::Unsafe { .. })));
    }
}
