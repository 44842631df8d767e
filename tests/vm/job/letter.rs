//! The job whose switch is to the letter of the patent: new clients notice as little as ever, those of the old side are cut.

use patchswitch_tests::leftovers::Snapshot;

use super::client::Kept;
use super::mend::nothing_to_do;
use super::stage::{SERVICE, Settings, Stage};

#[test]
fn to_the_letter_new_clients_are_served_and_old_ones_are_cut() {
    let stage = Stage::new(&Settings {
        more: "strategy = \"letter\"\n",
        drain: "deadline = \"1s\"\non_deadline = \"reset\"",
        observe: "0s",
        ..Settings::default()
    });
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    let mut old = Kept::begin(&stage.client);
    assert_eq!(old.who().unwrap(), "v1");
    // What waits for its client in vain is cut at the deadline.
    let ended = stage.run(&["apply", SERVICE]);
    assert_eq!(ended.code, 24, "{ended:?}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    old.who().unwrap_err();
    nothing_to_do(&stage);

    let mut new = Kept::begin(&stage.client);
    assert_eq!(new.who().unwrap(), "v2");
    let ended = stage.run(&["rollback", SERVICE]);
    println!("{ended:?}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    new.who().unwrap_err();
    stage.nothing_of_a_job_left(&before);
    stage.finish();
}
