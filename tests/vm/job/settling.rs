//! `down` and `up`: everything out of the kernel, and back.

use std::fs;

use super::stage::{SERVICE, Settings, Stage, path};

#[test]
fn down_leaves_nothing_and_up_brings_the_same_service_back() {
    let stage = Stage::bare(&Settings::default());
    stage.define(&Settings::default());
    stage.ok(&["service", "add", SERVICE]);
    for (who, change) in [("v1", true), ("v2", false)] {
        assert_eq!(stage.who(), who);
        let said = stage.ok(&["down"]);
        assert!(said.contains("`patchswitch up` brings them back"), "{said}");
        stage.nothing_left();
        assert!(stage.ok(&["down"]).contains("nothing to do"));
        let copy = path("state/patches/.new-1-0");
        if !change {
            // Left by a `patch add` that was killed.
            fs::write(&copy, "#!/bin").unwrap();
        }
        let said = stage.ok(&["up"]);
        assert!(said.contains("service web was started"), "{said}");
        assert_eq!((said.contains("half copied"), copy.exists()), (!change, false), "{said}");
        assert_eq!(stage.who(), who);
        assert!(stage.ok(&["up"]).contains("nothing to do"));
        if change {
            // The next time with a clone that serves and an old side to go back to.
            stage.says("v2");
            stage.ok(&["apply", SERVICE]);
        }
    }
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    stage.finish();
}
