//! What a service stands on changes or dies between jobs: its settings, its partition, its programs, its images. It is
//! put right, or refused with a word; nothing is left that nobody knows.

use std::fs;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use patchswitch_tests::netlab;
use patchswitch_tests::programs::Running;
use rustix::process::Signal;
use serde_json::Value;

use super::client::{self, who_at};
use super::stage::{SERVICE, Settings, Stage, job_root, path, wait_until};

/// Addresses that the service did not have before.
pub(super) const MOVED: [&str; 2] = ["10.77.0.20", "fd77::20"];

#[track_caller]
pub(super) fn nothing_to_do(stage: &Stage) {
    let said = stage.ok(&["up"]);
    assert!(said.contains("nothing to do"), "{said}");
}

/// A service that was started listens a little later.
#[track_caller]
pub(super) fn comes(stage: &Stage, addresses: [&str; 2]) {
    wait_until("v1 answers", Duration::from_secs(10), || {
        who_at(&stage.client, addresses).is_ok_and(|who| who == "v1")
    });
}

/// Other addresses reach a service that is there, or nothing changes.
#[test]
fn settings_reach_a_service_that_is_there() {
    let stage = Stage::new(&Settings::default());
    let moved = Settings { addresses: MOVED, ..Settings::default() };
    stage.configure(&moved);
    let said = stage.ok(&["service", "add", SERVICE]);
    assert!(said.contains("attached anew: its addresses or uplinks have changed"), "{said}");
    assert_eq!(who_at(&stage.client, MOVED).unwrap(), "v1");
    assert!(client::who(&stage.client).is_err(), "the old addresses are served as well");
    nothing_to_do(&stage);

    // What cannot be is found before anybody is cut off, and the service keeps what it has.
    stage.configure(&Settings { uplink: "nowhere0", ..moved.clone() });
    let said = stage.ends_with(1, &["service", "add", SERVICE]);
    assert!(said.contains("nowhere0"), "{said}");
    assert_eq!(who_at(&stage.client, MOVED).unwrap(), "v1");
    let list = stage.json(&["service", "list"]);
    assert_eq!(list["services"][0]["uplinks"][0], Settings::default().uplink, "{list}");
    stage.configure(&Settings::default());
    stage.ok(&["service", "add", SERVICE]);
    assert_eq!(stage.who(), "v1");
    what_cannot_be_served_is_put_back(&stage);

    // While two partitions have flows, addresses stay.
    stage.says("v2");
    stage.ok(&["apply", SERVICE]);
    stage.configure(&moved);
    let said = stage.ends_with(1, &["service", "add", SERVICE]);
    assert!(said.contains("still has web-a") && said.contains("patchswitch rollback web"), "{said}");
    stage.configure(&Settings::default());
    stage.ok(&["service", "add", SERVICE]);
    by_hand(&stage);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    stage.finish();
}

/// It could not be known before.
fn what_cannot_be_served_is_put_back(stage: &Stage) {
    let fails = |settings: &Settings, why: &str| {
        stage.configure(settings);
        let said = stage.run(&["service", "add", SERVICE]);
        assert!(said.code != 0 && said.stderr.contains(why), "{said:?}");
        assert_eq!(stage.who(), "v1");
    };
    // The kernel has no IPv6 on it, which is known before anything is changed …
    stage.host_ip("link add narrow0 mtu 1000 type veth peer name narrow0x mtu 1000");
    fails(&Settings { uplink: "narrow0", ..Settings::default() }, "narrow0");
    nothing_to_do(stage);
    // … and none on the link inside, which gets its MTU: the partition's own address of IPv6 cannot be there.
    let only_v4 =
        Settings { uplink: "narrow0", addresses: ["10.77.0.10", "10.77.0.20"], ..Settings::default() };
    fails(&only_v4, "it is served as before");
    nothing_to_do(stage);
    stage.host_ip("link del narrow0");

    // The partition cannot be looked at: neither the store nor the data path has the new time.
    stage.host_ip("-n ps-web-a link set eth0 name eth9");
    fails(&Settings { udp_idle: "3s", ..Settings::default() }, "eth0");
    stage.host_ip("-n ps-web-a link set eth9 name eth0");
    nothing_to_do(stage);
    stage.configure(&Settings::default());
}

/// The record of a service would not know of it.
fn by_hand(stage: &Stage) {
    for (arguments, instead) in [
        (&["switch", SERVICE][..], "patchswitch rollback web"),
        (&["detach", SERVICE, "--force"], "patchswitch service remove web"),
    ] {
        let said = stage.ends_with(1, arguments);
        assert!(said.contains("nothing was changed") && said.contains(instead), "{said}");
    }
    stage.ok(&["status", SERVICE]);
    stage.ok(&["flows", SERVICE]);
}

/// Kills everything that runs in a partition.
#[track_caller]
pub(super) fn dies(stage: &Stage, partition: &str) {
    let pids = stage.host_ip(&format!("netns pids ps-{partition}"));
    assert!(!pids.trim().is_empty(), "{partition} does not run");
    for pid in pids.split_whitespace() {
        let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
        // The init takes the others with it.
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
    wait_until("it is dead", Duration::from_secs(10), || {
        stage.host_ip(&format!("netns pids ps-{partition}")).trim().is_empty()
    });
}

#[test]
fn commands_that_begin_at_the_same_time_are_in_nobodys_way() {
    let stage = Stage::new(&Settings::default());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let _ = scope.spawn(|| {
                for _ in 0..8 {
                    stage.ok(&["partition", "exec", "web-a", "--", "true"]);
                }
            });
        }
    });
    stage.finish();
}

#[test]
fn what_dies_between_jobs_is_put_right() {
    let stage = Stage::new(&Settings::default());
    dies(&stage, "web-a");
    let said = stage.ok(&["up"]);
    assert!(said.contains("service web was started") && !said.contains("anew"), "{said}");
    comes(&stage, netlab::SERVICE);
    nothing_to_do(&stage);

    // With its namespace: the attachment holds one that nobody is in.
    dies(&stage, "web-a");
    stage.host_ip("netns del ps-web-a");
    let said = stage.ok(&["up"]);
    assert!(said.contains("web-a got a new network namespace"), "{said}");
    comes(&stage, netlab::SERVICE);
    nothing_to_do(&stage);

    fs::remove_dir_all("/sys/fs/bpf/patchswitch/v1/web").unwrap();
    let said = stage.ok(&["up"]);
    assert!(said.contains("service web was started"), "{said}");
    comes(&stage, netlab::SERVICE);
    nothing_to_do(&stage);
    images_are_known(&stage);
    stage.finish();
}

/// Interrupted, the removal of a partition goes on the second time: no image is left that no row names.
fn images_are_known(stage: &Stage) {
    let image = path("state/disks/web-b-root.img");
    let aside = path("aside");
    fs::rename(&image, &aside).unwrap();
    // What is no file cannot be removed as one.
    fs::create_dir(&image).unwrap();
    let said = stage.run(&["partition", "remove", "web-b"]);
    assert_ne!(said.code, 0, "{said:?}");
    stage.ok(&["partition", "show", "web-b"]);
    fs::remove_dir(&image).unwrap();
    fs::rename(&aside, &image).unwrap();
    // Left by a definition that was killed while it made the image.
    let half = path("state/disks/.web-b-root.img.part");
    fs::write(&half, "half").unwrap();
    // A node whose device had gone before it: nobody has that number.
    let node = "/dev/mapper/ps-web-b-root";
    let kind = (rustix::fs::FileType::BlockDevice, rustix::fs::Mode::RUSR, rustix::fs::makedev(253, 4000));
    rustix::fs::mknodat(rustix::fs::CWD, node, kind.0, kind.1, kind.2).unwrap();
    stage.ok(&["partition", "remove", "web-b"]);
    assert!(fs::symlink_metadata(node).is_err(), "{node} is left");
    assert!(!image.exists() && !half.exists());
    stage.ends_with(1, &["partition", "show", "web-b"]);
}

/// One that is dead does not wait for the merge of another.
#[test]
fn services_are_started_before_a_merge_is_finished() {
    let stage = Stage::new(&Settings { observe: "500ms", ..Settings::default() });
    add_api(&stage, &[netlab::UPLINK]);
    stage.patch(
        "says-v2",
        "dd if=/dev/urandom of=/srv/ballast bs=1M count=8 2>/dev/null; echo v2 > /etc/says",
    );
    let job = stage.start_until(&["apply", SERVICE, "--commit"], "commit");
    std::thread::sleep(Duration::from_millis(100));
    job.signal(Signal::KILL).unwrap();
    assert_eq!(job.wait(Duration::from_secs(10)).unwrap().code(), None);
    dies(&stage, "api-a");

    let said = stage.ok(&["up"]);
    let at = |what: &str| said.find(what).unwrap_or_else(|| panic!("{what}: {said}"));
    assert!(at("service api was started") < at("the commit was finished"), "{said}");
    comes(&stage, MOVED);
    assert_eq!(stage.who(), "v2");
    remove_api(&stage);
    stage.finish();
}

/// A second service, with a partition that has no standby.
pub(super) fn add_api(stage: &Stage, uplinks: &[&str]) {
    let second = format!(
        "[[service]]\nname = \"api\"\naddresses = {MOVED:?}\nuplinks = {uplinks:?}\npartition = \"api-a\"\n\
         [[service.probe]]\nkind = \"http\"\nport = {}\n",
        client::PORT
    );
    let file = path("patchswitch.toml");
    fs::File::options().append(true).open(&file).unwrap().write_all(second.as_bytes()).unwrap();
    let root = job_root();
    let from = ["--from", root.to_str().unwrap(), "--size", "40M", "--command", "/usr/bin/serve"];
    let own = ["--own", "10.77.0.21", "--own", "fd77::21"];
    stage.ok(&[&["partition", "define", "api-a"][..], &from, &own].concat());
    stage.ok(&["service", "add", "api"]);
}

pub(super) fn remove_api(stage: &Stage) {
    stage.ok(&["service", "remove", "api"]);
    stage.ok(&["partition", "remove", "api-a"]);
}

/// Whoever retires the old partition counts its last writes, and a commit that loses them needs a word.
#[test]
fn what_the_old_side_wrote_after_the_switch_is_counted_by_who_retires_it() {
    let stage = Stage::new(&Settings { observe: "60s", ..Settings::default() });
    stage.says("v2");
    let killed = |job: Running| {
        job.signal(Signal::KILL).unwrap();
        assert_eq!(job.wait(Duration::from_secs(10)).unwrap().code(), None);
        stage.ok(&["up"])
    };
    let late = |file: &str| {
        let command = format!("echo late > /etc/{file}");
        stage.ok(&["partition", "exec", "web-a", "--", "/bin/sh", "-c", &command]);
    };
    let refused = |file: &str| {
        let said = stage.ends_with(25, &["commit", SERVICE]);
        assert!(said.contains("/etc") && said.contains("--discard-writes"), "{file}: {said}");
        assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    };
    // By `up`, as the old side has no flow left.
    let job = stage.start_until(&["apply", SERVICE], "observe");
    late("by-up");
    assert!(killed(job).contains("web-b serves; web-a can be committed"));
    refused("by-up");
    stage.ok(&["rollback", SERVICE]);

    // By `commit`, as it has one for longer than that.
    let address = SocketAddr::new(netlab::SERVICE[0].parse().unwrap(), client::PORT);
    let held = stage.client.enter(|| Ok(TcpStream::connect(address)?)).unwrap();
    let job = stage.start_until(&["apply", SERVICE], "observe");
    assert!(killed(job).contains("which still has flows"));
    late("by-commit");
    drop(held);
    wait_until("the flow has ended", Duration::from_secs(10), || {
        let flows = stage.json(&["flows", SERVICE]);
        flows["partitions"][1]["flows"]["accepted"].as_array().is_some_and(Vec::is_empty)
    });
    // As if the devices had been made anew: what is not known is not said to be nothing.
    let (file, mut report) = last_report();
    assert!(report["lost_by_switch"]["sectors"].is_u64(), "{report}");
    report["at_cut"]["marks"][0]["boot"] = "another".into();
    fs::write(&file, report.to_string()).unwrap();
    refused("by-commit");
    let (_, report) = last_report();
    let lost = &report["lost_by_switch"];
    assert!(lost["sectors"].is_null() && lost["files"].as_u64() > Some(0), "{lost}");
    stage.ok(&["commit", SERVICE, "--discard-writes"]);
    assert_eq!(stage.who(), "v2");
    stage.finish();
}

/// The report of the last job that switched.
pub(super) fn last_report() -> (PathBuf, Value) {
    let files = fs::read_dir(path("state/reports")).unwrap().map(|file| file.unwrap().path());
    let number = |file: &PathBuf| file.file_stem().unwrap().to_str().unwrap().parse::<u64>().unwrap();
    let read = |file: PathBuf| {
        let report: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        (file, report)
    };
    let mut reports: Vec<_> = files.map(read).filter(|(_, report)| report["kind"] == "apply").collect();
    reports.sort_by_key(|(file, _)| number(file));
    reports.pop().unwrap()
}
