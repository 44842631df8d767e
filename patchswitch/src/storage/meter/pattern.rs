//! The files whose loss is declared to be no loss.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

/// A `may_lose` list: what matches may be lost without asking.
///
/// A pattern is an absolute path as seen inside the partition. `*` stands for any part of a name, `?` for one byte of
/// it, `**` as a whole component for any number of components. A pattern covers what it names and everything below.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MayLose {
    patterns: Vec<Vec<Part>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    AnyDepth,
    Name(Vec<u8>),
}

/// A pattern that can match nothing, or everything.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a pattern of files: an absolute path without `.` and `..`, and not the root")]
pub struct BadPattern(pub String);

impl MayLose {
    /// Reads a list of patterns.
    ///
    /// # Errors
    /// [`BadPattern`] names the first that is none.
    pub fn parse<'t>(patterns: impl IntoIterator<Item = &'t str>) -> Result<Self, BadPattern> {
        let patterns =
            patterns.into_iter().map(|text| parse(text).ok_or_else(|| BadPattern(text.to_owned())));
        Ok(Self { patterns: patterns.collect::<Result<_, _>>()? })
    }

    /// Whether a file may be lost.
    pub fn covers(&self, path: &Path) -> bool {
        self.patterns.iter().any(|pattern| walk(pattern, path).covered)
    }

    /// Whether a change of a directory is explained by files in it that may be lost: one of the patterns reaches
    /// something directly in it.
    pub fn covers_entries_of(&self, folder: &Path) -> bool {
        self.patterns.iter().any(|pattern| {
            let walk = walk(pattern, folder);
            walk.covered || walk.one_name_short
        })
    }
}

fn parse(text: &str) -> Option<Vec<Part>> {
    let rest = text.strip_prefix('/')?;
    let parts: Option<Vec<Part>> = rest
        .split('/')
        .filter(|part| !part.is_empty())
        .map(|part| match part {
            "." | ".." => None,
            "**" => Some(Part::AnyDepth),
            name => Some(Part::Name(name.as_bytes().to_vec())),
        })
        .collect();
    // "/" and "/**" would declare that everything may be lost; that is said with `--discard-writes`.
    parts.filter(|parts| parts.iter().any(|part| *part != Part::AnyDepth))
}

struct Walk {
    covered: bool,
    one_name_short: bool,
}

/// Goes through pattern and path side by side. `at` holds every place in the pattern that the path may have reached,
/// so the time is at most the product of both lengths, however many `**` there are.
fn walk(pattern: &[Part], path: &Path) -> Walk {
    let mut at = vec![false; pattern.len() + 1];
    reach(pattern, &mut at, 0);
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.as_bytes()),
        _ => None,
    });
    for name in names {
        if at.last() == Some(&true) {
            break; // everything below is covered
        }
        let mut next = vec![false; pattern.len() + 1];
        for (place, part) in pattern.iter().enumerate().filter(|(place, _)| at[*place]) {
            match part {
                Part::AnyDepth => reach(pattern, &mut next, place),
                Part::Name(wanted) if name_matches(wanted, name) => reach(pattern, &mut next, place + 1),
                Part::Name(_) => {}
            }
        }
        at = next;
    }
    let before_last = pattern.len().checked_sub(1).is_some_and(|place| at[place]);
    Walk { covered: at[pattern.len()], one_name_short: before_last }
}

/// Marks a place, and the places behind `**`, which may stand for nothing.
fn reach(pattern: &[Part], at: &mut [bool], mut place: usize) {
    at[place] = true;
    while pattern.get(place) == Some(&Part::AnyDepth) {
        place += 1;
        at[place] = true;
    }
}

/// `*` and `?` in one name. On a mismatch only the last `*` has to give: it takes one byte more.
fn name_matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((after, taken)) = star else { return false };
                star = Some((after, taken + 1));
                p = after;
                n = taken + 1;
            }
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn covers(pattern: &str, path: &str) -> bool {
        MayLose::parse([pattern]).unwrap().covers(Path::new(path))
    }

    #[test]
    fn patterns_cover_what_they_name_and_everything_below() {
        for (pattern, path, expected) in [
            ("/var/log", "/var/log", true),
            ("/var/log/", "/var/log/nginx/access.log", true),
            ("/var/log", "/var/logs", false),
            ("/var/log", "/var", false),
            ("/var/log/*.log", "/var/log/a.log", true),
            ("/var/log/*.log", "/var/log/a.log.1", false),
            ("/var/log/*.log", "/var/log/nginx/a.log", false),
            ("/var/**/*.log", "/var/log/nginx/a.log", true),
            ("/var/**/*.log", "/var/a.log", true),
            ("/**/cache", "/usr/a/b/cache/file", true),
            ("/**/cache", "/usr/a/b/caches", false),
            ("/tmp/?", "/tmp/a", true),
            ("/tmp/?", "/tmp/ab", false),
            ("/tmp/*a*b*", "/tmp/xxaxxbxx", true),
            ("/tmp/*a*b*", "/tmp/xxbxxaxx", false),
            ("/a/**/b/**/c", "/a/b/b/x/c", true),
            ("/a/**/b/**/c", "/a/x/c/b", false),
            ("/tmp/*", "/tmp", false),
        ] {
            assert_eq!(covers(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn a_folder_is_explained_by_patterns_that_reach_into_it() {
        let list = MayLose::parse(["/var/log/*.log", "/run"]).unwrap();
        for (folder, expected) in [
            ("/var/log", true),
            ("/var", false),
            ("/var/log/nginx", false),
            ("/", true), // "/run" itself may have come or gone
            ("/run/lock", true),
            ("/etc", false),
        ] {
            assert_eq!(list.covers_entries_of(Path::new(folder)), expected, "{folder}");
        }
    }

    #[test]
    fn patterns_that_say_nothing_or_everything_are_refused() {
        for bad in ["", "var/log", "/", "//", "/**", "/**/**", "/var/../etc", "/./x"] {
            assert_eq!(MayLose::parse(["/ok", bad]), Err(BadPattern(bad.to_owned())), "{bad:?}");
        }
        assert!(!MayLose::default().covers(Path::new("/x")));
    }

    /// The same by trying everything.
    fn slow(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), _) => {
                slow(rest, name) || name.split_first().is_some_and(|(_, shorter)| slow(pattern, shorter))
            }
            (Some((&p, rest)), Some((&n, shorter))) => (p == b'?' || p == n) && slow(rest, shorter),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn names_match_as_if_everything_were_tried(pattern in "[ab*?]{0,8}", name in "[ab]{0,8}") {
            prop_assert_eq!(
                name_matches(pattern.as_bytes(), name.as_bytes()),
                slow(pattern.as_bytes(), name.as_bytes())
            );
        }

        #[test]
        fn what_is_below_a_covered_path_is_covered(pattern in "(/([ab*]{1,2}|\\*\\*)){1,5}", path in "(/[ab]{1,2}){0,6}") {
            if let Ok(list) = MayLose::parse([pattern.as_str()]) {
                let path = Path::new(&path);
                if list.covers(path) {
                    prop_assert!(list.covers(&path.join("below")));
                }
                prop_assert_eq!(list.covers(path) && !list.covers_entries_of(path), false);
            }
        }
    }
}
