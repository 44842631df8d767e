//! Processes killed while a disk is suspended. Whoever dies, writers go on within two seconds.
//!
//! The second of the two disks stands on a device whose writes take 30 ms each, and to freeze its file system takes
//! about ten: meanwhile the first disk is suspended, and there is time to kill somebody.

use std::fs;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use patchswitch::host::linux::cutter::{CutError, Mounts};
use patchswitch::host::linux::dm::Dm;
use patchswitch::storage::disk::{Active, Backing, Disk, Room, activate};
use patchswitch::storage::snapshot::{CloneOf, Cut, WhenBusy, clone_disks, clone_mounted, discard};
use patchswitch::storage::{Failed, StorageError};

use super::lab::{LIMIT, Lab, Mount, assert_clean, dm_name, sh, wait_until};

const SLOW: &str = "ps-lab-slow";
const DELAY_MILLIS: u64 = 30;
const PROMISE: Duration = Duration::from_secs(2);
const JOB: &str = "PATCHSWITCH_TEST_JOB";

struct Stage {
    lab: Lab,
    disks: [Disk; 2],
    active: [Active; 2],
    mounts: [Mount; 2],
    clones: [CloneOf; 2],
    /// By which a file system is frozen that device-mapper does not freeze.
    frozen: Mounts,
}

impl Stage {
    fn set() -> Self {
        Self::with("mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0", 32)
    }

    /// The first disk has this file system.
    fn with(mkfs: &str, mib: u64) -> Self {
        let lab = Lab::new();
        let (fast, fast_active) = lab.disk("a", "root", mib);
        sh(&format!("{mkfs} {}", fast_active.path.display()));
        let sectors = 32 << 11;
        let backing = lab.image("slow-image", sectors, Room::Sparse);
        let under = backing.attach().unwrap();
        sh(&format!(
            "dmsetup create {SLOW} --table '0 {sectors} linear {} 0' && dmsetup mknodes",
            under.device()
        ));
        drop(under);
        let device = format!("/dev/mapper/{SLOW}");
        let slow = Disk { name: dm_name("a", "data"), backing: Backing::Device(device.into()), sectors };
        let slow_active = activate(&lab.dm, &slow).unwrap();
        sh(&format!("mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {}", slow_active.path.display()));
        let mounts = [lab.mount(&fast_active.path, "fast"), lab.mount(&slow_active.path, "slow")];
        let clones = [lab.clone_of(&fast, "b", "root"), lab.clone_of(&slow, "b", "data")];
        let directory = fs::File::open(&mounts[0].0).unwrap();
        let frozen = if mkfs.contains("btrfs") {
            Mounts::from([(fast.name.clone(), directory)])
        } else {
            Mounts::new()
        };
        let stage =
            Self { lab, disks: [fast, slow], active: [fast_active, slow_active], mounts, clones, frozen };
        stage.delay(DELAY_MILLIS);
        stage
    }

    /// Sets how long a write to the slow device takes.
    fn delay(&self, millis: u64) {
        let line = sh(&format!("dmsetup table {SLOW}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        let (sectors, device) = (words[1], words[3]);
        let table = match millis {
            0 => format!("0 {sectors} linear {device} 0"),
            _ => format!("0 {sectors} delay {device} 0 0 {device} 0 {millis}"),
        };
        sh(&format!("dmsetup load {SLOW} --table '{table}' && dmsetup resume --nolockfs {SLOW}"));
        if millis > 0 {
            // Something that the cut has to write out.
            fs::write(self.mounts[1].0.join("dirty"), vec![1; 4096]).unwrap();
        }
    }

    fn suspended(&self) -> bool {
        self.lab.dm.info(&self.disks[0].name).unwrap().unwrap().suspended
    }

    /// Waits for the moment in which the first disk stands still.
    fn wait_suspended(&self) -> Instant {
        let start = Instant::now();
        while !self.suspended() {
            assert!(start.elapsed() < LIMIT, "the disk was never suspended");
        }
        Instant::now()
    }

    /// Both disks take a write again, and how long after the suspend that was.
    fn assert_serving(&self, since: Instant) {
        let first = self.mounts[0].0.join("alive");
        let mut file = fs::File::create(first).unwrap();
        file.write_all(b"alive").unwrap();
        file.sync_all().unwrap();
        let stood = since.elapsed();
        println!("the first disk took a write {stood:?} after it was suspended");
        assert!(stood < PROMISE, "stood still for {stood:?}");
        wait_until("both disks go on", PROMISE, || {
            sh("dmsetup info -c --noheadings -o suspended").lines().all(|line| line.trim() == "Active")
        });
    }

    fn end(mut self) {
        self.delay(0);
        fs::write(self.mounts[1].0.join("alive"), "alive").unwrap();
        let is_btrfs = !self.frozen.is_empty();
        self.frozen.clear();
        self.mounts.into_iter().for_each(Mount::unmount);
        for disk in &self.disks {
            assert_eq!(self.lab.kind(&disk.name), "linear");
        }
        match is_btrfs {
            true => drop(sh(&format!("btrfs check -q --readonly {} 2>&1", self.active[0].path.display()))),
            false => assert_clean(&self.active[0].path),
        }
        assert_clean(&self.active[1].path);
        let [fast, slow] = &self.disks;
        patchswitch::storage::disk::deactivate(&self.lab.dm, slow, LIMIT).unwrap();
        sh(&format!("dmsetup remove {SLOW}"));
        self.lab.finish(&[fast]);
    }
}

fn own_children() -> Vec<i32> {
    children(std::process::id())
}

/// The cutter and its guard, in this order: the children of a process, by all its threads.
fn children(pid: u32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let text =
        tasks.map(|task| fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default());
    let text: String = text.collect::<Vec<_>>().join(" ");
    let mut pids: Vec<i32> = text.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    pids.sort_unstable();
    pids
}

/// Clones in a thread, and lets `act` loose on the two processes while the first disk is suspended.
fn cut_while(stage: &Stage, act: impl FnOnce(&[i32])) -> (Result<Cut, Failed>, Instant) {
    std::thread::scope(|scope| {
        let job = scope.spawn(|| clone_mounted(&stage.lab.dm, &stage.clones, &stage.frozen));
        let since = stage.wait_suspended();
        let pids = own_children();
        assert_eq!(pids.len(), 2, "{pids:?}");
        act(&pids);
        stage.assert_serving(since);
        (job.join().unwrap(), since)
    })
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn stop(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
}

fn assert_undone(result: Result<Cut, Failed>) {
    let failed = result.unwrap_err();
    assert!(failed.undo.is_empty(), "{failed}");
    assert!(failed.to_string().contains("as it was before"), "{failed}");
}

#[test]
fn a_slow_disk_is_cut_all_the_same() {
    let stage = Stage::set();
    let (cut, _) = cut_while(&stage, |_| ());
    let cut = cut.unwrap();
    println!("frozen for {:?}", cut.freeze);
    assert!(
        cut.freeze >= Duration::from_millis(DELAY_MILLIS),
        "the window was not long enough to prove anything"
    );
    discard(&stage.lab.dm, &stage.clones, LIMIT, WhenBusy::Refuse).unwrap();
    stage.end();
}

#[test]
fn the_cutter_is_killed_while_a_disk_is_suspended() {
    let stage = Stage::set();
    let (cut, _) = cut_while(&stage, |pids| kill(pids[0]));
    assert_undone(cut);
    stage.end();
}

/// Not dead, but it does not do its work: the guard ends it.
#[test]
fn the_cutter_hangs_while_a_disk_is_suspended() {
    let stage = Stage::set();
    let (cut, _) = cut_while(&stage, |pids| stop(pids[0]));
    assert_undone(cut);
    stage.end();
}

#[test]
fn the_guard_is_killed_while_a_disk_is_suspended() {
    let stage = Stage::set();
    let (cut, _) = cut_while(&stage, |pids| kill(pids[1]));
    cut.unwrap();
    discard(&stage.lab.dm, &stage.clones, LIMIT, WhenBusy::Refuse).unwrap();
    stage.end();
}

#[test]
fn cutter_and_guard_are_killed_while_a_disk_is_suspended() {
    let stage = Stage::set();
    let (cut, _) = cut_while(&stage, |pids| pids.iter().for_each(|pid| kill(*pid)));
    assert_undone(cut);
    stage.end();
}

/// One that device-mapper does not freeze is frozen as well, and goes on whoever is killed meanwhile.
#[test]
fn a_btrfs_goes_on_whoever_is_killed_while_it_is_frozen() {
    let stage = Stage::with("mkfs.btrfs -q -f", 160);
    let kills: [&[usize]; 4] = [&[], &[0], &[1], &[0, 1]];
    for killed in kills {
        println!("killed: {killed:?}");
        stage.delay(DELAY_MILLIS);
        let (cut, _) = cut_while(&stage, |pids| killed.iter().for_each(|at| kill(pids[*at])));
        match killed.contains(&0) {
            true => assert_undone(cut),
            false => {
                drop(cut.unwrap());
                discard(&stage.lab.dm, &stage.clones, LIMIT, WhenBusy::Refuse).unwrap();
            }
        }
        wait_until("both processes have ended", LIMIT, || own_children().is_empty());
        fs::write(stage.mounts[0].0.join("on"), "on").unwrap();
    }
    // Without a mount of it there is no cut.
    let failed = clone_disks(&stage.lab.dm, &stage.clones).unwrap_err();
    assert!(matches!(failed.cause, StorageError::NotFrozen(_)), "{failed:?}");
    // Somebody else has frozen it, and lets it go when he likes.
    let at = stage.mounts[0].0.display().to_string();
    sh(&format!("fsfreeze --freeze {at}"));
    let failed = clone_mounted(&stage.lab.dm, &stage.clones, &stage.frozen).unwrap_err();
    assert!(matches!(failed.cause, StorageError::Cut(CutError::Refused { .. })), "{failed:?}");
    sh(&format!("fsfreeze --unfreeze {at}"));
    stage.end();
}

/// A file system that takes longer to freeze than anybody may wait, and that no signal can interrupt. The other disk
/// goes on in time; that one goes on as soon as it has come to rest, when the cut has long been given up.
#[test]
fn a_disk_that_does_not_come_to_rest_ends_the_cut() {
    let stage = Stage::set();
    stage.delay(2500);
    let (cut, _) = cut_while(&stage, |_| ());
    let failed = cut.unwrap_err();
    assert!(matches!(failed.cause, StorageError::Cut(CutError::Stuck)), "{failed:?}");
    assert!(failed.undo.is_empty(), "{failed}");
    wait_until("the guard and the cutter have ended", Duration::from_secs(120), || own_children().is_empty());
    assert!(!sh("dmsetup info -c --noheadings -o suspended").contains("Suspended"));
    stage.end();
}

/// The agent that is to be killed is another process of this program, in the same test: there it finds its job in the
/// environment, clones, and that was all. Says whether this is that process.
fn is_agent() -> bool {
    let Ok(job) = std::env::var(JOB) else { return false };
    let clones: Vec<CloneOf> = serde_json::from_str(&job).unwrap();
    clone_disks(&Dm::open().unwrap(), &clones).unwrap();
    true
}

#[expect(clippy::disallowed_methods, reason = "the program that is to be killed is this one")]
fn start_agent(clones: &[CloneOf]) -> Child {
    let test = std::thread::current().name().unwrap().to_owned();
    let mut agent = Command::new(std::env::current_exe().unwrap());
    agent.args(["--exact", &test]).env(JOB, serde_json::to_string(clones).unwrap());
    agent.stdout(Stdio::null()).spawn().unwrap()
}

/// `kill -9` of the agent, alone or with its cutter: the disks go on, and `discard` puts everything right.
fn kill_agent(with_cutter: bool) {
    if is_agent() {
        return;
    }
    let stage = Stage::set();
    let mut agent = start_agent(&stage.clones);
    let since = stage.wait_suspended();
    let pids = children(agent.id());
    assert_eq!(pids.len(), 2, "{pids:?}");
    agent.kill().unwrap();
    if with_cutter {
        kill(pids[0]);
    }
    agent.wait().unwrap();
    stage.assert_serving(since);
    wait_until("both processes are gone", LIMIT, || {
        pids.iter().all(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            status.is_empty() || status.contains(") Z ")
        })
    });
    // What a restarted agent does with a job that was cloning.
    discard(&stage.lab.dm, &stage.clones, LIMIT, WhenBusy::Refuse).unwrap();
    stage.end();
}

#[test]
fn the_agent_is_killed_while_a_disk_is_suspended() {
    kill_agent(false);
}

#[test]
fn agent_and_cutter_are_killed_while_a_disk_is_suspended() {
    kill_agent(true);
}

/// All three at once: nobody is left to resume. The next agent does, when it activates its disks.
#[test]
fn all_are_killed_and_the_next_agent_resumes() {
    if is_agent() {
        return;
    }
    let stage = Stage::set();
    let mut agent = start_agent(&stage.clones);
    stage.wait_suspended();
    let pids = children(agent.id());
    for pid in &pids {
        kill(*pid);
    }
    agent.kill().unwrap();
    agent.wait().unwrap();
    wait_until("both processes are gone", LIMIT, || {
        pids.iter().all(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            status.is_empty() || status.contains(") Z ")
        })
    });
    assert!(stage.suspended(), "somebody else has resumed it: this test proves nothing");
    let again = Instant::now();
    for disk in &stage.disks {
        activate(&stage.lab.dm, disk).unwrap();
    }
    stage.assert_serving(again);
    discard(&stage.lab.dm, &stage.clones, LIMIT, WhenBusy::Refuse).unwrap();
    stage.end();
}
