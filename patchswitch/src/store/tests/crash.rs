//! Kills in the middle of a write, torn and damaged files, readers beside a writer, old and new versions.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};

use super::*;

/// Tells the child where its store is.
const DIR: &str = "PATCHSWITCH_TEST_DIR";

/// What the child does: begins a large write and never ends it.
fn write_for_ever(dir: &Path) {
    let mut store = Store::open(dir).unwrap();
    let _ = store.put_partition(&partition("complete")).unwrap();
    // A cache of a few pages: SQLite has to write parts of the transaction to the log before it is committed.
    store.connection.pragma_update(None, "cache_size", 8).unwrap();
    store
        .write("never finish", |tx| {
            for number in 0..2000 {
                let text = format!("torn-{number}");
                partitions::put(tx, &Partition { definition: json!("x".repeat(500)), ..partition(&text) })?;
            }
            println!("ready");
            std::thread::sleep(Duration::from_secs(60));
            Ok(())
        })
        .unwrap();
}

#[expect(clippy::disallowed_methods, reason = "the test starts itself again")]
fn child(dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "store::tests::crash::a_write_that_is_killed_never_happened", "--nocapture"]);
    command.env(DIR, dir).stdout(Stdio::piped());
    command
}

/// Plays both parts: the variable tells the child, which is this test in a process of its own.
#[test]
fn a_write_that_is_killed_never_happened() {
    if let Some(dir) = std::env::var_os(DIR) {
        return write_for_ever(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut child = child(dir.path()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines.map_while(Result::ok).any(|line| line.contains("ready"));
    let log = std::fs::metadata(dir.path().join("state.db-wal")).map(|meta| meta.len());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ready, "the child ended by itself");
    assert!(log.unwrap() > 500_000, "parts of the write are in the log");
    let mut store = Store::open(dir.path()).unwrap();
    let names: Vec<_> = store.partitions().unwrap().into_iter().map(|p| p.name.to_string()).collect();
    assert_eq!(names, ["complete"]);
    // And the lock of the dead writer is gone.
    assert_eq!(store.put_partition(&partition("next")).unwrap(), Change::Changed);
}

/// Writes pairs: a partition and a line of the audit log in one transaction each, then copies the files as a crash would leave them.
fn crashed(pairs: usize) -> (Vec<u8>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    store.connection.pragma_update(None, "wal_autocheckpoint", 0).unwrap();
    for number in 0..pairs {
        pair(&mut store, number);
    }
    let read = |file: &str| std::fs::read(dir.path().join(file)).unwrap();
    (read("state.db"), read("state.db-wal"))
}

fn pair(store: &mut Store, number: usize) {
    let text = name(&format!("s{number}"));
    store
        .write("write a pair", |tx| {
            partitions::put(tx, &partition(text.as_str()))?;
            audit::note(tx, &admin(), text.as_str(), "put", ("", "standby"))
        })
        .unwrap();
}

fn open_copy(db: &[u8], log: &[u8]) -> Result<usize, StoreError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("state.db"), db).unwrap();
    std::fs::write(dir.path().join("state.db-wal"), log).unwrap();
    let store = Store::open(dir.path())?;
    let (one, other) = (store.partitions()?.len(), store.audit(u32::MAX)?.len());
    assert_eq!(one, other, "half a transaction");
    Ok(one)
}

#[test]
fn a_torn_log_loses_whole_writes_from_its_end_only() {
    let pairs = 6;
    let (db, log) = crashed(pairs);
    assert_eq!(open_copy(&db, &log).unwrap(), pairs);
    let mut last = 0;
    for cut in (0..=log.len()).step_by(509) {
        let found = open_copy(&db, &log[..cut]).unwrap();
        assert!(found >= last && found <= pairs, "{found} after {last} at {cut}");
        last = found;
    }
    // Rubbish where the disk had not written yet.
    for start in (0..log.len()).step_by(4099) {
        let mut torn = log.clone();
        torn[start..].iter_mut().for_each(|byte| *byte ^= 0x5a);
        assert!(open_copy(&db, &torn).unwrap() <= pairs);
    }
}

#[test]
fn a_damaged_file_is_an_error_and_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let mut store = Store::open(dir.path()).unwrap();
    for number in 0..200 {
        pair(&mut store, number);
    }
    store.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(store);
    let good = std::fs::read(&path).unwrap();
    let mut pages = 0;
    for page in (4096..good.len()).step_by(4096) {
        let mut bad = good.clone();
        bad[page..page + 64].fill(0xff);
        std::fs::write(&path, &bad).unwrap();
        // Every page of this file is in use or free; a free one may hold anything.
        if let Err(error) = Store::open(dir.path()) {
            assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
            assert_eq!(error.exit_code(), ExitCode::BadData);
            pages += 1;
        }
        assert_eq!(std::fs::read(&path).unwrap(), bad);
    }
    assert!(pages * 4096 > good.len() / 2, "{pages} of {}", good.len() / 4096);
    std::fs::write(&path, "this is not a database, it is something else altogether").unwrap();
    assert!(matches!(Store::open(dir.path()), Err(StoreError::Corrupt { .. })));
}

#[test]
fn readers_never_wait_and_never_see_half_a_write() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let reader = Store::open(dir.path()).unwrap();
                    let (mut rounds, mut last) = (0, 0);
                    while !done.load(Ordering::Relaxed) {
                        let (one, other) = reader
                            .read("count", |connection| {
                                let count = |table| {
                                    let sql = format!("SELECT count(*) FROM {table}");
                                    connection.query_row(&sql, [], |row| row.get::<_, i64>(0))
                                };
                                Ok((count("partitions")?, count("audit")?))
                            })
                            .unwrap();
                        assert_eq!(one, other);
                        assert!(one >= last);
                        last = one;
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        for number in 0..150 {
            pair(&mut store, number);
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().unwrap() > 0);
        }
    });
    // A reader in the middle of a write of another process is not kept waiting.
    let reader = Store::open(dir.path()).unwrap();
    store
        .write("write slowly", |tx| {
            partitions::put(tx, &partition("slow"))?;
            let start = Instant::now();
            assert_eq!(reader.partitions()?.len(), 150);
            assert!(start.elapsed() < Duration::from_secs(2));
            Ok(())
        })
        .unwrap();
}

#[test]
fn two_writers_take_turns() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let dir = dir.path();
            scope.spawn(move || {
                let mut store = Store::open(dir).unwrap();
                for number in 0..25 {
                    pair(&mut store, writer * 100 + number);
                }
            });
        }
    });
    assert_eq!(Store::open(dir.path()).unwrap().partitions().unwrap().len(), 100);
}

#[test]
fn a_file_of_version_1_is_brought_up_to_date_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let first = &schema::MIGRATIONS[..1];
    let mut store = Store::open_with(dir.path(), first).unwrap();
    let _ = store.put_partition(&partition("old")).unwrap();
    drop(store);
    let broken = [first[0], "ALTER TABLE partitions ADD COLUMN note TEXT; SELECT nonsense FROM nowhere;"];
    assert!(Store::open_with(dir.path(), &broken).is_err());
    let columns = |store: &Store| -> i64 {
        let sql = "SELECT count(*) FROM pragma_table_info('partitions') WHERE name = 'note'";
        store.connection.query_row(sql, [], |row| row.get(0)).unwrap()
    };
    let store = Store::open_with(dir.path(), first).unwrap();
    assert_eq!(columns(&store), 0, "the broken migration left something");
    drop(store);
    let good = [first[0], "ALTER TABLE partitions ADD COLUMN note TEXT;"];
    let store = Store::open_with(dir.path(), &good).unwrap();
    assert_eq!(columns(&store), 1);
    assert_eq!(store.partitions().unwrap(), [partition("old")]);
    drop(store);
    drop(Store::open_with(dir.path(), &good).unwrap());
    let error = Store::open_with(dir.path(), first).unwrap_err();
    assert!(matches!(error, StoreError::Newer { found: 2, known: 1 }), "{error}");
}

#[test]
fn a_migration_that_exists_is_never_edited() {
    let digests: Vec<String> = schema::MIGRATIONS
        .iter()
        .map(|sql| Sha256::digest(sql).iter().take(8).map(|byte| format!("{byte:02x}")).collect())
        .collect();
    assert_eq!(digests, ["232f39f1037f4eb3"], "files of that version exist: add a migration instead");
}
