//! A store of keys moves from one partition to the other, while it is written to.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use patchswitch_tests::netlab::{Ns, SERVICE};
use patchswitch_tests::programs::{self, Output};
use patchswitch_tests::redis::{Keys, PORT, Writer};

use crate::rig::{NAME, Rig};

/// A connection for all numbers, for ten each, and for one each.
const WRITERS: [(&str, usize); 3] = [("all", usize::MAX), ("ten", 10), ("one", 1)];

/// Runs the example that moves it; how it ended.
fn moved(rig: &Rig, keys: &Keys, (from, to): (&Ns, &Ns)) -> anyhow::Result<Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/redis.sh");
    let settings = [
        format!("PATCHSWITCH={}", programs::built("patchswitch")?.display()),
        format!("SERVER={}", keys.path("redis-server")),
        format!("CONF={}", keys.path("conf")),
        format!("SOCKET={}", keys.path("socket")),
        "RUN_AS=root".to_owned(),
        format!("FROM={}", from.name()),
        format!("TO={}", to.name()),
    ];
    let mut argv = vec!["env"];
    argv.extend(settings.iter().map(String::as_str));
    let script = script.to_string_lossy();
    argv.extend([script.as_ref(), NAME]);
    rig.lab.host.output(&argv)
}

#[test]
fn no_connection_is_refused_and_no_key_is_lost() {
    let rig = Rig::new("redis").unwrap();
    let keys = Keys::new("redis").unwrap();
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    keys.start(a).unwrap();
    rig.attach().unwrap();
    let service = SERVICE[0].parse().unwrap();
    let writers = WRITERS.map(|(key, each)| Writer::start(&rig.lab.client, service, key, each));
    std::thread::sleep(Duration::from_secs(1));
    for (from, to) in [(a, b), (b, a), (a, b)] {
        let output = moved(&rig, &keys, (from, to)).unwrap();
        assert!(output.status.success(), "{output:?}\n{}", keys.log());
        println!("{}{}", output.stderr, output.stdout);
        rig.ok(&["drain", NAME, "--deadline", "5"]).unwrap();
        std::thread::sleep(Duration::from_secs(1));
    }
    for ((key, each), writer) in WRITERS.into_iter().zip(writers) {
        let written = writer.stop().unwrap();
        println!("{key}: {written}");
        assert_eq!(written.refused, Vec::<String>::new(), "{key}");
        // Its connections end with the server; one that is under way then leaves a number that nobody can tell of.
        assert!(written.unknown.len() <= 3, "{key}: {:?}", written.unknown);
        assert!(written.acknowledged.len() > 50 && (each == 1 || written.sessions > 3), "{key}: {written}");
        written.check(keys.rows(key).unwrap()).unwrap();
    }
    drop(keys);
    rig.finish().unwrap();
}

/// Its port is somebody else's there.
#[test]
fn a_server_that_does_not_begin_there_is_put_back() {
    let rig = Rig::new("redisback").unwrap();
    let keys = Keys::new("redisback").unwrap();
    keys.start(&rig.lab.a).unwrap();
    rig.attach().unwrap();
    let (key, each) = WRITERS[1];
    let writer = Writer::start(&rig.lab.client, SERVICE[0].parse().unwrap(), key, each);
    std::thread::sleep(Duration::from_secs(1));
    let _taken = rig.lab.b.enter(|| Ok(TcpListener::bind(("::", PORT))?)).unwrap();
    let output = moved(&rig, &keys, (&rig.lab.a, &rig.lab.b)).unwrap();
    assert_eq!(output.status.code(), Some(22), "{output:?}");
    std::thread::sleep(Duration::from_secs(1));
    let written = writer.stop().unwrap();
    assert_eq!(written.refused, Vec::<String>::new(), "{output:?}");
    assert!(written.acknowledged.len() > 50, "{written}");
    written.check(keys.rows(key).unwrap()).unwrap();
    drop(keys);
    rig.finish().unwrap();
}
