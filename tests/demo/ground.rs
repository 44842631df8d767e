//! Where the demo takes place: a client on a network of its own, and a directory on a real disk.
//!
//! ```text
//!  client's namespace: eth0 ──veth── uplink0 of the host          everything else is made by patchswitch
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use patchswitch_tests::netlab::{self, Lab, Ns};
use patchswitch_tests::programs;

/// Where an empty disk is mounted.
const MOUNT: &str = "/run/patchswitch-demo";
/// The service of the demo.
pub(crate) const SERVICE: &str = "web";
/// The partition that serves at first.
pub(crate) const FIRST: &str = "web-a";
/// The standby.
pub(crate) const SECOND: &str = "web-b";

/// Where disks and files go.
#[derive(Clone, Debug)]
pub(crate) enum Scratch {
    /// An empty disk; it is overwritten.
    Disk(PathBuf),
    /// An existing directory, in which one is made.
    Directory(PathBuf),
}

/// What was made; [`Ground::remove`] takes it away again.
#[derive(Debug)]
pub(crate) struct Ground {
    /// The client's namespace.
    pub(crate) client: Ns,
    /// For everything that is written.
    pub(crate) directory: PathBuf,
    mounted: bool,
    _lab: Lab,
}

impl Ground {
    pub(crate) fn build(scratch: &Scratch) -> anyhow::Result<Self> {
        let (directory, mounted) = match scratch {
            Scratch::Disk(disk) => (mount(disk)?, true),
            Scratch::Directory(parent) => {
                let directory = parent.join(format!("demo-{}", std::process::id()));
                fs::create_dir(&directory)
                    .with_context(|| format!("failed to make {}", directory.display()))?;
                (directory, false)
            }
        };
        let mut lab = Lab::new("demo");
        let client = lab.namespace("client")?;
        let ground = Self { client, directory, mounted, _lab: lab };
        ground.network()?;
        Ok(ground)
    }

    fn network(&self) -> anyhow::Result<()> {
        let (link, uplink) = (netlab::CLIENT_LINK, netlab::UPLINK);
        let name = self.client.name();
        let lines =
            format!("link add {uplink} type veth peer name {link} netns {name}\nlink set {uplink} up\n");
        programs::run_with_input(&["ip", "-batch", "-"], Some(&lines))?;
        // The addresses of the host: a network that clients and service share.
        let addresses = |[v4, v6]: [&str; 2], link: &str| {
            format!("addr add {v4}/24 dev {link}\naddr add {v6}/64 dev {link} nodad\n")
        };
        programs::run_with_input(&["ip", "-batch", "-"], Some(&addresses(netlab::HOST, uplink)))?;
        self.client.ip(&format!("link set {link} up"))?;
        self.client.ip_batch(&addresses(netlab::CLIENT, link))?;
        // A real queue, so that a burst waits instead of being lost in the pair's ring.
        let queue = |link| ["tc", "qdisc", "replace", "dev", link, "root", "pfifo", "limit", "1000"];
        programs::run(&queue(uplink))?;
        self.client.run(&queue(link))?;
        self.settle()
    }

    /// Waits until the kernel has given the uplink its link-local address: a moment later it would look like
    /// something that the product left behind.
    fn settle(&self) -> anyhow::Result<()> {
        for _ in 0..100 {
            let link_local = ["ip", "-6", "-o", "addr", "show", "dev", netlab::UPLINK, "scope", "link"];
            let shown = programs::run(&link_local)?;
            if !shown.is_empty() && !shown.contains("tentative") {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        bail!("{} gets no link-local address", netlab::UPLINK)
    }

    /// Takes everything away.
    pub(crate) fn remove(self) -> anyhow::Result<()> {
        let link = programs::run(&["ip", "link", "del", netlab::UPLINK]);
        let files =
            if self.mounted { unmount() } else { fs::remove_dir_all(&self.directory).map_err(Into::into) };
        link.map(drop).and(files)
    }
}

fn mount(disk: &Path) -> anyhow::Result<PathBuf> {
    if Path::new(MOUNT).exists() {
        bail!("{MOUNT} is there already: a demo is running, or one did not end well");
    }
    let path = disk.display().to_string();
    // Without lazy initialisation: the kernel would write inode tables in the middle of what is measured.
    programs::run(&["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", &path])?;
    fs::create_dir(MOUNT)?;
    programs::run(&["mount", &path, MOUNT])?;
    Ok(PathBuf::from(MOUNT))
}

fn unmount() -> anyhow::Result<()> {
    programs::run(&["umount", MOUNT])?;
    fs::remove_dir(MOUNT).with_context(|| format!("failed to remove {MOUNT}"))
}

/// The configuration of the demo's service.
pub(crate) fn configuration(directory: &Path, scan: bool) -> String {
    let [v4, v6] = netlab::SERVICE;
    let (uplink, state) = (netlab::UPLINK, directory.join("state"));
    format!(
        r#"# The configuration of the demo.
[agent]
state_dir = "{state}"

[job]
boot = "60s"
patch = "180s"
restart = "60s"
stop = "10s"

[scan]
packages = {scan}                     # compares every file of the clone with dpkg's digests

[[service]]
name = "{SERVICE}"
addresses = ["{v4}", "{v6}"]
uplinks = ["{uplink}"]
partition = "{FIRST}"
udp_idle = "3s"                       # short, because it is waited for
may_lose = ["/var/log/**", "/var/lib/nginx/**"]
lossy_give_back = "allow"             # what is in may_lose may be lost by a give-back as well

[service.gate]
need = 3
every = "300ms"
timeout = "1s"
deadline = "8s"

[service.observe]
length = "5s"
every = "250ms"
fail = 2
of = 4

[service.drain]
command = "nginx -s quit"
command_after = "15s"                 # connections in use end by themselves until then
deadline = "60s"

[[service.probe]]
kind = "http"
port = 80
"#,
        state = state.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_one() {
        let text = configuration(Path::new("/scratch"), false);
        let config = patchswitch::config::parse(&text, "patchswitch.toml").unwrap();
        let addresses: Vec<_> = config.services[0].addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, netlab::SERVICE);
        assert_eq!(config.agent.state_dir, Path::new("/scratch/state"));
    }
}
