//! What the targets have in common. `cargo +nightly fuzz run parse fuzz/corpus/parse fuzz/seeds -- -max_total_time=60`
//! runs one of them for a minute. An input is a frame as it is on the wire, so that every packet of the tests is a seed
//! for all targets: `PATCHSWITCH_SEEDS=$PWD/fuzz/seeds cargo xtask test packet` writes them down. `checksum` runs the
//! program in the kernel and needs root.

/// The same as the tests have.
#[path = "../tests/framework/any_frame/mod.rs"]
pub mod any_frame;
/// The same as the tests have.
#[path = "../tests/framework/sums.rs"]
pub mod sums;
/// The format of a log of writes. Alone: the rest of the crate is none of the fuzzer's.
#[path = "../patchswitch/src/storage/write_log/format.rs"]
pub mod write_log;
