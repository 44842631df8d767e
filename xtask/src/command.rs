//! The one place of xtask that starts other programs.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// A program of the build machine, found by `PATH`; a failure says the whole command and the end of its output.
pub(crate) struct Tool {
    command: Command,
}

impl Tool {
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        // Tools translate their messages and sort by the locale otherwise.
        command.env("LC_ALL", "C.UTF-8").env("PATH", search_path());
        Self { command }
    }

    /// Cargo itself, without the settings that the `cargo run` that started xtask left in the environment.
    pub(crate) fn cargo() -> Result<Self> {
        let mut tool = Self::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // Subcommands that set-up built are found there; what the user has goes first.
        let tools = crate::paths::cache()?.join("tools/bin");
        tool.command.env("PATH", format!("{}:{}", search_path(), tools.display()));
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                tool.command.env_remove(name);
            }
        }
        Ok(tool.dir(crate::paths::root()))
    }

    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    pub(crate) fn args<T: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.command.args(arguments);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn env_remove(mut self, names: &[&str]) -> Self {
        for name in names {
            self.command.env_remove(name);
        }
        self
    }

    pub(crate) fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    pub(crate) fn stdin(mut self, input: impl Into<Stdio>) -> Self {
        self.command.stdin(input);
        self
    }

    pub(crate) fn stdout(mut self, output: impl Into<Stdio>) -> Self {
        self.command.stdout(output);
        self
    }

    pub(crate) fn stderr(mut self, output: impl Into<Stdio>) -> Self {
        self.command.stderr(output);
        self
    }

    /// Sends both outputs to a file.
    pub(crate) fn both_to(mut self, file: std::fs::File) -> Result<Self> {
        self.command.stdout(file.try_clone()?).stderr(file);
        Ok(self)
    }

    /// Runs to the end with the terminal as output.
    pub(crate) fn show(mut self) -> Result<()> {
        let status = self.command.status().with_context(|| format!("failed to start {}", self.text()))?;
        if status.success() { Ok(()) } else { bail!("{}: {status}", self.text()) }
    }

    /// Runs to the end and keeps the output to itself; a failure shows its last lines.
    pub(crate) fn quiet(self) -> Result<()> {
        self.output().map(drop)
    }

    /// Runs to the end and returns the standard output; a failure shows the end of both outputs.
    pub(crate) fn read(self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.output()?.stdout).into_owned())
    }

    /// Whether it could be started and ended with 0. For questions, where "no" is an answer.
    pub(crate) fn succeeds(mut self) -> bool {
        self.command.stdout(Stdio::null()).stderr(Stdio::null());
        self.command.status().is_ok_and(|status| status.success())
    }

    /// Starts it and leaves it running.
    pub(crate) fn spawn(mut self) -> Result<Child> {
        self.command.spawn().with_context(|| format!("failed to start {}", self.text()))
    }

    /// The command itself, for what is not offered here.
    pub(crate) fn into_inner(self) -> Command {
        self.command
    }

    fn output(mut self) -> Result<Output> {
        let output = self.command.output().with_context(|| format!("failed to start {}", self.text()))?;
        if output.status.success() {
            return Ok(output);
        }
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        bail!("{}: {}\n{}", self.text(), output.status, last_lines(&text, 30))
    }

    fn text(&self) -> String {
        let words = std::iter::once(self.command.get_program()).chain(self.command.get_args());
        words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }
}

/// The end of a text: where programs say what went wrong.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Whether a program can be started by its name.
pub(crate) fn installed(program: &str) -> bool {
    std::env::split_paths(&search_path()).any(|dir| dir.join(program).is_file())
}

/// The user's `PATH`, and where Debian has the programs of the administrator.
pub(crate) fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
