//! The only place that starts other programs.
//!
//! A program is named by its place in a fixed list, found in a fixed list of directories (never by `PATH` or the
//! current directory), and started with an empty environment, a time limit and its input from `/dev/null`.

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

use super::priority::Priority;

/// Directories that are searched, in this order.
const DIRECTORIES: [&str; 6] =
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"];
/// How much of a program's output is kept.
const OUTPUT_LIMIT: usize = 1 << 20;
/// How long the rest of the output is waited for when the program itself has ended.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// The programs that patchswitch may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// OCI runtime, the default.
    Crun,
    /// OCI runtime, the alternative.
    Runc,
    /// Unpacks a partition's root.
    Tar,
    /// Makes an ext4 file system.
    Mkfs,
    /// Makes an XFS.
    MkfsXfs,
    /// Makes a btrfs.
    MkfsBtrfs,
    /// Gives a btrfs another identity.
    Btrfstune,
    /// Says what a device holds.
    Wipefs,
    /// Checks an ext4 file system.
    Fsck,
    /// Prints the rules of nftables; `doctor` reads them.
    Nft,
    /// A shell, for the administrator's hook commands.
    Shell,
    /// Reads the control fields of a Debian package.
    DpkgDeb,
    /// Our own second binary; on the host it keeps console logs. The caller says where it is: [`Run::located`].
    Init,
    /// Ourselves, to go on in the background. The caller says where it is: [`Run::located`].
    Patchswitch,
}

impl Program {
    const fn file(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Tar => "tar",
            Self::Mkfs => "mkfs.ext4",
            Self::MkfsXfs => "mkfs.xfs",
            Self::MkfsBtrfs => "mkfs.btrfs",
            Self::Btrfstune => "btrfstune",
            Self::Wipefs => "wipefs",
            Self::Fsck => "e2fsck",
            Self::Nft => "nft",
            Self::Shell => "sh",
            Self::DpkgDeb => "dpkg-deb",
            Self::Init => "patchswitch-init",
            Self::Patchswitch => "patchswitch",
        }
    }

    /// The Debian package that has the program.
    pub const fn package(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Tar => "tar",
            Self::Mkfs | Self::Fsck => "e2fsprogs",
            Self::MkfsXfs => "xfsprogs",
            Self::MkfsBtrfs | Self::Btrfstune => "btrfs-progs",
            Self::Wipefs => "util-linux",
            Self::Nft => "nftables",
            Self::Shell => "dash",
            Self::DpkgDeb => "dpkg",
            Self::Init | Self::Patchswitch => "patchswitch",
        }
    }

    /// Where the program is, if it is installed.
    pub fn find(self) -> Option<PathBuf> {
        DIRECTORIES.iter().map(|dir| Path::new(dir).join(self.file())).find(|path| path.is_file())
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.file())
    }
}

/// Why a program gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// Not in any of the directories that are searched.
    #[error("{program} is not installed (Debian: apt-get install {})", program.package())]
    Missing {
        /// The program.
        program: Program,
    },
    /// The kernel refused to start it, or its output could not be read.
    #[error("failed to run {program}")]
    Io {
        /// The program.
        program: Program,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// It ended with a status other than 0.
    #[error("{program} {arguments} failed ({status}): {stderr}")]
    Failed {
        /// The program.
        program: Program,
        /// Its arguments, as typed.
        arguments: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// It was still running at the end of its time and was killed.
    #[error("{program} {arguments} did not end within {:.1} s and was killed", limit.as_secs_f64())]
    TimeOut {
        /// The program.
        program: Program,
        /// Its arguments, as typed.
        arguments: String,
        /// The time it had.
        limit: Duration,
    },
}

/// A program that is about to be started.
#[derive(Debug)]
pub struct Run {
    program: Program,
    arguments: Vec<OsString>,
    limit: Duration,
    stdin: Option<std::fs::File>,
    output: Option<std::fs::File>,
    environment: Vec<(OsString, OsString)>,
    group: bool,
    stop: Option<fn() -> bool>,
    path: Option<PathBuf>,
}

/// What a program left behind.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output, at most one mebibyte.
    pub stdout: String,
    /// What it wrote to standard error, at most one mebibyte.
    pub stderr: String,
}

impl Run {
    /// A program with the default time limit of 30 seconds.
    pub fn new(program: Program) -> Self {
        Self {
            program,
            arguments: Vec::new(),
            limit: Duration::from_secs(30),
            stdin: None,
            output: None,
            environment: Vec::new(),
            group: false,
            stop: None,
            path: None,
        }
    }

    /// Says where the program is, instead of the fixed list; for our own programs alone.
    #[must_use]
    pub fn located(mut self, path: PathBuf) -> Self {
        self.path = Some(path);
        self
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets the time after which the program is killed.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Sets a variable of the environment, which is otherwise `PATH` and `LC_ALL` alone.
    #[must_use]
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((key.into(), value.into()));
        self
    }

    /// Runs the program in a process group of its own, which [`Run::status`] and [`Run::read`] kill when the program
    /// has ended or is late: for commands of the administrator, which may leave children behind.
    #[must_use]
    pub fn whole_group(mut self) -> Self {
        self.group = true;
        self
    }

    /// Gives the program a file as its input; `/dev/null` otherwise.
    #[must_use]
    pub fn stdin(mut self, file: std::fs::File) -> Self {
        self.stdin = Some(file);
        self
    }

    /// Kills the program before its time is over if this says so; it is asked again and again.
    #[must_use]
    pub fn stopped_by(mut self, stop: fn() -> bool) -> Self {
        self.stop = Some(stop);
        self
    }

    /// Sends both outputs to a file instead of collecting them, e.g. because children of the program keep them.
    #[must_use]
    pub fn output_to(mut self, file: std::fs::File) -> Self {
        self.output = Some(file);
        self
    }

    /// Runs the program to its end, whatever its exit status is.
    ///
    /// # Errors
    /// [`ProgramError`] if it is missing, cannot be started or does not end in time; never `Failed`.
    pub fn status(self) -> Result<Output, ProgramError> {
        let (program, limit, arguments) = (self.program, self.limit, self.text());
        let io = |source| ProgramError::Io { program, source };
        let (collected, group, stop) = (self.output.is_none(), self.group, self.stop);
        let mut child = self.spawn()?;
        let stdout = collected.then(|| child.stdout.take().map(collect)).flatten();
        let stderr = collected.then(|| child.stderr.take().map(collect)).flatten();
        let ended = wait(&child, limit, stop).map_err(io)?;
        if group {
            // Before the child is reaped: until then nobody else can have its number.
            kill_group(&child).map_err(io)?;
        } else if !ended {
            child.kill().map_err(io)?;
        }
        let status = child.wait().map_err(io)?;
        if !ended {
            return Err(ProgramError::TimeOut { program, arguments, limit });
        }
        Ok(Output { status, stdout: text(stdout), stderr: text(stderr) })
    }

    /// Runs the program to its end and returns its standard output.
    ///
    /// # Errors
    /// [`ProgramError`], also if its exit status is not 0.
    pub fn read(self) -> Result<String, ProgramError> {
        let (program, arguments) = (self.program, self.text());
        let output = self.status()?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(ProgramError::Failed { program, arguments, status: output.status, stderr: tail(&output.stderr) })
    }

    /// Starts the program and leaves it running; the caller waits for it.
    ///
    /// # Errors
    /// [`ProgramError::Missing`] or [`ProgramError::Io`].
    pub fn spawn(self) -> Result<Child, ProgramError> {
        let program = self.program;
        let path = self.path.clone().or_else(|| program.find()).ok_or(ProgramError::Missing { program })?;
        // What is started may be a partition, which keeps what it is started with.
        let _usual = Priority::usual();
        self.command(&path)
            .and_then(|mut command| command.spawn())
            .map_err(|source| ProgramError::Io { program, source })
    }

    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    fn command(self, path: &Path) -> std::io::Result<Command> {
        let mut command = Command::new(path);
        command.args(&self.arguments).env_clear().current_dir("/");
        command.env("PATH", DIRECTORIES.join(":")).env("LC_ALL", "C");
        command.envs(self.environment);
        if self.group {
            command.process_group(0);
        }
        command.stdin(self.stdin.map_or_else(Stdio::null, Stdio::from));
        match self.output {
            Some(file) => command.stdout(file.try_clone()?).stderr(file),
            None => command.stdout(Stdio::piped()).stderr(Stdio::piped()),
        };
        Ok(command)
    }

    fn text(&self) -> String {
        self.arguments.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }
}

/// What a thread has read of a program's output so far, and word when it is all.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    complete: mpsc::Receiver<()>,
}

fn collect(mut reader: impl Read + Send + 'static) -> Collected {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let (done, complete) = mpsc::channel();
    let kept = Arc::clone(&bytes);
    std::thread::spawn(move || {
        let mut piece = [0; 8192];
        // To the end, although not everything is kept: a full pipe would block the program.
        loop {
            let end = match reader.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => &piece[..count],
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => b"[output lost]".as_slice(),
            };
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            let room = OUTPUT_LIMIT.saturating_sub(kept.len());
            kept.extend_from_slice(&end[..end.len().min(room)]);
            if end == b"[output lost]" {
                break;
            }
        }
        // The receiver may have stopped waiting.
        let _ = done.send(());
    });
    Collected { bytes, complete }
}

/// The collected output. A child that outlived the program may keep the pipe open: it is not waited for long.
fn text(collected: Option<Collected>) -> String {
    let Some(Collected { bytes, complete }) = collected else { return String::new() };
    let _ = complete.recv_timeout(OUTPUT_PATIENCE);
    let bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits by polling: programs here live for a tenth of a second and more, and a `SIGCHLD` handler is not a
/// library's to install. Whether the program ended in time, and before somebody wants it to; it is not reaped.
fn wait(child: &Child, limit: Duration, stop: Option<fn() -> bool>) -> std::io::Result<bool> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    loop {
        if rustix::process::waitid(WaitId::Pid(pid(child)?), options)?.is_some() {
            return Ok(true);
        }
        if Instant::now() >= end || stop.is_some_and(|stop| stop()) {
            return Ok(false);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn kill_group(child: &Child) -> std::io::Result<()> {
    match rustix::process::kill_process_group(pid(child)?, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn pid(child: &Child) -> std::io::Result<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| std::io::ErrorKind::NotFound.into())
}

/// The last lines of an error output: the reason is at the end, but for those who tell after it how they are called.
fn tail(text: &str) -> String {
    let text = text.split_once("\nUsage:").map_or(text, |(reason, _)| reason).trim_end();
    let start = text.len().saturating_sub(2000);
    let start = (start..text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
    text[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_status_and_time_limit_are_kept() {
        let run = |script: &str| Run::new(Program::Shell).args(["-c", script]);
        assert_eq!(run("echo out; echo err >&2").read().unwrap(), "out\n");
        let failed = run("echo reason >&2; exit 3").read().unwrap_err().to_string();
        assert!(failed.contains("exit status: 3") && failed.contains("reason"), "{failed}");
        let told = run("(echo too small; echo Usage: mkfs; echo ' -a') >&2; exit 1").read().unwrap_err();
        assert!(told.to_string().ends_with(": too small"), "{told}");
        let late = run("sleep 5").limit(Duration::from_millis(50)).read().unwrap_err();
        assert!(matches!(late, ProgramError::TimeOut { .. }), "{late}");
    }

    #[test]
    fn children_that_outlive_the_program_neither_block_nor_stay() {
        let start = Instant::now();
        let script = "sleep 60 & echo $!";
        let run = || Run::new(Program::Shell).args(["-c", script]);
        let pid = run().whole_group().read().unwrap();
        assert!(start.elapsed() < Duration::from_secs(1), "the group's end closes the pipe");
        let gone = || {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            state.is_empty() || state.contains(") Z ")
        };
        assert!((0..200).any(|_| gone() || (std::thread::sleep(Duration::from_millis(10)), false).1));
        let pid = run().read().unwrap();
        assert!(start.elapsed() < Duration::from_secs(20), "the pipe is still open");
        let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
    }

    #[test]
    fn a_late_program_is_killed_with_its_children() {
        let run = Run::new(Program::Shell).args(["-c", "trap '' TERM; sleep 60; sleep 60"]).whole_group();
        let start = Instant::now();
        let late = run.limit(Duration::from_millis(100)).read().unwrap_err();
        assert!(matches!(late, ProgramError::TimeOut { .. }), "{late}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_variable_reaches_the_program() {
        let run = Run::new(Program::Shell).args(["-c", "echo \"$PATCHSWITCH_ROOT\""]);
        assert_eq!(run.env("PATCHSWITCH_ROOT", "/a b").read().unwrap(), "/a b\n");
    }

    #[test]
    fn a_program_sees_no_environment_of_ours() {
        let text = Run::new(Program::Shell).args(["-c", "env"]).read().unwrap();
        assert!(
            text.lines().all(|l| ["PATH=", "LC_ALL=", "PWD="].iter().any(|p| l.starts_with(p))),
            "{text}"
        );
    }
}
