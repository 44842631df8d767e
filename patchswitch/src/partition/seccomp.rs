//! The system calls that a partition cannot make.
//!
//! A list of what is refused, not of what is allowed: the partition runs a whole system with its package manager,
//! and a call that a newer libc tries first must not end the service. Most of what is listed needs a capability that
//! the partition does not have; the filter is the second lock, and the only one where a call needs no privilege
//! (keyrings, BPF, user namespaces, tracing, rare protocols that load their module on demand). A refused call fails
//! with `EPERM`, unless a program has a way around that it takes for `ENOSYS` or `EAFNOSUPPORT`.

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const EAFNOSUPPORT: u32 = 97;

/// Keyrings are the host's, not the partition's: there is no namespace for them.
const KEYRINGS: &[&str] = &["add_key", "keyctl", "request_key"];
/// Code and counters in the host's kernel.
const KERNEL: &[&str] = &[
    "bpf",
    "create_module",
    "delete_module",
    "finit_module",
    "init_module",
    "kexec_file_load",
    "kexec_load",
    "lookup_dcookie",
    "perf_event_open",
    "query_module",
    "syslog",
    "userfaultfd",
];
/// The host as a whole: its clock, its swap, its power, its quotas, its ports.
const HOST: &[&str] = &[
    "acct",
    "clock_settime",
    "clock_settime64",
    "ioperm",
    "iopl",
    "nfsservctl",
    "pciconfig_iobase",
    "pciconfig_read",
    "pciconfig_write",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "vhangup",
];
/// Other processes' memory and descriptors: neither dpkg nor a service needs them, an intruder does.
const TRACING: &[&str] = &["kcmp", "pidfd_getfd", "process_vm_readv", "process_vm_writev", "ptrace"];
/// Files by handle lead past the mount to the whole file system.
const HANDLES: &[&str] = &["fanotify_init", "open_by_handle_at"];
/// Requests that are carried out past every filter of system calls.
const RINGS: &[&str] = &["io_uring_enter", "io_uring_register", "io_uring_setup"];
/// Interfaces that nothing current uses.
const OBSOLETE: &[&str] =
    &["_sysctl", "modify_ldt", "sysfs", "uselib", "ustat", "vm86", "vm86old", "move_pages", "migrate_pages"];
/// Mounting. systemd tries it and copes with the refusal of the capability; it is not filtered there.
const MOUNTS: &[&str] = &[
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "open_tree_attr",
    "pivot_root",
    "setns",
    "umount",
    "umount2",
];

/// `CLONE_NEWUSER` of `linux/sched.h`: inside a user namespace of its own everybody has every capability, and with
/// them the parts of the kernel that they guard.
const NEW_USER_NAMESPACE: u64 = 0x1000_0000;
/// Protocol families that services do use: `AF_UNIX`, `AF_INET`, `AF_INET6`, `AF_NETLINK`.
const FAMILIES: [u64; 4] = [1, 2, 10, 16];

/// The filter.
///
/// # Errors
/// If the OCI library refuses a value; never in practice.
pub(super) fn profile(systemd: bool) -> Result<LinuxSeccomp, OciSpecError> {
    let mut calls = vec![
        refuse(KEYRINGS, EPERM)?,
        refuse(KERNEL, EPERM)?,
        refuse(HOST, EPERM)?,
        refuse(TRACING, EPERM)?,
        refuse(HANDLES, EPERM)?,
        refuse(RINGS, ENOSYS)?,
        refuse(OBSOLETE, ENOSYS)?,
    ];
    if !systemd {
        calls.push(refuse(MOUNTS, EPERM)?);
    }
    // The flags of `clone3` are in memory, where a filter cannot look; libc falls back to `clone`.
    calls.push(refuse(&["clone3"], ENOSYS)?);
    for call in ["clone", "unshare"] {
        let flag = arg(LinuxSeccompOperator::ScmpCmpMaskedEq, NEW_USER_NAMESPACE)?;
        calls.push(refuse_if(call, flag, EPERM)?);
    }
    // The arguments of the 32-bit `socketcall` are in memory as well; libc falls back to `socket`.
    calls.push(refuse(&["socketcall"], ENOSYS)?);
    let highest = FAMILIES[FAMILIES.len() - 1];
    for family in (0..highest).filter(|family| !FAMILIES.contains(family)) {
        calls.push(refuse_if("socket", arg(LinuxSeccompOperator::ScmpCmpEq, family)?, EAFNOSUPPORT)?);
    }
    let above = arg(LinuxSeccompOperator::ScmpCmpGt, highest)?;
    calls.push(refuse_if("socket", above, EAFNOSUPPORT)?);
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActAllow)
        .architectures(architectures())
        .syscalls(calls)
        .build()
}

/// The machine's own calling conventions. A call by another one ends the process.
fn architectures() -> Vec<Arch> {
    if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86]
    }
}

fn refuse(names: &[&str], errno: u32) -> Result<LinuxSyscall, OciSpecError> {
    LinuxSyscallBuilder::default()
        .names(names.iter().map(ToString::to_string).collect::<Vec<_>>())
        .action(LinuxSeccompAction::ScmpActErrno)
        .errno_ret(errno)
        .build()
}

fn refuse_if(name: &str, arg: LinuxSeccompArg, errno: u32) -> Result<LinuxSyscall, OciSpecError> {
    let mut call = refuse(&[name], errno)?;
    call.set_args(Some(vec![arg]));
    Ok(call)
}

fn arg(operator: LinuxSeccompOperator, value: u64) -> Result<LinuxSeccompArg, OciSpecError> {
    let builder = LinuxSeccompArgBuilder::default().index(0_usize).value(value).op(operator);
    // For the masked comparison `value` is the mask and `value_two` what must be left of it.
    let masked = operator == LinuxSeccompOperator::ScmpCmpMaskedEq;
    if masked { builder.value_two(value).build() } else { builder.build() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn names(profile: &LinuxSeccomp) -> BTreeSet<String> {
        let calls = profile.syscalls().as_ref().unwrap();
        calls.iter().filter(|c| c.args().is_none()).flat_map(|c| c.names().clone()).collect()
    }

    #[test]
    fn the_dangerous_are_refused_and_mounting_only_without_systemd() {
        let own = names(&profile(false).unwrap());
        for call in ["bpf", "keyctl", "kexec_load", "init_module", "ptrace", "mount", "setns", "clone3"] {
            assert!(own.contains(call), "{call}");
        }
        let systemd = names(&profile(true).unwrap());
        assert!(systemd.contains("bpf") && !systemd.contains("mount"));
        assert!(systemd.is_subset(&own));
    }

    #[test]
    fn no_call_is_listed_twice() {
        let profile = profile(false).unwrap();
        let calls = profile.syscalls().as_ref().unwrap();
        let listed = calls.iter().filter(|c| c.args().is_none()).map(|c| c.names().len()).sum::<usize>();
        assert_eq!(listed, names(&profile).len());
    }

    #[test]
    fn every_family_but_the_four_is_refused() {
        let profile = profile(false).unwrap();
        let calls = profile.syscalls().as_ref().unwrap();
        let args: Vec<LinuxSeccompArg> = calls
            .iter()
            .filter(|call| call.names() == &["socket"])
            .flat_map(|call| call.args().clone().unwrap())
            .collect();
        let refused = |family: u64| {
            args.iter().any(|arg| match arg.op() {
                LinuxSeccompOperator::ScmpCmpEq => arg.value() == family,
                LinuxSeccompOperator::ScmpCmpGt => family > arg.value(),
                _ => panic!("another comparison"),
            })
        };
        for family in 0..64 {
            assert_eq!(refused(family), ![1, 2, 10, 16].contains(&family), "family {family}");
        }
    }
}
