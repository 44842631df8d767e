//! Jobs in which the network device goes over, or the address at an uplink, while new flows wait.

use std::fs;
use std::path::Path;
use std::time::Duration;

use patchswitch::names;
use patchswitch_tests::leftovers::Snapshot;
use patchswitch_tests::netlab::{CLIENT, CLIENT_LINK, Ns, OWN_A, SERVICE as ADDRESSES, UPLINK};
use patchswitch_tests::programs;
use rustix::process::Signal;
use serde_json::Value;

use super::client::{Client, Kept};
use super::decisions::on_the_disk_of;
use super::mend::nothing_to_do;
use super::stage::{SERVICE, Settings, Stage, wait_until};

const DEVICE: &str = "strategy = \"device\"\n[service.exchange]\nhold = \"10s\"\n";
/// New flows wait for less than a test can, and so do old ones.
const SHORT: &str = "strategy = \"device\"\n[service.exchange]\nhold = \"4s\"\n";
const RESET: &str = "strategy = \"device\"\n[service.exchange]\nhold = \"2s\"\non_deadline = \"reset\"\n";

/// A service that works only with the device with which it was checked first, if it is one that minds: by the device's number,
/// which goes over with it.
const TIED: &str = "deadline = \"20s\"\n[[service.probe]]\nkind = \"command\"\ncommand = '''\n\
    test ! -e /etc/tied || while read index name rest; do\n\
        test \"$name\" = eth0 || continue\n\
        test -s /etc/tied || echo \"$index\" > /etc/tied\n\
        test \"$index\" = \"$(cat /etc/tied)\" || exit 1\n\
    done < /proc/net/igmp'''\n";

fn settings(more: &'static str) -> Settings {
    Settings { more, observe: "0s", ..Settings::default() }
}

/// The host's link to which the device inside a partition belongs.
fn link_of(partition: &str) -> anyhow::Result<u64> {
    let links: Value =
        serde_json::from_str(&Ns::named(&format!("ps-{partition}"))?.ip("-j link show dev eth0")?)?;
    links[0]["link_index"].as_u64().ok_or_else(|| anyhow::anyhow!("{links}"))
}

/// What the last job said of the time for which new flows waited.
fn waited(stage: &Stage, key: &str) -> Value {
    let report = stage.json(&["report"])["report"].clone();
    let waited = report[key].clone();
    println!("{key}: {waited}");
    assert!(waited["move_ms"].as_f64() > Some(0.0) && waited["flows"]["lost"] == 0, "{report}");
    waited
}

#[test]
fn the_device_goes_to_the_patched_partition_and_back() {
    let stage = Stage::new(&Settings { drain: TIED, ..settings(DEVICE) });
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    let device = link_of("web-a").unwrap();
    let planned = stage.ok(&["plan", SERVICE]);
    assert!(planned.contains("change their network devices, 10 s at most"), "{planned}");
    // What is put back has had them wait for as long as the probes may take.
    let client = Client::start_patient(&stage.client, Duration::from_secs(10));
    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(link_of("web-b").unwrap(), device);
    waited(&stage, "waited");
    nothing_to_do(&stage);
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    assert_eq!(link_of("web-a").unwrap(), device);
    waited(&stage, "waited_back");

    // 1304: what does not work with the device is put back, before anybody has noticed.
    let tied = stage.patch("tied", "echo v3 > /etc/says; : > /etc/tied");
    let said = stage.ends_with(22, &["apply", SERVICE, "--patch", &tied]);
    assert!(said.contains("check failed in web-b") && said.contains("web-a serves, again"), "{said}");
    assert_eq!((stage.who().as_str(), link_of("web-a").unwrap()), ("v1", device));
    client.all_answered();

    // 1302: flows of the old side end first. Those that do not are in the way, or are cut.
    stage.configure(&settings(RESET));
    stage.ok(&["service", "add", SERVICE]);
    let mut kept = Kept::begin(&stage.client);
    assert_eq!(kept.who().unwrap(), "v1");
    stage.ends_with(24, &["apply", SERVICE]);
    assert!(kept.who().is_err());
    assert_eq!(waited(&stage, "waited")["reset"], 1);
    stage.ok(&["rollback", SERVICE]);
    stage.configure(&settings(SHORT));
    stage.ok(&["service", "add", SERVICE]);
    let mut kept = Kept::begin(&stage.client);
    assert_eq!(kept.who().unwrap(), "v1");
    let said = stage.ends_with(21, &["apply", SERVICE]);
    assert!(
        said.contains("1 flows of web-a have not ended") && said.contains("web-a serves, again"),
        "{said}"
    );
    assert_eq!((kept.who().unwrap().as_str(), link_of("web-a").unwrap()), ("v1", device));
    drop(kept);
    assert_eq!(stage.who(), "v1");
    stage.nothing_of_a_job_left(&before);
    a_rollback_that_is_put_back_stops_what_it_started(&stage);
    stage.finish();
}

/// What that wrote while it was checked is nothing that a commit would lose.
fn a_rollback_that_is_put_back_stops_what_it_started(stage: &Stage) {
    stage.configure(&Settings { drain: TIED, ..settings(DEVICE) });
    stage.ok(&["service", "add", SERVICE]);
    let id = stage.says("v4");
    stage.ok(&["apply", SERVICE, "--patch", &id]);
    on_the_disk_of("web-a", |root| fs::write(root.join("etc/tied"), "").unwrap());
    let said = stage.ends_with(22, &["rollback", SERVICE]);
    assert!(said.contains("check failed in web-a") && said.contains("web-b serves"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v4", "web-b"));
    assert_eq!(stage.json(&["partition", "show", "web-a"])["running"], false);
    nothing_to_do(stage);
    stage.ok(&["commit", SERVICE]);
    assert_eq!(stage.who(), "v4");
}

/// A probe that somebody can make fail.
const OBSERVED: &str = "deadline = \"20s\"\n\
    [[service.probe]]\nkind = \"command\"\ncommand = \"test ! -e /run/fails\"\n";

/// 2205: what fails while it is observed gives back what went over, with the service.
#[track_caller]
fn fails_while_it_is_observed(stage: &Stage, settings: &Settings, has_gone_over: impl Fn() -> bool) {
    stage.configure(&Settings { observe: "60s", drain: OBSERVED, ..settings.clone() });
    stage.ok(&["service", "add", SERVICE]);
    let mut job = stage.start_until(&["apply", SERVICE], "observe");
    assert_eq!(stage.who(), "v2");
    assert!(has_gone_over());
    stage.ok(&["partition", "exec", "web-b", "--", "/bin/sh", "-c", ": > /run/fails"]);
    wait_until("the job ends", Duration::from_secs(60), || job.has_ended());
    let said = job.output();
    assert_eq!(job.wait(Duration::from_secs(1)).unwrap().code(), Some(22), "{said}");
    assert!(said.contains("web-a serves again; web-b was discarded"), "{said}");
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    assert!(!has_gone_over());
    nothing_to_do(stage);
}

#[test]
fn what_fails_while_it_is_observed_gives_the_device_back() {
    let stage = Stage::new(&settings(DEVICE));
    stage.says("v2");
    let (before, device) = (Snapshot::take().unwrap(), link_of("web-a").unwrap());
    let client = Client::start(&stage.client);
    fails_while_it_is_observed(&stage, &settings(DEVICE), || {
        // A clone that was discarded has none at all.
        link_of("web-b").is_ok_and(|link| link == device)
    });
    assert_eq!(link_of("web-a").unwrap(), device);
    client.all_answered();
    stage.nothing_of_a_job_left(&before);
    stage.finish();
}

/// How far an exchange is, as the kernel shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Waiting,
    Moved,
    Released,
}

#[test]
fn an_exchange_that_is_killed_is_put_right() {
    let stage = Stage::new(&settings(SHORT));
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    // What waits when somebody is killed waits until the time for it is over.
    let client = Client::start_patient(&stage.client, Duration::from_secs(10));
    for moment in [Moment::Waiting, Moment::Moved, Moment::Released] {
        for (arguments, to) in [(["apply", SERVICE], "web-b"), (["rollback", SERVICE], "web-a")] {
            killed(&stage, &arguments, to, moment);
            let said = stage.ok(&["up"]);
            println!("{moment:?} of the switch to {to}: {said}");
            nothing_to_do(&stage);
            // The queue is there a moment before anything is given: then nothing was. Else whoever was to get the flows has
            // got them.
            let from = if to == "web-b" { "web-a" } else { "web-b" };
            if matches!(moment, Moment::Waiting) && stage.active() == from {
                stage.ok(&arguments);
            }
            let serves = if to == "web-b" { "v2" } else { "v1" };
            assert_eq!((stage.who().as_str(), stage.active().as_str()), (serves, to), "{said}");
        }
    }
    client.all_answered();
    stage.nothing_of_a_job_left(&before);
    stage.finish();
}

/// Kills a command when its exchange is so far.
#[track_caller]
fn killed(stage: &Stage, arguments: &[&str], to: &str, moment: Moment) {
    let job = start_until(stage, arguments, to, moment);
    job.signal(Signal::KILL).unwrap();
    // It may have come to its end.
    let _ = job.wait(Duration::from_secs(10)).unwrap();
}

/// Starts a command, and waits until its exchange is so far; fails if it ends before.
#[track_caller]
pub(super) fn start_until(stage: &Stage, arguments: &[&str], to: &str, moment: Moment) -> programs::Running {
    let queue = Path::new("/sys/class/net").join(names::hold_link(&SERVICE.parse().unwrap()));
    let mut job = stage.start(arguments);
    let mut at_first = None;
    let mut come = |what: Moment| match what {
        Moment::Waiting => {
            at_first = Some((link_of(to).ok(), answering()));
            queue.exists()
        }
        Moment::Moved => {
            let now = (link_of(to).ok(), answering());
            now.0.is_some() && now.1.len() == 2 && Some(now) != at_first
        }
        Moment::Released => !queue.exists(),
    };
    for one in [Moment::Waiting, Moment::Moved, Moment::Released] {
        wait_until(&format!("{one:?}"), Duration::from_secs(120), || {
            let ended = job.has_ended();
            let come = come(one);
            assert!(come || !ended, "{one:?} never came: {}", job.output());
            come
        });
        if one == moment {
            break;
        }
    }
    job
}

pub(super) const SECOND: &str = "uplink1";
pub(super) const BOTH: &str = "uplink0\", \"uplink1";

/// At which uplinks the host answers for the service.
fn answering() -> Vec<String> {
    let mut found = Vec::new();
    for family in ["-4", "-6"] {
        let all = programs::run(&["ip", family, "-j", "neigh", "show", "proxy"]).unwrap();
        let all: Value = serde_json::from_str(&all).unwrap();
        let ours =
            all.as_array().into_iter().flatten().filter(|one| ADDRESSES.iter().any(|a| one["dst"] == *a));
        found.extend(ours.filter_map(|one| one["dev"].as_str().map(str::to_owned)));
    }
    found
}

/// A second uplink of the host, on one network with the first one and the client.
pub(super) fn second_uplink(stage: &Stage) {
    let [v4, v6] = CLIENT;
    stage.host_ip(&format!("link add {SECOND} type veth peer name eth1 netns {}", stage.client.name()));
    stage.host_ip(&format!("link set {SECOND} up"));
    stage.client.ip_batch(&format!(
        "link add br0 type bridge forward_delay 0\nlink set {CLIENT_LINK} master br0\nlink set eth1 master br0\n\
         addr flush dev {CLIENT_LINK}\nlink set eth1 up\nlink set br0 up\naddr add {v4}/24 dev br0\n\
         addr add {v6}/64 dev br0 nodad\n"
    ))
    .unwrap();
    wait_until("the second uplink has its address", Duration::from_secs(10), || {
        let shown = stage.host_ip(&format!("-6 -o addr show dev {SECOND} scope link"));
        !shown.is_empty() && !shown.contains("tentative")
    });
}

/// Makes the client believe that the first partition's own addresses are elsewhere.
fn mislead(stage: &Stage) {
    let line = |address| format!("neigh replace {address} lladdr 02:00:00:00:00:99 dev br0 nud stale\n");
    stage.client.ip_batch(&OWN_A.map(line).concat()).unwrap();
}

#[test]
fn the_address_goes_to_the_uplink_of_the_patched_partition_and_back() {
    let settings = Settings { uplink: BOTH, ..settings("strategy = \"address\"\n") };
    let stage = Stage::bare(&Settings::default());
    stage.define(&settings);
    stage.configure(&Settings { uplink: UPLINK, ..settings.clone() });
    let said = stage.ends_with(78, &["service", "add", SERVICE]);
    assert!(said.contains("from one uplink to another"), "{said}");
    second_uplink(&stage);
    stage.configure(&settings);
    stage.ok(&["service", "add", SERVICE]);
    wait_until("v1 serves", Duration::from_secs(60), || super::client::who(&stage.client).is_ok());
    stage.says("v2");
    let before = Snapshot::take().unwrap();
    assert_eq!(answering(), [UPLINK; 2]);
    let client = Client::start(&stage.client);
    mislead(&stage);
    stage.ok(&["apply", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v2", "web-b"));
    assert_eq!(answering(), [SECOND; 2]);
    // 1505: who has given the address away has said where its own ones are.
    let mac = fs::read_to_string(Path::new("/sys/class/net").join(UPLINK).join("address")).unwrap();
    for address in OWN_A {
        let known = stage.client.ip(&format!("neigh show to {address}")).unwrap();
        assert!(known.contains(mac.trim()), "{known}");
    }
    waited(&stage, "waited");
    nothing_to_do(&stage);
    stage.ok(&["rollback", SERVICE]);
    assert_eq!((stage.who().as_str(), stage.active().as_str()), ("v1", "web-a"));
    assert_eq!(answering(), [UPLINK; 2]);
    waited(&stage, "waited_back");
    fails_while_it_is_observed(&stage, &settings, || answering() == [SECOND; 2]);
    assert_eq!(answering(), [UPLINK; 2]);
    client.all_answered();
    stage.nothing_of_a_job_left(&before);
    stage.ok(&["service", "remove", SERVICE]);
    stage.host_ip(&format!("link del {SECOND}"));
    for partition in ["web-a", "web-b"] {
        stage.ok(&["partition", "remove", partition]);
    }
}
