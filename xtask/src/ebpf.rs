//! `cargo xtask ebpf`: builds the BPF object that is in the repository.
//!
//! The object needs a compiler that most machines lack, so it is kept next to the digest of its source, and the
//! workspace builds without it. Two compilers will do: rustup's nightly with `rust-src`, which compiles `core` itself,
//! or Debian's `rustc-web`, which brings `core` for BPF.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::cache::{Cache, hex, say};
use crate::command::{Tool, search_path};
use crate::paths::root;
use crate::setup::{self, Need};

const OBJECT: &str = "patchswitch.bpf.o";
const DIGEST: &str = "SOURCE.sha256";
const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// Builds the BPF object from source, with the digest of the source beside it.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only tell whether the object in the repository belongs to the source; builds nothing
    #[arg(long, conflicts_with = "out")]
    check: bool,
    /// Where to put the object instead of patchswitch/bpf
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs `cargo xtask ebpf`.
pub(crate) fn main(options: &Options) -> Result<()> {
    let home = root().join("patchswitch/bpf");
    if options.check {
        return check();
    }
    let out = options.out.as_ref().unwrap_or(&home);
    build(out)?;
    say(&format!("wrote {}", out.join(OBJECT).display()));
    Ok(())
}

/// Fails if the object in the repository was not built from the present source.
pub(crate) fn check() -> Result<()> {
    let file = root().join("patchswitch/bpf").join(DIGEST);
    let recorded = fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
    if !file.with_file_name(OBJECT).is_file() {
        bail!("there is no {OBJECT} beside {}", file.display());
    }
    if recorded.trim() == source_digest(root())? {
        Ok(())
    } else {
        bail!("the BPF object is older than its source; build it with: cargo xtask ebpf")
    }
}

fn build(out: &Path) -> Result<()> {
    setup::ensure(&[Need::Ebpf])?;
    // Before the build: what changes meanwhile makes the object stale.
    let digest = source_digest(root())?;
    let target_dir = crate::paths::target().join("ebpf");
    let (source, _alone) = one_name_of_source()?;
    only_of_this_clone(&target_dir)?;
    let tool = compiler()?.env("CARGO_ENCODED_RUSTFLAGS", flags(&source)?.join("\u{1f}"));
    let tool = tool.args(["--release", "--locked", "--target", TARGET, "--target-dir"]).arg(&target_dir);
    let tool = tool.arg("--manifest-path").arg(source.join("patchswitch-ebpf/Cargo.toml"));
    tool.dir(root().join("patchswitch-ebpf")).show()?;
    let built = target_dir.join(TARGET).join("release/patchswitch-ebpf");
    fs::create_dir_all(out)?;
    // What the kernel reads (BTF) stays; what only a debugger reads is most of the file.
    let strip = Path::new("/usr/lib/llvm-22/bin/llvm-strip");
    Tool::new(strip).args(["-g", "-o"]).arg(out.join(OBJECT)).arg(&built).quiet()?;
    Ok(fs::write(out.join(DIGEST), format!("{digest}\n"))?)
}

/// Clones that share a target directory have one path of their source as well: what cargo has there of another one would count
/// as this one's.
fn only_of_this_clone(target_dir: &Path) -> Result<()> {
    let mark = target_dir.join("clone");
    let this = root().to_string_lossy();
    if target_dir.is_dir() && fs::read_to_string(&mark).ok().as_deref() != Some(&*this) {
        fs::remove_dir_all(target_dir)
            .with_context(|| format!("failed to remove {}", target_dir.display()))?;
    }
    fs::create_dir_all(target_dir).with_context(|| format!("failed to make {}", target_dir.display()))?;
    fs::write(&mark, &*this).with_context(|| format!("failed to write {}", mark.display()))
}

/// The same path for every clone of a user: cargo makes the names of functions from the path of their crate, and these are
/// in the object. So two clones of one source make the same object, byte for byte, and CI need not test it twice. Nobody else may
/// give the path another meaning while the lock is held.
fn one_name_of_source() -> Result<(PathBuf, File)> {
    let place = Cache::open()?.work_dir("ebpf")?;
    let lock = File::create(place.join("lock")).context("failed to make the lock of the source")?;
    lock.lock().context("failed to lock the source")?;
    let source = place.join("source");
    match fs::remove_file(&source) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("failed to remove {}", source.display()));
        }
        _ => {}
    }
    std::os::unix::fs::symlink(root(), &source)
        .with_context(|| format!("failed to make {}", source.display()))?;
    Ok((source, lock))
}

/// Cargo with a compiler for BPF.
fn compiler() -> Result<Tool> {
    let path = search_path();
    let tools = crate::paths::cache()?.join("tools/bin");
    let path = format!("/usr/lib/llvm-22/bin:{}:{path}", tools.display());
    if nightly_is_usable() {
        let tool = Tool::new("rustup").args(["run", "nightly", "cargo", "build", "-Z", "build-std=core"]);
        return Ok(tool.env_remove(&["RUSTC", "CARGO", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"]).env("PATH", path));
    }
    let tool = Tool::cargo()?.arg("build").env_remove(&["RUSTFLAGS"]).env("PATH", path);
    // Its inline assembly for BPF is still an unstable feature.
    Ok(tool.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1"))
}

/// The line information in the object names source files; whose machine built it is nobody's business.
fn flags(source: &Path) -> Result<Vec<String>> {
    let home = std::env::var("CARGO_HOME")
        .or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.cargo")))?;
    let flags = [
        "-Clinker=bpf-linker".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        // Arithmetic and comparisons of 32 bits, which every kernel has that we run on (since 5.1).
        "-Ctarget-cpu=v3".to_owned(),
        format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        format!("--remap-path-prefix={}=.", root().display()),
        format!("--remap-path-prefix={}=.", source.display()),
        format!("--remap-path-prefix={home}/registry/src=registry"),
    ];
    Ok(flags.into())
}

/// Whether rustup has a nightly compiler with the source of `core`.
pub(crate) fn nightly_is_usable() -> bool {
    let sysroot = Tool::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]);
    let sysroot = sysroot.env_remove(&["RUSTC", "RUSTUP_TOOLCHAIN"]).read().unwrap_or_default();
    Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").is_dir()
}

/// One digest over everything that the object is made of: names and contents, in the order of the names.
fn source_digest(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    for dir in ["patchswitch-common", "patchswitch-ebpf"] {
        collect(&root.join(dir), &mut files)?;
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let name = file.strip_prefix(root)?.to_string_lossy().into_owned();
        let content = fs::read(&file)?;
        // Lengths in front: no other division into names and contents has the same digest.
        hash.update(format!("{}:{name}{}:", name.len(), content.len()));
        hash.update(content);
    }
    Ok(hex(&hash.finalize()))
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" {
                collect(&path, files)?;
            }
        } else if path.extension().is_some_and(|e| e == "rs") || name == "Cargo.toml" || name == "Cargo.lock"
        {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_of_the_source_changes_the_digest() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| {
            let file = root.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        };
        write("patchswitch-common/src/lib.rs", "a");
        write("patchswitch-ebpf/src/main.rs", "b");
        let digest = || source_digest(root.path()).unwrap();
        let mut seen = vec![digest()];
        for (name, content) in [
            ("patchswitch-common/src/lib.rs", "c"),
            ("patchswitch-ebpf/Cargo.lock", ""),
            ("patchswitch-ebpf/src/lib.rs", ""),
        ] {
            write(name, content);
            assert!(!seen.contains(&digest()), "{name}");
            seen.push(digest());
        }
        write("patchswitch-ebpf/target/debug/main.rs", "");
        write("patchswitch-ebpf/README.md", "");
        assert_eq!(Some(&digest()), seen.last());
    }
}
