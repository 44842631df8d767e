//! Where in a file something stands, for error messages.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A position in a configuration file. Lines and columns begin at 1; a column is a character, not a byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    file: Arc<str>,
    line: usize,
    column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// A file's name and text, to turn byte offsets into places.
#[derive(Clone, Debug)]
pub(super) struct Source {
    file: Arc<str>,
    text: Arc<str>,
}

impl Source {
    pub(super) fn new(file: &str, text: &str) -> Self {
        Self { file: file.into(), text: text.into() }
    }

    /// The place at which a span of bytes begins; the end of the file for a span outside it.
    pub(super) fn place(&self, span: Range<usize>) -> Place {
        let mut start = span.start.min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let before = self.text.get(..start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Place { file: Arc::clone(&self.file), line, column }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_columns_count_characters_from_one() {
        let source = Source::new("f.toml", "a\näb = 1\n");
        let text = |at: usize| source.place(at..at).to_string();
        assert_eq!(text(0), "f.toml:1:1");
        assert_eq!(text(2), "f.toml:2:1");
        assert_eq!(text(3), "f.toml:2:1", "inside a character");
        assert_eq!(text(4), "f.toml:2:2");
        assert_eq!(text(99), "f.toml:3:1");
    }
}
