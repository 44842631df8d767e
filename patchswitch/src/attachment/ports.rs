//! The ports that the kernel gives to outgoing connections.
//!
//! Both partitions have the service's address. If the kernel may choose the same port on both, the serving one may open a
//! connection with the two ends of one that the retiring one still has; its answers go to the retiring one then. Partitions
//! of ours have a half each; what a guest has is for its owner to set.

use super::record::{Inside, Record};
use super::{AttachError, flows};
use crate::host::linux::netns::NetnsRef;
use crate::host::linux::sysctl;
use patchswitch_common::Slot;

/// The setting that says which they are.
pub(super) const SETTING: &str = "ipv4/ip_local_port_range";
/// A half for each partition.
pub(super) const HALVES: [&str; 2] = ["32768 46883", "46884 60999"];

/// Tells that the kernel may choose the same port in both guests, and how to prevent it.
pub(super) fn tell_of_overlap(record: &Record) {
    let [Some(first), Some(second)] = &record.slots else { return };
    let is_guest = |inside: &Inside| matches!(inside, Inside::Guest { .. });
    if !is_guest(&first.inside) && !is_guest(&second.inside) {
        return;
    }
    let range = |slot| -> Result<String, AttachError> {
        Ok(flows::netns(record, slot)?.run(|| sysctl::read(SETTING))??)
    };
    let (one, other) = match (range(Slot::A), range(Slot::B)) {
        (Ok(one), Ok(other)) => (one, other),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(
                "whether both partitions open connections from the same ports is not known: {error}"
            );
            return;
        }
    };
    if !overlap(&one, &other) {
        return;
    }
    let [first_half, second_half] = HALVES;
    tracing::warn!(
        "{} and {} open connections from the same ports ({} and {}): one that the serving one opens from the service's \
         address fails while the retiring one has a connection of the same two ends; next: {}; {}",
        first.netns,
        second.netns,
        shown(&one),
        shown(&other),
        command(&first.netns, first_half),
        command(&second.netns, second_half),
    );
}

/// The ends of a range, as the kernel writes them: two numbers with space between.
fn ends(range: &str) -> Option<(u16, u16)> {
    let mut numbers = range.split_whitespace().map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn shown(range: &str) -> String {
    range.split_whitespace().collect::<Vec<_>>().join(" to ")
}

fn overlap(one: &str, other: &str) -> bool {
    let (Some((a, b)), Some((c, d))) = (ends(one), ends(other)) else { return false };
    a <= d && c <= b
}

fn command(netns: &NetnsRef, range: &str) -> String {
    let path = match netns {
        NetnsRef::Named(name) => format!("/run/netns/{name}"),
        NetnsRef::Pid(pid) => format!("/proc/{pid}/ns/net"),
        NetnsRef::Path(path) => path.display().to_string(),
        NetnsRef::Own => "/proc/self/ns/net".to_owned(),
    };
    format!("nsenter --net={path} sysctl -w net.ipv4.ip_local_port_range='{range}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_have_a_port_in_common_overlap() {
        let [first, second] = HALVES;
        for (one, other, wanted) in [
            ("32768\t60999", "32768\t60999", true),
            ("1024 2000", "2000 3000", true),
            ("1024 2000", "1500 1500", true),
            ("1024 2000", "2001 3000", false),
            (first, second, false),
            (first, "32768 60999", true),
            ("", "32768 60999", false),
        ] {
            assert_eq!(overlap(one, other), wanted, "{one} {other}");
            assert_eq!(overlap(other, one), wanted, "{other} {one}");
        }
    }
}
