//! Every name that the kernel or the file system sees, made in one place.
//!
//! One prefix lets recovery and the tests find what is ours and nothing else. Lengths that the kernel limits are
//! proved here: a network link has 15 bytes (`IFNAMSIZ - 1`), a device-mapper name 127 (`DM_NAME_LEN - 1`).

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Where programs, maps and links are pinned. The version is the version of the map formats.
pub const PIN_ROOT: &str = "/sys/fs/bpf/patchswitch/v1";
/// Run-time files: sockets, held namespaces, locks. Gone after a boot.
pub const RUN_ROOT: &str = "/run/patchswitch";
/// Durable state: the store, disks, patches, logs.
pub const STATE_ROOT: &str = "/var/lib/patchswitch";
/// The cgroup below which every partition lives, relative to the cgroup root.
pub const CGROUP_ROOT: &str = "/patchswitch";

/// The longest [`Name`], in bytes. Leaves room for prefixes and suffixes in a device-mapper name.
pub const NAME_MAX: usize = 32;
const LINK_MAX: usize = 15;
/// "ps", eight hexadecimal digits, one letter.
const LINK_LEN: usize = 2 + 8 + 1;
const _: () = assert!(LINK_LEN <= LINK_MAX);
/// The longest name of a device of ours.
pub(crate) const DM_NAME_LEN: usize = "ps-".len() + NAME_MAX + 1 + NAME_MAX + "-clone".len();
const _: () = assert!(DM_NAME_LEN <= 127);

/// A name that a user gave to a partition, a service, a disk or an attachment.
///
/// Lower-case letters, digits and inner dashes, at most [`NAME_MAX`] bytes: safe as a path component, as a part of
/// a device-mapper name and of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// A text that is not a [`Name`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is not a name: 1 to {NAME_MAX} lower-case letters, digits or inner dashes, beginning with a letter"
)]
pub struct BadName(pub String);

impl Name {
    /// Checks a text and makes a name of it.
    ///
    /// # Errors
    /// [`BadName`] if the text is empty, too long, or has a byte that is not allowed.
    pub fn new(text: &str) -> Result<Self, BadName> {
        let bytes = text.as_bytes();
        let allowed = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
        let good = bytes.len() <= NAME_MAX
            && bytes.first().is_some_and(u8::is_ascii_lowercase)
            && bytes.last().is_some_and(|b| *b != b'-')
            && bytes.iter().all(allowed);
        if good { Ok(Self(text.to_owned())) } else { Err(BadName(text.to_owned())) }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for Name {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        Self::new(text)
    }
}

impl TryFrom<String> for Name {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        Self::new(&text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

/// The host-side link of a veth pair that leads into a partition: `ps`, a digest of the owner's name, `a` or `b`.
///
/// The name itself may be longer than a link's, so it is hashed; the link's alias carries it in full.
pub fn host_link(owner: &Name, slot: u8) -> String {
    let digest = Sha256::digest(owner.as_str().as_bytes());
    let letter = char::from(b'a' + (slot & 1));
    format!("ps{:02x}{:02x}{:02x}{:02x}{letter}", digest[0], digest[1], digest[2], digest[3])
}

/// The TAP device in whose queue packets wait for a partition that is not ready yet: as [`host_link`], with an `h`.
pub fn hold_link(owner: &Name) -> String {
    let digest = Sha256::digest(owner.as_str().as_bytes());
    format!("ps{:02x}{:02x}{:02x}{:02x}h", digest[0], digest[1], digest[2], digest[3])
}

/// Where the programs, maps and links of one attachment are pinned.
pub fn pin_dir(owner: &Name) -> PathBuf {
    PathBuf::from(PIN_ROOT).join(owner.as_str())
}

/// The bind mount that keeps the network namespace of one slot, and so its nsid, alive.
pub fn held_netns(owner: &Name, slot: u8) -> PathBuf {
    PathBuf::from(RUN_ROOT).join("netns").join(format!("{owner}-{}", char::from(b'a' + (slot & 1))))
}

/// The device-mapper device of a partition's disk.
pub fn dm_disk(partition: &Name, disk: &Name) -> String {
    format!("ps-{partition}-{disk}")
}

/// The network namespace of a partition, below `/run/netns`.
pub fn netns(partition: &Name) -> String {
    format!("ps-{partition}")
}

/// The cgroup of a partition, relative to the cgroup root.
pub fn cgroup(partition: &Name) -> String {
    format!("{CGROUP_ROOT}/{partition}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for bad in
            ["", "..", "a/b", "a.b", "A", "-a", "a-", "0a", "a b", "ä", "a\0", &"a".repeat(NAME_MAX + 1)]
        {
            assert_eq!(Name::new(bad), Err(BadName(bad.to_owned())), "{bad:?}");
        }
        for good in ["a", "web", "web-1", &"a".repeat(NAME_MAX)] {
            assert_eq!(Name::new(good).map(String::from).as_deref(), Ok(good));
        }
    }

    #[test]
    fn links_of_the_longest_name_fit_and_differ_by_slot() {
        let name = Name::new(&"n".repeat(NAME_MAX)).unwrap();
        assert_eq!(host_link(&name, 0).len(), LINK_LEN);
        assert_ne!(host_link(&name, 0), host_link(&name, 1));
    }
}
