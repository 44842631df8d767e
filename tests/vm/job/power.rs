//! Power cuts: the machine is reset before, in and after a job, and starts again with nothing but its disks. `up`
//! brings back the right side.

use std::time::Duration;

use patchswitch_tests::vm;

use super::stage::{SERVICE, Settings, Stage};

fn settings() -> Settings {
    Settings { observe: "500ms", ..Settings::default() }
}

/// The machine again, with whoever serves.
#[track_caller]
fn up(says: &str, active: &str) -> (Stage, String) {
    let stage = Stage::after_reset();
    let said = stage.ok(&["up"]);
    println!("{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), (says, active), "{said}");
    assert!(said.contains("service web was started"), "{said}");
    let again = stage.ok(&["up"]);
    assert!(again.contains("nothing to do"), "{again}");
    (stage, said)
}

#[test]
fn the_right_side_comes_up_after_a_power_cut() {
    match vm::phase().as_str() {
        "" => {
            let stage = Stage::new(&settings());
            stage.patch(
                "says-v2",
                "sleep 1; dd if=/dev/urandom of=/srv/ballast bs=1M count=8; echo v2 > /etc/says",
            );
            vm::reset("before a job").unwrap();
        }
        "before a job" => {
            let (stage, _) = up("v1", "web-a");
            let _running = stage.start_until(&["apply", SERVICE], "patch");
            std::thread::sleep(Duration::from_millis(500));
            vm::reset("while the clone is patched").unwrap();
        }
        "while the clone is patched" => {
            let (stage, said) = up("v1", "web-a");
            assert!(said.contains("the clone web-b was discarded"), "{said}");
            let _running = stage.start_until(&["apply", SERVICE], "observe");
            vm::reset("after the switch").unwrap();
        }
        "after the switch" => {
            let (stage, said) = up("v2", "web-b");
            assert!(said.contains("web-b serves; web-a can be committed away or rolled back to"), "{said}");
            // The patch is applied, although nobody could say so any more.
            let _running = stage.start_until(&["commit", SERVICE], "commit");
            std::thread::sleep(Duration::from_millis(100));
            vm::reset("while the disks are merged").unwrap();
        }
        "while the disks are merged" => {
            let (stage, said) = up("v2", "web-b");
            // Clients do not wait for the merge.
            let started = said.find("service web was started");
            assert!(started < said.find("the commit was finished") && started.is_some(), "{said}");
            stage.ends_with(10, &["plan", SERVICE]);
            stage.finish();
        }
        other => panic!("no such part: {other}"),
    }
}
