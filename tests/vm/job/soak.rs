//! Every phase of a job of every strategy, ended by a power cut and by `kill -9`: afterwards one of the two sides serves, it is the
//! right one, the journal says so, file systems are clean, what is asked for next works, and nothing is left.
//!
//! All of them are the tier `soak` (`cargo xtask test soak`), one test each; five power cuts are in every run, chosen by a
//! seed, which also says how far into its phase each one is: `PATCHSWITCH_SEED`, or one that stays, so that a run is like the last.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use patchswitch::store::{Job, Step, StepState, Store};
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::{programs, vm};
use rustix::process::Signal;
use serde_json::Value;

use super::exchange::{self, BOTH, SECOND, second_uplink};
use super::keeper::{self, Noted, Writers};
use super::mend::nothing_to_do;
use super::moments::{Moment, start_until};
use super::stage::{SERVICE, Settings, Stage, path, wait_until};
use super::{client, copies, database};

/// How a command ends before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Power,
    Kill,
}

/// Writers of either single writer.
enum Clients {
    OfKeeper(Writers),
    OfDatabase(database::Writers),
}

/// A moment in which it does.
#[derive(Clone, Copy, Debug)]
struct Point {
    end: End,
    strategy: &'static str,
    command: &'static str,
    phase: &'static str,
}

/// So many milliseconds after the beginning of a phase at most.
const WITHIN: u64 = 150;
/// A connection whose client cannot be reached any more is given up by the kernel after so long, and keeps its network
/// namespace and its control group until then.
const LEFT: Duration = Duration::from_secs(180);

const SEED: u64 = 4396;

/// The number that chooses points and moments.
fn seed() -> u64 {
    std::env::var("PATCHSWITCH_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(SEED)
}

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    (seed(), of).hash(&mut hasher);
    hasher.finish()
}

impl Point {
    fn name(&self) -> String {
        format!("{:?}/{}/{}/{}", self.end, self.strategy, self.command, self.phase)
    }

    fn settings(&self) -> Settings {
        let quick = Settings { observe: "500ms", ..Settings::default() };
        match self.strategy {
            "takeover" => quick,
            "quiesce" => Settings { observe: "500ms", ..keeper::settings() },
            "log" => Settings { observe: "500ms", disks: &["data:16M:/data:log"], ..keeper::settings() },
            "mirror" => {
                Settings { observe: "500ms", disks: &["data:16M:/data:mirror"], ..keeper::settings() }
            }
            "database" => database::impatient(),
            "copies" => Settings { disks: copies::DISKS, ..quick },
            "device" => Settings { more: "strategy = \"device\"\n", ..quick },
            "address" => Settings { more: "strategy = \"address\"\n", uplink: BOTH, ..quick },
            "letter" => Settings {
                more: "strategy = \"letter\"\n",
                drain: "deadline = \"2s\"\non_deadline = \"reset\"",
                ..quick
            },
            other => panic!("no strategy {other}"),
        }
    }

    fn uplinks(&self, stage: &Stage) {
        if self.strategy == "address" {
            second_uplink(stage);
        }
    }

    /// Everything is as it is before the command; and what there was before all that.
    fn prepare(&self) -> (Stage, Snapshot) {
        let settings = self.settings();
        let stage = Stage::bare(&settings);
        self.uplinks(&stage);
        let before = Snapshot::take().unwrap();
        stage.define(&settings);
        stage.ok(&["service", "add", SERVICE]);
        wait_until("v1 serves", Duration::from_secs(60), || client::who(&stage.client).is_ok());
        stage.patch("says-v2", "dd if=/dev/urandom of=/srv/ballast bs=1M count=4; echo v2 > /etc/says");
        if self.command != "apply" {
            stage.ok(&["apply", SERVICE]);
        }
        // What is there before the command is on disk; what the command does has to see to that itself.
        rustix::fs::sync();
        (stage, before)
    }

    /// Runs the command as far as the phase, and a moment further; the phase in which it is then, by what it says.
    fn run(&self, stage: &Stage) -> (programs::Running, String) {
        if self.is_noted() {
            match self.is_database() {
                true => database::begin_noting(stage),
                false => Noted::begin(stage),
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        let moment =
            Moment::ALL.into_iter().find(|moment| format!("{moment:?}").to_lowercase() == self.phase);
        let arguments = [self.command, SERVICE];
        let to = if self.command == "apply" { "web-b" } else { "web-a" };
        let running = if self.phase == "exchanged" {
            exchange::start_until(stage, &arguments, to, exchange::Moment::Moved)
        } else if let Some(moment) = moment {
            let server = if self.is_database() { database::SERVER } else { keeper::SERVER };
            start_until(stage, &arguments, (to, server), moment)
        } else {
            let running = stage.start_until(&arguments, self.phase);
            std::thread::sleep(Duration::from_millis(hash(self.name()) % WITHIN));
            running
        };
        let said = running.output();
        let begun = said.lines().rev().find_map(|line| line.trim().strip_suffix(" …")).map(str::to_owned);
        (running, begun.unwrap_or_else(|| panic!("{said}")))
    }

    /// Whether what a single writer was promised is on disk, for who comes after a power cut.
    fn is_noted(&self) -> bool {
        self.has_writer() && self.end == End::Power
    }

    /// Whether the service has a single writer.
    fn has_writer(&self) -> bool {
        ["quiesce", "log", "mirror", "database"].contains(&self.strategy)
    }

    fn is_database(&self) -> bool {
        self.strategy == "database"
    }

    /// Writers that go on through everything, where there is one at the other end.
    fn writers(&self, stage: &Stage) -> Option<Clients> {
        (self.has_writer() && !self.is_noted()).then(|| match self.is_database() {
            true => Clients::OfDatabase(database::Writers::start(stage)),
            false => Clients::OfKeeper(Writers::start(stage)),
        })
    }

    /// Who may serve after an end in this phase, or at the beginning of the next one: the phase in which new flows go to the
    /// other side is the turning point.
    fn may_serve(&self, phase: &str) -> Vec<&'static str> {
        let (turn, before, after) = match self.command {
            "apply" => ("take_over", "web-a", "web-b"),
            "rollback" => ("give_back", "web-b", "web-a"),
            _ => return vec!["web-b"],
        };
        let mine = |point: &&Point| {
            (point.end, point.strategy, point.command) == (self.end, self.strategy, self.command)
        };
        let order: Vec<_> = ALL.iter().filter(mine).map(|point| point.phase).collect();
        let place = |wanted| order.iter().position(|one| *one == wanted).expect("a phase of the command");
        let (at, turn) = (place(phase), place(turn));
        if at > turn {
            vec![after]
        } else if at + 1 < turn {
            vec![before]
        } else {
            vec![before, after]
        }
    }

    /// What must hold afterwards.
    fn check(&self, (stage, before): (Stage, Snapshot), phase: &str, writers: Option<Clients>) {
        let said = stage.ok(&["up"]);
        let (who, active) = (stage.who(), stage.active());
        println!("{} in {phase}: {active} serves {who}", self.name());
        assert!(self.may_serve(phase).contains(&active.as_str()), "{active} after {phase}: {said}");
        assert_eq!(who, if active == "web-a" { "v1" } else { "v2" }, "{said}");
        nothing_to_do(&stage);
        self.journal_is_right(&active);
        self.check_noted(&stage);
        // The next thing that is asked for works.
        match (self.command, active.as_str()) {
            ("commit", _) => drop(stage.ends_with(10, &["commit", SERVICE])),
            (_, "web-a") => drop(stage.ok(&["apply", SERVICE, "--commit"])),
            ("apply", _) => drop(stage.ok(&["rollback", SERVICE])),
            _ => drop(stage.ok(&["commit", SERVICE])),
        }
        let active = stage.active();
        assert_eq!(stage.who(), if active == "web-a" { "v1" } else { "v2" });
        self.journal_is_right(&active);
        self.check_noted(&stage);
        match writers {
            Some(Clients::OfDatabase(writers)) => drop(writers.stop(&stage)),
            Some(Clients::OfKeeper(writers)) => drop(writers.stop(&stage)),
            None => {}
        }
        self.finish(&stage, &before, &active);
    }

    /// The store says so: every job is over, every step of one has an end but that in which it was interrupted, and the patch is
    /// applied where it serves. Nor has a job of this strategy a step that is no point.
    #[track_caller]
    fn journal_is_right(&self, active: &str) {
        let (store, service) = (Store::open(&path("state")).unwrap(), SERVICE.parse().unwrap());
        let jobs = store.jobs(Some(&service), 100).unwrap();
        let is_over = |job: &Job| job.ended_at.is_some() && job.exit_code.is_some();
        assert!(!jobs.is_empty() && jobs.iter().all(is_over), "{jobs:?}");
        let is_point =
            |step: &Step| ALL.iter().any(|one| one.strategy == self.strategy && one.phase == step.phase);
        for job in &jobs {
            let mut steps = store.steps(job.id).unwrap();
            assert!(steps.iter().all(is_point), "{job:?}: {steps:?}");
            // What an interrupted one was at is said so, with its job's end.
            if job.message.as_deref().is_some_and(|message| message.starts_with("interrupted")) {
                let _ = steps.pop();
            }
            assert!(steps.iter().all(|step| step.state != StepState::Intended), "{job:?}: {steps:?}");
        }
        assert_eq!(store.applied(&service).unwrap().len(), usize::from(active == "web-b"), "{jobs:?}");
        assert_eq!(
            store.primary(&service).unwrap().map(|primary| primary.partition.to_string()).as_deref(),
            Some(active)
        );
    }

    /// What a single writer was promised before a power cut is there.
    fn check_noted(&self, stage: &Stage) {
        match self.is_noted() {
            true if self.is_database() => database::check_noted(stage),
            true => Noted::check(stage),
            false => {}
        }
    }

    fn finish(&self, stage: &Stage, before: &Snapshot, active: &str) {
        stage.ok(&["service", "remove", SERVICE]);
        let shown: Value = stage.json(&["partition", "show", active]);
        let disks = shown["disks"].as_array().unwrap();
        let plain = disks.iter().filter(|disk| disk["cow"].is_null());
        for image in plain.map(|disk| disk["backing"]["image"].as_str().unwrap()) {
            // Stopped, so that it is clean without a journal.
            programs::run(&["e2fsck", "-f", "-n", image]).unwrap();
        }
        for partition in ["web-a", "web-b"] {
            stage.ok(&["partition", "remove", partition]);
        }
        let left = Snapshot::left_since(before, LEFT).unwrap();
        assert!(left.is_empty(), "left: {left:?}");
        if self.strategy == "address" {
            stage.host_ip(&format!("link del {SECOND}"));
        }
    }
}

/// Goes through some points, one after the other. The machine starts again in between; where it was is in the phase of the
/// test, with the phase in which the command was: nothing is written out for that, which would write out what the command has not.
fn go(points: &[Point]) {
    let phase = vm::phase();
    let mut next = 0;
    if let Some((cut, begun)) = phase.split_once(':') {
        let cut: usize = cut.parse().unwrap();
        let point = &points[cut];
        let stage = Stage::after_reset();
        point.uplinks(&stage);
        let before = Snapshot::take().unwrap();
        point.check((stage, before), begun, None);
        next = cut + 1;
    }
    for (number, point) in points.iter().enumerate().skip(next) {
        println!("{}", point.name());
        let (stage, before) = point.prepare();
        let writers = point.writers(&stage);
        let (running, begun) = point.run(&stage);
        match point.end {
            End::Power => {
                vm::reset(&format!("{number}:{begun}")).unwrap();
            }
            End::Kill => {
                running.signal(Signal::KILL).unwrap();
                running.wait(Duration::from_secs(10)).unwrap();
                point.check((stage, before), &begun, writers);
            }
        }
    }
}

/// In every run: of five strategies one power cut each.
#[test]
fn five_points_by_the_seed() {
    let mut points: Vec<_> = ALL.iter().filter(|point| point.end == End::Power).copied().collect();
    points.sort_by_key(|point| hash(point.name()));
    let mut chosen: Vec<Point> = Vec::new();
    for point in points {
        if chosen.iter().all(|one| one.strategy != point.strategy) {
            chosen.push(point);
        }
    }
    println!("seed {}", seed());
    go(&chosen[..5]);
}

macro_rules! points {
    ($($strategy:ident: { $($command:ident: [$($phase:ident)*])* })*) => {
        const ALL: &[Point] = &[$($($(
            Point { end: End::Power, strategy: stringify!($strategy), command: stringify!($command), phase: stringify!($phase) },
            Point { end: End::Kill, strategy: stringify!($strategy), command: stringify!($command), phase: stringify!($phase) },
        )*)*)*];
        points!(@tests power Power $($strategy: { $($command: [$($phase)*])* })*);
        points!(@tests kill Kill $($strategy: { $($command: [$($phase)*])* })*);
    };
    (@tests $module:ident $end:ident $($strategy:ident: { $($command:ident: [$($phase:ident)*])* })*) => {
        mod $module { $(mod $strategy { $(mod $command { $(
            #[test]
            #[ignore = "tier soak"]
            fn $phase() {
                super::super::super::go(&[super::super::super::Point {
                    end: super::super::super::End::$end,
                    strategy: stringify!($strategy),
                    command: stringify!($command),
                    phase: stringify!($phase),
                }]);
            }
        )*})*})*}
    };
}

points! {
    takeover: {
        apply: [clone scan inject boot patch restart verify arm take_over observe drain retire]
        rollback: [boot verify arm give_back drain]
        commit: [commit]
    }
    quiesce: {
        apply: [clone scan inject boot patch restart verify quiesce take_over waiting moved begun released observe drain retire]
        rollback: [boot verify give_back waiting moved begun released drain]
        commit: [commit]
    }
    log: {
        apply: [clone scan inject boot patch restart verify quiesce take_over waiting moved begun released observe drain retire]
        rollback: [boot verify give_back waiting moved begun released drain]
        commit: [commit]
    }
    mirror: {
        apply: [clone scan inject boot patch restart verify quiesce take_over waiting moved begun released observe drain retire]
        rollback: [boot verify give_back waiting moved begun released drain]
        commit: [commit]
    }
    database: {
        apply: [clone scan inject boot patch restart verify quiesce take_over waiting moved begun released observe drain retire]
        rollback: [boot verify give_back waiting moved begun released drain]
        commit: [commit]
    }
    copies: {
        apply: [clone scan inject boot patch restart verify arm take_over observe drain retire]
        rollback: [boot verify arm give_back drain]
        commit: [commit]
    }
    device: {
        apply: [clone scan inject boot patch restart verify take_over waiting exchanged observe drain retire]
        rollback: [boot verify give_back waiting exchanged drain]
        commit: [commit]
    }
    address: {
        apply: [clone scan inject boot patch restart verify take_over waiting exchanged observe drain retire]
        rollback: [boot verify give_back waiting exchanged drain]
        commit: [commit]
    }
    letter: {
        apply: [clone scan inject boot patch restart verify arm take_over observe drain retire]
        rollback: [boot verify arm give_back drain]
        commit: [commit]
    }
}
