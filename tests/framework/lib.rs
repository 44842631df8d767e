//! What the integration tests share: laboratories to run in and ways to look at the kernel with its own eyes.

pub mod any_frame;
pub mod frame;
pub mod leftovers;
pub mod netlab;
pub mod observe;
pub mod postgres;
pub mod programs;
pub mod redis;
pub mod root;
pub mod sockets;
pub mod standstill;
pub mod sums;
pub mod traffic;
pub mod vm;
pub mod written;
