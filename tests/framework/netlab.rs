//! A laboratory of network namespaces, gone when it is dropped.
//!
//! ```text
//!  client ──veth── host (the uplink is its end)      a, b: two namespaces that hold nothing but their loopback
//! ```
//!
//! Namespaces are named after the process and a counter, so that tests run side by side. A namespace is entered by
//! a thread made for it, which ends there: a thread that changed its namespace is never given back to anyone.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::programs::{self, Running};

/// The client's addresses in a [`SwitchLab`].
pub const CLIENT: [&str; 2] = ["10.77.0.2", "fd77::2"];
/// The host's addresses on its uplink.
pub const HOST: [&str; 2] = ["10.77.0.1", "fd77::1"];
/// The service addresses: inside the uplink's network, held by nobody until they are attached.
pub const SERVICE: [&str; 2] = ["10.77.0.10", "fd77::10"];
/// The first pair of own addresses.
pub const OWN_A: [&str; 2] = ["10.77.0.11", "fd77::11"];
/// The second pair of own addresses.
pub const OWN_B: [&str; 2] = ["10.77.0.12", "fd77::12"];
/// The name of the uplink in the host's namespace.
pub const UPLINK: &str = "uplink0";
/// The name of the client's link.
pub const CLIENT_LINK: &str = "eth0";

/// Network namespaces that belong together. Dropping it deletes them by name, and ends what still runs in them.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    namespaces: Vec<Ns>,
}

/// A network namespace of a [`Lab`]. Copies refer to the same one.
#[derive(Clone, Debug)]
pub struct Ns {
    name: String,
    file: Arc<File>,
}

impl Lab {
    /// An empty laboratory; `label` shows up in the names of its namespaces.
    pub fn new(label: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Self { prefix: format!("lab{}-{number}-{label}", std::process::id()), namespaces: Vec::new() }
    }

    /// Makes a namespace with its loopback up, without duplicate address detection and router advertisements, so
    /// that IPv6 addresses are usable at once and nothing appears by itself.
    ///
    /// # Errors
    /// If the kernel refuses (root is needed).
    pub fn namespace(&mut self, name: &str) -> anyhow::Result<Ns> {
        let name = format!("{}-{name}", self.prefix);
        programs::run(&["ip", "netns", "add", &name])?;
        let path = Path::new("/run/netns").join(&name);
        let file = File::open(&path).with_context(|| format!("failed to open {}", path.display()));
        // Listed before anything else can fail, or the namespace would be left behind.
        let ns = match file {
            Ok(file) => Ns { name, file: Arc::new(file) },
            Err(error) => {
                programs::run(&["ip", "netns", "del", &name])?;
                return Err(error);
            }
        };
        self.namespaces.push(ns.clone());
        for conf in ["default", "all"] {
            ns.sysctl(&format!("net/ipv6/conf/{conf}/accept_dad"), "0")?;
            ns.sysctl(&format!("net/ipv6/conf/{conf}/accept_ra"), "0")?;
            ns.sysctl(&format!("net/ipv6/conf/{conf}/router_solicitations"), "0")?;
        }
        ns.ip("link set lo up")?;
        Ok(ns)
    }

    /// Connects two namespaces by a veth pair, both ends up. With a real queue instead of none, so that a burst
    /// waits instead of being lost in the pair's ring.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn veth(&self, one: (&Ns, &str), other: (&Ns, &str)) -> anyhow::Result<()> {
        let ((a, link_a), (b, link_b)) = (one, other);
        a.ip(&format!("link add {link_a} type veth peer name {link_b} netns {}", b.name))?;
        for (ns, link) in [(a, link_a), (b, link_b)] {
            ns.ip(&format!("link set {link} up"))?;
            ns.run(&["tc", "qdisc", "replace", "dev", link, "root", "pfifo", "limit", "1000"])?;
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for ns in self.namespaces.drain(..).rev() {
            if let Err(error) = ns.delete() {
                eprintln_error(&ns.name, &error);
            }
        }
    }
}

/// The namespaces of laboratories whose process was killed before it could delete them.
///
/// # Errors
/// If `/run/netns` cannot be read.
pub fn abandoned() -> anyhow::Result<Vec<Ns>> {
    let entries = match std::fs::read_dir("/run/netns") {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("failed to read /run/netns"),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if maker(&name).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            found.push(Ns::named(&name)?);
        }
    }
    Ok(found)
}

/// The process that made a namespace of a laboratory, by the namespace's name.
fn maker(name: &str) -> Option<u32> {
    name.strip_prefix("lab")?.split_once('-')?.0.parse().ok()
}

#[expect(clippy::print_stderr, reason = "a drop has no other way to say that it failed")]
fn eprintln_error(name: &str, error: &anyhow::Error) {
    eprintln!("failed to delete the namespace {name}: {error:#}");
}

/// Kills what is left in a namespace of ours. A process would keep the namespace alive after its name is gone.
fn end_processes(name: &str) -> anyhow::Result<String> {
    for pid in programs::run(&["ip", "netns", "pids", name])?.lines() {
        let pid = pid.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.ok_or_else(|| anyhow!("ip netns pids printed something else than a process id"))?;
        match rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error).context("failed to kill a process of the namespace"),
        }
    }
    Ok(String::new())
}

impl Ns {
    /// Ends what runs in the namespace, and takes its name away.
    ///
    /// # Errors
    /// If the kernel refuses, or there is no such name any more.
    pub fn delete(&self) -> anyhow::Result<()> {
        end_processes(&self.name)?;
        programs::run(&["ip", "netns", "del", &self.name])?;
        Ok(())
    }

    /// A namespace that somebody else made, by its name below `/run/netns`.
    ///
    /// # Errors
    /// If there is none.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        let path = Path::new("/run/netns").join(name);
        let file = File::open(&path).with_context(|| format!("failed to open {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file) })
    }

    /// Its name below `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file, for commands that take a path.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs a function inside, on a thread of its own that ends with it.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or what the function returned.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        enter(&self.file, f).with_context(|| format!("in the namespace {}", self.name))
    }

    /// Runs a program inside to its end and returns its standard output.
    ///
    /// # Errors
    /// As [`programs::run`].
    pub fn run(&self, argv: &[&str]) -> anyhow::Result<String> {
        self.enter(|| programs::run(argv))
    }

    /// Runs a program inside to its end, good or bad.
    ///
    /// # Errors
    /// As [`programs::output`].
    pub fn output(&self, argv: &[&str]) -> anyhow::Result<programs::Output> {
        self.enter(|| programs::output(argv, None))
    }

    /// Starts a program inside and leaves it running, its outputs in a file or thrown away.
    ///
    /// # Errors
    /// As [`programs::spawn`].
    pub fn spawn(&self, argv: &[&str], output: Option<&Path>) -> anyhow::Result<Running> {
        self.enter(|| programs::spawn(argv, output))
    }

    /// `ip` with the words of one line.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn ip(&self, line: &str) -> anyhow::Result<String> {
        let words: Vec<&str> = ["ip"].into_iter().chain(line.split_whitespace()).collect();
        self.run(&words)
    }

    /// Several lines for `ip`, which stops at the first that fails: one process instead of many.
    ///
    /// # Errors
    /// If `ip` fails; it names the line.
    pub fn ip_batch(&self, lines: &str) -> anyhow::Result<String> {
        self.enter(|| programs::run_with_input(&["ip", "-batch", "-"], Some(lines)))
    }

    /// Sets a system control of the namespace, named by its path below `/proc/sys`.
    ///
    /// # Errors
    /// If there is none of that name or it refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.enter(|| {
            std::fs::write(&path, value)
                .with_context(|| format!("failed to write {value} to {}", path.display()))
        })
    }

    /// Reads a file of `/proc` or `/proc/sys/net` as the namespace sees it: `net/…` and `sys/net/…`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn proc(&self, file: &str) -> anyhow::Result<String> {
        // `/proc/net` shows the namespace of the process, `/proc/thread-self/net` that of the thread.
        let base = if file.starts_with("net/") { "/proc/thread-self" } else { "/proc" };
        let path = Path::new(base).join(file);
        self.enter(|| {
            std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))
        })
    }
}

/// Runs a function in the network namespace that a file stands for, on a thread of its own.
///
/// # Errors
/// If the namespace cannot be entered, or what the function returned.
pub fn enter<T: Send>(file: &File, f: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .context("failed to enter the network namespace")?;
            f()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A client and a host on one network, and two namespaces for services.
#[derive(Debug)]
pub struct SwitchLab {
    /// Where the load comes from: [`CLIENT`] on [`CLIENT_LINK`].
    pub client: Ns,
    /// The host: [`HOST`] on [`UPLINK`].
    pub host: Ns,
    /// The first service's namespace: loopback only.
    pub a: Ns,
    /// The second service's namespace: loopback only.
    pub b: Ns,
    /// What deletes them; the last field, so that it is dropped last.
    pub lab: Lab,
}

impl SwitchLab {
    /// What the names of all its namespaces begin with, and of no other laboratory's.
    pub fn prefix(&self) -> &str {
        self.client.name().trim_end_matches("client")
    }

    /// Makes the four namespaces. Nothing is forwarded, no address is proxied: that is for the product to do.
    ///
    /// # Errors
    /// If the kernel refuses (root is needed).
    pub fn new(label: &str) -> anyhow::Result<Self> {
        let mut lab = Lab::new(label);
        let [client, host, a, b] = ["client", "host", "a", "b"].map(|name| lab.namespace(name));
        let (client, host, a, b) = (client?, host?, a?, b?);
        lab.veth((&client, CLIENT_LINK), (&host, UPLINK))?;
        for (ns, link, [v4, v6]) in [(&client, CLIENT_LINK, CLIENT), (&host, UPLINK, HOST)] {
            ns.ip_batch(&format!("addr add {v4}/24 dev {link}\naddr add {v6}/64 dev {link} nodad\n"))?;
        }
        Ok(Self { client, host, a, b, lab })
    }
}
