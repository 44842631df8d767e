//! The package database of a Debian root: texts, parsed and nothing else (`dpkg(1)`, "FILES").

use std::collections::{BTreeMap, BTreeSet};

/// A package whose files are on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Installed {
    pub(super) name: String,
    pub(super) architecture: String,
    /// Configuration files, which an administrator may change.
    pub(super) conffiles: BTreeSet<String>,
}

/// The packages of `status` that are unpacked or more. Others (`config-files`, `not-installed`) have no files.
pub(super) fn parse_status(text: &str) -> Vec<Installed> {
    text.split("\n\n").filter_map(parse_paragraph).collect()
}

fn parse_paragraph(text: &str) -> Option<Installed> {
    let (mut name, mut architecture, mut state) = (None, None, None);
    let mut conffiles = BTreeSet::new();
    let mut field = "";
    for line in text.lines() {
        if let Some(continued) = line.strip_prefix(' ') {
            if field.eq_ignore_ascii_case("Conffiles") {
                // `/path digest [obsolete]`; the path may have spaces, the digest has none.
                let line = continued.trim_end().trim_end_matches(" obsolete");
                let line = line.trim_end_matches(" remove-on-upgrade");
                conffiles.extend(line.rsplit_once(' ').map(|(path, _digest)| path.to_owned()));
            }
            continue;
        }
        let (key, value) = line.split_once(':')?;
        field = key;
        let value = value.trim();
        match key.to_ascii_lowercase().as_str() {
            "package" => name = Some(value),
            "architecture" => architecture = Some(value),
            "status" => state = value.split(' ').next_back(),
            _ => {}
        }
    }
    let unpacked = ["installed", "unpacked", "half-configured", "triggers-awaited", "triggers-pending"];
    let (name, state) = (name?, state?);
    if !unpacked.contains(&state) || !is_plain(name) {
        return None;
    }
    let architecture = architecture.filter(|text| is_plain(text)).unwrap_or_default().to_owned();
    Some(Installed { name: name.to_owned(), architecture, conffiles })
}

/// Package and architecture become parts of a path.
fn is_plain(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)) && text != ".."
}

/// The lines of `md5sums`: digest and path, the path without a leading slash. A line of another form is returned as
/// an error, to be counted.
pub(super) fn parse_md5sums(text: &str) -> Vec<Result<(&str, &str), &str>> {
    let parse = |line| -> Option<(&str, &str)> {
        let (digest, path) = <str>::split_once(line, "  ")?;
        let hex = digest.len() == 32 && digest.bytes().all(|b| b.is_ascii_hexdigit());
        (hex && !path.is_empty()).then_some((digest, path))
    };
    text.lines().filter(|line| !line.is_empty()).map(|line| parse(line).ok_or(line)).collect()
}

/// Files that a package has under another name because another one diverted it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Diversions(BTreeMap<String, (String, String)>);

impl Diversions {
    /// The lines of `diversions` in threes: the file, its other name, the package that diverts it (`:` for the
    /// administrator).
    pub(super) fn parse(text: &str) -> Self {
        let lines: Vec<&str> = text.lines().collect();
        let entry = |three: &[&str]| match three {
            [file, other, by] => Some(((*file).to_owned(), ((*other).to_owned(), (*by).to_owned()))),
            _ => None,
        };
        Self(lines.chunks(3).filter_map(entry).collect())
    }

    /// Where this package's file is, by its absolute path.
    pub(super) fn place<'a>(&'a self, path: &'a str, package: &str) -> &'a str {
        match self.0.get(path) {
            Some((other, by)) if by != package => other,
            _ => path,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "\
Package: nginx
Status: install ok installed
Architecture: amd64
Conffiles:
 /etc/nginx/nginx.conf 1234
 /etc/with space.conf 1234 obsolete
Description: server
 Conffiles: not this
 .

Package: gone
Status: deinstall ok config-files
Architecture: amd64

Package: ../../etc
Status: install ok installed
Architecture: all

Package: half
Status: install ok half-configured

";

    #[test]
    fn packages_with_files_and_their_configuration_are_found() {
        let found = parse_status(STATUS);
        let names: Vec<_> = found.iter().map(|p| (p.name.as_str(), p.architecture.as_str())).collect();
        assert_eq!(names, [("nginx", "amd64"), ("half", "")]);
        let conffiles: Vec<_> = found[0].conffiles.iter().map(String::as_str).collect();
        assert_eq!(conffiles, ["/etc/nginx/nginx.conf", "/etc/with space.conf"]);
    }

    #[test]
    fn digests_and_paths_are_split_at_two_spaces() {
        let digest = "0123456789abcdef0123456789abcdef";
        let text = format!("{digest}  usr/bin/a b\nnonsense\n{digest} usr/bin/c\n");
        let parsed = parse_md5sums(&text);
        assert_eq!(parsed[0], Ok((digest, "usr/bin/a b")));
        assert!(parsed[1].is_err() && parsed[2].is_err());
    }

    #[test]
    fn a_diverted_file_is_elsewhere_for_everybody_but_the_one_who_diverts() {
        let text = "/bin/sh\n/bin/sh.distrib\ndash\n/usr/bin/x\n/usr/bin/x.real\n:\n";
        let diversions = Diversions::parse(text);
        assert_eq!(diversions.place("/bin/sh", "bash"), "/bin/sh.distrib");
        assert_eq!(diversions.place("/bin/sh", "dash"), "/bin/sh");
        assert_eq!(diversions.place("/usr/bin/x", "any"), "/usr/bin/x.real");
        assert_eq!(diversions.place("/usr/bin/y", "any"), "/usr/bin/y");
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_a_panic(text in "(?s).{0,200}") {
            let _ = (parse_status(&text), parse_md5sums(&text), Diversions::parse(&text));
        }
    }
}
