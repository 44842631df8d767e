//! What is refused by its headers alone: whatever the bytes are, the short way and the long one agree.

#![no_main]

libfuzzer_sys::fuzz_target!(|frame: &[u8]| {
    patchswitch_fuzz::any_frame::refuse::check(frame);
});
