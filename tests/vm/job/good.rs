//! Jobs that go well.

use super::client::Client;
use super::stage::{SERVICE, Settings, Stage};

/// Clone, patch, take over, drain, retire, commit; then again, with the roles exchanged.
#[test]
fn a_job_commits_and_the_next_one_goes_the_other_way() {
    let stage = Stage::new(&Settings { scan: true, ..Settings::default() });
    let client = Client::start(&stage.client);
    let id = stage.says("v2");
    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(stage.patch_row(&id)["last_result"]["success"], true);
    assert!(stage.ends_with(10, &["apply", SERVICE]).contains("no patch is approved"));

    stage.says("v3");
    stage.ok(&["apply", SERVICE, "--commit"]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v3", "web-a"));
    assert_eq!(client.all_answered(), ["v1", "v2", "v3"]);
    stage.finish();
}

/// Without `--commit` the old partition is kept: rolled back to, and after the next job committed away.
#[test]
fn a_job_is_rolled_back_and_another_is_committed_later() {
    let stage = Stage::new(&Settings::default());
    let client = Client::start(&stage.client);
    stage.says("v2");
    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    let refused = stage.ends_with(1, &["apply", SERVICE]);
    assert!(refused.contains("still has web-a of the last job"), "{refused}");

    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    stage.ok(&["plan", SERVICE]); // it is not applied any more

    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    stage.ok(&["commit", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    stage.ends_with(10, &["plan", SERVICE]);
    assert!(stage.ends_with(10, &["rollback", SERVICE]).contains("there is no old partition"));
    assert!(stage.ends_with(10, &["commit", SERVICE]).contains("nothing to commit"));
    assert_eq!(client.all_answered(), ["v1", "v2", "v1", "v2"]);
    stage.finish();
}
