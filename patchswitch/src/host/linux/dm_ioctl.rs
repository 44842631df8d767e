//! The wire format of device-mapper's ioctls (`include/uapi/linux/dm-ioctl.h`), pure.
//!
//! A call is one buffer: a header, then data. The kernel answers in the same buffer, and what it wrote is treated as
//! input like any other: every offset is checked, nothing here can read outside the buffer or panic.

use std::ffi::CStr;
use std::mem::{offset_of, size_of};

use super::block::DeviceNumber;

/// `DM_NAME_LEN`, with the terminating zero.
const NAME_LEN: usize = 128;
/// `DM_UUID_LEN`, with the terminating zero.
pub(super) const UUID_LEN: usize = 129;
/// `DM_MAX_TYPE_NAME`, with the terminating zero.
const KIND_LEN: usize = 16;
/// Version of the interface this file is written for. The kernel wants the same major and a minor not above its own;
/// 4.27 (Linux 3.13) has deferred removal, the newest thing used in a buffer.
const INTERFACE: [u32; 3] = [4, 27, 0];

/// `struct dm_ioctl`. Never made: it gives the offsets.
#[repr(C)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; NAME_LEN],
    uuid: [u8; UUID_LEN],
    data: [u8; 7],
}

/// `struct dm_target_spec`. Never made: it gives the offsets.
#[repr(C)]
struct Spec {
    sector_start: u64,
    length: u64,
    status: i32,
    next: u32,
    target_type: [u8; KIND_LEN],
}

const _: () = assert!(size_of::<Header>() == 312);
const _: () = assert!(offset_of!(Header, data_size) == 12 && offset_of!(Header, flags) == 28);
const _: () = assert!(offset_of!(Header, dev) == 40 && offset_of!(Header, name) == 48);
const _: () = assert!(offset_of!(Header, uuid) == 176 && offset_of!(Header, data) == 305);
const _: () = assert!(size_of::<Spec>() == 40);
const _: () = assert!(offset_of!(Spec, next) == 20 && offset_of!(Spec, target_type) == 24);

/// Size of a call that carries no data.
pub(super) const CALL: usize = size_of::<Header>();
const SPEC: usize = size_of::<Spec>();

/// Calls, by the number the kernel gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Command {
    Version = 0,
    ListDevices = 2,
    Create = 3,
    Remove = 4,
    /// Suspends, or resumes: [`SUSPEND`] tells which.
    Suspend = 6,
    Status = 7,
    TableLoad = 9,
    TableClear = 10,
    TableStatus = 12,
    /// Tells a target something: `struct dm_target_msg`, a sector and a text.
    Message = 14,
    TargetVersion = 17,
}

impl Command {
    /// The request number: `_IOWR(0xfd, command, struct dm_ioctl)`.
    pub(super) const fn request(self) -> u32 {
        (3 << 30) | ((CALL as u32) << 16) | (0xfd << 8) | self as u32
    }
}

pub(super) const SUSPEND: u32 = 1 << 1;
pub(super) const STATUS_TABLE: u32 = 1 << 4;
pub(super) const ACTIVE_PRESENT: u32 = 1 << 5;
pub(super) const INACTIVE_PRESENT: u32 = 1 << 6;
pub(super) const BUFFER_FULL: u32 = 1 << 8;
pub(super) const SKIP_LOCKFS: u32 = 1 << 10;
pub(super) const NOFLUSH: u32 = 1 << 11;
pub(super) const QUERY_INACTIVE: u32 = 1 << 12;
pub(super) const DEFERRED_REMOVE: u32 = 1 << 17;

/// What udev is told with each event that follows from a call: leave the device alone. It comes as `DM_COOKIE` and is read by
/// the rules that dmsetup brings (`dmsetup udevflags`; `libdm/libdevmapper.h`): nothing of the subsystem's (LVM's scans),
/// no links below `/dev/disk`, nothing of others (file systems that mount themselves); and it is no event that repeats another.
const HIDDEN: u32 = UDEV_NO_SUBSYSTEM_RULES | UDEV_NO_DISK_RULES | UDEV_NO_OTHER_RULES | UDEV_PRIMARY_SOURCE;
const UDEV_NO_SUBSYSTEM_RULES: u32 = 1 << 1;
const UDEV_NO_DISK_RULES: u32 = 1 << 2;
const UDEV_NO_OTHER_RULES: u32 = 1 << 3;
const UDEV_PRIMARY_SOURCE: u32 = 1 << 6;
/// `DM_UDEV_FLAGS_SHIFT`: below it is the number of a semaphore, which nobody waits for here.
const UDEV_SHIFT: u32 = 16;

/// One line of a table or of a status: sectors `start` to `start + sectors` are of this kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// First sector, of 512 bytes.
    pub start: u64,
    /// Length in sectors.
    pub sectors: u64,
    /// Name of the target: `linear`, `snapshot`, …
    pub kind: String,
    /// The target's own parameters, or its status.
    pub params: String,
}

/// What of a call or an answer is not as it must be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Longer than the field of the kernel's structure, empty, or with a zero in it.
    #[error("{what} {text:?} is empty, too long or has a zero byte")]
    BadText {
        /// Which field.
        what: &'static str,
        /// Its text.
        text: String,
    },
    /// An offset or a length of the answer leads out of it.
    #[error("the kernel's answer is cut short at {0}")]
    Short(&'static str),
    /// A text of the answer is not UTF-8 or does not end.
    #[error("the kernel's answer has no text at {0}")]
    NoText(&'static str),
}

/// A call being put together.
#[derive(Clone, Debug)]
pub(super) struct Call {
    command: Command,
    bytes: Vec<u8>,
}

impl Call {
    pub(super) fn new(command: Command) -> Self {
        let mut call = Self { command, bytes: vec![0; CALL] };
        for (index, part) in INTERFACE.into_iter().enumerate() {
            put(&mut call.bytes, offset_of!(Header, version) + index * 4, &part.to_ne_bytes());
        }
        call.set(offset_of!(Header, data_start), CALL as u32);
        call.set(offset_of!(Header, data_size), CALL as u32);
        if matches!(command, Command::Suspend | Command::Remove) {
            // The kernel passes it on in the event of a resume or a removal (`dm_kobject_uevent`).
            call.set(offset_of!(Header, event_nr), HIDDEN << UDEV_SHIFT);
        }
        call
    }

    pub(super) fn command(&self) -> Command {
        self.command
    }

    pub(super) fn flags(mut self, flags: u32) -> Self {
        self.set(offset_of!(Header, flags), flags);
        self
    }

    pub(super) fn name(mut self, name: &str) -> Result<Self, Malformed> {
        let text = fitting("device name", name, NAME_LEN)?;
        put(&mut self.bytes, offset_of!(Header, name), text);
        Ok(self)
    }

    pub(super) fn uuid(mut self, uuid: &str) -> Result<Self, Malformed> {
        let text = fitting("device UUID", uuid, UUID_LEN)?;
        put(&mut self.bytes, offset_of!(Header, uuid), text);
        Ok(self)
    }

    /// Appends the lines of a table.
    pub(super) fn targets(mut self, targets: &[Target]) -> Result<Self, Malformed> {
        for target in targets {
            let kind = fitting("target type", &target.kind, KIND_LEN)?;
            if target.params.contains('\0') {
                return Err(Malformed::BadText { what: "target parameters", text: target.params.clone() });
            }
            let start = self.bytes.len();
            let next = (SPEC + target.params.len() + 1).next_multiple_of(8);
            self.bytes.resize(start + next, 0);
            put(&mut self.bytes, start + offset_of!(Spec, sector_start), &target.start.to_ne_bytes());
            put(&mut self.bytes, start + offset_of!(Spec, length), &target.sectors.to_ne_bytes());
            put(&mut self.bytes, start + offset_of!(Spec, next), &(next as u32).to_ne_bytes());
            put(&mut self.bytes, start + offset_of!(Spec, target_type), kind);
            put(&mut self.bytes, start + SPEC, target.params.as_bytes());
        }
        self.set(offset_of!(Header, target_count), targets.len() as u32);
        Ok(self.sized(0))
    }

    /// Appends a message for the target that has a sector.
    pub(super) fn message(mut self, sector: u64, text: &str) -> Result<Self, Malformed> {
        if text.is_empty() || text.contains('\0') {
            return Err(Malformed::BadText { what: "message", text: text.to_owned() });
        }
        self.bytes.extend(sector.to_ne_bytes());
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
        Ok(self.sized(0))
    }

    /// Makes room for an answer of so many bytes.
    pub(super) fn sized(mut self, room: usize) -> Self {
        let size = self.bytes.len().max(CALL + room);
        self.bytes.resize(size, 0);
        self.set(offset_of!(Header, data_size), size as u32);
        self
    }

    /// The buffer that the kernel reads and writes.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The buffer, when the kernel has answered.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The call as an array, if it carries no data: what a process that must not allocate keeps ready.
    pub(super) fn fixed(&self) -> Option<[u8; CALL]> {
        self.bytes.as_slice().try_into().ok()
    }

    fn set(&mut self, at: usize, value: u32) {
        put(&mut self.bytes, at, &value.to_ne_bytes());
    }
}

/// Says whether the kernel stays inside the buffer: it copies `data_size` bytes, and at least the header.
pub(super) fn is_sound(bytes: &[u8]) -> bool {
    let size = u32_at(bytes, offset_of!(Header, data_size), "size");
    bytes.len() >= CALL && size.is_ok_and(|size| size as usize >= CALL && size as usize <= bytes.len())
}

/// The header of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) version: [u32; 3],
    pub(super) flags: u32,
    pub(super) open_count: u32,
    pub(super) event_nr: u32,
    pub(super) targets: u32,
    pub(super) device: DeviceNumber,
    pub(super) name: String,
    pub(super) uuid: String,
}

impl Answer {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let word = |at| u32_at(bytes, at, "header");
        let version = offset_of!(Header, version);
        Ok(Self {
            version: [word(version)?, word(version + 4)?, word(version + 8)?],
            flags: word(offset_of!(Header, flags))?,
            // Signed in the kernel's structure, never negative.
            open_count: word(offset_of!(Header, open_count))?,
            event_nr: word(offset_of!(Header, event_nr))?,
            targets: word(offset_of!(Header, target_count))?,
            device: DeviceNumber::from_kernel(u64_at(bytes, offset_of!(Header, dev), "device")?),
            name: text_in(bytes, offset_of!(Header, name), NAME_LEN, "name")?,
            uuid: text_in(bytes, offset_of!(Header, uuid), UUID_LEN, "uuid")?,
        })
    }
}

/// The flags of an answer, which say whether the rest of it is complete.
pub(super) fn flags(bytes: &[u8]) -> Result<u32, Malformed> {
    u32_at(bytes, offset_of!(Header, flags), "flags")
}

/// The data of an answer.
fn data(bytes: &[u8]) -> Result<&[u8], Malformed> {
    let start = u32_at(bytes, offset_of!(Header, data_start), "data")? as usize;
    let size = u32_at(bytes, offset_of!(Header, data_size), "data")? as usize;
    bytes.get(start..size.min(bytes.len())).ok_or(Malformed::Short("data"))
}

/// The names in the answer to [`Command::ListDevices`]: records chained by an offset from their own start.
pub(super) fn devices(bytes: &[u8]) -> Result<Vec<(String, DeviceNumber)>, Malformed> {
    const NEXT: usize = 8;
    const NAME: usize = 12;
    let mut rest = data(bytes)?;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let device = u64_at(rest, 0, "device list")?;
        if device == 0 {
            break; // how an empty list is written
        }
        let next = u32_at(rest, NEXT, "device list")? as usize;
        found.push((text_in(rest, NAME, NAME_LEN, "device list")?, DeviceNumber::from_kernel(device)));
        if next == 0 {
            break;
        }
        // Only forward, past this record's head: a chain that goes round would never end.
        rest = rest.get(next.max(NAME)..).ok_or(Malformed::Short("device list"))?;
    }
    Ok(found)
}

/// The lines in the answer to [`Command::TableStatus`]: records chained by an offset from the start of the data.
pub(super) fn targets(bytes: &[u8]) -> Result<Vec<Target>, Malformed> {
    let data = data(bytes)?;
    let count = u32_at(bytes, offset_of!(Header, target_count), "target count")?;
    let mut found = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let rest = data.get(at..).ok_or(Malformed::Short("table"))?;
        let params = rest.get(SPEC..).ok_or(Malformed::Short("table"))?;
        found.push(Target {
            start: u64_at(rest, offset_of!(Spec, sector_start), "table")?,
            sectors: u64_at(rest, offset_of!(Spec, length), "table")?,
            kind: text_in(rest, offset_of!(Spec, target_type), KIND_LEN, "target type")?,
            params: text_in(params, 0, params.len(), "target parameters")?,
        });
        at = (u32_at(rest, offset_of!(Spec, next), "table")? as usize).max(at + SPEC);
    }
    Ok(found)
}

/// The version in the answer to [`Command::TargetVersion`].
pub(super) fn target_version(bytes: &[u8]) -> Result<[u32; 3], Malformed> {
    let data = data(bytes)?;
    let word = |at| u32_at(data, at, "target version");
    Ok([word(4)?, word(8)?, word(12)?])
}

fn fitting<'t>(what: &'static str, text: &'t str, room: usize) -> Result<&'t [u8], Malformed> {
    let bytes = text.as_bytes();
    if bytes.is_empty() || bytes.len() >= room || bytes.contains(&0) {
        return Err(Malformed::BadText { what, text: text.to_owned() });
    }
    Ok(bytes)
}

/// Writes where the caller has made room.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

fn u32_at(bytes: &[u8], at: usize, what: &'static str) -> Result<u32, Malformed> {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map(|field| u32::from_ne_bytes(*field)).ok_or(Malformed::Short(what))
}

fn u64_at(bytes: &[u8], at: usize, what: &'static str) -> Result<u64, Malformed> {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map(|field| u64::from_ne_bytes(*field)).ok_or(Malformed::Short(what))
}

/// A zero-terminated text, at most `room` bytes with its zero.
fn text_in(bytes: &[u8], at: usize, room: usize, what: &'static str) -> Result<String, Malformed> {
    let field = bytes.get(at..).map(|rest| &rest[..rest.len().min(room)]).ok_or(Malformed::Short(what))?;
    let text = CStr::from_bytes_until_nul(field).map_err(|_no_zero| Malformed::NoText(what))?;
    text.to_str().map(str::to_owned).map_err(|_not_utf8| Malformed::NoText(what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(start: u64, sectors: u64, kind: &str, params: &str) -> Target {
        Target { start, sectors, kind: kind.to_owned(), params: params.to_owned() }
    }

    /// What the kernel makes of a table: the same records, but with offsets from the start of the data.
    fn as_status(call: Call) -> Vec<u8> {
        let mut bytes = call.bytes;
        let mut at = CALL;
        while at < bytes.len() {
            let next = u32_at(&bytes, at + offset_of!(Spec, next), "").unwrap() as usize;
            let absolute = (at + next - CALL) as u32;
            put(&mut bytes, at + offset_of!(Spec, next), &absolute.to_ne_bytes());
            at += next;
        }
        bytes
    }

    #[test]
    fn request_numbers_are_the_kernel_headers() {
        // Taken from a C program that prints the macros of linux/dm-ioctl.h.
        assert_eq!(Command::Version.request(), 0xc138_fd00);
        assert_eq!(Command::Create.request(), 0xc138_fd03);
        assert_eq!(Command::Suspend.request(), 0xc138_fd06);
        let event = |command| Call::new(command).into_bytes()[offset_of!(Header, event_nr)..][..4].to_owned();
        assert_eq!(event(Command::Suspend), [0, 0, 0x4e, 0]);
        assert_eq!(event(Command::Remove), [0, 0, 0x4e, 0]);
        assert_eq!(event(Command::Create), [0; 4]);
        assert_eq!(Command::TableStatus.request(), 0xc138_fd0c);
        assert_eq!(Command::Message.request(), 0xc138_fd0e);
        assert_eq!(Command::TargetVersion.request(), 0xc138_fd11);
    }

    #[test]
    fn a_table_is_read_back_as_it_was_written() {
        let table = [
            line(0, 16, "linear", "7:0 0"),
            line(16, 1 << 40, "snapshot", "254:16 254:32 P 16"),
            line((1 << 40) + 16, 1, "error", ""),
        ];
        let call = Call::new(Command::TableLoad).name("x").unwrap().targets(&table).unwrap();
        assert!(is_sound(&call.bytes));
        assert_eq!(targets(&as_status(call)).unwrap(), table);
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        let call = || Call::new(Command::Create);
        for bad in ["", "a\0b", &"n".repeat(NAME_LEN)] {
            assert!(matches!(call().name(bad), Err(Malformed::BadText { .. })), "{bad:?}");
        }
        let longest = "n".repeat(NAME_LEN - 1);
        let mut call = call().name(&longest).unwrap().uuid("u").unwrap();
        assert_eq!(Answer::parse(call.bytes()).unwrap().name, longest);
        assert!(call.clone().targets(&[line(0, 1, "a-kind-of-16-let", "")]).is_err());
        assert!(call.targets(&[line(0, 1, "linear", "7:0\0 0")]).is_err());
    }

    #[test]
    fn a_message_is_a_sector_and_a_text() {
        let call = || Call::new(Command::Message).uuid("u").unwrap();
        let bytes = call().message(8, "mark x").unwrap().into_bytes();
        assert!(is_sound(&bytes));
        assert_eq!(&bytes[CALL..], [&8_u64.to_ne_bytes()[..], b"mark x\0"].concat());
        for bad in ["", "mark\0x"] {
            assert!(matches!(call().message(0, bad), Err(Malformed::BadText { .. })), "{bad:?}");
        }
    }

    #[test]
    fn an_answer_without_an_end_is_an_error() {
        let mut call = Call::new(Command::Status).name("x").unwrap();
        let name = offset_of!(Header, name);
        call.bytes()[name..name + NAME_LEN].fill(b'n');
        assert_eq!(Answer::parse(call.bytes()), Err(Malformed::NoText("name")));
        assert_eq!(Answer::parse(&call.bytes()[..100]), Err(Malformed::NoText("name")));
        assert_eq!(Answer::parse(&call.bytes()[..20]), Err(Malformed::Short("header")));
    }

    #[test]
    fn a_device_list_is_a_chain() {
        let mut call = Call::new(Command::ListDevices);
        let mut record = |device: u64, next: u32, name: &str| {
            let start = call.bytes.len();
            call.bytes.extend(device.to_ne_bytes());
            call.bytes.extend(next.to_ne_bytes());
            call.bytes.extend(name.as_bytes());
            call.bytes.resize(start + 40, 0);
        };
        record(DeviceNumber { major: 254, minor: 300 }.to_kernel(), 40, "ps-a-root");
        record(DeviceNumber { major: 254, minor: 1 }.to_kernel(), 0, "other");
        let bytes = call.sized(0).bytes;
        let names = devices(&bytes).unwrap();
        assert_eq!(names[0], ("ps-a-root".to_owned(), DeviceNumber { major: 254, minor: 300 }));
        assert_eq!(names[1].0, "other");
        assert_eq!(names.len(), 2);
        assert_eq!(devices(&Call::new(Command::ListDevices).sized(64).bytes).unwrap(), []);
    }

    proptest! {
        #[test]
        fn random_answers_are_parsed_or_refused(
            mut bytes in prop::collection::vec(any::<u8>(), 0..2048),
            count in 0u32..100,
            next in 0u32..600,
        ) {
            // Half-sensible headers get further than pure noise.
            put(&mut bytes, offset_of!(Header, data_start), &(CALL as u32).to_ne_bytes());
            put(&mut bytes, offset_of!(Header, target_count), &count.to_ne_bytes());
            put(&mut bytes, CALL + offset_of!(Spec, next), &next.to_ne_bytes());
            let lines = targets(&bytes).map_or(0, |lines| lines.len());
            prop_assert!(lines <= bytes.len() / SPEC);
            let names = devices(&bytes).map_or(0, |names| names.len());
            prop_assert!(names <= bytes.len() / 12 + 1);
            let parsed = Answer::parse(&bytes);
            prop_assert!(parsed.is_err() || bytes.len() >= CALL - 7);
            prop_assert_eq!(target_version(&bytes).is_ok(), data(&bytes).is_ok_and(|d| d.len() >= 16));
            prop_assert!(!is_sound(&bytes) || bytes.len() >= CALL);
        }

        #[test]
        fn pure_noise_is_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
            let bound = bytes.len();
            prop_assert!(targets(&bytes).map_or(0, |lines| lines.len()) <= bound);
            prop_assert!(devices(&bytes).map_or(0, |names| names.len()) <= bound);
        }
    }
}
