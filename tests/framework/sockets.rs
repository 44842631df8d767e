//! Options of sockets for which nobody has a safe wrapper: the one place where they are set.
#![expect(unsafe_code, reason = "setsockopt(2) takes the address of a value")]

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

/// Sets an option whose value is a plain number, of the width that the kernel wants.
///
/// # Errors
/// If the kernel refuses.
pub fn set_option<T: aya::Pod>(socket: &impl AsFd, level: i32, option: i32, value: T) -> io::Result<()> {
    let (descriptor, size) = (socket.as_fd().as_raw_fd(), size_of::<T>() as u32);
    // SAFETY: the pointer is to plain data that lives for the call, and the size is its own.
    let done = unsafe { libc::setsockopt(descriptor, level, option, (&raw const value).cast(), size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
