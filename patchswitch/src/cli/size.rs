//! Sizes as people write them.

/// Reads a number of bytes: `512M`, `1G`, `1GiB`, `1048576`.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no size: give a number of bytes, or one with K, M, G or T behind it");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text.get(digits.len()..).unwrap_or_default() {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0).ok_or_else(bad)
}

/// Writes a number of bytes in the largest unit that leaves at least one.
pub(crate) fn format(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let unit = units.iter().find(|(shift, _)| bytes >> shift >= 1);
    match unit {
        None => bytes.to_string(),
        Some((shift, unit)) if bytes.trailing_zeros() >= *shift => format!("{}{unit}", bytes >> shift),
        Some((shift, unit)) => format!("{:.1}{unit}", bytes as f64 / (1u64 << shift) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [("1", 1), ("2K", 2048), ("512M", 512 << 20), ("1GiB", 1 << 30)] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for bad in ["", "0", "-1", "1X", "M", "99999999999T", "1.5G"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!([format(512 << 20), format(3 << 29), format(100)], ["512M", "1.5G", "100"]);
    }
}
