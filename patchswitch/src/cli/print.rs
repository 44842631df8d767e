//! The only place that writes to standard output and standard error.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the one place")]

use std::io::{ErrorKind, Result, StdoutLock, Write};

use patchswitch::exit::ExitCode;
use serde::Serialize;

/// Writes lines for people. A closed pipe (`| head`) is not an error of ours.
pub(crate) fn text(text: &str) {
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
}

/// Passes on what a program wrote, as it is.
pub(crate) fn raw(stdout: &str, stderr: &str) {
    let _ = std::io::stdout().write_all(stdout.as_bytes());
    let _ = std::io::stderr().write_all(stderr.as_bytes());
}

/// Standard output for what is not text.
pub(crate) fn bytes() -> Bytes {
    Bytes(std::io::stdout().lock())
}

/// Bytes go through as they are. A closed pipe takes all of them: it is no error of ours, as with [`text`].
pub(crate) struct Bytes(StdoutLock<'static>);

impl Write for Bytes {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        unless_closed(self.0.write(bytes), bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        unless_closed(self.0.flush(), ())
    }
}

fn unless_closed<T>(result: Result<T>, all: T) -> Result<T> {
    match result {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(all),
        other => other,
    }
}

/// Writes one JSON document.
pub(crate) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    text(&serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Writes one JSON document of several, in a line of its own.
pub(crate) fn json_line<T: Serialize>(value: &T) -> anyhow::Result<()> {
    text(&serde_json::to_string(value)?);
    Ok(())
}

/// Says on standard error what is going on.
pub(crate) fn progress(text: &str) {
    eprintln!("{text}");
}

/// Says what failed, with all causes.
pub(crate) fn error(error: &anyhow::Error, code: ExitCode, as_json: bool) {
    if as_json {
        let causes: Vec<_> = error.chain().skip(1).map(ToString::to_string).collect();
        let value = serde_json::json!({
            "schema": "patchswitch.error/1",
            "error": error.to_string(),
            "causes": causes,
            "exit_code": code.number(),
        });
        println!("{value:#}");
    }
    let mut causes = error.chain();
    if let Some(first) = causes.next() {
        eprintln!("patchswitch: {first}");
    }
    for cause in causes {
        eprintln!("  because: {cause}");
    }
}
