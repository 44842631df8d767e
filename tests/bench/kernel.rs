//! `bpf(2)` for programs of a few instructions that are written down here, and for test runs of any program.
//!
//! They are what ours are compared with: no compiler, no loader, nothing in them but what is named.
#![expect(unsafe_code, reason = "bpf(2) is a system call that takes addresses as numbers")]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

const MAP_CREATE: libc::c_long = 0;
const PROG_LOAD: libc::c_long = 5;
const PROG_TEST_RUN: libc::c_long = 10;
const LINK_CREATE: libc::c_long = 28;
/// `BPF_PROG_TYPE_SCHED_CLS`.
const SCHED_CLS: u32 = 3;
const SKC_LOOKUP_TCP: i32 = 99;
const SK_RELEASE: i32 = 86;
const MAP_LOOKUP: i32 = 1;
const KTIME_BOOT: i32 = 125;
/// `BPF_MAP_TYPE_ARRAY`.
const ARRAY: u32 = 2;
/// `BPF_TCX_INGRESS`, and `BPF_F_BEFORE`: ahead of all that are there.
const TCX_INGRESS: u32 = 46;
const BEFORE: u32 = 1 << 3;
/// Loads of four bytes, two and one.
const WORD: u8 = 0x61;
const HALF: u8 = 0x69;
const BYTE: u8 = 0x71;
/// Where `struct __sk_buff` has the bounds of what lies in one piece.
const DATA: i16 = 76;
const DATA_END: i16 = 80;
/// `TC_ACT_UNSPEC`.
const NEXT: i32 = -1;

/// The part of `union bpf_attr` that loads a program.
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log: [u32; 4],
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// The part that makes a map.
#[repr(C)]
#[derive(Default)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// The part that makes a link at a TCX hook.
#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    pad: u32,
    expected_revision: u64,
}

/// The part that runs one.
#[repr(C)]
#[derive(Default)]
struct TestAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// An instruction: eight bytes.
const fn code(opcode: u8, registers: (u8, u8), offset: i16, immediate: i32) -> u64 {
    let (to, from) = registers;
    opcode as u64
        | ((from << 4 | to) as u64) << 8
        | (offset as u16 as u64) << 16
        | (immediate as u32 as u64) << 32
}

const fn set(to: u8, immediate: i32) -> u64 {
    code(0xb7, (to, 0), 0, immediate)
}

const fn copy(to: u8, from: u8) -> u64 {
    code(0xbf, (to, from), 0, 0)
}

/// Stores four bytes on the stack, as they are in memory.
fn store(offset: i16, bytes: [u8; 4]) -> u64 {
    code(0x62, (10, 0), offset, i32::from_ne_bytes(bytes))
}

const fn call(helper: i32) -> u64 {
    code(0x85, (0, 0), 0, helper)
}

const EXIT: u64 = code(0x95, (0, 0), 0, 0);

/// A program that does nothing.
///
/// # Errors
/// What the kernel said.
pub(crate) fn empty() -> io::Result<OwnedFd> {
    load(&[set(0, NEXT), EXIT])
}

/// A program that looks a flow up among the TCP sockets of a namespace, releases what it found, and does nothing.
///
/// # Errors
/// What the kernel said.
pub(crate) fn lookup(from: SocketAddr, to: SocketAddr, nsid: i32) -> io::Result<OwnedFd> {
    let tuple = tuple(from, to);
    let size = i16::try_from(tuple.len()).unwrap_or(0);
    let words = tuple.chunks_exact(4).zip((-size..0).step_by(4));
    let mut program = vec![copy(6, 1)];
    program.extend(words.map(|(word, at)| store(at, [word[0], word[1], word[2], word[3]])));
    program.extend([
        copy(2, 10),
        code(0x07, (2, 0), 0, i32::from(-size)),
        set(3, i32::from(size)),
        set(4, nsid),
        set(5, 0),
        copy(1, 6),
        call(SKC_LOOKUP_TCP),
        code(0x15, (0, 0), 2, 0),
        copy(1, 0),
        call(SK_RELEASE),
        set(0, NEXT),
        EXIT,
    ]);
    load(&program)
}

/// A map with a number of eight bytes for each port.
///
/// # Errors
/// What the kernel said.
pub(crate) fn array_of_ports() -> io::Result<OwnedFd> {
    let attr = MapAttr { map_type: ARRAY, key_size: 4, value_size: 8, max_entries: 1 << 16 };
    // SAFETY: the structure begins as the kernel's for this command and is as long as said.
    file(unsafe { libc::syscall(libc::SYS_bpf, MAP_CREATE, &raw const attr, size_of::<MapAttr>()) })
}

/// A program that writes down when each SYN to a port of TCP over IPv4 came, on the boot clock, by the client's port in
/// such a map, and does nothing else.
///
/// # Errors
/// What the kernel said.
pub(crate) fn syn_times(map: BorrowedFd<'_>, port: u16) -> io::Result<OwnedFd> {
    // Offsets of a frame without options, as the instructions load them: in the machine's byte order.
    const LOADED: [(u8, i16); 4] = [(HALF, 12), (BYTE, 23), (BYTE, 47), (HALF, 36)];
    let wanted = [0x0800_u16.to_be(), 6, 2, port.to_be()];
    let mut program = vec![
        copy(6, 1),
        code(WORD, (2, 6), DATA, 0),
        code(WORD, (3, 6), DATA_END, 0),
        copy(4, 2),
        code(0x07, (4, 0), 0, 54),
        // From each jump to the last two instructions.
        code(0x2d, (4, 3), 20, 0),
    ];
    for (at, ((size, offset), wanted)) in LOADED.into_iter().zip(wanted).enumerate() {
        let rest = 18 - 2 * i16::try_from(at).unwrap_or(0);
        program.extend([code(size, (5, 2), offset, 0), code(0x55, (5, 0), rest, i32::from(wanted))]);
    }
    program.extend([
        code(HALF, (5, 2), 34, 0),
        code(0xdc, (5, 0), 0, 16),
        code(0x63, (10, 5), -4, 0),
        code(0x18, (1, 1), 0, map.as_raw_fd()),
        0,
        copy(2, 10),
        code(0x07, (2, 0), 0, -4),
        call(MAP_LOOKUP),
        code(0x15, (0, 0), 3, 0),
        copy(7, 0),
        call(KTIME_BOOT),
        code(0x7b, (7, 0), 0, 0),
        set(0, NEXT),
        EXIT,
    ]);
    load(&program)
}

/// Has a program run at a link's ingress before all others, for as long as the result lives. In the caller's namespace.
///
/// # Errors
/// What the kernel said.
pub(crate) fn first_at_ingress(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    let attr = LinkAttr {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_ifindex: ifindex,
        attach_type: TCX_INGRESS,
        flags: BEFORE,
        ..LinkAttr::default()
    };
    // SAFETY: the structure begins as the kernel's for this command and is as long as said.
    file(unsafe { libc::syscall(libc::SYS_bpf, LINK_CREATE, &raw const attr, size_of::<LinkAttr>()) })
}

/// `struct bpf_sock_tuple`: addresses and then ports, in network byte order.
fn tuple(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::new();
    for end in [from, to] {
        match end.ip() {
            IpAddr::V4(address) => bytes.extend(address.octets()),
            IpAddr::V6(address) => bytes.extend(address.octets()),
        }
    }
    for end in [from, to] {
        bytes.extend(end.port().to_be_bytes());
    }
    bytes
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    let attr = LoadAttr {
        prog_type: SCHED_CLS,
        insn_cnt: u32::try_from(instructions.len()).unwrap_or(0),
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        ..LoadAttr::default()
    };
    // SAFETY: the structure begins as the kernel's for this command and is as long as said; the instructions and the
    // license outlive the call.
    file(unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const attr, size_of::<LoadAttr>()) })
}

/// The file that a call of bpf(2) made.
fn file(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: every caller passes what the kernel just gave it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(result).unwrap_or(-1)) })
}

/// What a test run said.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ran {
    /// What the program returned the last time.
    pub(crate) action: i32,
    /// How long one run took on average, in nanoseconds.
    pub(crate) ns: f64,
}

/// Sends a packet through a program so many times; what it changes stays changed for the next time.
///
/// # Errors
/// What the kernel said.
pub(crate) fn run(program: BorrowedFd<'_>, frame: &[u8], context: &[u8], repeat: u32) -> io::Result<Ran> {
    let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut attr = TestAttr {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        data_in: frame.as_ptr() as u64,
        data_size_in: size(frame),
        ctx_in: context.as_ptr() as u64,
        ctx_size_in: size(context),
        repeat,
        ..TestAttr::default()
    };
    // SAFETY: the structure begins as the kernel's for this command and is as long as said; it reads the packet and the
    // context, which outlive the call, and writes to the structure alone, as no room for a result is named.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_TEST_RUN, &raw mut attr, size_of::<TestAttr>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Ran { action: attr.retval.cast_signed(), ns: f64::from(attr.duration) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_what_the_kernel_reads() {
        // From `llvm-objdump` of the same in C: r0 = -1, exit, *(u32 *)(r10 - 4) = …, call 99.
        assert_eq!(set(0, -1).to_le_bytes(), [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(EXIT.to_le_bytes(), [0x95, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(store(-4, [1, 2, 3, 4]).to_le_bytes(), [0x62, 0x0a, 0xfc, 0xff, 1, 2, 3, 4]);
        assert_eq!(copy(1, 6).to_le_bytes(), [0xbf, 0x61, 0, 0, 0, 0, 0, 0]);
        let (from, to) = ("1.2.3.4:258".parse().unwrap(), "5.6.7.8:80".parse().unwrap());
        assert_eq!(tuple(from, to), [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 0, 80]);
        assert_eq!(tuple("[::1]:1".parse().unwrap(), "[::2]:2".parse().unwrap()).len(), 36);
        assert_eq!(call(SKC_LOOKUP_TCP).to_le_bytes(), [0x85, 0, 0, 0, 99, 0, 0, 0]);
    }
}
