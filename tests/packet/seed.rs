//! The seed of what is generated: always the same one, or one that is given.

use anyhow::Context as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// A number from which other packets are generated.
const VARIABLE: &str = "PATCHSWITCH_PROPTEST_SEED";

/// What generates, after saying from what: a test that fails is repeated by it.
pub(crate) fn runner() -> anyhow::Result<TestRunner> {
    let seed = match std::env::var(VARIABLE) {
        Ok(text) => text.parse().with_context(|| format!("{VARIABLE} is a number"))?,
        Err(_) => 0_u64,
    };
    println!("generated from {VARIABLE}={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    Ok(TestRunner::new_with_rng(Config::default(), random))
}
