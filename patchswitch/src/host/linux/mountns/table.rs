//! The kernel's list of mounts, parsed.

use std::path::{Path, PathBuf};

/// Trees that the agent's namespace keeps: programs and their libraries, kernel interfaces, our own files.
const NEEDED: [&str; 9] =
    ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/proc", "/sys", "/dev", "/run/patchswitch"];
/// Mounts that it keeps although what is below them may go.
const NEEDED_ALONE: [&str; 6] = ["/", "/run", "/var", "/var/lib", "/var/lib/patchswitch", "/etc"];

/// One mount, a line of `/proc/PID/mountinfo` (`proc_pid_mountinfo(5)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub target: PathBuf,
    /// The device number: major, minor.
    pub device: (u32, u32),
    /// Whether this mount is read-only; the file system may be so as well.
    pub read_only: bool,
    /// The options of this mount, e.g. `rw,nosuid,nodev,relatime`.
    pub options: String,
    /// The type of the file system.
    pub kind: String,
    /// What was mounted, as whoever did it called it; mostly the path of a device.
    pub source: PathBuf,
}

/// Parses the file; a malformed line is left out.
pub fn parse(text: &str) -> Vec<Mount> {
    text.lines().filter_map(line).collect()
}

fn line(line: &str) -> Option<Mount> {
    let (own, file_system) = line.split_once(" - ")?;
    let mut mounted = file_system.split(' ');
    let mut fields = own.split(' ').skip(2);
    let (major, minor) = fields.next()?.split_once(':')?;
    let target = unescape(fields.nth(1)?);
    let options = fields.next()?.to_owned();
    Some(Mount {
        target: target.into(),
        device: (major.parse().ok()?, minor.parse().ok()?),
        read_only: options.split(',').any(|option| option == "ro"),
        options,
        kind: mounted.next()?.to_owned(),
        source: unescape(mounted.next()?).into(),
    })
}

/// The kernel writes space, tab, line feed and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let pairs = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    pairs.iter().fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

/// The mounts that a fresh copy of the host's namespace lets go of, innermost first.
pub(super) fn not_needed(mounts: &[Mount]) -> Vec<PathBuf> {
    let keep = |target: &Path| {
        NEEDED.iter().any(|tree| target.starts_with(tree))
            || NEEDED_ALONE.iter().any(|alone| target == *alone)
    };
    mounts.iter().rev().filter(|mount| !keep(&mount.target)).map(|mount| mount.target.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
24 22 0:22 / /run rw,nosuid shared:2 - tmpfs tmpfs rw
25 24 0:23 / /run/user/0 rw - tmpfs tmpfs rw
26 22 254:3 / /mnt/with\\040space ro,nosuid,nodev master:3 - ext4 /dev/dm-3 rw
27 26 254:4 / /mnt/with\\040space/sub rw - ext4 /dev/dm-4 rw
28 24 0:4 mnt:[4026532] /run/patchswitch/mnt/ns rw - nsfs nsfs rw
29 22 254:5 / /usrlocal rw - ext4 /dev/dm-5 rw
not a mount
";

    #[test]
    fn lines_are_parsed_with_escapes_and_optional_fields() {
        let mounts = parse(TEXT);
        assert_eq!(mounts.len(), 8);
        let expected = Mount {
            target: "/mnt/with space".into(),
            device: (254, 3),
            read_only: true,
            options: "ro,nosuid,nodev".to_owned(),
            kind: "ext4".to_owned(),
            source: "/dev/dm-3".into(),
        };
        assert_eq!(mounts[4], expected);
    }

    #[test]
    fn others_disks_are_let_go_of_innermost_first() {
        let expected =
            ["/usrlocal", "/mnt/with space/sub", "/mnt/with space", "/run/user/0"].map(PathBuf::from);
        assert_eq!(not_needed(&parse(TEXT)), expected);
    }
}
