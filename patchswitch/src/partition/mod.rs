//! Logical computers: partitions of the host.

pub mod resources;
pub mod spec;
