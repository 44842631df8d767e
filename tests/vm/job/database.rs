//! PostgreSQL in a partition goes over with its disk, while pgbench opens a connection for each transaction and two writers
//! remember what was acknowledged.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use patchswitch::host::linux::dm::{Dm, Suspend};
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab::SERVICE as ADDRESSES;
use patchswitch_tests::postgres::{Manner, Writer};
use patchswitch_tests::programs::run;
use patchswitch_tests::root;
use patchswitch_tests::written::Written;

use super::keeper::{Noted, nothing_left, put_service};
use super::stage::{SERVICE, Settings, Stage, job_root, path};

const BIN: &str = "/usr/lib/postgresql/15/bin";
/// The name of the server's process.
pub(super) const SERVER: &str = "postgres";
const WRITERS: [(&str, Manner); 2] = [("singly", Manner::AtOnce), ("together", Manner::InTransaction)];

/// Begins and ends the server.
const DB: &str = r#"#!/bin/sh
bin=/usr/lib/postgresql/15/bin data=/data/db
owner() { setpriv --reuid=postgres --regid=postgres --clear-groups -- env -C / LC_ALL=C "$@"; }
sql() { owner $bin/psql -XAtq -h /run/pg -d postgres -c "$1"; }
case $1 in
start)
    mkdir -p /run/pg
    chown postgres:postgres /run/pg
    # The first time of all.
    [ -e $data ] || cp -a /srv/db $data
    if sql 'SELECT 1' >/run/said 2>&1; then exit 0; fi
    # Left by a server of the other partition, or of before a power cut: here none runs.
    owner $bin/pg_ctl -D $data status >/run/said 2>&1 || rm -f $data/postmaster.pid
    owner $bin/pg_ctl -D $data start -W -l /run/pg/log >/run/said 2>&1 || { cat /run/said >&2; exit 1; }
    n=0
    until sql 'SELECT 1' >/run/said 2>&1; do
        n=$((n + 1))
        if [ $n -gt 200 ]; then tail -n 5 /run/pg/log >&2; exit 1; fi
        sleep 0.05
    done
    ;;
finish)
    sql "DO \$\$ DECLARE n int; e timestamptz := clock_timestamp() + interval '5 s'; BEGIN LOOP
        PERFORM pg_stat_clear_snapshot();
        PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND state = 'idle'
                AND backend_start < clock_timestamp() - interval '0.5 s';
        SELECT count(*) INTO n FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid();
        EXIT WHEN n = 0 OR clock_timestamp() > e;
        PERFORM pg_sleep(0.005);
    END LOOP; END \$\$"
    ;;
stop)
    [ -e $data/postmaster.pid ] || exit 0
    owner $bin/pg_ctl -D $data stop -m fast -w >/run/said 2>&1 || { cat /run/said >&2; exit 1; }
    ;;
own)
    # How long it takes to end and to begin when nobody wants anything of it.
    read -r begun rest </proc/uptime
    "$0" stop && "$0" start || exit 1
    read -r ended rest </proc/uptime
    echo "$begun $ended"
    ;;
esac
"#;

/// The root of [`job_root`] with the server and an empty database.
fn database_root() -> PathBuf {
    let root = PathBuf::from("/run/patchswitch-test-root.database");
    if root.is_dir() {
        return root;
    }
    let new = root.with_extension("new");
    let copy = |from: &str, to: &Path| {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        run(&["cp", "-a", from, to.to_str().unwrap()]).unwrap();
    };
    copy(job_root().to_str().unwrap(), &new);
    root::put_programs(&new, &["setpriv", "rm", "cp", "chown", "env"].map(|name| (name, name))).unwrap();
    for program in ["postgres", "pg_ctl", "psql"] {
        let from = format!("{BIN}/{program}");
        root::put_programs(&new, &[(&from, program)]).unwrap();
        copy(&from, &new.join(&from[1..]));
    }
    for library in ["plpgsql.so", "dict_snowball.so", "libpqwalreceiver.so"] {
        let from = format!("/usr/lib/postgresql/15/lib/{library}");
        copy(&from, &new.join(&from[1..]));
    }
    copy("/usr/share/postgresql/15", &new.join("usr/share/postgresql/15"));
    for name in ["passwd", "group"] {
        copy(&format!("/etc/{name}"), &new.join("etc").join(name));
    }
    make_database(&new.join("srv/db"));
    put_service(&new, DB);
    fs::rename(new, &root).unwrap();
    root
}

fn make_database(at: &Path) {
    let at = at.to_str().unwrap();
    fs::create_dir_all(at).unwrap();
    run(&["chown", "postgres:postgres", at]).unwrap();
    let owner = [
        "setpriv",
        "--reuid=postgres",
        "--regid=postgres",
        "--clear-groups",
        "--",
        "env",
        "-C",
        "/",
        "LC_ALL=C",
    ];
    let initdb = format!("{BIN}/initdb");
    run(&[&owner[..], &[&initdb, "-D", at, "-A", "trust", "--no-instructions", "-N"]].concat()).unwrap();
    let append = |file: &str, text: &str| {
        let path = format!("{at}/{file}");
        let old = fs::read_to_string(&path).unwrap();
        fs::write(&path, old + text).unwrap();
    };
    append("pg_hba.conf", "host all all 10.77.0.0/24 trust\n");
    append(
        "postgresql.conf",
        "listen_addresses = '*'\nunix_socket_directories = '/run/pg'\nshared_buffers = 16MB\nmax_wal_size = 64MB\n\
         min_wal_size = 32MB\nwal_init_zero = off\nrecovery_init_sync_method = syncfs\n\
         timezone = 'GMT'\nlog_timezone = 'GMT'\njit = off\n",
    );
}

/// The section of the service, with the time for which flows may wait.
macro_rules! section {
    ($hold:literal) => {
        concat!(
            "strategy = \"quiesce\"\n[service.quiesce]\nfinish = \"/usr/bin/db finish\"\nstop = \"/usr/bin/db stop\"\n",
            "start = \"/usr/bin/db start\"\nhold = \"",
            $hold,
            "\"\n[[service.probe]]\nkind = \"tcp\"\nport = 5432\n"
        )
    };
}

fn settings() -> Settings {
    Settings {
        root: (database_root, "300M"),
        standby: &["--size", "300M"],
        disks: &["data:200M:/data:move"],
        come_up: "60s",
        more: section!("60s"),
        ..Settings::default()
    }
}

/// Where somebody is killed whose flows wait then until the time is over.
pub(super) fn impatient() -> Settings {
    Settings { observe: "500ms", more: section!("15s"), ..settings() }
}

fn rows(stage: &Stage, table: &str) -> Vec<i64> {
    let said = sql(stage, &format!("SELECT n FROM {table} ORDER BY n"));
    said.lines().map(|line| line.trim().parse().unwrap()).collect()
}

/// What the server says, which runs in the partition that serves.
fn sql(stage: &Stage, sql: &str) -> String {
    let (active, psql) = (stage.active(), format!("{BIN}/psql"));
    stage.ok(&[
        "partition",
        "exec",
        &active,
        "--",
        &psql,
        "-XAtq",
        "-h",
        "/run/pg",
        "-U",
        "postgres",
        "-c",
        sql,
    ])
}

/// Two writers that go on through everything.
pub(super) struct Writers([(&'static str, Writer); 2]);

impl Writers {
    pub(super) fn start(stage: &Stage) -> Self {
        let server = ADDRESSES[0].parse().unwrap();
        Self(WRITERS.map(|(table, manner)| (table, Writer::start(&stage.client, server, table, manner))))
    }

    /// Ends them. All that was promised is there, in the partition that serves; what they wrote.
    #[track_caller]
    pub(super) fn stop(self, stage: &Stage) -> [Written; 2] {
        self.0.map(|(table, writer)| {
            let written = writer.stop().unwrap();
            println!("{table}: {written}");
            written.check(rows(stage, table)).unwrap();
            written
        })
    }
}

/// A writer that notes durably what was acknowledged to it, until the machine is cut off.
pub(super) fn begin_noting(stage: &Stage) {
    sql(stage, "CREATE TABLE IF NOT EXISTS noted (n bigint PRIMARY KEY)");
    let (server, noting) = (ADDRESSES[0].parse().unwrap(), Noted::after(&rows(stage, "noted")));
    drop(Writer::start_noting(&stage.client, server, "noted", Manner::AtOnce, noting));
}

/// All that is noted is there.
#[track_caller]
pub(super) fn check_noted(stage: &Stage) {
    Noted::are(&rows(stage, "noted"));
}

/// The connections that the client had to ask for again.
fn asked_again(stage: &Stage) -> u64 {
    let text = stage.client.run(&["cat", "/proc/thread-self/net/netstat"]).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:")).map(str::split_whitespace);
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let found = names.zip(values).find(|(name, _)| *name == "TCPSynRetrans");
    found.unwrap().1.parse().unwrap()
}

/// The parts of the time that flows waited, and the whole, in milliseconds.
fn waited(stage: &Stage, key: &str) -> f64 {
    let report = &stage.json(&["report"])["report"];
    let waited = &report[key];
    println!("{waited}");
    assert!(waited["flows"]["connections"].as_u64() > Some(0), "{report}");
    waited["flows"]["held_ms"].as_f64().unwrap()
}

/// What nobody can do without: the server's own end and begin, and its disk suspended and resumed once, in milliseconds.
fn least(stage: &Stage) -> f64 {
    let active = stage.active();
    let said = stage.ok(&["partition", "exec", &active, "--", "/usr/bin/db", "own"]);
    let times: Vec<f64> = said.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let own = (times[1] - times[0]) * 1e3;
    let (dm, disk) = (Dm::open().unwrap(), format!("ps-{active}-data"));
    let begun = Instant::now();
    dm.suspend(&disk, Suspend::LockFs).unwrap();
    dm.resume(&disk).unwrap();
    let bare = begun.elapsed().as_secs_f64() * 1e3;
    println!("own end and begin {own:.0} ms, bare suspend and resume {bare:.1} ms");
    own + bare
}

/// There, and back, with pgbench's connections and two writers; the wait is told beside what nobody can do without.
#[test]
fn a_database_goes_over_with_its_disk() {
    let stage = Stage::new(&settings());
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    let writers = Writers::start(&stage);
    let bench = |arguments: &[&'static str]| {
        [&["pgbench", "-h", ADDRESSES[0], "-U", "postgres"], arguments, &["postgres"]].concat()
    };
    stage.client.run(&bench(&["-i", "-q"])).unwrap();
    let log = path("pgbench");
    let mut load = stage
        .client
        .spawn(&bench(&["-C", "-n", "-c", "2", "-j", "2", "-R", "4", "-t", "100000"]), Some(&log))
        .unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let again = asked_again(&stage);
    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    let there = waited(&stage, "waited");
    std::thread::sleep(Duration::from_secs(1));
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    let back = waited(&stage, "waited_back");
    println!("connections asked for again: {}", asked_again(&stage) - again);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!load.has_ended());
    // As somebody does who wants its figures.
    load.signal(rustix::process::Signal::INT).unwrap();
    drop(load.wait(Duration::from_secs(10)));
    // Each of its clients ends with the first transaction, or connection, that fails, and says why.
    let text = fs::read_to_string(&log).unwrap();
    assert!(!text.contains("error") && !text.contains("abort") && !text.contains("FATAL"), "{text}");
    for written in writers.stop(&stage) {
        assert_eq!(written.refused, Vec::<String>::new());
        assert!(written.acknowledged.len() > 20, "{written}");
    }
    println!("pgbench: {text}");
    let least = least(&stage);
    println!(
        "waited {there:.0} ms and {back:.0} ms, {:.2} and {:.2} of {least:.0} ms",
        there / least,
        back / least
    );
    nothing_left(&stage, &before);
    stage.finish();
}
