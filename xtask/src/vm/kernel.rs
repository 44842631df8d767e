//! Stock Debian kernels: from the package to what QEMU boots.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, identity};
use crate::command::Tool;
use crate::debian::Archive;
use crate::vm::cpio;

/// Drivers of the disks and of the agent's port, as far as they are not built in, and the root's file systems.
const BOOT_MODULES: [&str; 5] = ["virtio_pci", "virtio_blk", "virtio_console", "ext4", "overlay"];

/// A series of kernels, such as 6.12.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Series(String);

impl FromStr for Series {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        match text.split_once('.') {
            Some((major, minor)) if number(major) && number(minor) => Ok(Self(text.to_owned())),
            _ => bail!("{text:?} is not a series of kernels such as 6.12"),
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A kernel, ready to boot.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What `uname -r` will say.
    pub(crate) release: String,
    /// The kernel, not compressed: unpacking itself would take it a second under emulation.
    pub(crate) image: PathBuf,
    /// The modules that the initial RAM disk needs, as the beginning of one.
    pub(crate) boot_modules: PathBuf,
    /// An ext4 image of `/usr/lib/modules`.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// The newest kernel of a series when it was first asked for.
    pub(crate) fn prepare(cache: &Cache, series: &Series) -> Result<Self> {
        let package = cache.artifact(&format!("kernel-{series}-deb"), &format!("1 {series}"), |out| {
            let archive = Archive::open(cache)?;
            let package = find_package(&archive, series)?;
            archive.download(&[package], out)
        })?;
        let recipe = format!("1 {} {BOOT_MODULES:?}", identity(&package)?);
        let dir = cache.artifact(&format!("kernel-{series}"), &recipe, |out| convert(&package, out))?;
        let release = fs::read_to_string(dir.join("release"))?;
        let [image, boot_modules, modules] =
            ["vmlinux", "boot-modules.cpio", "modules.ext4"].map(|name| dir.join(name));
        Ok(Self { release, image, boot_modules, modules })
    }
}

/// The package with the kernel that Debian's meta-package of the series names.
fn find_package(archive: &Archive, series: &Series) -> Result<String> {
    let prefix = format!("linux-image-{series}.");
    for meta in [format!("linux-image-{series}-cloud-amd64"), "linux-image-cloud-amd64".to_owned()] {
        let depends = archive.depends(&meta).unwrap_or_default();
        if let Some(package) = depends.into_iter().find(|name| name.starts_with(&prefix)) {
            return Ok(package);
        }
    }
    bail!("Debian's archive has no cloud kernel of the series {series}")
}

fn convert(package: &Path, out: &Path) -> Result<()> {
    let deb = only_file(package, "deb")?;
    let tree = out.join("tree");
    Tool::new("dpkg").arg("-x").arg(&deb).arg(&tree).quiet()?;
    let modules = tree.join("lib/modules");
    let release = only_file(&modules, "")?.file_name().context("no release")?.to_string_lossy().into_owned();
    let compressed = fs::read(tree.join(format!("boot/vmlinuz-{release}")))?;
    fs::write(out.join("vmlinux"), unpack_kernel(&compressed, out)?)?;
    unpack_modules(&modules.join(&release))?;
    Tool::new("depmod").arg("-b").arg(&tree).arg(&release).quiet()?;
    fs::write(out.join("boot-modules.cpio"), boot_modules(&modules.join(&release))?)?;
    super::image::make_ext4(&modules, &out.join("modules.ext4"), 16)?;
    fs::write(out.join("release"), &release)?;
    fs::remove_dir_all(&tree)?;
    Ok(())
}

fn only_file(dir: &Path, extension: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))? {
        let path = entry?.path();
        if extension.is_empty() || path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some(path), true) => Ok(path),
        _ => bail!("expected one file in {}", dir.display()),
    }
}

/// Takes the ELF kernel out of a bzImage; see Documentation/arch/x86/boot.rst for the header.
fn unpack_kernel(image: &[u8], scratch: &Path) -> Result<Vec<u8>> {
    let payload = kernel_payload(image)?;
    let tool = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        [0xfd, b'7', b'z', b'X', ..] => "xz",
        [0x1f, 0x8b, ..] => "gzip",
        _ => bail!("the kernel is packed in an unknown way"),
    };
    let (packed, unpacked) = (scratch.join("packed"), scratch.join("unpacked"));
    fs::write(&packed, payload)?;
    let input = fs::File::open(&packed)?;
    let output = fs::File::create(&unpacked)?;
    Tool::new(tool).arg("-dc").stdin(input).stdout(output).quiet()?;
    let kernel = fs::read(&unpacked)?;
    fs::remove_file(&packed)?;
    fs::remove_file(&unpacked)?;
    if kernel.starts_with(b"\x7fELF") { Ok(kernel) } else { bail!("the unpacked kernel is not an ELF file") }
}

/// The compressed kernel inside a bzImage, without the four bytes of its size that follow it.
fn kernel_payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| -> Result<usize> {
        let bytes =
            image.get(at..at + 4).and_then(|b| b.try_into().ok()).context("the kernel is too short")?;
        Ok(u32::from_le_bytes(bytes) as usize)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        bail!("the kernel has no boot header");
    }
    let setup_sectors = usize::from(image[0x1f1]);
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let length = word(0x24c)?.checked_sub(4).context("the kernel is empty")?;
    image.get(start..start + length).context("the kernel is cut off")
}

/// Debian 12 packs the modules of its backported kernels; unpacking them at each load costs emulated time.
fn unpack_modules(dir: &Path) -> Result<()> {
    let packed = Tool::new("find").arg(dir).args(["-name", "*.ko.xz"]).read()?;
    let files: Vec<&str> = packed.lines().collect();
    for group in files.chunks(200) {
        Tool::new("xz").args(["-d", "-T0"]).args(group).quiet()?;
    }
    Ok(())
}

/// A RAM disk with the modules that are needed before there is a root, each after those that it needs.
fn boot_modules(dir: &Path) -> Result<Vec<u8>> {
    let dependencies = fs::read_to_string(dir.join("modules.dep"))?;
    let builtin = fs::read_to_string(dir.join("modules.builtin"))?;
    let mut order = Vec::new();
    for name in BOOT_MODULES {
        order.extend(load_order(name, &dependencies, &builtin)?);
    }
    let mut archive = cpio::Archive::default();
    archive.dir("boot");
    let mut seen = std::collections::BTreeSet::new();
    for file in order {
        if seen.insert(file) {
            let name = Path::new(file).file_name().context("no name")?.to_string_lossy();
            archive.file(&format!("boot/{:02}-{name}", seen.len()), &fs::read(dir.join(file))?, 0o644);
        }
    }
    Ok(archive.finish())
}

/// The files to load for a module, by depmod's table (`file: dependency dependency`, the nearest first).
fn load_order<'a>(name: &str, dependencies: &'a str, builtin: &str) -> Result<Vec<&'a str>> {
    let is = |file: &str| {
        let stem = file.rsplit('/').next().unwrap_or(file).split('.').next().unwrap_or_default();
        stem.replace('-', "_") == name
    };
    if builtin.lines().any(is) {
        return Ok(Vec::new());
    }
    let line = dependencies.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| is(file));
    let (file, needs) = line.with_context(|| format!("the kernel has no module {name}"))?;
    Ok(needs.split_whitespace().rev().chain([file]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_those_they_need() {
        let table =
            "kernel/a/virtio-blk.ko: kernel/v/virtio_ring.ko kernel/v/virtio.ko\nkernel/v/virtio.ko:\n";
        let order = load_order("virtio_blk", table, "").unwrap();
        assert_eq!(order, ["kernel/v/virtio.ko", "kernel/v/virtio_ring.ko", "kernel/a/virtio-blk.ko"]);
        assert!(load_order("ext4", table, "kernel/fs/ext4/ext4.ko\n").unwrap().is_empty());
        assert!(load_order("nothing", table, "").is_err());
    }

    #[test]
    fn the_payload_is_found_by_the_header() {
        let mut image = vec![0_u8; 4096];
        assert!(kernel_payload(&image).is_err());
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 3;
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&12_u32.to_le_bytes());
        image[2064..2072].copy_from_slice(b"payload!");
        assert_eq!(kernel_payload(&image).unwrap(), b"payload!");
        image.truncate(2070);
        assert!(kernel_payload(&image).is_err());
    }

    #[test]
    fn a_series_is_two_numbers() {
        for bad in ["", "6", "6.", ".1", "6.1.2", "six.one", "6.1/.."] {
            assert!(bad.parse::<Series>().is_err(), "{bad}");
        }
        assert_eq!("6.12".parse::<Series>().unwrap().to_string(), "6.12");
    }
}
