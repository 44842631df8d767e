//! Of many records to the same places only the last one of each counts. A journal, a superblock and the end of a file that grows are
//! written again and again: a log is several times as long as what is different in the end.

use std::collections::BTreeMap;

/// What is to be written, the last of each place, in the order of the places.
#[derive(Debug, Default)]
pub(super) struct Latest(BTreeMap<u64, Part>);

/// A place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// How long it is, in bytes.
    pub(super) bytes: u64,
    /// Where its data is in the log; nothing if it was given up.
    pub(super) data: Option<u64>,
}

impl Part {
    /// What is left of it from so many bytes on.
    fn from(self, skipped: u64) -> Self {
        Self { bytes: self.bytes - skipped, data: self.data.map(|data| data + skipped) }
    }
}

impl Latest {
    /// A record comes after all others.
    pub(super) fn add(&mut self, at: u64, part: Part) {
        if part.bytes == 0 {
            return;
        }
        let end = at.saturating_add(part.bytes);
        // The one that begins before it may reach into it, or beyond.
        if let Some((&begins, &before)) = self.0.range(..at).next_back()
            && begins + before.bytes > at
        {
            self.0.insert(begins, Part { bytes: at - begins, ..before });
            if begins + before.bytes > end {
                self.0.insert(end, before.from(end - begins));
            }
        }
        while let Some((&begins, &inside)) = self.0.range(at..end).next() {
            self.0.remove(&begins);
            if begins + inside.bytes > end {
                self.0.insert(end, inside.from(end - begins));
            }
        }
        self.0.insert(at, part);
    }

    /// Takes them out, in their order: where each begins.
    pub(super) fn take(&mut self) -> impl Iterator<Item = (u64, Part)> + use<> {
        std::mem::take(&mut self.0).into_iter()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Byte for byte the same as to write one after the other.
        #[test]
        fn the_last_of_each_place_counts(records in proptest::collection::vec((0_u64..64, 0_u64..24, any::<bool>()), 0..40)) {
            let mut one_by_one = BTreeMap::new();
            let mut latest = Latest::default();
            for (number, (at, bytes, is_data)) in (0..).zip(records) {
                let data = is_data.then_some(number * 1000);
                for byte in 0..bytes {
                    one_by_one.insert(at + byte, data.map(|data| data + byte));
                }
                latest.add(at, Part { bytes, data });
            }
            let mut found = BTreeMap::new();
            let mut end = 0;
            for (at, Part { bytes, data }) in latest.take() {
                prop_assert!(at >= end && bytes > 0, "they overlap, or are not in their order");
                end = at + bytes;
                found.extend((0..bytes).map(|byte| (at + byte, data.map(|data| data + byte))));
            }
            prop_assert_eq!(found, one_by_one);
            prop_assert_eq!(latest.take().count(), 0);
        }
    }
}
