//! What every engine that copies has to keep: the copy is the disk as it was at one instant, whatever is written meanwhile, and
//! the disk is whole whatever becomes of the copy.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use patchswitch::host::linux::dm::{Dm, Done};
use patchswitch::storage::StorageError;
use patchswitch::storage::copy::{CopyOf, abandon};
use patchswitch::storage::disk::{Active, Backing, Disk, Room, activate};
use patchswitch::storage::mirror::{self, Winner};
use patchswitch::storage::snapshot::{WhenBusy, clone_disks, discard};
use patchswitch::storage::write_log::format::What;
use patchswitch::storage::write_log::{self, Limits, LogOf, Reader};

use patchswitch_tests::programs;

use super::lab::{LIMIT, Lab, Writer, assert_clean, device_digest, dm_name, records, sh, wait_until};

const MIB: u64 = 1 << 20;
/// Size of the disks of the suite.
pub(super) const SIZE: u64 = 24;
/// So much that a mirror takes a while to be in sync, in MiB.
const LARGE: u64 = 512;
const BLOCK: usize = 4096;

/// Writes blocks here and there, past the page cache, one after the other: what the disk holds after any number of them is known. Some are
/// to be on disk at once, others with a flush that comes later: a log of writes has them in another order.
pub(super) struct Random {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<()>,
    at_first: Vec<u8>,
    seed: u64,
}

/// A block, where direct I/O can use it.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

/// Where the n-th block goes, and what is in it.
fn block(seed: u64, number: u64) -> (u64, Box<Aligned>) {
    // SplitMix64: no two runs of a seed differ.
    let mix = |value: u64| {
        let z = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let place =
        mix(seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15))) % (SIZE * MIB / BLOCK as u64);
    let mut data = Box::new(Aligned([0; BLOCK]));
    for (index, word) in data.0.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = (number ^ ((index as u64) << 32)).to_le_bytes();
    }
    (place * BLOCK as u64, data)
}

fn direct(path: &Path) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

impl Random {
    pub(super) fn start(disk: &Path, seed: u64, pause: Duration) -> Self {
        let at_first = sh_bytes(disk);
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count, file) = (stop.clone(), written.clone(), direct(disk));
        let flags = libc::O_DIRECT | libc::O_DSYNC;
        let at_once = File::options().write(true).custom_flags(flags).open(disk).unwrap();
        let thread = std::thread::spawn(move || {
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let (at, data) = block(seed, number);
                let way = if number % 3 == 0 { &at_once } else { &file };
                way.write_all_at(&data.0, at).unwrap();
                if number % 16 == 0 {
                    file.sync_data().unwrap();
                }
                count.store(number + 1, Ordering::SeqCst);
                std::thread::sleep(pause);
            }
        });
        Self { stop, written, thread, at_first, seed }
    }

    fn written(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    pub(super) fn goes_on(&self) {
        let so_far = self.written();
        wait_until("the writer writes", LIMIT, || self.written() > so_far + 20);
    }

    /// What the disk holds after so many blocks.
    fn after(&self, blocks: u64) -> Vec<u8> {
        let mut all = self.at_first.clone();
        for number in 0..blocks {
            let (at, data) = block(self.seed, number);
            let at = usize::try_from(at).unwrap();
            all[at..at + BLOCK].copy_from_slice(&data.0);
        }
        all
    }

    /// A copy holds what the disk held at one instant between two moments.
    #[track_caller]
    fn assert_copied(&self, copy: &Path, before: u64, after: u64) {
        let found = sh_bytes(copy);
        let mut state = self.after(before);
        for number in before..=after + 1 {
            if state == found {
                println!("{number} blocks were written at the cut, between {before} and {after}");
                return;
            }
            let (at, data) = block(self.seed, number);
            let at = usize::try_from(at).unwrap();
            state[at..at + BLOCK].copy_from_slice(&data.0);
        }
        panic!("the copy is the disk of no instant between {before} and {after} blocks");
    }

    /// Ends it; the disk holds everything that was written.
    #[track_caller]
    pub(super) fn stop_whole(self, disk: &Path) {
        self.stop.store(true, Ordering::Relaxed);
        let (seed, at_first, written) = (self.seed, self.at_first, self.written);
        self.thread.join().unwrap();
        let again = Self { stop: self.stop, thread: std::thread::spawn(|| ()), written, at_first, seed };
        assert!(sh_bytes(disk) == again.after(again.written()), "the disk is not what was written to it");
        again.thread.join().unwrap();
    }
}

/// All of a device, past the page cache.
fn sh_bytes(device: &Path) -> Vec<u8> {
    let file = direct(device);
    let mut all = Vec::new();
    let mut piece = Box::new(Aligned([0; BLOCK]));
    while (all.len() as u64) < SIZE * MIB {
        file.read_exact_at(&mut piece.0, all.len() as u64).unwrap();
        all.extend_from_slice(&piece.0);
    }
    all
}

fn copy_of(lab: &Lab, disk: &Disk, name: &str) -> CopyOf {
    CopyOf {
        active: disk.name.clone(),
        copy: dm_name("b", name),
        origin: disk.backing.clone(),
        target: lab.image(&format!("b-{name}-copy"), disk.sectors, Room::Sparse),
        sectors: disk.sectors,
    }
}

pub(super) fn log_of(lab: &Lab, disk: &Disk, name: &str, mib: u64) -> LogOf {
    let logs = [0, 1].map(|log| lab.image(&format!("b-{name}-log{log}"), mib << 11, Room::Sparse));
    LogOf { copy: copy_of(lab, disk, name), logs }
}

/// An engine, as the suite uses it: copies a disk while it is written, and says where the copy is.
type Engine = fn(&Lab, &Disk, &mut dyn FnMut()) -> PathBuf;

fn by_snapshot(lab: &Lab, disk: &Disk, cut: &mut dyn FnMut()) -> PathBuf {
    let clones = [lab.clone_of(disk, "b", "root")];
    cut();
    clone_disks(&lab.dm, &clones).unwrap().clones.remove(0).path
}

fn by_log(lab: &Lab, disk: &Disk, cut: &mut dyn FnMut()) -> PathBuf {
    for attempt in 0..40 {
        match log_once(lab, disk, cut) {
            Ok(path) => return path,
            // Refused rather than wrong; and the disk is as it was.
            Err(StorageError::OrderUnknown { bytes, .. }) => {
                println!("attempt {attempt}: the order of writes to {bytes} bytes is not known");
                assert_eq!(lab.kind(&disk.name), "linear");
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("no copy in so many attempts");
}

fn log_once(lab: &Lab, disk: &Disk, cut: &mut dyn FnMut()) -> Result<PathBuf, StorageError> {
    let mut log = write_log::begin(&lab.dm, &[log_of(lab, disk, "root", 128)], |_, _| Ok(())).unwrap();
    println!("bulk: {:?}", log.bulks());
    let say = |_: &CopyOf, round: &write_log::Round| {
        println!("round: {round:?}");
        Ok(())
    };
    log.converge(Limits { rest: Duration::from_secs(2), rounds: 20 }, say).unwrap();
    cut();
    let (done, rounds) = log.cut().map_err(|failed| {
        assert!(failed.undo.is_empty(), "{failed}");
        failed.cause
    })?;
    println!("frozen for {:?}, the rest: {:?}", done.freeze, rounds[0].last());
    Ok(done.copies.into_iter().next().unwrap().boot().path().to_owned())
}

fn by_mirror(lab: &Lab, disk: &Disk, cut: &mut dyn FnMut()) -> PathBuf {
    let mirror = mirror::begin(&lab.dm, &[copy_of(lab, disk, "root")]).unwrap();
    mirror.wait(Duration::from_secs(120), |_| Ok(())).unwrap();
    cut();
    let done = mirror.split().unwrap();
    println!("frozen for {:?}", done.freeze);
    done.copies.into_iter().next().unwrap().boot().path().to_owned()
}

const ENGINES: [(&str, Engine); 3] = [("snapshot", by_snapshot), ("log", by_log), ("mirror", by_mirror)];

/// Takes a copy away, of whatever engine.
fn take_away(lab: &Lab, disk: &Disk) {
    let clones = [lab.clone_of(disk, "b", "root")];
    if lab.kind(&clones[0].clone) == "snapshot" {
        discard(&lab.dm, &clones, LIMIT, WhenBusy::Refuse).unwrap();
        return;
    }
    let of = log_of(lab, disk, "root", 128);
    assert_eq!(write_log::abandon(&lab.dm, &of, LIMIT).unwrap(), Done::Changed);
    assert_eq!(write_log::abandon(&lab.dm, &of, LIMIT).unwrap(), Done::AlreadySo);
}

#[test]
fn the_copy_is_the_disk_of_one_instant_by_every_engine() {
    for (seed, (name, engine)) in (1..).zip(ENGINES) {
        let lab = Lab::new();
        let (disk, active) = lab.disk("a", "root", SIZE);
        sh(&format!(
            "dd if=/dev/urandom of={} bs=1M count=12 oflag=direct status=none",
            active.path.display()
        ));
        let writer = Random::start(&active.path, seed, Duration::from_millis(1));
        writer.goes_on();
        let mut before = 0;
        let copy = engine(&lab, &disk, &mut || before = writer.written());
        let after = writer.written();
        println!("{name}: {before} to {after} blocks");
        assert_eq!(lab.kind(&disk.name), if name == "snapshot" { "snapshot-origin" } else { "linear" });
        writer.assert_copied(&copy, before, after);
        // Neither writes to the other.
        writer.goes_on();
        writer.assert_copied(&copy, before, after);
        sh(&format!(
            "dd if=/dev/urandom of={} bs=1M count=4 seek=6 oflag=direct status=none",
            copy.display()
        ));
        writer.goes_on();
        writer.stop_whole(&active.path);
        take_away(&lab, &disk);
        lab.finish(&[&disk]);
    }
}

#[test]
fn two_disks_with_file_systems_are_copied_at_one_instant() {
    for by_log in [true, false] {
        let lab = Lab::new();
        let [(root, root_active), (data, data_active)] =
            ["root", "data"].map(|name| lab.formatted("a", name, 40));
        let mounts = [lab.mount(&root_active.path, "a"), lab.mount(&data_active.path, "a-data")];
        let writer = Writer::start(&[&mounts[0].0, &mounts[1].0]);
        let go_on =
            |count: u64| wait_until("the writer writes", LIMIT, || writer.acknowledged() > count + 20);
        go_on(0);
        let (done, before) = if by_log {
            let logs = [log_of(&lab, &root, "root", 64), log_of(&lab, &data, "data", 64)];
            let mut log = write_log::begin(&lab.dm, &logs, |_, _| Ok(())).unwrap();
            log.converge(Limits { rest: Duration::from_secs(2), rounds: 20 }, |_, _| Ok(())).unwrap();
            let before = writer.acknowledged();
            (log.cut().unwrap().0, before)
        } else {
            let copies = [copy_of(&lab, &root, "root"), copy_of(&lab, &data, "data")];
            let mirror = mirror::begin(&lab.dm, &copies).unwrap();
            mirror.wait(Duration::from_secs(120), |_| Ok(())).unwrap();
            let before = writer.acknowledged();
            (mirror.split().unwrap(), before)
        };
        go_on(writer.acknowledged());
        let ofs: Vec<CopyOf> = done.copies.iter().map(|copy| copy.of().clone()).collect();
        let copies: Vec<_> = done.copies.into_iter().map(|copy| copy.boot().path().to_owned()).collect();
        // The journals were written out: clean without replay.
        copies.iter().for_each(|copy| assert_clean(copy));
        let copied = [lab.mount(&copies[0], "b"), lab.mount(&copies[1], "b-data")];
        let found = records(&[&copied[0].0, &copied[1].0]);
        assert!(found >= before, "{before} records were acknowledged before, the copies have {found}");
        copied.into_iter().for_each(super::lab::Mount::unmount);
        let written = writer.stop();
        assert_eq!(records(&[&mounts[0].0, &mounts[1].0]), written);
        mounts.into_iter().for_each(super::lab::Mount::unmount);
        assert_clean(&root_active.path);
        for of in &ofs {
            abandon(&lab.dm, of, LIMIT).unwrap();
        }
        lab.finish(&[&root, &data]);
    }
}

#[test]
fn whoever_writes_faster_than_the_log_is_replayed_is_told_so() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", SIZE);
    let writer = Random::start(&active.path, 9, Duration::ZERO);
    let mut log = write_log::begin(&lab.dm, &[log_of(&lab, &disk, "root", 512)], |_, _| Ok(())).unwrap();
    // Who goes on after that has as many rounds again.
    for _ in 0..2 {
        let mut rounds = 0;
        let limits = Limits { rest: Duration::ZERO, rounds: 2 };
        let count = |_: &CopyOf, _: &write_log::Round| {
            rounds += 1;
            Ok(())
        };
        let error = log.converge(limits, count).unwrap_err();
        assert!(matches!(error, StorageError::DoesNotConverge { .. }), "{error}");
        assert_eq!(rounds, 2);
    }
    // Somebody for whom a replay takes longer than what is replayed took to be written.
    let slow = |_: &CopyOf, round: &write_log::Round| {
        println!("round: {round:?}, {:.0} and {:.0} bytes/s", round.dirty_rate(), round.replay_rate());
        Ok(())
    };
    let error = log.converge(Limits { rest: Duration::ZERO, rounds: 20 }, slow).unwrap_err();
    assert!(
        matches!(&error, StorageError::DoesNotConverge { dirty, replayed, .. } if *dirty > 0.0 && *replayed > 0.0)
    );
    println!("{error}");
    log.abandon().unwrap();
    writer.goes_on();
    writer.stop_whole(&active.path);
    lab.finish(&[&disk]);
}

#[test]
fn a_log_that_is_full_is_noticed_and_the_disk_goes_on() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", SIZE);
    let mut log = write_log::begin(&lab.dm, &[log_of(&lab, &disk, "root", 2)], |_, _| Ok(())).unwrap();
    let fill = format!(
        "dd if=/dev/urandom of={} bs=1M count=8 oflag=direct conv=fsync status=none",
        active.path.display()
    );
    sh(&fill);
    let error = log.converge(Limits::default(), |_, _| Ok(())).unwrap_err();
    assert!(matches!(error, StorageError::LogFull { .. }), "{error}");
    println!("{error}");
    log.abandon().unwrap();
    sh(&fill);
    assert_eq!(lab.kind(&disk.name), "linear");
    lab.finish(&[&disk]);
}

/// What is to be copied by a process that is killed meanwhile.
const JOB: &str = "PATCHSWITCH_TEST_COPY";

/// The same test run once more, as a process that begins to copy and gets no further. Says whether this is that process.
fn is_agent() -> bool {
    let Ok(job) = std::env::var(JOB) else { return false };
    let (engine, log): (String, LogOf) = serde_json::from_str(&job).unwrap();
    let dm = Dm::open().unwrap();
    let (_log, _mirror);
    if engine == "log" {
        _log = write_log::begin(&dm, &[log], |_, _| Ok(())).unwrap();
    } else {
        _mirror = mirror::begin(&dm, &[log.copy]).unwrap();
    }
    println!("{BEGUN}");
    std::io::stdout().flush().unwrap();
    std::thread::sleep(Duration::from_secs(600));
    true
}

const BEGUN: &str = "it is being copied";

/// Kills a process that copies.
#[expect(clippy::disallowed_methods, reason = "starts this very test once more, and kills it")]
fn killed(engine: &str, log: &LogOf) {
    let test = std::thread::current().name().unwrap().to_owned();
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &test, "--nocapture"])
        .env(JOB, serde_json::to_string(&(engine, log)).unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(agent.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains(BEGUN)), "{engine}: it never came so far");
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[test]
fn a_crash_in_the_middle_leaves_the_disk_as_it_was() {
    if is_agent() {
        return;
    }
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", SIZE);
    let log = log_of(&lab, &disk, "root", 128);
    let writer = Random::start(&active.path, 5, Duration::from_millis(1));
    for (engine, kind) in [("log", "log-writes"), ("mirror", "mirror")] {
        killed(engine, &log);
        assert_eq!(lab.kind(&disk.name), kind);
        writer.goes_on();
        // What `up` does with the disks of a partition.
        let Active { done, .. } = activate(&lab.dm, &disk).unwrap();
        assert_eq!((done, lab.kind(&disk.name)), (Done::Changed, "linear".to_owned()), "{engine}");
        writer.goes_on();
        write_log::abandon(&lab.dm, &log, LIMIT).unwrap();
    }
    writer.stop_whole(&active.path);
    // One that was called off half-way is as good as none.
    let stopped = write_log::begin(&lab.dm, std::slice::from_ref(&log), |_, bytes| {
        let late = StorageError::NotInTime { what: "called off", waited: Duration::ZERO };
        if bytes >= 8 * MIB { Err(late) } else { Ok(()) }
    });
    let error = stopped.unwrap_err();
    assert!(error.to_string().contains("everything is as it was before"), "{error}");
    assert_eq!(lab.kind(&disk.name), "linear");
    write_log::abandon(&lab.dm, &log, LIMIT).unwrap();
    lab.finish(&[&disk]);
}

#[test]
fn the_log_says_what_was_written_where_and_when() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", SIZE);
    let of = log_of(&lab, &disk, "root", 64);
    let mut log = write_log::begin(&lab.dm, std::slice::from_ref(&of), |_, _| Ok(())).unwrap();
    let file = direct(&active.path);
    let begun = Instant::now();
    for number in 0..5 {
        let (_, data) = block(1, number);
        // Nobody flushes it, and it is recorded all the same, soon.
        file.write_all_at(&data.0, number * MIB).unwrap();
        std::thread::sleep(Duration::from_millis(250));
    }
    let took = begun.elapsed();
    log.converge(Limits::default(), |_, _| Ok(())).unwrap();
    // It was written before the round, and is not any more.
    let [first, _] = &of.logs;
    let records = Reader::all(first).unwrap();
    let ours = |at: u64| {
        records
            .iter()
            .find(|record| record.what == What::Write { at, bytes: BLOCK as u64, at_once: false })
            .unwrap()
            .clone()
    };
    let times: Vec<_> = (0..5)
        .map(|number| ours(number * MIB))
        .map(|record| (record.after_ns.unwrap(), record.before_ns.unwrap()))
        .collect();
    for (after, before) in &times {
        // A mark each 100 ms; the processor is emulated.
        assert!(before > after && before - after < 400_000_000, "{times:?}");
    }
    let all = Duration::from_nanos(times[4].1 - times[0].0);
    assert!(
        all >= Duration::from_millis(1000) && all <= took + Duration::from_millis(800),
        "{all:?} in {took:?}"
    );
    assert!(times.windows(2).all(|pair| pair[0].0 < pair[1].0), "{times:?}");
    // The same by the command.
    let (program, shown_log) = (programs::built("patchswitch").unwrap(), first.path().display().to_string());
    let shown = sh(&format!("{} write-log {shown_log} --at {}", program.display(), 3 * MIB));
    let words: Vec<_> = shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert!(matches!(words.as_slice(), [line] if line[4..] == ["write", "3145728", "4096"]), "{shown}");
    let number = words[0][0];
    let digest = sh(&format!("{} write-log {shown_log} --data {number} | sha256sum", program.display()));
    let there = format!(
        "dd if={} bs=1M skip=3 count=1 iflag=direct status=none | head -c {BLOCK}",
        active.path.display()
    );
    assert_eq!(digest, sh(&format!("{there} | sha256sum")));
    // A pipe that is closed is no error: `true` has ended long before.
    let late =
        format!("sleep 1; {} write-log {shown_log} --data {number}; echo ended $? >&2", program.display());
    let closed = sh(&format!("{{ {{ {late}; }} | true; }} 2>&1"));
    assert_eq!(closed, "ended 0\n");
    let none = sh(&format!("! {} write-log {shown_log} --data 999999 2>&1", program.display()));
    assert!(none.contains("has no record 999999"), "{none}");
    let none = sh(&format!("! {} write-log {} 2>&1", program.display(), of.copy.origin.path().display()));
    assert!(none.contains("no log of dm-log-writes"), "{none}");
    drop(log.cut().unwrap());
    write_log::abandon(&lab.dm, &of, LIMIT).unwrap();
    drop(file);
    lab.finish(&[&disk]);
}

#[test]
fn mirrored_again_the_winner_stays_and_what_the_other_had_is_listed() {
    let lab = Lab::new();
    let (disk, active) = lab.disk("a", "root", SIZE);
    sh(&format!(
        "dd if=/dev/urandom of={} bs=1M count={SIZE} oflag=direct status=none",
        active.path.display()
    ));
    let of = copy_of(&lab, &disk, "root");
    let split = || {
        let mirror = mirror::begin(&lab.dm, std::slice::from_ref(&of)).unwrap();
        mirror.wait(Duration::from_secs(120), |_| Ok(())).unwrap();
        mirror.split().unwrap().copies.remove(0).boot().path().to_owned()
    };
    let write = |device: &Path, at: u64| {
        let (_, data) = block(at, at);
        let file = direct(device);
        file.write_all_at(&data.0, at * MIB).unwrap();
        file.sync_all().unwrap();
    };
    let copy = split();
    assert_eq!(device_digest(&copy), device_digest(&active.path));
    // Both go on by themselves.
    write(&active.path, 3);
    write(&copy, 7);
    write(&copy, 8);
    let winner = device_digest(&active.path);
    abandon(&lab.dm, &of, LIMIT).unwrap();
    let (again, lost) = mirror::again(&of, Winner::Active).unwrap();
    assert_eq!(again, of);
    let places: Vec<_> = lost.iter().map(|part| (part.at / MIB, part.bytes)).collect();
    assert_eq!(places, [(3, 4096), (7, 4096), (8, 4096)]);
    let copy = split();
    assert_eq!((device_digest(&copy), device_digest(&active.path)), (winner.clone(), winner));

    // And the other way round: the copy's device is the disk's then.
    write(&copy, 11);
    let winner = device_digest(&copy);
    abandon(&lab.dm, &of, LIMIT).unwrap();
    let (again, lost) = mirror::again(&of, Winner::Copy).unwrap();
    assert_eq!((&again.origin, &again.target, lost.len()), (&of.target, &of.origin, 1));
    patchswitch::storage::disk::deactivate(&lab.dm, &disk, LIMIT).unwrap();
    let disk = Disk { backing: again.origin.clone(), ..disk };
    let active = activate(&lab.dm, &disk).unwrap();
    let mirror = mirror::begin(&lab.dm, std::slice::from_ref(&again)).unwrap();
    assert!(matches!(mirror.status(), Ok(all) if all.len() == 1));
    mirror.wait(Duration::from_secs(120), |_| Ok(())).unwrap();
    let copy = mirror.split().unwrap().copies.remove(0).boot().path().to_owned();
    assert_eq!((device_digest(&copy), device_digest(&active.path)), (winner.clone(), winner));
    abandon(&lab.dm, &again, LIMIT).unwrap();
    lab.finish(&[&disk]);
}

#[test]
fn what_cannot_be_copied_is_refused_before_anything_is_changed() {
    let lab = Lab::new();
    let (disk, active) = lab.formatted("a", "root", SIZE);
    let of = copy_of(&lab, &disk, "root");
    let refused = |of: &CopyOf| {
        let error = mirror::begin(&lab.dm, std::slice::from_ref(of)).unwrap_err();
        assert_eq!(lab.kind(&disk.name), "linear");
        error.cause.to_string()
    };
    let small = CopyOf { target: lab.image("small", disk.sectors - 8, Room::Sparse), ..of.clone() };
    assert!(refused(&small).contains("4096 bytes too small"));
    assert!(refused(&CopyOf { target: of.origin.clone(), ..of.clone() }).contains("named twice"));
    let mount = lab.mount(&active.path, "a");
    let inside = mount.0.join("image");
    sh(&format!("truncate -s {} {}; chmod 600 {}", disk.sectors * 512, inside.display(), inside.display()));
    assert!(
        refused(&CopyOf { target: Backing::Image(inside.clone()), ..of.clone() })
            .contains("lies on the file system")
    );
    let fine = log_of(&lab, &disk, "root", 4);
    let second = |log: Backing| LogOf { logs: [fine.logs[0].clone(), log], ..fine.clone() };
    let refused_log =
        |log: LogOf| write_log::begin(&lab.dm, &[log], |_, _| Ok(())).unwrap_err().cause.to_string();
    assert!(refused_log(second(Backing::Image(inside.clone()))).contains("lies on the file system"));
    for log in [&fine.logs[0], &of.target] {
        assert!(refused_log(second(log.clone())).contains("named twice"), "{log}");
    }
    // Nor two disks with one device between them.
    let (other, _) = lab.disk("a", "data", SIZE);
    let both = [of.clone(), CopyOf { target: of.target.clone(), ..copy_of(&lab, &other, "data") }];
    let error = mirror::begin(&lab.dm, &both).unwrap_err();
    assert!(error.cause.to_string().contains("named twice"), "{error}");
    patchswitch::storage::disk::deactivate(&lab.dm, &other, LIMIT).unwrap();
    for log in &fine.logs {
        log.detach().unwrap();
    }
    assert!(mirror::begin(&lab.dm, &[]).is_err());
    // Nor a mirror that is not in sync.
    let (large, _) = lab.disk("a", "large", LARGE);
    let mirror = mirror::begin(&lab.dm, &[copy_of(&lab, &large, "large")]).unwrap();
    let error = mirror.split().unwrap_err();
    assert!(matches!(error.cause, StorageError::NotInSync { .. }), "{error}");
    assert_eq!(lab.kind(&large.name), "linear");
    assert_eq!(lab.kind(&disk.name), "linear");
    patchswitch::storage::disk::deactivate(&lab.dm, &large, LIMIT).unwrap();
    for backing in [&small.target, &Backing::Image(inside)] {
        backing.detach().unwrap();
    }
    mount.unmount();
    abandon(&lab.dm, &of, LIMIT).unwrap();
    lab.finish(&[&disk]);
}
