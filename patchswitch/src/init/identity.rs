//! Gives a clone an identity of its own: machine-id and host keys (the host name is in the bundle).

use std::fs;
use std::io;

use super::paths::Paths;
use super::supervisor::{Ending, Supervisor, Task};
use crate::control::random_id;

/// Makes a new machine-id and new SSH host keys.
///
/// A root without them gets none. `ssh-keygen -A` makes exactly the keys that are missing.
pub(super) fn renew(paths: &Paths, supervisor: &mut Supervisor) -> io::Result<()> {
    let machine_id = format!("{}\n", random_id()?);
    for file in ["/etc/machine-id", "/var/lib/dbus/machine-id"] {
        let file = paths.at(file);
        // The second is often a link to the first.
        if fs::symlink_metadata(&file).is_ok_and(|found| found.is_file()) {
            fs::write(&file, &machine_id)?;
        }
    }
    if remove_host_keys(paths)?
        && let Some(program) = paths.program("ssh-keygen")
    {
        let mut command = super::supervisor::program(&program);
        command.arg("-A");
        match supervisor.run(Task::new(command)) {
            Ok(Ending::Exited(0)) => {}
            Ok(ending) => return Err(io::Error::other(format!("ssh-keygen {ending}"))),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether there were any.
fn remove_host_keys(paths: &Paths) -> io::Result<bool> {
    let entries = match fs::read_dir(paths.at("/etc/ssh")) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut removed = false;
    for entry in entries {
        let entry = entry?;
        if is_host_key(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path())?;
            removed = true;
        }
    }
    Ok(removed)
}

fn is_host_key(name: &str) -> bool {
    name.strip_prefix("ssh_host_").is_some_and(|rest| rest.ends_with("_key") || rest.ends_with("_key.pub"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_host_keys_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::below(Some(dir.path()));
        assert!(!remove_host_keys(&paths).unwrap());
        fs::create_dir_all(dir.path().join("etc/ssh")).unwrap();
        for file in ["ssh_host_rsa_key", "ssh_host_rsa_key.pub", "sshd_config", "ssh_known_hosts"] {
            fs::write(dir.path().join("etc/ssh").join(file), "").unwrap();
        }
        assert!(remove_host_keys(&paths).unwrap());
        let mut left: Vec<_> =
            fs::read_dir(dir.path().join("etc/ssh")).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["ssh_known_hosts", "sshd_config"]);
    }
}
