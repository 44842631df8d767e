//! What the tests of the switch have in common: a laboratory, the product as a program and as a library in its host
//! namespace, servers that say who they are, and the proof that nothing is left.

use std::fs::File;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use patchswitch::attachment::{Attachment, Inside, Partition, Spec};
use patchswitch::config::Datagrams;
use patchswitch::host::linux::netns::NetnsRef;
use patchswitch::names::Name;
use patchswitch_load::client::Settings;
use patchswitch_tests::leftovers::{Leftover, Snapshot};
use patchswitch_tests::netlab::{self, Ns, OWN_A, OWN_B, SERVICE, SwitchLab, UPLINK};
use patchswitch_tests::programs;
pub(crate) use patchswitch_tests::traffic::{ECHO, Load, PORT, Server, echo_in};
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

/// The name of the attachment.
pub(crate) const NAME: &str = "web";

/// The service's addresses.
pub(crate) fn service() -> [IpAddr; 2] {
    SERVICE.map(|text| text.parse().unwrap_or(IpAddr::from([0; 4])))
}

/// The service's ends.
pub(crate) fn ends() -> [SocketAddr; 2] {
    service().map(|address| SocketAddr::new(address, PORT))
}

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its exit code, if it was not killed.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A laboratory with the product in it.
pub(crate) struct Rig {
    pub(crate) lab: SwitchLab,
    before: Snapshot,
    patchswitch: PathBuf,
    /// The product's files are the machine's: one test at a time.
    _alone: File,
}

impl Rig {
    /// Makes the laboratory.
    pub(crate) fn new(label: &str) -> anyhow::Result<Self> {
        let alone = alone()?;
        let patchswitch = programs::built("patchswitch")?;
        forget_the_killed()?;
        let lab = SwitchLab::new(label)?;
        Ok(Self { before: Snapshot::take()?, lab, patchswitch, _alone: alone })
    }

    /// Takes what is there now as what has to be there at the end.
    pub(crate) fn furnished(&mut self) -> anyhow::Result<()> {
        self.before = Snapshot::take()?;
        Ok(())
    }

    /// Runs `patchswitch` in a namespace, whatever comes of it.
    pub(crate) fn run_in(&self, ns: &Ns, arguments: &[&str]) -> anyhow::Result<Ended> {
        let path = self.patchswitch.to_string_lossy();
        let argv: Vec<&str> = [path.as_ref()].into_iter().chain(arguments.iter().copied()).collect();
        let output = ns.output(&argv)?;
        Ok(Ended { code: output.status.code(), stdout: output.stdout, stderr: output.stderr })
    }

    /// Runs `patchswitch` in the host's namespace, whatever comes of it.
    pub(crate) fn run(&self, arguments: &[&str]) -> anyhow::Result<Ended> {
        self.run_in(&self.lab.host, arguments)
    }

    /// Runs `patchswitch`, which has to succeed, and returns what it says as JSON.
    pub(crate) fn ok(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let ended = self.run(&[arguments, &["--json"]].concat())?;
        ensure!(ended.code == Some(0), "patchswitch {}: {ended:?}", arguments.join(" "));
        serde_json::from_str(&ended.stdout).with_context(|| ended.stdout.clone())
    }

    /// Runs `patchswitch`, which has to end with a code, and returns what it says to people.
    pub(crate) fn refused(&self, arguments: &[&str], code: i32) -> anyhow::Result<String> {
        let ended = self.run(arguments)?;
        ensure!(ended.code == Some(code), "patchswitch {}: {ended:?}", arguments.join(" "));
        ensure!(!ended.stderr.trim().is_empty(), "an error without a word");
        Ok(ended.stderr)
    }

    /// The arguments that attach both namespaces with both addresses.
    pub(crate) fn attach_arguments(&self) -> Vec<String> {
        let [v4, v6] = SERVICE;
        [
            "attach",
            NAME,
            "--address",
            v4,
            "--address",
            v6,
            "--uplink",
            UPLINK,
            // Once: nobody waits for the second time.
            "--announce",
            "1",
            self.lab.a.name(),
            self.lab.b.name(),
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// Attaches both namespaces as somebody else's.
    pub(crate) fn attach(&self) -> anyhow::Result<Value> {
        let arguments = self.attach_arguments();
        self.ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Gives new flows to a namespace.
    pub(crate) fn switch_to(&self, ns: &Ns) -> anyhow::Result<()> {
        let done = self.ok(&["switch", NAME, "--to", ns.name()])?;
        ensure!(done["changed"] == true, "{done}");
        Ok(())
    }

    /// One of the counters of the programs, by the path of its names.
    pub(crate) fn counter(&self, path: &[&str]) -> anyhow::Result<u64> {
        let status = self.ok(&["status", NAME])?;
        let counters = &status["attachments"][0]["counters"];
        ensure!(counters.is_object(), "{status}");
        // A counter that is 0 is left out.
        Ok(path.iter().fold(counters, |value, name| &value[*name]).as_u64().unwrap_or(0))
    }

    /// Runs the library in the host's namespace.
    pub(crate) fn library<T: Send, F: Future<Output = anyhow::Result<T>>>(
        &self,
        call: impl FnOnce() -> F + Send,
    ) -> anyhow::Result<T> {
        library_in(&self.lab.host, call)
    }

    /// Attaches both namespaces as partitions of ours, with own addresses.
    pub(crate) fn attach_owned(&self, udp_idle: Duration) -> anyhow::Result<()> {
        self.attach_spec(spec(udp_idle)?)
    }

    /// As [`Rig::attach_owned`], as it is wanted.
    pub(crate) fn attach_spec(&self, spec: Spec) -> anyhow::Result<()> {
        let (first, second) = (owned(&self.lab.a, OWN_A)?, owned(&self.lab.b, OWN_B)?);
        self.library(|| async move {
            Attachment::create(&spec, &first, Some(&second)).await?;
            Ok(())
        })
    }

    /// Opens the attachment and does something with it.
    pub(crate) fn with<T: Send>(
        &self,
        call: impl AsyncFnOnce(&mut Attachment) -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        self.library(|| async move {
            let mut attachment = Attachment::open(&name()?)?;
            call(&mut attachment).await
        })
    }

    /// What is there that was not there before, or the reverse, of what this test can have made. The kernel frees
    /// programs and maps a little after their last user has gone.
    pub(crate) fn left(&self) -> anyhow::Result<Vec<Leftover>> {
        self.left_but(|_| false)
    }

    /// As [`Rig::left`], but for what does not count. It is not waited for either.
    fn left_but(&self, other: impl Fn(&Leftover) -> bool) -> anyhow::Result<Vec<Leftover>> {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let mut left = self.before.diff(&Snapshot::take()?);
            left.retain(|one| one.is_of(self.lab.prefix()) && !other(one));
            if left.is_empty() || Instant::now() >= end {
                return Ok(left);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Detaches and proves that nothing is left.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        self.ok(&["detach", NAME, "--force"])?;
        self.nothing_left()
    }

    /// The same where the namespaces were partitions of ours, whose own settings go with them.
    pub(crate) fn finish_owned(self) -> anyhow::Result<()> {
        self.ok(&["detach", NAME, "--force"])?;
        let left = self.left_but(|one| one.name == "ipv4/ip_local_port_range")?;
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(())
    }

    /// Proves that nothing is left.
    pub(crate) fn nothing_left(&self) -> anyhow::Result<()> {
        let left = self.left()?;
        ensure!(left.is_empty(), "left: {}", left.iter().map(|l| format!("\n  {l}")).collect::<String>());
        Ok(())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // After a failure the next test must find the machine as this one did. Nothing attached: nothing happens. The
        // library detaches what belongs to a service as well.
        detach_all(&self.lab.host);
    }
}

/// Detaches whatever a test attaches in its host's namespace. The library detaches what belongs to a service as well.
fn detach_all(host: &Ns) {
    for name in [NAME, "other"] {
        drop(library_in(host, || async move { Ok(Attachment::detach(&Name::new(name)?).await?) }));
    }
}

/// Runs the library in a namespace.
fn library_in<T: Send, F: Future<Output = anyhow::Result<T>>>(
    ns: &Ns,
    call: impl FnOnce() -> F + Send,
) -> anyhow::Result<T> {
    ns.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(call())
    })
}

/// A test that was killed leaves its attachment and its namespaces: the next one is not to fail for it.
fn forget_the_killed() -> anyhow::Result<()> {
    let abandoned = netlab::abandoned()?;
    abandoned.iter().filter(|ns| ns.name().ends_with("-host")).for_each(detach_all);
    abandoned.iter().try_for_each(Ns::delete)
}

/// Waits until no other test uses the product on this machine.
fn alone() -> anyhow::Result<File> {
    let path = std::env::temp_dir().join("patchswitch-netns-tests.lock");
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// The attachment's name.
pub(crate) fn name() -> anyhow::Result<Name> {
    Ok(Name::new(NAME)?)
}

/// What is attached by the library.
pub(crate) fn spec(udp_idle: Duration) -> anyhow::Result<Spec> {
    let uplinks = vec![UPLINK.to_owned()];
    Ok(Spec {
        name: name()?,
        addresses: service().to_vec(),
        uplinks,
        udp_idle,
        datagrams: Datagrams::default(),
        hook: None,
        of_service: false,
        own_uplinks: false,
        with: None,
    })
}

/// A namespace as a partition of ours.
pub(crate) fn owned(ns: &Ns, own: [&str; 2]) -> anyhow::Result<Partition> {
    let own = own.iter().map(|text| text.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
    Ok(Partition {
        netns: NetnsRef::Path(ns.path()),
        inner_link: "eth0".to_owned(),
        inside: Inside::Owned { own },
    })
}

/// The load that the tests put on the service.
pub(crate) fn load() -> Settings {
    Settings { renew: Duration::from_secs(3600), ..Settings::new(service().to_vec(), PORT) }
}
