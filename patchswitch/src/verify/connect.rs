//! A TCP connection with a deadline, over a socket that somebody else made.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use super::{CannotTell, Reach, Stop};

/// A socket without options: a probe as any client of this host would make it.
///
/// # Errors
/// What `socket(2)` says.
pub fn plain_socket(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?)
}

/// Connects; the stream's reads and writes block, and [`limit`] bounds them.
pub(super) fn connect(address: SocketAddr, reach: Reach<'_>, end: Instant) -> Result<TcpStream, Stop> {
    let cannot = |source| Stop::CannotTell(CannotTell::Socket { address, source });
    let socket = (reach.open)(address).map_err(cannot)?;
    rustix::io::ioctl_fionbio(&socket, true).map_err(|errno| cannot(errno.into()))?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => established(&socket, address, end)?,
        Err(errno) => return Err(refused(address, errno)),
    }
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false).map_err(cannot)?;
    Ok(stream)
}

/// Sets the time that reads and writes may take to what is left of it.
pub(super) fn limit(stream: &TcpStream, end: Instant) -> io::Result<()> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    // The kernel counts in ticks; what rounds to 0 would mean "for ever".
    let left = left.max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))
}

fn established(socket: &OwnedFd, address: SocketAddr, end: Instant) -> Result<(), Stop> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut waiting = [PollFd::new(socket, PollFlags::OUT)];
        match poll(&mut waiting, Some(&timeout)) {
            Ok(0) => return Err(Stop::Fail(format!("{address} did not answer in time"))),
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(errno) => {
                return Err(Stop::CannotTell(CannotTell::Socket { address, source: errno.into() }));
            }
        }
    }
    match sockopt::socket_error(socket) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(errno)) => Err(refused(address, errno)),
        Err(errno) => Err(Stop::CannotTell(CannotTell::Socket { address, source: errno.into() })),
    }
}

/// Sorts errors of `connect(2)`: those that the other side causes, and ours.
fn refused(address: SocketAddr, errno: Errno) -> Stop {
    let source = io::Error::from(errno);
    match errno {
        Errno::CONNREFUSED | Errno::CONNRESET | Errno::CONNABORTED | Errno::TIMEDOUT | Errno::HOSTUNREACH => {
            Stop::Fail(format!("{address} did not accept a connection: {source}"))
        }
        _ => Stop::CannotTell(CannotTell::Unreachable { address, source }),
    }
}
