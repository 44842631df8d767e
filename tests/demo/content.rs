//! What the demo adds to a plain Debian root with nginx, and the scripts that it uses as patches.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use patchswitch_tests::programs;
use sha2::{Digest as _, Sha256};

/// The program that the partition runs.
pub(crate) const COMMAND: &str = "/usr/local/lib/demo/serve";
/// The port of the datagram echo.
pub(crate) const UDP_PORT: u16 = 7777;
/// The path of the long download.
pub(crate) const DOWNLOAD: &str = "/download.bin";
/// Prints one digest of everything in a partition that the patches of the demo touch, but for what dpkg knows.
pub(crate) const FINGERPRINT: &str =
    "find /etc/nginx /var/www -type f ! -name download.bin | sort | xargs sha256sum | sha256sum";
/// The length of the long download, in bytes.
const DOWNLOAD_LEN: usize = 8 << 20;

/// A script that is a patch, by its file name: its directory is made by [`patches`].
pub(crate) const FAILS: &str = "rebuild-index.sh";
/// As above; succeeds, and the service answers one visitor at a time only.
pub(crate) const BREAKS_UNDER_LOAD: &str = "limit-requests.sh";
/// As above; succeeds, and nobody listens at the service's port.
pub(crate) const KILLS_THE_SERVICE: &str = "move-port.sh";

/// As above; succeeds, and changes nothing that matters.
pub(crate) const HARMLESS: &str = "note.sh";

const SCRIPTS: [(&str, &str); 4] = [
    (HARMLESS, include_str!("content/harmless")),
    (FAILS, include_str!("content/fails")),
    (BREAKS_UNDER_LOAD, include_str!("content/breaks-under-load")),
    (KILLS_THE_SERVICE, include_str!("content/kills-the-service")),
];

/// Copies a root archive and adds to the copy what the demo's partition has besides: its program, the datagram echo,
/// a file to download. Needs no privileges.
pub(crate) fn prepare(root: &Path, echo: &Path, out: &Path) -> anyhow::Result<()> {
    let tree = tempfile::tempdir().context("failed to make a directory")?;
    let files: [(&str, Vec<u8>, u32); 4] = [
        (COMMAND, include_bytes!("content/serve").to_vec(), 0o755),
        ("/etc/nginx/conf.d/demo.conf", include_bytes!("content/demo.conf").to_vec(), 0o644),
        ("/usr/local/bin/patchswitch-load", read(echo)?, 0o755),
        ("/var/www/html/download.bin", noise(DOWNLOAD_LEN), 0o644),
    ];
    for (path, content, mode) in &files {
        let path = tree.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
    }
    fs::copy(root, out).with_context(|| format!("failed to copy {} to {}", root.display(), out.display()))?;
    // Files alone: directories that the archive has already keep their owners.
    let names = files.iter().map(|(path, ..)| format!(".{path}"));
    let (out, tree) = (out.display().to_string(), tree.path().display().to_string());
    let options = ["--owner=0", "--group=0", "--numeric-owner", "--mtime=@0"];
    let command = ["tar", "-r", "-f", &out, "-C", &tree].into_iter().chain(options);
    let command: Vec<String> = command.map(str::to_owned).chain(names).collect();
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    programs::run(&command).map(drop)
}

/// Writes the scripts that are patches into a directory.
pub(crate) fn patches(directory: &Path) -> anyhow::Result<()> {
    for (name, text) in SCRIPTS {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// The packages of the patch in a directory, by name.
pub(crate) fn packages(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("failed to list {}", directory.display()))?;
    let mut found: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    found.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    found.sort();
    anyhow::ensure!(!found.is_empty(), "{} has no packages", directory.display());
    Ok(found)
}

/// Bytes that no file system and no archive makes smaller, the same each time.
fn noise(length: usize) -> Vec<u8> {
    (0u64..).flat_map(|block| Sha256::digest(block.to_le_bytes())).take(length).collect()
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("failed to read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_gets_what_the_partition_needs() {
        let dir = tempfile::tempdir().unwrap();
        let (root, out) = (dir.path().join("root.tar"), dir.path().join("out.tar"));
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/hostname"), "web").unwrap();
        let at = dir.path().to_str().unwrap();
        programs::run(&["tar", "-cf", root.to_str().unwrap(), "-C", at, "./etc"]).unwrap();
        prepare(&root, Path::new("/proc/self/exe"), &out).unwrap();
        let list = programs::run(&["tar", "-tvf", out.to_str().unwrap()]).unwrap();
        let line = |path: &str| list.lines().find(|line| line.ends_with(path)).map(str::to_owned);
        assert!(line("./etc/hostname").is_some(), "what was there stays: {list}");
        assert!(line(&format!(".{COMMAND}")).unwrap().starts_with("-rwxr-xr-x 0/0"), "{list}");
        assert!(
            line(&format!("{DOWNLOAD_LEN} 1970-01-01 00:00 ./var/www/html{DOWNLOAD}")).is_some(),
            "{list}"
        );
    }

    #[test]
    fn noise_does_not_repeat_itself() {
        let bytes = noise(1 << 16);
        assert_eq!(bytes.len(), 1 << 16);
        let blocks: std::collections::BTreeSet<_> = bytes.chunks(32).collect();
        assert_eq!(blocks.len(), bytes.len() / 32);
    }
}
