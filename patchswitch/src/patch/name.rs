//! Names of patch files.

use serde::{Deserialize, Serialize};

/// The longest name, in bytes. With the digest before it, it stays far below what a file system allows.
pub const FILE_NAME_MAX: usize = 128;

/// The name of a patch file, without a directory: letters, digits and `. _ + - ~ : %`, beginning with a letter or a
/// digit, without `..`. That is what package archives use; such a name cannot leave its directory, cannot be taken
/// for an option, and needs no quoting in a shell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileName(String);

/// A text that is not the name of a patch file, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} cannot be the name of a patch: {reason}")]
pub struct BadFileName {
    /// The text.
    pub name: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl FileName {
    /// Checks a text and makes a name of it.
    ///
    /// # Errors
    /// [`BadFileName`] with the reason.
    pub fn new(text: &str) -> Result<Self, BadFileName> {
        match reason(text) {
            None => Ok(Self(text.to_owned())),
            Some(reason) => Err(BadFileName { name: text.to_owned(), reason }),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn reason(text: &str) -> Option<&'static str> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._+-~:%".contains(&b);
    if text.is_empty() {
        Some("it is empty")
    } else if text.len() > FILE_NAME_MAX {
        Some("it is longer than 128 bytes")
    } else if text.contains('/') {
        Some("it has a slash")
    } else if text.contains("..") {
        Some("it has two dots in a row")
    } else if text.contains(char::is_control) {
        Some("it has a control character")
    } else if text.starts_with('.') {
        Some("it begins with a dot")
    } else if !text.bytes().all(allowed) {
        Some("it has a character other than letters, digits and . _ + - ~ : %")
    } else if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        Some("it does not begin with a letter or a digit")
    } else {
        None
    }
}

impl std::fmt::Display for FileName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

impl std::str::FromStr for FileName {
    type Err = BadFileName;

    fn from_str(text: &str) -> Result<Self, BadFileName> {
        Self::new(text)
    }
}

impl TryFrom<String> for FileName {
    type Error = BadFileName;

    fn try_from(text: String) -> Result<Self, BadFileName> {
        Self::new(&text)
    }
}

impl From<FileName> for String {
    fn from(name: FileName) -> Self {
        name.0
    }
}

impl rusqlite::types::ToSql for FileName {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        self.0.to_sql()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_packages_and_scripts_are_accepted() {
        for name in ["nginx_1.22.1-9+deb12u11_amd64.deb", "a", "fix.sh", "perl_5.36.0-7~x_1%3a2:3.deb"] {
            assert_eq!(FileName::new(name).unwrap().as_str(), name);
        }
        assert!(FileName::new(&"a".repeat(FILE_NAME_MAX)).is_ok());
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused_with_the_reason() {
        for (name, reason) in [
            ("", "empty"),
            ("..", "two dots"),
            ("../a", "slash"),
            ("a/b", "slash"),
            ("/etc/passwd", "slash"),
            ("a..b", "two dots"),
            (".hidden", "begins with a dot"),
            ("a\0b", "control"),
            ("a\nb", "control"),
            ("a\u{85}b", "control"),
            ("-i", "does not begin"),
            ("~root", "does not begin"),
            ("a b", "character"),
            ("a;b", "character"),
            ("a$b", "character"),
            ("ä", "character"),
            ("a\\b", "character"),
        ] {
            let error = FileName::new(name).unwrap_err();
            assert!(error.reason.contains(reason), "{error}");
        }
        assert!(FileName::new(&"a".repeat(FILE_NAME_MAX + 1)).unwrap_err().reason.contains("longer"));
    }
}
