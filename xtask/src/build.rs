//! What is built before it is run elsewhere: static programs and test binaries.
//!
//! Always of the whole workspace, and of that only the wanted targets: cargo unites the features of what it is asked to
//! build, and with `-p` it would build most libraries, ours among them, once for each selection of packages.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::command::Tool;
use crate::paths::{STATIC, TARGET, target};

/// Cargo, set to build static binaries; with [`TARGET`] as its target.
pub(crate) fn cargo() -> Result<Tool> {
    Ok(Tool::cargo()?.env("RUSTFLAGS", STATIC))
}

/// Where the built programs are.
pub(crate) fn programs_dir() -> PathBuf {
    target().join(TARGET).join("debug")
}

/// Builds the programs that tests start.
pub(crate) fn programs() -> Result<()> {
    cargo()?
        .args(["build", "--target", TARGET, "--workspace"])
        .args(["--bin", "patchswitch", "--bin", "patchswitch-init", "--bin", "patchswitch-load"])
        .show()
}

/// Builds a program that shows how the crate is used, and returns its file.
pub(crate) fn example(name: &str) -> Result<PathBuf> {
    cargo()?.args(["build", "--target", TARGET, "-p", "patchswitch", "--example", name]).show()?;
    Ok(programs_dir().join("examples").join(name))
}

/// Builds the program of the demo.
pub(crate) fn demo() -> Result<()> {
    cargo()?.args(["build", "--target", TARGET, "--workspace", "--bin", "patchswitch-demo"]).show()
}

/// Builds a program as it is measured, and returns its file.
pub(crate) fn release(name: &str) -> Result<PathBuf> {
    cargo()?.args(["build", "--release", "--target", TARGET, "--workspace", "--bin", name]).show()?;
    Ok(target().join(TARGET).join("release").join(name))
}

/// Builds test targets of the package `patchswitch-tests` and returns their files, named by target.
pub(crate) fn tests(names: &[String]) -> Result<Vec<(String, PathBuf)>> {
    let mut tool = cargo()?.args(["test", "--no-run", "--target", TARGET, "--workspace"]);
    for name in names {
        tool = tool.arg("--test").arg(name);
    }
    let text = tool.arg("--message-format=json-render-diagnostics").read()?;
    let mut found = Vec::new();
    for line in text.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        // A test target has the programs of its package built as well.
        let is_test =
            message["target"]["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "test"));
        if !is_test {
            continue;
        }
        if let (Some(name), Some(file)) = (text(&message["target"]["name"]), text(&message["executable"])) {
            found.push((name, file.into()));
        }
    }
    if found.len() == names.len() { Ok(found) } else { bail!("cargo built {found:?} for {names:?}") }
}
