//! `cargo xtask setup`: what the build machine lacks, installed where that is allowed, else named exactly.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, say};
use crate::command::{Tool, installed, search_path};

/// What a task needs beyond Rust itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// To build the workspace.
    Build,
    /// To check formatting, lints and dependencies.
    Check,
    /// To count tests, and to look at what they did.
    Test,
    /// To make and run the test machine.
    Machine,
    /// To measure peers.
    Bench,
    /// To build the BPF object.
    Ebpf,
}

/// A Debian package, and a program or file by which it is recognised.
type Package = (&'static str, &'static str);

/// SQLite and the bundled C parts are compiled here; static binaries want libc's archive.
const BUILD: [Package; 2] = [("gcc", "gcc"), ("libc6-dev", "/usr/lib/x86_64-linux-gnu/libc.a")];
/// Tests look at the kernel with these, not with patchswitch.
const TEST: [Package; 12] = [
    ("iproute2", "ip"),
    ("iputils-ping", "ping"),
    ("ethtool", "ethtool"),
    ("tcpdump", "tcpdump"),
    ("nftables", "nft"),
    ("iptables", "iptables-nft"),
    ("procps", "ps"),
    ("bpftool", "bpftool"),
    // The examples are run as they are written.
    ("runc", "runc"),
    ("systemd-container", "systemd-nspawn"),
    // So are those of single writers. Where Debian starts a PostgreSQL server of its own, it is left alone; Redis' server is
    // another name of one of the tools.
    ("postgresql-15", "/usr/lib/postgresql/15/bin/postgres"),
    ("redis-tools", "redis-cli"),
];
const MACHINE: [Package; 9] = [
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("mmdebstrap", "mmdebstrap"),
    ("debian-archive-keyring", "/usr/share/keyrings/debian-archive-keyring.gpg"),
    ("e2fsprogs", "mkfs.ext4"),
    ("kmod", "depmod"),
    // Lets another user than root make the root image.
    ("uidmap", "newuidmap"),
    ("lz4", "lz4"),
    ("xz-utils", "xz"),
    ("zstd", "zstd"),
];
/// What patchswitch is compared with. Debian starts neither of them with anything to do: keepalived has no configuration,
/// HAProxy one without a port.
const BENCH: [Package; 3] = [("keepalived", "keepalived"), ("haproxy", "haproxy"), ("linux-perf", "perf")];
/// A compiler that brings `core` for BPF, and the LLVM that bpf-linker has to share with it.
const EBPF: [Package; 6] = [
    ("rustc-web", "/usr/bin/rustc"),
    ("libstd-rust-web-dev-bpf", "/usr/lib/rustlib/bpfel-unknown-none/lib"),
    ("llvm-22-dev", "/usr/lib/llvm-22/bin/llvm-config"),
    ("libpolly-22-dev", "/usr/lib/llvm-22/lib/libPolly.a"),
    ("libzstd-dev", "/usr/include/zstd.h"),
    ("zlib1g-dev", "/usr/include/zlib.h"),
];

/// The versions that the repository is developed with.
const NEXTEST: &str = "0.9.143";
const DENY: &str = "0.20.2";
const BPF_LINKER: &str = "0.13.0";

/// Installs what is missing for building, checking and testing.
///
/// On Debian, as root, packages are installed by apt-get; otherwise the command to type is printed. Programs from
/// cargo's registry go to ~/.cache/patchswitch/tools. Does nothing where nothing is missing.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Also what builds the BPF object; only needed to change it
    #[arg(long)]
    ebpf: bool,
}

/// Runs `cargo xtask setup`.
pub(crate) fn main(options: &Options) -> Result<()> {
    let mut needs = vec![Need::Build, Need::Check, Need::Test, Need::Machine];
    if options.ebpf {
        needs.push(Need::Ebpf);
    }
    ensure(&needs)?;
    say("nothing is missing");
    Ok(())
}

/// Installs what is missing for these needs.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let mut wanted: Vec<Package> = Vec::new();
    for need in needs {
        wanted.extend(match need {
            Need::Build => BUILD.as_slice(),
            Need::Test => &TEST,
            Need::Machine => &MACHINE,
            Need::Bench => &BENCH,
            Need::Ebpf if !crate::ebpf::nightly_is_usable() => &EBPF,
            // The nightly compiler brings the rest, but the linker is built against an LLVM all the same.
            Need::Ebpf => &EBPF[2..],
            Need::Check => &[],
        });
    }
    let missing: Vec<&str> =
        wanted.iter().filter(|(_, mark)| !present(mark)).map(|(name, _)| *name).collect();
    install_packages(&missing)?;
    for need in needs {
        match need {
            Need::Check => {
                component("rustfmt", "fmt")?;
                component("clippy", "clippy")?;
                from_registry("cargo-deny", DENY, &[], &[])?;
            }
            // Without the means to update itself, which take longer to build than the rest.
            Need::Test => from_registry(
                "cargo-nextest",
                NEXTEST,
                &["--no-default-features", "--features", "default-no-update"],
                &[],
            )?,
            Need::Ebpf => {
                let path = format!("/usr/lib/llvm-22/bin:{}", search_path());
                let environment = [("LLVM_PREFIX", "/usr/lib/llvm-22"), ("PATH", path.as_str())];
                from_registry(
                    "bpf-linker",
                    BPF_LINKER,
                    &["--no-default-features", "--features", "llvm-22"],
                    &environment,
                )?;
            }
            Need::Build | Need::Machine | Need::Bench => {}
        }
    }
    Ok(())
}

fn present(mark: &str) -> bool {
    if mark.starts_with('/') { Path::new(mark).exists() } else { installed(mark) }
}

fn install_packages(names: &[&str]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let line = format!("apt-get install --no-install-recommends {}", names.join(" "));
    if !installed("apt-get") {
        bail!("missing: {}. These are the names of Debian's packages; on Debian: {line}", names.join(" "));
    }
    if !rustix::process::geteuid().is_root() {
        bail!("missing packages, and only root can install them: sudo {line}");
    }
    say(&format!("installing {}", names.join(" ")));
    let install = || {
        let tool = Tool::new("apt-get").args(["install", "-y", "-qq", "--no-install-recommends"]).args(names);
        tool.env("DEBIAN_FRONTEND", "noninteractive").quiet()
    };
    // Fresh machines have no lists of packages, old ones have lists of packages that are gone.
    install().or_else(|_| {
        Tool::new("apt-get").args(["-qq", "update"]).quiet()?;
        install()
    })
}

fn component(name: &str, subcommand: &str) -> Result<()> {
    if Tool::cargo()?.args([subcommand, "--version"]).succeeds() {
        return Ok(());
    }
    say(&format!("installing {name}"));
    let add = Tool::new("rustup").args(["component", "add", name]).quiet();
    add.with_context(|| format!("cargo {subcommand} is missing and rustup cannot add it"))
}

/// Builds a program from cargo's registry if there is none yet. A newer one that the user has is as good.
fn from_registry(name: &str, version: &str, options: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let tools = Cache::open()?.work_dir("tools")?;
    if tools.join("bin").join(name).is_file() || on_path(name) {
        return Ok(());
    }
    say(&format!("building {name} {version} (a few minutes, once) …"));
    let mut tool =
        Tool::cargo()?.args(["install", name, "--version", version, "--locked", "--quiet", "--root"]);
    tool = tool.arg(&tools).args(options).env("RUSTFLAGS", "");
    for (variable, value) in environment {
        tool = tool.env(variable, value);
    }
    tool.show()
}

fn on_path(name: &str) -> bool {
    let home = std::env::var_os("CARGO_HOME")
        .map(Into::into)
        .or_else(|| std::env::var_os("HOME").map(|home| std::path::PathBuf::from(home).join(".cargo")));
    installed(name) || home.is_some_and(|home: std::path::PathBuf| home.join("bin").join(name).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_missed_and_what_is_not_is() {
        assert!(present("sh") && present("/etc/passwd"));
        assert!(!present("patchswitch-no-such-program") && !present("/patchswitch-no-such-file"));
    }
}
