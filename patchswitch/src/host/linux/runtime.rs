//! The OCI runtime's command line: crun, or runc.
//!
//! Every call has a time limit and is made from inside the agent's mount namespace ([`Inside`]), because the runtime
//! looks for the partition's root there. Observed with crun 1.8.1 and runc 1.1.5: neither tells the exit code of a
//! partition's init; signals other than the classic ones have to be given by number; what a runtime does not know
//! (any more) has ended.

mod begun;
mod gather;
mod scratch;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde::Deserialize;

use self::begun::Begun;
pub use self::begun::Ready;
use self::scratch::Orphan;
use super::cgroup::CgroupError;
use super::mountns::Inside;
use super::programs::{Program, ProgramError, Run};

/// How long a call may take that does not run anything of the partition's. An emulated machine needs a tenth of it.
const LIMIT: Duration = Duration::from_secs(30);

/// Why the runtime did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// It failed; the text is its own.
    #[error("{program} failed to {action} {name}: {text}")]
    Failed {
        /// Which runtime.
        program: Program,
        /// What it was asked to do.
        action: &'static str,
        /// The partition.
        name: String,
        /// What it said.
        text: String,
    },
    /// It could not be run, or did not end in time.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// What it printed could not be understood.
    #[error("{program} printed a state that cannot be understood")]
    State {
        /// Which runtime.
        program: Program,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A command in the partition did not end in time and was killed.
    #[error("the command {command:?} in {name} did not end within {:.1} s and was killed", limit.as_secs_f64())]
    TimeOut {
        /// The partition.
        name: String,
        /// The command.
        command: String,
        /// The time it had.
        limit: Duration,
    },
    /// The cgroup of a command could not be made or emptied.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A file of the runtime's could not be used.
    #[error("failed to {action} {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// How far a partition is, in the runtime's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made.
    Creating,
    /// Made; its init has not been started.
    Created,
    /// Its init runs.
    Running,
    /// Its init has ended.
    Stopped,
    /// Frozen.
    Paused,
}

/// What the runtime knows of a partition.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct State {
    /// How far it is.
    pub status: Status,
    /// The number of its init in the agent's process namespace; 0 if it has none.
    #[serde(default)]
    pub pid: u32,
}

impl State {
    /// Parses what `state` prints.
    ///
    /// # Errors
    /// If it is not the JSON of the OCI runtime specification.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

/// What a command in a partition left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// Its exit status; 128 and more for a signal, as a shell has it.
    pub code: i32,
    /// What it wrote to standard output, at most one mebibyte.
    pub stdout: String,
    /// What it wrote to standard error, at most one mebibyte.
    pub stderr: String,
}

/// An OCI runtime.
#[derive(Clone, Debug)]
pub struct Runtime {
    program: Program,
    root: PathBuf,
}

impl Runtime {
    /// A runtime that keeps its own state below `root`.
    pub fn new(program: Program, root: &Path) -> Self {
        Self { program, root: root.to_owned() }
    }

    /// Which program it is.
    pub fn program(&self) -> Program {
        self.program
    }

    /// Makes a partition from a bundle and returns its init, which waits for [`Runtime::start`].
    ///
    /// Both outputs of the init go to `console`. Standard input is `/dev/null`.
    ///
    /// # Errors
    /// [`RuntimeError`]. The runtime itself leaves little behind, but not nothing: the caller deletes.
    pub fn create(
        &self,
        _inside: &Inside,
        name: &str,
        bundle: &Path,
        console: File,
    ) -> Result<u32, RuntimeError> {
        let log = bundle.join("runtime.log");
        let pid_file = bundle.join("init.pid");
        for file in [&log, &pid_file] {
            remove_file(file)?;
        }
        let run = self.run("create", Some(&log));
        let run = run.arg("--bundle").arg(bundle).arg("--pid-file").arg(&pid_file).arg(name);
        let output = run.output_to(console).status()?;
        if !output.status.success() {
            return Err(self.failed("create", name, &read_log(&log)));
        }
        let text = fs::read_to_string(&pid_file).map_err(error("read", &pid_file))?;
        let pid = text.trim().parse().ok();
        pid.ok_or_else(|| {
            self.failed("create", name, &format!("it wrote {text:?} for the number of the init"))
        })
    }

    /// Lets the init of a created partition run.
    ///
    /// # Errors
    /// [`RuntimeError`], e.g. because the program that the bundle names cannot be executed.
    pub fn start(&self, _inside: &Inside, name: &str) -> Result<(), RuntimeError> {
        self.call("start", name, |run| run.arg(name))
    }

    /// Sends a signal, by number, to the init. That it has ended is fine; whether it had not.
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub fn kill(&self, inside: &Inside, name: &str, signal: i32) -> Result<bool, RuntimeError> {
        let alive = |state: Option<State>| state.is_some_and(|s| s.status != Status::Stopped);
        match self.call("kill", name, |run| run.arg(name).arg(signal.to_string())) {
            Ok(()) => Ok(true),
            Err(RuntimeError::Failed { .. }) if !alive(self.state(inside, name)?) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What the runtime knows of a partition; `None` if nothing, which is to be taken for stopped.
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub fn state(&self, _inside: &Inside, name: &str) -> Result<Option<State>, RuntimeError> {
        if !self.knows(name) {
            return Ok(None);
        }
        let output = self.run("state", None).arg(name).status()?;
        if output.status.success() {
            let parsed = State::parse(&output.stdout);
            return parsed.map(Some).map_err(|source| RuntimeError::State { program: self.program, source });
        }
        // Deleted meanwhile, or a create that failed half-way (crun leaves an empty directory).
        if self.knows(name) && !self.is_half_made(name) {
            return Err(self.failed("ask for the state of", name, &output.stderr));
        }
        Ok(None)
    }

    /// Removes what the runtime keeps of a partition, killing its init if it still runs. Whether there was anything.
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub fn delete(&self, _inside: &Inside, name: &str) -> Result<bool, RuntimeError> {
        if !self.knows(name) {
            return Ok(false);
        }
        let result = self.call("delete", name, |run| run.arg("--force").arg(name));
        if self.knows(name) && self.is_half_made(name) {
            let dir = self.root.join(name);
            fs::remove_dir_all(&dir).map_err(error("remove", &dir))?;
            return Ok(true);
        }
        if self.knows(name) { result.map(|()| true) } else { Ok(true) }
    }

    /// Runs a command in a partition, to its end or to the end of its time.
    ///
    /// It has a cgroup of its own below the partition's. At the end of its time it is killed with everything that it
    /// started. If it ends by itself, what it left running stays in the partition and ends with it; it is not waited
    /// for, nor is its output (runc waits until its output is closed).
    ///
    /// # Errors
    /// [`RuntimeError::TimeOut`], or another if the command could not be run.
    pub fn exec(
        &self,
        _inside: &Inside,
        name: &str,
        command: &[&str],
        limit: Duration,
    ) -> Result<Executed, RuntimeError> {
        Begun::new(self, name, command, None)?.wait_out(limit)
    }

    /// Waits until no call of this runtime is under way that a killed command has left: it goes on alone, and makes or takes
    /// away a partition, or does something in one, behind the next command's back. An `exec` for which somebody waits is left
    /// alone; one of which nobody knows any more is killed at the end of this time.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] if another one is still at it then.
    pub fn settle(&self, limit: Duration) -> Result<(), RuntimeError> {
        let end = Instant::now() + limit;
        while let Some((process, orphan)) = self.under_way()? {
            if Instant::now() >= end {
                let Some(orphan) = orphan else {
                    return Err(error("wait for", &process)(io::Error::from(io::ErrorKind::TimedOut)));
                };
                tracing::warn!("a command that nobody waits for any more is killed in {}", orphan.partition);
                orphan.kill()?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        scratch::sweep(&self.root);
        Ok(())
    }

    /// A process that is a call of this runtime, by its arguments: a partition's own processes have others by the time
    /// that they run, and cannot be told from outside before.
    fn under_way(&self) -> Result<Option<(PathBuf, Option<Orphan>)>, RuntimeError> {
        let proc = Path::new("/proc");
        let root = self.root.as_os_str().as_encoded_bytes();
        for entry in fs::read_dir(proc).map_err(error("read", proc))? {
            let process = entry.map_err(error("read", proc))?.path();
            // Not a process, or gone meanwhile.
            let Ok(arguments) = fs::read(process.join("cmdline")) else { continue };
            let mut arguments = arguments.split(|byte| *byte == 0).skip(1);
            let ours = arguments.next() == Some(b"--root") && arguments.next() == Some(root);
            let verbs = [&b"create"[..], b"start", b"kill", b"delete", b"exec"];
            let Some(verb) = arguments.find(|word| ours && verbs.contains(word)) else { continue };
            // The init of a partition that was created looks the same until it is started.
            let waits = fs::read_link(process.join("ns/pid")).ok() != fs::read_link("/proc/self/ns/pid").ok();
            let orphan = if verb == b"exec" { Orphan::of(&self.root, arguments) } else { None };
            if !waits && (verb != b"exec" || orphan.is_some()) {
                return Ok(Some((process, orphan)));
            }
        }
        Ok(None)
    }

    fn run(&self, verb: &str, log: Option<&Path>) -> Run {
        let run = Run::new(self.program).limit(LIMIT).arg("--root").arg(&self.root);
        let run = match log {
            Some(log) => run.arg("--log").arg(log),
            None => run,
        };
        run.arg(verb)
    }

    fn call(
        &self,
        verb: &'static str,
        name: &str,
        arguments: impl FnOnce(Run) -> Run,
    ) -> Result<(), RuntimeError> {
        let output = arguments(self.run(verb, None)).status()?;
        if output.status.success() { Ok(()) } else { Err(self.failed(verb, name, &output.stderr)) }
    }

    fn failed(&self, action: &'static str, name: &str, text: &str) -> RuntimeError {
        let text = crate::patch::wire::printable(text.trim());
        let text = crate::patch::wire::tail(&text, 2000).to_owned();
        RuntimeError::Failed { program: self.program, action, name: name.to_owned(), text }
    }

    /// Both runtimes keep one directory for each partition.
    fn knows(&self, name: &str) -> bool {
        self.root.join(name).is_dir()
    }

    /// Whether the directory has no state in it: `status` is crun's file, `state.json` runc's.
    fn is_half_made(&self, name: &str) -> bool {
        let dir = self.root.join(name);
        !["status", "state.json"].iter().any(|file| dir.join(file).exists())
    }
}

fn read_log(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn remove_file(path: &Path) -> Result<(), RuntimeError> {
    match fs::remove_file(path) {
        Err(source) if source.raw_os_error() != Some(Errno::NOENT.raw_os_error()) => {
            Err(RuntimeError::Io { action: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn error<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl Fn(E) -> RuntimeError {
    let path = path.to_owned();
    move |source| RuntimeError::Io { action, path: path.clone(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_both_runtimes_are_understood() {
        let crun = r#"{"ociVersion":"1.0.0","id":"web","pid":812,"status":"running","bundle":"/b","rootfs":"/r",
            "created":"2026-11-22T17:00:00.000000Z","systemd-scope":"","owner":"root"}"#;
        assert_eq!(State::parse(crun).unwrap(), State { status: Status::Running, pid: 812 });
        let runc =
            r#"{"ociVersion":"1.0.2-dev","id":"web","pid":0,"status":"stopped","bundle":"/b","owner":""}"#;
        assert_eq!(State::parse(runc).unwrap(), State { status: Status::Stopped, pid: 0 });
        assert!(State::parse("error").is_err());
    }

    #[test]
    fn what_the_runtime_has_no_directory_for_is_stopped_and_needs_no_deleting() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Runtime::new(Program::Crun, dir.path());
        assert!(!runtime.knows("web"));
        fs::create_dir(dir.path().join("web")).unwrap();
        assert!(runtime.knows("web") && runtime.is_half_made("web"));
        fs::write(dir.path().join("web/status"), "{}").unwrap();
        assert!(!runtime.is_half_made("web"));
    }
}
