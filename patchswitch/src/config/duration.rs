//! Lengths of time as text: `500ms`, `30s`, `2m`, `1h30m`, `1d`.
//!
//! A bare number is refused: whoever reads the file must not have to know the unit.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest length of time that is accepted: ten years. Deadlines are sums, and sums must not overflow.
pub const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);

const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A text that is not a length of time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadDuration {
    /// Not numbers followed by units.
    #[error("{0:?} is not a length of time: write it like \"500ms\", \"30s\", \"2m\" or \"1h30m\"")]
    Form(String),
    /// A unit is missing.
    #[error("{0:?} lacks a unit: ms, s, m, h or d")]
    Unit(String),
    /// The units do not get smaller.
    #[error("{0:?} has its units in the wrong order: the larger ones come first, each at most once")]
    Order(String),
    /// More than [`LONGEST`].
    #[error("{0:?} is longer than ten years")]
    Long(String),
}

/// Parses a length of time.
///
/// # Errors
/// [`BadDuration`], which quotes the text and says how to write it.
pub fn parse(text: &str) -> Result<Duration, BadDuration> {
    let form = || BadDuration::Form(text.to_owned());
    let long = || BadDuration::Long(text.to_owned());
    let mut rest = text;
    let mut total: u64 = 0;
    let mut last = u64::MAX;
    if rest.is_empty() {
        return Err(form());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        let letters = after.bytes().take_while(u8::is_ascii_lowercase).count();
        let (unit, after) = after.split_at(letters);
        if number.is_empty() {
            return Err(form());
        }
        if unit.is_empty() && after.is_empty() {
            return Err(BadDuration::Unit(text.to_owned()));
        }
        let size = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, size)| *size).ok_or_else(form)?;
        if size >= last {
            return Err(BadDuration::Order(text.to_owned()));
        }
        let number: u64 = number.parse().map_err(|_too_large| long())?;
        total = number.checked_mul(size).and_then(|part| total.checked_add(part)).ok_or_else(long)?;
        last = size;
        rest = after;
    }
    let duration = Duration::from_millis(total);
    if duration > LONGEST { Err(long()) } else { Ok(duration) }
}

/// Writes a length of time so that [`parse`] reads it back; what is finer than a millisecond is cut off.
pub fn format(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, size) in UNITS {
        if rest >= size {
            text.push_str(&format!("{}{unit}", rest / size));
            rest %= size;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

/// A length of time that serde reads and writes as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl From<Span> for Duration {
    fn from(span: Span) -> Self {
        span.0
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format(self.0))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize(deserializer).map(Self)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize(&self.0, serializer)
    }
}

/// For `#[serde(with = "…")]` on a [`Duration`].
///
/// # Errors
/// The serializer's own.
pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format(*duration))
}

/// For `#[serde(with = "…")]` on a [`Duration`].
///
/// # Errors
/// Not a text, or not a length of time.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    super::text::parsed(deserializer, "a length of time in quotes, like \"30s\"", parse)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_people_write_is_read() {
        for (text, millis) in [
            ("0s", 0),
            ("500ms", 500),
            ("30s", 30_000),
            ("2m", 120_000),
            ("1h30m", 5_400_000),
            ("1d2h3m4s5ms", 93_784_005),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn what_is_not_clear_is_refused_with_the_reason() {
        type Make = fn(String) -> BadDuration;
        let cases: [(&str, Make); 13] = [
            ("", BadDuration::Form),
            ("s", BadDuration::Form),
            ("30", BadDuration::Unit),
            ("1h30", BadDuration::Unit),
            ("-1s", BadDuration::Form),
            ("1.5s", BadDuration::Form),
            ("1 s", BadDuration::Form),
            ("1S", BadDuration::Form),
            ("1sec", BadDuration::Form),
            ("1s1m", BadDuration::Order),
            ("1s1s", BadDuration::Order),
            ("99999999999999999999s", BadDuration::Long),
            ("4000d", BadDuration::Long),
        ];
        for (text, make) in cases {
            assert_eq!(parse(text), Err(make(text.to_owned())), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(millis in 0..=u64::try_from(LONGEST.as_millis()).unwrap()) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse(&format(duration)), Ok(duration));
        }

        #[test]
        fn no_text_is_a_panic(text in ".{0,40}") {
            let _ = parse(&text);
        }
    }
}
