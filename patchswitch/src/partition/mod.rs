//! Logical computers: partitions of the host.

pub mod control;
pub mod resources;
pub mod spec;
