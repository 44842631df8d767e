//! A directory of files for a test machine.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use super::image;
use crate::build;
use crate::cache::{Cache, say};

/// Removed when dropped; the machine has its own copy from its start on.
pub(crate) struct Payload {
    dir: PathBuf,
}

impl Payload {
    pub(crate) fn new(cache: &Cache) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("payload-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let parent = cache.work_dir("run")?;
        sweep(&parent)?;
        let dir = parent.join(name);
        // A process that was killed may have had our number.
        remove(&dir)?;
        fs::create_dir(&dir)?;
        Ok(Self { dir })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Adds a file under its own name.
    pub(crate) fn add(&self, file: &Path) -> Result<()> {
        let name = file.file_name().context("no file name")?.to_string_lossy();
        self.add_as(file, &name)
    }

    /// Adds a file under a path inside the payload.
    pub(crate) fn add_as(&self, file: &Path, name: &str) -> Result<()> {
        let place = self.dir.join(name);
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        // Never written through: it may be another name of what was built.
        if place.exists() {
            fs::remove_file(&place)?;
        }
        // The files are large; where the cache and the build share a file system, nothing is copied.
        fs::hard_link(file, &place)
            .or_else(|_| fs::copy(file, &place).map(drop))
            .with_context(|| format!("failed to copy {}", file.display()))
    }

    /// Adds the programs that [`build::programs`] made.
    pub(crate) fn add_programs(&self) -> Result<()> {
        for entry in fs::read_dir(build::programs_dir())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_file() && name.starts_with("patchswitch") && !name.contains('.') {
                self.add(&path)?;
            }
        }
        Ok(())
    }

    /// Adds what the demo patches: `artifacts/root.tar` and `artifacts/patch/*.deb`.
    pub(crate) fn add_artifacts(&self, cache: &Cache) -> Result<()> {
        self.add_as(&image::partition_root(cache)?, "artifacts/root.tar")?;
        for file in image::patch(cache)?.files {
            let name = file.file_name().context("no file name")?.to_string_lossy().into_owned();
            self.add_as(&file, &format!("artifacts/patch/{name}"))?;
        }
        Ok(())
    }

    /// Adds `artifacts/root-systemd.tar`, the root of a partition that boots systemd.
    pub(crate) fn add_systemd_root(&self, cache: &Cache) -> Result<()> {
        self.add_as(&image::systemd_root(cache)?, "artifacts/root-systemd.tar")
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.dir) {
            say(&format!("failed to remove {}: {error}", self.dir.display()));
        }
    }
}

/// Removes a payload and what stands beside it.
fn remove(dir: &Path) -> std::io::Result<()> {
    for result in [fs::remove_dir_all(dir), fs::remove_file(dir.with_extension("control"))] {
        match result {
            // The sweep meets the socket of a directory that is gone already as well.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Removes the payloads of processes that were killed.
fn sweep(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix("payload-").and_then(|rest| rest.split('-').next()).map(str::to_owned);
        let dead = |pid: String| !Path::new("/proc").join(pid).exists();
        if owner.is_some_and(dead) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}
