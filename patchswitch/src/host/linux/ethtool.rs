#![expect(
    unsafe_code,
    reason = "ioctl has no safe form: what the kernel reads and writes depends on the request"
)]
//! Settings of network devices that have no place in rtnetlink (`ethtool(8)`), in the calling thread's namespace.

use std::io;
use std::os::fd::AsRawFd as _;

use socket2::{Domain, Socket, Type};

/// `ETHTOOL_GFLAGS` and `ETHTOOL_SGRO` of `linux/ethtool.h`.
const GET_FLAGS: u32 = 0x25;
const SET_GRO: u32 = 0x2c;
/// `ETH_FLAG_RXVLAN`.
const TAKES_TAGS_OUT: u32 = 1 << 8;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Lets a device join what it receives (generic receive offload). A veth that does takes frames that XDP redirected to
/// its peer; one that does not, and has no XDP program either, loses them without a word.
///
/// # Errors
/// What the kernel said.
pub fn join_received(link: &str) -> io::Result<()> {
    call(link, SET_GRO, 1).map(drop)
}

/// Whether a device takes the tags of VLANs out of frames (`rxvlan`): XDP would not see them.
///
/// # Errors
/// What the kernel said.
pub fn takes_tags_out(link: &str) -> io::Result<bool> {
    Ok(call(link, GET_FLAGS, 0)? & TAKES_TAGS_OUT != 0)
}

/// Asks a device; returns what the kernel wrote.
fn call(link: &str, command: u32, data: u32) -> io::Result<u32> {
    // Any socket will do.
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    let mut value = Value { command, data };
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: (&raw mut value).cast() },
    };
    // The last byte stays zero.
    if link.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(link.bytes()) {
        *place = byte.cast_signed();
    }
    // SAFETY: the kernel reads one `struct ifreq`, and reads and writes one `struct ethtool_value` behind its pointer, as
    // both commands say; both outlive the call, and it keeps no pointer to them.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value.data) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_asked_by_name() {
        assert!(!takes_tags_out("lo").unwrap());
        assert_eq!(takes_tags_out("nosuchlink").unwrap_err().raw_os_error(), Some(libc::ENODEV));
        let long = takes_tags_out("a-name-too-long-for-a-link").unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::InvalidInput);
    }
}
