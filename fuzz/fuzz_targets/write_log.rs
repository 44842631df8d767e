//! Any bytes are read as the beginning of a log of writes and as an entry, or refused; what an entry names lies behind it.

#![no_main]

use patchswitch_fuzz::write_log::{Entry, Super};

libfuzzer_sys::fuzz_target!(|input: (u32, u32, u64, &[u8])| {
    let (sector, number, at, bytes) = input;
    let _ = Super::parse(bytes);
    if let Ok(entry) = Entry::parse(bytes, sector, (number.into(), at)) {
        assert!(entry.data >= at && entry.next >= entry.data, "{entry:?}");
    }
});
