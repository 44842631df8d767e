use serde_json::Value;

use super::super::spec::{Disk, Init, Policy, Service};
use super::*;
use crate::names::Name;

fn spec() -> PartitionSpec {
    let name = |text| Name::new(text).unwrap();
    let mut spec = PartitionSpec::new(name("web-b"), 25, 256 << 20, 1 << 30, name("root"));
    spec.hostname = "web".to_owned();
    spec.disks.push(Disk {
        name: name("data"),
        size: 64 << 20,
        mount: "/srv/data".to_owned(),
        read_only: false,
        policy: Policy::Snapshot,
    });
    spec.service = Some(Service {
        command: ["nginx", "-g", "daemon off;"].map(ToOwned::to_owned).to_vec(),
        stop_signal: 3,
        restarts: 5,
    });
    spec.singletons = vec!["cron".to_owned()];
    spec
}

fn document(spec: &PartitionSpec, pid1: Pid1, masked: bool) -> Value {
    let data = [DataMount {
        source: "/run/patchswitch/roots/web-b/data".into(),
        target: "/srv/data".to_owned(),
        read_only: true,
    }];
    let facts = Facts {
        pid1,
        root: Path::new("/run/patchswitch/roots/web-b/root"),
        netns: Path::new("/proc/4711/fd/9"),
        control: Path::new("/run/patchswitch/partitions/web-b/control"),
        data: &data,
        quiet: masked,
        masks: Path::new("/run/patchswitch/partitions/web-b/masks"),
    };
    let mut value = serde_json::to_value(config(spec, &facts).unwrap()).unwrap();
    // A set has no order of its own.
    for set in ["bounding", "effective", "permitted"] {
        let names = value["process"]["capabilities"][set].as_array_mut().unwrap();
        names.sort_by_key(ToString::to_string);
    }
    value
}

/// Compares with the file, which a reviewer reads; `PATCHSWITCH_BLESS=1` writes it.
fn golden(name: &str, value: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/partition/bundle").join(name);
    let text = format!("{}\n", serde_json::to_string_pretty(value).unwrap());
    if std::env::var_os("PATCHSWITCH_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, expected, "{} differs; look, then run with PATCHSWITCH_BLESS=1", path.display());
}

#[test]
fn the_document_with_our_own_init() {
    golden("patchswitch.json", &document(&spec(), Pid1::Patchswitch, true));
}

#[test]
fn the_document_with_systemd() {
    let spec = PartitionSpec { service: None, init: Init::Systemd, ..spec() };
    golden("systemd.json", &document(&spec, Pid1::Systemd, true));
}

#[test]
fn nobody_gets_a_privilege_that_reaches_the_host() {
    for pid1 in [Pid1::Patchswitch, Pid1::Systemd] {
        let value = document(&spec(), pid1, false);
        assert_eq!(value["process"]["noNewPrivileges"], true);
        for set in ["bounding", "effective", "permitted"] {
            let names = value["process"]["capabilities"][set].to_string();
            for bad in ["SYS_ADMIN", "NET_ADMIN", "NET_RAW", "MKNOD", "SYS_MODULE", "SYS_PTRACE", "BPF"] {
                assert!(!names.contains(bad), "{set} has {bad}");
            }
        }
        let devices = &value["linux"]["resources"]["devices"];
        assert_eq!(devices, &serde_json::json!([{"allow": false, "access": "rwm"}]));
        let binds = value["mounts"].as_array().unwrap().iter().filter(|m| m["type"] == "bind");
        for bind in binds {
            let options = bind["options"].to_string();
            assert!(
                options.contains("nosuid") && options.contains("nodev") && options.contains("ro"),
                "{bind}"
            );
        }
    }
}

#[test]
fn limits_are_the_table_s() {
    let value = document(&spec(), Pid1::Patchswitch, false);
    let resources = &value["linux"]["resources"];
    assert_eq!(resources["cpu"], serde_json::json!({"quota": 25_000, "period": 100_000}));
    assert_eq!(resources["memory"], serde_json::json!({"limit": 256 << 20}));
    assert_eq!(resources["pids"], serde_json::json!({"limit": 512}));
    assert_eq!(value["linux"]["cgroupsPath"], "/patchswitch/web-b");
}

#[test]
fn singletons_are_masked_only_when_asked() {
    let masked = document(&spec(), Pid1::Patchswitch, true)["process"]["args"].to_string();
    assert!(masked.contains(r#""--mask","cron""#), "{masked}");
    let free = document(&spec(), Pid1::Patchswitch, false)["process"]["args"].to_string();
    assert!(!free.contains("--mask"), "{free}");
    let mounts = |masked| document(&spec(), Pid1::Systemd, masked)["mounts"].to_string();
    assert!(mounts(true).contains(SYSTEMD_MASKS) && !mounts(false).contains(SYSTEMD_MASKS));
}

#[test]
fn a_partition_without_a_service_has_no_command() {
    let spec = PartitionSpec { service: None, ..spec() };
    let arguments = document(&spec, Pid1::Patchswitch, false)["process"]["args"].clone();
    assert_eq!(arguments, serde_json::json!([INIT_FILE, "--stop-limit", "20"]));
}
