//! A partition with everything that belongs to it: how it is started and stopped.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Definition, Manager, ManagerError, Teardown};
use crate::host::linux::cutter::Mounts;
use crate::host::linux::dm::Dm;
use crate::host::linux::filesystem::Kind;
use crate::host::linux::mountns::{Inside, MountNamespace};
use crate::host::linux::netns::Netns;
use crate::host::linux::root::Root;
use crate::names::{self, Name, RUN_ROOT};
use crate::partition::define as content;
use crate::partition::lifecycle::{self, Started};
use crate::partition::spec::{PartitionSpec, Policy, ROOT_MOUNT};
use crate::storage::StorageError;
use crate::storage::disk::{self, Backing};
use crate::storage::merge;
use crate::storage::snapshot::{self, CloneOf};
use crate::store::{self, State};

/// How long a stopped partition's devices may take to be closed.
pub(crate) const CLOSE: Duration = Duration::from_secs(10);

/// A disk of a partition, as far as the store knows.
#[derive(Clone, Debug)]
pub struct MachineDisk {
    /// Its name among the partition's disks.
    pub name: Name,
    /// Size in sectors of 512 bytes; of a store, of the store.
    pub sectors: u64,
    /// What is behind it.
    pub backing: Backing,
    /// Set while the disk is a clone.
    pub clone: Option<CloneOf>,
}

/// A partition: its row and its disks.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its row in the resource table.
    pub row: store::Partition,
    /// What defines it.
    pub definition: Definition,
    /// Its disks, in the order of the definition.
    pub disks: Vec<MachineDisk>,
}

/// A partition that was started.
#[derive(Debug)]
pub struct Running {
    /// Its control channel and its init.
    pub started: Started,
}

impl Machine {
    pub(super) fn new(row: store::Partition, disks: Vec<store::Disk>) -> Result<Self, ManagerError> {
        let bad = |source: serde_json::Error| {
            ManagerError::io("read the definition in", "state.db")(std::io::Error::from(source))
        };
        let definition: Definition = serde_json::from_value(row.definition.clone()).map_err(bad)?;
        let order = |disk: &store::Disk| definition.spec.disks.iter().position(|d| d.name == disk.name);
        let mut disks = disks;
        disks.sort_by_key(order);
        let read = |disk: store::Disk| -> Result<MachineDisk, serde_json::Error> {
            Ok(MachineDisk {
                name: disk.name,
                sectors: disk.sectors,
                backing: serde_json::from_value(disk.backing)?,
                clone: disk.cow.map(serde_json::from_value).transpose()?,
            })
        };
        let disks = disks.into_iter().map(read).collect::<Result<_, _>>().map_err(bad)?;
        Ok(Self { row, definition, disks })
    }

    /// Its name.
    pub fn name(&self) -> &Name {
        &self.row.name
    }

    /// The logical computer.
    pub fn spec(&self) -> &PartitionSpec {
        &self.definition.spec
    }

    /// The clones that its disks are, empty if they are none.
    pub fn clones(&self) -> Vec<CloneOf> {
        self.disks.iter().filter_map(|disk| disk.clone.clone()).collect()
    }

    /// Whether it is a clone of the partition that serves, or was: its system disk is.
    pub fn is_clone(&self) -> bool {
        let root = self.spec().disks.iter().zip(&self.disks).find(|(disk, _)| disk.mount == ROOT_MOUNT);
        root.is_some_and(|(_, disk)| disk.clone.is_some())
    }

    /// Its disks as device-mapper has them when they are no clones.
    fn plain_disks(&self) -> impl Iterator<Item = disk::Disk> {
        self.disks.iter().filter(|disk| disk.clone.is_none()).map(|disk| plain(self.name(), disk))
    }

    /// Its network namespace's name below `/run/netns`.
    pub fn netns(&self) -> String {
        names::netns(self.name())
    }
}

impl Manager {
    /// Makes a partition's disks usable and returns their devices, in the order of the definition.
    pub(super) fn open_disks(&self, machine: &Machine) -> Result<Vec<PathBuf>, ManagerError> {
        let dm = Self::dm()?;
        machine.disks.iter().map(|disk| self.open_disk(&dm, machine, disk)).collect()
    }

    /// Makes one of them usable.
    pub(super) fn open_disk(
        &self,
        dm: &Dm,
        machine: &Machine,
        disk: &MachineDisk,
    ) -> Result<PathBuf, ManagerError> {
        if let Some(clone) = &disk.clone {
            let clone = std::slice::from_ref(clone);
            let paths = match merge::merging(dm, clone)? {
                Some(paths) => paths,
                None => {
                    let opened = snapshot::reopen(dm, clone)?;
                    for (one, of) in opened.iter().zip(clone) {
                        let _ = content::tell_apart(&one.path, &dm.node(&of.active)?)?;
                    }
                    opened.into_iter().map(|clone| clone.path).collect()
                }
            };
            return paths.into_iter().next().ok_or_else(|| StorageError::NoDisks.into());
        }
        let plain = plain(machine.name(), disk);
        let over = self.clones_over(machine)?;
        let over: Vec<CloneOf> = over.into_iter().filter(|clone| clone.active == plain.name).collect();
        if !over.is_empty() {
            // Written past its clone, the disk would silently change the clone as well.
            match snapshot::reopen(dm, &over) {
                Ok(_) => return Ok(dm.node(&plain.name)?),
                // There is nothing left that could be changed, and the disk is whole.
                Err(error) if snapshot::are_spent(dm, &over)? => {
                    tracing::warn!("{}", super::chain(&error));
                    // That of a clone that was lost only now is in use as it was.
                    if dm.info(&plain.name)?.is_some_and(|info| info.live) {
                        return Ok(dm.node(&plain.name)?);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(disk::activate(dm, &plain)?.path)
    }

    /// The clones that other partitions have of this one's disks.
    pub(super) fn clones_over(&self, machine: &Machine) -> Result<Vec<CloneOf>, ManagerError> {
        let names: Vec<String> = machine.plain_disks().map(|disk| disk.name).collect();
        let mut over = Vec::new();
        for row in self.store.partitions()? {
            let clones = self.machine(&row.name)?.clones();
            over.extend(clones.into_iter().filter(|clone| names.contains(&clone.active)));
        }
        Ok(over)
    }

    /// Takes a partition's disks out of the kernel. Clones, and what has been cloned, are left to commit and discard.
    pub(super) fn close_disks(&self, machine: &Machine) -> Result<(), ManagerError> {
        let dm = Self::dm()?;
        let over = self.clones_over(machine)?;
        let mut teardown = Teardown::default();
        for disk in machine.plain_disks().filter(|disk| over.iter().all(|clone| clone.active != disk.name)) {
            // One that was cut off goes when whoever has it open lets it go.
            if !dm.info(&disk.name)?.is_some_and(|info| info.deferred) {
                teardown.note(disk::deactivate(&dm, &disk, CLOSE));
            }
        }
        teardown.finish()
    }

    /// Mounts a partition's disks in the agent's mount namespace and returns the root.
    pub(super) fn mount(
        &self,
        mounts: &MountNamespace,
        machine: &Machine,
        devices: &[PathBuf],
        read_only: bool,
    ) -> Result<PathBuf, ManagerError> {
        let root = Self::root(machine.name());
        mounts.run(|inside| -> Result<(), ManagerError> {
            for (disk, device) in machine.spec().disks.iter().zip(devices) {
                inside.mount(device, &mount_point(machine, &disk.mount), read_only || disk.read_only)?;
            }
            Ok(())
        })??;
        Ok(root)
    }

    /// Unmounts a partition's disks. Not mounted: nothing to do.
    pub(super) fn unmount(&self, mounts: &MountNamespace, machine: &Machine) -> Result<(), ManagerError> {
        mounts.run(|inside| {
            let mut teardown = Teardown::default();
            for disk in machine.spec().disks.iter().rev() {
                teardown.note(inside.unmount(&mount_point(machine, &disk.mount)));
            }
            teardown.finish()
        })?
    }

    /// Has everything written out that a partition has written so far: the cut finds less to do then, while writers wait.
    pub(crate) fn write_out(&self, machine: &Machine) -> Result<(), ManagerError> {
        Self::mounts()?.run(|inside| {
            for disk in &machine.spec().disks {
                let at = mount_point(machine, &disk.mount);
                if inside.mount_at(&at)?.is_some() {
                    let failed = ManagerError::io("write out", &at);
                    let directory = std::fs::File::open(&at).map_err(ManagerError::io("open", &at))?;
                    rustix::fs::syncfs(&directory).map_err(|errno| failed(errno.into()))?;
                }
            }
            Ok(())
        })?
    }

    /// The mounts of a partition's disks whose file systems have to be frozen by them.
    pub(crate) fn to_be_frozen(&self, machine: &Machine) -> Result<Mounts, ManagerError> {
        let mut found = Mounts::new();
        Self::mounts()?.run(|inside| {
            for (spec, disk) in machine.spec().disks.iter().zip(&machine.disks) {
                let at = mount_point(machine, &spec.mount);
                if inside.mount_at(&at)?.is_some_and(|mount| mount.kind == Kind::Btrfs.name()) {
                    let directory = std::fs::File::open(&at).map_err(ManagerError::io("open", &at))?;
                    let _ = found.insert(names::dm_disk(machine.name(), &disk.name), directory);
                }
            }
            Ok(found)
        })?
    }

    /// Runs something in the mounted root of a partition that does not run, and unmounts it again.
    ///
    /// # Errors
    /// [`ManagerError`] of the mount, of the work, or of the unmount.
    pub fn with_root<T: Send>(
        &self,
        machine: &Machine,
        read_only: bool,
        work: impl FnOnce(&Inside, &Path) -> Result<T, ManagerError> + Send,
    ) -> Result<T, ManagerError> {
        let mounts = Self::mounts()?;
        let devices = self.open_disks(machine)?;
        let root = self.mount(&mounts, machine, &devices, read_only)?;
        let result = mounts.run(|inside| work(inside, &root))?;
        let unmounted = self.unmount(&mounts, machine);
        result.and_then(|value| unmounted.map(|()| value))
    }

    /// As [`Manager::with_root`], to write, with the root as a descriptor: the work is done in the host's own mount
    /// namespace, where the files are that are to be written.
    ///
    /// # Errors
    /// As [`Manager::with_root`].
    pub fn with_open_root<T>(
        &self,
        machine: &Machine,
        work: impl FnOnce(&Root) -> Result<T, ManagerError>,
    ) -> Result<T, ManagerError> {
        let mounts = Self::mounts()?;
        let devices = self.open_disks(machine)?;
        let path = self.mount(&mounts, machine, &devices, false)?;
        let result =
            mounts.run(|_| Root::open(&path))?.map_err(ManagerError::from).and_then(|root| work(&root));
        let unmounted = self.unmount(&mounts, machine);
        result.and_then(|value| unmounted.map(|()| value))
    }

    /// Starts a partition: disks, mounts, network namespace, processes. `quiet`: its singletons stay masked, because
    /// another partition runs them.
    ///
    /// # Errors
    /// [`ManagerError`]; what was started until then is stopped again.
    pub fn start(&mut self, machine: &Machine, quiet: bool) -> Result<Running, ManagerError> {
        let result = self.bring_up(machine, quiet);
        match result {
            Ok(running) => {
                let _ = self.store.set_partition_state(machine.name(), State::Running)?;
                Ok(running)
            }
            Err(error) => {
                let stopped = self.stop(machine);
                let _ = self.store.set_partition_state(machine.name(), State::Failed)?;
                if let Err(second) = stopped {
                    tracing::warn!(partition = %machine.name(), "failed to clean up: {}", super::chain(&second));
                }
                Err(error)
            }
        }
    }

    fn bring_up(&self, machine: &Machine, quiet: bool) -> Result<Running, ManagerError> {
        let mounts = Self::mounts()?;
        let devices = self.open_disks(machine)?;
        let root = self.mount(&mounts, machine, &devices, false)?;
        let netns = Netns::make(&machine.netns())?;
        let data = machine
            .spec()
            .application_disks()
            .map(|disk| lifecycle::data_mount(disk, &mount_point(machine, &disk.mount)));
        let site =
            lifecycle::Site { spec: machine.spec(), root: &root, netns: &netns, data: data.collect(), quiet };
        let started = lifecycle::start(self.runtime(), &mounts, &site)?;
        Ok(Running { started })
    }

    /// Stops a partition and takes everything of it out of the kernel but clones. Not running: nothing to do.
    ///
    /// # Errors
    /// [`ManagerError::Cleanup`] with all that failed.
    pub fn stop(&mut self, machine: &Machine) -> Result<(), ManagerError> {
        let mut teardown = Teardown::default();
        self.end(machine, &mut teardown)?;
        self.close(machine, teardown)
    }

    /// The second half of that: its disks, and that it is stopped.
    pub(super) fn close(&mut self, machine: &Machine, mut teardown: Teardown) -> Result<(), ManagerError> {
        teardown.note(self.close_disks(machine));
        teardown.finish()?;
        let _ = self.store.set_partition_state(machine.name(), State::Stopped)?;
        Ok(())
    }

    /// The first half: everything but its disks.
    pub(super) fn end(&self, machine: &Machine, teardown: &mut Teardown) -> Result<(), ManagerError> {
        let mounts = Self::mounts()?;
        teardown.note(lifecycle::stop(self.runtime(), &mounts, machine.spec(), self.config.job.stop));
        teardown.note(Netns::unmake(&machine.netns()));
        teardown.note(self.unmount(&mounts, machine));
        Ok(())
    }

    /// Restarts the processes of a partition; disks, mounts and network stay (patent step 708).
    ///
    /// # Errors
    /// [`ManagerError`].
    pub fn restart(&mut self, machine: &Machine, quiet: bool) -> Result<Running, ManagerError> {
        let mounts = Self::mounts()?;
        lifecycle::stop(self.runtime(), &mounts, machine.spec(), self.config.job.stop)?;
        self.bring_up(machine, quiet)
    }

    /// Waits until a started partition says that its service was started.
    ///
    /// # Errors
    /// [`ManagerError::Refused`] if it ends first or says nothing in time.
    pub fn wait_started(
        running: &mut Running,
        machine: &Machine,
        limit: Duration,
    ) -> Result<(), ManagerError> {
        let came_up = lifecycle::wait_started(&mut running.started, Instant::now() + limit)?;
        came_up.map_err(|reason| {
            ManagerError::refused(format!("partition {} did not come up: {reason}", machine.name()))
        })
    }
}

/// A disk as device-mapper has it when it is no clone.
pub(super) fn plain(partition: &Name, disk: &MachineDisk) -> disk::Disk {
    let name = names::dm_disk(partition, &disk.name);
    disk::Disk { name, backing: disk.backing.clone(), sectors: disk.sectors }
}

pub(super) fn mount_point(machine: &Machine, mount: &str) -> PathBuf {
    let root = Manager::root(machine.name());
    // The disks are mounted side by side on the host; the bundle puts them into each other.
    if mount == ROOT_MOUNT {
        root
    } else {
        root.with_file_name(format!("{}@{}", machine.name(), mount.trim_start_matches('/').replace('/', "-")))
    }
}

impl Manager {
    /// Directories that are common to all partitions and services go with what was last in them.
    pub(super) fn remove_empty_directories() {
        let run = Path::new(RUN_ROOT);
        for directory in ["roots", "oci", "partitions", "console", "netns", "lock"] {
            // One that is not empty is in use.
            let _ = std::fs::remove_dir(run.join(directory));
        }
        let _ = std::fs::remove_dir(run);
    }

    /// Whether a partition's init runs.
    ///
    /// # Errors
    /// [`ManagerError`].
    pub fn is_running(&self, machine: &Machine) -> Result<bool, ManagerError> {
        Ok(matches!(lifecycle::state(machine.name())?, lifecycle::State::Running { .. }))
    }

    /// Where a partition has its disks, and where the agent's mount namespace has them. Of those that go to whoever takes over,
    /// nothing can be left behind; `quiesced`: whether the service is, where it takes over.
    pub(crate) fn mount_points(machine: &Machine, quiesced: bool) -> Vec<(PathBuf, PathBuf)> {
        let goes = |policy: Policy| policy == Policy::Move || (quiesced && policy.goes_over());
        let disks = machine.spec().disks.iter().filter(|disk| !goes(disk.policy));
        disks.map(|disk| (PathBuf::from(&disk.mount), mount_point(machine, &disk.mount))).collect()
    }

    /// Gives a partition that was started quietly its share of the processor.
    pub(crate) fn full_speed(machine: &Machine) -> Result<(), ManagerError> {
        Ok(lifecycle::full_speed(machine.name())?)
    }

    /// Starts what was masked in a clone, now that the other partition has stopped.
    pub(crate) fn unmask(&self, machine: &Machine) -> Result<(), ManagerError> {
        let mounts = Self::mounts()?;
        Ok(lifecycle::unmask(self.runtime(), &mounts, machine.spec())?)
    }
}

impl Manager {
    /// Runs a command in a running partition.
    ///
    /// # Errors
    /// [`ManagerError::Runtime`], also at the end of its time.
    pub fn exec(
        &self,
        machine: &Machine,
        command: &[&str],
        limit: Duration,
    ) -> Result<crate::host::linux::runtime::Executed, ManagerError> {
        let mounts = Self::mounts()?;
        let runtime = self.runtime();
        Ok(mounts.run(|inside| runtime.exec(inside, machine.name().as_str(), command, limit))??)
    }
}
