//! Adding patches: what is refused, what collapses, what is noticed afterwards.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;
use crate::host::linux::programs::Program;
use crate::names::Name;

struct Host {
    dir: tempfile::TempDir,
    store: Store,
    who: Who,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("state")).unwrap();
        Self { store, who: Who { name: "root".to_owned(), how: "test".to_owned() }, dir }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn add(&mut self, path: &Path, types: &str, approve: bool) -> Result<Added, TableError> {
        let wish = Wish { types: types.parse().unwrap(), issued_at: None, approve, who: &self.who };
        let state = self.dir.path().join("state");
        add(&mut self.store, &state, &[path.to_owned()], &wish).map(|mut added| added.remove(0))
    }

    fn stored(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.state().join(FOLDER)).map(Iterator::collect).unwrap_or_default();
        let entries: Vec<io::Result<std::fs::DirEntry>> = entries;
        entries.into_iter().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[test]
fn a_script_is_copied_and_can_be_read_after_its_original_has_gone() {
    let mut host = Host::new();
    let path = host.file("fix.sh", "#!/bin/sh\nexit 0\n");
    let added = host.add(&path, "bugfix", true).unwrap();
    assert_eq!(added.change, Change::Changed);
    let patch = added.patch;
    assert_eq!((patch.driver, patch.decision, patch.size), (Driver::Script, Decision::Approved, 17));
    assert_eq!(patch.source, path.to_string_lossy());
    assert_eq!(host.stored(), [format!("{}-fix.sh", patch.sha256)]);
    let mode = std::fs::metadata(host.state().join(FOLDER)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    std::fs::remove_file(path).unwrap();
    let mut copy = Vec::new();
    copy_stored(&host.state(), &patch, &mut copy).unwrap();
    assert_eq!(copy, b"#!/bin/sh\nexit 0\n");
}

#[test]
fn the_same_content_is_one_patch_with_one_file() {
    let mut host = Host::new();
    let (one, two) = (host.file("one.sh", "#!same"), host.file("two.sh", "#!same"));
    let first = host.add(&one, "security", false).unwrap();
    assert_eq!(host.add(&two, "security", false).unwrap().change, Change::AlreadySo);
    let again = host.add(&two, "bugfix", true).unwrap();
    assert_eq!((again.change, again.patch.id), (Change::Changed, first.patch.id));
    assert_eq!(again.patch.types.to_string(), "security,bugfix");
    assert_eq!(host.stored(), [format!("{}-one.sh", first.patch.sha256)]);
}

#[test]
fn a_stored_file_that_changed_is_noticed_and_adding_it_again_repairs_it() {
    let mut host = Host::new();
    let path = host.file("fix.sh", "#!/bin/sh\n");
    let patch = host.add(&path, "bugfix", true).unwrap().patch;
    verify(&host.state(), &patch).unwrap();
    let stored = host.state().join(FOLDER).join(stored_name(&patch.sha256, &patch.file));
    type Damage = fn(&Path);
    let cases: [(Damage, &str); 5] = [
        (|path| std::fs::write(path, "#!/bin/zz\n").unwrap(), "has the SHA-256"),
        (|path| std::fs::write(path, "#!/bin/sh\nrm -rf /\n").unwrap(), "larger than 10 bytes"),
        (|path| std::fs::write(path, "").unwrap(), "has the SHA-256"),
        (|path| std::fs::remove_file(path).unwrap(), "is gone"),
        (
            |path| {
                let _ = std::fs::remove_file(path);
                symlink("/etc/passwd", path).unwrap();
            },
            "is a link",
        ),
    ];
    for (damage, words) in cases {
        damage(&stored);
        let error = verify(&host.state(), &patch).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(words) && text.contains("has changed since it was added"), "{text}");
        assert_eq!(error.exit_code(), ExitCode::BadData);
        let _ = host.add(&path, "bugfix", true).unwrap();
        verify(&host.state(), &patch).unwrap();
    }
}

#[test]
fn what_is_no_patch_is_refused_and_leaves_nothing() {
    let mut host = Host::new();
    let script = host.file("real.sh", "#!/bin/sh\n");
    symlink(&script, host.dir.path().join("link.sh")).unwrap();
    let pipe = host.dir.path().join("pipe.sh");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    std::fs::create_dir(host.dir.path().join("dir.sh")).unwrap();
    let cases = [
        (host.file("empty", ""), "neither a Debian package nor a script"),
        (host.file("elf", "\u{7f}ELF"), "neither a Debian package nor a script"),
        (host.dir.path().join("link.sh"), "symbolic link"),
        (pipe, "not a regular file"),
        (host.dir.path().join("dir.sh"), "not a regular file"),
        (host.dir.path().join("none.sh"), "failed to open"),
        (host.file("a b.sh", "#!x"), "other than letters"),
        (host.file(".hidden.sh", "#!x"), "begins with a dot"),
        (host.file("a..sh", "#!x"), "two dots"),
        (host.dir.path().join(".."), "two dots"),
        (PathBuf::from("/"), "slash"),
    ];
    for (path, words) in cases {
        let error = host.add(&path, "bugfix", true).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    assert_eq!(host.stored(), [""; 0]);
    assert_eq!(host.store.patches().unwrap(), []);
}

#[test]
fn a_package_is_read_by_dpkg_deb_where_there_is_one() {
    let mut host = Host::new();
    let broken = host.file("broken.deb", "!<arch>\ndebian-binary and then nothing");
    match (host.add(&broken, "security", false), Program::DpkgDeb.find()) {
        (Err(error @ TableError::Package { .. }), Some(_)) => {
            assert_eq!(error.exit_code(), ExitCode::BadData);
            assert_eq!(host.stored(), [""; 0]);
        }
        (Ok(added), None) => assert_eq!((added.patch.driver, added.patch.package), (Driver::Deb, None)),
        other => panic!("{other:?}"),
    }
}

/// A member of an `ar` archive (`deb(5)`).
fn member(name: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes =
        format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100_644, content.len()).into_bytes();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(2), b'\n');
    bytes
}

/// A tar archive with one file (POSIX `ustar`).
fn tar(name: &str, content: &[u8]) -> Vec<u8> {
    let mut head = vec![0_u8; 512];
    let mut put = |at: usize, text: &str| head[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000644\x000000000\x000000000\0");
    put(124, &format!("{:011o}\x0000000000000\0        0", content.len()));
    put(257, "ustar\x0000");
    let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    head.extend_from_slice(content);
    head.resize(head.len().next_multiple_of(512) + 1024, 0);
    head
}

#[test]
fn a_package_says_what_it_is() {
    let mut host = Host::new();
    let control = "Package: nginx\nVersion: 1.22.1-9+deb12u11\nArchitecture: all\nMaintainer: x <x@example.org>\n\
                   Description: none\n";
    let archive = [
        b"!<arch>\n".to_vec(),
        member("debian-binary", b"2.0\n"),
        member("control.tar", &tar("./control", control.as_bytes())),
        member("data.tar", &[0; 1024]),
    ];
    let path = host.dir.path().join("nginx_1.22.1-9+deb12u11_all.deb");
    std::fs::write(&path, archive.concat()).unwrap();
    let patch = host.add(&path, "security", true).unwrap().patch;
    assert_eq!(patch.driver, Driver::Deb);
    let said =
        patch.package.map(|package| format!("{} {} {}", package.name, package.version, package.architecture));
    let expected = Program::DpkgDeb.find().map(|_| "nginx 1.22.1-9+deb12u11 all".to_owned());
    assert_eq!(said, expected);
}

#[test]
fn one_bad_name_among_several_adds_none() {
    let mut host = Host::new();
    let files = [host.file("good.sh", "#!x"), host.file("bad name", "#!x")];
    let wish =
        Wish { types: "bugfix".parse().unwrap(), issued_at: None, approve: true, who: &host.who.clone() };
    let state = host.state();
    assert!(matches!(add(&mut host.store, &state, &files, &wish), Err(TableError::Name(_))));
    assert_eq!(host.store.patches().unwrap(), []);
}

#[test]
fn only_approved_patches_are_selected() {
    let mut host = Host::new();
    let web = Name::new("web").unwrap();
    let (yes, no) = (host.file("yes.sh", "#!yes"), host.file("no.sh", "#!no"));
    let yes = host.add(&yes, "bugfix", true).unwrap().patch;
    let no = host.add(&no, "bugfix", false).unwrap().patch;
    let names = |patches: Vec<Patch>| patches.into_iter().map(|patch| patch.id).collect::<Vec<_>>();
    assert_eq!(names(select(&host.store, &web, &[]).unwrap()), [yes.id]);
    let twice = ["yes.sh".to_owned(), yes.id.to_string()];
    assert_eq!(names(select(&host.store, &web, &twice).unwrap()), [yes.id]);
    for decision in [Decision::Pending, Decision::Rejected, Decision::Held, Decision::Superseded] {
        let _ = host.store.decide(no.id, decision, &host.who).unwrap();
        let error = select(&host.store, &web, &["no.sh".to_owned()]).unwrap_err();
        assert!(error.to_string().contains(&format!("(no.sh) is {decision}; run")), "{error}");
    }
}

#[test]
fn a_half_copied_file_is_swept() {
    let mut host = Host::new();
    assert_eq!(sweep(&host.state()).unwrap(), Change::AlreadySo);
    let path = host.file("fix.sh", "#!/bin/sh\n");
    let patch = host.add(&path, "bugfix", true).unwrap().patch;
    let copying = Unfinished::create(&host.state().join(FOLDER)).unwrap();
    assert_eq!(sweep(&host.state()).unwrap(), Change::AlreadySo, "somebody is at it");
    // What a killed process leaves: the file, and no lock.
    fs::write(host.state().join(FOLDER).join(format!("{UNFINISHED}1-0")), "#!/bin").unwrap();
    assert_eq!(host.stored().len(), 3);
    assert_eq!(sweep(&host.state()).unwrap(), Change::Changed);
    assert_eq!(sweep(&host.state()).unwrap(), Change::AlreadySo);
    assert_eq!(host.stored().len(), 2);
    copying.finish(&host.state().join(FOLDER), "done").unwrap();
    verify(&host.state(), &patch).unwrap();
}
