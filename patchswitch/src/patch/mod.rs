//! Patches: what they are, and how they reach a partition.

pub mod name;
pub mod wire;
