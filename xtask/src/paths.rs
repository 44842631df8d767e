//! Where things are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The triple of everything that is run elsewhere than where it was built. With it, cargo keeps the static binaries
/// apart from its own build scripts.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Static, so that one binary runs on the host, in the test machine and in a partition of any distribution.
pub(crate) const STATIC: &str = "-C target-feature=+crt-static";

/// The repository.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Cargo's output directory.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The directory of downloads and images, shared by all checkouts of the user.
pub(crate) fn cache() -> Result<PathBuf> {
    let given = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = given("XDG_CACHE_HOME").or_else(|| given("HOME").map(|home| home.join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set")?.join("patchswitch"))
}
