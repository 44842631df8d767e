//! Artifacts that are costly to make: downloads, kernels, images.
//!
//! An artifact is a directory named after its recipe: a text with everything that decides what comes out (versions,
//! package lists, digests of what it is made of). Beside its files lies `SHA256SUMS`, which is checked at every use;
//! what differs is made anew. Several checkouts and terminals share the cache, hence the lock.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::paths;

const SUMS: &str = "SHA256SUMS";

/// The cache of one user.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
}

impl Cache {
    pub(crate) fn open() -> Result<Self> {
        Self::at(&paths::cache()?)
    }

    pub(crate) fn at(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("failed to make {}", dir.display()))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// A directory of the cache for what is not an artifact, such as apt's lists.
    pub(crate) fn work_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("failed to make {}", dir.display()))?;
        Ok(dir)
    }

    /// The directory of the artifact `name` with this recipe; `build` fills it if it is not there or damaged.
    pub(crate) fn artifact(
        &self,
        name: &str,
        recipe: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let key = &hex(&Sha256::digest(recipe.as_bytes()))[..16];
        let place = self.dir.join(format!("{name}-{key}"));
        let _lock = self.lock(&format!("{name}-{key}.lock"))?;
        match verify(&place) {
            Ok(()) => return Ok(place),
            Err(error) if place.exists() => say(&format!("{}: {error:#}; making it anew", place.display())),
            Err(_) => {}
        }
        let new = self.dir.join(format!("{name}-{key}.new"));
        for dir in [&place, &new] {
            if dir.exists() {
                fs::remove_dir_all(dir).with_context(|| format!("failed to remove {}", dir.display()))?;
            }
        }
        fs::create_dir(&new)?;
        let start = Instant::now();
        say(&format!("making {name} …"));
        build(&new).with_context(|| format!("failed to make {name}"))?;
        fs::write(new.join(SUMS), sums(&new)?)?;
        fs::rename(&new, &place)?;
        say(&format!("made {name} in {:.1} s", start.elapsed().as_secs_f64()));
        Ok(place)
    }

    /// Waits until nobody else, thread or process, holds the lock of this name; given back when dropped.
    pub(crate) fn lock(&self, name: &str) -> Result<File> {
        let path = self.work_dir("locks")?.join(name);
        let file = File::create(&path).with_context(|| format!("failed to open {}", path.display()))?;
        file.lock().with_context(|| format!("failed to lock {}", path.display()))?;
        Ok(file)
    }
}

/// The digest that stands for an artifact in the recipes of those made of it.
pub(crate) fn identity(artifact: &Path) -> Result<String> {
    digest(&artifact.join(SUMS))
}

/// The SHA-256 of a file, in hexadecimal digits.
pub(crate) fn digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece).with_context(|| format!("failed to read {}", path.display()))? {
            0 => return Ok(hex(&hash.finalize())),
            length => hash.update(&piece[..length]),
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Says what takes long. To standard error: standard output belongs to the command that is run.
#[expect(clippy::print_stderr, reason = "progress")]
pub(crate) fn say(text: &str) {
    eprintln!("xtask: {text}");
}

/// The lines that `sha256sum --check` reads.
fn sums(dir: &Path) -> Result<String> {
    let mut names: Vec<String> = fs::read_dir(dir)?
        .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()?;
    names.retain(|name| name != SUMS);
    names.sort();
    if names.is_empty() {
        bail!("nothing was made");
    }
    let lines = names.iter().map(|name| Ok(format!("{}  {name}\n", digest(&dir.join(name))?)));
    lines.collect()
}

fn verify(place: &Path) -> Result<()> {
    let recorded = fs::read_to_string(place.join(SUMS)).context("it has no digests")?;
    if sums(place)? == recorded { Ok(()) } else { bail!("its digests differ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_is_made_once_and_again_when_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let mut made = 0;
        let mut make = |recipe: &str| {
            cache
                .artifact("thing", recipe, |out| {
                    made += 1;
                    Ok(fs::write(out.join("file"), "content")?)
                })
                .unwrap()
        };
        let place = make("one");
        assert_eq!(make("one"), place);
        assert_ne!(make("two"), place);
        fs::write(place.join("file"), "damaged").unwrap();
        make("one");
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "content");
        fs::write(place.join("stranger"), "").unwrap();
        make("one");
        assert!(!place.join("stranger").exists());
        assert_eq!(made, 4);
    }

    #[test]
    fn a_failed_build_leaves_no_artifact() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let failed = cache.artifact("thing", "one", |out| {
            fs::write(out.join("half"), "")?;
            bail!("broken")
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("broken"));
        let place = cache.artifact("thing", "one", |out| Ok(fs::write(out.join("file"), "")?)).unwrap();
        assert!(!place.join("half").exists());
        assert!(cache.artifact("empty", "one", |_| Ok(())).is_err());
    }
}
