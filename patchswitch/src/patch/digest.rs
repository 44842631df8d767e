//! SHA-256 of a stream while it is copied: what was digested is what was written.

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

/// What was copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Copied {
    /// Lower-case hexadecimal digits.
    pub(super) sha256: String,
    pub(super) size: u64,
}

/// Copies at most `limit` bytes; one more is an error of kind `FileTooLarge`.
pub(super) fn copy(from: &mut impl Read, to: &mut impl Write, limit: u64) -> io::Result<Copied> {
    let mut digest = Sha256::new();
    let mut size: u64 = 0;
    let mut piece = vec![0; 64 << 10];
    loop {
        let count = match from.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        size += count as u64;
        if size > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let bytes = piece.get(..count).unwrap_or_default();
        digest.update(bytes);
        to.write_all(bytes)?;
    }
    Ok(Copied { sha256: hex(&digest.finalize()), size })
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_known_digest_and_ends_at_the_limit() {
        let mut to = Vec::new();
        let copied = copy(&mut &b"abc"[..], &mut to, 3).unwrap();
        // FIPS 180-2, appendix B.1.
        assert_eq!(copied.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!((copied.size, to.as_slice()), (3, &b"abc"[..]));
        let error = copy(&mut &b"abcd"[..], &mut Vec::new(), 3).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
