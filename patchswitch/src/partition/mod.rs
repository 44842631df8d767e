//! Logical computers: partitions of the host.

pub mod bundle;
pub mod control;
pub mod resources;
mod seccomp;
pub mod spec;
