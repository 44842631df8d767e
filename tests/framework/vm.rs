//! For tests inside the test machine that need it to lose its power.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use patchswitch_guest::RESET_PORT;

/// How the serial numbers of the disks begin that the test machine gets; the first is 0.
const SERIAL: &str = "disk";

/// Which part of the test is to run: empty at first, and after [`reset`] what was given to it.
pub fn phase() -> String {
    std::env::var("PATCHSWITCH_VM_PHASE").unwrap_or_default()
}

/// Ends the machine as a power failure does. It starts again with its disks as they are, and the same test runs from
/// its beginning with [`phase`] returning `next`.
///
/// # Errors
/// If this is not the test machine. A real host is never reset.
pub fn reset(next: &str) -> Result<()> {
    let port = find_port()?.context("this is not the test machine: refusing to reset it")?;
    // Returns when the host has it.
    fs::File::options().write(true).open(port)?.write_all(next.as_bytes())?;
    fs::write("/proc/sysrq-trigger", "b")?;
    std::thread::sleep(Duration::from_secs(30));
    bail!("the machine did not reset")
}

/// The test machine's own disk, which is there to be overwritten; none outside of that machine.
///
/// It is found by the serial number that the machine gave it: a name such as `vdb` may be any disk.
///
/// # Errors
/// If this is the test machine and it has no such disk.
pub fn scratch_disk() -> Result<Option<PathBuf>> {
    disk(0)
}

/// One of the test machine's disks by its number, each as [`scratch_disk`].
///
/// # Errors
/// As [`scratch_disk`].
pub fn disk(number: u8) -> Result<Option<PathBuf>> {
    if find_port()?.is_none() {
        return Ok(None);
    }
    let wanted = format!("{SERIAL}{number}");
    for disk in fs::read_dir("/sys/block")? {
        let disk = disk?;
        if fs::read_to_string(disk.path().join("serial")).is_ok_and(|serial| serial.trim() == wanted) {
            return Ok(Some(PathBuf::from("/dev").join(disk.file_name())));
        }
    }
    bail!("the test machine has no disk with the serial number {wanted}")
}

fn find_port() -> Result<Option<PathBuf>> {
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else { return Ok(None) };
    for port in ports {
        let port = port?;
        if fs::read_to_string(port.path().join("name")).unwrap_or_default().trim() == RESET_PORT {
            return Ok(Some(PathBuf::from("/dev").join(port.file_name())));
        }
    }
    Ok(None)
}
