//! What a patch writes: its digest, its end, and a copy for the console.

use std::io::Write;

use sha2::{Digest, Sha256};

use crate::patch::wire::{self, LOG_TAIL_MAX};

/// A stream of output of which only the end is kept.
#[derive(Debug, Default)]
pub(super) struct Log {
    digest: Sha256,
    tail: Vec<u8>,
}

impl Log {
    /// Adds a piece, and copies it to the console.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        // Nobody may be reading the console; the digest and the tail are what counts.
        let _ = std::io::stderr().write_all(bytes);
        self.tail.extend_from_slice(bytes);
        // Cut seldom: moving the tail at every piece would be quadratic in the pieces.
        if self.tail.len() > 4 * LOG_TAIL_MAX {
            self.tail.drain(..self.tail.len() - LOG_TAIL_MAX);
        }
    }

    /// The digest of everything, and the end of it without control characters.
    pub(super) fn finish(self) -> (String, String) {
        let digest = hex(&self.digest.finalize());
        let text = wire::printable(&String::from_utf8_lossy(&self.tail));
        (digest, wire::tail(&text, LOG_TAIL_MAX).to_owned())
    }
}

/// Bytes as lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_of_everything_and_the_tail_is_the_end() {
        let (digest, tail) = Log::default().finish();
        assert_eq!(digest, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert!(tail.is_empty());
        let mut log = Log::default();
        let mut whole = Sha256::new();
        for number in 0..20_000 {
            let line = format!("{number}\n");
            whole.update(line.as_bytes());
            log.push(line.as_bytes());
        }
        let (digest, tail) = log.finish();
        assert_eq!(digest, hex(&whole.finalize()));
        assert!(tail.len() <= LOG_TAIL_MAX && tail.len() > LOG_TAIL_MAX - 10);
        assert!(tail.ends_with("\n19999\n"));
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_and_the_limit_holds() {
        let mut log = Log::default();
        log.push(&vec![0xff; LOG_TAIL_MAX]);
        let (_, tail) = log.finish();
        assert!(tail.len() <= LOG_TAIL_MAX && tail.contains('\u{fffd}'));
    }
}
