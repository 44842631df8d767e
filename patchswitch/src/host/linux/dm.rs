//! Device-mapper, spoken to directly by ioctls on `/dev/mapper/control`.
//!
//! There is no libdevmapper and no udev in it: tables name devices by number, and the node `/dev/mapper/NAME` is made
//! here if nobody else has made it. Where udev runs it may replace the node by its own symlink at any moment; that is all
//! that it does: it is told with each event to look for nothing on our devices, since a clone's file system has the UUID and
//! the label of its original's.
//!
//! Every device of ours has a UUID that begins with [`UUID_PREFIX`] and ends with its name, and every call after
//! [`Dm::create`] finds its device by that UUID. A device of the same name that somebody else made is therefore out of reach
//! of all of them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::block::DeviceNumber;
use super::dm_ioctl::{self as wire, Answer, Call, Command};
use super::ioctl;
use crate::names::DM_NAME_LEN;

mod error;
mod node;

pub use super::dm_ioctl::{Malformed, Target};
pub use error::DmError;

/// What the UUID of every device of ours begins with.
///
/// There is no flag by which a device could be kept from those who look for file systems and volumes by reading all devices,
/// and a UUID of one's own means nothing to them. The private devices of Stratis are those that both libblkid
/// (`sysfs_devno_is_dm_private`) and LVM pass over, and its UUIDs have room for somebody's name.
pub const UUID_PREFIX: &str = "stratis-1-private-patchswitch-";

const _: () = assert!(UUID_PREFIX.len() + DM_NAME_LEN < wire::UUID_LEN);

const CONTROL: &str = "/dev/mapper/control";
/// Room for an answer: what is tried first, and what no answer of ours can need.
const ROOM: usize = 16 << 10;
const ROOM_LIMIT: usize = 16 << 20;

/// Whether a call changed anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It did.
    Changed,
    /// Everything was as asked for already.
    AlreadySo,
}

/// What becomes of a device that is removed while somebody has it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is gone.
    Gone,
    /// It goes when its last user closes it.
    Deferred,
}

/// What is done to a file system on a device, and to the writes under way, before the device stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspend {
    /// The file system is frozen (clean on disk), then writes under way are awaited. Costs grace periods of RCU.
    LockFs,
    /// Writes under way are awaited; a file system on the device stays as it is.
    NoLockFs,
    /// Neither: writes under way are put back into the queue, where the target can do that.
    NoFlush,
}

impl Suspend {
    const fn flags(self) -> u32 {
        match self {
            Self::LockFs => 0,
            Self::NoLockFs => wire::SKIP_LOCKFS,
            Self::NoFlush => wire::SKIP_LOCKFS | wire::NOFLUSH,
        }
    }
}

/// A device as the kernel has it at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// Its number.
    pub device: DeviceNumber,
    /// How many have it open; a mount is one.
    pub open_count: u32,
    /// How many events its targets have raised.
    pub event_nr: u32,
    /// Whether reads and writes are held back.
    pub suspended: bool,
    /// Whether it has a table in use.
    pub live: bool,
    /// Whether a table waits for the next resume.
    pub inactive: bool,
    /// Whether it goes with its last user.
    pub deferred: bool,
}

/// The way to device-mapper.
#[derive(Debug)]
pub struct Dm {
    control: File,
}

impl Dm {
    /// Opens `/dev/mapper/control`.
    ///
    /// # Errors
    /// [`DmError::NoDeviceMapper`].
    pub fn open() -> Result<Self, DmError> {
        let control =
            File::options().read(true).write(true).open(CONTROL).map_err(DmError::NoDeviceMapper)?;
        Ok(Self { control })
    }

    /// The version of the kernel's interface.
    ///
    /// # Errors
    /// [`DmError::Call`].
    pub fn version(&self) -> Result<[u32; 3], DmError> {
        Ok(self.header("ask for the version of", "", Call::new(Command::Version))?.version)
    }

    /// The version of a target, which loads its module if it is not loaded; `None` if the kernel does not have it.
    ///
    /// # Errors
    /// [`DmError::Call`].
    pub fn target_version(&self, kind: &str) -> Result<Option<[u32; 3]>, DmError> {
        const VERB: &str = "ask for the target of";
        let call = Call::new(Command::TargetVersion).name(kind).map_err(malformed(VERB, kind))?;
        match self.call(VERB, kind, call.sized(ROOM)) {
            Ok(bytes) => wire::target_version(&bytes).map(Some).map_err(malformed(VERB, kind)),
            // EINVAL is what the kernel says of an unknown target (get_target_version).
            Err(DmError::Call { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The names of all devices of ours.
    ///
    /// # Errors
    /// [`DmError::Call`], [`DmError::Malformed`].
    pub fn list(&self) -> Result<Vec<String>, DmError> {
        const VERB: &str = "list";
        let bytes = self.grow(VERB, "", || Ok(Call::new(Command::ListDevices)))?;
        let names = wire::devices(&bytes).map_err(malformed(VERB, ""))?;
        let mut ours = Vec::new();
        for (name, _device) in names {
            if self.info(&name)?.is_some() {
                ours.push(name);
            }
        }
        Ok(ours)
    }

    /// The state of a device of ours; `None` if there is none.
    ///
    /// # Errors
    /// [`DmError::Call`], [`DmError::Malformed`].
    pub fn info(&self, name: &str) -> Result<Option<Info>, DmError> {
        let verb = "look at";
        match self.header(verb, name, find(verb, name, Command::Status)?) {
            Ok(answer) => Ok(Some(Info::from(answer))),
            Err(DmError::NoDevice(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a device without a table.
    ///
    /// # Errors
    /// [`DmError::NotOurs`] if the name belongs to somebody else, [`DmError::Call`].
    pub fn create(&self, name: &str) -> Result<Done, DmError> {
        const VERB: &str = "create";
        let call = Call::new(Command::Create).name(name).and_then(|call| call.uuid(&uuid(name)));
        match self.call(VERB, name, call.map_err(malformed(VERB, name))?) {
            Ok(_answer) => Ok(Done::Changed),
            Err(DmError::Call { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {
                let found = self.info(name)?.is_some_and(|info| info.name == name);
                if found { Ok(Done::AlreadySo) } else { Err(DmError::NotOurs(name.to_owned())) }
            }
            Err(error) => Err(error),
        }
    }

    /// Puts a table beside the one in use, where it waits for the next resume. One that waits already is replaced.
    ///
    /// # Errors
    /// [`DmError::Call`] if a target does not accept its parameters, among others.
    pub fn load(&self, name: &str, table: &[Target]) -> Result<(), DmError> {
        const VERB: &str = "load a table into";
        // A second snapshot on the same COW device would be taken for a hand-over, so it must not wait beside a first.
        self.clear(name)?;
        let call = find(VERB, name, Command::TableLoad)?.targets(table).map_err(malformed(VERB, name))?;
        self.call(VERB, name, call).map(|_answer| ())
    }

    /// Drops the table that waits for the next resume, if one does.
    ///
    /// # Errors
    /// [`DmError::NoDevice`], [`DmError::Call`].
    pub fn clear(&self, name: &str) -> Result<(), DmError> {
        const VERB: &str = "clear the waiting table of";
        self.call(VERB, name, find(VERB, name, Command::TableClear)?).map(|_answer| ())
    }

    /// Holds reads and writes back until the device is resumed.
    ///
    /// Whoever calls this must see to it that the device is resumed even if he is killed: see
    /// [`Cutter`](super::cutter::Cutter). To change a table, [`Self::swap`] is enough.
    ///
    /// # Errors
    /// [`DmError::NoDevice`], [`DmError::Call`].
    pub fn suspend(&self, name: &str, how: Suspend) -> Result<(), DmError> {
        const VERB: &str = "suspend";
        let call = find(VERB, name, Command::Suspend)?.flags(wire::SUSPEND | how.flags());
        self.call(VERB, name, call).map(|_answer| ())
    }

    /// Lets reads and writes go on, through the table that waits if one does.
    ///
    /// # Errors
    /// [`DmError::NoDevice`], [`DmError::Call`].
    pub fn resume(&self, name: &str) -> Result<(), DmError> {
        const VERB: &str = "resume";
        self.call(VERB, name, find(VERB, name, Command::Suspend)?).map(|_answer| ())
    }

    /// Exchanges the table in use for the one that waits, in one call.
    ///
    /// The kernel suspends the device, exchanges the tables and resumes it (`do_resume`, `drivers/md/dm-ioctl.c`), so
    /// nobody can be killed in between. Writes under way are awaited. The file system is not frozen: the exchange is
    /// meant for tables that show the same content before and after.
    ///
    /// # Errors
    /// [`DmError::NoDevice`], [`DmError::Call`].
    pub fn swap(&self, name: &str) -> Result<(), DmError> {
        const VERB: &str = "exchange the table of";
        let call = find(VERB, name, Command::Suspend)?.flags(Suspend::NoLockFs.flags());
        self.call(VERB, name, call).map(|_answer| ())
    }

    /// As [`Self::swap`], for a table that holds writes back: they are done by the new one. A mirror holds those that one of its
    /// devices did not take, and would fail them if they were awaited (`hold_bio`, `drivers/md/dm-raid1.c`).
    ///
    /// # Errors
    /// As [`Self::swap`].
    pub fn swap_held(&self, name: &str) -> Result<(), DmError> {
        const VERB: &str = "exchange the table of";
        let call = find(VERB, name, Command::Suspend)?.flags(Suspend::NoFlush.flags());
        self.call(VERB, name, call).map(|_answer| ())
    }

    /// Waits until nobody has a device open; one that is not there is.
    ///
    /// # Errors
    /// [`DmError::Busy`] at the end of the time.
    pub fn wait_closed(&self, name: &str, limit: Duration) -> Result<(), DmError> {
        let start = Instant::now();
        loop {
            let open_count = self.info(name)?.map_or(0, |info| info.open_count);
            if open_count == 0 {
                return Ok(());
            }
            if start.elapsed() >= limit {
                return Err(DmError::Busy { name: name.to_owned(), open_count, waited: start.elapsed() });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Removes a device that nobody has open, and its node.
    ///
    /// # Errors
    /// [`DmError::Busy`] if somebody has, [`DmError::Call`].
    pub fn remove(&self, name: &str) -> Result<Done, DmError> {
        match self.remove_with(name, 0) {
            Ok(_answer) => node::remove(name).map(|()| Done::Changed),
            Err(DmError::NoDevice(_)) if node::is_of_others(name) => Ok(Done::AlreadySo),
            Err(DmError::NoDevice(_)) => node::remove(name).map(|()| Done::AlreadySo),
            Err(DmError::Call { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {
                let open_count = self.info(name)?.map_or(0, |info| info.open_count);
                Err(DmError::Busy { name: name.to_owned(), open_count, waited: Duration::ZERO })
            }
            Err(error) => Err(error),
        }
    }

    /// Removes a device now, or when its last user closes it. The node goes in either case.
    ///
    /// # Errors
    /// [`DmError::Call`].
    pub fn remove_deferred(&self, name: &str) -> Result<Removal, DmError> {
        // The kernel takes the flag out of its answer if the device went at once (dev_remove).
        let removal = match self.remove_with(name, wire::DEFERRED_REMOVE) {
            Ok(answer) if answer.flags & wire::DEFERRED_REMOVE != 0 => Removal::Deferred,
            Ok(_answer) => Removal::Gone,
            Err(DmError::NoDevice(_)) => return Ok(Removal::Gone),
            Err(error) => return Err(error),
        };
        node::remove(name).map(|()| removal)
    }

    /// Waits until nobody has the device open, then removes it.
    ///
    /// An unmount that has succeeded is no proof that a file system is gone: a process with a mount namespace of its
    /// own may hold a copy of the mount. The open count is the proof.
    ///
    /// # Errors
    /// [`DmError::Busy`] at the end of the time, [`DmError::Call`].
    pub fn remove_when_closed(&self, name: &str, limit: Duration) -> Result<Done, DmError> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(2);
        loop {
            let open_count = match self.remove(name) {
                Err(DmError::Busy { open_count, .. }) => open_count,
                done => return done,
            };
            if start.elapsed() >= limit {
                return Err(DmError::Busy { name: name.to_owned(), open_count, waited: start.elapsed() });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// The table in use.
    ///
    /// # Errors
    /// [`DmError::NoDevice`], [`DmError::Call`], [`DmError::Malformed`].
    pub fn table(&self, name: &str) -> Result<Vec<Target>, DmError> {
        self.lines("read the table of", name, wire::STATUS_TABLE)
    }

    /// The table that waits for the next resume; empty if none does.
    ///
    /// # Errors
    /// [`DmError::NoDevice`], [`DmError::Call`], [`DmError::Malformed`].
    pub fn waiting_table(&self, name: &str) -> Result<Vec<Target>, DmError> {
        self.lines("read the waiting table of", name, wire::STATUS_TABLE | wire::QUERY_INACTIVE)
    }

    /// What the targets in use say of themselves.
    ///
    /// # Errors
    /// [`DmError::NoDevice`], [`DmError::Call`], [`DmError::Malformed`].
    pub fn status(&self, name: &str) -> Result<Vec<Target>, DmError> {
        self.lines("read the status of", name, wire::NOFLUSH)
    }

    /// Tells the target that has a sector something; what, is between it and its driver.
    ///
    /// # Errors
    /// [`DmError::NoDevice`], [`DmError::Call`].
    pub fn message(&self, name: &str, sector: u64, text: &str) -> Result<(), DmError> {
        const VERB: &str = "send a message to";
        let call =
            find(VERB, name, Command::Message)?.message(sector, text).map_err(malformed(VERB, name))?;
        self.call(VERB, name, call).map(|_answer| ())
    }

    /// The path to open or mount a device by; its node is made if nobody has made it.
    ///
    /// # Errors
    /// [`DmError::NoDevice`], [`DmError::Node`].
    pub fn node(&self, name: &str) -> Result<PathBuf, DmError> {
        let info = self.info(name)?.ok_or_else(|| DmError::NoDevice(name.to_owned()))?;
        let path = node::path_of(name);
        if !node::leads_to(&path, info.device) {
            node::make(&path, info.device)?;
        }
        Ok(path)
    }

    pub(super) fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    #[cfg(test)]
    pub(super) fn over(control: File) -> Self {
        Self { control }
    }

    fn remove_with(&self, name: &str, flags: u32) -> Result<Answer, DmError> {
        const VERB: &str = "remove";
        self.header(VERB, name, find(VERB, name, Command::Remove)?.flags(flags))
    }

    fn lines(&self, verb: &'static str, name: &str, flags: u32) -> Result<Vec<Target>, DmError> {
        let bytes = self.grow(verb, name, || Ok(find(verb, name, Command::TableStatus)?.flags(flags)))?;
        let wanted =
            if flags & wire::QUERY_INACTIVE == 0 { wire::ACTIVE_PRESENT } else { wire::INACTIVE_PRESENT };
        // Without a table the kernel leaves the data as it was sent.
        if wire::flags(&bytes).map_err(malformed(verb, name))? & wanted == 0 {
            return Ok(Vec::new());
        }
        wire::targets(&bytes).map_err(malformed(verb, name))
    }

    fn header(&self, verb: &'static str, name: &str, call: Call) -> Result<Answer, DmError> {
        Answer::parse(&self.call(verb, name, call)?).map_err(malformed(verb, name))
    }

    /// Makes the same call with more and more room, until the answer fits.
    fn grow(
        &self,
        verb: &'static str,
        name: &str,
        make: impl Fn() -> Result<Call, DmError>,
    ) -> Result<Vec<u8>, DmError> {
        let mut room = ROOM;
        loop {
            let bytes = self.call(verb, name, make()?.sized(room))?;
            let full = wire::flags(&bytes).map_err(malformed(verb, name))? & wire::BUFFER_FULL != 0;
            if !full {
                return Ok(bytes);
            }
            if room >= ROOM_LIMIT {
                return Err(malformed(verb, name)(Malformed::Short("answer")));
            }
            room *= 4;
        }
    }

    fn call(&self, verb: &'static str, name: &str, mut call: Call) -> Result<Vec<u8>, DmError> {
        let command = call.command();
        ioctl::device_mapper(self.control(), command, call.bytes()).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::ENXIO) => DmError::NoDevice(name.to_owned()),
                _ => DmError::Call { verb, name: name.to_owned(), source },
            }
        })?;
        Ok(call.into_bytes())
    }
}

impl From<Answer> for Info {
    fn from(answer: Answer) -> Self {
        let has = |flag| answer.flags & flag != 0;
        Self {
            device: answer.device,
            open_count: answer.open_count,
            event_nr: answer.event_nr,
            suspended: has(wire::SUSPEND),
            live: has(wire::ACTIVE_PRESENT),
            inactive: has(wire::INACTIVE_PRESENT),
            deferred: has(wire::DEFERRED_REMOVE),
            name: answer.name,
        }
    }
}

/// A call that finds its device by our UUID.
pub(super) fn find(verb: &'static str, name: &str, command: Command) -> Result<Call, DmError> {
    Call::new(command).uuid(&uuid(name)).map_err(malformed(verb, name))
}

fn uuid(name: &str) -> String {
    format!("{UUID_PREFIX}{name}")
}

fn malformed<'n>(verb: &'static str, name: &'n str) -> impl Fn(Malformed) -> DmError + 'n {
    move |source| DmError::Malformed { verb, name: name.to_owned(), source }
}
