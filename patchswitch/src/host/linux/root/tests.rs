//! Hostile trees. What is outside the root must be the same before and after, whatever the clone holds.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, mknodat};

use super::*;

/// A root next to a directory that must never change.
struct Tree {
    dir: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("root/var/lib")).unwrap();
        std::fs::create_dir_all(dir.path().join("outside/deep")).unwrap();
        std::fs::write(dir.path().join("outside/passwd"), "root:x:0:0\n").unwrap();
        std::fs::write(dir.path().join("outside/result.json"), "secret").unwrap();
        Self { dir }
    }

    fn inside(&self, path: &str) -> PathBuf {
        self.dir.path().join("root").join(path)
    }

    fn outside(&self, path: &str) -> PathBuf {
        self.dir.path().join("outside").join(path)
    }

    fn root(&self) -> Root {
        Root::open(&self.inside("")).unwrap()
    }

    fn state(&self) -> Folder {
        self.root().folder(Place::State, &[], Absent::Create).unwrap()
    }

    /// Every entry outside: path, inode, mode, size, links, time of the last change of the inode, content.
    fn picture(&self) -> BTreeMap<PathBuf, String> {
        let mut picture = BTreeMap::new();
        let mut todo = vec![self.outside("")];
        while let Some(path) = todo.pop() {
            let meta = std::fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_file() { std::fs::read(&path).unwrap() } else { Vec::new() };
            let facts = (meta.ino(), meta.mode(), meta.size(), meta.mtime_nsec(), content);
            picture.insert(path.clone(), format!("{facts:?}"));
            if meta.is_dir() {
                todo.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
        }
        picture
    }
}

fn refusal<T: std::fmt::Debug>(result: Result<T, RootError>) -> (String, Refusal) {
    match result {
        Err(RootError::Refused { path, reason }) => (path, reason),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_file_is_written_with_its_mode_and_read_back() {
    let tree = Tree::new();
    let folder = tree.root().folder(Place::State, &["patches"], Absent::Create).unwrap();
    folder.write("a.deb", 0o640, b"one").unwrap();
    folder.write("a.deb", 0o755, b"two").unwrap();
    assert_eq!(folder.read("a.deb", 3).unwrap(), b"two");
    let meta = std::fs::metadata(tree.inside("var/lib/patchswitch/patches/a.deb")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o755);
    let entries: Vec<_> = std::fs::read_dir(tree.inside("var/lib/patchswitch/patches")).unwrap().collect();
    assert_eq!(entries.len(), 1, "the temporary file is gone");
}

#[test]
fn symbolic_links_on_the_way_are_refused_by_name_and_not_followed() {
    let cases: [(&str, Place, &str); 5] = [
        ("var", Place::State, "var"),
        ("var/lib", Place::State, "var/lib"),
        ("var/lib/patchswitch", Place::State, "var/lib/patchswitch"),
        ("usr/lib/patchswitch", Place::Programs, "usr/lib/patchswitch"),
        ("etc/systemd/system", Place::Units, "etc/systemd/system"),
    ];
    for target in ["outside", "../outside", "/", "/proc/self/root"] {
        for (link, place, named) in cases {
            let tree = Tree::new();
            std::fs::remove_dir_all(tree.inside("var")).unwrap();
            let link = tree.inside(link);
            std::fs::create_dir_all(link.parent().unwrap()).unwrap();
            let target = if target == "outside" { tree.outside("") } else { PathBuf::from(target) };
            symlink(target, link).unwrap();
            let before = tree.picture();
            let refused = refusal(tree.root().folder(place, &["patches"], Absent::Create));
            assert_eq!(refused, (named.to_owned(), Refusal::Symlink));
            assert_eq!(tree.picture(), before);
        }
    }
}

#[test]
fn a_dangling_link_is_not_created_through() {
    let tree = Tree::new();
    symlink(tree.outside("new"), tree.inside("var/lib/patchswitch")).unwrap();
    let refused = refusal(tree.root().folder(Place::State, &[], Absent::Create));
    assert_eq!(refused.1, Refusal::Symlink);
    assert!(!tree.outside("new").exists());
}

#[test]
fn a_file_on_the_way_is_refused() {
    let tree = Tree::new();
    std::fs::write(tree.inside("var/lib/patchswitch"), "").unwrap();
    let refused = refusal(tree.root().folder(Place::State, &["patches"], Absent::Create));
    assert_eq!(refused, ("var/lib/patchswitch".to_owned(), Refusal::NotADirectory));
}

#[test]
fn links_in_place_of_the_target_and_of_the_temporary_file_are_replaced_not_followed() {
    let tree = Tree::new();
    let folder = tree.state();
    symlink(tree.outside("passwd"), tree.inside("var/lib/patchswitch/table.json")).unwrap();
    symlink(tree.outside("passwd"), tree.inside("var/lib/patchswitch").join(temporary("table.json")))
        .unwrap();
    std::fs::hard_link(tree.outside("result.json"), tree.inside("var/lib/patchswitch/hard.json")).unwrap();
    let hard = tree.inside("var/lib/patchswitch").join(temporary("hard.json"));
    std::fs::hard_link(tree.outside("result.json"), hard).unwrap();
    let before = tree.picture();
    folder.write("table.json", 0o644, b"ours").unwrap();
    folder.write("hard.json", 0o644, b"ours").unwrap();
    assert_eq!(tree.picture(), before);
    assert_eq!(folder.read("table.json", 10).unwrap(), b"ours");
    assert_eq!(folder.read("hard.json", 10).unwrap(), b"ours");
}

#[test]
fn directories_in_place_of_files_are_refused() {
    let tree = Tree::new();
    let folder = tree.state();
    std::fs::create_dir_all(tree.inside("var/lib/patchswitch/table.json/x")).unwrap();
    std::fs::create_dir(tree.inside("var/lib/patchswitch").join(temporary("other"))).unwrap();
    assert_eq!(refusal(folder.write("table.json", 0o644, b"")).1, Refusal::IsADirectory);
    assert_eq!(refusal(folder.write("other", 0o644, b"")).1, Refusal::IsADirectory);
    assert_eq!(refusal(folder.symlink("table.json", "x")).1, Refusal::IsADirectory);
    assert_eq!(refusal(folder.remove("table.json")).1, Refusal::IsADirectory);
    assert_eq!(refusal(folder.read("table.json", 10)).1, Refusal::NotAFile(FileType::Directory));
    assert_eq!(refusal(folder.clear()).1, Refusal::IsADirectory);
    let left = tree.inside("var/lib/patchswitch").join(temporary("table.json"));
    assert!(!left.exists(), "a failed write leaves nothing");
}

#[test]
fn what_is_not_a_regular_file_is_not_read_and_nothing_blocks() {
    let tree = Tree::new();
    let folder = tree.state();
    let at = |name: &str| tree.inside("var/lib/patchswitch").join(name);
    mknodat(CWD, at("pipe"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    symlink(tree.outside("passwd"), at("link")).unwrap();
    symlink("/proc/self/fd/0", at("magic")).unwrap();
    let start = Instant::now();
    assert_eq!(refusal(folder.read("pipe", 10)).1, Refusal::NotAFile(FileType::Fifo));
    assert_eq!(refusal(folder.read("socket", 10)).1, Refusal::NotAFile(FileType::Socket));
    assert_eq!(refusal(folder.read("link", 10)).1, Refusal::Symlink);
    assert_eq!(refusal(folder.read("magic", 10)).1, Refusal::Symlink);
    assert!(matches!(folder.read("none", 10), Err(RootError::Missing { .. })));
    // A FIFO as the target of a write is replaced, not opened.
    folder.write("pipe", 0o644, b"ours").unwrap();
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_device_is_not_opened() {
    let folder = Folder { fd: Root::open(Path::new("/dev")).unwrap().fd, path: "dev".to_owned() };
    assert_eq!(refusal(folder.read("zero", 10)).1, Refusal::NotAFile(FileType::CharacterDevice));
}

#[test]
fn a_mount_on_the_way_is_refused() {
    let root = Root::open(Path::new("/")).unwrap();
    let refused = refusal(enter(root.fd.as_fd(), "proc", "proc", Absent::Fail));
    assert_eq!(refused, ("proc".to_owned(), Refusal::OtherFileSystem));
}

#[test]
fn a_file_larger_than_the_limit_is_refused_unread() {
    let tree = Tree::new();
    let folder = tree.state();
    let huge = File::create(tree.inside("var/lib/patchswitch/result.json")).unwrap();
    huge.set_len(1 << 40).unwrap();
    assert_eq!(refusal(folder.read("result.json", 1 << 20)).1, Refusal::TooLarge { limit: 1 << 20 });
}

#[test]
fn names_that_are_not_one_component_are_refused() {
    let tree = Tree::new();
    let folder = tree.state();
    let long = "a".repeat(256);
    let before = tree.picture();
    for name in ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\0b", "a\nb", long.as_str()] {
        assert_eq!(refusal(folder.write(name, 0o644, b"")).1, Refusal::BadName, "{name:?}");
        assert_eq!(refusal(folder.read(name, 1)).1, Refusal::BadName, "{name:?}");
        assert_eq!(refusal(folder.remove(name)).1, Refusal::BadName, "{name:?}");
        assert_eq!(refusal(folder.symlink(name, "x")).1, Refusal::BadName, "{name:?}");
        let below = tree.root().folder(Place::State, &[name], Absent::Create);
        assert_eq!(refusal(below).1, Refusal::BadName, "{name:?}");
    }
    assert_eq!(tree.picture(), before);
}

#[test]
fn a_directory_that_others_may_write_to_is_refused() {
    let tree = Tree::new();
    drop(tree.state());
    let path = tree.inside("var/lib/patchswitch");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
    let refused = refusal(tree.root().folder(Place::State, &[], Absent::Create));
    let owner = rustix::process::geteuid().as_raw();
    assert_eq!(refused, ("var/lib/patchswitch".to_owned(), Refusal::Writable { owner, mode: 0o777 }));
}

#[test]
fn an_abandoned_file_is_gone_and_the_old_one_stays() {
    let tree = Tree::new();
    let folder = tree.state();
    folder.write("table.json", 0o644, b"old").unwrap();
    let mut file = folder.create("table.json").unwrap();
    file.write_all(b"half of a new o").unwrap();
    drop(file);
    assert_eq!(folder.read("table.json", 10).unwrap(), b"old");
    folder.clear().unwrap();
    assert_eq!(std::fs::read_dir(tree.inside("var/lib/patchswitch")).unwrap().count(), 0);
}

#[test]
fn a_link_is_made_and_not_followed() {
    let tree = Tree::new();
    let wants = tree.root().folder(Place::Units, &["multi-user.target.wants"], Absent::Create).unwrap();
    symlink(tree.outside("passwd"), tree.inside("etc/systemd/system/multi-user.target.wants/x.service"))
        .unwrap();
    let before = tree.picture();
    wants.symlink("x.service", "../x.service").unwrap();
    wants.symlink("x.service", "../x.service").unwrap();
    let link = std::fs::read_link(tree.inside("etc/systemd/system/multi-user.target.wants/x.service"));
    assert_eq!(link.unwrap(), Path::new("../x.service"));
    assert_eq!(tree.picture(), before);
}

#[test]
fn a_look_follows_links_inside_the_clone_and_never_out_of_it() {
    let tree = Tree::new();
    let root = tree.root();
    let at = |path: &str| tree.inside(path);
    std::fs::create_dir_all(at("usr/bin")).unwrap();
    std::fs::write(at("usr/bin/tool"), "inside").unwrap();
    symlink("usr/bin", at("bin")).unwrap();
    symlink("/usr/bin", at("absolute")).unwrap();
    symlink(tree.outside(""), at("out")).unwrap();
    symlink("../../../../../../..", at("up")).unwrap();
    symlink(tree.outside("passwd"), at("usr/bin/last")).unwrap();
    symlink("/proc/self/root", at("magic")).unwrap();
    mknodat(CWD, at("pipe"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
    for path in ["usr/bin/tool", "bin/tool", "absolute/tool", "up/usr/bin/tool", "../../bin/tool"] {
        let Look::File(mut file, 6) = root.look(path).unwrap() else { panic!("{path}") };
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
    }
    for path in ["out/passwd", "up/etc/passwd", "none", "usr/bin/tool/x", "magic/etc/passwd"] {
        assert!(matches!(root.look(path).unwrap(), Look::Missing), "{path}");
    }
    assert!(matches!(root.look("usr/bin/last").unwrap(), Look::Other(FileType::Symlink)));
    assert!(matches!(root.look("pipe").unwrap(), Look::Other(FileType::Fifo)));
    assert!(matches!(root.look("usr").unwrap(), Look::Other(FileType::Directory)));
    let host = Root::open(Path::new("/")).unwrap();
    assert_eq!(refusal(host.look("proc/self/stat")).1, Refusal::OtherFileSystem);
}
