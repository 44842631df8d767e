//! What both partitions must have in common for a client not to notice which of them answers.
//!
//! Secrets of the kernel for sequence numbers, time stamps and SYN cookies are the host's, not a namespace's, so both
//! agree on them already (`net/core/secure_seq.c`, `net/ipv4/syncookies.c`). The key of TCP Fast Open is a
//! namespace's own (`net/ipv4/tcp_fastopen.c`, RFC 7413): it is copied, or a client's first segment after the switch would lose
//! its data and be sent again. Settings that clients see are compared: what a partition is set to is for its owner to
//! say, not for a switch to change.

use crate::host::linux::netns::Netns;
use crate::host::linux::sysctl::{self, SysctlError};

use super::AttachError;

const FAST_OPEN_KEY: &str = "ipv4/tcp_fastopen_key";

/// What a client sees of a partition's kernel settings (`Documentation/networking/ip-sysctl.rst`), of the last two by how
/// many may begin at once. The hop limit is one of each link: `ip6_dst_hoplimit` asks the one by which a packet leaves.
const SEEN: [&str; 12] = [
    "ipv4/ip_default_ttl",
    "ipv4/ip_no_pmtu_disc",
    "ipv4/tcp_ecn",
    "ipv4/tcp_fastopen",
    "ipv4/tcp_mtu_probing",
    "ipv4/tcp_sack",
    "ipv4/tcp_syncookies",
    "ipv4/tcp_timestamps",
    "ipv4/tcp_window_scaling",
    "ipv6/conf/LINK/hop_limit",
    "ipv4/tcp_max_syn_backlog",
    "core/somaxconn",
];

/// A setting's name where a partition's link is this one.
fn of_link(setting: &str, link: &str) -> String {
    setting.replace("LINK", link)
}

/// A partition's namespace, and its link to the clients.
pub(super) type Side<'a> = (&'a Netns, &'a str);

/// What a partition shows: the key, and the settings in their order. One that a kernel does not have is empty.
#[derive(Clone, Debug)]
struct Shown {
    key: String,
    settings: [String; SEEN.len()],
}

impl Shown {
    fn here(link: &str) -> Self {
        let read = |setting| sysctl::read(&of_link(setting, link)).unwrap_or_default();
        Self { key: read(FAST_OPEN_KEY), settings: SEEN.map(read) }
    }

    /// Whether anybody has listened with the key yet: else no client has a cookie.
    fn has_key(&self) -> bool {
        self.key.contains(|digit| matches!(digit, '1'..='9' | 'a'..='f'))
    }
}

/// Gives `to` the key of `from`, and tells in what the two differ. That they differ, or that the key cannot be copied,
/// is no reason not to switch: clients notice it at worst by one more round trip.
///
/// Each namespace is entered once: this is done right before a switch, and clients want the processor.
pub(super) fn prepare((from, from_link): Side<'_>, (to, to_link): Side<'_>) {
    let shown = || -> Result<(Shown, Shown), AttachError> {
        let serving = from.run(|| Shown::here(from_link))?;
        let next = to.run(|| adopt(&serving, to_link))??;
        Ok((serving, next))
    };
    let (serving, next) = match shown() {
        Ok(both) => both,
        Err(error) => {
            tracing::warn!("{error}: clients with TCP Fast Open take one round trip more");
            return;
        }
    };
    for (setting, from, to) in differences(&serving, &next) {
        let setting = of_link(&setting.replace('/', "."), to_link);
        tracing::warn!(
            "net.{setting} is {from} in the partition that serves and {to} in the one that takes over"
        );
    }
}

/// Inside the partition that takes over.
fn adopt(serving: &Shown, link: &str) -> Result<Shown, SysctlError> {
    let shown = Shown::here(link);
    if serving.has_key() && serving.key != shown.key {
        sysctl::write(FAST_OPEN_KEY, &serving.key)?;
    }
    Ok(shown)
}

/// What one side does not have, it does not show: IPv6 may be off, or the link be gone of a side that is lost.
fn differences<'a>(from: &'a Shown, to: &'a Shown) -> impl Iterator<Item = (&'static str, &'a str, &'a str)> {
    let pairs = SEEN.into_iter().zip(from.settings.iter().zip(&to.settings));
    pairs
        .filter(|(_, (from, to))| from != to && !from.is_empty() && !to.is_empty())
        .map(|(setting, (from, to))| (setting, from.as_str(), to.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(key: &str, timestamps: &str) -> Shown {
        let settings =
            SEEN.map(|name| if name.ends_with("timestamps") { timestamps } else { "1" }.to_owned());
        Shown { key: key.to_owned(), settings }
    }

    #[test]
    fn what_differs_is_named_with_both_values() {
        let (one, other) = (shown("", "1"), shown("", "0"));
        assert_eq!(differences(&one, &other).collect::<Vec<_>>(), [("ipv4/tcp_timestamps", "1", "0")]);
        assert_eq!(differences(&one, &one.clone()).count(), 0);
        // Of a side that is lost nothing can be read.
        assert_eq!(differences(&shown("", ""), &one).chain(differences(&one, &shown("", ""))).count(), 0);
    }

    #[test]
    fn a_key_of_zeroes_is_none() {
        assert!(!shown("00000000-00000000-00000000-00000000", "1").has_key());
        assert!(shown("00000000-00000000-00a00000-00000000", "1").has_key());
        assert!(!shown("", "1").has_key());
    }
}
