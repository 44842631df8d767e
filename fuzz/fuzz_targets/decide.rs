//! The rules of ownership, whatever packet, word and kernel: as many questions as matter, and the same with the roles
//! exchanged.

#![no_main]

libfuzzer_sys::fuzz_target!(|frame: &[u8]| {
    patchswitch_fuzz::any_frame::decide::check(frame);
});
