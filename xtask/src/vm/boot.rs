//! One disposable machine: QEMU, its disks, its agent.

use std::fs::{self, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use patchswitch_guest::{End, PORT, RESET_PORT, Request};

use super::agent::{self, Stream, Switchboard};
use super::kernel::{Kernel, Series};
use super::{cpio, image};
use crate::cache::{Cache, say};
use crate::command::{Tool, last_lines};

/// From starting QEMU to the agent's word. Three seconds on an idle machine; builds beside it make it many times that.
const START_LIMIT: Duration = Duration::from_secs(180);
/// How long a machine in which something hangs may take to say what.
const TELL_LIMIT: Duration = Duration::from_secs(30);
/// From the power-off command to the end of QEMU.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// What machine is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) series: Series,
    pub(crate) memory_mib: u32,
    /// Sizes of the empty disks `/dev/vdb`, `/dev/vdc` …, sparse.
    pub(crate) disks_mib: Vec<u64>,
    /// A directory of the host that the machine finds, read-only, as `/payload`.
    pub(crate) payload: Option<PathBuf>,
}

impl Config {
    pub(crate) fn new(series: Series) -> Self {
        Self { series, memory_mib: 1536, disks_mib: vec![4096; 3], payload: None }
    }
}

/// What a command left behind.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) end: End,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// What a machine finds on its disks when it starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disks {
    /// What it left there.
    Kept,
    /// Nothing, as at the first start.
    Empty,
}

/// A running machine. Dropping it ends QEMU and removes its files.
pub(crate) struct Vm {
    dir: RunDir,
    disks_mib: Vec<u64>,
    arguments: Vec<String>,
    running: Running,
}

struct Running {
    qemu: Child,
    switchboard: Switchboard,
    release: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if it has ended already, which is as well.
        let _ended = self.qemu.kill();
        let _ended = self.qemu.wait();
    }
}

impl Vm {
    /// Prepares what is missing (kernel, image) and starts a machine.
    pub(crate) fn boot(cache: &Cache, config: &Config) -> Result<Self> {
        let kernel = Kernel::prepare(cache, &config.series)?;
        let root = image::host_root(cache)?;
        let init = image::guest_init(cache)?;
        let dir = RunDir::new(cache)?;
        let mut initrd = fs::read(&kernel.boot_modules)?;
        let mut archive = cpio::Archive::default();
        for name in ["dev", "proc", "sys"] {
            archive.dir(name);
        }
        archive.file("init", &fs::read(&init)?, 0o755);
        initrd.extend(archive.finish());
        fs::write(dir.path.join("initrd"), initrd)?;
        make_disks(&dir.path, &config.disks_mib)?;
        if let Some(payload) = &config.payload {
            image::make_ext4(payload, &dir.path.join("payload.ext4"), 4)?;
        }
        let arguments = arguments(config, &kernel, &root, &dir.path);
        let running = start(&dir.path, &arguments)?;
        if running.release != kernel.release {
            bail!("{} was to be started and {} came up", kernel.release, running.release);
        }
        Ok(Self { dir, disks_mib: config.disks_mib.clone(), arguments, running })
    }

    /// Starts the machine again, however it ended or if it hangs. What was in its memory is lost.
    pub(crate) fn boot_again(&mut self, disks: Disks) -> Result<()> {
        // QEMU must not hold the disks any more.
        let _ended = self.running.qemu.kill();
        self.running.qemu.wait()?;
        if disks == Disks::Empty {
            make_disks(&self.dir.path, &self.disks_mib)?;
        }
        self.running = start(&self.dir.path, &self.arguments)?;
        Ok(())
    }

    /// The kernel's release, as the machine said it.
    pub(crate) fn release(&self) -> &str {
        &self.running.release
    }

    /// The socket on which every connection is one command.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path.join("commands")
    }

    /// Runs a command and collects its output.
    pub(crate) fn run(&self, request: &Request) -> Result<Output> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let end = self.stream(request, |stream, bytes| {
            match stream {
                Stream::Out => stdout.extend_from_slice(bytes),
                Stream::Err => stderr.extend_from_slice(bytes),
            }
            Ok(())
        })?;
        Ok(Output { end, stdout, stderr })
    }

    /// Runs a command and passes its output on as it comes.
    pub(crate) fn stream(
        &self,
        request: &Request,
        sink: impl FnMut(Stream, &[u8]) -> Result<()>,
    ) -> Result<End> {
        agent::run(&self.socket(), request, sink).with_context(|| self.last_words())
    }

    /// Copies the content of a directory of the host into one of the machine, which is made.
    pub(crate) fn push(&self, from: &Path, to: &str) -> Result<()> {
        let mut tar = Tool::new("tar")
            .args(["-c", "-C"])
            .arg(from)
            .arg(".")
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let input = tar.stdout.take().context("tar has no output")?;
        let script = "mkdir -p \"$1\" && exec tar -x -C \"$1\"";
        let request = shell(script, &[to], Duration::from_secs(300));
        let mut errors = Vec::new();
        let end = agent::run_with_input(&self.socket(), &request, input, |_, bytes| {
            errors.extend_from_slice(bytes);
            Ok(())
        })?;
        let packed = tar.wait()?;
        if end != End::Code(0) || !packed.success() {
            bail!("failed to copy {} to {to}: {}", from.display(), String::from_utf8_lossy(&errors));
        }
        Ok(())
    }

    /// Copies the content of a directory of the machine into one of the host, which is made.
    pub(crate) fn pull(&self, from: &str, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        let output = self.run(&shell("exec tar -c -C \"$1\" .", &[from], Duration::from_secs(300)))?;
        if output.end != End::Code(0) {
            bail!("failed to copy {from}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let file = self.dir.path.join("pulled.tar");
        fs::write(&file, &output.stdout)?;
        Tool::new("tar").args(["-x", "--no-same-owner", "-f"]).arg(&file).arg("-C").arg(to).quiet()?;
        Ok(fs::remove_file(&file)?)
    }

    /// What a test wrote to the reset port since the last call.
    pub(crate) fn take_reset_note(&self) -> Result<String> {
        let file = self.dir.path.join("reset");
        let note = fs::read_to_string(&file).unwrap_or_default();
        fs::write(&file, "")?;
        Ok(note.trim().to_owned())
    }

    /// The kernel's log.
    pub(crate) fn console(&self) -> String {
        console(&self.dir.path)
    }

    /// What a machine does in which a command hangs: its tasks and what each waits for, if it still answers, and the
    /// end of the kernel's log.
    pub(crate) fn what_goes_on(&self) -> String {
        let script = "echo 8 >/proc/sys/kernel/printk; echo w >/proc/sysrq-trigger; cat /proc/loadavg; \
                      for t in /proc/[0-9]*/task/[0-9]*; do \
                      echo \"${t##*/} $(cut -d' ' -f2-4 $t/stat) $(cat $t/wchan) $(cat $t/syscall)\"; done 2>/dev/null \
                      | grep -v ' I 2 '";
        let mut said = String::new();
        let answered = agent::run(&self.socket(), &shell(script, &[], TELL_LIMIT), |_, bytes| {
            said.push_str(&String::from_utf8_lossy(bytes));
            Ok(())
        });
        match answered {
            Ok(end) if end != End::Code(0) => said.push_str(&format!("… {end:?}\n")),
            Ok(_) => {}
            Err(error) => said.push_str(&format!("{error:#}\n")),
        }
        format!("{said}the end of the kernel's log:\n{}", last_lines(&self.console(), 200))
    }

    /// Writes the machine's disks and ends it.
    pub(crate) fn power_off(mut self) -> Result<()> {
        self.running.switchboard.power_off()?;
        let end = Instant::now() + STOP_LIMIT;
        while Instant::now() < end {
            if self.running.qemu.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("the test machine did not end; {}", self.last_words())
    }

    fn last_words(&self) -> String {
        format!("the end of the kernel's log:\n{}", last_lines(&self.console(), 30))
    }
}

/// A request that runs a line of shell with `arguments` as `$1` …
pub(crate) fn shell(script: &str, arguments: &[&str], limit: Duration) -> Request {
    let argv =
        ["/bin/sh", "-c", script, "sh"].iter().chain(arguments).map(|word| (*word).to_owned()).collect();
    Request { argv, limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX), ..Request::default() }
}

/// Measures against attacks on the kernel that the test machine does without.
const UNGUARDED: &str =
    "mitigations=off init_on_alloc=0 hardened_usercopy=off randomize_kstack_offset=off audit=0";

/// Emulation unless asked otherwise: where KVM is present but nested it may hang instead of failing.
fn accelerator() -> &'static str {
    if std::env::var("PATCHSWITCH_KVM").is_ok_and(|value| value == "1") { "kvm" } else { "tcg" }
}

fn arguments(config: &Config, kernel: &Kernel, root: &Path, dir: &Path) -> Vec<String> {
    let path = |name: &str| dir.join(name).display().to_string();
    let payload = if config.payload.is_some() { " patchswitch.payload" } else { "" };
    // One processor: with more, QEMU's threads run a kernel that patches its own code into an oops. Emulated vector
    // units are slower than none (a digest takes twice as long), so the model is the oldest that Debian's programs and
    // the kernel's compiler for BPF are content with.
    let mut words: Vec<String> =
        "-cpu Nehalem -smp 1 -M pc -nodefaults -no-user-config -display none -no-reboot \
         -device virtio-rng-pci -device virtio-serial-pci"
            .split_whitespace()
            .map(str::to_owned)
            .collect();
    let mut add = |option: &str, value: String| words.extend([format!("-{option}"), value]);
    add("accel", accelerator().to_owned());
    add("m", config.memory_mib.to_string());
    add("kernel", kernel.image.display().to_string());
    add("initrd", path("initrd"));
    // What protects a real machine from attackers costs an emulated one much of its speed, for nothing.
    add("append", format!("console=ttyS0 panic=-1 quiet {UNGUARDED}{payload}"));
    add("serial", format!("file:{}", path("console")));
    add("chardev", format!("socket,id=agent,path={}", path("port")));
    add("device", format!("virtserialport,chardev=agent,name={PORT}"));
    add("chardev", format!("file,id=reset,path={}", path("reset")));
    add("device", format!("virtserialport,chardev=reset,name={RESET_PORT}"));
    let mut disk = |file: String, serial: &str, options: &str| {
        add("drive", format!("file={file},format=raw,if=none,id={serial},cache=unsafe,{options}"));
        add("device", format!("virtio-blk-pci,drive={serial},serial={serial}"));
    };
    disk(root.display().to_string(), "root", "readonly=on");
    for index in 0..config.disks_mib.len() {
        disk(path(&format!("disk{index}")), &format!("disk{index}"), "discard=unmap");
    }
    disk(kernel.modules.display().to_string(), "modules", "readonly=on");
    if config.payload.is_some() {
        disk(path("payload.ext4"), "payload", "readonly=on");
    }
    words
}

/// Makes the empty disks, sparse; those that are there already are emptied.
fn make_disks(dir: &Path, sizes_mib: &[u64]) -> Result<()> {
    for (index, size) in sizes_mib.iter().enumerate() {
        File::create(dir.join(format!("disk{index}")))?.set_len(size << 20)?;
    }
    Ok(())
}

fn start(dir: &Path, arguments: &[String]) -> Result<Running> {
    for name in ["port", "commands"] {
        // Left over from the machine's last life.
        let _absent = fs::remove_file(dir.join(name));
    }
    let listener = UnixListener::bind(dir.join("port"))?;
    listener.set_nonblocking(true)?;
    let output = File::create(dir.join("qemu"))?;
    let mut qemu = Tool::new("qemu-system-x86_64").args(arguments).both_to(output)?.spawn()?;
    let begin = Instant::now();
    let port = match accept(&listener, &mut qemu, begin + START_LIMIT) {
        Ok(port) => port,
        Err(error) => {
            let _ended = qemu.kill();
            qemu.wait()?;
            let said = fs::read_to_string(dir.join("qemu")).unwrap_or_default();
            return Err(error.context(format!("failed to start QEMU: {}", said.trim())));
        }
    };
    let (switchboard, ready) = Switchboard::start(&port, &dir.join("commands"))?;
    let mut running = Running { qemu, switchboard, release: String::new() };
    loop {
        match ready.recv_timeout(Duration::from_millis(100)) {
            Ok(release) => running.release = release,
            Err(RecvTimeoutError::Timeout)
                if begin.elapsed() < START_LIMIT && running.qemu.try_wait()?.is_none() =>
            {
                continue;
            }
            Err(_) => bail!("the test machine did not start; the end of its console:\n{}", console_tail(dir)),
        }
        return Ok(running);
    }
}

fn accept(listener: &UnixListener, qemu: &mut Child, end: Instant) -> Result<UnixStream> {
    loop {
        match listener.accept() {
            Ok((port, _)) => {
                port.set_nonblocking(false)?;
                return Ok(port);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("{status}");
        }
        if Instant::now() >= end {
            bail!("it did not open the agent's port");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn console(dir: &Path) -> String {
    fs::read(dir.join("console"))
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

fn console_tail(dir: &Path) -> String {
    last_lines(&console(dir), 30)
}

/// The directory of a machine's files. Its lock tells a living machine from the remains of a killed xtask.
struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    fn new(cache: &Cache) -> Result<Self> {
        let parent = cache.work_dir("run")?;
        // Another machine's directory is not to be taken for remains before its lock is held, nor its name to be used.
        let _alone = cache.lock("run.lock")?;
        sweep(&parent)?;
        // Short: the path of a UNIX socket has 108 bytes.
        let path = (0..).map(|n| parent.join(format!("{}-{n}", std::process::id()))).find(|p| !p.exists());
        let path = path.context("no free name")?;
        fs::create_dir(&path)?;
        let lock = File::create(path.join("lock"))?;
        lock.lock()?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if std::env::var_os("PATCHSWITCH_KEEP").is_some() {
            say(&format!("kept {}", self.path.display()));
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            say(&format!("failed to remove {}: {error}", self.path.display()));
        }
    }
}

fn sweep(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent)? {
        let dir = entry?.path();
        // Without a lock file it is about to get one.
        let Ok(lock) = File::open(dir.join("lock")) else { continue };
        if lock.try_lock().is_ok() {
            // Another xtask may sweep as well.
            let _gone = fs::remove_dir_all(&dir);
        }
    }
    Ok(())
}
