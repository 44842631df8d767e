//! The examples, as a reader would run them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::ensure;
use patchswitch_tests::netlab::{SERVICE, UPLINK};
use patchswitch_tests::programs;

use crate::group;
use crate::rig::Rig;

/// A root directory with one program in it, which is all that a container needs.
struct Root(PathBuf);

impl Root {
    fn make() -> anyhow::Result<Self> {
        let root = Self(std::env::temp_dir().join(format!("patchswitch-example-{}", std::process::id())));
        for directory in ["bin", "dev", "etc", "proc", "run", "sys", "tmp", "usr", "var"] {
            fs::create_dir_all(root.0.join(directory))?;
        }
        fs::write(root.0.join("etc/os-release"), "ID=example\n")?;
        fs::copy(programs::built("patchswitch-load")?, root.0.join("bin/serve"))?;
        Ok(root)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Runs an example on the laboratory's host; what it says.
fn run(rig: &Rig, script: &str, arguments: &[&str], addresses: [&str; 2]) -> anyhow::Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(script);
    let settings = [
        format!("PATCHSWITCH={}", programs::built("patchswitch")?.display()),
        format!("UPLINK={UPLINK}"),
        format!("ADDRESS={}", addresses[0]),
        format!("OTHER_ADDRESS={}", addresses[1]),
    ];
    let mut argv = vec!["env"];
    argv.extend(settings.iter().map(String::as_str));
    let script = script.to_string_lossy();
    argv.extend([script.as_ref()]);
    argv.extend(arguments);
    argv.extend(["serve", "--tag", "{}"]);
    let output = rig.lab.host.output(&argv)?;
    ensure!(output.status.success(), "{output:?}");
    Ok(output.stdout)
}

/// The service has moved, and nothing is left.
fn moves(label: &str, script: &str, in_a_root: bool, said_of: fn(&str) -> String) {
    let rig = Rig::new(label).unwrap();
    let root = Root::make().unwrap();
    let path = root.0.to_string_lossy();
    let program = root.0.join("bin/serve");
    let arguments =
        if in_a_root { vec![path.as_ref(), "/bin/serve"] } else { vec![program.to_str().unwrap()] };
    for addresses in SERVICE.into_iter().zip(group::ADDRESSES) {
        let said = run(&rig, script, &arguments, addresses.into()).unwrap();
        for line in
            [format!("before: {}", said_of("example-old")), format!("after: {}", said_of("example-new"))]
        {
            assert!(said.lines().any(|found| found == line), "{line}: {said}");
        }
    }
    rig.nothing_left().unwrap();
}

#[test]
fn plain_namespaces() {
    moves("plain", "netns.sh", false, str::to_owned);
}

#[test]
fn containers_of_runc() {
    moves("runc", "runc.sh", true, str::to_owned);
}

#[test]
fn containers_of_systemd_nspawn() {
    moves("nspawn", "nspawn.sh", true, str::to_owned);
}

#[test]
fn a_group() {
    moves("example-group", "group.sh", false, |side| format!("{side} and {side}"));
}
