//! Devices that fail below a job: the clone is lost, and the side that serves on its own disk goes on.

use std::fs;
use std::time::Duration;

use patchswitch_tests::programs::run;

use super::client::Client;
use super::mend::nothing_to_do;
use super::stage::{SERVICE, Settings, Stage, path};

/// The standby's store lies on it.
const WEAK: &str = "patchswitch-test-weak";
const IMAGE: &str = "/run/patchswitch-test-weak.img";
const SECTORS: u64 = 64 << 11;

fn sh(script: &str) -> String {
    run(&["/bin/sh", "-ec", &format!("export DM_DISABLE_UDEV=1; {script}")]).unwrap()
}

/// A device that fails when it is told to.
struct Weak {
    node: String,
}

impl Weak {
    fn make() -> Self {
        fs::File::create(IMAGE).unwrap().set_len(SECTORS << 9).unwrap();
        let node = sh(&format!("losetup --find --show {IMAGE}")).trim().to_owned();
        sh(&format!("dmsetup create {WEAK} --table '0 {SECTORS} linear {node} 0'"));
        Self { node }
    }

    fn becomes(&self, table: &str) {
        let name = "patchswitch-test-weak";
        sh(&format!(
            "dmsetup load {name} --table '{table}'; dmsetup suspend --nolockfs --noflush {name}; dmsetup resume {name}"
        ));
    }

    fn breaks(&self) {
        self.becomes(&format!("0 {SECTORS} error"));
    }

    fn heals(&self) {
        self.becomes(&format!("0 {SECTORS} linear {} 0", self.node));
    }

    fn remove(self) {
        sh(&format!("dmsetup remove {WEAK}; losetup --detach {}", self.node));
        fs::remove_file(IMAGE).unwrap();
    }
}

/// It is one that holds everything, so nothing but the kernel tells that it is lost.
#[test]
fn a_clone_whose_store_fails_ends_the_job() {
    let settings = Settings {
        standby: &["--size", "40M", "--on", "root=/dev/mapper/patchswitch-test-weak"],
        observe: "5s",
        ..Settings::default()
    };
    let weak = Weak::make();
    let stage = Stage::bare(&settings);
    stage.define(&settings);
    stage.ok(&["service", "add", SERVICE]);
    super::stage::wait_until("v1 serves", Duration::from_secs(60), || {
        super::client::who(&stage.client).is_ok_and(|who| who == "v1")
    });
    let client = Client::start(&stage.client);

    // Before the switch: it is not touched.
    let id = stage.patch(
        "waits",
        "echo v2 > /etc/says; sleep 5; dd if=/dev/urandom of=/srv/more bs=4k count=16 conv=fsync",
    );
    let apply = stage.start_until(&["apply", SERVICE, "--patch", &id], "patch");
    weak.breaks();
    let status = apply.wait(Duration::from_secs(120)).unwrap();
    let said = fs::read_to_string(path("said")).unwrap();
    assert_eq!(status.code(), Some(20), "{said}");
    assert!(said.contains("web-a serves, it was not touched"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    weak.heals();
    assert!(stage.ok(&["up"]).contains("the clone web-b was discarded"));
    nothing_to_do(&stage);

    // Behind it: what serves is given back.
    let id = stage.says("v3");
    let apply = stage.start_until(&["apply", SERVICE, "--patch", &id], "observe");
    assert_eq!(stage.who(), "v3");
    weak.breaks();
    // What the old side overwrites cannot be kept for the clone any more.
    let more = "dd if=/dev/urandom of=/srv/more bs=64k count=4 conv=fsync";
    stage.ok(&["partition", "exec", "web-a", "--", "/bin/sh", "-c", more]);
    let status = apply.wait(Duration::from_secs(120)).unwrap();
    let said = fs::read_to_string(path("said")).unwrap();
    assert_eq!(status.code(), Some(23), "{said}");
    assert!(said.contains("ps-web-b-root is lost") && said.contains("web-a serves"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    weak.heals();
    assert!(stage.ok(&["up"]).contains("the clone web-b was discarded"));
    nothing_to_do(&stage);

    // And once more, with a device that works.
    let id = stage.says("v4");
    stage.ok(&["apply", SERVICE, "--patch", &id, "--commit"]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v4", "web-b"));
    assert_eq!(client.all_answered().last().map(String::as_str), Some("v4"));
    stage.finish();
    weak.remove();
}
