//! The fence: waits until no running BPF program can have read an older phase word.
//!
//! An update of a map-in-map returns only after every non-sleepable program that was running has finished
//! (`maybe_wait_bpf_programs` in `kernel/bpf/syscall.c`); it is the kernel's documented way to ask for that. The maps
//! are made for one wait and have nothing to do with the programs' own.
#![expect(unsafe_code, reason = "aya makes no maps of maps without an object that declares them")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;

/// The beginning of `union bpf_attr` for `BPF_MAP_CREATE`.
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

/// The beginning of `union bpf_attr` for `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct Update {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

pub(super) fn wait() -> io::Result<()> {
    let inner = create(BPF_MAP_TYPE_ARRAY, 0)?;
    let outer = create(BPF_MAP_TYPE_ARRAY_OF_MAPS, inner.as_raw_fd())?;
    let (key, value) = (0u32, inner.as_raw_fd());
    let update = Update {
        map_fd: outer.as_raw_fd().unsigned_abs(),
        pad: 0,
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    // SAFETY: `key` and `value` are 4 bytes each, as both maps say, and outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &update) }.map(drop)
}

fn create(map_type: u32, inner: RawFd) -> io::Result<OwnedFd> {
    let attributes = Create {
        map_type,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        map_flags: 0,
        inner_map_fd: inner.unsigned_abs(),
    };
    // SAFETY: no pointers in the attributes.
    let fd = unsafe { bpf(BPF_MAP_CREATE, &attributes) }?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// Pointers inside `attributes` must be valid for what the command reads.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<RawFd> {
    let pointer = std::ptr::from_ref(attributes);
    // SAFETY: `attributes` is a prefix of `union bpf_attr`; the kernel takes the rest as zeroes. The caller vouches for
    // the pointers inside.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, size_of::<T>()) };
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}
