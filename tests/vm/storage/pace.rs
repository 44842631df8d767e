//! Whether a log of writes can be caught up with is decided by two paces: that of the writer, and that of the replay. The latter is
//! set here by a device below the copy that takes its time for each write.

use std::time::Duration;

use patchswitch::storage::StorageError;
use patchswitch::storage::disk::{Backing, Room};
use patchswitch::storage::write_log::{self, Limits};

use super::engines::{Random, SIZE, log_of};
use super::lab::{Lab, sh};

const SLOW: &str = "ps-lab-target";
/// How long a write to the copy takes.
const EACH: u64 = 40;

#[test]
fn a_writer_of_half_the_pace_of_the_replay_is_caught_up_with_and_one_of_twice_its_pace_is_not() {
    // The writer's own time for a block comes to it.
    for (pause, is_caught) in [(2 * EACH, true), (EACH / 4, false)] {
        let lab = Lab::new();
        let (disk, active) = lab.disk("a", "root", SIZE);
        let target = lab.image("slow-target", disk.sectors, Room::Sparse);
        let under = target.attach().unwrap();
        let table = |kind: &str, more: &str| format!("0 {} {kind} {} 0{more}", disk.sectors, under.device());
        sh(&format!("dmsetup create {SLOW} --table '{}' && dmsetup mknodes", table("linear", "")));
        let mut of = log_of(&lab, &disk, "root", 512);
        of.copy.target = Backing::Device(format!("/dev/mapper/{SLOW}").into());
        let writer = Random::start(&active.path, 9, Duration::from_millis(pause));
        let mut log = write_log::begin(&lab.dm, &[of], |_, _| Ok(())).unwrap();
        // The bulk copy was quick.
        let delayed = table("delay", &format!(" 0 {} 0 {EACH}", under.device()));
        sh(&format!("dmsetup load {SLOW} --table '{delayed}' && dmsetup resume --nolockfs {SLOW}"));
        let mut rounds = Vec::new();
        let limits = Limits { rest: Duration::from_millis(200), rounds: 20 };
        let done = log.converge(limits, |_, round| {
            println!("{round:?}");
            rounds.push(*round);
            Ok(())
        });
        match done {
            Ok(()) => assert!(is_caught, "a pause of {pause} ms: {rounds:?}"),
            Err(StorageError::DoesNotConverge { dirty, replayed, .. }) => {
                assert!(
                    !is_caught && dirty > replayed,
                    "a pause of {pause} ms: {dirty} {replayed} {rounds:?}"
                );
            }
            Err(error) => panic!("{error}"),
        }
        // By what was measured, and not by how often it was tried.
        assert!(rounds.len() < 20, "{rounds:?}");
        log.abandon().unwrap();
        writer.goes_on();
        writer.stop_whole(&active.path);
        sh(&format!("dmsetup remove {SLOW}"));
        drop(under);
        target.detach().unwrap();
        lab.finish(&[&disk]);
    }
}
