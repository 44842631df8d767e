//! What a program costs to load: the kernel reads every path through it, and whoever adds a service waits for that.

use aya::util::KernelVersion;
use patchswitch_common::verdict::HOOKS;

use crate::bench::Bench;

/// Instructions that the kernel may read for a program. At 100,000 of them adding a service on an emulated processor
/// took seconds.
const BUDGET: u32 = 40_000;
/// The same for a verifier that prunes fewer paths of the same programs: on Linux 6.1 it reads 44,000 where that of 6.12
/// stays below the other number.
const OLD_BUDGET: u32 = 48_000;

#[test]
fn the_kernel_reads_the_programs_in_time() {
    let is_old = KernelVersion::current().unwrap() < KernelVersion::new(6, 12, 0);
    let budget = if is_old { OLD_BUDGET } else { BUDGET };
    let mut bench = Bench::new("cost").unwrap();
    for hook in HOOKS {
        let info = bench.info(hook).unwrap();
        let read = info.verified_instruction_count().unwrap();
        println!("{hook:?}: {read} instructions read, {} loaded", info.size_translated().unwrap_or(0) / 8);
        assert!(read <= budget, "{hook:?}: {read} instructions");
    }
    bench.finish().unwrap();
}
