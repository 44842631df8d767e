//! One job per service.

use std::io::Write;
use std::time::{Duration, Instant};

use super::*;

#[test]
fn a_lock_excludes_others_says_who_has_it_and_ends_with_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let lock = JobLock::acquire(dir.path(), &name("web")).unwrap();
    assert_eq!(JobLock::holder(dir.path(), &name("web")).unwrap().map(|h| h.pid), Some(std::process::id()));
    // Another service is not concerned.
    drop(JobLock::acquire(dir.path(), &name("api")).unwrap());
    let error = JobLock::acquire(dir.path(), &name("web")).unwrap_err();
    let LockError::Busy { holder: Some(holder), .. } = &error else { panic!("{error:?}") };
    assert_eq!(holder.pid, std::process::id());
    assert_eq!(error.exit_code(), ExitCode::Busy);
    let text = error.to_string();
    assert!(text.starts_with(&format!("service web is busy: process {} since 2", holder.pid)), "{text}");
    drop(lock);
    assert_eq!(
        JobLock::holder(dir.path(), &name("web")).unwrap(),
        None,
        "the file is there, the lock is not"
    );
    assert_eq!(JobLock::holder(dir.path(), &name("nobody")).unwrap(), None);
    drop(JobLock::acquire(dir.path(), &name("web")).unwrap());
}

#[test]
fn waiting_for_a_lock_ends() {
    let dir = tempfile::tempdir().unwrap();
    let lock = JobLock::acquire(dir.path(), &name("web")).unwrap();
    let start = Instant::now();
    let limit = Duration::from_millis(100);
    assert!(matches!(JobLock::acquire_within(dir.path(), &name("web"), limit), Err(LockError::Busy { .. })));
    assert!(start.elapsed() >= limit && start.elapsed() < Duration::from_secs(5));
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(lock);
    });
    drop(JobLock::acquire_within(dir.path(), &name("web"), Duration::from_secs(10)).unwrap());
    release.join().unwrap();
}

#[test]
fn a_holder_that_has_not_written_yet_is_no_trouble() {
    let dir = tempfile::tempdir().unwrap();
    let lock = JobLock::acquire(dir.path(), &name("web")).unwrap();
    let mut file = std::fs::File::create(dir.path().join("lock/job-web")).unwrap();
    file.write_all(b"{").unwrap();
    let error = JobLock::acquire(dir.path(), &name("web")).unwrap_err();
    assert!(error.to_string().contains("another process"), "{error}");
    drop(lock);
}

#[test]
fn a_link_in_place_of_the_lock_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("lock")).unwrap();
    std::fs::write(dir.path().join("dear"), "content").unwrap();
    std::os::unix::fs::symlink("../dear", dir.path().join("lock/job-web")).unwrap();
    assert!(matches!(JobLock::acquire(dir.path(), &name("web")), Err(LockError::Io { .. })));
    assert_eq!(std::fs::read(dir.path().join("dear")).unwrap(), b"content");
}
