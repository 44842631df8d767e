//! The agent's own mount namespace.
//!
//! A process that has its own mount namespace (`ip netns exec`, `unshare -m`, a service with `PrivateTmp`) keeps a
//! copy of every mount that existed when it began, and so keeps a partition's disk busy long after its `umount`.
//! Roots of partitions are therefore mounted in a namespace of ours, which nobody else copies. It is pinned by a bind
//! mount, so that several runs of the command line share it and it outlives all of them; it holds nothing but what
//! the OCI runtime needs, so that we in turn keep nobody else's disks busy.
//!
//! It is entered only on a thread that dies afterwards: a thread that has changed its namespace must never go back to
//! a pool. [`Inside`] is the proof of being there, and cannot leave that thread.
#![expect(unsafe_code, reason = "unshare has no safe wrapper")]

use std::fs::{self, File};
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::filesystem::{FileSystem, Kind};
use super::pidfd::Process;

mod graft;
mod private;
mod table;

pub use graft::Tree;
pub use private::is_private;
pub use table::{Mount, parse as parse_mountinfo};

/// `NSFS_MAGIC` of `linux/magic.h`: the file system of namespace files.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Why something could not be done in the mount namespace.
#[derive(Debug, thiserror::Error)]
pub enum MountNsError {
    /// The kernel refused.
    #[error("failed to {action} {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is nothing on the device that could be mounted here.
    #[error("{} has no file system that is known here: ext4, XFS or btrfs", .0.display())]
    NoFileSystem(PathBuf),
    /// The work on the dedicated thread panicked.
    #[error("failed to run in the mount namespace: the thread ended early")]
    Lost,
}

/// The pinned namespace, open.
#[derive(Debug)]
pub struct MountNamespace {
    file: File,
}

/// The proof that this thread is in the namespace. Not `Send`: it must not reach another thread.
#[derive(Debug)]
pub struct Inside {
    _this_thread: PhantomData<*const ()>,
}

impl MountNamespace {
    /// Opens the namespace that is pinned in this directory, making both if they are not there.
    ///
    /// The directory becomes a private mount point, because the kernel refuses to pin a mount namespace where the pin
    /// would propagate into it.
    ///
    /// # Errors
    /// [`MountNsError::Io`]. Whoever calls needs to be in the host's initial mount namespace, or at least always in
    /// the same one.
    pub fn open(dir: &Path) -> Result<Self, MountNsError> {
        let pin = pin(dir);
        fs::create_dir_all(dir).map_err(error("make", dir))?;
        let lock_path = dir.with_extension("lock");
        let lock = File::create(&lock_path).map_err(error("make", &lock_path))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(error("lock", &lock_path))?;
        if !is_namespace(&pin) {
            make(dir, &pin)?;
        }
        let file = File::open(&pin).map_err(error("open", &pin))?;
        Ok(Self { file })
    }

    /// The namespace that a process is in. It is looked into, and never pinned.
    ///
    /// # Errors
    /// [`MountNsError::Io`], also if the process has ended.
    pub fn of(process: &Process) -> Result<Self, MountNsError> {
        let path = PathBuf::from(format!("/proc/{}/ns/mnt", process.pid()));
        let file = File::open(&path).map_err(error("open", &path))?;
        // While it lives its number means no other process.
        if process.has_ended().map_err(error("look at", &path))? {
            return Err(error("open", &path)(io::Error::from(io::ErrorKind::NotFound)));
        }
        Ok(Self { file })
    }

    /// Undoes [`MountNamespace::open`]. Mounts inside go with the namespace when its last process ends. Whether there
    /// was anything to undo.
    ///
    /// # Errors
    /// [`MountNsError::Io`].
    pub fn remove(dir: &Path) -> Result<bool, MountNsError> {
        let pin = pin(dir);
        let pinned = is_namespace(&pin) && detach(&pin)?;
        let mounted = dir.is_dir() && detach(dir)?;
        for file in [pin.as_path(), &dir.with_extension("lock")] {
            absent_is_fine(fs::remove_file(file)).map_err(error("remove", file))?;
        }
        let existed = absent_is_fine(fs::remove_dir(dir)).map_err(error("remove", dir))?;
        Ok(pinned || mounted || existed)
    }

    /// Runs a piece of work inside, on a thread of its own. Programs that it starts are inside as well.
    ///
    /// # Errors
    /// [`MountNsError::Io`] if the namespace cannot be entered, [`MountNsError::Lost`] if the work panics.
    pub fn run<T: Send>(&self, work: impl FnOnce(&Inside) -> T + Send) -> Result<T, MountNsError> {
        let enter = || {
            // `setns` to a mount namespace wants a thread that shares its root and current directory with nobody.
            detach_thread(UnshareFlags::FS)?;
            rustix::thread::move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Mount))?;
            Ok(Inside { _this_thread: PhantomData })
        };
        let run = || match enter() {
            Ok(inside) => Ok(work(&inside)),
            Err(source) => {
                Err(MountNsError::Io { action: "enter", path: "the mount namespace".into(), source })
            }
        };
        std::thread::scope(|scope| scope.spawn(run).join()).unwrap_or(Err(MountNsError::Lost))
    }
}

impl Inside {
    /// Mounts the file system of a device, of a [kind](Kind) that is known here, `nosuid,nodev`, making the mount point.
    /// That it is mounted there already is fine; whether it was not.
    ///
    /// # Errors
    /// [`MountNsError::NoFileSystem`]; [`MountNsError::Io`], also if something else is mounted there.
    pub fn mount(&self, device: &Path, target: &Path, read_only: bool) -> Result<bool, MountNsError> {
        fs::create_dir_all(target).map_err(error("make", target))?;
        if let Some(present) = self.mount_at(target)? {
            let same = is_of(&present, device)? && present.read_only == read_only;
            let busy = io::Error::new(io::ErrorKind::ResourceBusy, "something else is mounted there");
            return if same { Ok(false) } else { Err(error("mount on", target)(busy)) };
        }
        let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
        flags.set(MountFlags::RDONLY, read_only);
        let found = FileSystem::read(device).map_err(error("read", device))?;
        let kind = found.ok_or_else(|| MountNsError::NoFileSystem(device.to_owned()))?.kind;
        rustix::mount::mount(device, target, kind.name(), flags, kind.options())
            .map_err(error("mount", device))?;
        Ok(true)
    }

    /// Unmounts what is mounted there and removes the mount point. Nothing mounted is fine; whether there was.
    ///
    /// # Errors
    /// [`MountNsError::Io`], e.g. because a process still uses it.
    pub fn unmount(&self, target: &Path) -> Result<bool, MountNsError> {
        let mounted = unmount(target, UnmountFlags::NOFOLLOW)?;
        absent_is_fine(fs::remove_dir(target)).map_err(error("remove", target))?;
        Ok(mounted)
    }

    /// The number by which the kernel tells the file system that is mounted there from others; of the directory's own if
    /// nothing is. Of btrfs it is not its device's.
    ///
    /// # Errors
    /// [`MountNsError::Io`].
    pub fn number_at(&self, target: &Path) -> Result<u64, MountNsError> {
        Ok(rustix::fs::stat(target).map_err(error("look at", target))?.st_dev)
    }

    /// What is mounted exactly there, if anything is.
    ///
    /// # Errors
    /// [`MountNsError::Io`].
    pub fn mount_at(&self, target: &Path) -> Result<Option<Mount>, MountNsError> {
        Ok(self.mounts()?.into_iter().rev().find(|mount| mount.target == target))
    }

    /// Everything that is mounted in the namespace.
    ///
    /// # Errors
    /// [`MountNsError::Io`].
    pub fn mounts(&self) -> Result<Vec<Mount>, MountNsError> {
        mounts()
    }
}

fn mounts() -> Result<Vec<Mount>, MountNsError> {
    // Not /proc/self: that is the main thread, which is in another namespace.
    let path = Path::new("/proc/thread-self/mountinfo");
    fs::read_to_string(path).map(|text| table::parse(&text)).map_err(error("read", path))
}

fn pin(dir: &Path) -> PathBuf {
    dir.join("ns")
}

fn is_namespace(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == NSFS_MAGIC)
}

/// Makes the namespace on a thread and pins it from this one, which stays where it is.
fn make(dir: &Path, pin: &Path) -> Result<(), MountNsError> {
    // Left by an agent that was killed half-way.
    while detach(dir)? {}
    rustix::mount::mount_bind(dir, dir).map_err(error("bind", dir))?;
    rustix::mount::mount_change(dir, MountPropagationFlags::PRIVATE).map_err(error("make private", dir))?;
    File::create(pin).map_err(error("make", pin))?;
    let made = std::thread::scope(|scope| {
        let (made, ready) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        scope.spawn(move || {
            let result = separate().map(|()| rustix::thread::gettid().as_raw_nonzero());
            let _ = made.send(result);
            // The namespace lives as long as this thread or its pin: stay until it is pinned.
            let _ = released.recv();
        });
        let thread = ready.recv().unwrap_or(Err(MountNsError::Lost))?;
        let source = format!("/proc/self/task/{thread}/ns/mnt");
        let pinned = rustix::mount::mount_bind(&source, pin).map_err(error("pin", pin));
        drop(release);
        pinned
    });
    if made.is_err() {
        detach(dir)?;
    }
    made
}

/// Moves this thread into a new mount namespace and lets go of every mount there that the runtime does not need.
fn separate() -> Result<(), MountNsError> {
    let root = Path::new("/");
    detach_thread(UnshareFlags::NEWNS | UnshareFlags::FS).map_err(error("make a namespace of", root))?;
    // What the host mounts later still shows up here (where the host shares it), nothing of ours shows up there.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change(root, slave).map_err(error("make a slave of", root))?;
    for target in table::not_needed(&mounts()?) {
        // One mount on top of another may be gone already together with it.
        detach(&target)?;
    }
    Ok(())
}

/// Unshares what belongs to this thread alone.
fn detach_thread(flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: the descriptor table stays shared (no FILES), which is the only thing the function warns of.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    Ok(())
}

fn detach(target: &Path) -> Result<bool, MountNsError> {
    unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}

/// `EINVAL` says that nothing is mounted there.
fn unmount(target: &Path, flags: UnmountFlags) -> Result<bool, MountNsError> {
    match rustix::mount::unmount(target, flags) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOENT) => Ok(false),
        Err(errno) => Err(error("unmount", target)(errno)),
    }
}

/// Whether a mount is of this device. btrfs has numbers of its own for its mounts, so there the source tells.
fn is_of(mount: &Mount, device: &Path) -> Result<bool, MountNsError> {
    let number = rustix::fs::stat(device).map_err(error("look at", device))?.st_rdev;
    let same_source = || rustix::fs::stat(&mount.source).is_ok_and(|source| source.st_rdev == number);
    let (major, minor) = mount.device;
    Ok(rustix::fs::makedev(major, minor) == number || (mount.kind == Kind::Btrfs.name() && same_source()))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn error<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl Fn(E) -> MountNsError {
    let path = path.to_owned();
    move |source| MountNsError::Io { action, path: path.clone(), source: source.into() }
}
