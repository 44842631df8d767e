//! Counters of the network stack of the calling thread's namespace (`/proc/net/snmp` and `/proc/net/netstat`).

use std::io;

/// One counter of a group. A kernel that does not have it: nothing.
///
/// # Errors
/// If the file cannot be read.
pub fn read(group: &str, name: &str) -> io::Result<Option<u64>> {
    // Not `self`: the process may be elsewhere.
    for file in ["/proc/thread-self/net/snmp", "/proc/thread-self/net/netstat"] {
        if let Some(count) = parse(&std::fs::read_to_string(file)?, group, name) {
            return Ok(Some(count));
        }
    }
    Ok(None)
}

/// Finds a counter in lines of names, each followed by one of values: `TcpExt: A B` and `TcpExt: 1 2`.
fn parse(text: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(':'));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split_whitespace().position(|one| one == name)?;
    values.split_whitespace().nth(at)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_by_its_group_and_name() {
        let text = "TcpExt: A B\nTcpExt: 1 2\nIpExt: B\nIpExt: 7\n";
        assert_eq!(parse(text, "TcpExt", "B"), Some(2));
        assert_eq!(parse(text, "IpExt", "B"), Some(7));
        assert_eq!(parse(text, "IpExt", "A"), None);
        assert_eq!(parse(text, "Tcp", "B"), None);
        assert_eq!(parse("TcpExt: A B\nTcpExt: 1\n", "TcpExt", "B"), None);
        assert_eq!(parse("TcpExt: A\n", "TcpExt", "A"), None);
    }

    #[test]
    fn this_kernel_has_one() {
        assert!(read("Tcp", "OutSegs").unwrap().is_some());
        assert!(read("TcpExt", "TCPTimeouts").unwrap().is_some());
        assert!(read("TcpExt", "NoSuchCounter").unwrap().is_none());
    }
}
