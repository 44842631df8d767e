//! What is read is what was written, and nothing that is out of bounds is read.

use super::*;

fn patch(id: &str) -> PatchInput {
    PatchInput {
        id: id.to_owned(),
        file: "nginx_1.22.1-9+deb12u11_amd64.deb".to_owned(),
        sha256: "0f".repeat(32),
        size: 4,
        driver: Driver::Deb,
        time_limit_s: 60,
        group: 0,
    }
}

fn table(ids: &[&str]) -> PatchTableInput {
    PatchTableInput {
        version: WIRE_VERSION,
        job: "job-1".to_owned(),
        on_error: OnError::Stop,
        identity: Identity::Keep,
        patches: ids.iter().map(|id| patch(id)).collect(),
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
        log_tail: String::new(),
        boot_id: "b".to_owned(),
    }
}

fn results(outcomes: Vec<PatchOutcome>) -> PatchResults {
    PatchResults { outcomes, finished: true, ..PatchResults::new("job-1", "b") }
}

#[test]
fn names_that_could_lead_elsewhere_are_refused() {
    for name in ["", ".", "..", "../x", "a/b", "/etc/passwd", "-i", ".hidden", "a\0", "a b", "ä"] {
        let mut bad = table(&["p"]);
        bad.patches[0].file = name.to_owned();
        let bytes = serde_json::to_vec(&bad).unwrap();
        assert!(
            matches!(PatchTableInput::parse(&bytes), Err(WireError::Value { field: "file", .. })),
            "{name:?}"
        );
    }
    let good = serde_json::to_vec(&table(&["p", "q"])).unwrap();
    assert_eq!(PatchTableInput::parse(&good).unwrap(), table(&["p", "q"]));
}

#[test]
fn double_identifiers_short_digests_and_other_versions_are_refused() {
    let check = |change: fn(&mut PatchTableInput)| {
        let mut changed = table(&["p", "q"]);
        change(&mut changed);
        changed.check().unwrap_err().to_string()
    };
    assert!(check(|t| t.patches[1].id = "p".into()).contains("twice"));
    assert!(check(|t| t.patches[0].sha256.truncate(63)).contains("sha256"));
    assert!(check(|t| t.patches[0].sha256 = "0F".repeat(32)).contains("sha256"));
    assert!(check(|t| t.patches[0].time_limit_s = 0).contains("time_limit_s"));
    assert!(check(|t| t.version = 2).contains("version 2"));
}

#[test]
fn the_verdict_follows_the_hosts_table() {
    let table = table(&["p", "q"]);
    let verdict = |outcomes| results(outcomes).verdict(&table);
    assert_eq!(verdict(vec![outcome("p", 0), outcome("q", 0)]), PatchVerdict::Applied);
    assert_eq!(verdict(vec![outcome("p", 0), outcome("q", 1)]), PatchVerdict::Failed(vec!["q".to_owned()]));
    // A patch that the partition keeps silent about was not applied.
    assert_eq!(verdict(vec![outcome("p", 0)]), PatchVerdict::Failed(vec!["q".to_owned()]));
    assert!(matches!(verdict(vec![outcome("x", 0)]), PatchVerdict::Foreign(_)));
    // A second, better outcome does not hide the first.
    assert!(matches!(verdict(vec![outcome("p", 1), outcome("p", 0)]), PatchVerdict::Foreign(_)));
    let unfinished = PatchResults { finished: false, ..results(vec![outcome("p", 0)]) };
    assert_eq!(unfinished.verdict(&table), PatchVerdict::Unfinished);
    let foreign = PatchResults { job: "job-0".to_owned(), ..results(vec![]) };
    assert!(matches!(foreign.verdict(&table), PatchVerdict::Foreign(_)));
}

#[test]
fn a_signal_or_a_failure_is_no_success_whatever_the_exit_code() {
    assert!(outcome("p", 0).success());
    assert!(!PatchOutcome { signal: Some(9), ..outcome("p", 0) }.success());
    assert!(!PatchOutcome { failure: Some(PatchFailure::TimeOut), ..outcome("p", 0) }.success());
    assert!(!PatchOutcome { exit_code: None, ..outcome("p", 0) }.success());
}

#[test]
fn results_are_cut_to_size_before_parsing_and_after_encoding() {
    let huge = vec![b' '; WIRE_MAX + 1];
    assert!(matches!(PatchResults::parse(&huge), Err(WireError::TooLong { .. })));
    let tail = "\u{1b}".repeat(LOG_TAIL_MAX);
    let outcomes = (0..PATCHES_MAX)
        .map(|i| PatchOutcome { log_tail: tail.clone(), ..outcome(&i.to_string(), 0) })
        .collect();
    let bytes = results(outcomes).encode().unwrap();
    assert!(bytes.len() <= WIRE_MAX);
    let parsed = PatchResults::parse(&bytes).unwrap();
    assert_eq!(parsed.outcomes.len(), PATCHES_MAX);
    assert!(!parsed.outcomes[0].log_tail.contains('\u{1b}'), "terminals obey escape sequences");
}

#[test]
fn a_tail_is_cut_between_characters() {
    assert_eq!(tail("aäb", 2), "b");
    assert_eq!(tail("aäb", 3), "äb");
    assert_eq!(tail("ab", 9), "ab");
    assert_eq!(tail("ab", 0), "");
}
