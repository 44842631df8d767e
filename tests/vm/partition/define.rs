//! A disk gets its root: from an archive, a directory, an image.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use patchswitch::host::linux::filesystem::Kind;
use patchswitch::host::linux::mountns::MountNamespace;
use patchswitch::partition::define;
use patchswitch_tests::programs::run;

struct Target {
    dir: PathBuf,
    device: String,
    mounts: MountNamespace,
    root: PathBuf,
}

impl Target {
    fn new() -> Self {
        let dir = super::lab::scratch("define");
        let image = dir.join("disk.img");
        fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let device =
            run(&["losetup", "--find", "--show", image.to_str().unwrap()]).unwrap().trim().to_owned();
        let mounts = MountNamespace::open(&dir.join("mnt")).unwrap();
        let root = dir.join("root");
        Self { dir, device, mounts, root }
    }

    fn empty(self) -> Self {
        define::make_file_system(Kind::Ext4, Path::new(&self.device)).unwrap();
        self.mount()
    }

    fn mount(self) -> Self {
        self.mounts.run(|inside| inside.mount(Path::new(&self.device), &self.root, false)).unwrap().unwrap();
        self
    }

    fn inside<T: Send>(&self, look: impl FnOnce(&Path) -> T + Send) -> T {
        self.mounts.run(|_| look(&self.root)).unwrap()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        drop(self.mounts.run(|inside| inside.unmount(&self.root)));
        drop(MountNamespace::remove(&self.dir.join("mnt")));
        drop(run(&["losetup", "--detach", &self.device]));
        drop(fs::remove_dir_all(&self.dir));
    }
}

/// A tree with everything that a copy can lose. It lies where the agent's namespace does not look: in `/tmp`.
fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    for sub in ["etc", "usr/bin", "dev", "proc", "sys", "run"] {
        fs::create_dir_all(at(sub)).unwrap();
    }
    fs::write(at("etc/passwd"), "root\n").unwrap();
    fs::write(at("usr/bin/su"), "program").unwrap();
    fs::set_permissions(at("usr/bin/su"), fs::Permissions::from_mode(0o4755)).unwrap();
    std::os::unix::fs::chown(at("etc/passwd"), Some(33), Some(44)).unwrap();
    fs::hard_link(at("etc/passwd"), at("etc/passwd-")).unwrap();
    symlink("/etc/passwd", at("etc/absolute")).unwrap();
    symlink("usr/bin", at("bin")).unwrap();
    fs::write(at("run/state"), "of the original's run").unwrap();
    let sparse = fs::File::create(at("sparse")).unwrap();
    sparse.set_len(30 << 20).unwrap();
    dir
}

fn check(root: &Path) {
    let meta = |path: &str| fs::symlink_metadata(root.join(path)).unwrap();
    assert_eq!((meta("etc/passwd").uid(), meta("etc/passwd").gid()), (33, 44));
    assert_eq!(meta("etc/passwd").ino(), meta("etc/passwd-").ino(), "hard links stay");
    assert_eq!(meta("usr/bin/su").mode() & 0o7777, 0o4755);
    assert_eq!(fs::read_link(root.join("etc/absolute")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(fs::read_link(root.join("bin")).unwrap(), Path::new("usr/bin"));
    assert_eq!(meta("sparse").len(), 30 << 20);
    assert!(meta("run").is_dir() && !root.join("run/state").exists(), "/run is not copied");
}

#[test]
fn a_directory_becomes_a_root_and_gets_what_it_needs() {
    let tree = tree();
    let target = Target::new().empty();
    define::copy_tree(&target.mounts, tree.path(), &target.root).unwrap();
    target.inside(check);
    define::prepare(&target.mounts, &target.root).unwrap();
    target.inside(|root| {
        let init = fs::metadata(root.join("usr/lib/patchswitch/init")).unwrap();
        assert_eq!((init.mode() & 0o7777, init.uid()), (0o755, 0));
        assert!(
            root.join("etc/patchswitch/start.d").is_dir()
                && root.join("var/lib/patchswitch/patches").is_dir()
        );
    });
}

#[test]
fn an_archive_becomes_a_root_compressed_or_not() {
    let tree = tree();
    for option in [None, Some("--gzip")] {
        let archive = tree.path().with_extension("tar");
        let mut command = vec!["tar", "--create", "--file", archive.to_str().unwrap(), "--directory"];
        command.push(tree.path().to_str().unwrap());
        command.extend(option);
        command.push(".");
        run(&command).unwrap();
        let target = Target::new().empty();
        define::unpack(&target.mounts, &archive, &target.root).unwrap();
        target.inside(check);
        fs::remove_file(archive).unwrap();
    }
}

#[test]
fn an_image_becomes_a_disk() {
    let tree = tree();
    let image = tree.path().with_extension("img");
    fs::File::create(&image).unwrap().set_len(48 << 20).unwrap();
    run(&["mkfs.ext4", "-q", "-d", tree.path().to_str().unwrap(), image.to_str().unwrap()]).unwrap();
    let target = Target::new();
    define::copy_image(&image, Path::new(&target.device)).unwrap();
    let target = target.mount();
    target.inside(|root| assert_eq!(fs::read_to_string(root.join("etc/passwd")).unwrap(), "root\n"));
    fs::remove_file(image).unwrap();
}

/// One member of a tar archive.
fn member(name: &str, kind: char, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0_u8; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000755\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{:011o}\0", content.len()));
    put(136, "00000000000\0");
    put(148, "        ");
    put(156, &kind.to_string());
    put(157, link);
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut bytes = header.to_vec();
    bytes.extend(content);
    bytes.resize(bytes.len().div_ceil(512) * 512, 0);
    bytes
}

#[test]
fn no_member_of_an_archive_is_written_outside_of_the_root() {
    let outside = super::lab::scratch("define-outside");
    let victim = outside.join("victim");
    let up = format!("{}{}", "../".repeat(12), victim.display().to_string().trim_start_matches('/'));
    let archives = [
        ("..", vec![member(&up, '0', "", b"pwned")]),
        ("an absolute name", vec![member(victim.to_str().unwrap(), '0', "", b"pwned")]),
        (
            "a link and a file through it",
            vec![
                member("evil", '2', outside.to_str().unwrap(), b""),
                member("evil/victim", '0', "", b"pwned"),
            ],
        ),
        (
            "a link, and the same name as a file",
            vec![member("evil", '2', victim.to_str().unwrap(), b""), member("evil", '0', "", b"pwned")],
        ),
        (
            "a hard link to a file of the host",
            vec![member("passwd", '1', "/etc/passwd", b""), member("passwd", '0', "", b"pwned")],
        ),
    ];
    let before = fs::read_to_string("/etc/passwd").unwrap();
    for (what, members) in archives {
        let mut bytes = members.concat();
        bytes.resize(bytes.len() + 1024, 0);
        let archive = std::env::temp_dir().join("evil.tar");
        fs::write(&archive, bytes).unwrap();
        let target = Target::new().empty();
        // Whether it is refused or made harmless is tar's to choose.
        let result = define::unpack(&target.mounts, &archive, &target.root);
        assert!(!victim.exists(), "{what}: written outside ({result:?})");
        assert_eq!(fs::read_to_string("/etc/passwd").unwrap(), before, "{what}: changed a file of the host");
        fs::remove_file(&archive).unwrap();
    }
    fs::remove_dir_all(outside).unwrap();
}

#[test]
fn a_root_with_a_link_where_our_files_go_is_refused_by_name() {
    let target = Target::new().empty();
    target.inside(|root| {
        fs::create_dir_all(root.join("usr")).unwrap();
        symlink("/etc", root.join("usr/lib")).unwrap();
    });
    let error = define::prepare(&target.mounts, &target.root).unwrap_err().to_string();
    assert!(error.contains("usr/lib"), "{error}");
}

#[test]
fn what_is_no_archive_is_an_error_with_tar_s_words() {
    let target = Target::new().empty();
    let noise = std::env::temp_dir().join("noise.tar");
    fs::write(&noise, "this is no archive at all, but long enough to be looked at".repeat(20)).unwrap();
    let error = define::unpack(&target.mounts, &noise, &target.root).unwrap_err();
    assert!(error.to_string().contains("noise.tar: it is not the whole archive"), "{error}");
    let said = std::error::Error::source(&error).unwrap().to_string();
    assert!(said.contains("does not look like a tar archive"), "{said}");
    let missing =
        define::unpack(&target.mounts, Path::new("/no/such.tar"), &target.root).unwrap_err().to_string();
    assert!(missing.contains("failed to open /no/such.tar"), "{missing}");
    fs::remove_file(noise).unwrap();
}
