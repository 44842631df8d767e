//! Patches: what they are, and how they reach a partition.

pub mod wire;
