//! A partition whose own systemd is PID 1.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use patchswitch::init::SYSTEMD_UNIT;
use patchswitch::partition::bundle::Pid1;
use patchswitch::partition::lifecycle;
use patchswitch::partition::spec::Init;
use patchswitch::patch::wire::PatchVerdict;

use super::lab::{Lab, SOON};
use super::patches::{table, with_packages};

/// What the injection does in a clone.
fn enable_patching(lab: &Lab) {
    lab.put("/etc/systemd/system/patchswitch-apply.service", 0o644, SYSTEMD_UNIT);
    let wants = lab.root.join("etc/systemd/system/multi-user.target.wants");
    let linked = lab.mounts.run(|_| {
        fs::create_dir_all(&wants)?;
        std::os::unix::fs::symlink("../patchswitch-apply.service", wants.join("patchswitch-apply.service"))
    });
    linked.unwrap().unwrap();
}

fn running(lab: &Lab) {
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        let done = lab.exec(&["systemctl", "is-system-running"]);
        if done.stdout.trim() == "running" {
            return;
        }
        let failed = || lab.exec(&["systemctl", "--failed", "--no-pager"]).stdout;
        assert!(Instant::now() < end, "{}{}{}", done.stdout, done.stderr, failed());
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn unit(lab: &Lab, name: &str) -> String {
    lab.exec(&["systemctl", "is-active", name]).stdout.trim().to_owned()
}

/// One test: to boot systemd in an emulated machine takes its time.
#[test]
fn systemd_boots_patches_itself_before_its_services_masks_and_stops() {
    let artifacts = PathBuf::from(std::env::var("PATCHSWITCH_ARTIFACTS").unwrap());
    let disk = patchswitch_tests::vm::scratch_disk().unwrap().unwrap();
    let mut lab = Lab::on(&disk, &artifacts.join("root-systemd.tar"));
    (lab.spec.memory, lab.spec.init, lab.spec.service) = (512 << 20, Init::Auto, None);
    lab.spec.singletons = vec!["cron".to_owned()];
    lab.spec.stop_limit_s = 60;
    lab.quiet = true;
    let mut table = table(&lab, &[("systemctl is-active nginx >/trace; exit 0", 60)]);
    with_packages(&lab, &mut table, &artifacts.join("patch"));
    enable_patching(&lab);

    let mut started = lab.start();
    assert_eq!(started.pid1, Pid1::Systemd);
    let limit = Instant::now() + Duration::from_secs(400);
    let results = lifecycle::wait_results(&mut started, &table, limit).unwrap().unwrap();
    assert_eq!(results.verdict(&table), PatchVerdict::Applied, "{}", lab.logs());
    assert_eq!(lab.get("/trace").unwrap().trim(), "inactive", "patched before the services are started");
    running(&lab);
    assert_eq!((unit(&lab, "nginx").as_str(), unit(&lab, "cron").as_str()), ("active", "inactive"));
    assert_eq!(lab.exec(&["systemctl", "is-enabled", "cron"]).stdout.trim(), "masked-runtime");

    // The restart: nothing is patched again.
    let stopped = lab.stop(SOON);
    assert!(stopped.changed && !stopped.killed, "{stopped:?}");
    let _started = lab.start();
    running(&lab);
    assert_eq!(lifecycle::read_results(&lab.mounts, &lab.root).unwrap(), Some(results));
    lifecycle::unmask(&lab.runtime, &lab.mounts, &lab.spec).unwrap();
    assert_eq!(unit(&lab, "cron"), "active");
    assert!(!lab.stop(SOON).killed);
}
