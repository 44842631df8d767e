//! A partition whose service has one writer: Redis, with a file that it writes each change to before it answers.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab::SERVICE;
use patchswitch_tests::programs;
use patchswitch_tests::redis::{PORT, Writer};
use patchswitch_tests::root;
use patchswitch_tests::written::{Noting, Written};

use super::client;
use super::stage::{Settings, Stage, job_root, path};

/// The name of the server's process.
pub(super) const SERVER: &str = "redis-server";

/// Begins and ends the server. Its directory is the disk that moves.
const DB: &str = r#"#!/bin/sh
ask() { redis-cli -e -s /run/redis.sock "$@" 2>/run/said; }
case $1 in
start)
    if [ "$(ask PING)" = PONG ]; then exit 0; fi
    redis-server --bind '*' '-::*' --protected-mode no --port 6379 --unixsocket /run/redis.sock --dir /data \
        --daemonize yes --save '' --appendonly yes --appendfsync always --pidfile /run/redis.pid --logfile /run/redis.log
    n=0
    until [ "$(ask PING)" = PONG ]; do
        n=$((n + 1))
        if [ $n -gt 300 ]; then cat /run/redis.log >&2; exit 1; fi
        sleep 0.02
    done
    ;;
stop)
    if [ ! -e /run/redis.pid ]; then exit 0; fi
    pid=$(cat /run/redis.pid)
    kill "$pid" 2>/run/said
    # It takes its file away at its end.
    while [ -e "/proc/$pid/exe" ] && kill -0 "$pid" 2>/run/said; do sleep 0.02; done
    ;;
esac
"#;

/// The root of [`job_root`] with the server.
fn keeper_root() -> PathBuf {
    let root = PathBuf::from("/run/patchswitch-test-root.keeper");
    if root.is_dir() {
        return root;
    }
    let new = root.with_extension("new");
    programs::run(&["cp", "-a", job_root().to_str().unwrap(), new.to_str().unwrap()]).unwrap();
    // The server is another name of this program.
    root::put_programs(
        &new,
        &[("redis-check-rdb", "redis-server"), ("redis-cli", "redis-cli"), ("rm", "rm")],
    )
    .unwrap();
    put_service(&new, DB);
    fs::rename(new, &root).unwrap();
    root
}

/// Puts a database's command into a root, a web server that begins it before itself, and the place of its disk.
pub(super) fn put_service(root: &Path, db: &str) {
    let port = client::PORT;
    let serve = format!(
        "#!/bin/sh\n/usr/bin/db start || exit 1\nexec /usr/bin/patchswitch-load serve --port {port} --tag \"$(cat /etc/says)\"\n"
    );
    for (name, text) in [("db", db), ("serve", &serve)] {
        let path = root.join("usr/bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::create_dir(root.join("data")).unwrap();
}

/// A service that is quiesced: the web server says who serves, and Redis keeps numbers.
pub(super) fn settings() -> Settings {
    Settings {
        root: (keeper_root, "80M"),
        standby: &["--size", "80M"],
        disks: &["data:16M:/data:move"],
        more: "strategy = \"quiesce\"\n\
               [service.quiesce]\nstop = \"/usr/bin/db stop\"\nstart = \"/usr/bin/db start\"\nhold = \"20s\"\n\
               [[service.probe]]\nkind = \"tcp\"\nport = 6379\n",
        ..Settings::default()
    }
}

/// Nothing of a job is left but the server that it has started anew: in the control group of the command by which that was
/// done, and perhaps as the process by which its namespaces are known.
#[track_caller]
pub(super) fn nothing_left(stage: &Stage, before: &Snapshot) {
    stage.nothing_of_a_job_left_but(before, |left| {
        left.retain(|one| !one.name.contains("/exec-"));
        for value in left.iter_mut().flat_map(|one| [&mut one.before, &mut one.after]).flatten() {
            if value == SERVER {
                "init".clone_into(value);
            }
            // A disk that came back from a copy lies where the copy lay.
            *value = value.replace("web-b-data.img", "web-a-data.img");
        }
    });
}

/// Writers that go on through everything.
pub(super) struct Writers(Vec<(&'static str, Writer)>);

impl Writers {
    pub(super) fn start(stage: &Stage) -> Self {
        assert_eq!(PORT, 6379);
        let service = SERVICE[0].parse().unwrap();
        let one = |(key, each)| (key, Writer::start(&stage.client, service, key, each));
        Self([("all", usize::MAX), ("ten", 10), ("one", 1)].map(one).into())
    }

    /// Ends them. All that was promised is there, in the partition that serves; what they wrote.
    #[track_caller]
    pub(super) fn stop(self, stage: &Stage) -> Vec<Written> {
        let stop = |(key, writer): (&str, Writer)| {
            let written = writer.stop().unwrap();
            println!("{key}: {written}");
            written.check(rows(stage, key)).unwrap();
            written
        };
        self.0.into_iter().map(stop).collect()
    }

    /// As well as that, no connection was refused.
    #[track_caller]
    pub(super) fn stop_unnoticed(self, stage: &Stage) {
        for written in self.stop(stage) {
            assert_eq!(written.refused, Vec::<String>::new());
            assert!(written.acknowledged.len() > 20, "{written}");
        }
    }
}

/// A writer that notes durably what was acknowledged to it, for who comes after a power cut.
pub(super) struct Noted;

impl Noted {
    /// Writes until the machine is cut off.
    pub(super) fn begin(stage: &Stage) {
        let service = SERVICE[0].parse().unwrap();
        let noting = Self::after(&rows(stage, "noted"));
        drop(Writer::start_noting(&stage.client, service, "noted", 10, noting));
    }

    /// What a writer does with numbers that come after those that are there.
    pub(super) fn after(there: &[i64]) -> Noting {
        let mut file = fs::File::options().create(true).append(true).open(path("noted")).unwrap();
        let note = move |number: i64| {
            writeln!(file, "{number}").and_then(|()| file.sync_data()).unwrap();
        };
        (there.last().copied().unwrap_or(0) + 1, Box::new(note))
    }

    /// All that is noted is there.
    #[track_caller]
    pub(super) fn check(stage: &Stage) {
        Self::are(&rows(stage, "noted"));
    }

    /// All that is noted is among these.
    #[track_caller]
    pub(super) fn are(there: &[i64]) {
        let noted = fs::read_to_string(path("noted")).unwrap();
        let there: BTreeSet<i64> = there.iter().copied().collect();
        // The last line may be half of one.
        let noted: Vec<i64> =
            noted.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')?.parse().ok()).collect();
        println!("{} noted, {} there", noted.len(), there.len());
        assert!(noted.len() > 10 && noted.iter().all(|number| there.contains(number)), "{noted:?} {there:?}");
    }
}

/// The numbers that are there.
#[track_caller]
fn rows(stage: &Stage, key: &str) -> Vec<i64> {
    let active = stage.active();
    let ask = [
        "partition",
        "exec",
        &active,
        "--",
        "redis-cli",
        "-e",
        "-s",
        "/run/redis.sock",
        "ZRANGE",
        key,
        "0",
        "-1",
    ];
    let said = stage.ok(&ask);
    // Of none there is an empty line.
    said.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| line.parse().unwrap()).collect()
}
