//! File systems: the test machine's root, the payload, and what the demo patches.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::build;
use crate::cache::{Cache, digest, identity};
use crate::command::Tool;
use crate::debian::{Archive, SUITE, main_archive, security_archive};

/// Added to the essential packages of the test machine: what patchswitch needs on a host, and the tools by which
/// tests look at the kernel without it.
const HOST_PACKAGES: &str = "bpftool,bsdutils,btrfs-progs,crun,dmsetup,e2fsprogs,ethtool,iproute2,iputils-ping,ipvsadm,jq,kmod,\
                             lvm2,mount,netbase,nftables,postgresql-15,procps,redis-tools,runc,socat,tcpdump,\
                             thin-provisioning-tools,udev,xfsprogs";
/// The partition of the demo.
const PARTITION_PACKAGES: &str = "nginx-light,iproute2";
/// A partition whose own init is PID 1, and a singleton.
const SYSTEMD_PACKAGES: &str = "cron,nginx-light,systemd-sysv";
/// The packages of the demo's patch: they require each other's version, and go in together.
const PATCH_PACKAGES: [&str; 3] = ["nginx", "nginx-common", "nginx-light"];
const SLIM: [&str; 4] = [
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/info/*",
];
/// Debian would make a database and begin its server.
const NO_CLUSTER: &str = "--essential-hook=mkdir -p \"$1/etc/postgresql-common\" && \
    echo 'create_main_cluster = false' >\"$1/etc/postgresql-common/createcluster.conf\"";
/// mmdebstrap copies these two from the build machine.
const BLANK: [&str; 2] =
    ["--customize-hook=rm -f \"$1/etc/resolv.conf\"", "--customize-hook=: > \"$1/etc/hostname\""];

/// The ext4 image of the test machine's root.
pub(crate) fn host_root(cache: &Cache) -> Result<PathBuf> {
    let recipe = format!("6 {SUITE} {HOST_PACKAGES} {SLIM:?} {NO_CLUSTER}");
    let dir = cache.artifact("host-root", &recipe, |out| {
        let tar = out.join("root.tar");
        let options = [&SLIM[..], &[NO_CLUSTER]].concat();
        debootstrap("essential", HOST_PACKAGES, &[main_archive(), security_archive()], &tar, &options)?;
        tar_to_ext4(&tar, &out.join("root.ext4"), 64)?;
        Ok(fs::remove_file(&tar)?)
    })?;
    Ok(dir.join("root.ext4"))
}

/// The root of the demo's partition, as a tar file: a minimal Debian with a web server of the main archive, which is
/// older than the one of the security archive.
pub(crate) fn partition_root(cache: &Cache) -> Result<PathBuf> {
    let recipe = format!("2 {SUITE} {PARTITION_PACKAGES}");
    let dir = cache.artifact("partition-root", &recipe, |out| {
        let status =
            format!("--customize-hook=download /var/lib/dpkg/status {}", out.join("status").display());
        let tar = out.join("root.tar");
        debootstrap("minbase", PARTITION_PACKAGES, &[main_archive()], &tar, &[&status])
    })?;
    Ok(dir.join("root.tar"))
}

/// The root of a partition that boots systemd, as a tar file; of the same archive as [`partition_root`], so that the
/// same patch goes into it.
pub(crate) fn systemd_root(cache: &Cache) -> Result<PathBuf> {
    let recipe = format!("1 {SUITE} {SYSTEMD_PACKAGES} {SLIM:?}");
    let dir = cache.artifact("systemd-root", &recipe, |out| {
        debootstrap("minbase", SYSTEMD_PACKAGES, &[main_archive()], &out.join("root.tar"), &SLIM)
    })?;
    Ok(dir.join("root.tar"))
}

/// The demo's patch.
#[derive(Debug)]
pub(crate) struct Patch {
    /// The packages as files.
    pub(crate) files: Vec<PathBuf>,
    /// The version in the partition's root.
    pub(crate) from: String,
    /// The version of the files.
    pub(crate) to: String,
}

/// The packages that bring the web server of [`partition_root`] up to date.
pub(crate) fn patch(cache: &Cache) -> Result<Patch> {
    let root = partition_root(cache)?;
    let root = root.parent().context("no directory")?;
    let from = installed_version(&fs::read_to_string(root.join("status"))?, PATCH_PACKAGES[0])?;
    let recipe = format!("2 {PATCH_PACKAGES:?} {}", identity(root)?);
    let dir = cache.artifact("patch", &recipe, |out| {
        let archive = Archive::open(cache)?;
        let to = archive.candidate(PATCH_PACKAGES[0])?;
        if !Tool::new("dpkg").args(["--compare-versions", &to, "gt", &from]).succeeds() {
            bail!(
                "there is no patch: the archive has nginx {to} and the partition's root has {from} already"
            );
        }
        let packages = PATCH_PACKAGES.map(|package| format!("{package}={to}"));
        archive.download(&packages, out)?;
        Ok(fs::write(out.join("version"), to)?)
    })?;
    let to = fs::read_to_string(dir.join("version"))?;
    let mut files: Vec<PathBuf> =
        fs::read_dir(&dir)?.map(|entry| entry.map(|e| e.path())).collect::<std::io::Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|e| e == "deb"));
    files.sort();
    if files.len() == PATCH_PACKAGES.len() {
        Ok(Patch { files, from, to })
    } else {
        bail!("expected {} packages in {}", PATCH_PACKAGES.len(), dir.display())
    }
}

/// Makes an ext4 image of a directory, with some mebibytes of room; it is only ever mounted read-only.
pub(crate) fn make_ext4(tree: &Path, image: &Path, room: u64) -> Result<()> {
    let used = Tool::new("du").args(["-s", "--block-size=1M", "--apparent-size"]).arg(tree).read()?;
    let files = Tool::new("du").args(["-s", "--inodes"]).arg(tree).read()?;
    let [used, files] = [first_number(&used)?, first_number(&files)?];
    fs::File::create(image)?.set_len(image_size(used, files, room) << 20)?;
    // With the small blocks that it chooses by itself, and digests of them, this takes ten times as long.
    let tool = Tool::new("mkfs.ext4").args(["-q", "-F", "-O", "^has_journal,^metadata_csum", "-b", "4096"]);
    tool.args(["-m", "0", "-N"]).arg((files + 64).to_string()).arg("-d").arg(tree).arg(image).quiet()
}

/// Makes an ext4 image of a tar file, with the owners that it names. Another user than root does it as the root of a
/// user namespace of the kind in which mmdebstrap works, where files of the build machine's user are not writable:
/// hence all goes through the script's input and output. Device nodes cannot be made there, and none is missed: the
/// machine mounts a devtmpfs.
fn tar_to_ext4(tar: &Path, image: &Path, room: u64) -> Result<()> {
    const SCRIPT: &str = "set -e; dir=$(mktemp -d); trap 'rm -rf \"$dir\"' EXIT; mkdir \"$dir/tree\"; \
        tar --numeric-owner --exclude='./dev/*' -xpf - -C \"$dir/tree\"; truncate -s \"$1M\" \"$dir/image\"; \
        mkfs.ext4 -q -F -O ^has_journal -m 0 -N \"$2\" -d \"$dir/tree\" \"$dir/image\" >&2; \
        cat \"$dir/image\"";
    let files = Tool::new("tar").arg("-tf").arg(tar).read()?.lines().count() as u64;
    let size = image_size(fs::metadata(tar)?.len() >> 20, files, room);
    let shell = ["sh", "-c", SCRIPT, "sh", &size.to_string(), &(files + 64).to_string()].map(str::to_owned);
    let tool = if rustix::process::geteuid().is_root() {
        Tool::new(&shell[0]).args(&shell[1..])
    } else {
        Tool::new("mmdebstrap").arg("--unshare-helper").args(&shell)
    };
    tool.stdin(fs::File::open(tar)?).stdout(fs::File::create(image)?).quiet()
}

/// Mebibytes for files of `used` mebibytes in all: each has an inode of 256 bytes and a last block that is not full.
fn image_size(used: u64, files: u64, room: u64) -> u64 {
    used + used / 10 + files / 200 + room
}

fn debootstrap(
    variant: &str,
    packages: &str,
    sources: &[String],
    tar: &Path,
    options: &[impl AsRef<std::ffi::OsStr>],
) -> Result<()> {
    let tool = Tool::new("mmdebstrap").args([&format!("--variant={variant}"), "--architectures=amd64"]);
    let tool = tool.arg(format!("--include={packages}")).args(BLANK).args(options);
    tool.arg(SUITE).arg(tar).args(sources).quiet()
}

/// The version of a package in dpkg's database.
fn installed_version(status: &str, package: &str) -> Result<String> {
    let is = |paragraph: &&str| paragraph.lines().next() == Some(&format!("Package: {package}"));
    let paragraph = status.split("\n\n").find(is).with_context(|| format!("{package} is not in the root"))?;
    let version = paragraph.lines().find_map(|line| line.strip_prefix("Version: "));
    version.map(str::to_owned).with_context(|| format!("{package} has no version"))
}

fn first_number(text: &str) -> Result<u64> {
    text.split_whitespace().next().and_then(|word| word.parse().ok()).context("du printed no number")
}

/// The first process of the test machine, built static; made anew when its source changes.
pub(crate) fn guest_init(cache: &Cache) -> Result<PathBuf> {
    let source = crate::paths::root().join("xtask/guest");
    let mut recipe = String::from("1");
    for file in ["Cargo.toml", "src/lib.rs", "src/main.rs", "src/boot.rs", "src/agent.rs"] {
        recipe.push_str(&digest(&source.join(file))?);
    }
    let dir = cache.artifact("guest-init", &recipe, |out| {
        let target = crate::paths::TARGET;
        let tool = build::cargo()?.args(["build", "--quiet", "--workspace", "--bin", "guest-init"]);
        tool.args(["--target", target]).show()?;
        let built = crate::paths::target().join(target).join("debug/guest-init");
        fs::copy(&built, out.join("init")).map(drop).with_context(|| built.display().to_string())
    })?;
    Ok(dir.join("init"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_packages_own() {
        let status =
            "Package: nginx-common\nVersion: 1\n\nPackage: nginx\nStatus: ok\nVersion: 2-3+deb12u9\n";
        assert_eq!(installed_version(status, "nginx").unwrap(), "2-3+deb12u9");
        assert!(installed_version(status, "ngin").is_err());
    }
}
