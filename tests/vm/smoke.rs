//! The test machine is what it promises to be. If one of these fails, the other failures mean nothing.

use std::fs;
use std::io::{Read, Write};
use std::process::Command;

use anyhow::{Result, ensure};

/// The output of a program that has to succeed.
#[expect(clippy::disallowed_methods, reason = "looks at the kernel without patchswitch's own code")]
fn read(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// A boot of the wrong kernel would make every other result one about that kernel.
#[test]
fn the_kernel_is_the_one_asked_for() {
    let Ok(asked) = std::env::var("PATCHSWITCH_KERNEL") else {
        // Run on a host by hand: there is nothing that was asked for.
        return;
    };
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(release.starts_with(&format!("{asked}.")), "asked for {asked}, got {release}");
    assert!(release.trim().ends_with("-cloud-amd64"), "{release} is not Debian's cloud kernel");
}

#[test]
fn device_mapper_has_the_targets_of_a_clone() {
    let targets = read("dmsetup", &["targets"]).unwrap();
    for target in ["linear", "snapshot", "snapshot-origin", "snapshot-merge"] {
        let known = targets.lines().any(|line| line.split_whitespace().next() == Some(target));
        assert!(known, "no {target} in {targets}");
    }
}

#[test]
fn the_controllers_of_the_resource_table_are_there() {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap();
    for controller in ["cpu", "memory", "io", "pids"] {
        assert!(
            controllers.split_whitespace().any(|word| word == controller),
            "no {controller}: {controllers}"
        );
    }
}

#[test]
fn an_oci_runtime_is_there() {
    assert!(read("crun", &["--version"]).unwrap().starts_with("crun version "));
}

#[test]
fn bpf_and_its_type_information_are_there() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(mounts.lines().any(|line| line.contains(" /sys/fs/bpf bpf ")), "{mounts}");
    assert!(fs::metadata("/sys/kernel/btf/vmlinux").unwrap().len() > 0);
    assert_eq!(fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").unwrap().trim(), "1");
}

/// Recovery after a loss of power can only be tested if the loss is one: what was synced is there, memory is gone.
#[test]
fn a_reset_keeps_the_disks_and_forgets_the_memory() {
    let marker = b"written before the reset";
    let memory = "/run/patchswitch-smoke";
    let disk = patchswitch_tests::vm::scratch_disk().unwrap().unwrap();
    if patchswitch_tests::vm::phase().is_empty() {
        let mut disk = fs::File::options().write(true).open(&disk).unwrap();
        disk.write_all(marker).unwrap();
        disk.sync_all().unwrap();
        fs::write(memory, "").unwrap();
        patchswitch_tests::vm::reset("after").unwrap();
    }
    assert_eq!(patchswitch_tests::vm::phase(), "after");
    let mut found = vec![0; marker.len()];
    fs::File::open(&disk).unwrap().read_exact(&mut found).unwrap();
    assert_eq!(found, marker);
    assert!(!fs::exists(memory).unwrap());
}
