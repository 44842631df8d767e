//! Where jobs take place.
//!
//! ```text
//!  client's namespace: eth0 ──veth── uplink0 of the host       everything else is made by patchswitch
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use patchswitch_tests::leftovers::{Leftover, Snapshot};
use patchswitch_tests::netlab::{self, Lab, Ns};
use patchswitch_tests::programs::{self, Output, Running};
use patchswitch_tests::root;
use serde_json::Value;

use super::client;
use crate::storage::scratch_disk;

/// Where everything durable lies: a disk that outlives a reset of the machine.
const ROOT: &str = "/run/patchswitch-jobs";
/// The name of the service.
pub(super) const SERVICE: &str = "web";
/// A job takes a few seconds; this is for one that hangs.
const JOB: Duration = Duration::from_secs(300);

/// Settings that tests change.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) patch_limit: &'static str,
    pub(super) observe: &'static str,
    pub(super) scan: bool,
    /// Lines of the section of jobs, about stores that can fill up.
    pub(super) stores: &'static str,
    pub(super) uplink: &'static str,
    pub(super) addresses: [&'static str; 2],
    /// Lines of the section of the service.
    pub(super) more: &'static str,
    /// The system disk's root, and its size.
    pub(super) root: (fn() -> PathBuf, &'static str),
    /// Size of the standby.
    pub(super) standby: &'static [&'static str],
    /// Application disks of both.
    pub(super) disks: &'static [&'static str],
    /// The file system of all disks.
    pub(super) fs: &'static str,
    /// Lines of the section of the drain.
    pub(super) drain: &'static str,
    /// How long a boot, a restart and the checks may take.
    pub(super) come_up: &'static str,
    pub(super) stop: &'static str,
    pub(super) udp_idle: &'static str,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            patch_limit: "20s",
            observe: "1s",
            scan: false,
            stores: "",
            uplink: netlab::UPLINK,
            addresses: netlab::SERVICE,
            more: "",
            root: (job_root, "40M"),
            standby: &["--size", "40M"],
            disks: &[],
            fs: "ext4",
            drain: "deadline = \"20s\"",
            come_up: "",
            stop: "5s",
            udp_idle: "1s",
        }
    }
}

/// How a command ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) code: i32,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

/// Two partitions, one service, one client. Made first and dropped last.
pub(super) struct Stage {
    pub(super) client: Ns,
    binary: String,
    before: Snapshot,
    _lab: Lab,
}

pub(super) fn path(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

impl Stage {
    /// A client and a host; no partition yet.
    pub(super) fn bare(settings: &Settings) -> Self {
        // Made once for all tests, so before anything is looked at.
        drop((settings.root.0)());
        let stage = Self::ground(true);
        stage.configure(settings);
        stage
    }

    /// Everything that a job needs: `web-a` serves `v1`, `web-b` is its standby.
    pub(super) fn new(settings: &Settings) -> Self {
        let stage = Self::bare(settings);
        stage.define(settings);
        stage.ok(&["service", "add", SERVICE]);
        // A partition that runs may take a while until it serves.
        wait_until("v1 serves", Duration::from_secs(60), || client::who(&stage.client).is_ok());
        assert_eq!(stage.who(), "v1");
        stage
    }

    /// After a reset of the machine: the disks are as they were, everything else is made anew. Nobody serves.
    pub(super) fn after_reset() -> Self {
        Self::ground(false)
    }

    fn ground(empty: bool) -> Self {
        fs::create_dir_all(ROOT).unwrap();
        let disk = scratch_disk().expect("these tests overwrite a disk: they run in the test machine");
        programs::run(&["mount", &disk, ROOT]).unwrap();
        if empty {
            for entry in fs::read_dir(ROOT).unwrap() {
                let path = entry.unwrap().path();
                let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
                removed.unwrap();
            }
        }
        let mut lab = Lab::new("job");
        let client = lab.namespace("client").unwrap();
        network(&client);
        // Made once for all tests, so before anything is looked at.
        job_root();
        let binary = programs::built("patchswitch").unwrap().display().to_string();
        Self { client, binary, before: Snapshot::take().unwrap(), _lab: lab }
    }

    /// Writes the configuration.
    pub(super) fn configure(&self, settings: &Settings) {
        let Settings { patch_limit, observe, scan, stores, uplink, addresses: [v4, v6], more, .. } = settings;
        let Settings { drain, stop, udp_idle, .. } = settings;
        let (boot, gate) = match settings.come_up {
            "" => ("30s", "10s"),
            limit => (limit, limit),
        };
        let text = format!(
            r#"[agent]
state_dir = "{ROOT}/state"
[job]
boot = "{boot}"
patch = "{patch_limit}"
restart = "{boot}"
stop = "{stop}"
{stores}
[scan]
packages = {scan}
[[service]]
name = "{SERVICE}"
addresses = ["{v4}", "{v6}"]
uplinks = ["{uplink}"]
partition = "web-a"
udp_idle = "{udp_idle}"
may_lose = ["/srv", "/srv/**", "/var/log/**", "/var/lib/systemd/**"]
{more}
[service.gate]
need = 1
every = "200ms"
timeout = "1s"
deadline = "{gate}"
[service.observe]
length = "{observe}"
every = "100ms"
fail = 2
of = 4
[service.drain]
{drain}
[[service.probe]]
kind = "http"
port = {port}
"#,
            port = client::PORT,
        );
        // Durable, unlike everything that is for patchswitch to make so.
        let mut file = fs::File::create(path("patchswitch.toml")).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.sync_all().unwrap();
    }

    /// The two partitions.
    pub(super) fn define(&self, settings: &Settings) {
        let (root, size) = settings.root;
        let root = root();
        let root = root.to_str().unwrap();
        let [a, b] = [netlab::OWN_A, netlab::OWN_B];
        let command = "/usr/bin/serve";
        let first = [
            "--from",
            root,
            "--size",
            size,
            "--fs",
            settings.fs,
            "--own",
            a[0],
            "--own",
            a[1],
            "--command",
            command,
        ];
        let disks: Vec<&str> = settings.disks.iter().flat_map(|disk| ["--disk", disk]).collect();
        self.ok(&[&["partition", "define", "web-a"][..], &first, &disks].concat());
        let second = ["--standby", "--own", b[0], "--own", b[1]];
        self.ok(&[&["partition", "define", "web-b"][..], &second, settings.standby, &disks].concat());
    }

    fn argv<'a>(&'a self, arguments: &[&'a str], config: &'a str) -> Vec<&'a str> {
        [self.binary.as_str(), "--config", config].into_iter().chain(arguments.iter().copied()).collect()
    }

    /// Runs patchswitch to its end, whatever it is.
    pub(super) fn run(&self, arguments: &[&str]) -> Ended {
        let start = Instant::now();
        let config = path("patchswitch.toml").display().to_string();
        let Output { status, stdout, stderr } =
            programs::follow(&self.argv(arguments, &config), JOB, |line| println!("  {line}")).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        println!("patchswitch {}: {status} after {seconds:.2} s", arguments.join(" "));
        Ended { code: status.code().unwrap(), stdout, stderr }
    }

    /// Runs an example of the crate with the configuration and these arguments, which must succeed; what it printed.
    #[track_caller]
    pub(super) fn example(&self, name: &str, arguments: &[&str]) -> String {
        let (program, config) = (programs::built(name).unwrap(), path("patchswitch.toml"));
        let head = [program.to_str().unwrap(), config.to_str().unwrap()];
        let ended = programs::follow(&[&head, arguments].concat(), JOB, |line| println!("  {line}")).unwrap();
        assert!(ended.status.success(), "{name}: {}{}", ended.stderr, ended.stdout);
        ended.stdout
    }

    /// Runs patchswitch, which must succeed; what it printed.
    #[track_caller]
    pub(super) fn ok(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code, 0, "{}: {}{}", arguments.join(" "), ended.stderr, ended.stdout);
        ended.stdout
    }

    /// Runs patchswitch, which must end with this code; what it said.
    #[track_caller]
    pub(super) fn ends_with(&self, code: i32, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code, code, "{}: {}{}", arguments.join(" "), ended.stderr, ended.stdout);
        ended.stderr
    }

    /// What patchswitch says to programs.
    #[track_caller]
    pub(super) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[&["--json"], arguments].concat())).unwrap()
    }

    /// Starts patchswitch and leaves it running; what it says goes to a file.
    pub(super) fn start(&self, arguments: &[&str]) -> Running {
        let config = path("patchswitch.toml").display().to_string();
        programs::spawn(&self.argv(arguments, &config), Some(&path("said"))).unwrap()
    }

    /// Starts patchswitch and waits until it says that a phase has begun; fails if it ends before.
    #[track_caller]
    pub(super) fn start_until(&self, arguments: &[&str], phase: &str) -> Running {
        let mut running = self.start(arguments);
        let begins = format!("{phase} …");
        wait_until(&begins, JOB, || {
            let said = running.output();
            assert!(!running.has_ended() || said.contains(&begins), "{phase}: {said}");
            said.lines().any(|line| line.trim() == begins)
        });
        running
    }

    /// Adds and approves a patch that is a script; its number.
    pub(super) fn patch(&self, name: &str, body: &str) -> String {
        let file = script(name, body);
        let added = self.json(&["patch", "add", file.to_str().unwrap(), "--type", "security", "--approve"]);
        added["patches"][0]["id"].to_string()
    }

    /// A patch that makes the service say something else.
    pub(super) fn says(&self, what: &str) -> String {
        self.patch(&format!("says-{what}"), &format!("echo {what} > /etc/says"))
    }

    /// Who answers at the service addresses.
    #[track_caller]
    pub(super) fn who(&self) -> String {
        client::who(&self.client).unwrap()
    }

    /// The partition that the store has as the active one.
    pub(super) fn active(&self) -> String {
        let list = self.json(&["partition", "list"]);
        let rows = list["partitions"].as_array().unwrap();
        let active: Vec<_> = rows.iter().filter(|row| row["role"] == "active").collect();
        assert_eq!(active.len(), 1, "{list}");
        active[0]["name"].as_str().unwrap().to_owned()
    }

    /// The row of the patch table.
    pub(super) fn patch_row(&self, id: &str) -> Value {
        let list = self.json(&["patch", "list"]);
        let rows = list["patches"].as_array().unwrap();
        rows.iter().find(|row| row["id"].as_u64() == id.parse().ok()).unwrap().clone()
    }

    /// `ip` with the words of one line, on the host.
    #[track_caller]
    pub(super) fn host_ip(&self, line: &str) -> String {
        let words: Vec<&str> = ["ip"].into_iter().chain(line.split_whitespace()).collect();
        programs::run(&words).unwrap()
    }

    /// Nothing of a job is left since that list of the kernel's, but the log of the console, which tells of a clone that
    /// is gone why it failed.
    #[track_caller]
    pub(super) fn nothing_of_a_job_left(&self, before: &Snapshot) {
        self.nothing_of_a_job_left_but(before, |_| ());
    }

    /// As well as that, after what is found has been looked through.
    #[track_caller]
    pub(super) fn nothing_of_a_job_left_but(&self, before: &Snapshot, look: impl Fn(&mut Vec<Leftover>)) {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let mut left = Snapshot::left_since(before, Duration::ZERO).unwrap();
            left.retain(|one| !one.name.starts_with("/run/patchswitch/console/web-b."));
            look(&mut left);
            if is_balanced(&left) {
                return;
            }
            assert!(Instant::now() < end, "left: {}", list(&left));
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Removes service and partitions by patchswitch's own commands; nothing may be left.
    #[track_caller]
    pub(super) fn finish(self) {
        self.ok(&["service", "remove", SERVICE]);
        for partition in ["web-a", "web-b"] {
            self.ok(&["partition", "remove", partition]);
        }
        self.nothing_left();
    }

    /// What the kernel has is what it had.
    #[track_caller]
    pub(super) fn nothing_left(&self) {
        let left = Snapshot::left_since(&self.before, Duration::from_secs(5)).unwrap();
        assert!(left.is_empty(), "left: {}", list(&left));
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The machine is started anew after a failure. What it was in tells why.
            for argv in
                [&["dmsetup", "table"][..], &["dmsetup", "info", "-c"], &["ps", "-e", "-o", "pid,args"]]
            {
                eprintln!("{}:\n{}", argv.join(" "), programs::run(argv).unwrap_or_default());
            }
            return;
        }
        programs::run(&["ip", "link", "del", netlab::UPLINK]).unwrap();
        programs::run(&["umount", ROOT]).unwrap();
        fs::remove_dir(ROOT).unwrap();
    }
}

/// Whether as much has come as has gone, numbers aside: a partition that was started again has other processes and other
/// programs, but not more of them.
fn is_balanced(left: &[Leftover]) -> bool {
    let no_digits = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
    let mut balance = BTreeMap::new();
    for one in left {
        for (value, sign) in [(&one.before, -1), (&one.after, 1)] {
            if let Some(value) = value {
                let key = (one.list, one.scope.clone(), no_digits(&one.name), no_digits(value));
                *balance.entry(key).or_insert(0) += sign;
            }
        }
    }
    balance.values().all(|sum| *sum == 0)
}

fn list(left: &[Leftover]) -> String {
    left.iter().map(|one| format!("\n  {one}")).collect()
}

/// Waits until something is so.
#[track_caller]
pub(super) fn wait_until(what: &str, limit: Duration, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !is_so() {
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A file that is a patch.
pub(super) fn script(name: &str, body: &str) -> PathBuf {
    let directory = path("patches");
    fs::create_dir_all(&directory).unwrap();
    let file = directory.join(name);
    fs::write(&file, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    file
}

/// The small root with a web server that says what a file says.
pub(super) fn job_root() -> PathBuf {
    let root = root::small().unwrap();
    let serve = root.join("usr/bin/serve");
    if !serve.exists() {
        fs::copy(programs::built("patchswitch-load").unwrap(), root.join("usr/bin/patchswitch-load"))
            .unwrap();
        fs::write(root.join("etc/says"), "v1\n").unwrap();
        let script = format!(
            "#!/bin/sh\nexec /usr/bin/patchswitch-load serve --port {} --tag \"$(cat /etc/says)\"\n",
            client::PORT
        );
        fs::write(&serve, script).unwrap();
        fs::set_permissions(&serve, fs::Permissions::from_mode(0o755)).unwrap();
    }
    root
}

fn network(client: &Ns) {
    let (link, uplink, name) = (netlab::CLIENT_LINK, netlab::UPLINK, client.name());
    let batch = |lines: &str| programs::run_with_input(&["ip", "-batch", "-"], Some(lines)).unwrap();
    batch(&format!("link add {uplink} type veth peer name {link} netns {name}\nlink set {uplink} up\n"));
    let addresses = |[v4, v6]: [&str; 2], link: &str| {
        format!("addr add {v4}/24 dev {link}\naddr add {v6}/64 dev {link} nodad\n")
    };
    batch(&addresses(netlab::HOST, uplink));
    client.ip(&format!("link set {link} up")).unwrap();
    client.ip_batch(&addresses(netlab::CLIENT, link)).unwrap();
    // The kernel gives the uplink its link-local address by itself: later it would look like something left behind.
    let shown =
        || programs::run(&["ip", "-6", "-o", "addr", "show", "dev", uplink, "scope", "link"]).unwrap();
    wait_until("the uplink has its link-local address", Duration::from_secs(10), || {
        let shown = shown();
        !shown.is_empty() && !shown.contains("tentative")
    });
}
