//! The only place that starts other programs.
//!
//! A program is named by its place in a fixed list, found in a fixed list of directories (never by `PATH` or the
//! current directory), and started with an empty environment, a time limit and its input from `/dev/null`.

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Directories that are searched, in this order.
const DIRECTORIES: [&str; 6] =
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"];
/// How much of a program's output is kept.
const OUTPUT_LIMIT: u64 = 1 << 20;

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
    /// Checks an ext4 file system.
    Fsck,
    /// Prints the rules of nftables; `doctor` reads them.
    Nft,
    /// A shell, for the administrator's hook commands.
    Shell,
}

impl Program {
    const fn file(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Tar => "tar",
            Self::Mkfs => "mkfs.ext4",
            Self::Fsck => "e2fsck",
            Self::Nft => "nft",
            Self::Shell => "sh",
        }
    }

    /// The Debian package that has the program.
    pub const fn package(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Tar => "tar",
            Self::Mkfs | Self::Fsck => "e2fsprogs",
            Self::Nft => "nftables",
            Self::Shell => "dash",
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
    #[error("{program} {arguments} did not end within {limit:?} and was killed")]
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
        Self { program, arguments: Vec::new(), limit: Duration::from_secs(30), stdin: None, output: None }
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

    /// Gives the program a file as its input; `/dev/null` otherwise.
    #[must_use]
    pub fn stdin(mut self, file: std::fs::File) -> Self {
        self.stdin = Some(file);
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
        let collected = self.output.is_none();
        let mut child = self.spawn()?;
        let stdout = collected.then(|| child.stdout.take().map(collect)).flatten();
        let stderr = collected.then(|| child.stderr.take().map(collect)).flatten();
        let Some(status) = wait(&mut child, limit).map_err(io)? else {
            child.kill().map_err(io)?;
            child.wait().map_err(io)?;
            return Err(ProgramError::TimeOut { program, arguments, limit });
        };
        let text = |reader: Option<std::thread::JoinHandle<String>>| {
            reader.and_then(|thread| thread.join().ok()).unwrap_or_default()
        };
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
        let path = program.find().ok_or(ProgramError::Missing { program })?;
        self.command(&path)
            .and_then(|mut command| command.spawn())
            .map_err(|source| ProgramError::Io { program, source })
    }

    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    fn command(self, path: &Path) -> std::io::Result<Command> {
        let mut command = Command::new(path);
        command.args(&self.arguments).env_clear().current_dir("/");
        command.env("PATH", DIRECTORIES.join(":")).env("LC_ALL", "C");
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

fn collect(reader: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut reader = reader;
        let mut bytes = Vec::new();
        let kept = reader.by_ref().take(OUTPUT_LIMIT).read_to_end(&mut bytes);
        // Drain the rest, so that the program does not block on a full pipe.
        let rest = std::io::copy(&mut reader, &mut std::io::sink());
        if let Err(error) = kept.map(|_| 0).and(rest) {
            bytes.extend_from_slice(format!("[output lost: {error}]").as_bytes());
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Waits by polling: programs here live for a tenth of a second and more, and a `SIGCHLD` handler is not a
/// library's to install.
fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// The last lines of an error output: the reason is at the end.
fn tail(text: &str) -> String {
    let text = text.trim_end();
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
        let late = run("sleep 5").limit(Duration::from_millis(50)).read().unwrap_err();
        assert!(matches!(late, ProgramError::TimeOut { .. }), "{late}");
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
