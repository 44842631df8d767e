//! `cargo xtask check`: everything that can be said about the source without running it.

use std::fs;

use anyhow::{Result, bail};

use crate::build::cargo;
use crate::cache::say;
use crate::paths::{self, TARGET, root};
use crate::setup::{self, Need};

/// A check and its name.
type Check = (&'static str, fn() -> Result<()>);

/// Runs every check, also after a failure, and names those that failed.
pub(crate) fn main() -> Result<()> {
    setup::ensure(&[Need::Build, Need::Check])?;
    let checks: [Check; 9] = [
        ("format", format),
        ("lints", clippy),
        ("documentation", documentation),
        ("examples in the documentation", documentation_tests),
        ("dependencies", dependencies),
        ("lock file", lock_file),
        ("fuzz targets", fuzz_targets),
        ("BPF object", crate::ebpf::check),
        ("lints are inherited", lints_are_inherited),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        say(&format!("check: {name}"));
        if let Err(error) = check() {
            say(&format!("check: {name}: FAILED: {error:#}"));
            failed.push(name);
        }
    }
    if failed.is_empty() {
        say("check: all is well");
        return Ok(());
    }
    bail!("failed: {}", failed.join(", "))
}

fn format() -> Result<()> {
    cargo()?.args(["fmt", "--all", "--check"]).show()?;
    for outside in ["patchswitch-ebpf/Cargo.toml", "fuzz/Cargo.toml"] {
        cargo()?.args(["fmt", "--check", "--manifest-path"]).arg(root().join(outside)).show()?;
    }
    Ok(())
}

fn clippy() -> Result<()> {
    let tool = cargo()?.args(["clippy", "--quiet", "--workspace", "--all-targets", "--target", TARGET]);
    tool.args(["--", "-D", "warnings"]).show()
}

fn documentation() -> Result<()> {
    let tool = cargo()?.args(["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
    tool.args(["--target", TARGET]).env("RUSTDOCFLAGS", "-D warnings").show()
}

fn documentation_tests() -> Result<()> {
    cargo()?.args(["test", "--quiet", "--workspace", "--doc", "--target", TARGET]).show()
}

/// Licences, sources and banned crates. Advisories are left out: they change without a change of ours, and their
/// database would be one more download.
fn dependencies() -> Result<()> {
    let deny = |manifest: &str| {
        let tool =
            cargo()?.args(["deny", "--log-level", "error", "--locked", "--all-features", "--manifest-path"]);
        let tool = tool.arg(root().join(manifest)).arg("--config").arg(root().join("deny.toml"));
        tool.args(["check", "licenses", "bans", "sources"]).show()
    };
    deny("Cargo.toml")?;
    deny("patchswitch-ebpf/Cargo.toml")
}

fn lock_file() -> Result<()> {
    cargo()?.args(["metadata", "--locked", "--format-version=1"]).quiet()
}

/// That they still fit what they call, with the lock file of their own. Nothing is linked, so any compiler will do, and
/// libFuzzer itself, which takes most of the time, need not be built: it is said to be elsewhere.
fn fuzz_targets() -> Result<()> {
    let tool = cargo()?.args(["check", "--quiet", "--locked", "--target", TARGET, "--manifest-path"]);
    let tool = tool.arg(root().join("fuzz/Cargo.toml")).arg("--target-dir").arg(paths::target().join("fuzz"));
    tool.env("CUSTOM_LIBFUZZER_PATH", "/nowhere/libfuzzer.a").env("RUSTFLAGS", "-D warnings").show()
}

/// Cargo has no way to demand `[lints] workspace = true`, and a crate without it is not linted.
fn lints_are_inherited() -> Result<()> {
    let text = cargo()?.args(["metadata", "--locked", "--no-deps", "--format-version=1"]).read()?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut bad = Vec::new();
    for file in packages.iter().filter_map(|package| package["manifest_path"].as_str()) {
        if !inherits_lints(&fs::read_to_string(file)?) {
            bad.push(file);
        }
    }
    if packages.is_empty() {
        bail!("cargo named no package");
    }
    if bad.is_empty() { Ok(()) } else { bail!("no `[lints] workspace = true` in {}", bad.join(", ")) }
}

fn inherits_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().map(str::trim).skip_while(|line| *line != "[lints]").skip(1);
    lines
        .by_ref()
        .take_while(|line| !line.starts_with('['))
        .any(|line| line.replace(' ', "") == "workspace=true")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_without_lints_is_found() {
        assert!(inherits_lints("[package]\nname = \"a\"\n\n[lints]\nworkspace = true\n"));
        assert!(!inherits_lints("[package]\nname = \"a\"\n[dependencies]\n"));
        assert!(!inherits_lints("[lints]\n[dependencies]\nworkspace = true\n"));
        assert!(!inherits_lints("[package]\nworkspace = true\n"));
    }
}
