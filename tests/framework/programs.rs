//! The only place of the tests that starts programs.
//!
//! Tests look at the kernel by other means than the product does, so they may not borrow its list of programs;
//! but the same care is taken: a clean environment, a time limit, no input unless some is given.

use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// Where programs are searched, as `PATH` has it.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin";
/// A test that hangs tells less than one that fails.
const LIMIT: Duration = Duration::from_secs(60);

/// Where a program of the Debian system is, if it is installed.
pub fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(|p| p.is_file());
    }
    PATH.split(':').map(|dir| Path::new(dir).join(program)).find(|path| path.is_file())
}

/// Where a program of this workspace was built: in the directory that `PATCHSWITCH_BIN_DIR` names, else where cargo
/// puts it, next to the test that is running.
///
/// # Errors
/// If it is not there. Cargo builds only the binaries of the package under test, so the caller (`cargo xtask
/// test`) builds the workspace first.
pub fn built(program: &str) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe().context("failed to find the running test")?;
    let named = std::env::var_os("PATCHSWITCH_BIN_DIR").map(PathBuf::from);
    let directories = named.iter().map(PathBuf::as_path).chain(test.ancestors().skip(1).take(2));
    let found = directories.map(|dir| dir.join(program)).find(|path| path.is_file());
    found.with_context(|| {
        format!(
            "{program} is not built for {}: run cargo build --workspace with the same target",
            test.display()
        )
    })
}

#[expect(clippy::disallowed_methods, reason = "the one place of the tests that starts programs")]
fn command(argv: &[&str]) -> anyhow::Result<Command> {
    let (program, arguments) = argv.split_first().context("no program given")?;
    let path = find(program).with_context(|| format!("{program} is not installed"))?;
    let mut command = Command::new(path);
    command.args(arguments).env_clear().env("PATH", PATH).env("LC_ALL", "C");
    for name in ["RUST_BACKTRACE", "PATCHSWITCH_BPF_OBJECT"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.stdin(Stdio::null());
    Ok(command)
}

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// Runs a program to its end and returns how it ended, good or bad.
///
/// # Errors
/// If it is not installed, cannot be started, or is still running after a minute (it is killed then).
pub fn output(argv: &[&str], input: Option<&str>) -> anyhow::Result<Output> {
    let mut command = command(argv)?;
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().with_context(|| format!("failed to start {}", argv.join(" ")))?;
    let writer = child.stdin.take().zip(input.map(str::to_owned)).map(|(mut pipe, text)| {
        // A program that ends without reading closes the pipe: its exit status tells more than our error.
        std::thread::spawn(move || pipe.write_all(text.as_bytes()).is_ok())
    });
    let readers = (child.stdout.take().map(collect), child.stderr.take().map(collect));
    let status = wait(&mut child, LIMIT).with_context(|| format!("failed to wait for {}", argv.join(" ")))?;
    let text = |thread: Option<std::thread::JoinHandle<String>>| {
        thread.and_then(|t| t.join().ok()).unwrap_or_default()
    };
    if let Some(writer) = writer {
        // Whether all of it was read is for the program's exit status to say.
        drop(writer.join());
    }
    Ok(Output { status, stdout: text(readers.0), stderr: text(readers.1) })
}

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// As [`output`], and if its exit status is not 0; the error has its standard error.
pub fn run(argv: &[&str]) -> anyhow::Result<String> {
    run_with_input(argv, None)
}

/// The same with a text as its standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with_input(argv: &[&str], input: Option<&str>) -> anyhow::Result<String> {
    let output = output(argv, input)?;
    if !output.status.success() {
        bail!("{} failed ({}): {}{}", argv.join(" "), output.status, output.stderr.trim_end(), output.stdout);
    }
    Ok(output.stdout)
}

/// Runs a program to its end and passes on each line of its standard error as it comes; the standard output is
/// returned as a whole. For long commands that tell of their progress.
///
/// # Errors
/// If it is not installed, cannot be started, or is still running at the end of `limit` (it is killed then).
pub fn follow(argv: &[&str], limit: Duration, mut line: impl FnMut(&str)) -> anyhow::Result<Output> {
    let mut child = command(argv)?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("failed to start {}", argv.join(" ")))?;
    let stdout = child.stdout.take().map(collect);
    let (sender, receiver) = std::sync::mpsc::channel();
    if let Some(pipe) = child.stderr.take() {
        std::thread::spawn(move || {
            let lines = std::io::BufReader::new(pipe).split(b'\n').map_while(Result::ok);
            // Nobody listens any more after a time-out.
            lines.into_iter().try_for_each(|bytes| sender.send(String::from_utf8_lossy(&bytes).into_owned()))
        });
    }
    let end = Instant::now() + limit;
    let mut stderr = String::new();
    // Ends when the program has closed its standard error, as a rule by its end.
    while let Ok(text) = receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
        line(&text);
        stderr.push_str(&text);
        stderr.push('\n');
    }
    let status = wait(&mut child, end.saturating_duration_since(Instant::now()));
    let status = status.with_context(|| format!("failed to wait for {}: {stderr}", argv.join(" ")))?;
    let stdout = stdout.and_then(|thread| thread.join().ok()).unwrap_or_default();
    Ok(Output { status, stdout, stderr })
}

/// A program in the background. It is killed and waited for when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    line: String,
    output: Option<PathBuf>,
}

/// Starts a program and leaves it running, its outputs in a file or thrown away.
///
/// # Errors
/// If it is not installed or cannot be started.
pub fn spawn(argv: &[&str], output: Option<&Path>) -> anyhow::Result<Running> {
    let mut command = command(argv)?;
    match output {
        Some(path) => {
            let file = std::fs::File::create(path)
                .with_context(|| format!("failed to create {}", path.display()))?;
            command.stdout(file.try_clone()?).stderr(file);
        }
        None => {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        }
    }
    let line = argv.join(" ");
    let child = command.spawn().with_context(|| format!("failed to start {line}"))?;
    Ok(Running { child: Some(child), line, output: output.map(Path::to_owned) })
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// What it has written so far, if its output goes to a file.
    pub fn output(&self) -> String {
        self.output.as_ref().and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn signal(&self, signal: rustix::process::Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.with_context(|| format!("{} has no process id", self.line))?;
        rustix::process::kill_process(pid, signal).with_context(|| format!("failed to signal {}", self.line))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it is still running after `limit`; it is killed then.
    pub fn wait(mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let mut child = self.child.take().context("already waited for")?;
        wait(&mut child, limit).with_context(|| format!("failed to wait for {}", self.line))
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only if it has been waited for, which the `take` excludes.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn collect(mut reader: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Err(error) = reader.read_to_end(&mut bytes) {
            bytes.extend_from_slice(format!("[output lost: {error}]").as_bytes());
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait(child: &mut Child, limit: Duration) -> anyhow::Result<ExitStatus> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= end {
            child.kill()?;
            child.wait()?;
            bail!("still running after {limit:?}, killed");
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
