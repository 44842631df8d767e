//! Whether this process has a mount namespace that goes with it.

use std::fs;
use std::path::PathBuf;

/// So many ancestors are looked at; more is a circle, or somebody's joke.
const MOST: usize = 64;

/// Whether what is mounted here is seen by this process and its children alone, as after `ip netns exec`: then PID 1 has another
/// mount namespace. It may have rights that we have not, and not be looked at: then those who started us are asked.
pub fn is_private() -> bool {
    let Some(own) = namespace("self") else { return false };
    if let Some(first) = namespace("1") {
        return first != own;
    }
    let ancestors = std::iter::successors(parent("self"), |pid| parent(&pid.to_string()));
    let mut others = ancestors.take(MOST).filter_map(|pid| namespace(&pid.to_string()));
    others.any(|other| other != own)
}

fn namespace(process: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{process}/ns/mnt")).ok()
}

/// Nothing for the first process, whose parent is not here.
fn parent(process: &str) -> Option<u32> {
    parent_in(&fs::read_to_string(format!("/proc/{process}/stat")).ok()?).filter(|pid| *pid > 0)
}

/// Field 4 of `/proc/PID/stat` (`proc_pid_stat(5)`), behind the program's name, which may have spaces and parentheses in it.
fn parent_in(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_told_whatever_the_name_is() {
        assert_eq!(parent_in("7 (a) b (c) S 42 7 7 0"), Some(42));
        assert_eq!(parent_in("7 (init) S 0 1"), Some(0));
        assert_eq!(parent_in("7"), None);
        assert_eq!(parent("self"), Some(std::os::unix::process::parent_id()));
    }
}
