//! Results come from inside a partition. Whatever they say, they add results of the job's own patches and no more.

use proptest::prelude::*;

use super::*;
use crate::patch::wire::{
    Identity, OnError, PatchFailure, PatchInput, PatchOutcome, PatchResults, PatchTableInput, WIRE_VERSION,
};

fn input(patch: &Patch) -> PatchInput {
    PatchInput {
        id: patch.id.to_string(),
        file: patch.file.to_string(),
        sha256: patch.sha256.clone(),
        size: patch.size,
        driver: patch.driver,
        time_limit_s: 60,
        group: 0,
    }
}

fn outcome(id: &str, exit_code: i32) -> PatchOutcome {
    PatchOutcome {
        id: id.to_owned(),
        exit_code: Some(exit_code),
        signal: None,
        failure: None,
        duration_ms: 7,
        log_digest: "0a".repeat(32),
        log_tail: "done\n".to_owned(),
        boot_id: "b".to_owned(),
    }
}

/// Four patches, of which the job's table lists the first two.
fn setting(dir: &Path) -> (Store, JobId, PatchTableInput) {
    let mut store = Store::open(dir).unwrap();
    for number in 1..=4 {
        let (id, _) = store.add_patch(&new_patch(&format!("p{number}.deb"), number), &admin()).unwrap();
        if number < 4 {
            let _ = store.decide(id, Decision::Approved, &admin()).unwrap();
        }
    }
    let job = begin(&mut store, "web");
    let patches = store.patches().unwrap()[..2].iter().map(input).collect();
    let table = PatchTableInput {
        version: WIRE_VERSION,
        job: job.to_string(),
        on_error: OnError::Stop,
        identity: Identity::Keep,
        patches,
    };
    (store, job, table)
}

fn results(job: JobId, outcomes: Vec<PatchOutcome>) -> PatchResults {
    PatchResults { outcomes, finished: true, ..PatchResults::new(&job.to_string(), "b") }
}

#[test]
fn results_are_stored_once_and_history_grows_by_job() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, job, table) = setting(dir.path());
    let clone = name("web-b");
    let said = results(job, vec![outcome("1", 0)]);
    assert_eq!(store.merge_results(job, &clone, &table, &said).unwrap(), Merged::Added(1));
    // The second report has more to say; what was said before stays, even if it says otherwise now.
    let said = results(job, vec![outcome("1", 1), outcome("2", 100)]);
    assert_eq!(store.merge_results(job, &clone, &table, &said).unwrap(), Merged::Added(1));
    let last = |store: &Store, patch: &str| store.find_patch(patch).unwrap().last_result.unwrap();
    assert!(last(&store, "1").success);
    assert_eq!((last(&store, "2").success, last(&store, "2").exit_code), (false, Some(100)));
    let _ = store.end_job(job, ExitCode::PatchFailed, "").unwrap();

    let next = begin(&mut store, "web");
    let table = PatchTableInput { job: next.to_string(), ..table };
    let said = results(next, vec![outcome("1", 0), outcome("2", 0)]);
    assert_eq!(store.merge_results(next, &clone, &table, &said).unwrap(), Merged::Added(2));
    let two = store.find_patch("2").unwrap();
    let history: Vec<_> =
        store.results(two.id).unwrap().iter().map(|r| (r.job, r.attempt, r.success)).collect();
    assert_eq!(history, [(job, 1, false), (next, 2, true)]);
    assert_eq!(two.last_result.unwrap().job, next);
    assert_eq!(store.job_results(job).unwrap().len(), 2);
}

#[test]
fn what_was_given_back_does_not_count_as_applied() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, job, table) = setting(dir.path());
    super::web(&mut store);
    let web = name("web");
    let said = results(job, vec![outcome("1", 0), outcome("2", 1)]);
    let _ = store.merge_results(job, &name("web-b"), &table, &said).unwrap();
    assert_eq!(store.applied(&web).unwrap(), [], "a clone serves nobody");
    assert_eq!(store.set_applied(job).unwrap(), Change::Changed);
    assert_eq!(store.set_applied(job).unwrap(), Change::AlreadySo);
    assert_eq!(store.applied(&web).unwrap(), [store.find_patch("1").unwrap().id], "the other one failed");
    assert_eq!(store.unset_applied(job).unwrap(), Change::Changed);
    assert_eq!(store.unset_applied(job).unwrap(), Change::AlreadySo);
    assert_eq!(store.applied(&web).unwrap(), []);
}

#[test]
fn results_about_something_else_are_refused_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, job, table) = setting(dir.path());
    let clone = name("web-b");
    let cases = [
        (results(JobId(job.0 + 1), vec![outcome("1", 0)]), "another job"),
        (results(job, vec![outcome("1", 0), outcome("3", 0)]), "does not have"),
        (results(job, vec![outcome("1", 1), outcome("1", 0)]), "two outcomes"),
        (results(job, vec![PatchOutcome { log_digest: "x".to_owned(), ..outcome("1", 0) }]), "log_digest"),
        (PatchResults { version: 9, ..results(job, vec![outcome("1", 0)]) }, "version"),
    ];
    for (said, words) in cases {
        match store.merge_results(job, &clone, &table, &said).unwrap() {
            Merged::Refused(reason) => assert!(reason.contains(words), "{reason}"),
            added => panic!("{added:?} of {said:?}"),
        }
    }
    assert_eq!(store.job_results(job).unwrap(), []);
    let other = PatchTableInput { job: "9".to_owned(), ..table };
    assert!(store.merge_results(job, &clone, &other, &results(job, vec![])).is_err());
}

#[test]
fn terminals_and_numbers_are_not_fooled() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, job, table) = setting(dir.path());
    let loud =
        PatchOutcome { log_tail: "\u{1b}[2Jowned\u{7}".to_owned(), duration_ms: u64::MAX, ..outcome("1", 0) };
    let said = results(job, vec![loud]);
    assert_eq!(store.merge_results(job, &name("web-b"), &table, &said).unwrap(), Merged::Added(1));
    let result = store.job_results(job).unwrap().remove(0);
    assert!(!result.log_tail.contains('\u{1b}') && !result.log_tail.contains('\u{7}'));
    assert_eq!(result.duration_ms, i64::MAX as u64);
}

#[test]
fn history_cannot_be_rewritten_even_by_us() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, job, table) = setting(dir.path());
    let said = results(job, vec![outcome("1", 1)]);
    let _ = store.merge_results(job, &name("web-b"), &table, &said).unwrap();
    for sql in [
        "UPDATE patch_results SET success = 1",
        "DELETE FROM patch_results",
        "UPDATE audit SET who = 'nobody'",
        "DELETE FROM audit",
        "UPDATE patches SET sha256 = hex(randomblob(32))",
        "UPDATE patches SET file = 'x'",
    ] {
        assert!(store.connection.execute(sql, []).is_err(), "{sql}");
    }
}

fn any_id() -> impl Strategy<Value = String> {
    prop_oneof![
        (0..7_i32).prop_map(|id| id.to_string()),
        "[0-9]{1,20}",
        "-?[a-z0-9._+:-]{0,12}",
        "(1 OR 1=1|1;DROP TABLE patches|' OR ''=')",
    ]
}

fn any_outcome() -> impl Strategy<Value = PatchOutcome> {
    let failure = proptest::option::of(prop_oneof![
        Just(PatchFailure::TimeOut),
        Just(PatchFailure::Digest),
        Just(PatchFailure::NotRun)
    ]);
    let ends = (proptest::option::of(any::<i32>()), proptest::option::of(any::<i32>()), failure);
    let digest = prop_oneof![Just("0a".repeat(32)), ".{0,70}"];
    (any_id(), ends, any::<u64>(), digest, ".{0,40}", "[ -~]{0,20}").prop_map(
        |(id, (exit_code, signal, failure), duration_ms, log_digest, log_tail, boot_id)| PatchOutcome {
            id,
            exit_code,
            signal,
            failure,
            duration_ms,
            log_digest,
            log_tail,
            boot_id,
        },
    )
}

fn any_results() -> impl Strategy<Value = PatchResults> {
    let outcomes = proptest::collection::vec(any_outcome(), 0..5);
    // The first job has the number 1, so that most of these get as far as the patches.
    let job = prop_oneof![4 => Just("1".to_owned()), 1 => any_id()];
    let version = prop_oneof![9 => Just(WIRE_VERSION), 1 => any::<u32>()];
    (version, job, "[a-z]{1,5}", outcomes, any::<bool>()).prop_map(
        |(version, job, boot_id, outcomes, finished)| PatchResults {
            version,
            job,
            boot_id,
            started: Vec::new(),
            outcomes,
            finished,
        },
    )
}

/// Everything in the store but the results, as text.
fn everything_else(store: &Store) -> String {
    let tables =
        ["services", "partitions", "disks", "primaries", "patches", "applied", "jobs", "steps", "audit"];
    let mut text = String::new();
    for table in tables {
        let mut query = store.connection.prepare(&format!("SELECT * FROM {table}")).unwrap();
        let columns = query.column_count();
        let mut rows = query.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            for column in 0..columns {
                text.push_str(&format!("{:?} ", row.get_ref(column).unwrap()));
            }
        }
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_result_changes_anything_but_results_of_the_jobs_own_patches(
        said in proptest::collection::vec(any_results(), 1..6)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, job, table) = setting(dir.path());
        store.connection.pragma_update(None, "synchronous", "OFF").unwrap();
        let before = everything_else(&store);
        let mut known = Vec::new();
        for said in &said {
            let merged = store.merge_results(job, &name("web-b"), &table, said).unwrap();
            let now = store.job_results(job).unwrap();
            prop_assert_eq!(&now[..known.len()], &known[..], "what was known stays");
            match merged {
                Merged::Added(count) => prop_assert_eq!(now.len(), known.len() + count),
                Merged::Refused(_) => prop_assert_eq!(now.len(), known.len()),
            }
            let listed = ["1", "2"].map(str::to_owned);
            prop_assert!(now.iter().all(|result| listed.contains(&result.patch.to_string())));
            known = now;
        }
        prop_assert_eq!(everything_else(&store), before);
    }
}
