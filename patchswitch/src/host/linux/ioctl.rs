#![expect(
    unsafe_code,
    reason = "ioctl has no safe form: what the kernel reads and writes depends on the request"
)]
//! The ioctls of device-mapper and of loop devices, each as a function that is safe to call.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::dm_ioctl::{self, Command};

/// `_IOWR('X', 119, int)` and 120 (`include/uapi/linux/fs.h`).
pub(super) const FIFREEZE: u32 = 0xc004_5877;
pub(super) const FITHAW: u32 = 0xc004_5878;
const LOOP_CLR_FD: u32 = 0x4c01;
const LOOP_GET_STATUS64: u32 = 0x4c05;
const LOOP_SET_CAPACITY: u32 = 0x4c07;
const LOOP_CONFIGURE: u32 = 0x4c0a;
const LOOP_CTL_GET_FREE: u32 = 0x4c82;

/// The device goes away with its last user (`LO_FLAGS_AUTOCLEAR`).
pub(super) const LOOP_AUTOCLEAR: u32 = 4;
/// Reads and writes go past the page cache of the file's own file system (`LO_FLAGS_DIRECT_IO`).
pub(super) const LOOP_DIRECT_IO: u32 = 16;

/// `struct loop_info64` (`include/uapi/linux/loop.h`).
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct LoopInfo {
    /// The file's file system, as the kernel writes device numbers.
    pub(super) device: u64,
    /// The file.
    pub(super) inode: u64,
    rdevice: u64,
    /// Where in the file the device begins.
    pub(super) offset: u64,
    /// How much of the file it shows; 0 is all of it.
    pub(super) size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    /// What kind of loop device it is.
    pub(super) flags: u32,
    /// A note for `losetup`; the kernel does not use it.
    pub(super) file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo>() == 232 && offset_of!(LoopInfo, flags) == 52);
const _: () = assert!(size_of::<LoopConfig>() == 304 && offset_of!(LoopConfig, info) == 8);

/// Lets a frozen file system go on, by a directory of it; `EINVAL` if it is not frozen.
pub(super) fn thaw(directory: BorrowedFd<'_>) -> io::Result<()> {
    let mut unused: i32 = 0;
    // SAFETY: the kernel ignores the argument (`ioctl_fsthaw`, `fs/ioctl.c`); it gets a live integer all the same.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), FITHAW.into(), &raw mut unused) }).map(drop)
}

/// Calls device-mapper.
pub(super) fn device_mapper(control: BorrowedFd<'_>, command: Command, call: &mut [u8]) -> io::Result<()> {
    if !dm_ioctl::is_sound(call) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the kernel copies `data_size` bytes in and at most as many out (copy_params and ctl_ioctl in
    // drivers/md/dm-ioctl.c); `is_sound` has proved that the buffer has them. There are no pointers in it.
    check(unsafe {
        libc::ioctl(control.as_raw_fd(), command.request().into(), call.as_mut_ptr().cast::<c_void>())
    })
    .map(|_ok| ())
}

/// The number of a loop device that is free at this moment; it is made if there is none.
pub(super) fn loop_free(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: the request takes no argument.
    let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE.into()) })?;
    u32::try_from(number).map_err(io::Error::other)
}

/// Puts a file behind a loop device.
pub(super) fn loop_configure(device: BorrowedFd<'_>, file: &File, flags: u32, note: &[u8]) -> io::Result<()> {
    let fd = u32::try_from(file.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let mut config = LoopConfig { fd, block_size: 0, info: EMPTY, reserved: [0; 8] };
    config.info.flags = flags;
    // The last byte stays zero.
    let room = config.info.file_name.len() - 1;
    for (place, byte) in config.info.file_name.iter_mut().zip(&note[..note.len().min(room)]) {
        *place = *byte;
    }
    // SAFETY: the kernel reads one `struct loop_config`, which `config` is (layout asserted above), and keeps no
    // pointer to it; the file descriptor is open for the whole call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE.into(), &raw const config) }).map(|_ok| ())
}

/// What is behind a loop device; fails with `ENXIO` if nothing is.
pub(super) fn loop_status(device: BorrowedFd<'_>) -> io::Result<LoopInfo> {
    let mut info = EMPTY;
    // SAFETY: the kernel writes one `struct loop_info64`, which `info` is (layout asserted above).
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64.into(), &raw mut info) })?;
    Ok(info)
}

/// Has a loop device be as large as its file has become.
pub(super) fn loop_set_capacity(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY.into()) }).map(|_ok| ())
}

/// Takes the file away from a loop device, at once or when its last user closes it.
pub(super) fn loop_clear(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD.into()) }).map(|_ok| ())
}

const EMPTY: LoopInfo = LoopInfo {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    size_limit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; 64],
    crypt_name: [0; 64],
    encrypt_key: [0; 32],
    init: [0; 2],
};

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_claims_more_than_its_buffer_is_not_made() {
        let null = File::open("/dev/null").unwrap();
        let mut call = dm_ioctl::Call::new(Command::Version).sized(64);
        let length = call.bytes().len();
        let short = &mut call.bytes()[..length - 1];
        let error = device_mapper(null.as_fd(), Command::Version, short).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        // The whole one reaches the kernel, which says that this is no device-mapper.
        let error = device_mapper(null.as_fd(), Command::Version, call.bytes()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }
}
