//! Row 16: from "start it" until a partition serves, over crun alone with the same root, the same service and the same
//! network namespace.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use patchswitch::host::linux::filesystem::Kind;
use patchswitch::host::linux::mountns::MountNamespace;
use patchswitch::host::linux::netns::{Netns, NetnsRef};
use patchswitch::host::linux::programs::Program;
use patchswitch::host::linux::runtime::Runtime;
use patchswitch::names::Name;
use patchswitch::partition::console::Console;
use patchswitch::partition::define;
use patchswitch::partition::lifecycle::{self, Site};
use patchswitch::partition::spec::{Init, PartitionSpec, Service};
use patchswitch::storage::disk::{Disk, Room};
use patchswitch_tests::netlab::{Lab, Ns};
use patchswitch_tests::{programs, root};

use super::Scale;
use super::ground::{Ground, MIB, sh};
use crate::report::{Figure, Found, Target};
use crate::stats::abba;

const MOUNTS: &str = "/run/patchswitch/mnt";
const OCI: &str = "/run/patchswitch/oci";
const ROOT: &str = "/run/patchswitch/roots/bench";
/// It serves when this file is there.
const UP: &str = "srv/up";
const SERVICE: &str = "trap 'exit 0' TERM; : > /srv/up; while :; do sleep 0.1; done";
const CONTAINER: &str = "psbench";
const LIMIT: Duration = Duration::from_secs(60);
const TARGET: f64 = 1.5;

pub(super) fn measure(ground: &Ground, scale: Scale, found: &mut Found) -> Result<()> {
    let mut lab = Lab::new("standby");
    let ns = lab.namespace("standby")?;
    let ours = Partition::new(ground, &ns)?;
    let alone = Container::new(ground, &ours.seen, &ns)?;
    let blocks = abba(scale.rounds(), &mut || Ok([alone.start(&ours.seen)?]), &mut || Ok([ours.start()?]));
    alone.remove()?;
    ours.remove(ground)?;
    let [blocks] = blocks?;
    let figure = Figure::ratio(16, "from the start of a partition until it serves", "crun", "ms", &blocks);
    found.add(figure.must(Target::AtMost(TARGET)).note("the rounds that a gate waits for come on top"));
    Ok(())
}

/// Waits until the service is there, and how long that was in milliseconds.
fn served(seen: &Path, begun: Instant) -> Result<f64> {
    while !seen.join(UP).exists() {
        ensure!(begun.elapsed() < LIMIT, "the service does not come up");
        std::thread::sleep(Duration::from_millis(1));
    }
    let took = begun.elapsed().as_secs_f64() * 1e3;
    fs::remove_file(seen.join(UP))?;
    Ok(took)
}

/// A partition of patchswitch.
struct Partition {
    disk: Disk,
    spec: PartitionSpec,
    mounts: MountNamespace,
    runtime: Runtime,
    netns: Netns,
    /// Its root, as the measurement sees it.
    seen: PathBuf,
}

impl Partition {
    fn new(ground: &Ground, ns: &Ns) -> Result<Self> {
        let (disk, active) = ground.disk("standby", 64 * MIB, Room::Allocated)?;
        define::make_file_system(Kind::Ext4, &active.path)?;
        let mounts = MountNamespace::open(Path::new(MOUNTS))?;
        let _ = mounts.run(|inside| inside.mount(&active.path, Path::new(ROOT), false))??;
        define::copy_tree(&mounts, &root::small()?, Path::new(ROOT))?;
        define::prepare(&mounts, Path::new(ROOT))?;
        let seen = ground.path("mnt-standby");
        sh(&format!("mkdir -p {0}; mount -n {1} {0}", seen.display(), active.path.display()))?;
        let mut spec = PartitionSpec::new(Name::new("bench")?, 80, 128 * MIB, 64 * MIB, Name::new("root")?);
        spec.init = Init::Patchswitch;
        spec.stop_limit_s = 5;
        spec.service = Some(Service {
            command: ["/bin/sh", "-c", SERVICE].map(ToOwned::to_owned).to_vec(),
            stop_signal: 15,
            restarts: 0,
        });
        let runtime = Runtime::new(Program::Crun, Path::new(OCI));
        Ok(Self {
            disk,
            spec,
            mounts,
            runtime,
            netns: Netns::open(&NetnsRef::Named(ns.name().to_owned()))?,
            seen,
        })
    }

    fn start(&self) -> Result<f64> {
        let site = Site {
            spec: &self.spec,
            root: Path::new(ROOT),
            netns: &self.netns,
            data: Vec::new(),
            quiet: false,
        };
        let begun = Instant::now();
        let mut started = lifecycle::start(&self.runtime, &self.mounts, &site)?;
        let took = served(&self.seen, begun)?;
        let said = lifecycle::wait_started(&mut started, begun + LIMIT)?;
        said.map_err(|reason| anyhow::anyhow!("the partition did not start: {reason}"))?;
        let _ = lifecycle::stop(&self.runtime, &self.mounts, &self.spec, LIMIT)?;
        Ok(took)
    }

    fn remove(self, ground: &Ground) -> Result<()> {
        Console::of(&self.spec.name).remove()?;
        let _ = self.mounts.run(|inside| inside.unmount(Path::new(ROOT)))??;
        drop(self.mounts);
        let _ = MountNamespace::remove(Path::new(MOUNTS))?;
        sh(&format!(
            "umount -n {0}; rmdir {0}; rmdir /run/patchswitch/roots {OCI} /run/patchswitch /run/crun 2>/dev/null || :; rm -rf {1}",
            self.seen.display(),
            root::small()?.display()
        ))?;
        ground.remove(&self.disk)
    }
}

/// The same in a container of crun alone, without anything that patchswitch has around it.
struct Container {
    bundle: PathBuf,
}

impl Container {
    fn new(ground: &Ground, root: &Path, ns: &Ns) -> Result<Self> {
        let bundle = ground.path("bundle");
        sh(&format!("mkdir -p {0}; cd {0}; crun spec", bundle.display()))?;
        let file = bundle.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = serde_json::json!(["/bin/sh", "-c", SERVICE]);
        config["root"] = serde_json::json!({"path": root, "readonly": false});
        let namespaces = config["linux"]["namespaces"].as_array_mut().context("crun's namespaces")?;
        for namespace in namespaces.iter_mut().filter(|one| one["type"] == "network") {
            namespace["path"] = format!("/run/netns/{}", ns.name()).into();
        }
        fs::write(&file, serde_json::to_vec(&config)?)?;
        Ok(Self { bundle })
    }

    fn start(&self, seen: &Path) -> Result<f64> {
        let bundle = self.bundle.display().to_string();
        let begun = Instant::now();
        let errors = self.bundle.join("errors");
        // Not a pipe, which the container would keep open.
        let run =
            programs::spawn(&["crun", "run", "--detach", "--bundle", &bundle, CONTAINER], Some(&errors))?;
        let took = served(seen, begun);
        ensure!(run.wait(LIMIT)?.success(), "crun: {}", fs::read_to_string(errors)?);
        let took = took?;
        let _ = programs::run(&["crun", "delete", "--force", CONTAINER])?;
        Ok(took)
    }

    fn remove(self) -> Result<()> {
        Ok(fs::remove_dir_all(self.bundle)?)
    }
}
