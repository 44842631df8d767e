//! A database moves from one partition to the other, while it is written to.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use patchswitch_tests::netlab::{Ns, SERVICE};
use patchswitch_tests::postgres::{Database, Manner, PORT, Writer};
use patchswitch_tests::programs::{self, Output};

use crate::rig::{NAME, Rig};

/// Where clients are.
const CLIENTS: &str = "10.77.0.0/24";
const TABLES: [(&str, Manner); 2] = [("singly", Manner::AtOnce), ("together", Manner::InTransaction)];

/// Runs the example that moves a database; how it ended.
fn moved(rig: &Rig, database: &Database, (from, to): (&Ns, &Ns)) -> anyhow::Result<Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/postgresql.sh");
    let settings = [
        format!("PATCHSWITCH={}", programs::built("patchswitch")?.display()),
        format!("DATA={}", database.data()),
        format!("SOCKET={}", database.path()),
        format!("LOG={}/log", database.path()),
        format!("FROM={}", from.name()),
        format!("TO={}", to.name()),
        // A machine may be slow: what has begun is to end by itself.
        "YOUNG=3".to_owned(),
        "FINISH=10".to_owned(),
    ];
    let mut argv = vec!["env"];
    argv.extend(settings.iter().map(String::as_str));
    let script = script.to_string_lossy();
    argv.extend([script.as_ref(), NAME]);
    rig.lab.host.output(&argv)
}

/// A database in the first partition, attached, and with something in it.
fn served(label: &str) -> anyhow::Result<(Rig, Database)> {
    let rig = Rig::new(label)?;
    let database = Database::new(label, CLIENTS)?;
    database.start(&rig.lab.a)?;
    rig.attach()?;
    rig.lab.client.run(&bench(&["-i", "-q"]))?;
    Ok((rig, database))
}

fn bench<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [&["pgbench", "-h", SERVICE[0], "-U", "postgres"], arguments, &["postgres"]].concat()
}

/// How long the server takes to end and to begin when nobody wants anything of it.
fn own_pause(database: &Database, ns: &Ns) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    database.stop()?;
    database.start(ns)?;
    Ok(begun.elapsed())
}

#[test]
fn no_connection_is_refused_and_no_row_is_lost() {
    let (rig, database) = served("pg").unwrap();
    let writers = TABLES
        .map(|(table, manner)| Writer::start(&rig.lab.client, SERVICE[0].parse().unwrap(), table, manner));
    let log = Path::new(database.path()).join("pgbench");
    let load =
        rig.lab.client.spawn(&bench(&["-C", "-n", "-c", "4", "-j", "4", "-T", "15"]), Some(&log)).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let (a, b) = (&rig.lab.a, &rig.lab.b);
    for (from, to) in [(a, b), (b, a), (a, b)] {
        let output = moved(&rig, &database, (from, to)).unwrap();
        assert!(output.status.success(), "{output:?}\n{}", database.log());
        println!("{}{}", output.stderr, output.stdout);
        // The next one is possible as soon as nothing is left of the last.
        rig.ok(&["drain", NAME, "--deadline", "5"]).unwrap();
        std::thread::sleep(Duration::from_secs(1));
    }
    let written = writers.map(|writer| writer.stop().unwrap());
    let ended = load.wait(Duration::from_secs(30)).unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(ended.success() && text.contains("number of failed transactions: 0 "), "{text}");
    for ((table, _), written) in TABLES.iter().zip(&written) {
        println!("{table}: {written}");
        assert_eq!(written.refused, Vec::<String>::new(), "{table}");
        // Each end of a session leaves one row at most that nobody can tell of.
        assert!(written.unknown.len() < written.sessions as usize, "{table}: {:?}", written.unknown);
        assert!(written.acknowledged.len() > 50 && written.sessions > 3, "{table}: {}", written.sessions);
        written.check(database.rows(table).unwrap()).unwrap();
    }
    println!("the server's own stop and start: {:?}", own_pause(&database, b).unwrap());
    drop(database);
    rig.finish().unwrap();
}

/// Its port is somebody else's there.
#[test]
fn a_server_that_does_not_begin_there_is_put_back() {
    let (rig, database) = served("pgback").unwrap();
    let (table, manner) = TABLES[0];
    let writer = Writer::start(&rig.lab.client, SERVICE[0].parse().unwrap(), table, manner);
    std::thread::sleep(Duration::from_secs(1));
    let _taken = rig.lab.b.enter(|| Ok(TcpListener::bind(("::", PORT))?)).unwrap();
    let output = moved(&rig, &database, (&rig.lab.a, &rig.lab.b)).unwrap();
    assert_eq!(output.status.code(), Some(22), "{output:?}");
    assert!(output.stderr.contains("it goes back to"), "{output:?}");
    std::thread::sleep(Duration::from_secs(1));
    let written = writer.stop().unwrap();
    assert_eq!(written.refused, Vec::<String>::new(), "{output:?}");
    assert!(written.sessions == 2 && written.acknowledged.len() > 50, "{written}");
    written.check(database.rows(table).unwrap()).unwrap();
    let status = rig.ok(&["status", NAME]).unwrap();
    assert_eq!(status["attachments"][0]["partitions"][0]["role"], "active", "{status}");
    drop(database);
    rig.finish().unwrap();
}
