//! Values that are texts of a form of their own.

use std::fmt;

use serde::Deserializer;
use serde::de::{Error, Visitor};

/// Reads a text and parses it *inside* the deserializer, which so knows the place of a bad one even in a list;
/// `#[serde(try_from)]` would report the list.
pub(super) fn parsed<'de, D, T, E>(
    deserializer: D,
    expected: &'static str,
    parse: fn(&str) -> Result<T, E>,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    E: fmt::Display,
{
    struct Text<T, E> {
        expected: &'static str,
        parse: fn(&str) -> Result<T, E>,
    }

    impl<T, E: fmt::Display> Visitor<'_> for Text<T, E> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.expected)
        }

        fn visit_str<X: Error>(self, text: &str) -> Result<T, X> {
            (self.parse)(text).map_err(X::custom)
        }
    }

    deserializer.deserialize_str(Text { expected, parse })
}
