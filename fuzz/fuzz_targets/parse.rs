//! Any bytes are read or refused: nothing beyond the packet is taken for a part of it, and both directions see one flow.

#![no_main]

libfuzzer_sys::fuzz_target!(|frame: &[u8]| patchswitch_fuzz::any_frame::parse::check(frame));
