#![expect(unsafe_code, reason = "the requests of /dev/net/tun have no safe form")]
//! A TAP device (`Documentation/networking/tuntap.rst`): what the kernel sends through it comes out of a file, and what is
//! written into that file comes in as if a link had brought it.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETPERSIST: Opcode = 0x4004_54cb;
const IFF_TAP: i16 = 0x0002;
/// No four bytes of protocol before each frame.
const IFF_NO_PI: i16 = 0x1000;
/// `IFNAMSIZ`.
const NAME: usize = 16;

/// The file of a TAP device. The device stays when it is closed, with nothing in its queue.
#[derive(Debug)]
pub struct Tap(OwnedFd);

/// The first fields of `struct ifreq`; the kernel copies the whole of it.
#[repr(C)]
struct Request {
    name: [u8; NAME],
    flags: i16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == 40);

impl Tap {
    /// Whether there can be any. Asking loads the module, as the first device would.
    pub fn are_there() -> bool {
        file().is_ok()
    }

    /// Makes a TAP device in the calling thread's network namespace, or takes one that nobody has open. Nobody waits for a
    /// frame that is not there. Root only.
    ///
    /// # Errors
    /// What the kernel said: `EBUSY` while another process has it, `ENOENT` without the `tun` module.
    pub fn open(name: &str) -> io::Result<Self> {
        let file = file()?;
        let mut request = Request { name: [0; NAME], flags: IFF_TAP | IFF_NO_PI, rest: [0; 22] };
        if name.len() >= NAME {
            return Err(Errno::INVAL.into());
        }
        for (to, from) in request.name.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        // SAFETY: the request reads and writes a whole `struct ifreq`.
        unsafe { ioctl(&file, Attach(&mut request)) }?;
        // SAFETY: the request takes a number.
        unsafe { ioctl(&file, Persist) }?;
        Ok(Self(file))
    }

    /// The next frame, into a buffer that has room for it; its length, or nothing if there is none.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        match rustix::io::read(&self.0, frame) {
            Ok(length) => Ok(Some(length)),
            Err(Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Lets a frame come in. The kernel has done with it what it does when this returns.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        rustix::io::write(&self.0, frame)?;
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn file() -> rustix::io::Result<OwnedFd> {
    rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
}

struct Attach<'a>(&'a mut Request);

// SAFETY: `TUNSETIFF` reads a `struct ifreq` and writes it back, and a `Request` is as long.
unsafe impl Ioctl for Attach<'_> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        TUNSETIFF
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

struct Persist;

// SAFETY: `TUNSETPERSIST` takes its argument as a number, no address.
unsafe impl Ioctl for Persist {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        TUNSETPERSIST
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(1)
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}
