//! Programs of somebody else, written instruction by instruction so that they owe nothing to the product or to its
//! library: each counts packets that it meets and lets all of them go on.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use patchswitch_tests::netlab::Ns;

const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const PROG_LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const LINK_CREATE: libc::c_long = 28;
const MAP_TYPE_ARRAY: u32 = 2;
/// `BPF_F_BEFORE`: at the head of the list.
const BEFORE: u32 = 1 << 3;
/// `XDP_FLAGS_SKB_MODE`.
const GENERIC: u32 = 1 << 1;
/// `XDP_FLAGS_DRV_MODE`.
const NATIVE: u32 = 1 << 2;

/// `BPF_PROG_TYPE_SCHED_CLS`.
const TC: u32 = 3;
/// `BPF_PROG_TYPE_XDP`.
const XDP: u32 = 6;
/// Counts only if `bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY)` is 1. (An error if nobody has verified a sum.)
const TWICE_VERIFIED: [u64; 3] = [
    // r2 = 0; call 135
    instruction(0xb7, 0x02, 0),
    instruction(0x85, 0, 135),
    // if r0 != 1, jump over the four slots that count
    instruction(0x55, 0, 1) | u64::from_ne_bytes([0, 0, 4, 0, 0, 0, 0, 0]),
];

/// Where a program is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Before all others of the TCX hook.
    TcxFirst,
    /// After all others.
    TcxLast,
    /// Behind the driver.
    XdpGeneric,
    /// In the driver.
    XdpNative,
}

impl Place {
    fn is_xdp(self) -> bool {
        matches!(self, Self::XdpGeneric | Self::XdpNative)
    }

    /// `BPF_XDP`, `BPF_TCX_INGRESS`.
    fn attach_type(self) -> u32 {
        if self.is_xdp() { 37 } else { 46 }
    }

    fn flags(self) -> u32 {
        match self {
            Self::TcxFirst => BEFORE,
            Self::TcxLast => 0,
            Self::XdpGeneric => GENERIC,
            Self::XdpNative => NATIVE,
        }
    }
}

/// A program that counts, in the kernel as long as this lives.
pub(crate) struct Counter {
    map: OwnedFd,
    program: OwnedFd,
    link: Option<OwnedFd>,
}

impl Counter {
    /// Puts a program of this name on the ingress of a link.
    pub(crate) fn on(ns: &Ns, link: &str, place: Place, name: &str) -> anyhow::Result<Self> {
        Self::load(name, place.is_xdp())?.attached(ns, link, place)
    }

    /// Counts, before all other programs at the ingress of a link, the packets of which one sum more than the first has
    /// been verified (`csum_level` is 1).
    pub(crate) fn twice_verified(ns: &Ns, link: &str) -> anyhow::Result<Self> {
        Self::with("twice_verified", TC, &TWICE_VERIFIED)?.attached(ns, link, Place::TcxFirst)
    }

    fn attached(mut self, ns: &Ns, link: &str, place: Place) -> anyhow::Result<Self> {
        let index = ns.enter(|| {
            let path = format!("/proc/thread-self/net/dev_snmp6/{link}");
            let text = std::fs::read_to_string(path)?;
            let index =
                text.lines().find_map(|line| line.strip_prefix("ifIndex")?.trim().parse::<u32>().ok());
            index.ok_or_else(|| anyhow::anyhow!("no link {link}"))
        })?;
        let attributes = LinkCreate {
            program: self.program.as_raw_fd().unsigned_abs(),
            target: index,
            attach_type: place.attach_type(),
            flags: place.flags(),
            rest: [0; 4],
        };
        // An index belongs to a namespace.
        // SAFETY: no pointers in the attributes.
        self.link = Some(ns.enter(|| Ok(unsafe { bpf(LINK_CREATE, &attributes) }?))?);
        Ok(self)
    }

    /// Loads a program that nothing calls yet.
    pub(crate) fn load(name: &str, xdp: bool) -> io::Result<Self> {
        Self::with(name, if xdp { XDP } else { TC }, &[])
    }

    /// Loads a program that counts if the instructions before that do not leave it.
    fn with(name: &str, program_type: u32, before: &[u64]) -> io::Result<Self> {
        let create = MapCreate { map_type: MAP_TYPE_ARRAY, key_size: 4, value_size: 8, max_entries: 1 };
        // SAFETY: no pointers in the attributes.
        let map = unsafe { bpf(MAP_CREATE, &create) }?;
        // "Go on": XDP_PASS, TC_ACT_UNSPEC.
        let verdict: i32 = if program_type == XDP { 2 } else { -1 };
        let count = [
            // r1 = address of the map's first value (BPF_PSEUDO_MAP_VALUE); two slots
            instruction(0x18, 0x21, map.as_raw_fd()),
            0,
            // r2 = 1; lock *(u64 *)r1 += r2
            instruction(0xb7, 0x02, 1),
            instruction(0xdb, 0x21, 0),
        ];
        let go_on = [instruction(0xb7, 0x00, verdict), instruction(0x95, 0, 0)];
        let instructions = [before, &count, &go_on].concat();
        let licence = c"GPL";
        let mut load = ProgLoad {
            program_type,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr().addr() as u64,
            licence: licence.as_ptr().addr() as u64,
            ..ProgLoad::default()
        };
        load.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: the instructions and the text outlive the call; the kernel reads as many as `count` says.
        let program = unsafe { bpf(PROG_LOAD, &load) }?;
        Ok(Self { map, program, link: None })
    }

    /// Gives the program a name in the BPF file system, for `tc`.
    pub(crate) fn pin(&self, path: &Path) -> anyhow::Result<()> {
        let text = std::ffi::CString::new(path.to_string_lossy().as_bytes())?;
        let attributes = ObjPin {
            path: text.as_ptr().addr() as u64,
            fd: self.program.as_raw_fd().unsigned_abs(),
            flags: 0,
        };
        // SAFETY: the path outlives the call.
        let pinned = unsafe { command(OBJ_PIN, &attributes) };
        Ok(pinned.map(drop)?)
    }

    /// How many packets it has met.
    pub(crate) fn count(&self) -> u64 {
        let (key, mut value) = (0_u32, 0_u64);
        let attributes = Lookup {
            map: self.map.as_raw_fd().unsigned_abs(),
            pad: 0,
            key: (&raw const key).addr() as u64,
            value: (&raw mut value).expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: `key` has 4 bytes and `value` 8, as the map says, and both outlive the call.
        unsafe { command(MAP_LOOKUP_ELEM, &attributes) }.unwrap();
        value
    }
}

/// One instruction: code, registers (source and destination), immediate value.
const fn instruction(code: u8, registers: u8, immediate: i32) -> u64 {
    let immediate = immediate.to_ne_bytes();
    u64::from_ne_bytes([code, registers, 0, 0, immediate[0], immediate[1], immediate[2], immediate[3]])
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    program_type: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log: [u32; 2],
    log_buffer: u64,
    version: [u32; 2],
    name: [u8; 16],
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    rest: [u32; 4],
}

#[repr(C)]
struct ObjPin {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct Lookup {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// # Safety
/// As [`command`].
unsafe fn bpf<T>(number: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for the pointers.
    let fd = unsafe { command(number, attributes) }?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// Pointers inside `attributes` must be valid for what the command reads and writes.
unsafe fn command<T>(number: libc::c_long, attributes: &T) -> io::Result<RawFd> {
    let pointer = std::ptr::from_ref(attributes);
    // SAFETY: `attributes` is a prefix of `union bpf_attr`, the rest counts as zeroes; the caller vouches for the
    // pointers inside.
    let result = unsafe { libc::syscall(libc::SYS_bpf, number, pointer, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(RawFd::try_from(result).unwrap_or(-1)) }
}
